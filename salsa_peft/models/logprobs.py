"""Log-probabilities of chosen tokens from hidden states, in chunks, with the logits' soft caps and scalings: (B, T, V) logits never exist."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from salsa_peft.models.base import causal_lm, hidden_states
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

    Log-probs are computed from these in chunks (models/logprobs.py), so an architecture that does more with its logits than scale and cap
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


CHUNK = 256


class Head(NamedTuple):
    """What turns a hidden state into the sampled distribution."""

    weight: Tensor
    """(V, H), the output embeddings."""
    bias: Tensor | None
    """(V,)"""
    temperature: float
    eos: tuple[int, ...]
    """The tokens that `forbidden` forbids: those that end a response (data/chat/turn_ends.py)."""
    scaling: LogitScaling = LogitScaling()
    """What the architecture makes of the product before it is divided by the temperature."""


class TokenLogprobs(NamedTuple):
    """Both (N,), float32."""

    logprobs: Tensor
    entropy: Tensor


def head_of(lm: Any, temperature: float, eos: tuple[int, ...]) -> Head:
    """The Head of a Transformers causal language model. Raises SalsaError where adapters change it: policy and references share it."""
    embeddings: nn.Linear = lm.get_output_embeddings()
    require(
        not isinstance(embeddings, BaseTunerLayer | AuxiliaryTrainingWrapper),
        "target_modules: found an adapter on the output embeddings, expected adapters of the trunk only; leave lm_head out",
    )
    return Head(embeddings.weight, embeddings.bias, temperature, eos, logit_scaling(lm))


def log_distribution(hidden: Tensor, head: Head, forbidden: Tensor) -> Tensor:
    """log π(· | state) as it was sampled: (n, H) and (n,) True = EOS forbidden → (n, V), float32."""
    return _normalized(_logits(hidden, head).div_(head.temperature), forbidden, head.eos)


def _logits(hidden: Tensor, head: Head) -> Tensor:
    """The model's logits (n, V), float32: nobody else has them, so they may be overwritten."""
    return head.scaling(nn.functional.linear(hidden.to(head.weight.dtype), head.weight, head.bias).float())


def sampled_distribution(logits: Tensor, forbidden: Tensor, temperature: float, eos: tuple[int, ...]) -> Tensor:
    """Logits (n, V) and (n,) True = EOS forbidden → log-probs of the distribution that is sampled, (n, V), float32."""
    return _normalized(logits.float() / temperature, forbidden, eos)


def _normalized(scaled: Tensor, forbidden: Tensor, eos: tuple[int, ...]) -> Tensor:
    if forbidden.any():
        scaled[:, list(eos)] = scaled[:, list(eos)].masked_fill(forbidden[:, None], -torch.inf)
    return scaled.log_softmax(-1)


def entropy_of(logp: Tensor, probabilities: Tensor) -> Tensor:
    """Of log-probs (n, V) and their exponentials → (n,), nats; what is forbidden adds nothing."""
    return -(probabilities * logp.masked_fill(logp == -torch.inf, 0.0)).sum(-1)


def _chosen(hidden: Tensor, labels: Tensor, forbidden: Tensor, head: Head) -> tuple[Tensor, Tensor]:
    """Log-probs of the labels (n,), and those of all tokens (n, V)."""
    logp = log_distribution(hidden, head, forbidden)
    return logp.gather(-1, labels[:, None]).squeeze(-1), logp


def _toward(probabilities: Tensor, labels: Tensor, slope: Tensor | None, head: Head) -> Tensor:
    """∂ log p(label) / ∂ hidden (n, H) in the head's dtype. probabilities (n, V) are overwritten; slope (n, V): None where it is one factor."""
    own = head.weight[labels]
    if slope is not None:
        probabilities = probabilities.mul_(slope)
        own = own * slope.gather(-1, labels[:, None]).to(own.dtype)
    toward = own - probabilities.to(own.dtype) @ head.weight
    return toward / head.temperature if slope is not None else toward * (head.scaling.factor / head.temperature)


class _FrozenHead(torch.autograd.Function):
    """(hidden, labels, forbidden, head, with_entropy) → log-probs with a gradient to `hidden` only, and entropy without one."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, labels: Tensor, forbidden: Tensor, head: Head, with_entropy: bool
    ) -> tuple[Tensor, Tensor]:
        logprobs = hidden.new_empty(len(labels), dtype=torch.float32)
        entropy = torch.zeros_like(logprobs)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(labels), CHUNK):
            part = slice(start, start + CHUNK)
            logits = _logits(hidden[part], head)
            slope = None if gradient is None else head.scaling.slope(logits)
            logp = _normalized(logits.div_(head.temperature), forbidden[part], head.eos)
            logprobs[part] = logp.gather(-1, labels[part][:, None]).squeeze(-1)
            if with_entropy:
                entropy[part] = entropy_of(logp, logp.exp())
            if gradient is not None:
                gradient[part] = _toward(logp.exp_(), labels[part], slope, head).to(hidden.dtype)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[0][:, None].to(gradient.dtype), None, None, None, None


def token_logprobs(
    hidden: Tensor, labels: Tensor, forbidden: Tensor, head: Head, *, with_entropy: bool = True
) -> TokenLogprobs:
    """log π(label | state) and the entropy there: hidden (N, H), labels (N,), forbidden (N,) bool → two (N,), float32.

    The gradient flows through the log-probs; the entropy is a figure for the logs, and 0 where it is not asked for.
    """
    if not head.weight.requires_grad:
        return TokenLogprobs(*_FrozenHead.apply(hidden, labels, forbidden, head, with_entropy))
    logprobs, entropy = [], []
    for part in zip(hidden.split(CHUNK), labels.split(CHUNK), forbidden.split(CHUNK), strict=True):
        chosen, logp = checkpoint(_chosen, *part, head, use_reentrant=False)
        logprobs.append(chosen)
        logp = logp.detach()
        entropy.append(entropy_of(logp, logp.exp()) if with_entropy else torch.zeros_like(logp[:, 0]))
    return TokenLogprobs(torch.cat(logprobs), torch.cat(entropy))


@torch.no_grad()
def full_kl(hidden: Tensor, reference: Tensor, forbidden: Tensor, head: Head, reference_head: Head) -> Tensor:
    """KL(π ‖ reference), exact over the vocabulary: two (N, H) of hidden states and their heads → (N,), float32."""
    kl = hidden.new_empty(len(hidden), dtype=torch.float32)
    for start in range(0, len(hidden), CHUNK):
        part = slice(start, start + CHUNK)
        policy = log_distribution(hidden[part], head, forbidden[part])
        other = log_distribution(reference[part], reference_head, forbidden[part])
        difference = (policy - other).masked_fill(policy == -torch.inf, 0.0)  # a forbidden token adds nothing
        kl[part] = (policy.exp() * difference).sum(-1)
    return kl
