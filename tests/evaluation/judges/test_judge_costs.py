"""What a judge will be asked, counted by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from salsa_peft.config.load import load_recipe
from salsa_peft.evaluation.judges.costs import INSTRUCTION, VERDICT, cost


@pytest.fixture
def recipe(tmp_path: Path) -> Any:
    """recipe(overrides…) → the quickstart with one set of two questions, three turns in all, and the judge reward."""
    rows = [{"turns": ["x" * 40, "y" * 80]}, {"prompt": "z"}]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(*overrides: str) -> Any:
        sets = f"evaluate.prompts={{mine: {tmp_path / 'q.jsonl'}}}"
        common = [sets, "evaluate.judge=reward", "evaluate.pairs=[[salsa, ppo], [ppo, seed-0]]", "landscape=null"]
        return load_recipe("quickstart", lora="lora", overrides=[*common, *overrides]).recipe

    return make


def test_calls_are_pairs_times_turns_times_two_orders(recipe: Any) -> None:
    """Two pairs, three turns; the tokens at most, for answers of 10 tokens."""
    found = cost(recipe(), None)
    assert found is not None
    other = len(json.dumps({"prompt": "z"})) // 4
    shown = (10 + 20) + (30 + 40) + (other + 20)
    assert found == (2 * 2 * 3, 2 * 2 * (shown + 3 * INSTRUCTION), 2 * 2 * 3 * VERDICT, False)
    assert cost(recipe("evaluate.prompts.mine.limit=1"), None)[0] == 2 * 2 * 2  # type: ignore[index]


def test_a_search_by_the_judge_is_counted_too(recipe: Any) -> None:
    """Two candidates against seed-0, beside the pairs."""
    found = cost(recipe("search={kl_coef: [0.1, 0.2], methods: [salsa], by: judge}"), None)
    assert found is not None and found.calls == 2 * (2 + 2) * 3
    by_reward = cost(recipe("search={kl_coef: [0.1, 0.2], methods: [salsa]}"), None)
    assert by_reward is not None and by_reward.calls == 2 * 2 * 3


def test_the_papers_sets_are_known(recipe: Any) -> None:
    """160 turns of MT-Bench, 500 questions of Arena-Hard, 2,000 of UltraFeedback's test set, as Tables 2 to 4 count them."""
    found = cost(load_recipe("mistral_full", lora=None, overrides=[]).recipe, None)
    assert found is not None and found.calls == 2 * 4 * (160 + 500 + 2000) + 2 * 64  # the best of n on 64 prompts


def test_the_best_of_n_is_counted_too(recipe: Any) -> None:
    """Both orders of each prompt, at most; not where the judge is the reward itself or nothing is measured."""
    function = ("evaluate.judge={kind: openai, model: me}", "reward.quality_prompts=5")
    found, without = (cost(recipe(*function, *more), None) for more in ((), ("reward.quality_prompts=0",)))
    assert found is not None and without is not None and without.calls == 2 * 2 * 3
    assert (found.calls, found.tokens_out) == (12 + 10, 22 * VERDICT)
    assert found.tokens_in == without.tokens_in + 10 * (32 + 10 + INSTRUCTION)


def test_other_questions_of_the_hub_are_not_known_yet(recipe: Any) -> None:
    """Nor those of the embedded world before it is there."""
    assert cost(recipe("evaluate.prompts={mine: me/questions}"), None) is None
    assert cost(load_recipe("quickstart", lora="lora", overrides=["evaluate.judge=reward"]).recipe, None) is None


def test_answers_that_are_there_are_counted_as_they_are(recipe: Any, tmp_path: Path) -> None:
    """A second turn is judged with the first in view."""
    rows = [
        {"dataset": "mine", "model": model, "index": 0, "turn": turn, "prompt": "p" * 4 * turn, "length": length}
        for model, lengths in (("salsa", (10, 3)), ("ppo", (20, 5)))
        for turn, length in enumerate(lengths, 1)
    ]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = cost(recipe(), tmp_path / "answers.jsonl")
    first, second = 1 + 30, 2 + 8
    assert found == (2 * 2 * 2, 2 * 2 * (first + first + second + 2 * INSTRUCTION), 2 * 2 * 2 * VERDICT, True)
