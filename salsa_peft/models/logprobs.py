"""Log-probabilities of tokens from hidden states, in chunks: logits of shape (B, T, V) never exist.

An architecture's scaling and soft cap of the logits are applied.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from salsa_peft.models.architectures.memory import CHUNK
from salsa_peft.models.base import causal_lm, hidden_states
from salsa_peft.utils.errors import require

CAPS = ("final_logit_softcapping", "logits_soft_cap")
"""Names of the logits' soft cap in model configurations."""
FACTORS = {"logit_scale": 1, "lm_head_multiplier": 1, "logits_scaling": -1}
"""Names of the logits' factor in model configurations; 1: the logits are multiplied by it, -1: divided by it."""
MULTIPLIED = ("hyperclovax",)
"""Architectures that multiply by `logits_scaling` instead of dividing."""


class LogitScaling(NamedTuple):
    """An architecture's change of the output embeddings' product z: factor · z, then cap · tanh(z / cap)."""

    factor: float = 1.0
    cap: float | None = None
    """None: no soft cap."""

    def __call__(self, product: torch.Tensor) -> torch.Tensor:
        """Products (…, V) → logits (…, V). The products are overwritten."""
        if self.factor != 1:
            product = product.mul_(self.factor)
        return product if self.cap is None else product.div_(self.cap).tanh_() * self.cap

    def slope(self, logits: torch.Tensor) -> torch.Tensor | None:
        """∂ logit / ∂ product (…, V), which is factor · (1 − (logit / cap)²); None without a cap: it is `factor`."""
        return None if self.cap is None else (logits / self.cap).square_().neg_().add_(1).mul_(self.factor)


def logit_scaling(lm: Any) -> LogitScaling:
    """The scaling of a model's logits, by its configuration; `check_head` verifies it."""
    config = lm.config.get_text_config(decoder=True).to_dict()
    cap = next((float(config[name]) for name in CAPS if config.get(name)), None)
    factor = 1.0
    for name, power in FACTORS.items():
        if config.get(name) is not None:
            factor *= float(config[name]) ** (1 if config.get("model_type") in MULTIPLIED else power)
    return LogitScaling(factor, cap)


LARGE = 50.0
"""Size of the logits in the second forward of `check_head`, larger than any soft cap."""


def check_head(model: nn.Module) -> None:
    """Raise SalsaError unless a model's logits are those that its states and output embeddings give.

    Log-probs are computed that way, so any other architecture would get wrong ones. Two forwards are compared: one as
    it is, and one with a larger input of the head, because a soft cap hardly changes the small logits of an untrained
    model.
    """
    lm = causal_lm(model)
    kind = lm.config.model_type
    require(
        lm.get_output_embeddings() is not None and not lm.config.is_encoder_decoder,
        f"{kind}: a {type(lm).__name__} is not a decoder-only causal language model; load one with"
        " AutoModelForCausalLM",
    )
    head, scaling = lm.get_output_embeddings(), logit_scaling(lm)
    adapted = isinstance(head, BaseTunerLayer | AuxiliaryTrainingWrapper)  # head_of raises the error for it
    require(
        adapted or type(head).forward is nn.Linear.forward,
        f"{kind}: its output embeddings are a {type(head).__name__}, not a plain linear layer. This architecture is"
        " not supported; use one like Llama, Mistral, Gemma or Qwen",
    )
    probe, training = torch.tensor([[1, 2, 3]], device=lm.device), lm.training
    lm.eval()  # with dropout two forwards would differ
    with torch.no_grad():
        states = hidden_states(lm, probe, torch.ones_like(probe))
        product = head(states).float().abs().max().item()
        for factor in (1.0, LARGE / product if product else 1.0):
            with head.register_forward_pre_hook(lambda _, inputs, by=factor: (inputs[0] * by, *inputs[1:])):
                expected = lm(input_ids=probe, use_cache=False).logits.float()
            _require_same_logits(kind, expected, scaling(head(states * factor).float().clone()))
    lm.train(training)


def _require_same_logits(kind: str, expected: torch.Tensor, found: torch.Tensor) -> None:
    require(
        bool(expected.isfinite().all()),
        f"{kind}: the model's logits are NaN or infinite; look for NaN in its weights, or for a dtype that overflows",
    )
    same = expected.shape == found.shape
    error = (expected - found).abs().max().item() if same else math.nan
    require(
        same and error <= 1e-2 * max(1.0, expected.abs().max().item()),
        f"{kind}: the model's logits are not those of its output embeddings with its config's scaling and cap"
        f" (difference {error:.3g}). This architecture is not supported; use one like Llama, Mistral, Gemma or Qwen",
    )


