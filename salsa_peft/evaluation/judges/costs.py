"""How often a judge will be asked, and about how many tokens that is: for --dry-run. Imports no torch.

Exact in games where the answers are there; before that counted from the questions' files and `generation.max_new_tokens`, so an upper end.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from salsa_peft.config import sweeps
from salsa_peft.config.paths import is_local
from salsa_peft.config.schema import Recipe, Source

CHARACTERS = 4
"""Of a token, a rule of thumb for English."""
INSTRUCTION = 250
"""Tokens of what a judge is told beside question and answers, a guess for both presets."""
VERDICT = 250
"""Tokens of one judgment, a guess: a brief comparison and the verdict."""
COUNTABLE = 500_000_000
"""Bytes of a file that is read for it."""

ON_THE_HUB = {
    ("lighteval/mt-context", "train"): (80, (75, 101)),
    ("HuggingFaceH4/mt_bench_prompts", "train"): (80, (75, 101)),
    ("lmarena-ai/arena-hard-auto-v0.1", "train"): (500, (102,)),
    ("HuggingFaceH4/ultrafeedback_binarized", "test_prefs"): (2000, (150,)),
}
"""(Hub id, split) of the paper's sets → questions, and tokens up to each turn: means of the first two's own texts, of the last a guess."""


class Cost(NamedTuple):
    """Of one recipe's judge."""

    calls: int
    tokens_in: int
    tokens_out: int
    exact: bool
    """Whether the answers were there to be counted."""


def told(recipe: Recipe, answers: Path | None) -> str | None:
    """A line for the plan; None without a judge."""
    judge = recipe.evaluate.judge
    if judge is None:
        return None
    found, name = cost(recipe, answers), " ".join(filter(None, (judge.kind, judge.model)))
    if judge.kind == "reward":
        return "judge: reward, the scores that are there already"
    if found is None:
        return f"judge: {name}, calls known when the questions are there"
    much = "about" if found.exact else "at most about"
    tokens = f", {much} {found.tokens_in / 1e6:.2g} M tokens in and {found.tokens_out / 1e6:.2g} M out"
    return f"judge: {name}, {found.calls:,} {'games' if judge.kind == 'function' else 'calls'}" + (
        "" if judge.kind == "function" else tokens + ", less what it was asked before"
    )


def cost(recipe: Recipe, answers: Path | None) -> Cost | None:
    """answers: the finished evaluate stage's answers.jsonl. None where the questions are not known before the stage starts."""
    sizes = None if answers is None else _answered(answers)
    exact = sizes is not None
    if sizes is None:
        sizes = {}
        for name, source in recipe.evaluate.prompts.items():
            asked = _asked(source)
            if asked is None:
                return None
            # each turn is judged with those before it in view
            answer = recipe.generation.max_new_tokens
            sizes[name] = [(turn, question + 2 * answer * turn) for turn, question in asked]
        if not sizes:
            return None
    section = recipe.search
    pairs = len(sweeps.with_picked(sweeps.compared_pairs(recipe), None))
    calls = tokens = 0
    for name, matches in sizes.items():
        tried = (
            len(sweeps.candidate_pairs(recipe))
            if section and section.by == "judge" and name in (section.questions or sizes)
            else 0
        )
        calls += 2 * (pairs + tried) * len(matches)
        tokens += 2 * (pairs + tried) * sum(shown + INSTRUCTION for _, shown in matches)
    return Cost(calls, tokens, calls * VERDICT, exact)


def _asked(source: Source) -> list[tuple[int, int]] | None:
    """(turn, tokens of the questions up to it) of each turn of a local jsonl file, or of one of the paper's sets."""
    if (source.path, source.split) in ON_THE_HUB:
        questions, lengths = ON_THE_HUB[source.path, source.split]
        return list(enumerate(lengths, 1)) * min(questions, source.limit or questions)
    readable = is_local(source.path) and source.path.lower().endswith(".jsonl")
    if not readable or os.path.getsize(source.path) > COUNTABLE:
        return None
    found: list[tuple[int, int]] = []
    with open(source.path, encoding="utf-8", errors="replace") as file:
        try:
            rows = [json.loads(line) for line in file if line.strip()]
        except ValueError:  # the evaluate stage names the row
            return None
    for row in rows[: source.limit]:
        texts = _texts(row)
        found += [(turn, sum(map(len, texts[:turn])) // CHARACTERS) for turn in range(1, len(texts) + 1)]
    return found


def _texts(row: Any) -> list[str]:
    """The user's turns, roughly: what data is worth is the evaluate stage's to say."""
    turns = row.get("turns") if isinstance(row, dict) else None
    if isinstance(turns, list) and turns:
        return [turn if isinstance(turn, str) else json.dumps(turn) for turn in turns]
    return [json.dumps(row)]


def _answered(path: Path) -> dict[str, list[tuple[int, int]]]:
    """Set of questions → (turn, tokens that the judge will see of a question and two answers), the answers' mean length taken."""
    shown: dict[tuple[str, Any, int], list[tuple[int, int]]] = {}
    with open(path, encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            key = (row["dataset"], row["index"], row["turn"])
            shown.setdefault(key, []).append((len(row["prompt"]) // CHARACTERS, row["length"]))
    found: dict[str, list[tuple[int, int]]] = {}
    for (dataset, index, turn), of in shown.items():
        before = sum(_pair(shown[dataset, index, earlier]) for earlier in range(1, turn))
        found.setdefault(dataset, []).append((turn, before + _pair(of)))
    return found


def _pair(rows: list[tuple[int, int]]) -> int:
    return rows[0][0] + round(2 * sum(length for _, length in rows) / len(rows))
