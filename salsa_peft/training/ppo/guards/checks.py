"""The guards' checks: each says what is wrong with an update's metrics (collapse, gibberish, ...), or returns None.

A check reads the metrics of one update, as in metrics.jsonl, those of the run's first update, and some of the updates
before. With a small batch it needs a wider limit. A metric that is NaN raises an alarm, except of the guard kl_coef.
A new guard needs a function here, a row of GUARDS in monitor.py, a row of DEFAULTS in config/options/guards.py, and a
test. This module does not import torch.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from salsa_peft.config.rewards import HELD_OUT_SCORE

Row = Mapping[str, float]
SCORE, KL, KL_PER_TOKEN = "objective/scores", "objective/kl", "objective/kl_per_token"
LENGTH, ENTROPY, REPETITION = "objective/response_length", "objective/entropy", "objective/repetition"
EMPTY, DISTINCT, COMMONEST = "objective/empty_share", "objective/distinct_share", "objective/commonest_share"
BETWEEN_PROMPTS, EXPLAINED = "objective/between_prompt_share", "val/explained_variance"
UPDATE, EPISODE, ENDED = "update", "episode", "val/num_eos_tokens"
START = (LENGTH, ENTROPY, REPETITION, DISTINCT, COMMONEST, KL_PER_TOKEN, UPDATE, EPISODE, ENDED)
"""Metrics of the first update with which guards compare."""
RECENT_METRICS = (SCORE, HELD_OUT_SCORE, EXPLAINED, KL_PER_TOKEN)
"""Metrics that guards read over several updates."""
RECENT = 20
"""Number of newest updates whose RECENT_METRICS are kept."""
WINDOW = 5
"""Number of updates over which scores are averaged before they are compared."""
SEVERAL = 10
"""Number of updates whose median explained variance counts."""
LOW_EXPLAINED_VARIANCE = 0.5
"""Fraction of the share of variance between prompts below which the explained variance counts as low."""
USUAL_KL_FACTOR = 4.0
"""Factor by which the KL per token exceeds its median over the newest updates in a jump."""
LOW_ENTROPY = 0.5
"""Fraction of the first update's entropy per response below which the entropy counts as fallen."""


class KLCoefBounds(NamedTuple):
    """Bounds and target of the adaptive KL coefficient β."""

    lowest: float
    """kl_coef_min; 0 means no lower bound."""
    highest: float | None
    """kl_coef_max; None means no upper bound."""
    target: float
    """kl_target, in nats per response."""


class GuardInput(NamedTuple):
    """The metrics that a guard reads."""

    row: Row
    """Metrics of this update."""
    start: Row
    """Metrics of the run's first update; only those of START are needed."""
    bounds: KLCoefBounds | None = None
    """Bounds of the adaptive β; None if β is fixed."""
    recent: Sequence[Row] = ()
    """RECENT_METRICS of the newest updates, this one last."""
    best: Row | None = None
    """`window_means` of the WINDOW successive updates whose mean held-out score is the highest so far."""
    between_prompt_share: float | None = None
    """Share of the score's variance that lies between prompts, as the stage reward_quality measured it; None: not known."""


def empty(metrics: GuardInput, limit: float) -> str | None:
    """Alarm if the share of empty responses, which consist of EOS only, exceeds the limit.

    Paper A.4: with the soup as reference, a high β drives the response length to zero. The default limit is a half,
    because PPO then has little left to learn from. Healthy runs have a few percent at most.
    """
    share = metrics.row[EMPTY]
    return None if share <= limit else f"{share:.0%} of the responses are empty (EOS only); the limit is {limit:.0%}"


