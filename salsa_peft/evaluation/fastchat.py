"""Questions, answers and judgments in the file formats of FastChat and arena-hard-auto."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from salsa_peft.config.judge import Judge
from salsa_peft.data.questions import Question
from salsa_peft.utils.files import write_atomic


def plain(name: str) -> str:
    """A model's name as a file's: a path's last part, nothing that a file system minds."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", name.rstrip("/").rsplit("/", 1)[-1]) or "model"


def lines(rows: Iterable[Mapping[str, Any]]) -> str:
    """jsonl."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_answers(
    folder: Path, questions: Sequence[Question], answers: Mapping[str, Sequence[Mapping[str, Any]]]
) -> None:
    """Everything of one set into `folder`; answers: model → rows of answers.jsonl, in order. Of two names that are one file's, the
    second gets a number."""
    asked = [
        {"question_id": one.id, "category": one.category or "general", "turns": list(one.turns)}
        | ({} if one.reference is None else {"reference": one.reference})
        for one in questions
    ]
    write_atomic(folder / "question.jsonl", lines(asked))
    taken: set[str] = set()
    now = time.time()
    for model, rows in answers.items():
        name = plain(model)
        while name in taken:
            name += "-2"
        taken.add(name)
        given: dict[Any, list[str]] = {}
        for row in rows:
            given.setdefault(row["question_id"], []).append(row["response"])
        found = [
            {
                "question_id": question,
                "answer_id": hashlib.sha256(json.dumps([name, question, turns]).encode()).hexdigest()[:22],
                "model_id": name,
                "choices": [{"index": 0, "turns": turns}],
                "tstamp": now,
            }
            for question, turns in given.items()
        ]
        write_atomic(folder / "model_answer" / f"{name}.jsonl", lines(found))


WINNER = {"a": "model_1", "b": "model_2", "tie": "tie", "missing": "error"}
"""As FastChat writes a game."""
BASELINE_FIRST = {"a": "B>A", "b": "A>B", "tie": "A=B", "missing": None}
"""As arena-hard-auto writes its first game, in which the baseline, our b, is assistant A."""
BASELINE_SECOND = {"a": "A>B", "b": "B>A", "tie": "A=B", "missing": None}


def judge_name(section: Judge) -> str:
    """What the files of a judge are called: the last part of its model's name, or its kind."""
    return plain(section.model or section.kind)


def write_judgments(
    folder: Path, section: Judge, rows: Sequence[dict[str, Any]], prompts: Sequence[tuple[str, str]]
) -> None:
    """All three; prompts: what the judge was told in the two games of each row."""
    judge, now = judge_name(section), time.time()
    files: dict[Path, list[dict[str, Any]]] = {folder / "judgments.jsonl": list(rows)}
    for row, told in zip(rows, prompts, strict=True):
        pair = folder / "data" / row["dataset"] / "model_judgment" / f"{judge}_pair.jsonl"
        files.setdefault(pair, []).append(fastchat(row, told, [judge, section.prompt], now))
        if row["turn"] == 1:  # its questions have one turn
            arena = (
                folder
                / "arena"
                / f"{row['dataset']}-vs-{plain(row['b'])}"
                / "model_judgment"
                / judge
                / f"{plain(row['a'])}.jsonl"
            )
            files.setdefault(arena, []).append(arena_hard(row, told, judge))
    for path, of in files.items():
        write_atomic(path, lines(of))


def fastchat(row: dict[str, Any], told: tuple[str, str], judge: list[str], now: float) -> dict[str, Any]:
    """A line of FastChat's gen_judgment.py in its mode pairwise; a game without a verdict is its "error", which show_result.py drops."""
    return {
        "question_id": row["question_id"],
        "model_1": plain(row["a"]),
        "model_2": plain(row["b"]),
        "g1_winner": WINNER[row["first"]],
        "g2_winner": WINNER[row["second"]],
        "judge": judge,
        "g1_user_prompt": told[0],
        "g1_judgment": row["told"][0],
        "g2_user_prompt": told[1],
        "g2_judgment": row["told"][1],
        "turn": row["turn"],
        "tstamp": now,
    }


def arena_hard(row: dict[str, Any], told: tuple[str, str], judge: str) -> dict[str, Any]:
    """A line of arena-hard-auto's gen_judgment.py: the baseline answers first in its first game, second in its second."""

    def game(score: str | None, text: str, prompt: str) -> dict[str, Any]:
        return {"score": score, "judgment": {"answer": text}, "prompt": [{"role": "user", "content": prompt}]}

    return {
        "uid": row["question_id"],
        "category": row["category"],
        "judge": judge,
        "model": plain(row["a"]),
        "baseline": plain(row["b"]),
        "games": [
            game(BASELINE_FIRST[row["second"]], row["told"][1], told[1]),
            game(BASELINE_SECOND[row["first"]], row["told"][0], told[0]),
        ],
    }
