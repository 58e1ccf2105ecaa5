"""Precision of trained full weights: float32 master weights, or bf16 with stochastic rounding.

AdamW changes a weight by about the learning rate in each step, but neighbouring bf16 numbers around 0.02 differ by
1.2e-4. Rounding to the nearest number keeps only 2% of the change of 500 steps at learning rate 2e-6, and 0.1% at 1e-7.
Stochastic rounding keeps the change on average. bf16 weights with a float32 copy in the optimizer are not supported.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from salsa_peft.utils.errors import require

if TYPE_CHECKING:
    from transformers import TrainingArguments

OPTIMIZER, ROUNDING = "adamw_torch_8bit", "bf16_stochastic_round"


class Precision(NamedTuple):
    """How full weights are stored and updated."""

    weights: torch.dtype
    autocast: bool
    """Whether to use bf16 autocast on CUDA. bf16 weights need no autocast, and with autocast accelerate would copy each
    forward's outputs to float32."""
    optimizer: dict[str, str]
    """Fields of transformers.TrainingArguments for the optimizer; empty if any AdamW can be used."""


PRECISIONS = {
    "master": Precision(torch.float32, True, {}),
    "stochastic": Precision(torch.bfloat16, False, {"optim": OPTIMIZER, "optim_args": f"{ROUNDING}=True"}),
}
"""Value of `precision` in a recipe → Precision. A weight with its gradient and AdamW moments takes 16 bytes (master) or
6 bytes (stochastic), without autocast's copies and activations. The value head is float32 with both."""


def arguments(precision: str) -> dict[str, Any]:
    """TrainingArguments that set a precision. Raises SalsaError if torchao is needed and not installed."""
    chosen = PRECISIONS[precision]
    require(
        not chosen.optimizer or find_spec("torchao") is not None,
        f"precision: {precision} needs torchao for its optimizer; pip install 'salsa-peft[full]'",
    )
    return {"bf16": chosen.autocast and torch.cuda.is_available(), **chosen.optimizer}


def make_trained_float32(model: nn.Module) -> None:
    """Cast a model's trained weights to float32, in place. Optimizers must be made afterwards.

    PEFT makes float32 only the factors, not modules_to_save such as score heads, and TRL 1.16 casts all trained weights
    on a quantised base to bfloat16, where most of an optimizer's steps are rounded away.
    """
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()


def require_float32(model: nn.Module, args: TrainingArguments) -> None:
    """Raise SalsaError for a trained weight in a dtype too coarse for an optimizer's steps.

    Supported are float32 and, with an optimizer that rounds stochastically, bf16.
    """
    fine = {torch.float32, torch.bfloat16} if rounds_stochastically(args) else {torch.float32}
    for name, parameter in model.named_parameters():
        require(
            not parameter.requires_grad or parameter.dtype in fine,
            f"model: {name} is in {str(parameter.dtype).removeprefix('torch.')}, which rounds small updates away. Load"
            " the weights with dtype=torch.float32 and set bf16=True, or train float32 adapters over a bf16 base, or"
            f" use bf16 weights with stochastic rounding: optim='{OPTIMIZER}', optim_args='{ROUNDING}=True' (torchao)",
        )


def rounds_stochastically(args: TrainingArguments) -> bool:
    """Whether the arguments select the optimizer with stochastic rounding, which bf16 weights need."""
    given = dict(part.split("=") for part in (args.optim_args or "").replace(" ", "").split(",") if "=" in part)
    return args.optim == OPTIMIZER and given.get(ROUNDING, "").lower() in ("true", "1", "yes", "y", "t", "on")
