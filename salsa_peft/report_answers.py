"""Answers side by side (paper, Figures 6 and 8): each question's turns, what every model said, what the judge made of it, and how it ended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from salsa_peft import findings
from salsa_peft.report_input import ReportInput
from salsa_peft.text import is_number

OUTCOMES = ("win", "loss", "tie", "missing")
"""Of the pair that the page is filtered by; a question whose turns end differently has several."""
SHORT = 140
"""Characters of a question in its heading."""


def samples(run: ReportInput) -> dict[str, Any]:
    """{"pair": (a, b) of the filter | None, "datasets": dataset → its first questions in order, so that nobody chose them}."""
    names = findings.order(run.evaluation, run.policies)
    pair = main_pair(run)
    rows: dict[str, dict[int, dict[int, dict[str, Any]]]] = {}
    for row in run.answers:
        rows.setdefault(row["dataset"], {}).setdefault(row["index"], {}).setdefault(row["turn"], {})[row["model"]] = row
    rulings: dict[tuple[str, int, int], list[Mapping[str, Any]]] = {}
    for row in run.judgments:
        rulings.setdefault((row["dataset"], row["index"], row["turn"]), []).append(row)
    return {
        "pair": pair,
        "datasets": {
            dataset: [
                _question(run, dataset, index, of[index], rulings, names, pair) for index in sorted(of)[: run.samples]
            ]
            for dataset, of in rows.items()
        },
    }


def main_pair(run: ReportInput) -> tuple[str, str] | None:
    """What the answers are filtered by: the judge's first pair, else the first of the evaluation."""
    for source in (run.verdicts, run.evaluation):
        for data in (source or {}).get("datasets", {}).values():
            for pair in data.get("pairs", []):
                return pair["a"], pair["b"]
    return None


def _question(
    run: ReportInput,
    dataset: str,
    index: int,
    turns: Mapping[int, Mapping[str, Mapping[str, Any]]],
    rulings: Mapping[tuple[str, int, int], Sequence[Mapping[str, Any]]],
    names: Sequence[str],
    pair: tuple[str, str] | None,
) -> dict[str, Any]:
    told = []
    for turn, answers in sorted(turns.items()):
        judged = rulings.get((dataset, index, turn), [])
        told.append(
            {
                "turn": turn,
                "prompt": next(iter(answers.values()))["prompt"],
                "answers": {name: answers[name] for name in names if name in answers},
                "rulings": judged,
                "outcome": None if pair is None else _outcome(run, pair, answers, judged),
            }
        )
    first = " ".join(str(told[0]["prompt"]).split())
    return {
        "index": index,
        "id": next(iter(turns[min(turns)].values())).get("question_id", index),
        "category": next(iter(turns[min(turns)].values())).get("category"),
        "heading": first if len(first) <= SHORT else f"{first[:SHORT]}…",
        "turns": told,
        "outcomes": [name for name in OUTCOMES if any(one["outcome"] == name for one in told)],
    }


def _outcome(
    run: ReportInput,
    pair: tuple[str, str],
    answers: Mapping[str, Mapping[str, Any]],
    rulings: Sequence[Mapping[str, Any]],
) -> str | None:
    """win: of the pair's first model."""
    words = {"a": "win", "b": "loss", "tie": "tie", "missing": "missing"}
    if run.verdicts is not None:
        return next((words[row["winner"]] for row in rulings if (row["a"], row["b"]) == pair), None)
    measure = findings.headline(run.evaluation)
    scores = [answers.get(name, {"scores": {}})["scores"].get(measure) for name in pair]
    if not all(is_number(score) for score in scores):
        return None
    return "win" if scores[0] > scores[1] else "loss" if scores[1] > scores[0] else "tie"


def cut(run: ReportInput) -> dict[str, float]:
    """Dataset → the share of its answers that are as long as they could be, where that is more than a tenth: they were cut."""
    found: dict[str, float] = {}
    if run.limit is None:
        return found
    for dataset in dict.fromkeys(row["dataset"] for row in run.answers):
        lengths = [row["length"] for row in run.answers if row["dataset"] == dataset]
        share = sum(length >= run.limit for length in lengths) / len(lengths)
        found |= {dataset: share} if share > 0.1 else {}
    return found
