"""The figures of a report, as inline SVG and PNG."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import LogLocator
from matplotlib.tri import Triangulation

from salsa_peft.report import findings, judge_tables, style
from salsa_peft.report.format import Row, file_name, fixed, is_number
from salsa_peft.report.gather import ReportInput
from salsa_peft.report.sections.frontier import rolling_mean
from salsa_peft.report.style import INK, KNOWN, MEASURES, MUTED, PAPER, SPARE, Look, Panel, panel

Styles = Mapping[str, Look]
"""Name of a model → its colour, dash and marker."""


def scores(name: str, title: str, models: Row, measure: str, styles: Styles, over: str = "prompts") -> Panel:
    """Mean score and interval of each model, one row each. models: name → {mean, low, high}; over: of the intervals."""

    def draw(axes: Axes) -> None:
        for row, (model, score) in enumerate(models.items()):
            look = styles[model]
            _interval(axes, row, score["mean"], score["low"], score["high"], look, look.control, fixed(score["mean"]))
        _rows(axes, list(models))
        axes.set(title=title, xlabel=f"mean {MEASURES.get(measure, measure)}, 95% interval over {over}")

    return panel(name, f"{title}: mean score of each model", draw, 0.27 * len(models) + 0.95)


def win_rates(name: str, title: str, pairs: Sequence[Row], styles: Styles) -> Panel:
    """Adjusted win rate of a over b, one row per pair; a mark is hollow if its interval includes 50%."""

    def draw(axes: Axes) -> None:
        axes.axvline(50, color=MUTED, lw=1.1)
        for row, pair in enumerate(pairs):
            rate, low, high = (100 * pair[key] for key in ("adjusted_win_rate", "low", "high"))
            _interval(axes, row, rate, low, high, styles[pair["a"]], low <= 50 <= high, f"{rate:.1f}")
        _rows(axes, [pair.get("label") or f"{pair['a']} over {pair['b']}" for pair in pairs])
        axes.set(title=title, xlabel="adjusted win rate of the first model, %")

    return panel(name, f"{title}: adjusted win rates", draw, 0.27 * len(pairs) + 0.95)


def line(
    name: str,
    title: str,
    lines: Sequence[Row],
    measure: str,
    styles: Styles,
    limits: tuple[float, float],
    soup: float | None,
) -> Panel:
    """Score along lines between weights (paper, Figure 2a, b). soup: score at the first line's midpoint."""
    shrunk, ends = lines[0]["kind"] == "shrunk", lines[0]["ends"]

    def draw(axes: Axes) -> None:
        cycle = [KNOWN["shrunk" if shrunk else "soup"], *SPARE]
        if soup is not None:
            axes.axhline(soup, color=KNOWN["soup"].color, ls=":", lw=1.2)
        for index, one in enumerate(lines):
            look = cycle[index % len(cycle)]
            at, found = [point["at"] for point in one["points"]], [point["scores"][measure] for point in one["points"]]
            mean, low, high = ([score[key] for score in found] for key in ("mean", "low", "high"))
            label, dash = one["name"] if len(lines) > 1 else None, "-" if index == 0 else look.dash
            axes.fill_between(at, low, high, color=look.color, alpha=0.18, lw=0)
            axes.plot(at, mean, color=look.color, ls=dash, label=label)
            axes.plot(at, mean, ls="", marker=".", ms=4, color=look.color)
            middle = "soup" if findings.of_seeds(ends) else "½"
            marks = {0.0: ends[0], 1.0: ends[1]} | ({} if shrunk else {0.5: middle})
            for x, mark in marks.items() if index == 0 else ():
                _mark(
                    axes,
                    [(a, y) for a, y in zip(at, mean, strict=True) if abs(a - x) < 1e-9],
                    mark,
                    styles.get(mark, KNOWN["soup"]),
                )
        label = f"λ: {ends[0]} + λ · (what {ends[1]} learned)" if shrunk else f"α: 0 is {ends[0]}, 1 is {ends[1]}"
        label = label if len(lines) == 1 or shrunk else "α, from one end to the other"
        axes.set(title=title, xlabel=label, ylim=limits)
        axes.set_ylabel(MEASURES.get(measure, measure))
        if len(lines) > 1:
            style.legend(axes)

    return panel(name, f"{title}: {measure} against the weight", draw, 3.0)


