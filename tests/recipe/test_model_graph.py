"""Models made from models: starts, soups of policies, EMA references, own rewards and settings, WARP, rewarded soups."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from inline_stages import inline_stages
from safetensors.torch import load_file
from small_recipe import SMALL, read, unit
from torch import Tensor

from salsa_peft.config.job import recipe_of_policy
from salsa_peft.config.load import load_recipe
from salsa_peft.recipe import run as runs
from salsa_peft.recipe.replicates import replicate
from salsa_peft.recipe.run import STAGES
from salsa_peft.recipe.units import in_order
from salsa_peft.report.gather import identity
from salsa_peft.utils.errors import SalsaError

REWARDS = """
def brevity(completions, **_):
    return [-len(completion[0]["content"]) / 20 for completion in completions]


def vowels(completions, **_):
    return [float(completion[0]["content"].count("a")) for completion in completions]
"""
SETTINGS: dict[str, Any] = {
    **{key: value for key, value in SMALL.items() if key.startswith("toy.")},
    "toy.prompts": 16,
    "sft.seeds": [0, 1],
    "sft.num_train_epochs": 1,
    "generation.max_new_tokens": 8,
    "ppo.batch_size": 16,
    "ppo.num_mini_batches": 2,
    "ppo.num_ppo_epochs": 1,
    "ppo.num_train_epochs": 2,
    "reward.model": [{"model": "rewards:brevity", "weight": 0.5}, {"model": "rewards:vowels", "weight": 0.5}],
    "reward.quality_prompts": 0,
    "policies": {
        "ppo": {"reference": "seed-0"},
        "still": {"start": "ppo", "reference": "mixed", "kl_coef": 0.5,
                  "overrides": {"learning_rate": 1e-12, "seed": 7, "min_new_tokens": 3}},
    },
    "soups": {"mixed": {"members": ["ppo", "soup"], "weights": [0.25, 0.75]}},
    "warp": {"iterations": 2, "policies": 2, "interpolation": 0.4, "rank": 40, "ema_decay": 0.9, "sweep": [0.25]},
    "rewarded_soups": {"rewards": ["brevity", "vowels"], "weights": [0.3], "scalarized": [0.5]},
    "landscape": {"line": ["ppo", "soup"], "plane": None, "alphas": [0.0, 0.5], "scales": [], "limit": 4},
    "evaluate": {"models": []},
}  # fmt: skip


MADE = ("toy", "data", "sft", "soup", "soups", "ppo", "landscape", "evaluate")


def load(folder: Path, **changed: Any) -> Any:
    """The quickstart with SETTINGS and `changed` (. for __)."""
    (folder / "rewards.py").write_text(REWARDS)
    settings = SETTINGS | {key.replace("__", "."): value for key, value in changed.items()}
    lines = [f"{key}={json.dumps(value)}".replace("rewards:", f"{folder}/rewards:") for key, value in settings.items()]
    return load_recipe("quickstart", lora="lora", overrides=lines)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("graph")
    with inline_stages():
        runs.run(load(folder), folder / "run", only=list(MADE))
    return folder / "run"


def deltas(folder: Path) -> dict[str, Tensor]:
    """scaling · B · A of each module, in float64."""
    config, weights = read(folder / "adapter_config.json"), load_file(folder / "adapter_model.safetensors")
    found = {}
    for name, A in weights.items():
        if ".lora_A." in name:
            module = name.split(".lora_A.")[0]
            rank = config.get("rank_pattern", {}).get(module.removeprefix("base_model.model."), config["r"])
            alpha = config.get("alpha_pattern", {}).get(module.removeprefix("base_model.model."), config["lora_alpha"])
            B = weights[name.replace(".lora_A.", ".lora_B.")].double()
            found[module] = alpha / rank * B @ A.double()
    return found


def close(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for module, delta in found.items():
        torch.testing.assert_close(delta, wanted[module], atol=1e-5, rtol=0)


def slerp(start: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """WARP's merge of two models in one layer, with weight ½: start + (sin(Ω/2) / sin Ω) · (δ_1 + δ_2)."""
    first, second = one - start, other - start
    angle = math.acos(float((first * second).sum() / first.norm() / second.norm()))
    return start + math.sin(angle / 2) / math.sin(angle) * (first + second)


