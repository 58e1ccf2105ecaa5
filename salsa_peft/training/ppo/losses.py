"""GAE, KL estimators, importance weights, PPO's losses and the KL controller: pure functions on tensors.

Shapes: B sequences, T response tokens; n response tokens of a micro-batch. Masks are True at the tokens of responses;
values elsewhere are ignored and need not be zero. Everything is computed in float32.
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor


def whiten(values: Tensor, mask: Tensor, *, shift_mean: bool = True) -> Tensor:
    """Scale values (B, T) to unit variance and zero mean over the mask. Values outside the mask become 0.

    As TRL 1.12's masked_whiten, with the unbiased variance. shift_mean: False keeps the mean. With fewer than two
    tokens in the mask, the values are not scaled.
    """
    counted, count = torch.where(mask, values, 0.0), mask.sum()
    mean = counted.sum() / count
    variance = torch.where(mask, values - mean, 0.0).square().sum() / (count - 1)
    scale = torch.where(count > 1, (variance + 1e-8).rsqrt(), 1.0)
    whitened = (values - mean) * scale + (0.0 if shift_mean else mean)
    return torch.where(mask, whitened, 0.0)


KL_ESTIMATORS = {
    "k1": lambda logprobs, reference: logprobs - reference,
    "k2": lambda logprobs, reference: 0.5 * (logprobs - reference).square(),
    "k3": lambda logprobs, reference: torch.expm1(reference - logprobs) + logprobs - reference,
    "abs": lambda logprobs, reference: (logprobs - reference).abs(),
}
"""Estimators of KL(π ‖ reference) per token, from both models' log-probs of the sampled token.