def plane(name: str, title: str, given: Row, measure: str) -> Panel:
    """Score on the plane of three seeds in barycentric coordinates (paper, Figure 2c).

    A point's `open` says for each measure whether its difference from the mean of the three seeds is undecided.
    """
    corners = np.array([[0.0, 0.0], [1.0, 0.0], [0.5, np.sqrt(0.75)]])
    spots = np.array([point["weights"] for point in given["points"]]) @ corners
    values = np.array([point["scores"][measure]["mean"] for point in given["points"]])
    box = {"boxstyle": "round,pad=0.25", "facecolor": "white", "edgecolor": "none", "alpha": 0.85}
    text: Any = {"textcoords": "offset points", "ha": "center", "va": "center", "size": 8.5, "color": "black"}

    def draw(axes: Axes) -> None:
        if len(spots) >= 4 and np.linalg.matrix_rank(spots - spots[0], tol=1e-6) == 2 and np.ptp(values) > 0:
            shading = axes.tricontourf(Triangulation(*spots.T), values, levels=14, cmap="cividis")
            ticks = np.linspace(values.min(), values.max(), 5)
            bar = axes.figure.colorbar(shading, ax=axes, shrink=0.85, format=lambda value, _: fixed(value), ticks=ticks)
            bar.outline.set_visible(False)  # type: ignore[operator]
            bar.set_label(MEASURES.get(measure, measure), color=MUTED)
        decided = ["open" in point and not point["open"].get(measure, True) for point in given["points"]]
        fill = ["black" if one else "white" for one in decided]
        axes.scatter(spots[:, 0], spots[:, 1], s=9, color=fill, edgecolor="black", lw=0.5)
        axes.plot(*corners[[0, 1, 2, 0]].T, ls=":", color="white", lw=2.2)
        for (x, y), member, sign in zip(corners, given["members"], (-1, -1, 1), strict=True):
            axes.annotate(member, (x, y), xytext=(0, 11 * sign), bbox=box, **text)
        axes.plot(*corners.mean(axis=0), marker="*", ms=13, color="white", mec="black", mew=0.7)
        axes.margins(0.03)
        axes.set(title=title, aspect="equal")
        axes.axis("off")

    return panel(name, f"{title}: {measure} on the plane of three seeds", draw, 3.9)


def curve(
    name: str, title: str, policies: Mapping[str, Sequence[Row]], key: str, styles: Styles, log: bool = False
) -> Panel:
    """A metric over PPO's episodes, with a rolling mean over about a tenth of the updates."""

    def draw(axes: Axes) -> None:
        for policy, rows in policies.items():
            look = styles[policy]
            kept = [(row["episode"], row[key]) for row in rows if is_number(row.get(key))]
            if not kept:
                continue
            episodes, values = np.array(kept, dtype=float).T
            smooth = rolling_mean(values)
            if (smooth != values).any():
                axes.plot(episodes, values, color=look.color, lw=0.7, alpha=0.35)
            marks: Any = {"marker": look.marker, "markevery": (0.08, 0.23) if len(values) > 3 else 1, "ms": 5}
            axes.plot(episodes, smooth, color=look.color, ls=look.dash, label=policy, **marks)
        if log:
            axes.set_yscale("log")
            _log_ticks(axes.yaxis)
        axes.set(title=title, xlabel="episodes")
        style.legend(axes, ncols=2, handlelength=2.8, columnspacing=1.2)

    return panel(name, f"{title} of each policy over training", draw, 2.8)


def ablation(name: str, title: str, points: Sequence[Row], xlabel: str, log: bool, styles: Styles) -> Panel:
    """Adjusted win rate against a swept setting, with a line through the best policy at each value."""
    names = list(dict.fromkeys(point["name"] for point in points))
    looks = {**dict(zip((one for one in names if one not in styles), [KNOWN["salsa"], *SPARE], strict=False)), **styles}

    def draw(axes: Axes) -> None:
        axes.axhline(50, color=MUTED, lw=1.1)
        for one in names:
            look = looks.get(one, KNOWN["salsa"])
            mine = sorted((point for point in points if point["name"] == one), key=lambda point: point["x"])
            best: dict[float, float] = {}
            for point in mine:
                best[point["x"]] = max(best.get(point["x"], 0.0), point["adjusted_win_rate"])
            axes.plot(list(best), [100 * rate for rate in best.values()], color=look.color, ls=look.dash, label=one)
            for point in mine:
                low, high, rate = (100 * point[key] for key in ("low", "high", "adjusted_win_rate"))
                axes.plot([point["x"]] * 2, [low, high], color=look.color, lw=1.6, alpha=0.6)
                fill = PAPER if low <= 50 <= high else look.color
                axes.plot(point["x"], rate, marker=look.marker, ms=7, color=look.color, mfc=fill)
        if log:
            axes.set_xscale("log")
            _log_ticks(axes.xaxis)
        axes.set(title=title, xlabel=xlabel, ylabel="adjusted win rate, %")
        if len(names) > 1:
            style.legend(axes, ncols=2)

    return panel(name, f"{title}: adjusted win rate", draw, 3.0)


