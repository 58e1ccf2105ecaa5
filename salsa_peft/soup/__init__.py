"""Weight averaging of adapters and checkpoints, usable without the rest: `soup()`, `StackedAdapter`, and the command `salsa soup`.

Names are loaded when they are first used, so that importing the package loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from salsa_peft.soup.average import soup
    from salsa_peft.soup.lora.stacked_adapter import StackedAdapter
    from salsa_peft.soup.strategies import STRATEGIES

_NAMES = {
    "soup": "salsa_peft.soup.average",
    "StackedAdapter": "salsa_peft.soup.lora.stacked_adapter",
    "STRATEGIES": "salsa_peft.soup.strategies",
}

__all__ = ["STRATEGIES", "StackedAdapter", "soup"]


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_NAMES[name]), name)
