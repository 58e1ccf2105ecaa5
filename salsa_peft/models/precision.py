"""Precision of trained full weights: float32 master weights, or bf16 with stochastic rounding.

AdamW changes a weight by about the learning rate each step, but two neighbouring bf16 numbers around 0.02 differ by
6e-5. With rounding to nearest only 2% of the change of 500 steps at 2e-6 is kept, and 0.1% at 1e-7; with stochastic
rounding all of it is, on average. Not offered: bf16 weights with a float32 copy in the optimizer.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from salsa_peft.utils.errors import require

if TYPE_CHECKING:
    from transformers import TrainingArguments

OPTIMIZER, ROUNDING = "adamw_torch_8bit", "bf16_stochastic_round"


class Precision(NamedTuple):
    """How full weights are stored and updated."""

    weights: torch.dtype
    autocast: bool
    """Whether to use bf16 autocast on CUDA. bf16 weights need none, and it would make a float32 copy of each forward's
    outputs."""
    optimizer: dict[str, str]
    """Fields of transformers.TrainingArguments that set the optimizer; empty if any AdamW works."""


PRECISIONS = {
    "master": Precision(torch.float32, True, {}),
    "stochastic": Precision(torch.bfloat16, False, {"optim": OPTIMIZER, "optim_args": f"{ROUNDING}=True"}),
}
"""By the recipe's name. A weight with its gradient and moments takes 16 bytes (master) or 6 (stochastic); autocast's
copies and activations come on top. Both keep the value head in float32."""


def arguments(precision: str) -> dict[str, Any]:
    """TrainingArguments of a precision. Raises SalsaError if it needs torchao, which is not installed."""
    chosen = PRECISIONS[precision]
    require(
        not chosen.optimizer or find_spec("torchao") is not None,
        f"precision: {precision} needs torchao for its optimizer; pip install 'salsa-peft[full]'",
    )
    return {"bf16": chosen.autocast and torch.cuda.is_available(), **chosen.optimizer}


def rounds_stochastically(args: TrainingArguments) -> bool:
    """Whether these arguments set the optimizer with stochastic rounding, which can train bf16 weights."""
    given = dict(part.split("=") for part in (args.optim_args or "").replace(" ", "").split(",") if "=" in part)
    return args.optim == OPTIMIZER and given.get(ROUNDING, "").lower() in ("true", "1", "yes", "y", "t", "on")
