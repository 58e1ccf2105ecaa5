"""The numbers of one replicate, and means and differences over replicates with 95% t-intervals.

A replicate is a run with its own seeds of everything. Two models of one replicate share these seeds, so a difference is
paired by replicate.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from salsa_peft.report import findings
from salsa_peft.report.format import Row
from salsa_peft.report.gather import PolicyReport, ReportInput
from salsa_peft.report.judge_tables import searched_methods
from salsa_peft.report.replicates.power import detectable, needed, spread
from salsa_peft.utils.statistics import mean_interval

LAST = 0.1
"""Share of a policy's updates, at the end of training, whose mean KL is reported."""
KL = "objective/kl"


class Trained(NamedTuple):
    """What distinguishes one policy from the others of its run."""

    reference: str
    """The label of the reference, such as "seed-0", "soup" or "shrunk 0.6·seed-0"."""
    beta: float
    """β at the start."""


@dataclass(frozen=True)
class Replicate:
    """The numbers of one replicate. All means are over the questions of a set."""

    measure: str
    """The measure of `scores`: the gold reward if there is one, else the training reward."""
    scores: dict[str, dict[str, float]]
    """Set of questions → model → mean score."""
    rewards: dict[str, dict[str, float]] = field(default_factory=dict)
    """Set of questions → model → mean training reward."""
    lengths: dict[str, dict[str, float]] = field(default_factory=dict)
    """Set of questions → model → mean number of tokens of an answer, EOS included."""
    policies: dict[str, Trained] = field(default_factory=dict)
    controls: dict[str, str] = field(default_factory=dict)
    """Name of a model in evaluate.controls → the label of its reference."""
    kl: dict[str, float] = field(default_factory=dict)
    """Policy → its KL to its reference at the end of training, in nats per response."""
    landscape: Row | None = None
    """landscape.json."""

    @classmethod
    def of(cls, run: ReportInput) -> "Replicate":
        """The numbers of a finished run."""
        measure = findings.headline(run.evaluation)
        scores: dict[str, dict[str, float]] = {}
        rewards: dict[str, dict[str, float]] = {}
        lengths: dict[str, dict[str, float]] = {}
        for name, data in run.evaluation["datasets"].items():
            models = data["models"]
            scores[name] = {model: one["scores"][measure]["mean"] for model, one in models.items()}
            rewards[name] = {model: one["scores"]["reward"]["mean"] for model, one in models.items()}
            lengths[name] = {model: one["response_length"]["mean"] for model, one in models.items()}
        return cls(
            measure=measure,
            scores=scores,
            rewards=rewards,
            lengths=lengths,
            policies={name: Trained(one.reference, one.kl_coef) for name, one in run.policies.items()},
            controls=run.controls,
            kl={name: kl for name, one in run.policies.items() if (kl := _last_kl(one)) is not None},
            landscape=run.landscape,
        )


def _last_kl(policy: PolicyReport) -> float | None:
    """Mean KL of the last updates; None for TRL's algorithms, whose runs do not log it."""
    values = [row[KL] for row in policy.metrics]
    last = values[-max(1, round(LAST * len(values))) :]
    return sum(last) / len(last) if last else None


def models_table(replicates: Sequence[Replicate], dataset: str) -> list[dict[str, Any]]:
    """Rows {"model", "mean", "low", "high", "n"} of the models that all replicates evaluated."""
    names = [name for name in replicates[0].scores[dataset] if all(name in one.scores[dataset] for one in replicates)]
    return [
        {"model": name, **asdict(mean_interval([one.scores[dataset][name] for one in replicates]))} for name in names
    ]


def pairs_table(runs: Sequence[ReportInput], dataset: str, pairs: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """Rows {"a", "b", "mean", "low", "high", "n", "above", "detectable", "needed"}: a − b, paired by replicate.

    A searched policy stands for the candidate that each replicate picked. above: number of replicates in which a − b > 0.
    """
    measure, rows = findings.headline(runs[0].evaluation), []
    for a, b in pairs:
        differences = []
        for run in runs:
            models, methods = run.evaluation["datasets"][dataset]["models"], searched_methods(run)
            first, second = (methods[name]["best"] if name in methods else name for name in (a, b))
            if first in models and second in models:
                differences.append(models[first]["scores"][measure]["mean"] - models[second]["scores"][measure]["mean"])
        if len(differences) < 2:
            continue
        found = asdict(mean_interval(differences))
        above = sum(difference > 0 for difference in differences)
        counts = {"detectable": detectable(found), "needed": needed(found["mean"], spread(found))}
        rows.append({"a": a, "b": b, **found, "above": above, **counts})
    return rows


def leave_one_out(by_setting: Sequence[Mapping[float, float]]) -> list[float]:
    """For each replicate, the setting (a β or λ) with the best mean score in the other replicates.

    by_setting: for each replicate setting → score, with the same settings. The setting that is best by a replicate's own
    score would make this score biased upwards. Ties go to the smaller setting. Raises ValueError for fewer than two
    replicates.
    """
    if len(by_setting) < 2:
        raise ValueError("leave-one-out needs at least two replicates")
    found = []
    for own, scores in enumerate(by_setting):
        others = [other for index, other in enumerate(by_setting) if index != own]
        total = {setting: math.fsum(other[setting] for other in others) for setting in sorted(scores)}
        found.append(max(total, key=lambda setting: total[setting]))
    return found
