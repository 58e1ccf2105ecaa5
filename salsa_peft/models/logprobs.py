"""Log-probabilities of tokens from hidden states, in chunks that avoid logits of shape (B, T, V).

Logits are scaled and soft-capped as in the architecture. Shapes: N tokens, n tokens of a chunk, V tokens of the
vocabulary, H hidden size.
"""

import math
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from salsa_peft.models.architectures.memory import CHUNK
from salsa_peft.models.base import autocast_for_flash_attention, causal_lm, hidden_states
from salsa_peft.utils.errors import require

CAPS = ("final_logit_softcapping", "logits_soft_cap")
"""Keys of the logits' soft cap in model configurations."""
FACTORS = {"logit_scale": 1, "lm_head_multiplier": 1, "logits_scaling": -1}
"""Keys of the logits' factor in model configurations → 1 if logits are multiplied by the factor, -1 if divided."""
MULTIPLIED = ("hyperclovax",)
"""Architectures that multiply the logits by `logits_scaling` instead of dividing by it."""


class LogitScaling(NamedTuple):
    """Computes logits from z, the result of the output embeddings, as cap · tanh(factor · z / cap)."""

    factor: float = 1.0
    cap: float | None = None
    """Soft cap of the logits. None means no soft cap: the logits are then factor · z."""

    def __call__(self, product: torch.Tensor) -> torch.Tensor:
        """Compute logits (…, V) from `product`, the z (…, V), which is overwritten."""
        if self.factor != 1:
            product = product.mul_(self.factor)
        return product if self.cap is None else product.div_(self.cap).tanh_() * self.cap

    def slope(self, logits: torch.Tensor) -> torch.Tensor | None:
        """∂ logit / ∂ z = factor · (1 − (logit / cap)²), (…, V); None without a cap, where it is `factor`."""
        return None if self.cap is None else (logits / self.cap).square_().neg_().add_(1).mul_(self.factor)


def logit_scaling(lm: Any) -> LogitScaling:
    """Read the scaling of a model's logits from its configuration; `check_head` verifies the result."""
    config = lm.config.get_text_config(decoder=True).to_dict()
    cap = next((float(config[name]) for name in CAPS if config.get(name)), None)
    factor = 1.0
    for name, power in FACTORS.items():
        if config.get(name) is not None:
            factor *= float(config[name]) ** (1 if config.get("model_type") in MULTIPLIED else power)
    return LogitScaling(factor, cap)


LARGE = 50.0
"""Largest |z| (see LogitScaling) in the second forward of `check_head`, where soft caps have a clear effect."""


def check_head(model: nn.Module) -> None:
    """Raise SalsaError unless a model's logits equal those computed here from its hidden states.

    Log-probs are computed from hidden states, output embeddings and LogitScaling, and would be wrong for a model whose
    logits depend on anything else. The comparison is made in two forwards. In the second, the inputs of the output
    embeddings are scaled up, because a soft cap hardly changes the small logits of an untrained model.
    """
    lm = causal_lm(model)
    kind = lm.config.model_type
    require(
        lm.get_output_embeddings() is not None and not lm.config.is_encoder_decoder,
        f"{kind}: a {type(lm).__name__} is not a decoder-only causal language model; load such a model"
        " with AutoModelForCausalLM",
    )
    head, scaling = lm.get_output_embeddings(), logit_scaling(lm)
    adapted = isinstance(head, BaseTunerLayer | AuxiliaryTrainingWrapper)  # then head_of raises an error
    require(
        adapted or type(head).forward is nn.Linear.forward,
        f"{kind}: the output embeddings are a {type(head).__name__}, but only a plain linear layer is supported; use a"
        " model such as Llama, Mistral, Gemma or Qwen",
    )
    probe, training = torch.tensor([[1, 2, 3]], device=lm.device), lm.training
    lm.eval()  # with dropout the logits of two forwards would differ
    with torch.no_grad(), autocast_for_flash_attention(lm):
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
        f"{kind}: the model's logits are NaN or infinite. Check its weights for NaN, and use a dtype that does not"
        " overflow",
    )
    same = expected.shape == found.shape
    error = (expected - found).abs().max().item() if same else math.nan
    require(
        same and error <= 1e-2 * max(1.0, expected.abs().max().item()),
        f"{kind}: the model's logits differ by {error:.3g} from those computed from its hidden states, its output"
        " embeddings and the scaling and soft cap in its config.json. This architecture is not supported; use a model"
        " such as Llama, Mistral, Gemma or Qwen",
    )


