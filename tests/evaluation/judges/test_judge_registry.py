"""The table of judges; the reward's and a function's."""

from __future__ import annotations

import math
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from salsa_peft.config.judge import Judge
from salsa_peft.evaluation.judges.prompts import Comparison, Verdict
from salsa_peft.evaluation.judges.registry import JUDGES, FunctionJudge, judge_of
from salsa_peft.utils.errors import SalsaError

ONE = Comparison(("Why?",), ("first",), ("second",), 1, "writing")
TWO = Comparison(("Why?", "Really?"), ("a1", "a2"), ("b1", "b2"), 2, "math", ("r1", "r2"))


def quiet(line: str) -> None:
    raise AssertionError(line)


def ruled(judge: Any, games: list[Comparison]) -> list[Verdict]:
    done: list[int] = []
    verdicts: list[Verdict] = judge(games, done.append)
    assert sum(done) == len(games)
    return verdicts


def test_the_table_is_what_a_recipe_may_say() -> None:
    """A row for each kind."""
    assert tuple(JUDGES) == typing.get_args(typing.get_type_hints(Judge)["kind"])


class TestReward:
    """Scores compared."""

    @pytest.mark.parametrize(
        ("scores", "margin", "winner"),
        [
            ((2.0, 1.0), 0.0, "A"),
            ((1.0, 2.0), 0.0, "B"),
            ((1.0, 1.0), 0.0, "tie"),
            ((1.5, 1.0), 0.5, "tie"),  # up to the margin
            ((1.0, 1.5), 0.5, "tie"),
            ((1.75, 1.0), 0.5, "A"),
            ((-3.0, -1.0), 0.5, "B"),
            ((math.nan, 1.0), 9.0, None),
            ((1.0, math.inf), 0.0, None),
        ],
    )
    def test_by_the_margin(self, scores: tuple[float, float], margin: float, winner: str | None) -> None:
        judge = judge_of(Judge(kind="reward", margin=margin), cache=None, say=quiet)
        (verdict,) = ruled(judge, [ONE._replace(scores=scores)])
        assert verdict.winner == winner and (verdict.why == "") == (winner is not None)
        assert set(judge.calls) == {"asked", "cached", "retried", "prompt_tokens", "completion_tokens"}
        assert not any(judge.calls.values())

    def test_without_scores_is_refused(self) -> None:
        with pytest.raises(SalsaError, match=r"no scores of the recipe's reward.*evaluate\.judge\.kind"):
            ruled(judge_of(Judge(kind="reward"), cache=None, say=quiet), [ONE])


class TestFunction:
    """A function of the user's."""

    def test_gets_what_it_takes_and_says_what_it_likes(self, tmp_path: Path) -> None:
        """From a module in a folder; in batches, in order."""
        (tmp_path / "judge_of_lengths.py").write_text(
            "batches = []\n"
            "def longer(questions, first, second):\n"
            "    batches.append(questions)\n"
            "    return ['A' if len(a) > len(b) else 'B' if len(b) > len(a) else 'tie' for a, b in zip(first, second)]\n"
        )
        section = Judge(kind="function", model=f"{tmp_path}/judge_of_lengths:longer", concurrency=2)
        judge = judge_of(section, cache=None, say=quiet)
        games = [ONE, ONE._replace(a=("longer one",)), TWO, ONE._replace(b=("fir",)), ONE]
        verdicts = ruled(judge, games)
        assert [verdict.winner for verdict in verdicts] == ["B", "A", "tie", "A", "B"]
        assert [(verdict.text, verdict.asked) for verdict in verdicts] == [
            ("B", 1),
            ("A", 1),
            ("tie", 1),
            ("A", 1),
            ("B", 1),
        ]
        import judge_of_lengths  # type: ignore[import-not-found]

        assert [len(batch) for batch in judge_of_lengths.batches] == [2, 2, 1] and judge.calls["asked"] == 5
        asked = [[message(*said) for said in turns] for turns in ([("user", "Why?"), ("user", "Really?")], [("user", "Why?")])]  # fmt: skip
        assert judge_of_lengths.batches[1] == asked

    def test_everything_there_is(self) -> None:
        """Whole conversations, turns, categories, references."""
        seen: dict[str, Any] = {}

        def judge(**given: Any) -> list[str]:
            seen.update(given)
            return ["C", "B"]

        assert [verdict.winner for verdict in ruled(FunctionJudge("j", judge, 8), [TWO, ONE])] == ["tie", "B"]
        assert seen["first"] == ["a2", "first"] and seen["second"] == ["b2", "second"]
        said = [("user", "Why?"), ("assistant", "a1"), ("user", "Really?"), ("assistant", "a2")]
        assert seen["conversations_first"][0] == [message(*one) for one in said]
        said = [("user", "Why?"), ("assistant", "b1"), ("user", "Really?"), ("assistant", "b2")]
        assert seen["conversations_second"][0] == [message(*one) for one in said]
        assert (seen["turns"], seen["categories"]) == ([2, 1], ["math", "writing"])
        assert seen["references"] == [["r1", "r2"], None]

    def test_none_is_missing(self) -> None:
        (verdict,) = ruled(FunctionJudge("j", lambda first, second: [None], 8), [ONE])
        assert verdict == (None, "", "", 1, "no verdict")

    def test_an_async_one_is_awaited(self) -> None:
        async def judge(first: list[str], second: list[str]) -> list[str]:
            return ["A"] * len(first)

        assert [verdict.winner for verdict in ruled(FunctionJudge("j", judge, 8), [ONE, TWO])] == ["A", "A"]

    @pytest.mark.parametrize("said", ["A", ["A"], ["A", "B", "C"], {"A": 1, "B": 2}, None, 3, ["A", "a"], ["A", "[[B]]"], ["A", 1], ["A", ["B"]], ["A", ""]])  # fmt: skip
    def test_what_is_no_list_of_verdicts_is_refused(self, said: Any) -> None:
        """In one line that names the function."""
        with pytest.raises(
            SalsaError,
            match=r"^judge j: the function returned .*, but (must return a list of 2 verdicts|a verdict must be A, B, C, tie or None)",
        ):
            ruled(FunctionJudge("j", lambda first: said, 8), [ONE, TWO])

    @pytest.mark.parametrize(
        ("function", "expected"),
        [
            (
                lambda questions, frist: None,
                r"parameter frist is unknown; the function can take the keyword arguments categories, conversations_first",
            ),
            (lambda first, /: None, "parameter first is positional-only"),
        ],
    )
    def test_what_it_takes_is_seen_before_it_is_called(self, function: Callable[..., Any], expected: str) -> None:
        with pytest.raises(SalsaError, match=expected):
            FunctionJudge("j", function, 8)
        FunctionJudge("j", lambda first, other=1: None, 8)  # a default will do

    def test_no_such_function(self, tmp_path: Path) -> None:
        (tmp_path / "empty_judge.py").write_text("")
        with pytest.raises(SalsaError, match=r"empty_judge\.py has no judge"):
            judge_of(Judge(kind="function", model=f"{tmp_path}/empty_judge:judge"), cache=None, say=quiet)


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


