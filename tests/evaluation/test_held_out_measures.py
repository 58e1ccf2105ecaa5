"""Rewards of weight 0 as measures of the evaluation: their scores, answers to which they do not apply, and their figures."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from synthetic_run import synthetic

from salsa_peft.config.schema import Evaluate, Generation, Model
from salsa_peft.data.questions import Question
from salsa_peft.evaluation import comparisons, evaluate, landscape, reward_quality
from salsa_peft.evaluation.answers import HeldOut, answer
from salsa_peft.models.rewards.function import FunctionReward
from salsa_peft.models.rewards.reward import WeightedReward
from salsa_peft.report import plots
from salsa_peft.report.sections.frontier import frontier
from salsa_peft.utils.statistics import mean_interval


def one(prompts: list[Any], **_: Any) -> list[float]:
    return [1.0] * len(prompts)


def of_copies(prompts: list[Any], **_: Any) -> list[float | None]:
    """The number of words of an instruction to copy; no score for other instructions."""
    texts = [prompt[0]["content"] for prompt in prompts]
    return [float(len(text.split())) if text.startswith("copy") else None for text in texts]


TEXTS = ("copy owl", "kin owl", "copy owl saw cod", "kin saw")


def rows_of(tokenizer: Any, make_base: Any, texts: tuple[str, ...] = TEXTS) -> list[dict[str, Any]]:
    recipe = SimpleNamespace(
        generation=Generation(max_new_tokens=4, batch_size=3), model=Model(max_length=64), evaluate=Evaluate()
    )
    context: Any = SimpleNamespace(recipe=recipe, tokenizer=tokenizer)
    asked = [
        Question(at, None, [{"role": "user", "content": text}], (text,), None, {}) for at, text in enumerate(texts)
    ]
    rewards = {name: FunctionReward(function, tokenizer) for name, function in (("one", one), ("copies", of_copies))}
    measures = {"reward": rewards["one"], "copies": HeldOut(rewards["copies"])}
    return answer(make_base(), None, asked, measures, context, 0)


def test_an_answer_without_a_score_has_none(make_base: Any, tokenizer: Any) -> None:
    """And the others have theirs, whatever the batch."""
    rows = rows_of(tokenizer, make_base)
    assert [row["scores"] for row in rows] == [
        {"reward": 1.0, "copies": 2.0}, {"reward": 1.0}, {"reward": 1.0, "copies": 4.0}, {"reward": 1.0},
    ]  # fmt: skip


def answers_of(*scores: dict[str, float]) -> list[dict[str, Any]]:
    return [{"index": at, "turn": 1, "scores": each, "length": 3, "empty": False} for at, each in enumerate(scores)]


def test_means_and_comparisons_are_over_the_answers_that_have_a_score() -> None:
    """A pair of answers counts where both have one; a measure that no answer has is left out."""
    a = answers_of({"reward": 1.0, "gold": 5.0}, {"reward": 1.0}, {"reward": 4.0, "gold": 2.0})
    b = answers_of({"reward": 1.0, "gold": 3.0}, {"reward": 0.0, "gold": 9.0}, {"reward": 1.0, "gold": 3.0})
    c = answers_of({"reward": 0.0}, {"reward": 0.0}, {"reward": 0.0})
    found = evaluate.summarize({"a": a, "b": b, "c": c}, ["reward", "gold"])["models"]
    assert found["a"]["scores"]["gold"]["mean"] == mean_interval([5.0, 2.0]).mean == 3.5
    assert (found["a"]["scores"]["gold"]["n"], found["b"]["scores"]["gold"]["n"]) == (2, 3)
    assert found["a"]["scores"]["reward"]["mean"] == 2.0 and set(found["c"]["scores"]) == {"reward"}
    pairs = comparisons.pairs({"a": a, "b": b, "c": c}, [("a", "b"), ("a", "c")], ["reward", "gold"])
    assert [(pair["a"], pair["b"], pair["measure"]) for pair in pairs] == [
        ("a", "b", "reward"), ("a", "b", "gold"), ("a", "c", "reward"),
    ]  # fmt: skip
    gold = pairs[1]
    assert (gold["wins"], gold["losses"], gold["difference"]["mean"], gold["difference"]["n"]) == (1, 1, 0.5, 2)


def test_a_recipes_parts_of_weight_zero_are_measures(
    make_base: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`reward` is what the policies maximize, without them."""
    parts = [(FunctionReward(f, tokenizer), weight, f.__name__) for f, weight in ((one, 3.0), (of_copies, 0.0))]
    monkeypatch.setattr(landscape, "recipe_reward", lambda *_: WeightedReward(parts))
    job: Any = SimpleNamespace(
        recipe=SimpleNamespace(toy=None, generation=Generation(), measures_parts=False), inputs={}
    )
    found = landscape.measures(job, make_base(), SimpleNamespace(tokenizer=tokenizer))  # type: ignore[arg-type]
    assert list(found) == ["reward", "of_copies"]
    assert isinstance(found["of_copies"], HeldOut) and found["of_copies"].reward is parts[1][0]
    assert [(part.name, part.weight) for part in found["reward"].parts] == [("one", 3.0)]  # type: ignore[union-attr]