class Head(NamedTuple):
    """Output embeddings and sampling settings, which turn a hidden state into a distribution over tokens."""

    weight: Tensor
    """(V, H), the output embeddings."""
    bias: Tensor | None
    """(V,), the bias of the output embeddings, if they have one."""
    temperature: float
    eos: tuple[int, ...]
    """Tokens that end a response (data/chat/turn_ends.py). Their probability is 0 where `forbidden` is True."""
    scaling: LogitScaling = LogitScaling()
    """Scaling of the logits, applied before they are divided by the temperature."""


class TokenLogprobs(NamedTuple):
    """Log-probs and entropies of N tokens, both (N,), float32."""

    logprobs: Tensor
    entropy: Tensor


def head_of(lm: Any, temperature: float, eos: tuple[int, ...]) -> Head:
    """Make the Head of a causal LM. Raises SalsaError if an adapter is on the output embeddings."""
    embeddings: nn.Linear = lm.get_output_embeddings()
    require(
        not isinstance(embeddings, BaseTunerLayer | AuxiliaryTrainingWrapper),
        "target_modules: the adapter is on the output embeddings, which policy and references share; remove the"
        " output embeddings (lm_head) from target_modules",
    )
    return Head(embeddings.weight, embeddings.bias, temperature, eos, logit_scaling(lm))


def log_distribution(hidden: Tensor, head: Head, forbidden: Tensor | None) -> Tensor:
    """Log-probs of all tokens (n, V), float32, from hidden states (n, H).

    forbidden: (n,) bool, True where the tokens head.eos get probability 0; None if nowhere.
    """
    return normalized(_logits(hidden, head).div_(head.temperature), forbidden, head.eos)


def _logits(hidden: Tensor, head: Head) -> Tensor:
    """Logits (n, V), float32, before the division by the temperature. The caller may overwrite them."""
    return head.scaling(nn.functional.linear(hidden.to(head.weight.dtype), head.weight, head.bias).float())


def normalized(scaled: Tensor, forbidden: Tensor | None, eos: tuple[int, ...]) -> Tensor:
    """Log-probs (n, V) from `scaled`, the logits over the temperature (n, V). May overwrite `scaled`.

    forbidden: (n,) bool, True where the tokens `eos` get probability 0; None if nowhere.
    """
    if forbidden is not None:
        for token in eos:  # a list of all as index would be copied to the device
            scaled[:, token].masked_fill_(forbidden, -torch.inf)
    return scaled.log_softmax(-1)


def entropy_of(logp: Tensor, probabilities: Tensor, *, masked: bool) -> Tensor:
    """Entropy (n,) in nats from log-probs and probabilities (n, V).

    masked: whether there are tokens with a log-prob of −∞, which add nothing.
    """
    finite = logp.masked_fill(logp == -torch.inf, 0.0) if masked else logp
    return -(probabilities * finite).sum(-1)


def _chosen(hidden: Tensor, labels: Tensor, forbidden: Tensor | None, head: Head) -> tuple[Tensor, Tensor]:
    """Return the log-probs of the labels (n,) and of all tokens (n, V)."""
    logp = log_distribution(hidden, head, forbidden)
    return logp.gather(-1, labels[:, None]).squeeze(-1), logp


def _logprob_gradient(logp: Tensor, labels: Tensor, chosen: Tensor, slope: Tensor | None, head: Head) -> Tensor:
    """∂ log p(label) / ∂ hidden (n, H), in the head's dtype: (onehot(label) − p) · ∂ logit / ∂ z · W / temperature.

    The factors of W are computed in float32 and rounded once to the head's dtype. With W_label − p W, nothing would be
    left in bf16 where p(label) is near 1, because p rounds to 1. Overwrites logp (n, V); chosen: logp of the labels.
    """
    scale = (head.scaling.factor if slope is None else 1.0) / head.temperature
    own = chosen.expm1().mul_(-scale)  # 1 − p(label), without the rounding error of p(label)
    factors = logp.exp_().mul_(-scale).scatter_(-1, labels[:, None], own[:, None])
    if slope is not None:
        factors.mul_(slope)
    return factors.to(head.weight.dtype) @ head.weight


