"""Judgments on the disk: our own rows, FastChat's pair format, arena-hard-auto's.

data/<set>/model_judgment/<judge>_pair.jsonl              show_result.py --mode pairwise-all --bench-name <set> --judge-model <judge>
arena/<set>-vs-<b>/model_judgment/<judge>/<a>.jsonl       arena-hard-auto's show_result.py, b its baseline
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from salsa_peft.config.judge import Judge
from salsa_peft.fastchat_files import lines, plain
from salsa_peft.utils.files import write_atomic

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