def collapse(metrics: GuardInput, limit: float) -> str | None:
    """Alarm if most prompts get one and the same response, and the entropy per response has fallen to a half.

    The alarm threshold is start + limit · (1 − start), where `start` is the first update's share of its commonest
    response, because some tasks have few answers (labels). The default limit is a half; in 24 healthy runs of tiny models
    the share was at most 0.13 (in batches of 16). The default action is stop: equal responses get nearly equal scores,
    from which nothing more is learned. Empty responses are left to `empty`.
    """
    now, then = metrics.row[COMMONEST], metrics.start[COMMONEST]
    most = then + limit * (1 - then)
    is_empty = now <= metrics.row[EMPTY] + 1e-6
    if now <= most or is_empty or not _entropy_has_fallen(metrics):
        return None
    text = f"{now:.0%} of the responses are one and the same; the limit is {most:.0%} (first update: {then:.0%})"
    return f"{text}, and {_fallen_entropy(metrics)}"


def distinct(metrics: GuardInput, limit: float) -> str | None:
    """Alarm if the share of distinct responses is below limit × the first update's and the entropy has halved.

    The policy then gives a few answers to all prompts. The default limit is a quarter; in 24 healthy runs of tiny models
    the share stayed above three quarters. With batches of fewer than four responses the limit cannot be reached.
    """
    now, then = metrics.row[DISTINCT], metrics.start[DISTINCT]
    least = limit * then
    if now >= least or not _entropy_has_fallen(metrics):
        return None
    text = (
        f"{now:.0%} of the responses are distinct; the limit is {least:.0%} ({limit:g} × the first update's {then:.0%})"
    )
    return f"{text}, and {_fallen_entropy(metrics)}"


def length(metrics: GuardInput, limit: float) -> str | None:
    """Alarm if the mean response length falls below limit × that of the first update.

    Shrinking responses are an early sign of empty ones. The default limit is a quarter, because a reward that prefers
    short responses may halve the length, which is no failure.
    """
    now, then = metrics.row[LENGTH], metrics.start[LENGTH]
    least = limit * then
    text = f"the mean response length is {now:.4g} tokens; the limit is {least:.4g}"
    return None if now >= least else f"{text} ({limit:g} × the first update's {then:.4g})"


def length_high(metrics: GuardInput, limit: float) -> str | None:
    """Alarm if the mean response length exceeds limit × that of the first update.

    A reward that grows with the length is the commonest one to be exploited (Singhal et al., 2023, "A Long Way to Go").
    The default limit is twice the length, about what such a reward reaches in RLHF on chats.
    """
    now, then = metrics.row[LENGTH], metrics.start[LENGTH]
    most = limit * then
    text = f"the mean response length is {now:.4g} tokens; the limit is {most:.4g}"
    return None if now <= most else f"{text} ({limit:g} × the first update's {then:.4g})"


def unfinished(metrics: GuardInput, limit: float) -> str | None:
    """Alarm if too many responses are cut by max_new_tokens.

    The alarm threshold is start + limit · (1 − start), where `start` is the first update's share, because some data
    has responses that are longer than max_new_tokens. The default limit is a half: a policy that forgets to end its
    responses soon does so in nearly all.
    """
    now, then = _unfinished_share(metrics.row), _unfinished_share(metrics.start)
    most = then + limit * (1 - then)
    text = f"{now:.0%} of the responses do not end before max_new_tokens; the limit is {most:.0%}"
    return None if now <= most else f"{text} (first update: {then:.0%})"


def repetitive(metrics: GuardInput, limit: float) -> str | None:
    """Alarm if too many 4-grams are repeated within their response: looping gibberish (paper's Figure 6).

    The alarm threshold is start + limit · (1 − start), where `start` is the first update's share, because some data
    (tables, code) is repetitive. The default limit is a half: human texts repeat a few percent of their 4-grams (one
    text in a hundred repeats half of them), and a loop repeats nearly all.
    """
    now, then = metrics.row[REPETITION], metrics.start[REPETITION]
    most = then + limit * (1 - then)
    text = f"{now:.0%} of the 4-grams are repeated within their response; the limit is {most:.0%}"
    return None if now <= most else f"{text} (first update: {then:.0%})"