class _FrozenHead(torch.autograd.Function):
    """Log-probs and entropies with a frozen head; the log-probs have a gradient with respect to `hidden`."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, labels: Tensor, forbidden: Tensor | None, head: Head, with_entropy: bool
    ) -> tuple[Tensor, Tensor]:
        logprobs = hidden.new_empty(len(labels), dtype=torch.float32)
        entropy = torch.zeros_like(logprobs)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(labels), CHUNK):
            part = slice(start, start + CHUNK)
            logits = _logits(hidden[part], head)
            slope = None if gradient is None else head.scaling.slope(logits)
            masked = None if forbidden is None else forbidden[part]
            logp = normalized(logits.div_(head.temperature), masked, head.eos)
            del logits  # a chunk's tensors are freed as soon as they are no longer needed
            logprobs[part] = chosen = logp.gather(-1, labels[part][:, None]).squeeze(-1)
            if with_entropy:
                entropy[part] = entropy_of(logp, logp.exp(), masked=masked is not None)
            if gradient is not None:
                gradient[part] = _logprob_gradient(logp, labels[part], chosen, slope, head).to(hidden.dtype)
            del logp, slope
        if gradient is not None:
            ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * upstream[0][:, None]).to(gradient.dtype), None, None, None, None


def token_logprobs(
    hidden: Tensor, labels: Tensor, forbidden: Tensor | None, head: Head, *, with_entropy: bool = True
) -> TokenLogprobs:
    """Log-probs of `labels` (N,) and entropies (N,), float32, from hidden states (N, H).

    forbidden: (N,) bool, True where the tokens head.eos get probability 0; None if nowhere. The log-probs have a
    gradient. The entropies are for logging, have no gradient, and are 0 unless `with_entropy`.
    """
    if not head.weight.requires_grad:
        return TokenLogprobs(*_FrozenHead.apply(hidden, labels, forbidden, head, with_entropy))
    logprobs, entropy = [], []
    parts = hidden.split(CHUNK)
    masks = [None] * len(parts) if forbidden is None else forbidden.split(CHUNK)
    for states, tokens, masked in zip(parts, labels.split(CHUNK), masks, strict=True):
        chosen, logp = checkpoint(_chosen, states, tokens, masked, head, use_reentrant=False)
        logprobs.append(chosen)
        logp = logp.detach()
        entropy.append(
            entropy_of(logp, logp.exp(), masked=masked is not None) if with_entropy else torch.zeros_like(logp[:, 0])
        )
        del logp  # before the next chunk's are computed
    return TokenLogprobs(torch.cat(logprobs), torch.cat(entropy))


@torch.no_grad()
def full_kl(hidden: Tensor, reference: Tensor, forbidden: Tensor | None, head: Head, reference_head: Head) -> Tensor:
    """Exact KL(policy ‖ reference) of each token's distribution, (N,), float32.

    hidden, reference: hidden states of the policy and of the reference, (N, H) each. forbidden: (N,) bool, True where
    the tokens head.eos get probability 0; None if nowhere.
    """
    kl = hidden.new_empty(len(hidden), dtype=torch.float32)
    for start in range(0, len(hidden), CHUNK):
        part = slice(start, start + CHUNK)
        masked = None if forbidden is None else forbidden[part]
        policy = log_distribution(hidden[part], head, masked)
        other = log_distribution(reference[part], reference_head, masked)
        kl[part] = distribution_kl(policy, other, masked=masked is not None)
    return kl


def distribution_kl(policy: Tensor, reference: Tensor, *, masked: bool) -> Tensor:
    """KL (n,) of a policy to a reference from their log-probs (n, V); the policy's are overwritten.

    masked: whether there are tokens with log-probs of −∞ in both, which add nothing.
    """
    difference = policy - reference
    if masked:
        difference.masked_fill_(policy == -torch.inf, 0.0)
    return (policy.exp_() * difference).sum(-1)
