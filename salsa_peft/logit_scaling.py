"""What a model makes of its head's product: soft caps and factors of the logits, and whether that is all it does.

Gemma 2 caps its logits, Cohere multiplies and Granite divides them. Log-probs, KL and gradients need the same function (logprobs.py).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from salsa_peft.models import causal_lm, hidden_states
from salsa_peft.utils.errors import require

CAPS = ("final_logit_softcapping", "logits_soft_cap")
"""What configurations call the soft cap of the logits."""
FACTORS = {"logit_scale": 1, "lm_head_multiplier": 1, "logits_scaling": -1}
"""What configurations call the factor of the logits: 1 where they are multiplied by it, -1 where they are divided by it."""
MULTIPLIED = ("hyperclovax",)
"""Architectures that multiply by `logits_scaling`."""


class LogitScaling(NamedTuple):
    """What an architecture makes of its head's product z before it calls it logits: factor · z, then cap · tanh(z / cap)."""

    factor: float = 1.0
    cap: float | None = None
    """None: no soft cap."""

    def __call__(self, product: torch.Tensor) -> torch.Tensor:
        """Products (…, V), overwritten, → logits (…, V)."""
        if self.factor != 1:
            product = product.mul_(self.factor)
        return product if self.cap is None else product.div_(self.cap).tanh_() * self.cap

    def slope(self, logits: torch.Tensor) -> torch.Tensor | None:
        """∂ logit / ∂ product from the logits (…, V): factor · (1 − (logit / cap)²); None where it is `factor` everywhere."""
        return None if self.cap is None else (logits / self.cap).square_().neg_().add_(1).mul_(self.factor)


def logit_scaling(lm: Any) -> LogitScaling:
    """By the model's configuration; `check_head` holds it against the model's own logits."""
    said = lm.config.get_text_config(decoder=True).to_dict()
    cap = next((float(said[name]) for name in CAPS if said.get(name)), None)
    factor = 1.0
    for name, power in FACTORS.items():
        if said.get(name) is not None:
            factor *= float(said[name]) ** (1 if said.get("model_type") in MULTIPLIED else power)
    return LogitScaling(factor, cap)


LARGE = 50.0
"""Logits of a probe: beyond every cap, and whatever the weights are."""


def check_head(model: nn.Module) -> None:
    """Raise SalsaError unless this is a causal language model whose logits are known from its output embeddings and trunk.

    Log-probs are computed from these in chunks (logprobs.py), so an architecture that does more with its logits than scale and cap
    them as its configuration says would be scored wrongly. One forward is compared as it is, and one with the head's input enlarged,
    because a cap leaves the small logits of an untrained model almost as they are.
    """
    lm = causal_lm(model)
    kind = lm.config.model_type
    require(
        lm.get_output_embeddings() is not None and not lm.config.is_encoder_decoder,
        f"{kind}: found {type(lm).__name__}, expected a decoder-only causal language model, as AutoModelForCausalLM gives",
    )
    head, scaling = lm.get_output_embeddings(), logit_scaling(lm)
    adapted = isinstance(head, BaseTunerLayer | AuxiliaryTrainingWrapper)  # which logprobs.head_of refuses
    require(
        adapted or type(head).forward is nn.Linear.forward,
        f"{kind}: its output embeddings are a {type(head).__name__}, which is no plain linear layer. This architecture is not supported; use"
        " one like Llama, Mistral, Gemma or Qwen",
    )
    probe, training = torch.tensor([[1, 2, 3]], device=lm.device), lm.training
    lm.eval()  # with dropout two forwards differ
    with torch.no_grad():
        states = hidden_states(lm, probe, torch.ones_like(probe))
        product = head(states).float().abs().max().item()
        enlarge = LARGE / product if product else 1.0
        for factor in (1.0, enlarge):
            with _enlarged(head, factor):
                expected = lm(input_ids=probe, use_cache=False).logits.float()
            found = scaling(head(states * factor).float().clone())
            _require_same_logits(kind, expected, found)
    lm.train(training)


@contextlib.contextmanager
def _enlarged(head: nn.Module, factor: float) -> Iterator[None]:
    """Within the context the head's input is multiplied by `factor`."""
    hook = head.register_forward_pre_hook(lambda _, inputs: (inputs[0] * factor, *inputs[1:]))
    try:
        yield
    finally:
        hook.remove()


def _require_same_logits(kind: str, expected: torch.Tensor, found: torch.Tensor) -> None:
    require(
        bool(expected.isfinite().all()),
        f"{kind}: found logits that are not finite, expected finite ones; look for NaN in the weights, or for a dtype that overflows",
    )
    same = expected.shape == found.shape
    error = (expected - found).abs().max().item() if same else math.nan
    require(
        same and error <= 1e-2 * max(1.0, expected.abs().max().item()),
        f"{kind}: the model's logits are not those of its output embeddings, scaled and capped as its config says (they differ by {error:.3g})."
        " This architecture is not supported; use one like Llama, Mistral, Gemma or Qwen",
    )