def entropy_low(metrics: GuardInput, limit: float) -> str | None:
    """Alarm if the entropy per token falls below limit × that of the first update.

    The policy then gives the same few answers to all prompts. The default limit is a tenth: PPO normally lowers the
    entropy, often to a half; a collapsed policy has almost none.
    """
    now, then = entropy(metrics.row), entropy(metrics.start)
    least = limit * then
    text = f"the entropy is {now:.3g} nats per token; the limit is {least:.3g}"
    return None if now >= least else f"{text} ({limit:g} × the first update's {then:.3g})"


def entropy_high(metrics: GuardInput, limit: float) -> str | None:
    """Alarm if the entropy per token exceeds that of the first update by more than the limit, in nats.

    The policy may then write gibberish. The limit is on a difference, not a ratio, because the first update's entropy
    may be near 0. The default limit of 1.5 nats means 4.5 times as many choices (e^1.5); sampling at temperature 1.5,
    which gives gibberish, adds three or four nats.
    """
    now, then = entropy(metrics.row), entropy(metrics.start)
    most = then + limit
    text = f"the entropy is {now:.3g} nats per token; the limit is {most:.3g}"
    return None if now <= most else f"{text} ({limit:g} above the first update's {then:.3g})"


def kl_coef(metrics: GuardInput, limit: float) -> str | None:
    """Alarm if the adaptive β is at a bound, and the KL calls for a β beyond the bound.

    limit: distance from the bound, relative to the bound, within which β counts as at the bound.
    """
    if metrics.bounds is None:
        return None
    beta, found = metrics.row["objective/kl_coef"], metrics.row[KL]
    lowest, highest, target = metrics.bounds
    if highest is not None and beta >= highest * (1 - limit) and found > target:
        return (
            f"β is {beta:.3g} (kl_coef_max), and the KL is above kl_target = {target:g}: {found:.3g} nats per response"
        )
    if 0 < beta <= lowest * (1 + limit) and found < target:
        return (
            f"β is {beta:.3g} (kl_coef_min), and the KL is below kl_target = {target:g}: {found:.3g} nats per response"
        )
    return None


def negative_kl(metrics: GuardInput, limit: float) -> str | None:
    """Alarm if the KL is below −limit, in nats per response. Only the estimator k1 can be negative.

    The default limit is 1 nat. k1's variance is about 2 KL per response, so the mean over 8 responses has a standard
    error of about √KL / 2, and −1 is at least four of these below the true KL, whatever the KL is.
    """
    found = metrics.row[KL]
    return None if found >= -limit else f"the KL is {found:.3g} nats per response; the limit is {-limit:g}"


def kl(metrics: GuardInput, limit: float) -> str | None:
    """Alarm if the KL is above the limit, in nats per response. With action stop this is early stopping.

    Off by default, because a soup or the base may be far from the initial policy. The default limit is ten times the
    default kl_target.
    """
    found = metrics.row[KL]
    return None if found <= limit else f"the KL is {found:.4g} nats per response; the limit is {limit:g}"


def kl_per_token(metrics: GuardInput, limit: float) -> str | None:
    """Alarm if the KL per token exceeds that of the first update by more than the limit, in nats, or jumps.

    The first update's KL is the distance at which the policy starts, which is not 0 if the reference is another model.
    The default limit of 1 nat means that the policy's tokens are 2.7 times (e) rarer in the reference, at each token. In
    24 healthy runs of tiny models the rise was at most 0.32; in five that exploited their reward, 1.5 to 4.
    A jump is a KL per token of more than USUAL_KL_FACTOR times its median over the RECENT newest updates, if it exceeds
    the first update's by more than a quarter of the limit.
    """
    now, then = metrics.row[KL_PER_TOKEN], metrics.start[KL_PER_TOKEN]
    most, text = then + limit, f"the KL is {now:.3g} nats per token"
    earlier = [row[KL_PER_TOKEN] for row in metrics.recent if KL_PER_TOKEN in row]
    if len(earlier) == RECENT and now > then + limit / 4 and now > USUAL_KL_FACTOR * statistics.median(earlier):
        return f"{text}, and its median over {RECENT} updates is {statistics.median(earlier):.3g}"
    return None if now <= most else f"{text}; the limit is {most:.3g} ({limit:g} above the first update's {then:.3g})"