def distributions(name: str, title: str, models: Mapping[str, Sequence[float]], measure: str, styles: Styles) -> Panel:
    """Distribution of each model's scores as one ridge, with a bar at the mean (paper, Figure 3)."""
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
            _value(axes, row, fixed(mean), "bottom")
        _rows(axes, list(models), above=0.95, below=0.1)
        axes.set(title=title, xlabel=f"{MEASURES.get(measure, measure)} of a response; bar and number: the mean")

    return panel(name, f"{title}: distribution of scores by model", draw, 0.42 * len(models) + 0.9)


def _interval(axes: Axes, row: int, mean: float, low: float, high: float, look: Look, hollow: bool, value: str) -> None:
    size, fill = 9 if look.marker == "*" else 7, PAPER if hollow else look.color
    axes.plot([low, high], [row, row], color=look.color, lw=2.4, solid_capstyle="round")
    axes.plot([mean], [row], marker=look.marker, ms=size, color=look.color, mfc=fill, mew=1.6)
    _value(axes, row, value, "center")


def _value(axes: Axes, row: int, text: str, align: str) -> None:
    axes.annotate(text, (1.01, row), xycoords=("axes fraction", "data"), va=align, size=9)


def _rows(axes: Axes, names: Sequence[str], above: float = 0.6, below: float = 0.6) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 1 + below, -above)
    axes.tick_params(axis="y", labelcolor=INK, length=0)
    axes.grid(False, axis="y")
    axes.spines["left"].set_visible(False)


def _mark(axes: Axes, spots: Sequence[tuple[float, float]], name: str, look: Look) -> None:
    size = 12 if look.marker == "*" else 7
    for x, y in spots:
        axes.plot([x], [y], marker=look.marker, ms=size, color=look.color, mec=INK, mew=0.8, zorder=4)
        axes.annotate(name, (x, y), xytext=(0, 9), textcoords="offset points", ha="center", size=8.5, weight="bold")


def _log_ticks(axis: Axis) -> None:
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter("")


CURVES = {  # key of metrics.jsonl → name in summary.json, title
    "objective/scores": ("score", "Score of the responses"),
    "objective/kl": ("kl", "KL to the reference, summed over a response"),
    "objective/response_length": ("response_length", "Response length, tokens"),
    "objective/held_out_score": ("held_out_score", "Score of the responses to held-out prompts"),
    "objective/entropy": ("entropy", "Entropy of the policy, summed over a response, nats"),
    "objective/kl_coef": ("kl_coef", "β, the KL coefficient"),
}

PART = re.compile(r"rewards/([^/]+)/mean")
"""Pattern of a metric with the mean of a part of a weighted sum of rewards, weight 0 included."""


def styles_of(run: ReportInput) -> dict[str, Look]:
    """Name of a model → its look in every figure of a run."""
    names = findings.order(run.evaluation, run.policies)
    others = [end for line in (run.landscape or {}).get("lines", []) for end in line["ends"]]
    return style.looks([*names, *others, "soup"], [name for name in names if findings.is_control(name, run.policies)])


