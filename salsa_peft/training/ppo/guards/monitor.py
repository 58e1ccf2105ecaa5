"""The table of guards, and the monitor that checks each update of a run.

`ppo.guards` sets actions and limits: `{length: stop, kl: {action: stop, limit: 30}, repetition: off}`. Guards that it
does not name keep their defaults. This module does not import torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from salsa_peft.config.options.guards import Action, GuardSetting
from salsa_peft.config.rewards import HELD_OUT_SCORE
from salsa_peft.training.ppo.guards import checks
from salsa_peft.training.ppo.guards.checks import RECENT, RECENT_METRICS, START, GuardInput, KLCoefBounds, Row

QUIET_UPDATES = 10
"""Number of updates without an alarm after which a guard that has warned may warn again."""


class Guard(NamedTuple):
    """A guard: the function that checks the metrics, the metrics it reads, and advice to the user."""

    check: Callable[[GuardInput, float], str | None]
    """Takes the metrics and the limit. Returns what is wrong, or None without an alarm."""
    reads: tuple[str, ...]
    """Metrics of the update, and of the first update those in START, without which the guard is not checked. They may be
    missing after a run from before the metric existed was resumed."""
    remedy: str
    """Sentences that say what the alarm probably means, and what the user can do."""


SHORT = "Short responses cost little KL, which PPO can exploit: set min_new_tokens or kl_per=token, or lower kl_coef"
LONG = (
    "The reward may grow with the length rather than the quality of a response (see completions.jsonl): correct the"
    " reward for length, set missing_eos_penalty, or raise kl_coef"
)
GIBBERISH = (
    "The policy may write gibberish (see completions.jsonl): raise kl_coef, or lower learning_rate or num_ppo_epochs"
)
FEW_ANSWERS = (
    "The policy has collapsed to {} (see completions.jsonl), which the reward probably overrates: start again from an"
    " earlier checkpoint or from the beginning, with a higher kl_coef or a lower learning_rate"
)
FAR = "The policy is far from its reference: use an earlier checkpoint, raise kl_coef, or lower learning_rate"
GUARDS: dict[str, Guard] = {
    "empty": Guard(checks.empty, (checks.EMPTY,), SHORT),
    "collapse": Guard(
        checks.collapse, (checks.COMMONEST, checks.EMPTY, checks.ENTROPY),
        f"{FEW_ANSWERS.format('one response')}. guards={{collapse: warn}} continues in spite of it",
    ),
    "distinct": Guard(
        checks.distinct, (checks.DISTINCT, checks.ENTROPY),
        f"{FEW_ANSWERS.format('a few responses')}, unless the prompts have only a few good answers",
    ),
    "length": Guard(checks.length, (checks.LENGTH,), SHORT),
    "length_high": Guard(checks.length_high, (checks.LENGTH,), LONG),
    "unfinished": Guard(checks.unfinished, (checks.ENDED, checks.UPDATE, checks.EPISODE), LONG),
    "repetition": Guard(
        checks.repetitive, (checks.REPETITION,), f"{GIBBERISH}; set missing_eos_penalty if responses never end"
    ),
    "entropy_low": Guard(
        checks.entropy_low, (checks.ENTROPY, checks.LENGTH), f"{GIBBERISH}, unless every prompt has only one good answer"
    ),
    "entropy_high": Guard(checks.entropy_high, (checks.ENTROPY, checks.LENGTH), GIBBERISH),
    "kl_coef": Guard(
        checks.kl_coef, ("objective/kl_coef", checks.KL),
        "Widen kl_coef_min and kl_coef_max, or change kl_target or learning_rate",
    ),
    "negative_kl": Guard(
        checks.negative_kl, (checks.KL,),
        "Sampling and scoring may disagree, or the batch is too small: set rollout_backend=hf and"
        " old_logprobs=recompute, or kl_estimator=full or k3, or raise batch_size",
    ),
    "kl": Guard(checks.kl, (checks.KL,), FAR),
    "kl_per_token": Guard(
        checks.kl_per_token, (checks.KL_PER_TOKEN,), f"{FAR}; a score that still rises probably exploits the reward"
    ),
    "over_optimization": Guard(
        checks.over_optimization, (checks.SCORE, HELD_OUT_SCORE),
        "The policy exploits errors of the reward (over-optimization): use a checkpoint of about the best update, train"
        " no longer than until then (max_steps), raise kl_coef, or lower learning_rate",
    ),
    "between_prompts": Guard(
        checks.between_prompts, (checks.EXPLAINED,),
        "PPO then learns from the prompts' levels rather than from the responses: train the reward model with"
        " center_rewards_coefficient, set value=adapter or value=group, train with RLOO (algorithm: rloo), or subtract"
        " each prompt's mean in the reward",
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


def alarms(settings: Mapping[str, GuardSetting], metrics: GuardInput) -> list[Alarm]:
    """The alarms of all guards for an update."""
    found = []
    for name, (action, limit) in settings.items():
        guard = GUARDS[name]
        known = all(key in metrics.row and (key in metrics.start or key not in START) for key in guard.reads)
        text = guard.check(metrics, limit) if known and action != "off" else None
        if text is not None:
            update = metrics.row[checks.UPDATE]
            found.append(Alarm(name, action, f"guards.{name}: update {update:.0f}: {text}. {guard.remedy}"))
    return found


class GuardMonitor:
    """The guards of a run, with what they remember of earlier updates, and those that have warned lately."""

    def __init__(self, settings: Mapping[str, GuardSetting], bounds: KLCoefBounds | None = None) -> None:
        self.settings, self.bounds = settings, bounds
        self.between_prompt_share: float | None = None
        """The measurement of the stage reward_quality (see GuardInput), which the ppo stage sets."""
        self.start: dict[str, float] = {}
        self.recent: list[dict[str, float]] = []
        self.best: dict[str, float] | None = None
        self.quiet: dict[str, int] = {}
        """Name of a guard that has warned → number of updates without its alarm since."""

    def check(self, row: Row) -> list[Alarm]:
        """Check an update's metrics. Returns the alarms to report.

        An alarm with action stop is always reported. One with action warn is reported the first time, and again only
        after QUIET_UPDATES updates without it.
        """
        self._remember(row)
        metrics = GuardInput(row, self.start, self.bounds, self.recent, self.best, self.between_prompt_share)
        found = alarms(self.settings, metrics)
        reported = [alarm for alarm in found if alarm.action == "stop" or alarm.name not in self.quiet]
        quiet = {name: updates + 1 for name, updates in self.quiet.items() if updates + 1 < QUIET_UPDATES}
        self.quiet = quiet | {alarm.name: 0 for alarm in found}
        return reported

    def _remember(self, row: Row) -> None:
        """Keep what later updates are compared with. A metric that the first update lacks starts at its first value."""
        self.start = {key: row[key] for key in START if key in row} | self.start
        self.recent = [*self.recent, {key: row[key] for key in RECENT_METRICS if key in row}][-RECENT:]
        means = checks.window_means(self.recent)
        if means and (self.best is None or means[HELD_OUT_SCORE] > self.best[HELD_OUT_SCORE]):
            self.best = {checks.UPDATE: row[checks.UPDATE], **means}

    def state_dict(self) -> dict[str, Any]:
        """What the guards remember of earlier updates, for a checkpoint."""
        return {"start": dict(self.start), "quiet": dict(self.quiet), "recent": list(self.recent), "best": self.best}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned. Older checkpoints have no `recent` and no `best`."""
        self.start, self.quiet = dict(state["start"]), dict(state["quiet"])
        self.recent, self.best = list(state.get("recent", [])), state.get("best")
