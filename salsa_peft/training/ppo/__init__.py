"""PPO with any references: `SalsaPPOTrainer` and `SalsaPPOConfig`, imported on first use."""

from __future__ import annotations

import importlib
from typing import Any

_NAMES = {
    "SalsaPPOTrainer": "salsa_peft.training.ppo.trainer",
    "SalsaPPOConfig": "salsa_peft.training.ppo.config",
}

__all__ = ["SalsaPPOConfig", "SalsaPPOTrainer"]


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_NAMES[name]), name)