def test_the_landscape_has_only_measures_of_all_answers(
    make_base: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for texts, measures in ((TEXTS, {"reward"}), (TEXTS[::2], {"reward", "copies"})):
        rows = rows_of(tokenizer, make_base, texts)
        monkeypatch.setattr(landscape, "answer", lambda *_, found=rows: found)
        rewards: Any = {"reward": None, "copies": None}
        found = landscape.mean_scores(None, None, [], rewards, None, 0)  # type: ignore[arg-type]
        assert set(found) == measures
    assert found["copies"]["mean"] == 3.0


def test_the_rewards_quality_is_measured_beside_them(make_base: Any, tokenizer: Any) -> None:
    """An answer to which a held-out reward does not apply has no score of it."""
    recipe = SimpleNamespace(
        generation=Generation(max_new_tokens=4, batch_size=3),
        reward=SimpleNamespace(quality_responses=2),
        ppo=SimpleNamespace(seed=0),
    )
    prompts = [{"prompt": [{"role": "user", "content": text}]} for text in TEXTS[:2]]
    rewards = {"reward": FunctionReward(one, tokenizer), "copies": HeldOut(FunctionReward(of_copies, tokenizer))}
    job: Any = SimpleNamespace(recipe=recipe, unit=SimpleNamespace(id="reward_quality"))
    context: Any = SimpleNamespace(tokenizer=tokenizer)
    rows = reward_quality.sample(job, context, prompts, make_base(), None, rewards)
    assert [row["scores"] for row in rows] == [{"reward": 1.0, "copies": 2.0}] * 2 + [{"reward": 1.0}] * 2


def test_a_held_out_reward_is_drawn_over_training_and_against_the_kl() -> None:
    """One curve a part; the frontier's path has its values, if every policy logged it."""
    run = synthetic(n=30, policies=("ppo", "salsa"), small=True)
    names = [panel.name for panel in plots.draw(run)["training"]]
    assert (frontier([run]) or {})["on"] == "in"  # not logged: by scores on the first set
    logged = {
        name: replace(
            policy,
            metrics=[{**row, "rewards/adapter/mean": 1.0, "rewards/gold/mean": 0.1 * i} for i, row in enumerate(policy.metrics)],
        )
        for name, policy in run.policies.items()
    }  # fmt: skip
    run = replace(run, policies=logged)
    assert [panel.name for panel in plots.draw(run)["training"]] == [*names, "training-adapter", "training-gold"]
    found = frontier([run])
    assert found and found["on"] == "training" and len(found["policies"]) == 2
    assert all(one["path"][25][1] == pytest.approx(2.5) for one in found["policies"])
