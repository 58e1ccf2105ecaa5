"""Training curves of replicates: mean and 95% band of each metric, and differences from plain PPO, paired by replicate."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from salsa_peft.report import findings
from salsa_peft.report.format import Row, file_name, is_number
from salsa_peft.report.gather import ReportInput
from salsa_peft.report.page import training
from salsa_peft.report.plots import CURVES, PART, Styles
from salsa_peft.report.sections.frontier import rolling_mean
from salsa_peft.report.style import MEASURES, MUTED, Panel, legend, panel
from salsa_peft.utils.statistics import mean_interval

SCORES = ("objective/scores", "objective/held_out_score")
"""Metrics whose differences from plain PPO are drawn, besides the parts of a weighted sum of rewards."""
ENDS = ("score", "kl", "response_length")
"""Metrics of the table of start and end."""


def curves(runs: Sequence[ReportInput]) -> list[dict[str, Any]]:
    """The metrics of the policies that all replicates have, each {"key", "title", "policies", "against", "differences"}.

    policies: policy → {"episode", "mean", "low", "high"}, lists over the episodes that all replicates logged: a rolling mean
    over about a tenth of the updates of each replicate, then its mean and interval over replicates. against: the policy with
    the reference seed-0 from which `differences` of the scores are taken, replicate by replicate; "" and {} for others.
    """
    first = runs[0]
    names = [name for name in findings.order({}, first.policies) if all(name in run.policies for run in runs)]
    plain = "ppo" if "ppo" in names else next((name for name in names if first.policies[name].reference == findings.START), "")  # fmt: skip
    titles = {key: title for key, (_, title) in CURVES.items()}
    for row in (row for name in names for row in first.policies[name].metrics):
        for part in (found[1] for key in row if (found := PART.fullmatch(key))):
            titles.setdefault(f"rewards/{part}/mean", f"{MEASURES.get(part, f'reward “{part}”').capitalize()}, mean of the responses")  # fmt: skip
    drawn = []
    for key, title in titles.items():
        values = {name: _values([run.policies[name].metrics for run in runs], key) for name in names}
        values = {name: found for name, found in values.items() if len(found[0])}
        scored = key in SCORES or PART.fullmatch(key) is not None
        against = plain if scored and plain in values and len(values) > 1 else ""
        if values:
            drawn.append(
                {
                    "key": key,
                    "title": title,
                    "policies": {name: _band(*found) for name, found in values.items()},
                    "against": against,
                    "differences": {
                        name: _band(*_minus(found, values[against]))
                        for name, found in values.items()
                        if against not in ("", name)
                    },
                }
            )
    return drawn


def _values(metrics: Sequence[Sequence[Row]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Episodes (E,) that all replicates logged, and the smoothed values (K, E) of the replicates."""
    each = [{row["episode"]: float(row[key]) for row in rows if is_number(row.get(key))} for rows in metrics]
    shared = sorted(set(each[0]).intersection(*each))
    if not shared:
        return np.empty(0), np.empty((len(each), 0))
    return np.array(shared), np.stack([rolling_mean(np.array([one[at] for at in shared])) for one in each])


def _minus(a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """a − b of each replicate at the episodes that both have."""
    shared, first, second = np.intersect1d(a[0], b[0], return_indices=True)
    return shared, a[1][:, first] - b[1][:, second]


def _band(episodes: np.ndarray, values: np.ndarray) -> dict[str, list[float]]:
    found = [mean_interval(column) for column in values.T]
    return {
        "episode": [int(at) for at in episodes],
        **{name: [getattr(one, name) for one in found] for name in ("mean", "low", "high")},
    }


def ends(runs: Sequence[ReportInput]) -> list[dict[str, Any]]:
    """For each policy {"policy", "updates", METRIC: {"start", "end", "change"}}, with intervals over replicates.

    Start and end are means over the first and last tenth of a replicate's updates; change is the end minus the start.
    """
    rows = []
    for name in findings.order({}, runs[0].policies):
        if not all(name in run.policies and run.policies[name].metrics for run in runs):
            continue
        each = [training(run.policies[name]) for run in runs]
        row: dict[str, Any] = {"policy": name, "updates": min(one["updates"] for one in each)}
        for metric in ENDS:
            start, end = ([one[metric][when] for one in each] for when in ("start", "end"))
            if all(map(is_number, [*start, *end])):
                change = np.subtract(end, start)
                row[metric] = {
                    when: asdict(mean_interval(values))
                    for when, values in (("start", start), ("end", end), ("change", change))
                }
        rows.append(row)
    return rows


def draw(found: Sequence[Row], styles: Styles, prefix: str) -> list[Panel]:
    """For each metric a panel with the bands of all policies; for scores also one of the differences from plain PPO."""
    panels = []
    for one in found:
        tag = file_name(one["key"].removeprefix("objective/"))
        panels.append(_draw(f"{prefix}training-{tag}", one["title"], one["policies"], styles))
        if one["differences"]:
            title = f"{one['title']}: minus {one['against']}"
            panels.append(_draw(f"{prefix}training-{tag}-minus", title, one["differences"], styles, zero=True))
    return panels


def _draw(name: str, title: str, bands: Mapping[str, Row], styles: Styles, zero: bool = False) -> Panel:
    def draw_on(axes: Axes) -> None:
        if zero:
            axes.axhline(0, color=MUTED, lw=1.1)
        for policy, band in bands.items():
            look = styles[policy]
            marks: Any = {"marker": look.marker, "markevery": (0.08, 0.23) if len(band["mean"]) > 3 else 1, "ms": 5}
            axes.fill_between(band["episode"], band["low"], band["high"], color=look.color, alpha=0.14, lw=0)
            axes.plot(band["episode"], band["mean"], color=look.color, ls=look.dash, label=policy, **marks)
        axes.set(title=title, xlabel="episodes")
        legend(axes, ncols=2, handlelength=2.8, columnspacing=1.2)

    return panel(name, f"{title}, of each policy over training, with 95% bands over replicates", draw_on, 2.8)
