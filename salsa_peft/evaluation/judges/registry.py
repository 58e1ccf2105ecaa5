"""The kinds of judges for pairwise comparisons: openai, local, reward and function.

A judge is a callable `(comparisons, progress) → verdicts`, with the verdicts in the order of the comparisons, and has
counters in `calls`. The judge calls `progress` with the number of comparisons just decided. The two orders of a pair of
answers are two separate comparisons.
"""

import asyncio
import inspect
import math
import sys
from collections.abc import Callable, Mapping, Sequence, Set, Sized
from pathlib import Path
from typing import Any, Protocol

from salsa_peft.config.judge import Judge, check_ready
from salsa_peft.config.rewards import split_function
from salsa_peft.evaluation.judges.cache import Cache, Reply, key_of
from salsa_peft.evaluation.judges.chat import CALLS, ChatJudge
from salsa_peft.evaluation.judges.prompts import Comparison, Verdict
from salsa_peft.utils.errors import SalsaError, require
from salsa_peft.utils.fingerprints import sha256
from salsa_peft.utils.messages import short

WHERE = "evaluate.judge"
Say = Callable[[str], None]
VERDICTS = {"A": "A", "B": "B", "C": "tie", "tie": "tie", None: None}
"""Verdict that a judge function may return → the winner."""


class PairwiseJudge(Protocol):
    """Interface of a judge: a callable that decides comparisons."""

    @property
    def calls(self) -> dict[str, int]:
        """Counters since the judge was created: asked, cached, retried, prompt_tokens, completion_tokens."""

    def __call__(self, comparisons: Sequence[Comparison], progress: Callable[[int], None]) -> list[Verdict]:
        """Return a verdict for each comparison."""


class RewardJudge:
    """Judge by `Comparison.scores`: tie if they differ by at most `margin`, no verdict if one is not finite."""

    def __init__(self, margin: float, where: str = WHERE) -> None:
        self.margin, self.where, self.calls = margin, where, dict.fromkeys(CALLS, 0)

    def __call__(self, comparisons: Sequence[Comparison], progress: Callable[[int], None]) -> list[Verdict]:
        verdicts = [self._verdict(comparison) for comparison in comparisons]
        progress(len(comparisons))
        return verdicts

    def _verdict(self, comparison: Comparison) -> Verdict:
        if comparison.scores is None:
            raise SalsaError(
                f"{self.where}: the answers have no scores of the recipe's reward, which a judge of kind reward compares;"
                f" set {self.where}.kind to openai, local or function"
            )
        a, b = comparison.scores
        text = f"scores {a:.4f} and {b:.4f}"
        if not (math.isfinite(a) and math.isfinite(b)):
            return Verdict(None, "", text, 0, "a score that is not a finite number")
        return Verdict("tie" if abs(a - b) <= self.margin else "A" if a > b else "B", "", text, 0)


