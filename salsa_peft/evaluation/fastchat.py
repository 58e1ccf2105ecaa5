"""Questions, answers and judgments in the file formats of FastChat and arena-hard-auto."""

import hashlib
import json
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from salsa_peft.config.judge import Judge
from salsa_peft.config.schema import Source
from salsa_peft.data.files import load_rows
from salsa_peft.data.questions import Question, row_id
from salsa_peft.utils.errors import SalsaError, require
from salsa_peft.utils.files import write_atomic
from salsa_peft.utils.messages import listed, short

TEXT_COLUMNS = ("answer", "output", "response", "completion")
"""Columns with the answer to a question of one turn."""


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


def read_answers(path: str, questions: Sequence[Question]) -> list[tuple[str, ...]]:
    """The answers in a file to all questions, in the questions' order; one text for each turn.

    Rows are found by the question's id. A row has `choices` (FastChat, arena-hard-auto v0.1; the first choice counts),
    `messages` (arena-hard-auto v2.0), or one of TEXT_COLUMNS. Raises SalsaError if the file does not answer exactly the
    turns of these questions.
    """
    found: dict[str, tuple[str, ...]] = {}
    for number, row in load_rows(Source(path=path)):
        where = f"{path}, row {number}"
        identity = str(row_id(row, number, where)[1])
        require(identity not in found, f"{where}: question {short(identity)} is answered twice; remove one of the rows")
        found[identity] = _answer_texts(row, where)
    known = {str(one.id): one for one in questions}
    missing, unknown = [one for one in known if one not in found], [one for one in found if one not in known]
    require(
        not missing and not unknown,
        f"{path}: its question ids do not match the questions: "
        + " and ".join(
            f"{len(ids)} {what} ({listed(ids)})"
            for ids, what in ((missing, "without an answer"), (unknown, "that are no question's"))
            if ids
        )
        + "; give the questions that this file answers",
    )
    for identity, question in known.items():
        turns, asked = len(found[identity]), len(question.turns)
        require(
            turns == asked,
            f"{path}, question {identity}: has answers to {turns} turn{'s' * (turns != 1)}, but the question has {asked};"
            " give the answers to these questions",
        )
    return [found[str(one.id)] for one in questions]


def _answer_texts(row: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """The answers of a row, one for each turn."""
    choices, messages = row.get("choices"), row.get("messages")
    turns: Any
    if isinstance(choices, list) and choices and isinstance(choices[0], dict):
        turns = choices[0].get("turns")
    elif isinstance(messages, list):
        turns = [one for one in messages if isinstance(one, dict) and one.get("role") == "assistant"]
    else:
        turns = [row[key] for key in TEXT_COLUMNS if isinstance(row.get(key), str)][:1]
    texts = [_text(turn) for turn in turns] if isinstance(turns, list) else []
    if not texts or None in texts:
        raise SalsaError(
            f"{where}: has no answer; a row must have choices: [{{turns: […]}}] (FastChat, arena-hard-auto), messages, or"
            f" one of {', '.join(TEXT_COLUMNS)}"
        )
    return tuple(str(text) for text in texts)


def _text(turn: Any) -> str | None:
    """The text of a turn, which is text, {content: text} or {content: {answer: text}}; None for anything else."""
    content = turn.get("content") if isinstance(turn, dict) else turn
    content = content.get("answer") if isinstance(content, dict) else content
    return content if isinstance(content, str) else None


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