def test_a_soup_of_a_policy_and_a_soup(finished: Path) -> None:
    ppo, soup = (deltas(unit(finished, name)) for name in ("ppo/ppo", "soup"))
    close(deltas(unit(finished, "soups/mixed")), {name: 0.25 * ppo[name] + 0.75 * soup[name] for name in ppo})
    assert read(finished / "results.json")["mixed"]["unit"] == "soups/mixed"


def test_a_policy_starts_where_it_is_told_with_its_own_settings(finished: Path) -> None:
    """With a learning rate of almost 0 it ends where the other policy ended."""
    ppo, still = unit(finished, "ppo/ppo"), unit(finished, "ppo/still")
    close(deltas(still), deltas(ppo))
    seed = deltas(unit(finished, "sft/seed-0"))
    assert max(float((delta - seed[name]).abs().max()) for name, delta in deltas(ppo).items()) > 1e-3
    facts = read(still / "policy.json")
    assert (facts["kl_coef"]["start"], facts["reference"]) == (0.5, "mixed")
    rows = [json.loads(line) for line in (still / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["objective/kl"] != 0 and min(row["objective/response_length"] for row in rows) >= 3


def test_warp_merges_and_interpolates_as_its_formulas_say(finished: Path) -> None:
    """Slerp in each layer, LITI between the iterations, and the sweep at the end, on dense weights."""
    start = deltas(unit(finished, "sft/seed-0"))
    for iteration, soup, eta in ((1, "warp-1", 0.4), (2, "warp", 1.0)):
        one, other = (deltas(unit(finished, f"ppo/warp-{iteration}-{number}")) for number in (1, 2))
        merged = {name: slerp(start[name], one[name], other[name]) for name in start}
        wanted = {name: (1 - eta) * start[name] + eta * delta for name, delta in merged.items()}
        close(deltas(unit(finished, f"soups/{soup}")), wanted)
        start = deltas(unit(finished, f"soups/{soup}"))
    seed = deltas(unit(finished, "sft/seed-0"))
    close(
        deltas(unit(finished, "soups/warp-eta-0.25")),
        {name: 0.75 * seed[name] + 0.25 * start[name] for name in seed},
    )


def test_warps_policies_follow_their_ema(finished: Path) -> None:
    """The KL to the EMA is zero at the start and not after the first update; the two policies differ."""
    for name in ("warp-1-1", "warp-2-2"):
        rows = [json.loads(line) for line in (unit(finished, f"ppo/{name}") / "metrics.jsonl").read_text().splitlines()]
        assert rows[0]["objective/kl"] == pytest.approx(0, abs=1e-5) and abs(rows[1]["objective/kl"]) > 1e-5
        assert read(unit(finished, f"ppo/{name}") / "policy.json")["reference"] == "EMA of the policy (decay 0.9)"
    one, other = (deltas(unit(finished, f"ppo/warp-1-{number}")) for number in (1, 2))
    assert max(float((one[name] - other[name]).abs().max()) for name in one) > 1e-4


def test_each_reward_is_measured_and_trained_on_alone(finished: Path) -> None:
    evaluation = read(unit(finished, "evaluate") / "evaluation.json")
    assert evaluation["measures"] == ["reward", "brevity", "vowels", "gold"]
    scores = evaluation["datasets"]["in"]["models"]["ppo"]["scores"]
    mean = 0.5 * scores["brevity"]["mean"] + 0.5 * scores["vowels"]["mean"]
    assert scores["reward"]["mean"] == pytest.approx(mean)
    rows = {
        name: json.loads((unit(finished, f"ppo/{name}") / "metrics.jsonl").read_text().splitlines()[0])
        for name in ("ppo", "rewarded-brevity", "morl-0.5")
    }
    assert "rewards/vowels/mean" in rows["morl-0.5"] and "rewards/vowels/mean" not in rows["rewarded-brevity"]
    assert rows["ppo"]["objective/scores"] == pytest.approx(rows["morl-0.5"]["objective/scores"])
    ends = [deltas(unit(finished, f"ppo/rewarded-{name}")) for name in ("brevity", "vowels")]
    close(
        deltas(unit(finished, "soups/rewarded-soup-0.3")),
        {name: 0.7 * ends[0][name] + 0.3 * ends[1][name] for name in ends[0]},
    )


def test_a_landscape_between_a_policy_and_a_soup(finished: Path) -> None:
    (line,) = read(unit(finished, "landscape") / "landscape.json")["lines"]
    assert line["ends"] == ["ppo", "soup"]


def test_a_saved_recipe_is_the_same_recipe(finished: Path) -> None:
    again = load_recipe(str(finished / "recipe.yaml"), lora=None, overrides=[])
    work = in_order(unit for stage in STAGES.values() for unit in stage.units(again.recipe, stage.run))
    plan = runs.make_plan(work, finished, set(), {unit.id for unit in work}, None)
    assert [name for name, planned in plan.items() if planned.why is not None] == ["report"]


def test_a_saved_recipe_can_be_changed(finished: Path) -> None:
    """What `warp` and `rewarded_soups` stand for is not written down, so that their keys still count."""

    def models(*sets: str) -> set[str]:
        recipe = load_recipe(str(finished / "recipe.yaml"), lora=None, overrides=[*sets]).recipe
        return {*recipe.policies, *recipe.soups}

    own = {"ppo", "still", "mixed", "rewarded-brevity", "rewarded-vowels", "rewarded-soup-0.3", "morl-0.5"}
    assert models("warp=null") == own
    assert models("warp={iterations: 1, policies: 2}") == own | {"warp-1-1", "warp-1-2", "warp"}
    changed = load_recipe(str(finished / "recipe.yaml"), lora=None, overrides=["policies.warp-1-2.kl_coef=0.7"]).recipe
    assert (changed.policies["warp-1-2"].kl_coef, changed.policies["warp-1-1"].kl_coef) == (0.7, None)
    assert [changed.policies[f"warp-1-{place}"].overrides["seed"] for place in (1, 2)] == [0, 1]
    seeded = load_recipe(str(finished / "recipe.yaml"), lora=None, overrides=["warp.overrides={seed: 40}"]).recipe
    assert [seeded.policies[f"warp-2-{place}"].overrides["seed"] for place in (1, 2)] == [42, 43]


def test_units_come_after_what_they_read(tmp_path: Path) -> None:
    recipe = load(tmp_path).recipe
    names = [unit.id for unit in in_order(u for stage in STAGES.values() for u in stage.units(recipe, stage.run))]
    order = [
        "sft/seed-0",
        "ppo/warp-1-2",
        "soups/warp-1",
        "ppo/warp-2-1",
        "soups/warp",
        "soups/warp-eta-0.25",
        "evaluate",
    ]
    assert [name for name in names if name in order] == order
    assert names.index("soup") < names.index("ppo/ppo") < names.index("soups/mixed") < names.index("ppo/still")


def test_what_a_policys_own_settings_change(tmp_path: Path) -> None:
    recipe = load(tmp_path).recipe
    own = recipe_of_policy(recipe, "still")
    assert (own.ppo.learning_rate, own.ppo.seed, own.ppo.kl_coef, own.generation.min_new_tokens) == (1e-12, 7, 0.5, 3)
    assert recipe_of_policy(own, "still") == own
    weights = {part.name: part.weight for part in recipe_of_policy(recipe, "rewarded-vowels").reward.parts}
    assert weights == {"vowels": 1.0}
    moved = replicate(recipe, 2)
    assert recipe_of_policy(moved, "still").ppo.seed == 2007 and moved.ppo.seed == 2000
    assert identity(moved)[0] == identity(recipe)[0] and identity(moved)[1] != identity(recipe)[1]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"soups": {"a": {"members": ["b", 0]}, "b": {"members": ["a"]}}}, "soups.a: is made from itself (a ← b ← a)"),
        ({"policies": {"a": {"reference": "soup"}}, "soup__members": ["a", 0]}, "soup: is made from itself (soup ← a ← soup)"),
        ({"policies": {"a": {"reference": "seed-0", "start": "a"}}}, "policies.a: is made from itself (a ← a)"),
        ({"policies": {"a": {"reference": "seed-0", "start": "pppo"}, "ppo": {"reference": "base"}}}, "did you mean ppo?"),
        ({"policies": {"a": {"reference": "seed-0", "start": "seed-5"}}}, "policies.a.start: there is no seed-5"),
        ({"soups": {"a": {"members": ["seed-0", 0]}}}, "soups.a.members: ['seed-0', 'seed-0'] has a repeated entry"),
        ({"soups": {"a": {"members": ["ppoo", 0]}}}, "soups.a.members: must be seed-N, soup, a soup of `soups`, a policy"),
        ({"soups": {"reward": {"members": [0]}}}, "soups.reward: is the name of another model of the run"),
        ({"policies": {"a": {"reference": {"ema": {"decay": 1}}}}}, "reference.ema: must have the form {decay: 0.99}"),
        ({"evaluate__controls": {"c": {"ema": {"decay": 0.9}}}}, "only a policy's reference can be an EMA of the policy"),
        ({"policies": {"a": {"reference": "base", "overrides": {"lr": 1}}}}, "policies.a.overrides.lr: unknown key"),
        ({"policies": {"a": {"reference": "base", "overrides": {"seed": "x"}}}}, "policies.a.overrides.seed: must be"),
        ({"policies": {"a": {"reference": "base", "overrides": {"kl_coef": 1}}}}, "must be policies.a.kl_coef"),
        ({"policies": {"a": {"reference": "base", "overrides": {"batch_size": 7}}}}, "policies.a.overrides: ppo.batch_size"),
        ({"policies": {"a": {"reference": "base", "reward": {"vowel": 1}}}}, "policies.a.reward.vowel: reward.model has no"),
        ({"policies": {"a": {"reference": "base", "reward": {"vowels": 0}}}}, "policies.a.reward: reward.model: all weights are 0"),
        ({"warp": {"policies": 1}}, "warp.policies: must be at least 2"),
        ({"warp": {"iterations": 200000}}, "warp: 200000 iterations × 2 policies are more than"),
        ({"warp": {"sweep": [0.5, 0.5]}}, "warp.sweep: [0.5, 0.5] has a repeated entry"),
        ({"rewarded_soups": {"rewards": ["brevity"]}}, "rewarded_soups.rewards: must have at least 2"),
        ({"rewarded_soups": {"rewards": ["brevity", "x"]}}, "rewarded_soups.rewards: x: reward.model has no such part"),
        ({"rewarded_soups": {"rewards": ["vowels", "vowels"]}}, "rewarded_soups.rewards: ['vowels', 'vowels'] has a repeated"),
        ({"reward__model": [{"model": "rewards:brevity", "weight": -1}, "rewards:vowels"],
          "rewarded_soups": {"rewards": ["brevity", "vowels"]}}, "brevity has weight -1 in reward.model, but must have one"),
        ({"policies": {"a": {"reference": "base", "reward": {}}}}, "policies.a.reward: has no weights"),
        ({"policies": {"a": {"reference": "base", "overrides": {"eval_prompts": "x"}}}}, "evaluate.prompts has no 'x'"),
        ({"policies": {"a": {"reference": "base", "overrides": {"guards": {"over_optimization": "stop"}}}}},
         "policies.a.overrides: ppo.guards.over_optimization: never raises an alarm"),
        ({"policies": {"a": {"reference": "base"}, "A": {"reference": "base"}}}, "'a' and 'A' differ only in case"),
        ({"landscape__line": ["ppo", "x"]}, "landscape.line: must be seed-N, soup"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_a_line(tmp_path: Path, changed: dict[str, Any], said: str) -> None:
    base: dict[str, Any] = {"soups": {}, "warp": None, "rewarded_soups": None, "policies": {}, "landscape__line": None}
    with pytest.raises(SalsaError) as error:
        load(tmp_path, **(base | changed))
    assert said in str(error.value)
