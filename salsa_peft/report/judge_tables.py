"""A judge's verdicts → the report's tables and the points of its ablation figures (paper: Tables 1 to 5, Figures 1, 4, 5).

Where a run has no judge, the pairs of its headline measure are what ablations and a joined report go by. The paper's cell stands beside a
run's where base, questions and models are the paper's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from salsa_peft.evaluation.judge_statistics import Judgment
from salsa_peft.report import paper
from salsa_peft.report.format import is_number
from salsa_peft.report.gather import ReportInput, place

ABLATIONS = {  # start of a policy's name (sweeps.PREFIX) → what its number is, of the figures' x axis
    "alpha": "α: 0 is the first seed, 1 the second (Figure 4a)",
    "members": "members of the soup (Figure 5)",
    "scale": "λ: how much of the seed is left in the reference (the control)",
}
BETA = "β, the KL coefficient at the start"
SWEPT = re.compile(r"(alpha|members|scale)-([\d.e-]+?)(?:-kl-[\d.e-]+)?\Z")


def judged(run: ReportInput) -> dict[str, Any] | None:
    """Who judged, and each set's pairs with the paper's cells, candidates that a search passed over left to its own table; None without a judge."""
    if run.verdicts is None:
        return None
    judge, calls = run.verdicts["judge"], run.verdicts["calls"]
    passed = passed_over(run)
    datasets = {
        name: {
            **data,
            "pairs": [_beside(run, name, pair) for pair in data["pairs"] if passed.isdisjoint((pair["a"], pair["b"]))],
        }
        for name, data in run.verdicts["datasets"].items()
    }
    pairs = list(dict.fromkeys((pair["a"], pair["b"]) for data in datasets.values() for pair in data["pairs"]))
    return {
        "judge": by_whom(judge),
        "told": judge["prompt"] if judge["kind"] in ("openai", "local") else None,
        "calls": {name.replace("_", " "): value for name, value in calls.items() if value},
        "datasets": datasets,
        "pairs": pairs,
        "cells": {
            name: [next((pair for pair in data["pairs"] if (pair["a"], pair["b"]) == of), None) for of in pairs]
            for name, data in datasets.items()
        },
        "paper": any(pair["paper"] for data in datasets.values() for pair in data["pairs"]),
        "several": any(data["turns"] > 1 for data in datasets.values()),
        "missing": any(pair["missing"] for data in datasets.values() for pair in data["pairs"]),
    }


def by_whom(judge: Mapping[str, Any]) -> str:
    """A judge's name; of a path the last part."""
    return " ".join(filter(None, (judge["kind"], place(judge["model"]) if judge["model"] else None)))


def _beside(run: ReportInput, dataset: str, pair: Mapping[str, Any]) -> dict[str, Any]:
    cell = paper.beside(run.base, dataset, method(run, pair["a"]), method(run, pair["b"]))
    told = None
    if cell is not None:
        found = cell.verdicts
        told = {"adjusted_win_rate": found.adjusted_win_rate, "low": found.low, "high": found.high, "table": cell.table}
    return {**pair, "paper": told}


def searched(run: ReportInput) -> dict[str, Any] | None:
    """What a search over β tried, and picked (paper, Section 4: for each method the β of highest win rate)."""
    found: dict[str, Any] | None = (run.verdicts or {}).get("search") or run.evaluation.get("search")
    return found


def passed_over(run: ReportInput) -> set[str]:
    """Candidates of a search that were not picked."""
    tried = (searched(run) or {"methods": {}})["methods"].values()
    return {one["policy"] for told in tried for one in told["tried"] if one["policy"] != told["best"]}


def method(run: ReportInput, name: str) -> str:
    """The searched policy that a candidate stands for, else the name itself."""
    tried = (searched(run) or {"methods": {}})["methods"]
    return next((of for of, told in tried.items() if name == told["best"]), name)


def rows_of(run: ReportInput, dataset: str, a: str, b: str, measure: str) -> list[Judgment]:
    """Every turn's judgment of a pair, whichever way round it was judged; without a judge by the measure's scores."""
    if run.verdicts is not None:
        turned = {"a": "b", "b": "a"}
        return [
            Judgment((dataset, row["index"]), row["turn"], *games, *lengths)
            for row in run.judgments
            if row["dataset"] == dataset and {row["a"], row["b"]} == {a, b}
            for games, lengths in [
                ((row["first"], row["second"]), row["lengths"])
                if row["a"] == a
                else (tuple(turned.get(who, who) for who in (row["second"], row["first"])), row["lengths"][::-1])
            ]
        ]
    found: dict[str, dict[tuple[int, int], Mapping[str, Any]]] = {a: {}, b: {}}
    for row in run.answers:
        if row["dataset"] == dataset and row["model"] in found and is_number(row["scores"].get(measure)):
            found[row["model"]][row["index"], row["turn"]] = row
    rows = []
    for at in sorted(found[a].keys() & found[b].keys()):
        first, second = found[a][at], found[b][at]
        x, y = first["scores"][measure], second["scores"][measure]
        winner = "a" if x > y else "b" if y > x else "tie"
        rows.append(Judgment((dataset, at[0]), at[1], winner, winner, first["length"], second["length"]))
    return rows


