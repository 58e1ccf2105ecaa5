"""WARP by iteration: its policies, their merge, how far they went, and the sweep of η between the start and the merge."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from salsa_peft.report.format import Row, file_name, is_number
from salsa_peft.report.gather import ReportInput
from salsa_peft.report.headline import measure_name
from salsa_peft.report.sections.paired import Paired, interval
from salsa_peft.report.style import KNOWN, SPARE, Look, Panel, legend, panel
from salsa_peft.utils.messages import number_in_name
from salsa_peft.utils.statistics import mean_interval

MERGE = "warp"
"""Name of the last merge."""
KL = "objective/kl"
KL_FROM_START = "kl"
"""Score of the answers whose mean is the KL from seed-0 (evaluation/evaluate.py)."""


def table(paired: Paired, runs: Sequence[ReportInput]) -> dict[str, Any] | None:
    """{"iterations", "sweep"} of a run with the section `warp`, or over replicates; None without it.

    A row of iterations is {"iteration", "start", "policies", "merge", "scale", "kl", "ranks", "error", "sets"}: kl is the mean KL
    of the policies to their EMAs over the last tenth of the updates, ranks and error are those of the merge's adapter after
    recompression. sets: set of questions → measure, and KL_FROM_START where it was measured → {"policies", "merge", "gain"}:
    the mean of the policies, the merge, and their paired difference. A point of sweep is {"eta", "model", "sets": set of
    questions → {"score", "gain", "kl"}}, estimates of the headline measure, of its paired difference from WARP's start, and
    of the KL from seed-0 (None: not measured). others:
    the same without "eta" for the other policies and for those of WARP.
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
        if (sets := _means(paired, name, warp.start))
    ]
    others = [{"model": name, "sets": sets} for name in first.policies if (sets := _means(paired, name, warp.start))]
    return {"iterations": rows, "sweep": points, "others": others, "measure": paired.measure}


