"""What replicates found together, for the report's templates, and the table of the claims as Markdown."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from salsa_peft.report.format import Row, markdown, signed
from salsa_peft.report.gather import ReportInput
from salsa_peft.report.replicates.claims import SIGNS, TRAINING, Claim, claims, verdict
from salsa_peft.report.replicates.summary import Replicate, models_table, pairs_table


def over_replicates(runs: Sequence[ReportInput], pairs: Mapping[str, Sequence[tuple[str, str]]]) -> dict[str, Any]:
    """Scores, differences of pairs, and the paper's claims, over the replicates of one recipe.

    pairs: set of questions → the pairs of models to compare.
    """
    numbers = [Replicate.of(run) for run in runs]
    datasets: list[dict[str, Any]] = [
        {"dataset": dataset, "models": models_table(numbers, dataset), "pairs": pairs_table(runs, dataset, of)}
        for dataset, of in pairs.items()
    ]
    table = rows(claims(numbers))
    return {
        "n": len(runs),
        "measure": numbers[0].measure,
        "datasets": datasets,
        "claims": table,
        "columns": columns(table),
    }


def rows(found: Sequence[Claim]) -> list[dict[str, object]]:
    """The table's rows, one for each finding: {"source", "claim", "what", "expected", "control", "cells"}.

    cells: column → {mean, low, high, n, verdict}. source and claim are empty but in the first row of a claim.
    """
    table: list[dict[str, object]] = []
    for claim in found:
        for place, finding in enumerate(claim.findings):
            cells = {
                name: {**asdict(value), "verdict": verdict(finding.expected, value)}
                for name, value in finding.values.items()
            }
            first = {"source": claim.source, "claim": claim.text} if place == 0 else {"source": "", "claim": ""}
            expected = SIGNS[finding.expected]
            table.append({**first, "what": finding.what, "expected": expected, "control": finding.control, "cells": cells})  # fmt: skip
    return table


def columns(table: Sequence[Row]) -> list[str]:
    """The table's columns: the sets of questions, then TRAINING."""
    names = dict.fromkeys(name for row in table for name in row["cells"])
    return sorted(names, key=lambda name: name == TRAINING)


def as_markdown(table: Sequence[Row]) -> str:
    """The table as Markdown."""
    names = columns(table)
    lines = [
        f"| paper | difference | expected | {' | '.join(map(markdown, names))} | n | found |",
        f"|---|---|---|{'---:|' * len(names)}---:|---|",
    ]
    for row in table:
        cells: Mapping[str, Row] = row["cells"]
        shown = [signed(cells[name]) if name in cells else "–" for name in names]
        if row["claim"]:
            lines.append(
                f"| **{markdown(row['source'])}** | **{markdown(row['claim'])}** |  |{'  |' * len(names)}  |  |"
            )
        what = f"{'control: ' if row['control'] else ''}{row['what']}"
        said = {name: cells[name]["verdict"] for name in names if name in cells}
        words = next(iter(said.values())) if len(set(said.values())) == 1 else "; ".join(f"{k}: {v}" for k, v in said.items())  # fmt: skip
        n = max(cell["n"] for cell in cells.values())
        lines.append(f"|  | {markdown(what)} | {row['expected']} | {' | '.join(shown)} | {n} | {words} |")
    return "\n".join(lines)
