"""Questions, answers and judgments in the file formats of FastChat and arena-hard-auto."""

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


def file_stem(name: str) -> str:
    """File name for a model: the last part of its name, with hyphens for characters not in A-Za-z0-9._-."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", name.rstrip("/").rsplit("/", 1)[-1]) or "model"


def lines(rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows in JSON Lines format."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_answers(
    folder: Path, questions: Sequence[Question], answers: Mapping[str, Sequence[Mapping[str, Any]]]
) -> None:
    """Write question.jsonl and model_answer/ of one set of questions into `folder`.

    answers: model → rows of answers.jsonl, in order. If two models have the same file name, -2 is added to the second.
    """
    asked = [
        {"question_id": one.id, "category": one.category or "general", "turns": list(one.turns)}
        | ({} if one.reference is None else {"reference": one.reference})
        for one in questions
    ]
    write_atomic(folder / "question.jsonl", lines(asked))
    taken: set[str] = set()
    now = time.time()
    for model, rows in answers.items():
        name = file_stem(model)
        while name in taken:
            name += "-2"
        taken.add(name)
        turns_of: dict[Any, list[str]] = {}
        for row in rows:
            turns_of.setdefault(row["question_id"], []).append(row["response"])
        found = [
            {
                "question_id": question,
                "answer_id": hashlib.sha256(json.dumps([name, question, turns]).encode()).hexdigest()[:22],
                "model_id": name,
                "choices": [{"index": 0, "turns": turns}],
                "tstamp": now,
            }
            for question, turns in turns_of.items()
        ]
        write_atomic(folder / "model_answer" / f"{name}.jsonl", lines(found))


WINNER = {"a": "model_1", "b": "model_2", "tie": "tie", "missing": "error"}
"""Winner of a comparison → FastChat's name for the winner."""
BASELINE_FIRST = {"a": "B>A", "b": "A>B", "tie": "A=B", "missing": None}
"""Winner → arena-hard-auto's score for its game 1, in which the baseline (model b) is assistant A."""
BASELINE_SECOND = {"a": "A>B", "b": "B>A", "tie": "A=B", "missing": None}


def write_judgments(
    folder: Path, section: Judge, rows: Sequence[dict[str, Any]], prompts: Sequence[tuple[str, str]]
) -> None:
    """Write judgments.jsonl and the judgment files of FastChat and arena-hard-auto.

    prompts: for each row, the judge's prompts in both orders.
    """
    judge, now = file_stem(section.model or section.kind), time.time()
    files: dict[Path, list[dict[str, Any]]] = {folder / "judgments.jsonl": list(rows)}
    for row, both in zip(rows, prompts, strict=True):
        pair = folder / "data" / row["dataset"] / "model_judgment" / f"{judge}_pair.jsonl"
        files.setdefault(pair, []).append(fastchat_row(row, both, [judge, section.prompt], now))
        if row["turn"] == 1:  # arena-hard-auto's questions have one turn
            arena = folder / "arena" / f"{row['dataset']}-vs-{file_stem(row['b'])}" / "model_judgment" / judge
            files.setdefault(arena / f"{file_stem(row['a'])}.jsonl", []).append(arena_hard_row(row, both, judge))
    for path, of in files.items():
        write_atomic(path, lines(of))


def fastchat_row(row: dict[str, Any], prompts: tuple[str, str], judge: list[str], now: float) -> dict[str, Any]:
    """A judgment as FastChat's gen_judgment.py writes it in pairwise mode; "error": no verdict."""
    return {
        "question_id": row["question_id"],
        "model_1": file_stem(row["a"]),
        "model_2": file_stem(row["b"]),
        "g1_winner": WINNER[row["first"]],
        "g2_winner": WINNER[row["second"]],
        "judge": judge,
        "g1_user_prompt": prompts[0],
        "g1_judgment": row["told"][0],
        "g2_user_prompt": prompts[1],
        "g2_judgment": row["told"][1],
        "turn": row["turn"],
        "tstamp": now,
    }


def arena_hard_row(row: dict[str, Any], prompts: tuple[str, str], judge: str) -> dict[str, Any]:
    """A judgment as arena-hard-auto's gen_judgment.py writes it; game 1 shows the baseline first."""

    def game(score: str | None, text: str, prompt: str) -> dict[str, Any]:
        return {"score": score, "judgment": {"answer": text}, "prompt": [{"role": "user", "content": prompt}]}

    return {
        "uid": row["question_id"],
        "category": row["category"],
        "judge": judge,
        "model": file_stem(row["a"]),
        "baseline": file_stem(row["b"]),
        "games": [
            game(BASELINE_FIRST[row["second"]], row["told"][1], prompts[1]),
            game(BASELINE_SECOND[row["first"]], row["told"][0], prompts[0]),
        ],
    }