See Schulman, 2020, "Approximating KL divergence". The estimator `full`, which sums over the vocabulary, is
models.logprobs.full_kl.
"""


def token_rewards(
    kl: Tensor, scores: Tensor, mask: Tensor, kl_coef: float, *, per: Literal["response", "token"] = "response"
) -> Tensor:
    """Rewards per token (B, T): −β · kl_t, plus the score at a response's last token.

    kl, mask: (B, T). scores: (B,). per: "token" gives −β · kl_t / |y|, with the response's length |y|, so that the
    penalty of a response is β times its mean KL per token.
    """
    if per == "token":
        kl = kl / mask.sum(-1, keepdim=True)
    rewards = torch.where(mask, -kl_coef * kl, torch.zeros_like(kl))
    last = mask.long().sum(-1) - 1
    rows = torch.arange(len(scores), device=scores.device)
    rewards[rows, last] += scores
    return rewards


def entropy_bonus(logprobs: Tensor, entropy: Tensor, mask: Tensor, floor: float, coef: float) -> Tensor:
    """Bonus of each token (B, T), −coef · log π, if the mean entropy over the mask is below `floor`; else 0.

    −log π is an unbiased estimate of the entropy, as in maximum-entropy RL. As part of the rewards it costs nothing,
    while an entropy in the loss would need the gradient of the whole distribution. logprobs, entropy, mask: (B, T).
    """
    below = mean_entropy(entropy, mask) < floor
    return torch.where(mask & below, -coef * logprobs, 0.0)


def mean_entropy(entropy: Tensor, mask: Tensor) -> Tensor:
    """Mean entropy of the tokens in the mask, in nats, as a tensor (). entropy, mask: (B, T)."""
    return torch.where(mask, entropy, 0.0).sum() / mask.sum()


class Advantages(NamedTuple):
    """Advantages and returns of GAE, each (B, T) and 0 outside the mask."""

    advantages: Tensor
    returns: Tensor


def discounted_sums(terms: Tensor, decay: float | Tensor) -> Tensor:
    """Sums over the rest of the row, S_t = x_t + decay · S_{t+1}, of terms (B, T). decay: a number, or one per row (B,)."""
    sums = torch.empty_like(terms)
    later = torch.zeros_like(terms[:, 0])
    for t in reversed(range(terms.shape[1])):
        later = terms[:, t] + decay * later
        sums[:, t] = later
    return sums


def gae(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float | Tensor,
        lam_value: float | Tensor | None = None) -> Advantages:  # fmt: skip
    """Generalized advantage estimation (Schulman et al., 2016) over the response, with a λ of its own for the critic.

    δ_t = r_t + γ V_{t+1} − V_t, A_t = δ_t + γλ A_{t+1}, returns = A + V; the value after the last token is 0. rewards,
    values, mask: (B, T). In each row of the mask the True values are consecutive, beginning at the first token. lam: λ
    of the advantages, for all responses or for each (B,). lam_value: λ of the returns (decoupled GAE: VC-PPO, arXiv
    2503.01491); None: lam.
    """
    values = torch.where(mask, values, 0.0)
    next_values = torch.nn.functional.pad(values[:, 1:], (0, 1))
    deltas = torch.where(mask, rewards + gamma * next_values - values, 0.0)
    advantages = discounted_sums(deltas, gamma * lam)
    to_returns = advantages if lam_value is None else discounted_sums(deltas, gamma * lam_value)
    return Advantages(advantages, to_returns + values)


def length_dependent_lam(mask: Tensor, alpha: float) -> Tensor:
    """λ of each response (B,), 1 − 1 / (α · length), at least 0 (VAPO, arXiv 2504.05118). mask: (B, T)."""
    return (1 - 1 / (alpha * mask.sum(-1))).clamp(min=0.0)


def batch_baseline(returns: Tensor, mask: Tensor) -> Tensor:
    """Baseline (B, T) that is the mean of the returns (B, T) over the mask at each of its tokens; 0 outside."""
    return torch.where(mask, returns.sum() / mask.sum(), 0.0)


def leave_one_out_baseline(returns: Tensor, mask: Tensor, group: int) -> Tensor:
    """Baseline (B, T): the mean return, at the same position, of the other responses to the prompt; 0 outside the mask.

    As RLOO (Ahmadian et al., 2024), whose return is the same at each token of a response, since only the last one has a
    reward. Where another response has ended, its return at its last token counts. returns, mask: (B, T), with the
    `group` responses to a prompt one after another.
    """
    places = torch.arange(returns.shape[1], device=returns.device)
    reached = torch.minimum(places, mask.sum(-1, keepdim=True) - 1)
    groups = returns.gather(1, reached).view(-1, group, returns.shape[1])
    others = (groups.sum(1, keepdim=True) - groups) / (group - 1)
    return torch.where(mask, others.view_as(returns), 0.0)


def importance_ratios(logprobs: Tensor, sampling_logprobs: Tensor, mask: Tensor, mode: str) -> Tensor:
    """Ratios π/q (B, T) of the policy as it is scored, π, to the sampler, q; 1 outside the mask.

    logprobs, sampling_logprobs, mask: (B, T). mode: of importance_weights. token_*: the ratio of each token.
    sequence_*: the product of a response's ratios, at each of its tokens. A token whose log-prob the sampler did not
    report (NaN) has the ratio 1, as in TRL.
    """
    log_ratio = (logprobs - sampling_logprobs).masked_fill(~mask, 0.0)
    log_ratio = log_ratio.masked_fill(log_ratio.isnan(), 0.0)
    if mode.startswith("sequence"):
        log_ratio = log_ratio.sum(-1, keepdim=True).expand_as(mask).masked_fill(~mask, 0.0)
    return log_ratio.exp()


def importance_weights(ratios: Tensor, mode: str, clip_min: float | None, clip_max: float | None) -> Tensor:
    """Weights of the policy loss that correct for the sampler: ratios (B, T) of importance_ratios within bounds.

    As TRL's GRPO with vllm_importance_sampling_mode. *_truncate: ratios are clipped to the bounds. *_mask: ratios
    outside the bounds become 0. clip_min, clip_max: the bounds; None: no bound.
    """
    least, most = clip_min or 0.0, math.inf if clip_max is None else clip_max
    if mode.endswith("truncate"):
        return ratios.clamp(least, most)
    return ratios.masked_fill((ratios < least) | (ratios > most), 0.0)


class PPOLoss(NamedTuple):
    """Loss and metrics of a micro-batch: sums over its tokens, divided by the minibatch's token count.

    Summed over all micro-batches of a minibatch, they are means over the minibatch's tokens.
    """

    loss: Tensor
    policy: Tensor
    value: Tensor
    approxkl: Tensor
    clipfrac: Tensor
    value_clipfrac: Tensor
    ratio: Tensor


def ppo_loss(logprobs: Tensor, values: Tensor | None, old_logprobs: Tensor, old_values: Tensor, advantages: Tensor,
             returns: Tensor, *, tokens: int, cliprange: float, cliprange_value: float, vf_coef: float,
             policy_coef: float = 1.0, weights: Tensor | None = None) -> PPOLoss:  # fmt: skip
    """PPO's clipped losses (Schulman et al., 2017) of the n response tokens of a micro-batch. All tensors are (n,).

    policy = mean of w · max(−A·r, −A·clip(r, 1±ε)); value = ½ mean of max((V−R)², (clip(V, V_old ± ε_v) − R)²); loss =
    policy_coef · policy + vf_coef · value. A mean is a sum divided by `tokens`, the number of response tokens in the
    whole minibatch, so that the gradients of its micro-batches add up to the minibatch's gradient. values: None without
    a critic; the value loss is then 0. weights: the importance weights w, which have no gradient; None: 1.
    """
    log_ratio = logprobs - old_logprobs
    ratio = log_ratio.exp()
    unclipped, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    value_unclipped = value_clipped = torch.zeros_like(returns)
    if values is not None:
        near = values.clamp(old_values - cliprange_value, old_values + cliprange_value)
        value_unclipped, value_clipped = (values - returns).square(), (near - returns).square()
    per_token = torch.maximum(unclipped, clipped)
    policy = (per_token if weights is None else weights.detach() * per_token).sum() / tokens
    value = 0.5 * torch.maximum(value_unclipped, value_clipped).sum() / tokens
    with torch.no_grad():
        shown = (
            0.5 * log_ratio.square().sum() / tokens,
            (clipped > unclipped).float().sum() / tokens,
            (value_clipped > value_unclipped).float().sum() / tokens,
            ratio.sum() / tokens,
        )
    return PPOLoss(policy_coef * policy + vf_coef * value, policy.detach(), value.detach(), *shown)


def adapt_kl_coef(kl_coef: float, kl: float, *, target: float, horizon: float, responses: int, least: float = 0.0,
                  most: float | None = None) -> float:  # fmt: skip
    """Adapt the KL coefficient: β ← β (1 + clip(KL/target − 1, ±0.2) · n / horizon).

    As in Ziegler et al., 2019, and TRL 0.8. kl, target: in nats per response. responses: n, the number of responses in
    the update. least, most: bounds of β; most = None means no upper bound.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return min(max(kl_coef * (1 + error * responses / horizon), least), math.inf if most is None else most)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """Explained variance of the values, 1 − Var(R − V) / Var(R), over the mask, as a tensor (); 0 if R does not vary."""
    unexplained, variance = _variance(returns - values, mask), _variance(returns, mask)
    return torch.where(variance == 0, 0.0, 1 - unexplained / variance)


def _variance(values: Tensor, mask: Tensor) -> Tensor:
    largest = torch.where(mask, values, -torch.inf).max()  # subtracted first, so that equal values have a variance of 0
    shifted = torch.where(mask, values - largest, 0.0)
    return torch.where(mask, shifted - shifted.sum() / mask.sum(), 0.0).square().sum() / mask.sum()
