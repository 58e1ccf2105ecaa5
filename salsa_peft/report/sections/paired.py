"""Scores of models side by side, for differences that are paired by prompt (one run) or by replicate."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from salsa_peft.report import findings
from salsa_peft.report.gather import ReportInput
from salsa_peft.utils.statistics import Estimate, cluster_indices, mean_interval

RESAMPLES = 2000
"""Number of bootstrap resamples over prompts, for numbers that are no means."""


@dataclass(frozen=True)
class Paired:
    """Scores by set of questions, measure and model, of each unit: a turn of a question, or a replicate."""

    measure: str
    """The headline measure."""
    replicates: int
    """Number of replicates; 1 where the units are the turns of one run."""
    scores: Mapping[str, Mapping[str, Mapping[str, Mapping[Hashable, float]]]]
    """Set of questions → measure → model → unit → score; a unit of one run is (question, turn)."""

    @property
    def over(self) -> str:
        """What intervals are over."""
        return "prompts" if self.replicates == 1 else "replicates"

    def values(self, dataset: str, places: Sequence[tuple[str, str]]) -> tuple[np.ndarray, list[Hashable]] | None:
        """Scores (P, U) of P (measure, model) in the U units that all have, and the units' clusters; None if there is none."""
        each = [self.scores[dataset].get(measure, {}).get(model, {}) for measure, model in places]
        shared = [unit for unit in each[0] if all(unit in one for one in each)]
        if not shared:
            return None
        clusters = [unit[0] if isinstance(unit, tuple) else unit for unit in shared]
        return np.array([[one[unit] for unit in shared] for one in each]), clusters

    def best(self, values: np.ndarray) -> list[int]:
        """For each unit, the row (M, U) of the best model; with replicates chosen on the others, else on all prompts."""
        total = values.sum(axis=1, keepdims=True)
        if self.replicates == 1:
            return [int(total.argmax())] * values.shape[1]
        return [int(row) for row in (total - values).argmax(axis=0)]


def interval(values: np.ndarray, clusters: Sequence[Hashable]) -> Estimate:
    """Mean (U,) with its interval, over clusters where several units are of one."""
    return mean_interval(values, clusters if len(set(clusters)) < len(clusters) else None)


def bootstrap(values: np.ndarray, clusters: Sequence[Hashable], number: Any) -> Estimate:
    """`number` of the means (P,) of values (P, U), with its percentile bootstrap interval over clusters."""
    of = cluster_indices(clusters, values.shape[1])
    count = int(of.max()) + 1
    sums = np.stack([np.bincount(of, row, count) for row in values])
    sizes = np.bincount(of, minlength=count)
    draws = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    found = [number(means) for means in (draws @ sums.T) / (draws @ sizes)[:, None]]
    low, high = np.quantile(found, (0.025, 0.975))
    return Estimate(float(number(values.mean(axis=1))), float(low), float(high), count)


def of_run(run: ReportInput) -> Paired:
    """The scores of one run's answers."""
    found: dict[str, dict[str, dict[str, dict[Hashable, float]]]] = {}
    for row in run.answers:
        for measure, score in row["scores"].items():
            if score is not None:
                by_model = found.setdefault(row["dataset"], {}).setdefault(measure, {})
                by_model.setdefault(row["model"], {})[row["index"], row["turn"]] = score
    return Paired(findings.headline(run.evaluation), 1, found)


def of_replicates(runs: Sequence[ReportInput]) -> Paired:
    """The mean scores of each replicate's models."""
    found: dict[str, dict[str, dict[str, dict[Hashable, float]]]] = {}
    for number, run in enumerate(runs):
        for dataset, data in run.evaluation["datasets"].items():
            for model, one in data["models"].items():
                for measure, score in one["scores"].items():
                    by_model = found.setdefault(dataset, {}).setdefault(measure, {})
                    by_model.setdefault(model, {})[number] = score["mean"]
    return Paired(findings.headline(runs[0].evaluation), len(runs), found)
