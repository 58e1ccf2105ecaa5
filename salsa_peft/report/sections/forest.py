"""The headline as a figure: a forest plot of every model's difference from the start, and from plain PPO."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes

from salsa_peft.report.findings import START, undecided
from salsa_peft.report.format import Row, fixed
from salsa_peft.report.headline import measure_name
from salsa_peft.report.style import INK, MUTED, PAPER, Look, Panel, panel

WIDTH = 3.8
"""Width of a panel in inches; narrow, so that its text is readable on a phone."""
SETS = 3
"""Maximum number of sets of questions in one panel."""
LINE = 0.175
"""Height of one line of the figure in inches."""


def forests(
    tables: Sequence[Row],
    styles: Mapping[str, Look],
    notes: Mapping[str, str],
    hidden: Collection[str] = (),
    prefix: str = "",
) -> list[Panel]:
    """Panels of the differences from the start and from plain PPO, on one scale.

    tables: `headline.table`. notes: model → what it is. hidden: models to leave out. prefix: of the
    files' names.
    """
    models = _models(tables, hidden)
    found = [row[key] for part in tables for row in part["rows"] if row["model"] in models for key in ("start", "ppo")]
    reach = [one[end] for one in found if one for end in ("low", "high")]
    if not reach:
        return []
    margin = 0.06 * (max(*reach, 0.0) - min(*reach, 0.0)) or 0.1
    limits = (min(*reach, 0.0) - margin, max(*reach, 0.0) + margin)
    panels = []
    for number, first in enumerate(range(0, len(tables), SETS)):
        some = tables[first : first + SETS]
        against = " or ".join(some[0]["against"])
        for key, title in (("start", f"Against the start, {START}"), ("ppo", f"Against {against}")):
            if any(row[key] for part in some for row in part["rows"] if row["model"] in models):
                name = f"{prefix}headline-{key}" + (f"-{number + 1}" if len(tables) > SETS else "")
                panels.append(_forest(name, title, some, key, models, styles, notes, limits))
    return panels


def _models(tables: Sequence[Row], hidden: Collection[str]) -> list[str]:
    """The policies, then the models without RLHF; further SFT models only if there is nothing else."""
    rows = {row["model"]: row for part in tables for row in part["rows"] if row["model"] not in hidden}
    policies = [name for name, row in rows.items() if row["policy"]]
    others = [name for name, row in rows.items() if not row["policy"]]
    return [*policies, *(name for name in others if not policies or not name.startswith("seed-"))]


def _forest(
    name: str,
    title: str,
    tables: Sequence[Row],
    key: str,
    models: Sequence[str],
    styles: Mapping[str, Look],
    notes: Mapping[str, str],
    limits: tuple[float, float],
) -> Panel:
    by_model = {
        model: [(part["dataset"], row[key]) for part in tables for row in part["rows"] if row["model"] == model and row[key]]
        for model in models
    }  # fmt: skip
    lines = sum(1.3 + len(rows) for rows in by_model.values() if rows)

    def draw(axes: Axes) -> None:
        axes.axvline(0, color=MUTED, lw=1.1)
        y, ticks, labels = 0.0, [], []
        for model, rows in by_model.items():
            if not rows:
                continue
            _heading(axes, y, model, notes.get(model, ""))
            for dataset, one in rows:
                y += 1
                ticks.append(y)
                labels.append(dataset if len(tables) > 1 else "")
                _bar(axes, y, one, styles[model])
            y += 1.3
        axes.set_yticks(ticks, labels)
        axes.tick_params(axis="y", length=0, labelsize=8.5)
        axes.set_ylim(y - 0.6, -0.7)
        axes.grid(False, axis="y")
        axes.spines["left"].set_visible(False)
        axes.set(title=title, xlim=limits)
        axes.set_xlabel(f"← lower · {measure_name(tables[0]['measure'])} · higher →", size=8.5)

    sets = ", ".join(f"“{part['dataset']}”" for part in tables)
    return panel(name, f"{title}: difference of every model on {sets}", draw, LINE * lines + 0.95, WIDTH)


def _heading(axes: Axes, y: float, model: str, note: str) -> None:
    """The model's name and what it is, on a line of their own."""
    box: Any = {"facecolor": PAPER, "edgecolor": "none", "pad": 1}  # hides the vertical lines behind the text
    where: Any = {"xycoords": ("axes fraction", "data"), "va": "center", "annotation_clip": False, "bbox": box}
    head = axes.annotate(model, (0, y), size=9.5, weight="bold", color=INK, **where)
    axes.annotate(note, (1, 0), xycoords=head, xytext=(6, 0), textcoords="offset points", size=8.5, color=MUTED, va="bottom", bbox=box)  # fmt: skip


def _bar(axes: Axes, y: float, one: Row, look: Look) -> None:
    """The difference with its interval, hollow if the interval includes 0, and its value as text."""
    axes.plot([one["low"], one["high"]], [y, y], color=look.color, lw=2.4, solid_capstyle="round")
    fill = PAPER if undecided(one) else look.color
    axes.plot([one["mean"]], [y], marker="o", ms=6.5, color=look.color, mfc=fill, mew=1.6)
    text = ("+" if one["mean"] > 0 else "") + fixed(one["mean"])
    axes.annotate(text, (1.02, y), xycoords=("axes fraction", "data"), va="center", size=8.5, annotation_clip=False)
