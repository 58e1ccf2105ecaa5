"""Questions and answers in FastChat's formats (llm_judge), so that its tools read ours.

data/<set>/question.jsonl
data/<set>/model_answer/<model>.jsonl
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

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