def _last_kl(run: ReportInput, names: Sequence[str]) -> float | None:
    """Mean over policies of the KL to the reference in the last tenth of their updates."""
    found = []
    for name in names:
        values = [row[KL] for row in run.policies[name].metrics if is_number(row.get(KL))]
        found += [float(np.mean(values[-max(1, len(values) // 10) :]))] if values else []
    return float(np.mean(found)) if len(found) == len(names) else None


def _scores(paired: Paired, dataset: str, names: Sequence[str], merge: str) -> dict[str, Any]:
    found = {}
    for measure in dict.fromkeys(("reward", paired.measure, KL_FROM_START)):
        values = paired.values(dataset, [(measure, name) for name in (merge, *names)])
        if values is not None:
            (own, *others), clusters = values
            mean = np.mean(others, axis=0)
            numbers = {"policies": mean, "merge": own, "gain": own - mean}
            found[measure] = {name: asdict(interval(of, clusters)) for name, of in numbers.items()}
    return found


def _means(paired: Paired, name: str, start: str) -> dict[str, Any]:
    """Set of questions → estimates of a model's headline measure, of its gain over the start, and of its KL from seed-0."""

    def mean(dataset: str, measure: str) -> dict[str, Any] | None:
        found = paired.values(dataset, [(measure, name)])
        return None if found is None else asdict(interval(found[0][0], found[1]))

    def gain(dataset: str) -> dict[str, Any] | None:
        found = paired.values(dataset, [(paired.measure, name), (paired.measure, start)])
        return None if found is None else asdict(interval(found[0][0] - found[0][1], found[1]))

    sets = {
        dataset: {"score": mean(dataset, paired.measure), "gain": gain(dataset), "kl": mean(dataset, KL_FROM_START)}
        for dataset in paired.scores
    }
    return {dataset: one for dataset, one in sets.items() if one["score"] is not None}


def draw(found: Row, prefix: str) -> list[Panel]:
    """The headline measure from the start to the merge: against η, and against the KL from seed-0 if it was measured.

    It is drawn as the paired difference from the start if the start was evaluated.
    """
    measure, points = measure_name(found["measure"]), found["sweep"]
    if points and points[0]["eta"] == 0:
        measure = f"{measure}, minus {points[0]['model']}"
        points, others = (
            [{**one, "sets": {name: {**of, "score": of["gain"]} for name, of in one["sets"].items()}} for one in kind]
            for kind in (points, found["others"])
        )
    else:
        others = found["others"]
    sets = list(points[0]["sets"]) if points else []
    looks = dict(zip(sets, (KNOWN["soup"], KNOWN["ppo"], *SPARE), strict=False))

    def draw_on(axes: Axes) -> None:
        for dataset, look in looks.items():
            _line(axes, dataset, [(one["eta"], one["sets"][dataset]["score"]) for one in points if dataset in one["sets"]], look)  # fmt: skip
        axes.set(title="WARP, between start and merge", xlabel="η: 0 is the start, 1 is the last merge", ylabel=measure)  # fmt: skip
        axes.legend(loc="best")

    panels = []
    if len(points) > 2:
        panels.append(
            panel(f"{prefix}warp-eta", f"{measure} against η, from the start to the last merge", draw_on, 3.0)
        )
    for dataset in sets:
        at = [one for one in points if dataset in one["sets"] and one["sets"][dataset]["kl"] is not None]
        if len(at) > 1:
            panels.append(_frontier(f"{prefix}warp-kl-{file_name(dataset)}", dataset, at, others, measure))
    return panels


def _line(axes: Axes, label: str, points: Sequence[tuple[float, Mapping[str, float]]], look: Look) -> None:
    at = [eta for eta, _ in points]
    mean, low, high = ([one[key] for _, one in points] for key in ("mean", "low", "high"))
    axes.fill_between(at, low, high, color=look.color, alpha=0.18, lw=0)
    axes.plot(at, mean, color=look.color, ls=look.dash, marker=look.marker, ms=5, label=f"“{label}”")


def _frontier(name: str, dataset: str, points: Sequence[Row], others: Sequence[Row], measure: str) -> Panel:
    """Score against the KL from seed-0: the sweep of η as a line, and all policies."""

    def cross(axes: Axes, one: Row, look: Look, label: str | None) -> None:
        x, y = one["sets"][dataset]["kl"], one["sets"][dataset]["score"]
        axes.plot([x["low"], x["high"]], [y["mean"]] * 2, color=look.color, lw=1.3)
        axes.plot([x["mean"]] * 2, [y["low"], y["high"]], color=look.color, lw=1.3)
        axes.plot(x["mean"], y["mean"], marker=look.marker, ms=6, color=look.color, ls="", label=label)

    def draw_on(axes: Axes) -> None:
        means = [(one["sets"][dataset]["kl"]["mean"], one["sets"][dataset]["score"]["mean"]) for one in points]
        axes.plot(*zip(*means, strict=True), color=KNOWN["soup"].color, lw=1.6, label="WARP, η from 0 to 1")
        for one, (x, y) in zip(points, means, strict=True):
            cross(axes, one, KNOWN["soup"], None)
            axes.annotate(f"η {one['eta']:g}", (x, y), xytext=(6, 4), textcoords="offset points", size=8)
        usual = [one for one in others if not one["model"].startswith(f"{MERGE}-")]
        looks = dict(zip([one["model"] for one in usual], (KNOWN["ppo"], KNOWN["salsa"], *SPARE), strict=False))
        of_warp = False
        for one in (one for one in others if dataset in one["sets"] and one["sets"][dataset]["kl"] is not None):
            look = looks.get(one["model"])
            label = one["model"] if look is not None else None if of_warp else "WARP’s policies"
            cross(axes, one, look or KNOWN["mkl"], label)
            of_warp = of_warp or look is None
        axes.set(title=f"Score against KL from seed-0, “{dataset}”", xlabel="KL from seed-0, nats per answer", ylabel=measure)  # fmt: skip
        legend(axes)

    return panel(name, f"{measure} against the KL from seed-0 on “{dataset}”: WARP’s sweep of η, and all policies", draw_on, 3.4)  # fmt: skip