class FunctionJudge:
    """A Python function as judge: `function(questions, first, second, **more) -> list of verdicts`.

    Every argument is a list with one entry per comparison. questions: the user's turns up to the judged one as
    messages, [{role: user, content}, …]. first, second: the texts of the two answers to the judged turn. The function
    may also take `conversations_first`, `conversations_second` (messages of user and assistant, the judged answer
    last), `turns` (number of the judged turn), `categories`, and `references` (lists by turn, or None). The function
    returns one verdict for each comparison: A if the first answer is better, B if the second is, C or tie if neither
    is, None for no verdict (the comparison counts as missing). One call has at most `concurrency` comparisons. An async
    function is awaited. The verdicts of each call are cached; with another `source`, the function's file, they are asked
    for again.
    """

    def __init__(
        self, name: str, function: Callable[..., Any], batch: int, cache: Path | None = None, source: Path | None = None
    ) -> None:
        self.name, self.function, self.batch, self.calls = name, function, batch, dict.fromkeys(CALLS, 0)
        self.cache, self.source = Cache(cache), "" if source is None else sha256(source)
        known = set(self._arguments([]))
        parameters = inspect.signature(function).parameters.values()
        self.keywords = any(one.kind is one.VAR_KEYWORD for one in parameters)
        named = [one for one in parameters if one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL)]
        positional = [one.name for one in named if one.kind is one.POSITIONAL_ONLY]
        unknown = [one.name for one in named if one.name not in known and one.default is one.empty]
        require(
            not positional and not unknown,
            f"judge {name}: the function's parameter {', '.join(positional or unknown)}"
            f" {'is positional-only' if positional else 'is unknown'}; the function can take the keyword arguments"
            f" {', '.join(sorted(known))}",
        )
        self.takes = {one.name for one in named}

    def __call__(self, comparisons: Sequence[Comparison], progress: Callable[[int], None]) -> list[Verdict]:
        keys = [self._key(one) for one in comparisons]
        verdicts = [self._cached(key) for key in keys]
        progress(len(verdicts) - verdicts.count(None))
        places = [place for place, verdict in enumerate(verdicts) if verdict is None]
        for start in range(0, len(places), self.batch):
            chosen = places[start : start + self.batch]
            part = [comparisons[place] for place in chosen]
            given = {key: value for key, value in self._arguments(part).items() if self.keywords or key in self.takes}
            found = self.function(**given)
            found = asyncio.run(_awaited(found)) if inspect.isawaitable(found) else found
            self.calls["asked"] += len(part)
            sized = isinstance(found, Sized) and not isinstance(found, str | bytes | Mapping | Set)
            require(
                sized and len(found) == len(part),
                f"judge {self.name}: the function returned {short(found)}, but must return a list of {len(part)}"
                " verdicts, one for each comparison",
            )
            for place, one in zip(chosen, found, strict=True):
                verdicts[place] = self._verdict(one)
            told = {keys[place]: Reply(str(one), "stop", 0, 0) for place, one in zip(chosen, found, strict=True) if one}
            self.cache.put(told)
            progress(len(part))
        return [verdict for verdict in verdicts if verdict is not None]

    def _key(self, comparison: Comparison) -> str:
        """Key of a verdict in the cache: the function, its file's content, and everything that it is given."""
        return key_of(
            "function", self.name.rpartition("/")[2], [self._arguments([comparison])], {"source": self.source}, 0
        )

    def _cached(self, key: str) -> Verdict | None:
        found = self.cache.get(key)
        if found is None:
            return None
        self.calls["cached"] += 1
        return self._verdict(found.text)

    def _arguments(self, comparisons: Sequence[Comparison]) -> dict[str, list[Any]]:
        return {
            "questions": [[_message("user", text) for text in one.turns] for one in comparisons],
            "first": [one.a[-1] for one in comparisons],
            "second": [one.b[-1] for one in comparisons],
            "conversations_first": [_conversation(one.turns, one.a) for one in comparisons],
            "conversations_second": [_conversation(one.turns, one.b) for one in comparisons],
            "turns": [one.turn for one in comparisons],
            "categories": [one.category for one in comparisons],
            "references": [None if one.references is None else list(one.references) for one in comparisons],
        }

    def _verdict(self, returned: Any) -> Verdict:
        require(
            returned is None or (isinstance(returned, str) and returned in VERDICTS),
            f"judge {self.name}: the function returned the verdict {short(returned)}, but a verdict must be A, B, C, tie"
            " or None",
        )
        return Verdict(VERDICTS[returned], "", returned or "", 1, "no verdict" if returned is None else "")


async def _awaited(value: Any) -> Any:
    return await value


def _message(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def _conversation(turns: Sequence[str], answers: Sequence[str]) -> list[dict[str, str]]:
    both = zip(turns, answers, strict=True)
    return [message for turn, answer in both for message in (_message("user", turn), _message("assistant", answer))]


def _openai(section: Judge, cache: Path | None, say: Say, where: str) -> PairwiseJudge:
    check_ready(section, where)
    from salsa_peft.evaluation.judges.openai_api import Endpoint

    return ChatJudge(section, Endpoint(section, where), cache, say)


def _local(section: Judge, cache: Path | None, say: Say, where: str) -> PairwiseJudge:
    from salsa_peft.evaluation.judges.local import LocalModel

    return ChatJudge(section, LocalModel(section, where), cache, say)


def _function(section: Judge, cache: Path | None, say: Say, where: str) -> PairwiseJudge:
    from salsa_peft.models.rewards.function import load_function

    name = str(section.model)
    function = load_function(name)
    source = Path(str(sys.modules[split_function(name)[1]].__file__))
    return FunctionJudge(name, function, section.concurrency, cache, source)


JUDGES: dict[str, Callable[[Judge, Path | None, Say, str], PairwiseJudge]] = {
    "openai": _openai,
    "local": _local,
    "reward": lambda section, cache, say, where: RewardJudge(section.margin, where),
    "function": _function,
}
"""Kind of judge → function that creates the judge from: the section evaluate.judge, the cache's path (None: cache in
memory), a function that prints a line, and the start of error messages."""


def judge_of(section: Judge, *, cache: Path | None, say: Say, where: str = WHERE) -> PairwiseJudge:
    """Create a judge. Raises a SalsaError that starts with `where` if the model, key or function is unusable."""
    return JUDGES[section.kind](section, cache, say, where)
