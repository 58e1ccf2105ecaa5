"""The judge stage: every pair's answers to every question, each turn apart, judged in both orders → judgments, rates, FastChat's files.

A win needs both games (FastChat's rule). Replies are kept in <run>/judge_cache.sqlite the moment they come: a run that is killed asks
nothing twice, and a judge stage with another pair, or made again, asks only what is new.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from salsa_peft.config import sweeps
from salsa_peft.config.job import Job
from salsa_peft.config.schema import Recipe
from salsa_peft.evaluation import comparisons, fastchat
from salsa_peft.evaluation.judge_statistics import Judged, judged_pair
from salsa_peft.evaluation.judges.prompts import Game, Ruling
from salsa_peft.evaluation.judges.registry import judge_of
from salsa_peft.utils.console import progress_bar
from salsa_peft.utils.files import read_json_lines, write_atomic
from salsa_peft.utils.statistics import holm

CACHE = "judge_cache.sqlite"
Pairs = list[tuple[str, str]]
BOTH = {"A": ("a", "b"), "B": ("b", "a"), "tie": ("tie", "tie"), None: ("missing", "missing")}
"""Verdict → whom it means in the game a–b, and in the game b–a."""


@dataclass(frozen=True)
class Dataset:
    """What was asked and answered, as the evaluate stage left it."""

    questions: list[dict[str, Any]]
    answers: dict[tuple[str, int], list[dict[str, Any]]]
    """(model, index of the question) → its answers, turn by turn."""


class Match(NamedTuple):
    """One turn of one question, answered by two models."""

    dataset: str
    question: dict[str, Any]
    turn: int
    a: str
    b: str


def read(folder: Path) -> dict[str, Dataset]:
    """Name of a set → its questions and answers, of the evaluate stage's folder."""
    found: dict[str, Dataset] = {}
    for row in read_json_lines(folder / "questions.jsonl"):
        found.setdefault(row["dataset"], Dataset([], {})).questions.append(row)
    for row in read_json_lines(folder / "answers.jsonl"):
        found[row["dataset"]].answers.setdefault((row["model"], row["index"]), []).append(row)
    return found


def matches(found: dict[str, Dataset], pairs: Pairs, sets: Iterable[str]) -> list[Match]:
    """Everything that is judged of these pairs, in order."""
    return [
        Match(name, question, turn, a, b)
        for a, b in pairs
        for name in sets
        for question in found[name].questions
        for turn in range(1, len(question["turns"]) + 1)
    ]


def games(match: Match, found: dict[str, Dataset]) -> list[Game]:
    """The two games of a match: a's answer first, then b's."""
    question, turn = match.question, match.turn
    rows = [found[match.dataset].answers[model, question["index"]][:turn] for model in (match.a, match.b)]
    said = [tuple(row["response"] for row in of) for of in rows]
    scores = [of[-1]["scores"].get("reward") for of in rows]
    references = tuple(question["reference"][:turn]) if question["reference"] else None
    turns = (_opening(question["messages"]), *question["turns"][1:turn])
    return [
        Game(turns=turns, a=said[x], b=said[y], turn=turn, category=question["category"], references=references,
             scores=None if None in scores else (scores[x], scores[y]))
        for x, y in ((0, 1), (1, 0))
    ]  # fmt: skip


def _opening(messages: Sequence[dict[str, str]]) -> str:
    """What the first answer answers: one turn of the user's, or what was said before it too."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"[{message['role']}]\n{message['content']}" for message in messages)


def judged(match: Match, found: dict[str, Dataset], rulings: Sequence[Ruling]) -> dict[str, Any]:
    """A row of judgments.jsonl: both games, mapped back to a and b, and what they come to."""
    first, second = BOTH[rulings[0].verdict][0], BOTH[rulings[1].verdict][1]
    rows = [found[match.dataset].answers[model, match.question["index"]] for model in (match.a, match.b)]
    return {
        "dataset": match.dataset,
        "question_id": match.question["question_id"],
        "index": match.question["index"],
        "category": match.question["category"],
        "turn": match.turn,
        "a": match.a,
        "b": match.b,
        "first": first,
        "second": second,
        "winner": "missing" if "missing" in (first, second) else first if first == second else "tie",
        "tie_kind": _tie_kind(first, second),
        "lengths": [of[match.turn - 1]["length"] for of in rows],
        "told": [ruling.text for ruling in rulings],
    }


def _tie_kind(first: str, second: str) -> str | None:
    if "missing" in (first, second) or (first == second != "tie"):
        return None
    return "agreed" if first == second else "half" if "tie" in (first, second) else "flipped"


def statistics(rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Rates, intervals and tests of one pair's rows, of one set of questions or several."""
    return asdict(
        judged_pair(
            [
                Judged((row["dataset"], row["index"]), row["turn"], row["first"], row["second"], *row["lengths"])
                for row in rows
            ]
        )
    )


