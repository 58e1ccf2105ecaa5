"""Precision of weights and forwards: which weights are float32, and which forwards run under bf16 autocast.

What is trained is float32, except full weights in bf16 with stochastic rounding, whose score and value heads are
float32 too. AdamW changes a weight by about the learning rate in each step, but neighbouring bf16 numbers around 0.02
differ by 1.2e-4. Rounding to the nearest number keeps only 2% of the change of 500 steps at learning rate 2e-6, and
0.1% at 1e-7. Stochastic rounding keeps the change on average. bf16 weights with a float32 copy in the optimizer are not
supported.
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from peft import PeftModel
from torch import nn

from salsa_peft.models.base import causal_lm
from salsa_peft.utils.errors import require

if TYPE_CHECKING:
    from transformers import TrainingArguments

OPTIMIZER, ROUNDING = "adamw_torch_8bit", "bf16_stochastic_round"


class Precision(NamedTuple):
    """How full weights are stored and updated."""

    weights: torch.dtype
    optimizer: dict[str, str]
    """Fields of transformers.TrainingArguments for the optimizer; empty if any AdamW can be used."""


PRECISIONS = {
    "master": Precision(torch.float32, {}),
    "stochastic": Precision(torch.bfloat16, {"optim": OPTIMIZER, "optim_args": f"{ROUNDING}=True"}),
}
"""Value of `precision` in a recipe → Precision. A weight with its gradient and AdamW moments takes 16 bytes (master) or
6 bytes (stochastic), without autocast's copies and activations. Score and value heads are float32 with both."""


def uses_autocast(dtype: torch.dtype, *, float32_weights: bool) -> bool:
    """Whether forwards run under bf16 autocast: those in which float32 weights meet a model in bf16.

    Training, sampling, scoring, evaluation and landscapes all follow this rule, so that they compute the same numbers,
    on a CPU too. With bf16 weights alone autocast would change nothing, and accelerate would copy each forward's outputs
    to float32. With `dtype` float32 all arithmetic is float32.

    dtype: of the recipe's base. float32_weights: whether adapters or master weights take part in the forwards.
    """
    return float32_weights and dtype == torch.bfloat16


def autocast(model: nn.Module) -> AbstractContextManager[Any]:
    """Context for forwards of a model outside of a Trainer, with bf16 autocast if `uses_autocast` says so.

    It turns autocast off for a model in bf16 without adapters, and changes nothing for a model in another dtype: with
    bf16=True, SalsaPPOTrainer trains float32 weights under autocast, and scores with them so too.
    """
    lm = causal_lm(model)
    if lm.dtype != torch.bfloat16:
        return contextlib.nullcontext()
    enabled = uses_autocast(lm.dtype, float32_weights=isinstance(model, PeftModel))
    return torch.autocast(lm.device.type, torch.bfloat16, enabled=enabled)


def autocast_as(policy: nn.Module, reference: nn.Module | None) -> AbstractContextManager[Any]:
    """Context in which a reference in float32, which moves towards a policy in bf16, computes as the policy does."""
    lm = causal_lm(policy)
    if reference is None or (lm.dtype, causal_lm(reference).dtype) != (torch.bfloat16, torch.float32):
        return contextlib.nullcontext()
    return torch.autocast(lm.device.type, torch.bfloat16)


def arguments(precision: str) -> dict[str, Any]:
    """TrainingArguments of a precision's optimizer. Raises SalsaError if torchao is needed and not installed."""
    chosen = PRECISIONS[precision]
    require(
        not chosen.optimizer or find_spec("torchao") is not None,
        f"precision: {precision} needs torchao for its optimizer; pip install 'salsa-peft[full]'",
    )
    return dict(chosen.optimizer)


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
