"""Tables and ablation points from a judge's results (paper: Tables 1 to 5, Figures 4 and 5).

Without a judge, ablations and joined reports compare pairs by the headline measure. If base, questions and models are
those of the paper, the paper's win rate is shown beside the run's.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from salsa_peft.evaluation.judge_statistics import Judgment
from salsa_peft.report import paper
from salsa_peft.report.format import Row, is_number, rate_of
from salsa_peft.report.gather import ReportInput, answer_pairs, last_part

ABLATIONS = {  # kind of sweep (the prefix of its policies' names) → label of the figure's x axis
    "alpha": "α: 0 is the first seed, 1 the second (Figure 4a)",
    "members": "members of the soup (Figure 5)",
    "scale": "λ: how much of the seed is left in the reference (the control)",
}
BETA = "β, the KL coefficient at the start"
SWEPT = re.compile(r"(alpha|members|scale)-([\d.e-]+?)(?:-kl-[\d.e-]+)?\Z")


def judged(run: ReportInput) -> dict[str, Any] | None:
    """The judge and the results of each set's pairs, beside the paper's; None if the run has no judge.

    Candidates that a search did not pick are left out here, and listed in the search's own table.
    """
    if run.verdicts is None:
        return None
    judge, calls = run.verdicts["judge"], run.verdicts["calls"]
    datasets = {
        name: {**data, "pairs": [{**pair, "paper": _paper_cell(run, name, pair)} for pair in picked(run, data)]}
        for name, data in run.verdicts["datasets"].items()
    }
    everything = [pair for data in datasets.values() for pair in data["pairs"]]
    pairs = list(dict.fromkeys((pair["a"], pair["b"]) for pair in everything))
    return {
        "judge": judge_name(judge),
        "prompt": judge["prompt"] if judge["kind"] in ("openai", "local") else None,
        "calls": {name.replace("_", " "): value for name, value in calls.items() if value},
        "datasets": datasets,
        "pairs": pairs,
        "cells": {
            name: [next((pair for pair in data["pairs"] if (pair["a"], pair["b"]) == of), None) for of in pairs]
            for name, data in datasets.items()
        },
        "lengths": run.lengths,
        "paper": any(pair["paper"] for pair in everything),
        "several": any(data["turns"] > 1 for data in datasets.values()),
        "missing": any(pair["missing"] for pair in everything),
    }


def judge_name(judge: Row) -> str:
    """Kind and model of a judge, as text."""
    return " ".join(filter(None, (judge["kind"], last_part(judge["model"]) if judge["model"] else None)))


def _paper_cell(run: ReportInput, dataset: str, pair: Row) -> dict[str, Any] | None:
    cell = paper.beside(run.base, dataset, method(run, pair["a"]), method(run, pair["b"]))
    return None if cell is None else {**cell.adjusted_rate(), "table": cell.table}


def searched(run: ReportInput) -> dict[str, Any] | None:
    """Result of the search for the β with the highest win rate (paper, Section 4); None without a search."""
    found: dict[str, Any] | None = (run.verdicts or {}).get("search") or run.evaluation.get("search")
    return found


def searched_methods(run: ReportInput) -> dict[str, Any]:
    """Searched policy → the candidates tried and the one picked; empty without a search."""
    return (searched(run) or {"methods": {}})["methods"]


def picked(run: ReportInput, data: Row) -> list[Row]:
    """The pairs of a dataset without the candidates that a search tried and did not pick."""
    passed = passed_over(run)
    return [pair for pair in data["pairs"] if passed.isdisjoint((pair["a"], pair["b"]))]


def passed_over(run: ReportInput) -> set[str]:
    """The candidates that a search tried and did not pick."""
    methods = searched_methods(run).values()
    return {one["policy"] for found in methods for one in found["tried"] if one["policy"] != found["best"]}


def method(run: ReportInput, name: str) -> str:
    """The searched policy if `name` is its picked candidate, else `name` itself."""
    return next((of for of, found in searched_methods(run).items() if name == found["best"]), name)


def judgments_of(run: ReportInput, dataset: str, a: str, b: str, measure: str) -> list[Judgment]:
    """Judgments of a against b, also from rows of b against a; without a judge, by scores of `measure`."""
    if run.verdicts is not None:
        swap = {"a": "b", "b": "a", "tie": "tie", "missing": "missing"}
        rows = []
        for row in run.judgments:
            if row["dataset"] == dataset and {row["a"], row["b"]} == {a, b}:
                winners, lengths = (row["first"], row["second"]), row["lengths"]
                if row["a"] != a:
                    winners, lengths = (swap[row["second"]], swap[row["first"]]), lengths[::-1]
                rows.append(Judgment((dataset, row["index"]), row["turn"], *winners, *lengths))
        return rows
    rows = []
    for first, second in answer_pairs(run.answers, dataset, a, b):
        x, y = first["scores"].get(measure), second["scores"].get(measure)
        if is_number(x) and is_number(y):
            winner = "a" if x > y else "b" if y > x else "tie"
            question = (dataset, first["index"])
            rows.append(Judgment(question, first["turn"], winner, winner, first["length"], second["length"]))
    return rows


def ablations(run: ReportInput, measure: str) -> list[dict[str, Any]]:
    """Data of figures like the paper's 4a, 5 and A.4, each {kind, dataset, against, xlabel, points, log}.

    A point is one policy's win rate over one opponent, by the judge or, without a judge, by the measure. The candidates
    of a search have a figure of their own.
    """
    source = (run.verdicts or run.evaluation).get("datasets", {})
    found = []
    for dataset, data in source.items():
        pairs = [pair for pair in data.get("pairs", []) if run.verdicts or pair["measure"] == measure]
        for kind, xlabel in ABLATIONS.items():
            for against in dict.fromkeys(pair["b"] for pair in pairs):
                points = [
                    _point(x, pair)
                    for pair in pairs
                    if pair["b"] == against and (x := swept(run, pair["a"], kind)) is not None
                ]
                if len({point["x"] for point in points}) > 1:
                    found.append({"kind": kind, "dataset": dataset, "against": against, "xlabel": xlabel, "points": points, "log": False})  # fmt: skip
    search = searched(run)
    if search is not None:
        points = [
            {**_point(one["kl_coef"], one), "name": name}
            for name, tried in search["methods"].items()
            for one in tried["tried"]
        ]
        log = all(point["x"] > 0 for point in points)
        found.append({"kind": "kl", "dataset": ", ".join(search["datasets"]), "against": search["against"], "xlabel": BETA, "points": points, "log": log})  # fmt: skip
    return found


def _point(x: float, pair: Row) -> dict[str, Any]:
    return {"x": x, "name": "", **rate_of(pair)}


def swept(run: ReportInput, name: str, kind: str) -> float | None:
    """A policy's value in a sweep, None if not part of it; reference seed-0 is a soup of one member."""
    found = SWEPT.match(name)
    if found and found[1] == kind:
        return float(found[2])
    one = name in run.policies and run.policies[name].reference == "seed-0"
    return 1.0 if kind == "members" and one and any(SWEPT.match(other) for other in run.policies) else None


