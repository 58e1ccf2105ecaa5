"""Several runs on one page: models × questions (paper, Table 1), runs that differ in their training seeds alone taken together.

A run is judged by its judge, else by its headline measure; what several judged stands in several rows. A group of replicates has one rate, over runs and questions
(`statistics.over_seeds`); p-values are over questions, corrected over the column's cells. Left out: what one run's own report shows.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from salsa_peft.evaluation.judge_statistics import NET, Judgment, over_seeds, seeds_warning
from salsa_peft.report import findings, judge_tables, paper, plots, style
from salsa_peft.report import format as text
from salsa_peft.report.gather import ReportInput
from salsa_peft.report.page import write_pages
from salsa_peft.report.style import MEASURES, Panel
from salsa_peft.utils.errors import require
from salsa_peft.utils.statistics import holm, sign_flip_test


class Run(NamedTuple):
    """A finished run and where it is."""

    told: ReportInput
    folder: Path


def write_joined(folder: Path, runs: Sequence[Run]) -> dict[str, Any]:
    """Writes report.html, report.md, figures/*.png and summary.json into `folder`; returns what summary.json holds. Raises SalsaError."""
    groups = replicates(runs)
    rows = table(groups)
    require(bool(rows), f"{len(runs)} runs: found no pair of models compared in any of them, expected at least one")
    pairs = list(dict.fromkeys(pair for row in rows for pair in row["cells"]))
    told = {
        "title": " · ".join(name for name, _ in groups),
        "finding": finding(rows, pairs),
        "rows": rows,
        "pairs": pairs,
        "paper": any(cell["paper"] for row in rows for cell in row["cells"].values()),
        "warnings": _warnings(groups, rows),
        "runs": [_run(run, name, folder) for name, of in groups for run in of],
        "scores": [one for _, of in groups for run in of for one in _scores(run)],
        "measures": MEASURES,
    }
    cells = [{"model": row["model"], "dataset": row["dataset"], "by": row["by"], **cell} for row in rows for cell in row["cells"].values()]  # fmt: skip
    summary = {name: told[name] for name in ("finding", "warnings", "runs", "scores")} | {"cells": cells}
    return write_pages(folder, "joined", told, {"pairs": _draw(rows, pairs)}, text.finite(summary))


def replicates(runs: Sequence[Run]) -> list[tuple[str, list[Run]]]:
    """(name, its runs): runs of one recipe and base that differ in training seeds alone together, in the order given. Raises SalsaError where one
    run is given twice; names that are alike get a number."""
    found: dict[tuple[str, str | None], list[Run]] = {}
    for run in runs:
        same = found.setdefault((run.told.replicate_of, run.told.fingerprint), [])
        twin = next((other for other in same if other.told.training_seeds == run.told.training_seeds), None)
        require(
            twin is None,
            f"{run.folder}: found the recipe and training seeds of {twin and twin.folder} again ({run.told.training_seeds}), expected each run once",
        )
        same.append(run)
    names: list[str] = []
    for of in found.values():
        name = of[0].told.name
        alike = sum(other == name or other.startswith(f"{name} (") for other in names)
        names.append(name if not alike else f"{name} ({alike + 1})")
    return list(zip(names, found.values(), strict=True))


def table(groups: Sequence[tuple[str, list[Run]]]) -> list[dict[str, Any]]:
    """Rows {"model", "base", "dataset", "by", "runs", "cells": (a, b) → cell}, p-values corrected (Holm) over a pair's cells."""
    rows: list[dict[str, Any]] = []
    for name, of in groups:
        for by, same in _by(of).items():
            for dataset in dict.fromkeys(dataset for run in same for dataset in _datasets(run.told)):
                cells = {
                    pair: cell for pair in _pairs(same, dataset) if (cell := _cell(same, dataset, *pair)) is not None
                }
                if cells:
                    rows.append({"model": name, "base": same[0].told.base, "dataset": dataset, "by": by, "runs": len(same), "cells": cells})  # fmt: skip
    for pair in dict.fromkeys(pair for row in rows for pair in row["cells"]):
        there = [row["cells"][pair] for row in rows if pair in row["cells"] and row["cells"][pair]["runs"]]
        for cell, p in zip(there, holm([cell["p_value"] for cell in there]), strict=True):
            cell["p_holm"] = p
    return rows


def _by(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Who judged → the runs; judges whose names are alike and who are not (another folder, another prompt) get a number."""
    found: dict[str, list[Run]] = {}
    who: dict[str, Any] = {}
    for run in runs:
        measure = findings.headline(run.told.evaluation)
        judge: Any = measure if run.told.verdicts is None else run.told.verdicts["judge"]
        name = MEASURES.get(measure, measure) if run.told.verdicts is None else judge_tables.by_whom(judge)
        names = (name, *(f"{name} ({number})" for number in range(2, len(runs) + 2)))
        by = next(one for one in names if who.setdefault(one, judge) == judge)
        found.setdefault(by, []).append(run)
    return found


def _datasets(run: ReportInput) -> dict[str, Any]:
    found: dict[str, Any] = (run.verdicts or run.evaluation)["datasets"]
    return found


def _pairs(runs: Sequence[Run], dataset: str) -> list[tuple[str, str]]:
    """Of methods: a searched policy by its own name, whichever β was picked in a run; candidates that were passed over are left out."""
    found = []
    for run in runs:
        passed = judge_tables.passed_over(run.told)
        for pair in _datasets(run.told).get(dataset, {"pairs": []})["pairs"]:
            if not passed.isdisjoint((pair["a"], pair["b"])):
                continue
            named = (judge_tables.method(run.told, pair["a"]), judge_tables.method(run.told, pair["b"]))
            found += [named] if named[0] != named[1] and named not in found and named[::-1] not in found else []
    return found


def _cell(runs: Sequence[Run], dataset: str, a: str, b: str) -> dict[str, Any] | None:
    """The rate over all runs of a group and their questions; None where no run compared the pair, rates None where none has a verdict."""
    given = [rows for run in runs if (rows := _rows(run.told, dataset, a, b))]
    judged = [rows for rows in given if any(row.winner != "missing" for row in rows)]
    missing = sum(row.winner == "missing" for rows in given for row in rows)
    if not given:
        return None
    if not judged:
        nothing = dict.fromkeys(("adjusted_win_rate", "low", "high", "spread", "paper"))
        return {
            "a": a,
            "b": b,
            "runs": 0,
            "wins": 0,
            "losses": 0,
            "ties": 0,
            "missing": missing,
            "rates": [],
            "p_value": 1.0,
            **nothing,
        }
    found, kept = over_seeds(judged), [row for rows in judged for row in rows if row.winner != "missing"]
    nets: dict[Any, int] = {}
    for row in kept:
        nets[row.question] = nets.get(row.question, 0) + NET[row.winner]
    winners = [row.winner for row in kept]
    beside = paper.beside(runs[0].told.base, dataset, a, b)
    told = None
    if beside is not None:
        told = {
            "adjusted_win_rate": beside.verdicts.adjusted_win_rate,
            "low": beside.verdicts.low,
            "high": beside.verdicts.high,
        }
    return {
        "a": a,
        "b": b,
        "runs": len(judged),
        "wins": winners.count("a"),
        "losses": winners.count("b"),
        "ties": winners.count("tie"),
        "missing": missing,
        "adjusted_win_rate": found.adjusted_win_rate,
        "low": found.low,
        "high": found.high,
        "rates": found.rates,
        "spread": found.spread,
        "p_value": sign_flip_test(np.array(list(nets.values()))),
        "paper": told,
    }


def _rows(run: ReportInput, dataset: str, a: str, b: str) -> list[Judgment]:
    """A pair's judgments in one run, of the candidates that stand for a and b there."""
    tried = (judge_tables.searched(run) or {"methods": {}})["methods"]
    picked = [tried[name]["best"] if name in tried else name for name in (a, b)]
    return judge_tables.rows_of(run, dataset, picked[0], picked[1], findings.headline(run.evaluation))


def finding(rows: Sequence[Mapping[str, Any]], pairs: Sequence[tuple[str, str]]) -> list[str]:
    """For each pair in how many cells it is above 50%, and in how many after Holm's correction."""
    told = []
    for pair in pairs:
        cells = [row["cells"][pair] for row in rows if pair in row["cells"] and row["cells"][pair]["runs"]]
        above, below = sum(cell["low"] > 0.5 for cell in cells), sum(cell["high"] < 0.5 for cell in cells)
        held = sum(cell["p_holm"] < 0.05 and cell["adjusted_win_rate"] > 0.5 for cell in cells)
        of = f"{len(cells)} cell{'s' * (len(cells) != 1)}"
        told.append(
            f"{pair[0]} over {pair[1]}: the interval of the adjusted win rate lies above 50% in {above} of {of}, below in {below};"
            f" above with p < 0.05 after Holm’s correction over them in {held}."
        )
    return told


def _warnings(groups: Sequence[tuple[str, list[Run]]], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    found = []
    for name, of in groups:
        few = seeds_warning(len(of))
        found += [f"{name}: {few}."] if few else []
    for row in rows:
        least = min(cell["runs"] for cell in row["cells"].values())
        if least < row["runs"]:
            found.append(
                f"{row['model']}, {row['dataset']}, by {row['by']}: {row['runs'] - least} of {row['runs']} runs have no verdict on a pair and are in no rate of it."
            )
    judges = list(dict.fromkeys(row["by"] for row in rows))
    if len(judges) > 1:
        found.append(
            f"Rows are judged by {len(judges)} judges ({', '.join(judges)}): their rates are not to be compared with one another."
        )
    return found


def _run(run: Run, group: str, folder: Path) -> dict[str, Any]:
    page = next(iter(sorted(run.folder.glob("report/*/report.html"))), None)
    if (run.folder / "report.html").exists():
        page = run.folder / "report.html"
    return {
        "name": run.told.name,
        "group": group,
        "base": run.told.base,
        "mode": run.told.mode,
        "training_seeds": run.told.training_seeds,
        "report": None if page is None else Path(os.path.relpath(page, folder)).as_posix(),
        "folder": run.folder.name,
    }


def _scores(run: Run) -> list[dict[str, Any]]:
    measure = findings.headline(run.told.evaluation)
    return [
        {"run": run.told.name, "dataset": dataset, "measure": measure,
         "models": {name: told["scores"][measure] for name, told in data["models"].items() if measure in told["scores"]}}
        for dataset, data in run.told.evaluation["datasets"].items()
    ]  # fmt: skip


def _draw(rows: Sequence[Mapping[str, Any]], pairs: Sequence[tuple[str, str]]) -> list[Panel]:
    """Figure 1: for each pair its cells."""
    styles, drawn = style.looks([name for pair in pairs for name in pair]), []
    for number, pair in enumerate(pairs):
        cells = [
            {**row["cells"][pair], "label": f"{row['model']}, {row['dataset']}"}
            for row in rows
            if pair in row["cells"] and row["cells"][pair]["runs"]
        ]
        title = f"{pair[0]} over {pair[1]}"
        drawn += [plots.win_rates(f"joined-{number}", title, cells, styles)] if cells else []
    return drawn
