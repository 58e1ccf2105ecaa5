"""Weight averaging of LoRA adapters and of checkpoints, from folders and on a model, and `salsa soup`.

    soup(OUT, [A, B], weights)                   folders of adapters or checkpoints → a folder
    attach(model, ["a", "b"], weights)           adapters on a PEFT model → one more adapter on it
    StackedAdapter.load([A, B])                  folders of adapters as one adapter whose weights can be moved

`attach` and `add_weighted_adapter` are imported on first use, since they import torch.
"""

from typing import TYPE_CHECKING, Any

from salsa_peft.soup.average import soup
from salsa_peft.soup.lora.stacked_adapter import StackedAdapter
from salsa_peft.soup.strategies import STRATEGIES

if TYPE_CHECKING:
    from salsa_peft.soup.attached import AttachedSoup, add_weighted_adapter, attach

__all__ = ["STRATEGIES", "AttachedSoup", "StackedAdapter", "add_weighted_adapter", "attach", "soup"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from salsa_peft.soup import attached

    return vars(attached)[name]
