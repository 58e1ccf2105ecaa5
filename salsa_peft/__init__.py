"""salsa_peft: RLHF whose KL reference is a model soup (SALSA), with one base and many adapters.

    from salsa_peft import SalsaPPOConfig, SalsaPPOTrainer, soup, use_reference

The names are imported on first use, so that importing the package does not import torch.
"""

import importlib
from typing import Any

__version__ = "0.2.0"

_NAMES = {
    "SalsaPPOTrainer": "salsa_peft.training.ppo.trainer",
    "SalsaPPOConfig": "salsa_peft.training.ppo.config",
    "use_reference": "salsa_peft.training.trl_reference",
}

__all__ = ["SalsaPPOConfig", "SalsaPPOTrainer", "__version__", "use_reference"]


def __getattr__(name: str) -> Any:
    if name == "soup":
        return importlib.import_module("salsa_peft.soup")
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from salsa_peft.utils.console import quiet_libraries

    with quiet_libraries():  # the first import of PEFT
        return getattr(importlib.import_module(_NAMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_NAMES])
