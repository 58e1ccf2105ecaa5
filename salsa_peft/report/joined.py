"""Report on several runs: win rates by model and set of questions (paper, Table 1), and what replicates found together.

Runs that differ only in their training seeds form one group: they are replicates. Win rates are by the run's judge, or
without a judge by its headline measure; a group with several judges has several rows. A group whose runs share their
questions has one rate over runs and questions (`judge_statistics.over_seeds`), and its p-values are over questions. If
each run has questions of its own (toy data of another seed), rate and p-value are over runs: a t-interval and a t-test of
the runs' rates. P-values have Holm's correction over the cells of a column. Details of a run are in its own report.
"""

import os
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from salsa_peft.evaluation.judge_statistics import NET, Judgment, OverSeeds, counts, over_seeds, seeds_warning
from salsa_peft.report import findings, headline, judge_tables, page, paper, plots, style
from salsa_peft.report.format import Row, finite
from salsa_peft.report.gather import ReportInput
from salsa_peft.report.replicates import group
from salsa_peft.report.replicates.runs import Run
from salsa_peft.report.replicates.table import as_markdown
from salsa_peft.report.sections import first_screen
from salsa_peft.report.style import MEASURES, Panel
from salsa_peft.utils.errors import require
from salsa_peft.utils.manifests import stages_folder
from salsa_peft.utils.statistics import holm, mean_interval, sign_flip_test, t_test


def write_joined(folder: Path, runs: Sequence[Run]) -> dict[str, Any]:
    """Write the report's pages, figures and summary.json; returns the summary.

    Raises SalsaError if no run compares a pair of models, or a run is given twice.
    """
    groups = replicates(runs)
    rows = table(groups)
    require(
        bool(rows), f"{len(runs)} runs: none of them compares a pair of models; join runs whose recipes evaluate pairs"
    )
    pairs = list(dict.fromkeys(pair for row in rows for pair in row["cells"]))
    together = [
        group.together(name, [run.report for run in of], _pairs_by_set(of), rows) for name, of in groups if len(of) > 1
    ]
    screens = [one["screen"] for one in together] or [_no_replicates(groups, rows, pairs)]
    if len(runs) == 1:
        screens = [page.context(runs[0].report)["screen"]]
    summary: dict[str, Any] = {
        "finding": [text for screen in screens for text in screen["sentences"].values()],
        "pairs": pair_counts(rows, pairs),
        "warnings": _warnings(groups, rows),
        "runs": [_run(run, name, folder) for name, of in groups for run in of],
        "scores": [one for _, of in groups for run in of for one in _scores(run)],
        "replicates": together,
        "console": _console(together, headline.WIDTH),
        "narrow_console": _console(together, headline.NARROW),
    }
    keys = ("model", "dataset", "by")
    cells = [{key: row[key] for key in keys} | cell for row in rows for cell in row["cells"].values()]
    several = [f"{len(runs)} runs of {len(groups)} recipes or bases."] if together and len(groups) > 1 else []
    context = {
        **summary,
        "screens": screens,
        "line": " ".join([*several, *(screen["line"] for screen in screens)]),
        "title": groups[0][0] if len(groups) == 1 else f"{len(runs)} runs: {', '.join(name for name, _ in groups)}",
        "several": len(groups) > 1,
        "scores": [one for _, of in groups if len(of) == 1 for one in _scores(of[0])],
        "rows": rows,
        "columns": pairs,
        "as_markdown": as_markdown,
        "undecided": findings.undecided,
        "paper": any(cell["paper"] for cell in cells),
    }
    drawn: dict[str, list[Panel]] = {"pairs": _draw(rows, pairs, plots.styles_of(runs[0].report)), "headline0": []}
    for number, (_, of) in enumerate((name, of) for name, of in groups if len(of) > 1):
        drawn |= group.draw(together[number], of[0].report, number)
    return page.write_pages(folder, "joined", context, drawn, finite({**summary, "cells": cells}))


def _console(together: Sequence[Row], width: int) -> list[str]:
    """The headline of each group of replicates, and what each could have shown, as lines for a terminal."""
    return [
        line
        for group in together
        for line in (
            *headline.wrapped([f"{group['name']}: {group['n']} replicates"], width),
            *headline.console(group["headline"], group["screen"]["names"], group["screen"]["sentences"], width),
            "",
            *headline.wrapped([f"Power: {text}" for text in group["power"]["sentences"]], width),
        )
    ]


def replicates(runs: Sequence[Run]) -> list[tuple[str, list[Run]]]:
    """Group runs of the same recipe and base as (name, runs), in the order given; equal names get numbers.

    Raises SalsaError if a run is given twice.
    """
    found: dict[tuple[str, str | None], list[Run]] = {}
    for run in runs:
        base = None if run.report.toy else run.report.fingerprint
        same = found.setdefault((run.report.replicate_of, base), [])
        for other in same:
            require(
                other.report.training_seeds != run.report.training_seeds,
                f"{run.folder}: has the same recipe and training seeds as {other.folder}"
                f" ({run.report.training_seeds}); give each run once",
            )
        same.append(run)
    groups: list[tuple[str, list[Run]]] = []
    for of in found.values():
        name = of[0].report.name
        alike = sum(other == name or other.startswith(f"{name} (") for other, _ in groups)
        groups.append((name if not alike else f"{name} ({alike + 1})", of))
    return groups


