"""Guards: alarms on the metrics of an update if PPO goes wrong (empty responses, gibberish, ...).

`ppo.guards` sets actions and limits: `{length: stop, kl: {action: stop, limit: 30}, repetition: off}`. Guards that it
does not name keep their defaults. A guard reads the metrics of one update, as in metrics.jsonl, so with a small batch
it needs a wider limit. A metric that is NaN raises an alarm, except of the guard kl_coef. A new guard needs a function
and a row of GUARDS here, a row of DEFAULTS in config/options/guards.py, and a test. This module does not import torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from salsa_peft.config.options.guards import Action, GuardSetting

Row = Mapping[str, float]
LENGTH, ENTROPY, REPETITION = START = ("objective/response_length", "objective/entropy", "objective/repetition")
QUIET_UPDATES = 10
"""Number of updates without an alarm after which a guard that has warned may warn again."""


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
    bounds: KLCoefBounds | None
    """Bounds of the adaptive β; None if β is fixed."""


def empty(metrics: GuardInput, limit: float) -> str | None:
    """Alarm if the share of empty responses, which consist of EOS only, exceeds the limit.

    Paper A.4: with the soup as reference, a high β drives the response length to zero. The default limit is a half,
    because PPO then has little left to learn from. Healthy runs have a few percent at most.
    """
    share = metrics.row["objective/empty_share"]
    return None if share <= limit else f"{share:.0%} of the responses are empty (EOS only); the limit is {limit:.0%}"


def length(metrics: GuardInput, limit: float) -> str | None:
    """Alarm if the mean response length falls below limit × that of the first update.

    Shrinking responses are an early sign of empty ones. The default limit is a quarter, because a reward that prefers
    short responses may halve the length, which is no failure.
    """
    now, then = metrics.row[LENGTH], metrics.start[LENGTH]
    least = limit * then
    text = f"the mean response length is {now:.4g} tokens; the limit is {least:.4g}"
    return None if now >= least else f"{text} ({limit:g} × the first update's {then:.4g})"


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
    beta, found = metrics.row["objective/kl_coef"], metrics.row["objective/kl"]
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
    found = metrics.row["objective/kl"]
    return None if found >= -limit else f"the KL is {found:.3g} nats per response; the limit is {-limit:g}"


def kl(metrics: GuardInput, limit: float) -> str | None:
    """Alarm if the KL is above the limit, in nats per response. With action stop this is early stopping.

    Off by default, because a soup or the base may be far from the initial policy. The default limit is ten times the
    default kl_target.
    """
    found = metrics.row["objective/kl"]
    return None if found <= limit else f"the KL is {found:.4g} nats per response; the limit is {limit:g}"


def entropy(row: Row) -> float:
    """Mean entropy in nats per token, from the metrics of an update."""
    return row[ENTROPY] / row[LENGTH]


class Guard(NamedTuple):
    """A guard: the function that checks the metrics, and advice to the user."""

    check: Callable[[GuardInput, float], str | None]
    """Takes the metrics and the limit. Returns what is wrong, or None without an alarm."""
    remedy: str
    """A sentence that says what the user can do after an alarm."""


SHORT = "Short responses cost little KL, which PPO can exploit: set min_new_tokens or kl_per=token, or lower kl_coef"
GIBBERISH = (
    "The policy may write gibberish (see completions.jsonl): raise kl_coef, or lower learning_rate or num_ppo_epochs"
)
GUARDS: dict[str, Guard] = {
    "empty": Guard(empty, SHORT),
    "length": Guard(length, SHORT),
    "repetition": Guard(repetitive, f"{GIBBERISH}; set missing_eos_penalty if responses never end"),
    "entropy_low": Guard(entropy_low, f"{GIBBERISH}, unless every prompt has only one good answer"),
    "entropy_high": Guard(entropy_high, GIBBERISH),
    "kl_coef": Guard(kl_coef, "Widen kl_coef_min and kl_coef_max, or change kl_target or learning_rate"),
    "negative_kl": Guard(
        negative_kl, "Sampling and scoring may disagree, or the batch is too small: set rollout_backend=hf and"
        " old_logprobs=recompute, or kl_estimator=full or k3, or raise batch_size",
    ),
    "kl": Guard(
        kl, "The policy is far from its reference: use an earlier checkpoint, raise kl_coef, or lower learning_rate",
    ),
}  # fmt: skip
"""All guards by name. Their default limits and actions are in DEFAULTS of config/options/guards.py."""


class Alarm(NamedTuple):
    """The alarm of one guard."""

    name: str
    action: Action
    """`warn` or `stop`, as set for the guard."""
    message: str
    """One line that says what is wrong, in which update, and what to do."""


def alarms(
    settings: Mapping[str, GuardSetting], row: Row, start: Row, bounds: KLCoefBounds | None = None
) -> list[Alarm]:
    """The alarms of all guards for an update. row, start: its metrics and those of the first update."""
    metrics, found = GuardInput(row, start, bounds), []
    for name, (action, limit) in settings.items():
        guard = GUARDS[name]
        text = None if action == "off" else guard.check(metrics, limit)
        if text is not None:
            found.append(Alarm(name, action, f"guards.{name}: update {row['update']:.0f}: {text}. {guard.remedy}"))
    return found


class GuardMonitor:
    """The guards of a run, with the first update's metrics and the guards that have warned lately."""

    def __init__(self, settings: Mapping[str, GuardSetting], bounds: KLCoefBounds | None = None) -> None:
        self.settings, self.bounds = settings, bounds
        self.start: dict[str, float] = {}
        self.quiet: dict[str, int] = {}
        """Name of a guard that has warned → number of updates without its alarm since."""

    def check(self, row: Row) -> list[Alarm]:
        """Check an update's metrics. Returns the alarms to report.

        An alarm with action stop is always reported. One with action warn is reported the first time, and again only
        after QUIET_UPDATES updates without it.
        """
        self.start = self.start or {key: row[key] for key in START}
        found = alarms(self.settings, row, self.start, self.bounds)
        reported = [alarm for alarm in found if alarm.action == "stop" or alarm.name not in self.quiet]
        quiet = {name: updates + 1 for name, updates in self.quiet.items() if updates + 1 < QUIET_UPDATES}
        self.quiet = quiet | {alarm.name: 0 for alarm in found}
        return reported

    def state_dict(self) -> dict[str, Any]:
        """The first update's metrics and the guards that have warned lately, for a checkpoint."""
        return {"start": dict(self.start), "quiet": dict(self.quiet)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.start, self.quiet = dict(state["start"]), dict(state["quiet"])


def repetition(responses: Sequence[Sequence[int]], n: int = 4) -> float:
    """Mean share of repeated n-grams, 1 − unique / all, of the token ids of responses. Shorter responses count as 0."""
    shares = []
    for response in responses:
        grams = list(zip(*(response[first:] for first in range(n)), strict=False))
        shares.append(1 - len(set(grams)) / len(grams) if grams else 0.0)
    return sum(shares) / len(shares)
