"""Log-probabilities of chosen tokens from hidden states, in chunks: the (B, T, V) logits never exist.

Where the output embeddings are frozen, one pass is enough: ∂ log p(y)/∂h = (s_y W_y − Σ_v p_v s_v W_v) / temperature is formed
while the chunk's probabilities are at hand, and the backward only scales it (what fused linear losses do). s_v is the slope of the
architecture's own scaling of the logits: 1 in most, a factor in Cohere and Granite, 1 − tanh² in Gemma 2. Where the embeddings are
trained, the chunk is recomputed under torch's checkpoint. TRL's fused head is a choice for CUDA only: its default tiles are
large and it scores prompts too, which is why this is ours.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from salsa_peft.logit_scaling import LogitScaling, logit_scaling
from salsa_peft.utils.errors import require

CHUNK = 256


class Head(NamedTuple):
    """What turns a hidden state into the sampled distribution."""

    weight: Tensor
    """(V, H), the output embeddings."""
    bias: Tensor | None
    """(V,)"""
    temperature: float
    eos: tuple[int, ...]
    """The tokens that `forbidden` forbids: those that end a response (turn_ends.py)."""
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
