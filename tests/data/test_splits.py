"""Held-out pairs: whole prompts, the nearest number, the same in every stage."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest

from salsa_peft.data.splits import prompt_digest, split_by_prompt
from salsa_peft.recipe.__main__ import main as salsa_run
from salsa_peft.utils.errors import SalsaError


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def pair(*prompt: Any, chosen: str = "+", rejected: str = "-", **more: Any) -> dict[str, Any]:
    return {"chosen": [*prompt, assistant(chosen)], "rejected": [*prompt, assistant(rejected)], **more}


class TestSplit:
    def test_distinct_prompts_are_split_as_by_train_test_split(self) -> None:
        """In the same order too, so that a run whose prompts are distinct has the result that it had before."""
        from datasets import Dataset

        for rows, held_out in ((2, 1), (10, 3), (1000, 50)):
            theirs = Dataset.from_dict({"row": range(rows)}).train_test_split(test_size=held_out, seed=0)
            ours = split_by_prompt([f"prompt {row}" for row in range(rows)], held_out)
            assert (ours.train, ours.held_out) == (theirs["train"]["row"][:], theirs["test"]["row"][:])

    def test_no_prompt_is_on_both_sides_and_the_number_is_the_nearest(self) -> None:
        """Against every subset of the prompts, for 400 data sets of up to eight prompts of 1 to 8 pairs."""
        rng = random.Random(0)
        for _ in range(400):
            sizes = [rng.choice([1, 2, 3, 5, 8]) for _ in range(rng.randint(2, 8))]
            prompts = [prompt for prompt, size in enumerate(sizes) for _ in range(size)]
            rng.shuffle(prompts)
            wanted = rng.randint(1, len(prompts) - 1)
            train, held_out = split_by_prompt(prompts, wanted)
            assert not {prompts[row] for row in train} & {prompts[row] for row in held_out}
            assert sorted(train + held_out) == list(range(len(prompts)))
            sums = {sum(some) for n in range(1, len(sizes)) for some in itertools.combinations(sizes, n)}
            assert abs(len(held_out) - wanted) == min(abs(number - wanted) for number in sums), (sizes, wanted)
            assert split_by_prompt(prompts, wanted) == (train, held_out)

    def test_ultrafeedbacks_shape(self) -> None:
        """60,000 pairs of four a prompt: 3,000 of 3,001 asked; shuffled, neither the first nor the last prompts."""
        prompts = [row // 4 for row in range(60_000)]
        train, held_out = split_by_prompt(prompts, 3_001)
        assert (len(train), len(held_out)) == (57_000, 3_000)
        chosen = {prompts[row] for row in held_out}
        assert min(chosen) < 100 and max(chosen) > 14_900 and len(chosen) == 750

    @pytest.mark.parametrize(("sizes", "wanted", "found"), [((5, 5), 1, 5), ((1, 9), 9, 9), ((4, 6), 5, 4), ((2, 2, 2), 5, 4)])  # fmt: skip
    def test_by_hand(self, sizes: tuple[int, ...], wanted: int, found: int) -> None:
        """Never none, never all; of two equally near numbers the smaller one."""
        prompts = [prompt for prompt, size in enumerate(sizes) for _ in range(size)]
        assert len(split_by_prompt(prompts, wanted).held_out) == found

    def test_a_single_prompt_is_refused(self) -> None:
        with pytest.raises(
            SalsaError, match=r"data\.preferences: all 3 pairs have the same prompt, so no pairs can be held"
        ):
            split_by_prompt(["same"] * 3, 1)


class TestBeforeAStage:
    """Where data are checked: by --dry-run, and before anything is loaded."""

    @pytest.fixture
    def check(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
        """check(prompts, words) → code and standard error of a dry run of the quickstart with a pair of each prompt."""
        monkeypatch.chdir(tmp_path)

        def run(prompts: list[str], *words: str) -> tuple[int, str]:
            rows = [{"prompt": prompt, "chosen": "+", "rejected": f"-{place}"} for place, prompt in enumerate(prompts)]
            Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            sets = ["data.preferences=pairs.jsonl", "reward.batch_size=8", "reward.held_out=0.05", *words]
            given = [word for one in sets for word in ("--set", one)]
            return salsa_run(["quickstart", "--lora", "--dry-run", *given]), capsys.readouterr().err

        return run

    def test_one_prompt(self, check: Any) -> None:
        """Code 2, for each stage that holds pairs out; not if none does."""
        policies = "policies={p: {algorithm: kto, reference: seed-0}}"
        for words in ((), ("reward=gold:gold", policies, "kto.batch_size=8")):
            if words:
                Path("gold.py").write_text("def gold(completions, **_):\n    return [0.0] * len(completions)\n")
            code, err = check(["q"] * 40, *words)
            assert code == 2 and err.count("\n") == 1
            assert err.startswith("data.preferences: all 40 pairs have the same prompt, so no pairs can be held out")
        assert check(["q"] * 40, "reward=gold:gold")[0] == 0

    def test_too_few_are_left(self, check: Any) -> None:
        """Of two prompts one is held out."""
        code, err = check(["a"] * 35 + ["b"] * 5, "reward.batch_size=36")
        assert code == 2 and "40 pairs, 5 of them held out (reward.held_out 0.05), are too few for" in err
        assert check(["a"] * 35 + ["b"] * 5, "reward.batch_size=35")[0] == 0

    def test_many_more_are_held_out_than_asked(self, check: Any) -> None:
        """Said in one line, and only then."""
        code, err = check(["a", "b"] * 20)
        assert code == 0 and err == (
            "data.preferences: reward holds out 20 of 40 pairs (50%) and not 2 (reward.held_out 0.05), because all pairs of a"
            " prompt stay together and there are 2 prompts; pairs of more prompts bring it nearer\n"
        )
        assert check([str(place // 4) for place in range(40)]) == (0, "")  # 4 of 40, twice as many
        assert check(["a", "b"] * 20, "reward.held_out=0.4") == (0, "")


class TestPrompt:
    def test_the_turns_in_common_are_the_prompt(self) -> None:
        """Whatever the answers, blanks around texts, parts in place of text, tools."""
        first = prompt_digest(pair(user("q")))
        assert first == prompt_digest(pair(user("q"), chosen="a", rejected="b"))
        assert first == prompt_digest(pair(user(" q\n")))
        assert first == prompt_digest(pair({"role": "user", "content": [{"type": "text", "text": "q"}]}))
        assert first == prompt_digest(pair(user("q"), tools=[{"type": "function"}]))
        later = {
            "chosen": [user("q"), assistant("a"), user("r"), assistant("c")],
            "rejected": [user("q"), assistant("b")],
        }
        assert first == prompt_digest(later)

    def test_other_prompts(self) -> None:
        """Another text, a system turn, an earlier exchange, another role, words moved between turns."""
        prompts = [[user("q")], [user("r")], [{"role": "system", "content": "s"}, user("q")], [user("q"), assistant("a"), user("q")],
                   [user("q a"), user("q")], [user("q"), user("a q")], [{"role": "tool", "content": "q"}]]  # fmt: skip
        assert len({prompt_digest(pair(*prompt)) for prompt in prompts}) == len(prompts)