def ablations(run: ReportInput, measure: str) -> list[dict[str, Any]]:
    """Figures 4a, 5 and A.4: {"kind", "dataset", "against", "xlabel", "points"}, a figure each; a point is a policy's rate over one opponent.

    From the judge's pairs, else the measure's; what a search tried is a figure of its own.
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
    tried = searched(run)
    if tried is not None:
        points = [
            {**_point(one["kl_coef"], one), "name": name}
            for name, told in tried["methods"].items()
            for one in told["tried"]
        ]
        log = all(point["x"] > 0 for point in points)
        found.append({"kind": "kl", "dataset": ", ".join(tried["datasets"]), "against": tried["against"], "xlabel": BETA, "points": points, "log": log})  # fmt: skip
    return found


def _point(x: float, pair: Mapping[str, Any]) -> dict[str, Any]:
    return {"x": x, "name": "", **{key: pair[key] for key in ("adjusted_win_rate", "low", "high")}}


def swept(run: ReportInput, name: str, kind: str) -> float | None:
    """A policy's place on the axis of a sweep; PPO against one seed is a soup of one."""
    found = SWEPT.match(name)
    if found and found[1] == kind:
        return float(found[2])
    one = name in run.policies and run.policies[name].reference == "seed-0"
    return 1.0 if kind == "members" and one and any(SWEPT.match(other) for other in run.policies) else None


def warnings(run: ReportInput) -> list[str]:
    """What to know of the judge before quoting it."""
    if run.verdicts is None:
        return []
    found = []
    if run.verdicts["judge"]["kind"] == "reward":
        found.append("The judge is the recipe's reward, which the policies were trained on: it flatters them.")
    for name, data in run.verdicts["datasets"].items():
        same = [line for pair in data["pairs"] for line in _alike(run, name, pair["a"], pair["b"])]
        found += [f"“{name}”: {line}" for line in [*_spoken(data["pairs"]), *same]]
    tried = searched(run)
    if tried is not None and set(tried["datasets"]) & set((run.verdicts or run.evaluation)["datasets"]):
        found.append(
            f"β was picked by win rate on {', '.join(f'“{name}”' for name in tried['datasets'])} and is reported on the same questions,"
            " which flatters what was picked; search.questions can name a set of its own."
        )
    return found


def _spoken(pairs: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    missing, n = sum(pair["missing"] for pair in pairs), sum(pair["n"] for pair in pairs)
    if missing:
        yield (
            f"{missing} of {missing + n} judgments have no verdict and are in no rate; the tables give the rates' bounds if all of them"
            " had been lost or won."
        )
    flips = _mean(pairs, "flip_rate")
    if flips is not None and flips > 0.3:
        yield f"in {100 * flips:.0f}% of judgments the judge's two orders disagree: much of what counts as a tie is that."
    first = _mean(pairs, "first_position_rate")
    if first is not None and abs(first - 0.5) > 0.1:
        yield f"{100 * first:.0f}% of the games that somebody won went to the answer shown first (50% without position bias)."


def _alike(run: ReportInput, dataset: str, a: str, b: str) -> Iterable[str]:
    """Answers that are the same to the letter, which can only tie."""
    said: dict[str, dict[tuple[int, int], str]] = {a: {}, b: {}}
    for row in run.answers:
        if row["dataset"] == dataset and row["model"] in said:
            said[row["model"]][row["index"], row["turn"]] = row["response"]
    both = said[a].keys() & said[b].keys()
    same = sum(said[a][place] == said[b][place] for place in both)
    if same > 0.2 * len(both):
        yield f"{same} of {len(both)} answers of {a} and {b} are the same to the letter: whom the judge prefers there says nothing of them."


def _mean(pairs: Sequence[Mapping[str, Any]], key: str) -> float | None:
    """Over judgments."""
    told = [(pair[key], pair["n"]) for pair in pairs if pair[key] is not None and pair["n"]]
    return sum(value * n for value, n in told) / sum(n for _, n in told) if told else None
