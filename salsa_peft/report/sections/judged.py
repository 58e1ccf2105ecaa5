"""Report and terminal table of `salsa judge`, made of the parts of a run's report on its judge."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from salsa_peft.report import judge_tables, plots
from salsa_peft.report.format import Row, finite, p_value, percent
from salsa_peft.report.gather import ReportInput
from salsa_peft.report.page import sample_answers, write_pages
from salsa_peft.report.sections import first_screen
from salsa_peft.utils import manifests

LEGEND = (
    "W, T, L: wins, ties and losses of the first model; a win needs both orders.",
    "Win rate: (W + T/2) / N. Equal length: an estimate for equally long answers.",
)


def report_input(
    name: str, answers: Sequence[Row], judgments: Sequence[Row], verdicts: dict[str, Any], settings: str, samples: int
) -> ReportInput:
    """The input of a report that has answers and judgments, and no training.

    settings: the judge's settings as YAML. samples: number of questions whose answers are shown side by side.
    """
    return ReportInput(
        name=name,
        recipe_yaml=settings,
        mode="",
        base="",
        versions=manifests.versions(),
        units=[],
        seeds={},
        reward={},
        soup={},
        policies={},
        landscape=None,
        evaluation={"models": list(dict.fromkeys(row["model"] for row in answers))},
        answers=[dict(row) for row in answers],
        verdicts=verdicts,
        judgments=[dict(row) for row in judgments],
        samples=samples,
        lengths="characters",
    )


def write_judge_report(folder: Path, run: ReportInput, models: Mapping[str, str]) -> dict[str, Any]:
    """Write report.html, report.md, figures/*.png and summary.json; returns the summary.

    models: name of each model → what it is.
    """
    judged = judge_tables.judged(run)
    assert judged is not None
    screen = first_screen.of_judge(judged, len(models))
    lengths = {name: [row["length"] for row in run.answers if row["model"] == name] for name in models}
    found = {
        "run": run,
        "models": {
            name: {"what": what, "answers": len(lengths[name]), "mean_length": sum(lengths[name]) / len(lengths[name])}
            for name, what in models.items()
        },
        "screen": screen,
        "warnings": judge_tables.warnings(run),
        "judged": judged,
        "samples": sample_answers(run),
    }
    summary = {key: found[key] for key in ("models", "screen", "warnings")} | {"verdicts": run.verdicts}
    drawn = {"headline": [], **plots.draw(run)}
    return write_pages(folder, "judge", found, drawn, finite({"name": run.name, **summary}))


def print_table(verdicts: Row, console: Console) -> None:
    """Print wins, ties, losses and rates of all pairs of each set of questions; it fits into 80 columns."""
    for name, data in verdicts["datasets"].items():
        turns = f", up to {data['turns']} turns" if data["turns"] > 1 else ""
        console.print(f"\n“{name}”, {data['questions']} questions{turns}", markup=False)
        pairs = data["pairs"]
        missing = any(pair["missing"] for pair in pairs)
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        table.add_column("pair", overflow="fold")
        p = "p, Holm" if len(pairs) > 1 else "p"
        for title in ("W", "T", "L", *(["none"] if missing else []), "win rate, % [95%]", p, "equal length"):
            table.add_column(title, justify="right", no_wrap=title != "equal length")
        for pair in pairs:
            table.add_row(*_cells(pair, missing))
        console.print(table, markup=False)
    console.print("\n" + "\n".join(LEGEND), style="dim", markup=False)


def _cells(pair: Row, missing: bool) -> list[str]:
    """The cells of one pair."""
    counts = [str(pair[key]) for key in ("wins", "ties", "losses", *(["missing"] if missing else []))]
    if not pair["n"]:
        return [f"{pair['a']} – {pair['b']}", *counts, "–", "–", "–"]
    rate = f"{percent(pair['adjusted_win_rate'])} [{percent(pair['low'])}, {percent(pair['high'])}]"
    even = pair["length_controlled"]
    return [
        f"{pair['a']} – {pair['b']}", *counts, rate, p_value(pair["p_holm"]), "–" if even is None else percent(even["rate"])
    ]  # fmt: skip