def over_optimization(metrics: GuardInput, limit: float) -> str | None:
    """Alarm if the score rises while the held-out score has fallen from its best by more than noise.

    Means over WINDOW updates are compared (Gao et al., 2023, "Scaling Laws for Reward Model Overoptimization"). The
    limit is a number of standard errors of their difference, √(2 / WINDOW) · σ, where σ is the noise of an update's
    score as its changes from update to update show it. The default of 5 allows for the best of many windows.
    """
    now, best = window_means(metrics.recent), metrics.best
    if not now or best is None:
        return None
    values = [row[HELD_OUT_SCORE] for row in metrics.recent if HELD_OUT_SCORE in row]
    changes = [(after - before) ** 2 for before, after in itertools.pairwise(values)]
    allowed = limit * math.sqrt(2 / WINDOW) * math.sqrt(statistics.fmean(changes) / 2)
    if best[HELD_OUT_SCORE] - now[HELD_OUT_SCORE] <= allowed or now[SCORE] < best[SCORE]:
        return None
    return (
        f"the held-out score fell from its best, {best[HELD_OUT_SCORE]:.3g} at update {best[UPDATE]:.0f}, to"
        f" {now[HELD_OUT_SCORE]:.3g}; the limit is a fall of {allowed:.2g} ({limit:g} standard errors). The score rose from"
        f" {best[SCORE]:.3g} to {now[SCORE]:.3g} (means of {WINDOW} updates)"
    )


def between_prompts(metrics: GuardInput, limit: float) -> str | None:
    """Alarm if much of the scores' variance lies between prompts, and the value function explains less than half of it.

    The pairwise loss of a reward model leaves the level of each prompt free. PPO has to learn that level before it
    sees which responses are good. The share is the batch's where it has several responses a prompt, else the one that
    the stage reward_quality measured; without both there is no alarm. The explained variance is a median of SEVERAL
    updates. The default limit of 0.45 lies between reward models of the embedded world with center_rewards_coefficient
    0.01 (shares 0.14, 0.33 and 0.37 in three replicates, in which PPO gained) and 0 (0.50, 0.74 and 0.78; PPO lost).
    """
    share = metrics.row.get(BETWEEN_PROMPTS, metrics.between_prompt_share)
    explained = [row[EXPLAINED] for row in metrics.recent[-SEVERAL:] if EXPLAINED in row]
    if share is None or len(explained) < SEVERAL:
        return None
    median, least = statistics.median(explained), LOW_EXPLAINED_VARIANCE * share
    if share <= limit or median >= least:
        return None
    return (
        f"{share:.0%} of the variance of the scores lies between prompts; the limit is {limit:.0%}. The value function"
        f" explains {median:.0%} of the variance of the returns (median of {SEVERAL} updates; low is below {least:.0%})"
    )


def entropy(row: Row) -> float:
    """Mean entropy in nats per token, from the metrics of an update."""
    return row[ENTROPY] / row[LENGTH]


def window_means(recent: Sequence[Row]) -> dict[str, float]:
    """Means of the scores over the newest WINDOW updates; {} if there are fewer, or one has no held-out score."""
    window = [row for row in recent[-WINDOW:] if HELD_OUT_SCORE in row]
    if len(window) < WINDOW:
        return {}
    return {name: statistics.fmean(row[name] for row in window) for name in (SCORE, HELD_OUT_SCORE)}


def _entropy_has_fallen(metrics: GuardInput) -> bool:
    return metrics.row[ENTROPY] < LOW_ENTROPY * metrics.start[ENTROPY]


def _fallen_entropy(metrics: GuardInput) -> str:
    return f"the entropy fell from {metrics.start[ENTROPY]:.3g} to {metrics.row[ENTROPY]:.3g} nats per response"


def _unfinished_share(row: Row) -> float:
    """Share of the responses that are cut by max_new_tokens. The batch size is episode / update."""
    return 1 - row[ENDED] * row[UPDATE] / row[EPISODE]
