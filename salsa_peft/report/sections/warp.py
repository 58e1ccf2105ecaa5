"""WARP by iteration: its policies, their merge, how far they went, and the sweep of η between the start and the merge."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from salsa_peft.report.format import Row, is_number
from salsa_peft.report.gather import ReportInput
from salsa_peft.report.headline import measure_name
from salsa_peft.report.sections.paired import Paired, interval
from salsa_peft.report.style import KNOWN, SPARE, Look, Panel, panel
from salsa_peft.utils.messages import number_in_name
from salsa_peft.utils.statistics import mean_interval

MERGE = "warp"
"""Name of the last merge."""
KL = "objective/kl"


def table(paired: Paired, runs: Sequence[ReportInput]) -> dict[str, Any] | None:
    """{"iterations", "sweep"} of a run with the section `warp`, or over replicates; None without it.

    A row of iterations is {"iteration", "start", "policies", "merge", "scale", "kl", "ranks", "error", "sets"}: kl is the mean KL
    of the policies to their EMAs over the last tenth of the updates, ranks and error are those of the merge's adapter after
    recompression. sets: set of questions → measure → {"policies", "merge", "gain"}: the mean of the policies, the merge, and
    their paired difference. A point of sweep is {"eta", "model", "sets": set of questions → estimate of the headline measure}.
    """
    first, warp = runs[0], runs[0].warp
    if warp is None:
        return None
    rows, start = [], warp.start
    for iteration in range(1, warp.iterations + 1):
        names = [f"{MERGE}-{iteration}-{number}" for number in range(1, warp.policies + 1)]
        merge = MERGE if iteration == warp.iterations else f"{MERGE}-{iteration}"
        errors = [run.soups[merge].error for run in runs]
        kls = [kl for run in runs if (kl := _last_kl(run, names)) is not None]
        rows.append(
            {
                "iteration": iteration,
                "start": start,
                "policies": names,
                "merge": merge,
                "scale": first.soups[merge].scale,
                "kl": asdict(mean_interval(kls)) if len(kls) == len(runs) else None,
                "ranks": first.soups[merge].ranks,
                "error": None if None in errors else float(np.mean([error or 0.0 for error in errors])),
                "sets": {dataset: _scores(paired, dataset, names, merge) for dataset in paired.scores},
            }
        )
        start = merge
    etas = {0.0: warp.start, **{eta: f"{MERGE}-eta-{number_in_name(eta)}" for eta in sorted(warp.sweep)}, 1.0: MERGE}
    points = [
        {"eta": eta, "model": name, "sets": sets}
        for eta, name in sorted(etas.items())
        if (sets := _means(paired, name))
    ]
    return {"iterations": rows, "sweep": points if warp.sweep else [], "measure": paired.measure}


def _last_kl(run: ReportInput, names: Sequence[str]) -> float | None:
    """Mean over policies of the KL to the reference in the last tenth of their updates."""
    found = []
    for name in names:
        values = [row[KL] for row in run.policies[name].metrics if is_number(row.get(KL))]
        found += [float(np.mean(values[-max(1, len(values) // 10) :]))] if values else []
    return float(np.mean(found)) if len(found) == len(names) else None


def _scores(paired: Paired, dataset: str, names: Sequence[str], merge: str) -> dict[str, Any]:
    found = {}
    for measure in dict.fromkeys(("reward", paired.measure)):
        values = paired.values(dataset, [(measure, name) for name in (merge, *names)])
        if values is not None:
            (own, *others), clusters = values
            mean = np.mean(others, axis=0)
            numbers = {"policies": mean, "merge": own, "gain": own - mean}
            found[measure] = {name: asdict(interval(of, clusters)) for name, of in numbers.items()}
    return found


def _means(paired: Paired, name: str) -> dict[str, Any]:
    """Set of questions → estimate of a model's headline measure."""
    found = {dataset: paired.values(dataset, [(paired.measure, name)]) for dataset in paired.scores}
    return {dataset: asdict(interval(one[0][0], one[1])) for dataset, one in found.items() if one is not None}


def draw(found: Row, prefix: str) -> list[Panel]:
    """The sweep of η: the headline measure of each set of questions from the start to the merge."""
    points = found["sweep"]
    if not points:
        return []
    measure = measure_name(found["measure"])
    looks = dict(zip(points[0]["sets"], (KNOWN["soup"], KNOWN["ppo"], *SPARE), strict=False))

    def draw_on(axes: Axes) -> None:
        for dataset, look in looks.items():
            _line(axes, dataset, [(one["eta"], one["sets"][dataset]) for one in points if dataset in one["sets"]], look)
        axes.set(title=f"WARP, {measure} between start and merge", xlabel="η: 0 is the start, 1 is the last merge", ylabel=measure)  # fmt: skip
        axes.legend(loc="best")

    return [panel(f"{prefix}warp-eta", f"{measure} against η, from the start to the last merge", draw_on, 3.0)]


def _line(axes: Axes, label: str, points: Sequence[tuple[float, Mapping[str, float]]], look: Look) -> None:
    at = [eta for eta, _ in points]
    mean, low, high = ([one[key] for _, one in points] for key in ("mean", "low", "high"))
    axes.fill_between(at, low, high, color=look.color, alpha=0.18, lw=0)
    axes.plot(at, mean, color=look.color, ls=look.dash, marker=look.marker, ms=5, label=f"“{label}”")