def table(groups: Sequence[tuple[str, list[Run]]]) -> list[dict[str, Any]]:
    """Table rows {"model", "base", "dataset", "by", "runs", "cells": (a, b) → cell}; a cell has p_holm."""
    rows: list[dict[str, Any]] = []
    for name, of in groups:
        for by, same in _by_judge(of).items():
            for dataset in dict.fromkeys(dataset for run in same for dataset in _datasets(run.report)):
                given = {pair: _cell(same, dataset, *pair) for pair in _pairs(same, dataset)}
                if cells := {pair: cell for pair, cell in given.items() if cell is not None}:
                    rows.append({"model": name, "base": same[0].report.base, "dataset": dataset, "by": by, "runs": len(same), "cells": cells})  # fmt: skip
    for pair in dict.fromkeys(pair for row in rows for pair in row["cells"]):
        there = [row["cells"][pair] for row in _rows_with_verdicts(rows, pair)]
        for cell, p in zip(there, holm([cell["p_value"] for cell in there]), strict=True):
            cell["p_holm"] = p
    return rows


def _rows_with_verdicts(rows: Sequence[Row], pair: tuple[str, str]) -> list[Row]:
    return [row for row in rows if pair in row["cells"] and row["cells"][pair]["runs"]]


def _by_judge(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Name of the judge or measure → its runs; different judges with the same name get a number."""
    found: dict[str, list[Run]] = {}
    known: dict[str, Any] = {}
    for run in runs:
        measure = findings.headline(run.report.evaluation)
        judge: Any = measure if run.report.verdicts is None else run.report.verdicts["judge"]
        name = MEASURES.get(measure, measure) if run.report.verdicts is None else judge_tables.judge_name(judge)
        names = (name, *(f"{name} ({number})" for number in range(2, len(runs) + 2)))
        by = next(one for one in names if known.setdefault(one, judge) == judge)
        found.setdefault(by, []).append(run)
    return found


def _datasets(run: ReportInput) -> dict[str, Any]:
    found: dict[str, Any] = (run.verdicts or run.evaluation)["datasets"]
    return found


def _pairs(runs: Sequence[Run], dataset: str) -> list[tuple[str, str]]:
    """Pairs that the runs compared; a searched policy has its own name, whichever β a run picked."""
    found: list[tuple[str, str]] = []
    for run in runs:
        for pair in judge_tables.picked(run.report, _datasets(run.report).get(dataset, {"pairs": []})):
            a, b = (judge_tables.method(run.report, pair[side]) for side in "ab")
            found += [(a, b)] if a != b and (a, b) not in found and (b, a) not in found else []
    return found


def _pairs_by_set(runs: Sequence[Run]) -> dict[str, list[tuple[str, str]]]:
    return {dataset: _pairs(runs, dataset) for dataset in _datasets(runs[0].report)}


def _cell(runs: Sequence[Run], dataset: str, a: str, b: str) -> dict[str, Any] | None:
    """Cell of one pair: the win rate over a group's runs; None if no run compared the pair."""
    given = [rows for run in runs if (rows := _judgments(run.report, dataset, a, b))]
    if not given:
        return None
    judged = [rows for rows in given if any(row.winner != "missing" for row in rows)]
    cell = {"a": a, "b": b, "runs": len(judged), **counts([row for rows in given for row in rows])}
    if not judged:
        nothing = dict.fromkeys(("adjusted_win_rate", "low", "high", "spread", "paper"))
        return {**cell, "rates": [], "p_value": 1.0, **nothing}
    beside = paper.beside(runs[0].report.base, dataset, a, b)
    cell |= {"paper": None if beside is None else beside.adjusted_rate()}
    if len({_questions(run.report, dataset) for run in runs}) > 1:
        rates = [over_seeds([rows]).adjusted_win_rate for rows in judged]
        over_runs, spread = mean_interval(rates), float(np.std(rates, ddof=1)) if len(rates) > 1 else None
        return {
            **cell,
            **asdict(OverSeeds(over_runs.mean, over_runs.low, over_runs.high, rates, spread)),
            "p_value": t_test(rates, 0.5),
        }
    nets = Counter[Hashable]()
    for row in (row for rows in judged for row in rows if row.winner != "missing"):
        nets[row.question] += NET[row.winner]
    return {**cell, **asdict(over_seeds(judged)), "p_value": sign_flip_test(np.array(list(nets.values())))}


def _questions(run: ReportInput, dataset: str) -> tuple[str, ...]:
    """The prompts of a set of questions, in order."""
    found = {(row["index"], row["turn"]): str(row["prompt"]) for row in run.answers if row["dataset"] == dataset}
    return tuple(found[place] for place in sorted(found))


def _judgments(run: ReportInput, dataset: str, a: str, b: str) -> list[Judgment]:
    """Judgments of a pair in one run; a searched policy stands for the candidate that the run picked."""
    methods = judge_tables.searched_methods(run)
    first, second = (methods[name]["best"] if name in methods else name for name in (a, b))
    return judge_tables.judgments_of(run, dataset, first, second, findings.headline(run.evaluation))


def pair_counts(rows: Sequence[Row], pairs: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """A row for each pair: {"a", "b", "cells", "above", "below", "significant"}.

    above, below: number of cells whose interval of the adjusted win rate excludes 50%. significant: number of cells with a
    rate above 50% and p < 0.05 after Holm's correction over the pair's cells.
    """
    found = []
    for a, b in pairs:
        cells = [row["cells"][a, b] for row in _rows_with_verdicts(rows, (a, b))]
        found.append(
            {
                "a": a,
                "b": b,
                "cells": len(cells),
                "above": sum(cell["low"] > 0.5 for cell in cells),
                "below": sum(cell["high"] < 0.5 for cell in cells),
                "significant": sum(cell["p_holm"] < 0.05 and cell["adjusted_win_rate"] > 0.5 for cell in cells),
            }
        )
    return found


def _no_replicates(
    groups: Sequence[tuple[str, list[Run]]], rows: Sequence[Row], pairs: Sequence[tuple[str, str]]
) -> dict[str, Any]:
    """The first screen of runs of different recipes or bases: how the first pair came out over models and questions."""
    (one,) = pair_counts(rows, pairs[:1])
    rest = one["cells"] - one["above"] - one["below"]
    return {
        "line": f"{len(groups)} runs with different recipes or bases, of one training seed each; win rates of pairs of models.",
        "cards": [],
        "sets": {},
        "names": {},
        "over": "questions",
        "sentences": {
            first_screen.CAME_OUT: f"{one['a']} beat {one['b']} in {one['above']} of {one['cells']} cells (a run and a set of"
            f" questions), lost in {one['below']}, and is not distinguishable from it in {rest}.",
            first_screen.MEANS_NOT: "That other training seeds would give the same result: every run has one training seed.",
        },
    }


def _warnings(groups: Sequence[tuple[str, list[Run]]], rows: Sequence[Row]) -> list[str]:
    found = [f"{name}: {few}." for name, of in groups if (few := seeds_warning(len(of)))]
    found += [
        f"{row['model']}, {row['dataset']}, by {row['by']}: {row['runs'] - least} of {row['runs']} runs have"
        " no verdict on a pair and are not part of that pair's rate."
        for row in rows
        if (least := min(cell["runs"] for cell in row["cells"].values())) < row["runs"]
    ]
    judges = list(dict.fromkeys(row["by"] for row in rows))
    if len(judges) > 1:
        found.append(
            f"Rows are judged by {len(judges)} judges ({', '.join(judges)}), whose rates cannot be compared with one"
            " another."
        )
    return found


def _run(run: Run, group: str, folder: Path) -> dict[str, Any]:
    pages = [*run.folder.glob("report.html"), *sorted(stages_folder(run.folder).glob("report/*/report.html"))]
    return {
        "name": run.report.name,
        "group": group,
        **{name: getattr(run.report, name) for name in ("base", "mode", "training_seeds")},
        "report": Path(os.path.relpath(pages[0], folder)).as_posix() if pages else None,
        "folder": run.folder.name,
    }


def _scores(run: Run) -> list[dict[str, Any]]:
    measure = findings.headline(run.report.evaluation)
    return [
        {"run": run.report.name, "dataset": dataset, "measure": measure,
         "models": {name: model["scores"][measure] for name, model in data["models"].items() if measure in model["scores"]}}
        for dataset, data in run.report.evaluation["datasets"].items()
    ]  # fmt: skip


def _draw(rows: Sequence[Row], pairs: Sequence[tuple[str, str]], of_first: plots.Styles) -> list[Panel]:
    """Panels of the win rates: one for each pair with its cells, or for a single model one for each set with its pairs."""
    styles, drawn = {**style.looks([name for pair in pairs for name in pair]), **of_first}, []
    if len({row["model"] for row in rows}) == 1:
        for number, row in enumerate(rows):
            cells = [cell for cell in row["cells"].values() if cell["runs"]]
            title = f"“{row['dataset']}”, by {row['by']}"
            drawn += [plots.win_rates(f"joined-{number}", title, cells, styles)] if cells else []
        return drawn
    for number, pair in enumerate(pairs):
        there = _rows_with_verdicts(rows, pair)
        cells = [{**row["cells"][pair], "label": f"{row['model']}, {row['dataset']}"} for row in there]
        title = f"{pair[0]} over {pair[1]}"
        drawn += [plots.win_rates(f"joined-{number}", title, cells, styles)] if cells else []
    return drawn
