"""GAE, KL estimators, PPO's losses and the KL controller: pure functions on tensors.

Shapes: B sequences, T response tokens, K references. Every mask is True where a token counts; what it hides is ignored
and never has to be zero. All in float32.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor


def whiten(values: Tensor, mask: Tensor, *, shift_mean: bool = True) -> Tensor:
    """(B, T) → scaled to unit variance (and zero mean) over the mask, 0 outside it; TRL 1.12's masked_whiten.

    The variance is the unbiased one over the mask; where fewer than two tokens count, only the mean is taken off.
    """
    counted = values[mask]
    mean = counted.mean()
    scale = (counted.var(unbiased=True) + 1e-8).rsqrt() if counted.numel() > 1 else torch.ones_like(mean)
    whitened = (values - mean) * scale + (0.0 if shift_mean else mean)
    return torch.where(mask, whitened, torch.zeros_like(values))


# KL(π ‖ reference) of one token from log π and log ref of the token that was sampled (Schulman, 2020, "Approximating KL").
KL_ESTIMATORS = {
    "k1": lambda logprobs, reference: logprobs - reference,
    "k2": lambda logprobs, reference: 0.5 * (logprobs - reference).square(),
    "k3": lambda logprobs, reference: torch.expm1(reference - logprobs) + logprobs - reference,
    "abs": lambda logprobs, reference: (logprobs - reference).abs(),
}


def reference_kl(logprobs: Tensor, references: Tensor, estimator: str) -> Tensor:
    """Per-token KL, averaged over the references (paper eq. 5): (B, T), (K, B, T) → (B, T).

    `full` is no function of the sampled token's log-probs: models/responses.py computes it over the vocabulary.
    """
    estimate = KL_ESTIMATORS[estimator]
    return torch.stack([estimate(logprobs, reference) for reference in references]).mean(0)


def token_rewards(
    kl: Tensor, scores: Tensor, mask: Tensor, kl_coef: float, *, per: Literal["response", "token"] = "response"
) -> Tensor:
    """reward_t = −β · kl_t, plus the score at the last token that counts: (B, T), (B,), (B, T) → (B, T), 0 outside.

    per "token": −β · kl_t / |y|, so that a response pays β times its mean KL, whatever its length |y|.
    """
    if per == "token":
        kl = kl / mask.sum(-1, keepdim=True)
    rewards = torch.where(mask, -kl_coef * kl, torch.zeros_like(kl))
    last = mask.long().sum(-1) - 1
    rows = torch.arange(len(scores), device=scores.device)
    rewards[rows, last] += scores
    return rewards


class Advantages(NamedTuple):
    """GAE's result, both (B, T) and 0 outside the mask."""

    advantages: Tensor
    returns: Tensor


def gae(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float) -> Advantages:
    """Generalized advantage estimation (Schulman et al., 2016) over the response; the value after its last token is 0.

    δ_t = r_t + γ V_{t+1} − V_t, A_t = δ_t + γλ A_{t+1}, returns = A + V. rewards, values, mask: (B, T); a row's mask is a
    run of True from its first token.
    """
    zeros = torch.zeros_like(rewards[:, 0])
    advantages = torch.zeros_like(rewards)
    values = torch.where(mask, values, torch.zeros_like(values))
    next_advantage, next_value = zeros, zeros
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = torch.where(mask[:, t], delta + gamma * lam * next_advantage, zeros)
        next_value = values[:, t]
        advantages[:, t] = next_advantage
    return Advantages(advantages, torch.where(mask, advantages + values, torch.zeros_like(values)))


class PPOLoss(NamedTuple):
    """A micro-batch's loss (a sum over its tokens, divided by the minibatch's) and what the logs show of it (sums too)."""

    loss: Tensor
    policy: Tensor
    value: Tensor
    approxkl: Tensor
    clipfrac: Tensor
    value_clipfrac: Tensor
    ratio: Tensor


def ppo_loss(logprobs: Tensor, values: Tensor, old_logprobs: Tensor, old_values: Tensor, advantages: Tensor, returns: Tensor,
             mask: Tensor, *, tokens: int, cliprange: float, cliprange_value: float, vf_coef: float) -> PPOLoss:  # fmt: skip
    """PPO's clipped losses (Schulman et al., 2017), all tensors (B, T), averaged over the minibatch's `tokens`.

    policy: mean of max(−A·r, −A·clip(r, 1±ε)); value: ½ mean of max((V−R)², (clip(V, V_old ± ε_v) − R)²); loss = policy +
    vf_coef · value. `tokens` is the number of True in the whole minibatch's mask, so that micro-batches of other lengths add
    up to the minibatch's own gradient.
    """
    given = (logprobs, values, old_logprobs, old_values, advantages, returns)
    logprobs, values, old_logprobs, old_values, advantages, returns = (
        tensor.masked_fill(~mask, 0.0) for tensor in given
    )
    log_ratio = logprobs - old_logprobs
    ratio = log_ratio.exp()
    unclipped, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    near = values.clamp(old_values - cliprange_value, old_values + cliprange_value)
    value_unclipped, value_clipped = (values - returns).square(), (near - returns).square()

    def total(per_token: Tensor) -> Tensor:
        return torch.where(mask, per_token, torch.zeros_like(ratio)).sum() / tokens

    policy = total(torch.maximum(unclipped, clipped))
    value = 0.5 * total(torch.maximum(value_unclipped, value_clipped))
    with torch.no_grad():
        shown = (
            total(0.5 * log_ratio.square()),
            total((clipped > unclipped).float()),
            total((value_clipped > value_unclipped).float()),
            total(ratio),
        )
    return PPOLoss(policy + vf_coef * value, policy.detach(), value.detach(), *shown)


def adapt_kl_coef(kl_coef: float, kl: float, *, target: float, horizon: float, responses: int, least: float = 0.0,
                  most: float | None = None) -> float:  # fmt: skip
    """β ← β (1 + clip(KL/target − 1, ±0.2) · n / horizon), KL in nats per response (Ziegler et al., 2019; TRL 0.8).

    It stays between `least` and `most` (None: no bound).
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return min(max(kl_coef * (1 + error * responses / horizon), least), math.inf if most is None else most)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 − Var(R − V) / Var(R) over the mask; 0 where the returns don't vary."""
    target = returns[mask]
    variance = target.var(unbiased=False)
    if variance == 0:
        return 0.0
    return float(1 - (target - values[mask]).var(unbiased=False) / variance)