def verdicts(rows: Sequence[dict[str, Any]], found: dict[str, Dataset]) -> dict[str, Any]:
    """Set of questions → its pairs, p-values corrected (Holm) over the cells of the set."""
    datasets = {}
    for name, one in found.items():
        of = [row for row in rows if row["dataset"] == name]
        if not of:
            continue
        named = list(dict.fromkeys((row["a"], row["b"]) for row in of))
        pairs = [{"a": a, "b": b} | statistics(row for row in of if (row["a"], row["b"]) == (a, b)) for a, b in named]
        corrected = holm([pair["p_value"] for pair in pairs])
        datasets[name] = {
            "questions": len(one.questions),
            "turns": max(len(question["turns"]) for question in one.questions),
            "pairs": [pair | {"p_holm": p} for pair, p in zip(pairs, corrected, strict=True)],
        }
    return datasets


def run(job: Job) -> dict[str, Any]:
    """Write judgments.jsonl, verdicts.json and the files that FastChat and arena-hard-auto read."""
    recipe, section = job.recipe, job.recipe.evaluate.judge
    assert section is not None
    found = read(job.inputs["evaluate"])
    known = comparisons.searched(recipe, comparisons.by_set(read_json_lines(job.inputs["evaluate"] / "answers.jsonl")))
    judge = judge_of(section, cache=job.folder.parents[1] / CACHE, say=lambda line: print(f"{job.unit.id}  {line}"))
    rows: list[dict[str, Any]] = []
    prompts: list[tuple[str, str]] = []

    def play(todo: Sequence[Match]) -> None:
        asked = [game for match in todo for game in games(match, found)]
        with progress_bar(len(asked), job.unit.id) as bar:
            rulings = judge(asked, bar.update)
        two = [rulings[at : at + 2] for at in range(0, len(rulings), 2)]
        prompts.extend((first.prompt, second.prompt) for first, second in two)
        rows.extend(judged(match, found, both) for match, both in zip(todo, two, strict=True))

    # 1. a search by the judge: the candidates first
    if recipe.search is not None and recipe.search.by == "judge":
        play(matches(found, sweeps.candidate_pairs(recipe), recipe.search.questions or list(found)))
        known = _search_by_judge(recipe, rows, list(found))
    # 2. the pairs, a searched policy by the candidate that was picked
    there = {(row["a"], row["b"], row["dataset"]) for row in rows}
    todo = matches(found, sweeps.with_picked(sweeps.compared_pairs(recipe), known), list(found))
    play([match for match in todo if (match.a, match.b, match.dataset) not in there])
    # 3. rates, and everything on the disk
    fastchat.write_judgments(job.folder, section, rows, prompts)
    result = {
        "judge": {"kind": section.kind, "model": section.model, "prompt": section.prompt},
        "calls": dict(judge.calls),
        "datasets": verdicts(rows, found),
        "search": known,
    }
    write_atomic(job.folder / "verdicts.json", json.dumps(result, indent=2))
    return {**judge.calls, "judgments": len(rows), "missing": sum(row["winner"] == "missing" for row in rows)}


def _search_by_judge(recipe: Recipe, rows: Sequence[dict[str, Any]], sets: list[str]) -> dict[str, Any] | None:
    rates = {
        a: statistics(row for row in rows if (row["a"], row["b"]) == (a, b)) for a, b in sweeps.candidate_pairs(recipe)
    }
    return sweeps.pick_candidates(recipe, rates, sets)
