"""What full weights are held in so that steps of 2e-6 and 1e-7 move them: float32 masters, or bf16 rounded at random.

AdamW moves a weight of size 0.02 by about the learning rate a step; bf16 holds such a weight to 6e-5, and rounding to nearest gives the
weight back: of 500 steps at 2e-6 about 2% arrive, at 1e-7 0.1%. Rounded up or down at random, in proportion, all of it arrives on average.
Left out: an optimizer of ours (the 8-bit one is torchao's, through Transformers), and bf16 weights with a float32 copy in the optimizer.
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
    """How trained full weights are held and moved."""

    weights: torch.dtype
    autocast: bool
    """bf16 arithmetic over float32 weights, on CUDA. Weights in bf16 need none, and would pay for a float32 copy of what forward returns."""
    optimizer: dict[str, str]
    """Of transformers.TrainingArguments; nothing where any AdamW will do."""


PRECISIONS = {
    "master": Precision(torch.float32, True, {}),
    "stochastic": Precision(torch.bfloat16, False, {"optim": OPTIMIZER, "optim_args": f"{ROUNDING}=True"}),
}
"""Name → how full weights are trained; both hold the value head in float32. With gradient and moments a weight takes 16 bytes, or 6; the
weights that autocast casts (2 bytes) and activations come on top."""


def weights_dtype(precision: str) -> torch.dtype:
    """What trained weights are loaded in."""
    return PRECISIONS[precision].weights


def arguments(precision: str) -> dict[str, Any]:
    """What transformers.TrainingArguments takes for it. Raises SalsaError where torchao is missing and needed."""
    chosen = PRECISIONS[precision]
    require(
        not chosen.optimizer or find_spec("torchao") is not None,
        f"precision: found {precision} without torchao, which has its optimizer; pip install 'salsa-peft[full]'",
    )
    return {"bf16": chosen.autocast and torch.cuda.is_available(), **chosen.optimizer}


def rounds_stochastically(args: TrainingArguments) -> bool:
    """Whether the optimizer that these arguments name moves bf16 weights by steps smaller than bf16 holds."""
    given = dict(part.split("=") for part in (args.optim_args or "").replace(" ", "").split(",") if "=" in part)
    return args.optim == OPTIMIZER and given.get(ROUNDING, "").lower() in ("true", "1", "yes", "y", "t", "on")
