"""Who says which of two answers is better: openai | local | reward | function.

A judge is a callable `(games, progress) → rulings`, in the games' order, with `calls`; progress is called with the number of games just
done. Each sees one game at a time, in the order it is given; both orders of a pair are two games.
"""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, Protocol

from salsa_peft.config.judge import Judge, check_ready
from salsa_peft.evaluation.judges.chat import CALLS, ChatJudge
from salsa_peft.evaluation.judges.prompts import Comparison, Verdict
from salsa_peft.utils.errors import SalsaError, require
from salsa_peft.utils.messages import short

WHERE = "evaluate.judge"
Say = Callable[[str], None]
VERDICTS = {"A": "A", "B": "B", "C": "tie", "tie": "tie", None: None}
"""What a function may say."""


class PairwiseJudge(Protocol):
    """What judges games."""

    @property
    def calls(self) -> dict[str, int]:
        """asked, cached, retried, prompt_tokens, completion_tokens: since it was made."""

    def __call__(self, games: Sequence[Comparison], progress: Callable[[int], None]) -> list[Verdict]:
        """A ruling for each game."""


class RewardJudge:
    """Compares `Comparison.scores`; up to `margin` apart they tie, and one that is no number is missing."""

    def __init__(self, margin: float) -> None:
        self.margin, self.calls = margin, dict.fromkeys(CALLS, 0)

    def __call__(self, games: Sequence[Comparison], progress: Callable[[int], None]) -> list[Verdict]:
        rulings = [self._ruling(game) for game in games]
        progress(len(games))
        return rulings

    def _ruling(self, game: Comparison) -> Verdict:
        if game.scores is None:
            raise SalsaError(
                f"{WHERE}: found answers without the recipe's reward, expected a score for each; set {WHERE}.kind to another judge"
            )
        a, b = game.scores
        said = f"scores {a:.4f} and {b:.4f}"
        if not (math.isfinite(a) and math.isfinite(b)):
            return Verdict(None, "", said, 0, "a score that is no number")
        return Verdict("tie" if abs(a - b) <= self.margin else "A" if a > b else "B", "", said, 0)


class FunctionJudge:
    """`function(questions, first, second, **more) -> list["A" | "B" | "C" | "tie" | None]`, called by keyword with what it takes.

    questions: for each game the user's turns up to the judged one as messages, [{role: user, content}, …]. first, second: the texts of
    the two answers to the last of them. Also to be had: `conversations_first`, `conversations_second` (messages, the earlier answers
    among them, the judged one last), `turns` (the judged one's number), `categories`, `references` (lists by turn, or None). A list of
    one verdict for each game: A the first is better, B the second, C or tie neither; None: no verdict, the game counts as missing. Called
    with at most `concurrency` games at once. An async function is awaited. Nothing is cached.
    """

    def __init__(self, name: str, function: Callable[..., Any], batch: int) -> None:
        self.name, self.function, self.batch, self.calls = name, function, batch, dict.fromkeys(CALLS, 0)
        known = set(self._given([]))
        parameters = inspect.signature(function).parameters.values()
        self.keywords = any(one.kind is one.VAR_KEYWORD for one in parameters)
        named = [one for one in parameters if one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL)]
        by_place = [one.name for one in named if one.kind is one.POSITIONAL_ONLY]
        unknown = [one.name for one in named if one.name not in known and one.default is one.empty]
        require(
            not by_place and not unknown,
            f"judge {name}: it takes {', '.join(by_place or unknown)}{' by position only' * bool(by_place)}, expected keywords among"
            f" {', '.join(sorted(known))}",
        )
        self.takes = {one.name for one in named}

    def __call__(self, games: Sequence[Comparison], progress: Callable[[int], None]) -> list[Verdict]:
        rulings: list[Verdict] = []
        for start in range(0, len(games), self.batch):
            part = games[start : start + self.batch]
            given = {key: value for key, value in self._given(part).items() if self.keywords or key in self.takes}
            found = self.function(**given)
            found = asyncio.run(_awaited(found)) if inspect.isawaitable(found) else found
            self.calls["asked"] += len(part)
            rulings += [self._ruling(one) for one in self._checked(found, len(part))]
            progress(len(part))
        return rulings

    def _given(self, games: Sequence[Comparison]) -> dict[str, list[Any]]:
        return {
            "questions": [[_said("user", text) for text in game.turns] for game in games],
            "first": [game.a[-1] for game in games],
            "second": [game.b[-1] for game in games],
            "conversations_first": [_conversation(game.turns, game.a) for game in games],
            "conversations_second": [_conversation(game.turns, game.b) for game in games],
            "turns": [game.turn for game in games],
            "categories": [game.category for game in games],
            "references": [None if game.references is None else list(game.references) for game in games],
        }

    def _checked(self, found: Any, count: int) -> list[Any]:
        fits = not isinstance(found, str | bytes | Mapping | Set) and hasattr(found, "__len__") and len(found) == count
        require(
            fits, f"judge {self.name}: found {short(found)}, expected a list of {count} verdicts, one for each game"
        )
        return list(found)

    def _ruling(self, said: Any) -> Verdict:
        fits = said is None or (isinstance(said, str) and said in VERDICTS)
        require(fits, f"judge {self.name}: found the verdict {short(said)}, expected A, B, C, tie or None")
        return Verdict(VERDICTS[said], "", "" if said is None else said, 1, "no verdict" if said is None else "")


async def _awaited(value: Any) -> Any:
    return await value


def _said(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def _conversation(turns: Sequence[str], answers: Sequence[str]) -> list[dict[str, str]]:
    return [
        message
        for turn, answer in zip(turns, answers, strict=True)
        for message in (_said("user", turn), _said("assistant", answer))
    ]


def _openai(section: Judge, cache: Path | None, say: Say) -> PairwiseJudge:
    check_ready(section, WHERE)
    from salsa_peft.evaluation.judges.openai_api import Endpoint

    calls = dict.fromkeys(CALLS, 0)
    return ChatJudge(section, Endpoint(section, calls), calls, cache, say)


def _local(section: Judge, cache: Path | None, say: Say) -> PairwiseJudge:
    from salsa_peft.evaluation.judges.local import LocalModel

    calls = dict.fromkeys(CALLS, 0)
    return ChatJudge(section, LocalModel(section, calls), calls, cache, say)


def _reward(section: Judge, cache: Path | None, say: Say) -> PairwiseJudge:
    return RewardJudge(section.margin)


def _function(section: Judge, cache: Path | None, say: Say) -> PairwiseJudge:
    from salsa_peft.models.rewards.function import load_function

    return FunctionJudge(str(section.model), load_function(str(section.model)), section.concurrency)


JUDGES: dict[str, Callable[[Judge, Path | None, Say], PairwiseJudge]] = {
    "openai": _openai,
    "local": _local,
    "reward": _reward,
    "function": _function,
}
"""Kind → what makes it, of the recipe's section, the cache's file (None: none) and what says a line to the user."""


def judge_of(section: Judge, *, cache: Path | None, say: Say) -> PairwiseJudge:
    """The judge that a recipe names. Raises SalsaError where it lacks what it needs, before anything is asked."""
    return JUDGES[section.kind](section, cache, say)