def draw(run: ReportInput) -> dict[str, list[Panel]]:
    """Draw all figures below the first screen; returns section of the report → its panels, [] for nothing to draw."""
    names, styles = findings.order(run.evaluation, run.policies), styles_of(run)
    drawn: dict[str, list[Panel]] = {
        name: [] for name in ("judged", "ablations", "scores", "pairs", "landscape", "training", "distributions")
    }
    for dataset, data in (run.verdicts or {"datasets": {}})["datasets"].items():
        title = f"Win rates by the judge, “{dataset}”"
        if pairs := [pair for pair in data["pairs"] if pair["n"]]:
            drawn["judged"].append(win_rates(f"judged-{file_name(dataset)}", title, pairs, styles))
    if run.evaluation.get("datasets"):
        drawn["ablations"] = _ablations(run, styles)
    for dataset, data in run.evaluation.get("datasets", {}).items():
        for measure in run.evaluation["measures"]:
            tag = file_name(f"{dataset}-{measure}")
            title = f"{MEASURES.get(measure, measure).capitalize()}, “{dataset}”"
            found = {name: data["models"].get(name, {}).get("scores", {}).get(measure) for name in names}
            if models := {name: score for name, score in found.items() if score is not None}:
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
    drawn["training"] += _reward_parts(curves, styles)
    return drawn


def _reward_parts(curves: Mapping[str, Sequence[Row]], styles: Styles) -> list[Panel]:
    """Curves of the parts of a weighted sum of rewards."""
    names = dict.fromkeys(
        found[1] for rows in curves.values() for row in rows for key in row if (found := PART.fullmatch(key))
    )
    drawn = []
    for name in names:
        title = f"{MEASURES.get(name, f'reward “{name}”').capitalize()}, mean of the responses"
        drawn.append(curve(f"training-{file_name(name)}", title, curves, f"rewards/{name}/mean", styles))
    return drawn


def _ablations(run: ReportInput, styles: Styles) -> list[Panel]:
    measure, drawn = findings.headline(run.evaluation), []
    by = "the judge" if run.verdicts else MEASURES.get(measure, measure)
    for number, one in enumerate(judge_tables.ablations(run, measure)):
        name, title = f"ablation-{number}-{one['kind']}", f"Over {one['against']}, “{one['dataset']}”, by {by}"
        drawn.append(ablation(name, title, one["points"], one["xlabel"], one["log"], styles))
    return drawn


LINES = {"line": " between seeds", "shrunk": ", the control"}
"""Kind of a line → the end of its panel's title."""


def draw_landscape(
    landscape: Row, styles: Styles, prefix: str = "", titles: Mapping[str, str] = LINES, level: float | None = None
) -> list[Panel]:
    """Panels of the landscape: lines and control lines of each measure, on one scale, then the planes.

    prefix: of the files' names. titles: as LINES. level: height of the dotted line. None: the soup's score.
    """
    drawn, planes = [], []
    lines = [one for one in landscape["lines"] if one["kind"] == "line"]
    shrunk = [one for one in landscape["lines"] if one["kind"] == "shrunk"]
    for measure in landscape["measures"]:
        title = MEASURES.get(measure, measure).capitalize()
        found = [point["scores"][measure] for one in landscape["lines"] for point in one["points"]]
        low = min((score["low"] for score in found), default=0)
        high = max((score["high"] for score in found), default=0)
        margin = 0.09 * (high - low) or 0.1
        limits = (low - margin, high + margin)
        points = lines[0]["points"] if lines else []
        soup = (
            level
            if level is not None
            else next((point["scores"][measure]["mean"] for point in points if abs(point["at"] - 0.5) < 1e-9), None)
        )
        for kind, of in (("line", lines), ("shrunk", shrunk)):
            if of:
                name, end = f"{prefix}{kind}-{measure}", titles[kind]
                if end == LINES["line"] and not findings.of_seeds(of[0]["ends"]):
                    end = f" between {of[0]['ends'][0]} and {of[0]['ends'][1]}"
                drawn.append(line(name, f"{title}{end}", of, measure, styles, limits, soup))
        if landscape["plane"] and landscape["plane"]["points"]:
            three = "three seeds" if findings.of_seeds(landscape["plane"]["members"]) else "three models"
            planes.append(plane(f"{prefix}plane-{measure}", f"{title}, {three}", landscape["plane"], measure))
    return drawn + planes


def scores_of(run: ReportInput, dataset: str, measure: str) -> dict[str, list[float]]:
    """Model → the scores of its answers to one dataset."""
    found: dict[str, list[float]] = {name: [] for name in findings.order(run.evaluation, run.policies)}
    for row in run.answers:
        if row["dataset"] == dataset and row["model"] in found and is_number(row["scores"].get(measure)):
            found[row["model"]].append(row["scores"][measure])
    return found