class Head(NamedTuple):
    """Everything that turns a hidden state into the distribution that tokens are sampled from."""

    weight: Tensor
    """(V, H), the output embeddings."""
    bias: Tensor | None
    """(V,)"""
    temperature: float
    eos: tuple[int, ...]
    """The tokens that end a response (data/chat/turn_ends.py), which `forbidden` excludes."""
    scaling: LogitScaling = LogitScaling()
    """Applied before the division by the temperature."""


class TokenLogprobs(NamedTuple):
    """Log-probs and entropies of N tokens, both (N,), float32."""

    logprobs: Tensor
    entropy: Tensor


def head_of(lm: Any, temperature: float, eos: tuple[int, ...]) -> Head:
    """The Head of a causal language model. Raises SalsaError if an adapter changes it."""
    embeddings: nn.Linear = lm.get_output_embeddings()
    require(
        not isinstance(embeddings, BaseTunerLayer | AuxiliaryTrainingWrapper),
        "target_modules: the adapter is on the output embeddings, which policy and references share; leave lm_head out",
    )
    return Head(embeddings.weight, embeddings.bias, temperature, eos, logit_scaling(lm))


def log_distribution(hidden: Tensor, head: Head, forbidden: Tensor) -> Tensor:
    """log π(· | state) (n, V), float32, from states (n, H); forbidden (n,): where EOS is excluded."""
    return normalized(_logits(hidden, head).div_(head.temperature), forbidden, head.eos)


def _logits(hidden: Tensor, head: Head) -> Tensor:
    """The model's logits (n, V), float32, which the caller may overwrite."""
    return head.scaling(nn.functional.linear(hidden.to(head.weight.dtype), head.weight, head.bias).float())


def normalized(scaled: Tensor, forbidden: Tensor, eos: tuple[int, ...]) -> Tensor:
    """Log-probs (n, V) from scaled logits (n, V), which may be overwritten; forbidden (n,): where EOS is excluded."""
    if forbidden.any():
        scaled[:, list(eos)] = scaled[:, list(eos)].masked_fill(forbidden[:, None], -torch.inf)
    return scaled.log_softmax(-1)


def entropy_of(logp: Tensor, probabilities: Tensor) -> Tensor:
    """Entropy (n,) in nats from log-probs (n, V) and their exponentials; excluded tokens add nothing."""
    return -(probabilities * logp.masked_fill(logp == -torch.inf, 0.0)).sum(-1)


def _chosen(hidden: Tensor, labels: Tensor, forbidden: Tensor, head: Head) -> tuple[Tensor, Tensor]:
    """Log-probs of the labels (n,) and of all tokens (n, V)."""
    logp = log_distribution(hidden, head, forbidden)
    return logp.gather(-1, labels[:, None]).squeeze(-1), logp


def _logprob_gradient(probabilities: Tensor, labels: Tensor, slope: Tensor | None, head: Head) -> Tensor:
    """∂ log p(label) / ∂ hidden (n, H), in the head's dtype; probabilities (n, V) are overwritten."""
    own = head.weight[labels]
    if slope is not None:
        probabilities = probabilities.mul_(slope)
        own = own * slope.gather(-1, labels[:, None]).to(own.dtype)
    gradient = own - probabilities.to(own.dtype) @ head.weight
    return gradient / head.temperature if slope is not None else gradient * (head.scaling.factor / head.temperature)


class _FrozenHead(torch.autograd.Function):
    """Log-probs and entropies of a frozen head; only log-probs have a gradient, with respect to `hidden`."""

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
            logp = normalized(logits.div_(head.temperature), forbidden[part], head.eos)
            logprobs[part] = logp.gather(-1, labels[part][:, None]).squeeze(-1)
            if with_entropy:
                entropy[part] = entropy_of(logp, logp.exp())
            if gradient is not None:
                gradient[part] = _logprob_gradient(logp.exp_(), labels[part], slope, head).to(hidden.dtype)
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
    """log π(label | state) and entropies, (N,) float32, from hidden (N, H), labels (N,), forbidden (N,).

    forbidden: True where EOS is excluded. The log-probs have a gradient. The entropies are for logging and have none; they are 0 unless `with_entropy`.
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
    """KL(π ‖ reference) over the whole vocabulary (N,), float32, from states (N, H) and heads of both."""
    kl = hidden.new_empty(len(hidden), dtype=torch.float32)
    for start in range(0, len(hidden), CHUNK):
        part = slice(start, start + CHUNK)
        policy = log_distribution(hidden[part], head, forbidden[part])
        other = log_distribution(reference[part], reference_head, forbidden[part])
        difference = (policy - other).masked_fill(policy == -torch.inf, 0.0)  # an excluded token adds nothing
        kl[part] = (policy.exp() * difference).sum(-1)
    return kl
