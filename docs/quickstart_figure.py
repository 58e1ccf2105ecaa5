"""Draw README's figure from replicates of the quickstart: training reward over updates, and the line of Figure 2.

salsa run quickstart --lora --replicates 8
python docs/quickstart_figure.py runs/quickstart-lora docs/quickstart.svg
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from salsa_peft.report.plots import rolling_mean
from salsa_peft.report.style import MUTED, RC, looks
from salsa_peft.utils.files import read_json, read_json_lines
from salsa_peft.utils.manifests import stages_folder
from salsa_peft.utils.statistics import mean_interval

POLICIES = {
    "salsa": "SALSA: reference is the soup",
    "ppo": "PPO: reference is seed-0, its start",
    "ppo-shrunk": "control: reference is seed-0, shrunk",
    "ppo-base": "control: reference is the base",
}


def newest(run: Path, pattern: str) -> Path:
    """The newest of the files in a run that match the pattern."""
    return max(stages_folder(run).glob(pattern), key=lambda path: path.stat().st_mtime)


def training(axes: Axes, runs: Sequence[Path]) -> None:
    """Reward model's score of the responses of each update: mean over runs, then over a tenth of the updates."""
    styles = looks(list(POLICIES))
    for name, label in POLICIES.items():
        rows = [read_json_lines(newest(run, f"ppo/{name}/*/metrics.jsonl")) for run in runs]
        scores = np.mean([[row["objective/scores"] for row in one] for one in rows], axis=0)
        updates = [row["update"] for row in rows[0]]
        axes.plot(updates, rolling_mean(scores), color=styles[name].color, ls=styles[name].dash, label=label)
    axes.set(title="Reward model's score during PPO", xlabel="update")
    axes.legend(loc="lower right", handlelength=2.6)


def landscape(axes: Axes, runs: Sequence[Path]) -> None:
    """Gold reward of the models between two seeds, with t-intervals over runs, and that of the best shrunk seed."""
    lines: list[list[dict[str, Any]]] = [read_json(newest(run, "landscape/*/landscape.json"))["lines"] for run in runs]
    between = [next(line["points"] for line in one if line["kind"] == "line") for one in lines]
    shrunk = [gold(next(line["points"] for line in one if line["kind"] == "shrunk")) for one in lines]
    at = [point["at"] for point in between[0]]
    means = [mean_interval(scores) for scores in zip(*(gold(points) for points in between), strict=True)]
    control = float(np.mean([max(scores) for scores in shrunk]))
    color = looks(["soup"])["soup"].color
    axes.fill_between(at, [one.low for one in means], [one.high for one in means], color=color, alpha=0.18, lw=0)
    axes.plot(at, [one.mean for one in means], color=color, marker=".")
    axes.axhline(control, color=MUTED, ls=":", lw=1.2)
    axes.annotate("control: best shrunk seed", (at[0], control), (2, 4), textcoords="offset points", fontsize=8.5)
    for x, name, offset in ((0, "seed-0", (26, -8)), (0.5, "soup", (0, -16)), (1, "seed-1", (-26, -8))):
        y = means[at.index(x)].mean
        axes.annotate(name, (x, y), offset, textcoords="offset points", ha="center", fontsize=9)
    axes.set(title="Gold reward between two seeds, before PPO", xlabel="α: 0 is seed-0, 1 is seed-1")


def gold(points: Sequence[dict[str, Any]]) -> list[float]:
    """Mean gold reward of each point."""
    return [point["scores"]["gold"]["mean"] for point in points]


def main(folder: Path, out: Path) -> None:
    """Draw both panels into one SVG."""
    runs = sorted(folder.glob("replicate-*"))
    with matplotlib.rc_context({**RC, "svg.hashsalt": "quickstart", "figure.facecolor": "white"}):
        figure = Figure(figsize=(10, 3.6), layout="constrained")
        FigureCanvasSVG(figure)
        left, right = figure.subplots(1, 2)
        training(left, runs)
        landscape(right, runs)
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
