"""Estimate of a judge's calls and tokens for --dry-run. Imports no torch.

The number of calls is exact once the answers exist, except that the calls for the best of n responses of seed-0 are
always counted in full. Until then the calls are counted from the question files, and the tokens are an upper bound, for
which every answer is assumed to be `generation.max_new_tokens` long.
"""

import itertools
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from salsa_peft.config import sweeps
from salsa_peft.config.paths import is_local
from salsa_peft.config.schema import Recipe, Source
from salsa_peft.utils.files import read_json_lines

CHARACTERS = 4
"""Number of characters per token, a rule of thumb for English."""
INSTRUCTION = 250
"""Guess at the number of prompt tokens besides question and answers, for figure7 and fastchat."""
VERDICT = 250
"""Guess at the number of tokens in one reply, which is a brief comparison and the verdict."""
COUNTABLE = 500_000_000
"""Size in bytes above which a file of questions is not read for the estimate."""

ON_THE_HUB = {
    ("lighteval/mt-bench", "train"): (80, (75, 101)),
    ("HuggingFaceH4/mt_bench_prompts", "train"): (80, (75, 101)),
    ("lmarena-ai/arena-hard-auto-v0.1", "train"): (500, (102,)),
    ("HuggingFaceH4/ultrafeedback_binarized", "test_prefs"): (2000, (150,)),
}
"""(Hub id, split) of a set of questions in the paper → number of questions, and mean number of tokens of the user's
turns up to each turn. The means are measured, except UltraFeedback's, which is a guess."""


class Cost(NamedTuple):
    """Estimated numbers of calls and tokens of a recipe's judge."""

    calls: int
    tokens_in: int
    tokens_out: int
    exact: bool
    """Whether the calls were counted from existing answers."""


def plan_line(recipe: Recipe, answers: Path | None) -> str | None:
    """Line about the judge in the printed plan; None if the recipe has no judge."""
    judge = recipe.evaluate.judge
    if judge is None:
        return None
    found, name = cost(recipe, answers), " ".join(filter(None, (judge.kind, judge.model)))
    if judge.kind == "reward":
        return "judge: reward, compares the scores that the evaluate stage records"
    if found is None:
        return f"judge: {name}, the number of calls is known once the questions have been read"
    if judge.kind == "function":
        return f"judge: {name}, {found.calls:,} comparisons"
    much = "about" if found.exact else "at most about"
    return (
        f"judge: {name}, {found.calls:,} calls, {much} {found.tokens_in / 1e6:.2g} M tokens in and"
        f" {found.tokens_out / 1e6:.2g} M out; fewer if replies are in the cache"
    )


def cost(recipe: Recipe, answers: Path | None) -> Cost | None:
    """Estimate the calls and tokens of the recipe's judge; None if the questions cannot be counted yet.

    answers: answers.jsonl of the finished evaluate stage, if there is one.
    """
    sizes = None if answers is None else _from_answers(answers)
    exact = sizes is not None
    if sizes is None:
        prompts, answer = recipe.evaluate.prompts, recipe.generation.max_new_tokens
        known = {name: turns for name, source in prompts.items() if (turns := question_turns(source)) is not None}
        if not known or len(known) < len(prompts):
            return None
        # the prompt of a turn contains the earlier turns
        sizes = {name: [size + 2 * answer * turn for turn, size in turns] for name, turns in known.items()}
    section = recipe.search
    pairs = len(sweeps.with_picked(sweeps.compared_pairs(recipe), None))
    calls = tokens = 0
    for name, lengths in sizes.items():
        searched = section is not None and section.by == "judge" and name in (section.questions or sizes)
        times = 2 * (pairs + (len(sweeps.candidate_pairs(recipe)) if searched else 0))
        calls += times * len(lengths)
        tokens += times * sum(length + INSTRUCTION for length in lengths)
    if recipe.judges_best_of_n:
        more = 2 * recipe.reward.quality_prompts
        calls += more
        tokens += more * (recipe.model.max_length + recipe.generation.max_new_tokens + INSTRUCTION)
    return Cost(calls, tokens, calls * VERDICT, exact)


def question_turns(source: Source) -> list[tuple[int, int]] | None:
    """(turn, tokens up to it) of every question; None if the source is neither JSONL nor in the paper."""
    if (source.path, source.split) in ON_THE_HUB:
        count, lengths = ON_THE_HUB[source.path, source.split]
        return list(enumerate(lengths, 1)) * min(count, source.limit or count)
    readable = is_local(source.path) and source.path.lower().endswith(".jsonl")
    if not readable or os.path.getsize(source.path) > COUNTABLE:
        return None
    with open(source.path, encoding="utf-8", errors="replace") as file:
        try:
            questions = [_texts(json.loads(line)) for line in file if line.strip()]
        except ValueError:  # the evaluate stage will report the row
            return None
    sizes = [list(itertools.accumulate(map(len, texts))) for texts in questions[: source.limit]]
    return [(turn, size // CHARACTERS) for up_to in sizes for turn, size in enumerate(up_to, 1)]


def _texts(row: Any) -> list[str]:
    """Texts of the user's turns, or the whole row as one text if it has no `turns`; nothing is checked."""
    turns = row.get("turns") if isinstance(row, dict) else None
    if isinstance(turns, list) and turns:
        return [turn if isinstance(turn, str) else json.dumps(turn) for turn in turns]
    return [json.dumps(row)]


def _from_answers(path: Path) -> dict[str, list[int]]:
    """Set of questions → tokens up to each turn: of the questions and of two answers of mean length."""
    shown: dict[tuple[str, Any, int], list[tuple[int, int]]] = {}
    for row in read_json_lines(path):
        key = (row["dataset"], row["index"], row["turn"])
        shown.setdefault(key, []).append((len(row["prompt"]) // CHARACTERS, row["length"]))
    found: dict[str, list[int]] = {}
    for dataset, index, turn in shown:
        turns = [shown[dataset, index, earlier] for earlier in range(1, turn + 1)]
        pairs = [rows[0][0] + round(2 * sum(length for _, length in rows) / len(rows)) for rows in turns]
        found.setdefault(dataset, []).append(sum(pairs))
    return found
