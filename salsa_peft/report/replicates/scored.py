"""The scores of replicates as one `Scored`: means and differences over runs, for the same headline as a single run's."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from salsa_peft.report import findings
from salsa_peft.report.findings import Scored
from salsa_peft.report.gather import ReportInput
from salsa_peft.report.judge_tables import passed_over, searched_methods
from salsa_peft.utils.statistics import mean_interval


def scored(runs: Sequence[ReportInput]) -> Scored | None:
    """The models and sets of questions that all replicates have, with 95% t-intervals over replicates; None for no set.

    A difference is paired by replicate. A searched policy has its own name and stands for the candidate that each
    replicate picked; the other candidates are left out.
    """
    first = runs[0]
    if not all(run.evaluation.get("datasets") for run in runs):
        return None
    measure = findings.headline(first.evaluation)
    means = {
        dataset: [_means(run, dataset, measure) for run in runs]
        for dataset in first.evaluation["datasets"]
        if all(dataset in run.evaluation["datasets"] for run in runs)
    }
    shared = {
        dataset: [name for name in each[0] if all(name in one for one in each)] for dataset, each in means.items()
    }
    models = list(dict.fromkeys(name for names in shared.values() for name in names))
    methods = {name: first.policies[found["best"]] for name, found in searched_methods(first).items()}
    policies = {name: policy for name, policy in {**first.policies, **methods}.items() if name in models}

    def minus(dataset: str, a: str, b: str) -> dict[str, Any] | None:
        if a not in shared[dataset] or b not in shared[dataset]:
            return None
        found = mean_interval([one[a] - one[b] for one in means[dataset]])
        return {"dataset": dataset, "measure": measure, "a": a, "b": b, **asdict(found)}

    return Scored(
        measure=measure,
        models=findings.order({"models": models}, policies),
        policies=policies,
        picked=list(methods),
        counts={dataset: first.evaluation["datasets"][dataset]["n"] for dataset in means},
        scores={
            dataset: {name: asdict(mean_interval([one[name] for one in each])) for name in shared[dataset]}
            for dataset, each in means.items()
        },
        minus=minus,
    )


def _means(run: ReportInput, dataset: str, measure: str) -> Mapping[str, float]:
    """Model → its mean score; a searched policy instead of its candidates."""
    names = {found["best"]: method for method, found in searched_methods(run).items()}
    gone = passed_over(run)
    return {
        names.get(name, name): one["scores"][measure]["mean"]
        for name, one in run.evaluation["datasets"][dataset]["models"].items()
        if measure in one["scores"] and name not in gone
    }