def warnings(run: ReportInput) -> list[str]:
    """Warnings about the judge's results."""
    if run.verdicts is None:
        return []
    found = []
    if run.verdicts["judge"]["kind"] == "reward" and run.policies:
        found.append(
            "The judge is the recipe's reward, on which the policies were trained, so it favours the policies."
        )
    for name, data in run.verdicts["datasets"].items():
        same = [line for pair in data["pairs"] for line in _equal_answers(run, name, pair["a"], pair["b"])]
        found += [f"“{name}”: {line}" for line in [*_reliability(data["pairs"]), *same]]
    search = searched(run)
    if search is not None and set(search["datasets"]) & set(run.verdicts["datasets"]):
        found.append(
            f"β was picked by win rate on {', '.join(f'“{name}”' for name in search['datasets'])} and is reported on"
            " the same questions, which favours the picked value; search.questions can name a separate set."
        )
    return found


def _reliability(pairs: Sequence[Row]) -> Iterable[str]:
    missing, n = sum(pair["missing"] for pair in pairs), sum(pair["n"] for pair in pairs)
    if missing:
        yield (
            f"{missing} of {missing + n} judgments have no verdict and are not part of the rates; the tables give the"
            " adjusted rate if all missing judgments had been lost or won."
        )
    if (flips := _mean(pairs, "flip_rate")) is not None and flips > 0.3:
        yield f"in {100 * flips:.0f}% of judgments the two orders disagree; many of the ties are such disagreements."
    if (first := _mean(pairs, "first_position_rate")) is not None and abs(first - 0.5) > 0.1:
        yield f"{100 * first:.0f}% of the verdicts that are no ties went to the answer shown first (50% without position bias)."


def _equal_answers(run: ReportInput, dataset: str, a: str, b: str) -> Iterable[str]:
    """A warning if many answers of two models are identical and so cannot tell the models apart."""
    both = answer_pairs(run.answers, dataset, a, b)
    same = sum(first["response"] == second["response"] for first, second in both)
    if same > 0.2 * len(both):
        yield f"{same} of {len(both)} answers of {a} and {b} are identical; a preference between them says nothing about the models."


def _mean(pairs: Sequence[Row], key: str) -> float | None:
    """Mean of a rate over all pairs, weighted by the pairs' numbers of judgments."""
    known = [(pair[key], pair["n"]) for pair in pairs if pair[key] is not None and pair["n"]]
    return sum(value * n for value, n in known) / sum(n for _, n in known) if known else None
