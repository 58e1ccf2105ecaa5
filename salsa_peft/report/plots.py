"""Every figure of a report as inline SVG and PNG, and which figures a report has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator
from matplotlib.tri import Triangulation

from salsa_peft.report import findings, judge_tables, style
from salsa_peft.report import format as text
from salsa_peft.report.format import fixed, is_number
from salsa_peft.report.gather import ReportInput
from salsa_peft.report.style import INK, KNOWN, MEASURES, MUTED, PAPER, SPARE, Look, Panel, panel


def scores(name: str, title: str, models: Mapping[str, Any], measure: str, styles: Mapping[str, Look]) -> Panel:
    """One row a model: mean and interval. `models`: name → EST."""

    def draw(axes: Axes) -> None:
        for row, (model, score) in enumerate(models.items()):
            _interval(axes, row, score["mean"], score["low"], score["high"], styles[model], styles[model].control)
            axes.annotate(fixed(score["mean"]), (1.01, row), xycoords=("axes fraction", "data"), va="center", size=9)
        _rows(axes, list(models))
        axes.set(title=title, xlabel=f"mean {MEASURES.get(measure, measure)}, 95% interval over prompts")

    return panel(name, f"{title}: mean score of each model", draw, 0.27 * len(models) + 0.95)


def win_rates(name: str, title: str, pairs: Sequence[Mapping[str, Any]], styles: Mapping[str, Look]) -> Panel:
    """One row a pair: adjusted win rate of a over b, hollow where the interval holds 50%."""

    def draw(axes: Axes) -> None:
        axes.axvline(50, color=MUTED, lw=1.1)
        for row, pair in enumerate(pairs):
            rate, low, high = (100 * pair[key] for key in ("adjusted_win_rate", "low", "high"))
            _interval(axes, row, rate, low, high, styles[pair["a"]], low <= 50 <= high)
            axes.annotate(f"{rate:.1f}", (1.01, row), xycoords=("axes fraction", "data"), va="center", size=9)
        _rows(axes, [pair.get("label") or f"{pair['a']} over {pair['b']}" for pair in pairs])
        axes.set(title=title, xlabel="adjusted win rate of the first model, %")

    return panel(name, f"{title}: adjusted win rates", draw, 0.27 * len(pairs) + 0.95)


def line(
    name: str,
    title: str,
    lines: Sequence[Mapping[str, Any]],
    measure: str,
    styles: Mapping[str, Look],
    limits: tuple[float, float],
    soup: float | None,
) -> Panel:
    """Score along lines of weights (paper's Fig. 2a, b). `soup`: the midpoint's score of the first line, drawn across
    every panel.
    """

    def draw(axes: Axes) -> None:
        shrunk = lines[0]["kind"] == "shrunk"
        cycle = [KNOWN["shrunk" if shrunk else "soup"], *SPARE]
        if soup is not None:
            axes.axhline(soup, color=KNOWN["soup"].color, ls=":", lw=1.2)
        for index, one in enumerate(lines):
            look = cycle[index % len(cycle)]
            at = [point["at"] for point in one["points"]]
            mean, low, high = (
                [point["scores"][measure][key] for point in one["points"]] for key in ("mean", "low", "high")
            )
            axes.fill_between(at, low, high, color=look.color, alpha=0.18, lw=0)
            axes.plot(
                at,
                mean,
                color=look.color,
                ls="-" if index == 0 else look.dash,
                label=one["name"] if len(lines) > 1 else None,
            )
            axes.plot(at, mean, ls="", marker=".", ms=4, color=look.color)
            marks = {0.0: one["ends"][0], 1.0: one["ends"][1]} | ({} if shrunk else {0.5: "soup"})
            for x, mark in marks.items() if index == 0 else ():
                _mark(axes, [(a, y) for a, y in zip(at, mean, strict=True) if abs(a - x) < 1e-9], mark, styles)
        ends = lines[0]["ends"]
        label = f"λ: {ends[0]} + λ · (what {ends[1]} learned)" if shrunk else f"α: 0 is {ends[0]}, 1 is {ends[1]}"
        axes.set(
            title=title, xlabel=label if len(lines) == 1 or shrunk else "α, from one end to the other", ylim=limits
        )
        axes.set_ylabel(MEASURES.get(measure, measure))
        if len(lines) > 1:
            axes.legend(loc="best")

    return panel(name, f"{title}: {measure} against the weight", draw, 3.0)


def plane(name: str, title: str, given: Mapping[str, Any], measure: str) -> Panel:
    """Score on the plane of three seeds, barycentric, the triangle dotted (paper's Fig. 2c)."""
    corners = np.array([[0.0, 0.0], [1.0, 0.0], [0.5, np.sqrt(0.75)]])
    spots = np.array([point["weights"] for point in given["points"]]) @ corners
    values = np.array([point["scores"][measure]["mean"] for point in given["points"]])

    def draw(axes: Axes) -> None:
        if len(spots) >= 4 and np.linalg.matrix_rank(spots - spots[0], tol=1e-6) == 2 and np.ptp(values) > 0:
            shading = axes.tricontourf(Triangulation(*spots.T), values, levels=14, cmap="cividis")
            bar = axes.figure.colorbar(
                shading,
                ax=axes,
                shrink=0.85,
                format=lambda value, _: fixed(value),
                ticks=np.linspace(values.min(), values.max(), 5),
            )
            bar.outline.set_visible(False)  # type: ignore[operator]
            bar.set_label(MEASURES.get(measure, measure), color=MUTED)
        axes.scatter(spots[:, 0], spots[:, 1], s=9, color="white", edgecolor="black", lw=0.5)
        axes.plot(*corners[[0, 1, 2, 0]].T, ls=":", color="white", lw=2.2)
        box = {"boxstyle": "round,pad=0.25", "facecolor": "white", "edgecolor": "none", "alpha": 0.85}
        for (x, y), member, sign in zip(corners, given["members"], (-1, -1, 1), strict=True):
            axes.annotate(
                member,
                (x, y),
                xytext=(0, 11 * sign),
                textcoords="offset points",
                ha="center",
                va="center",
                size=8.5,
                color="black",
                bbox=box,
            )
        axes.plot(*corners.mean(axis=0), marker="*", ms=13, color="white", mec="black", mew=0.7)
        axes.margins(0.03)
        axes.set(title=title, aspect="equal")
        axes.axis("off")

    return panel(name, f"{title}: {measure} on the plane of three seeds", draw, 3.9)


def curve(
    name: str,
    title: str,
    policies: Mapping[str, Sequence[Mapping[str, Any]]],
    key: str,
    styles: Mapping[str, Look],
    log: bool = False,
) -> Panel:
    """One quantity over PPO's episodes: each update thin, a rolling mean over a twentieth of them strong."""

    def draw(axes: Axes) -> None:
        for policy, rows in policies.items():
            look = styles[policy]
            kept = [(row["episode"], row[key]) for row in rows if is_number(row.get(key))]
            if not kept:
                continue
            episodes, values = np.array(kept, dtype=float).T
            window = np.ones(max(1, len(values) // 20 * 2 - 1))
            smooth = np.convolve(values, window, "same") / np.convolve(np.ones_like(values), window, "same")
            if window.size > 1:
                axes.plot(episodes, values, color=look.color, lw=0.7, alpha=0.35)
            axes.plot(
                episodes,
                smooth,
                color=look.color,
                ls=look.dash,
                label=policy,
                marker=look.marker,
                markevery=(0.08, 0.23) if len(values) > 3 else 1,
                ms=5,
            )
        if log:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("")
        axes.set(title=title, xlabel="episodes")
        axes.legend(loc="best", ncols=2, handlelength=2.8, columnspacing=1.2)

    return panel(name, f"{title} of each policy over training", draw, 2.8)


def ablation(
    name: str,
    title: str,
    points: Sequence[Mapping[str, Any]],
    xlabel: str,
    log: bool,
    styles: Mapping[str, Look],
) -> Panel:
    """Adjusted win rate against one number that policies differ in (the paper's Fig. 4a, 5): a line through the best at each, for each name."""
    names = list(dict.fromkeys(point["name"] for point in points))
    looks = {**dict(zip((one for one in names if one not in styles), [KNOWN["salsa"], *SPARE], strict=False)), **styles}

    def draw(axes: Axes) -> None:
        axes.axhline(50, color=MUTED, lw=1.1)
        for one in names:
            look = looks.get(one, KNOWN["salsa"])
            mine = sorted((point for point in points if point["name"] == one), key=lambda point: point["x"])
            best = {
                point["x"]: max(other["adjusted_win_rate"] for other in mine if other["x"] == point["x"])
                for point in mine
            }
            axes.plot(list(best), [100 * rate for rate in best.values()], color=look.color, ls=look.dash, label=one)
            for point in mine:
                low, high, rate = (100 * point[key] for key in ("low", "high", "adjusted_win_rate"))
                axes.plot([point["x"]] * 2, [low, high], color=look.color, lw=1.6, alpha=0.6)
                axes.plot(
                    point["x"],
                    rate,
                    marker=look.marker,
                    ms=7,
                    color=look.color,
                    mfc=PAPER if low <= 50 <= high else look.color,
                )
        if log:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_formatter("")
        axes.set(title=title, xlabel=xlabel, ylabel="adjusted win rate, %")
        if len(names) > 1:
            axes.legend(loc="best", ncols=2)

    return panel(name, f"{title}: adjusted win rate", draw, 3.0)


def distributions(
    name: str, title: str, models: Mapping[str, Sequence[float]], measure: str, styles: Mapping[str, Look]
) -> Panel:
    """Scores of single responses, a ridge a model, its mean marked (the paper's Fig. 3)."""
    together = np.concatenate([np.asarray(values, dtype=float) for values in models.values()])
    edges = np.linspace(together.min() - 1e-9, together.max() + 1e-9, 33)
    counts = {model: np.histogram(values, edges)[0] / len(values) for model, values in models.items()}
    top = max(float(heights.max()) for heights in counts.values()) / 0.88

    def draw(axes: Axes) -> None:
        for row, (model, values) in enumerate(models.items()):
            look, mean = styles[model], float(np.mean(values))
            axes.stairs(row - counts[model] / top, edges, baseline=row, fill=True, color=look.color, alpha=0.55)
            axes.stairs(row - counts[model] / top, edges, baseline=row, color=look.color, lw=0.8)
            axes.plot([mean, mean], [row, row - 0.9], color=INK, lw=1.5)
            axes.annotate(fixed(mean), (1.01, row), xycoords=("axes fraction", "data"), va="bottom", size=9)
        _rows(axes, list(models), above=0.95, below=0.1)
        axes.set(title=title, xlabel=f"{MEASURES.get(measure, measure)} of a response; bar and number: the mean")

    return panel(name, f"{title}: distribution of scores by model", draw, 0.42 * len(models) + 0.9)


def _interval(axes: Axes, row: int, mean: float, low: float, high: float, look: Look, hollow: bool) -> None:
    axes.plot([low, high], [row, row], color=look.color, lw=2.4, solid_capstyle="round")
    axes.plot(
        [mean],
        [row],
        marker=look.marker,
        ms=9 if look.marker == "*" else 7,
        color=look.color,
        mfc=PAPER if hollow else look.color,
        mew=1.6,
    )


def _rows(axes: Axes, names: Sequence[str], above: float = 0.6, below: float = 0.6) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 1 + below, -above)
    axes.tick_params(axis="y", labelcolor=INK, length=0)
    axes.grid(False, axis="y")
    axes.spines["left"].set_visible(False)


def _mark(axes: Axes, spots: Sequence[tuple[float, float]], name: str, styles: Mapping[str, Look]) -> None:
    look = styles[name]
    for x, y in spots:
        axes.plot(
            [x],
            [y],
            marker=look.marker,
            ms=12 if look.marker == "*" else 7,
            color=look.color,
            mec=INK,
            mew=0.8,
            zorder=4,
        )
        axes.annotate(name, (x, y), xytext=(0, 9), textcoords="offset points", ha="center", size=8.5, weight="bold")


CURVES = {  # key of metrics.jsonl → name in summary.json, title
    "objective/scores": ("score", "Score of the responses"),
    "objective/kl": ("kl", "KL to the reference, summed over a response"),
    "objective/response_length": ("response_length", "Response length, tokens"),
    "objective/kl_coef": ("kl_coef", "β, the KL coefficient"),
}


def draw(run: ReportInput) -> dict[str, list[Panel]]:
    """Section → its panels; none where the run has nothing to draw."""
    names = findings.order(run.evaluation, run.policies)
    others = [end for line in (run.landscape or {}).get("lines", []) for end in line["ends"]]
    controls = [name for name in names if findings.is_control(name, run.policies)]
    styles = style.looks([*names, *others, "soup"], controls)
    drawn: dict[str, list[Panel]] = {
        name: [] for name in ("judged", "ablations", "scores", "pairs", "landscape", "training", "distributions")
    }
    for dataset, data in (run.verdicts or {"datasets": {}})["datasets"].items():
        tag, title = text.file_name(dataset), f"Win rates by the judge, “{dataset}”"
        told = [pair for pair in data["pairs"] if pair["n"]]
        drawn["judged"] += [win_rates(f"judged-{tag}", title, told, styles)] if told else []
    if run.evaluation.get("datasets"):
        drawn["ablations"] = _ablations(run, styles)
    for dataset, data in run.evaluation.get("datasets", {}).items():
        for measure in run.evaluation["measures"]:
            tag = text.file_name(f"{dataset}-{measure}")
            title = f"{style.MEASURES.get(measure, measure).capitalize()}, “{dataset}”"
            models = {
                name: data["models"][name]["scores"][measure]
                for name in names
                if measure in data["models"].get(name, {}).get("scores", {})
            }
            if models:
                drawn["scores"].append(scores(f"scores-{tag}", title, models, measure, styles))
            if pairs := [pair for pair in data.get("pairs", []) if pair["measure"] == measure]:
                drawn["pairs"].append(win_rates(f"pairs-{tag}", title, pairs, styles))
            if values := {name: kept for name, kept in scores_of(run, dataset, measure).items() if kept}:
                drawn["distributions"].append(distributions(f"distribution-{tag}", title, values, measure, styles))
    if run.landscape:
        drawn["landscape"] = draw_landscape(run.landscape, styles)
    curves = {name: policy.metrics for name, policy in run.policies.items() if policy.metrics}
    for key, (short, title) in CURVES.items():
        reached = [row[key] for rows in curves.values() for row in rows if is_number(row.get(key))]
        if reached:
            log = short == "kl_coef" and min(reached) > 0 and max(reached) > 8 * min(reached)
            drawn["training"].append(curve(f"training-{short}", title, curves, key, styles, log))
    return drawn


def _ablations(run: ReportInput, styles: Mapping[str, Look]) -> list[Panel]:
    measure, drawn = findings.headline(run.evaluation), []
    by = "the judge" if run.verdicts else style.MEASURES.get(measure, measure)
    for number, one in enumerate(judge_tables.ablations(run, measure)):
        title = f"Over {one['against']}, “{one['dataset']}”, by {by}"
        drawn.append(ablation(f"ablation-{number}-{one['kind']}", title, one["points"], one["xlabel"], one["log"], styles))  # fmt: skip
    return drawn


def draw_landscape(landscape: Mapping[str, Any], styles: Mapping[str, Look]) -> list[Panel]:
    """For each measure: lines between seeds and the control lines beside them, on one scale; then the planes."""
    drawn, planes = [], []
    for measure in landscape["measures"]:
        title = style.MEASURES.get(measure, measure).capitalize()
        edges = [
            point["scores"][measure][key]
            for line in landscape["lines"]
            for point in line["points"]
            for key in ("low", "high")
        ]
        margin = 0.09 * (max(edges, default=0) - min(edges, default=0)) or 0.1
        limits = (min(edges, default=0) - margin, max(edges, default=0) + margin)
        lines, shrunk = (
            [line for line in landscape["lines"] if (line["kind"] == "shrunk") == control] for control in (False, True)
        )
        middle = next(
            (p["scores"][measure]["mean"] for line in lines[:1] for p in line["points"] if abs(p["at"] - 0.5) < 1e-9),
            None,
        )
        if lines:
            drawn.append(line(f"line-{measure}", f"{title} between seeds", lines, measure, styles, limits, middle))
        if shrunk:
            drawn.append(line(f"shrunk-{measure}", f"{title}, the control", shrunk, measure, styles, limits, middle))
        if landscape["plane"] and landscape["plane"]["points"]:
            planes.append(plane(f"plane-{measure}", f"{title}, three seeds", landscape["plane"], measure))
    return drawn + planes


def scores_of(run: ReportInput, dataset: str, measure: str) -> dict[str, list[float]]:
    """model → the scores of its answers to one dataset."""
    return {
        name: [
            row["scores"][measure]
            for row in run.answers
            if (row["dataset"], row["model"]) == (dataset, name) and is_number(row["scores"].get(measure))
        ]
        for name in findings.order(run.evaluation, run.policies)
    }