class TestKeptVerdicts:
    """A function's verdicts in the cache's file."""

    SOURCE = (
        "seen = []\n"
        "def first_wins(first, second):\n"
        "    seen.extend(first)\n"
        "    if 'fatal' in first:\n"
        "        raise RuntimeError('stop')\n"
        "    return [None if one == 'mute' else 'A' for one in first]\n"
    )

    @pytest.fixture
    def made(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
        """The judge with this text as its file, and the cache of the test; and the answers that it was shown."""
        monkeypatch.setattr(sys, "path", [*sys.path])
        monkeypatch.setattr(sys, "dont_write_bytecode", True)  # files of one size, written in one second

        def make(text: str) -> tuple[FunctionJudge, list[str]]:
            (tmp_path / "kept_judge.py").write_text(text)
            monkeypatch.delitem(sys.modules, "kept_judge", raising=False)
            section = Judge(kind="function", model=f"{tmp_path}/kept_judge.py:first_wins", concurrency=2)
            judge: Any = judge_of(section, cache=tmp_path / "cache.sqlite", say=quiet)
            return judge, sys.modules["kept_judge"].seen

        return make

    def test_a_killed_one_is_asked_for_the_rest_only(self, made: Callable[[str], Any]) -> None:
        """Calls that returned are never repeated; no verdict is asked for again."""
        games = [ONE._replace(a=(text,)) for text in ("one", "mute", "fatal", "two", "three")]
        with pytest.raises(RuntimeError):
            made(self.SOURCE)[0](games, lambda count: None)
        judge, seen = made(self.SOURCE.replace("fatal", "never"))
        assert [verdict.winner for verdict in ruled(judge, games)] == [
            "A",
            None,
            "A",
            "A",
            "A",
        ]  # another file: all again
        assert len(seen) == 5
        judge, seen = made(self.SOURCE.replace("fatal", "never"))
        assert [verdict.winner for verdict in ruled(judge, games)] == ["A", None, "A", "A", "A"]
        assert seen == ["mute"] and judge.calls["cached"] == 4
        judge, seen = made(self.SOURCE)
        with pytest.raises(RuntimeError):
            judge(games, lambda count: None)
        assert seen == ["mute", "fatal"]  # the first call of the run that failed had been kept

    def test_the_orders_of_a_pair_are_two_verdicts(self, made: Callable[[str], Any]) -> None:
        judge, seen = made(self.SOURCE)
        ruled(judge, [ONE, ONE._replace(a=ONE.b, b=ONE.a), ONE._replace(category="math")])
        assert seen == ["first", "second", "first"]
