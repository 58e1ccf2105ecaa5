"""Score against KL: the path of each policy over its training and its end, of one run or over replicates.

The KL is that to the policy's own reference, as PPO logs it. References differ, so the KL values of two policies have
different origins; the figure compares what a policy gains with how far it goes from its own reference.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from salsa_peft.report import findings
from salsa_peft.report.findings import START
from salsa_peft.report.format import Row, is_number
from salsa_peft.report.gather import ReportInput
from salsa_peft.report.headline import measure_name
from salsa_peft.report.style import INK, LONG, PAPER, Look, Panel, panel
from salsa_peft.utils.statistics import mean_interval

KL = "objective/kl"
TRAINING = "training"
WIDTH = 4.4


def frontier(runs: Sequence[ReportInput]) -> dict[str, Any] | None:
    """The paths and ends of the policies that all runs have; None without a policy whose KL is logged.

    {"measure", "on", "policies"}: `on` is TRAINING if every policy logs the measure at every update, else the first set of
    questions, with two points to a path: start and end. A policy is {"policy", "reference", "control", "path", "ends", "kl",
    "score"}: path: means over runs of [KL, score]; ends: that of each run; kl and score: the end's mean and interval, over
    runs, or for one run over the prompts of `on` (low and high None if there is none).
    """
    first = runs[0]
    names = [
        name
        for name in findings.order(first.evaluation, first.policies)
        if all(
            name in run.policies and any(is_number(row.get(KL)) for row in run.policies[name].metrics) for run in runs
        )
    ]
    if not names or not first.evaluation.get("datasets"):
        return None
    measure = findings.headline(first.evaluation)
    key, dataset = ("objective/scores" if measure == "reward" else f"rewards/{measure}/mean"), next(iter(first.evaluation["datasets"]))  # fmt: skip
    logged = all(any(is_number(row.get(key)) for row in run.policies[name].metrics) for run in runs for name in names)
    policies = []
    for name in names:
        paths = [_logged(run, name, key) if logged else _start_and_end(run, name, dataset, measure) for run in runs]
        if all(len(path) for path in paths):
            policies.append(_over_runs(name, runs, paths, None if logged else (dataset, measure)))
    return {"measure": measure, "on": TRAINING if logged else dataset, "policies": policies} if policies else None


def _logged(run: ReportInput, name: str, key: str) -> np.ndarray:
    """(KL, score) of each update, as rolling means over about a fifth of the updates."""
    rows = [
        (row[KL], row[key]) for row in run.policies[name].metrics if is_number(row.get(KL)) and is_number(row.get(key))
    ]
    return np.stack([rolling_mean(column, 5) for column in np.array(rows, dtype=float).T], axis=1) if rows else np.empty((0, 2))  # fmt: skip


def _start_and_end(run: ReportInput, name: str, dataset: str, measure: str) -> np.ndarray:
    """(KL, score) of the start and of the trained policy: KL of the first update, and the mean of the last tenth."""
    models = run.evaluation["datasets"][dataset]["models"]
    if any(measure not in models.get(model, {"scores": {}})["scores"] for model in (START, name)):
        return np.empty((0, 2))
    kl = [row[KL] for row in run.policies[name].metrics if is_number(row.get(KL))]
    last = kl[-max(1, round(0.1 * len(kl))) :]
    scores = [models[model]["scores"][measure]["mean"] for model in (START, name)]
    return np.array([[kl[0], scores[0]], [sum(last) / len(last), scores[1]]])


def _over_runs(
    name: str, runs: Sequence[ReportInput], paths: Sequence[np.ndarray], on: tuple[str, str] | None
) -> dict[str, Any]:
    shortest = min(len(path) for path in paths)
    ends = np.stack([path[-1] for path in paths])
    if len(runs) > 1:
        kl, score = (asdict(mean_interval(list(column))) for column in ends.T)
    else:
        kl, score = ({"mean": float(value), "low": None, "high": None, "n": 1} for value in ends[0])
        if on is not None:
            score = dict(runs[0].evaluation["datasets"][on[0]]["models"][name]["scores"][on[1]])
    return {
        "policy": name,
        "reference": runs[0].policies[name].reference,
        "control": findings.is_control(name, runs[0].policies),
        "path": np.mean([path[:shortest] for path in paths], axis=0).tolist(),
        "ends": ends.tolist(),
        "kl": kl,
        "score": score,
    }


def rolling_mean(values: np.ndarray, windows: int = 10) -> np.ndarray:
    """The rolling mean of values (N,) over about N / windows of them."""
    window = np.ones(max(1, len(values) // (2 * windows) * 2 - 1))
    return np.convolve(values, window, "same") / np.convolve(np.ones_like(values), window, "same")


def draw(found: Row, styles: Mapping[str, Look], prefix: str = "") -> Panel:
    """Score against KL: thin lines are paths, small marks the ends of runs, a large mark with bars the mean end."""
    score = measure_name(found["measure"])
    on = "responses in training" if found["on"] == TRAINING else f"“{found['on']}”"

    def draw_on(axes: Axes) -> None:
        for one in found["policies"]:
            look = styles[one["policy"]]
            color, (kl, values) = look.color, np.array(one["path"]).T
            axes.plot(kl, values, color=color, ls=look.dash, lw=1.6)
            axes.plot(kl[0], values[0], marker="o", ms=4.5, color=color, mfc=PAPER, mew=1.2, ls="")
            if len(one["ends"]) > 1:
                axes.plot(*np.array(one["ends"]).T, marker=look.marker, ms=3.5, color=color, alpha=0.5, ls="", mew=0)
            x, y = one["kl"], one["score"]
            for at, low, high in ((0, x["low"], x["high"]), (1, y["low"], y["high"])):
                if low is not None:
                    ends = ([low, high], [y["mean"]] * 2) if at == 0 else ([x["mean"]] * 2, [low, high])
                    axes.plot(*ends, color=color, lw=2, solid_capstyle="butt")
            fill, edge = (PAPER, color) if one["control"] else (color, INK)
            label = f"{one['policy']} (control)" if one["control"] else one["policy"]
            axes.plot(x["mean"], y["mean"], marker=look.marker, ms=8, color=color, mfc=fill, mec=edge, mew=1.2, ls="", label=label)  # fmt: skip
        title = f"{score.capitalize()} against KL"
        axes.set(title=title, xlabel="KL to the policy’s own reference, nats per response", ylabel=f"{score}, {on}")
        columns = 2 if max(len(one["policy"]) for one in found["policies"]) <= LONG else 1
        axes.figure.legend(loc="outside lower center", ncols=columns, handletextpad=0.3, columnspacing=1.4)

    return panel(
        f"{prefix}frontier-{found['measure']}", f"{score} against KL: path and end of each policy", draw_on, 3.4, WIDTH
    )
