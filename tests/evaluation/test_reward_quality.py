"""The stage reward_quality, and the reward's centring, on the quickstart cut small."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from inline_stages import inline_stages
from peft import PeftModel
from small_recipe import SMALL, read, unit
from transformers import AutoModelForCausalLM, AutoTokenizer

from salsa_peft.config.load import load_recipe
from salsa_peft.config.options.ppo import Sampling
from salsa_peft.data.toy_language import grade
from salsa_peft.evaluation import reward_quality
from salsa_peft.models.generation import generate_batches
from salsa_peft.models.rewards.function import decode
from salsa_peft.models.rewards.quality import between_prompt_share
from salsa_peft.recipe.__main__ import main as salsa_run
from salsa_peft.recipe.run import STAGES

SETS = SMALL | {
    "toy.pretrain_steps": 150, "sft.seeds": [0, 1], "policies": {"ppo": {"reference": "seed-0"}}, "landscape": None, "export": [],
    "reward.quality_prompts": 10, "reward.quality_responses": 3, "reward.batch_size": 8, "generation.batch_size": 7, "soup.members": [0, 1],
}  # fmt: skip
MEASURED = "toy,data,sft,reward,reward_quality"
MODES = {"lora": (["--lora"], {}), "full": ([], {}), "warm": (["--lora"], {"reward.seeds": [0, 1]})}


def command(folder: Path, mode: str, stages: str, **more: Any) -> None:
    """`salsa run` of the cut quickstart, its stages in this process."""
    words, own = MODES[mode]
    sets = [word for key, value in (SETS | own | more).items() for word in ("--set", f"{key}={json.dumps(value)}")]
    with inline_stages():
        assert salsa_run(["quickstart", *words, *sets, "--output-dir", str(folder), "--stages", stages]) == 0


@pytest.fixture(
    scope="module", params=["lora", *(pytest.param(one, marks=pytest.mark.slow) for one in ("full", "warm"))]
)
def run(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder, named after its mode, with what the run printed in said.txt."""
    folder = tmp_path_factory.mktemp("quality") / request.param
    with contextlib.redirect_stderr(io.StringIO()) as said:
        command(folder, request.param, MEASURED)
    (folder / "said.txt").write_text(said.getvalue(), encoding="utf-8")
    return folder


def samples_of(run: Path) -> list[dict[str, Any]]:
    return [
        json.loads(line) for line in (unit(run, "reward_quality") / "samples.jsonl").read_text("utf-8").splitlines()
    ]


def scores_of(run: Path, name: str) -> np.ndarray:
    """(prompts, responses)"""
    return np.array([row["scores"][name] for row in samples_of(run)]).reshape(10, 3)


def test_the_samples_are_seed_0s(run: Path) -> None:
    """Sampled again from the folder that the seed was saved in, with PEFT's or Transformers' own loading."""
    rows, base = samples_of(run), unit(run, "toy") / "base"
    seed, prompts = unit(run, "sft/seed-0"), {row["prompt"] for row in rows}
    known = [json.loads(line)["prompt"][0]["content"] for line in (unit(run, "toy") / "prompts.jsonl").open()]
    assert len(rows) == 30 and prompts <= set(known) and all(rows[at]["prompt"] == rows[at - at % 3]["prompt"] for at in range(30))  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(base)
    plain = AutoModelForCausalLM.from_pretrained(seed if run.name == "full" else base)
    model = plain if run.name == "full" else PeftModel.from_pretrained(plain, seed)
    chats = [[{"role": "user", "content": row["prompt"]}] for row in rows]
    tokens = [tokenizer.apply_chat_template(one, add_generation_prompt=True, return_dict=True)["input_ids"] for one in chats]  # fmt: skip
    found: dict[int, str] = {}
    for places, responses in generate_batches(model.eval(), tokens, Sampling(max_new_tokens=10), tokenizer, 0, 30):
        found |= dict(zip(places, decode(tokenizer, responses.response_ids, responses.content_mask), strict=True))
    assert [found[at] for at in range(30)] == [row["response"] for row in rows]
    assert len({row["response"] for row in rows}) > 10, "the responses to a prompt have seeds of their own"


def test_the_scores_are_those_of_reward_and_gold(run: Path) -> None:
    """Gold by the language's own grading; the reward by Transformers' classifier on the whole chat."""
    from transformers import AutoModelForSequenceClassification

    rows, folder = samples_of(run), unit(run, "reward")
    ended = [row for row in rows if row["length"] == len(row["response"].split()) + 1]  # words alone, and EOS
    assert len(ended) > 10
    assert [row["scores"]["gold"] for row in ended] == pytest.approx([grade(row["prompt"], row["response"]) for row in ended])  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(unit(run, "toy") / "base")
    where = folder if run.name == "full" else unit(run, "toy") / "base"
    plain = AutoModelForSequenceClassification.from_pretrained(where, num_labels=1)
    model = plain if run.name == "full" else PeftModel.from_pretrained(plain, folder)
    chats = [[{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["response"]}] for row in ended]  # fmt: skip
    with torch.no_grad():
        scores = [
            float(
                model.eval()(torch.tensor([tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"]])).logits
            )
            for chat in chats
        ]
    assert [row["scores"]["reward"] for row in ended] == pytest.approx(scores, abs=1e-4)


def test_the_measures_are_those_of_the_samples(run: Path) -> None:
    """From the samples by other formulas; the manifest has what metrics.json has, and PPO's guard reads the share."""
    folder = unit(run, "reward_quality")
    found, reward, gold = read(folder / "metrics.json"), scores_of(run, "reward"), scores_of(run, "gold")
    assert read(folder / "manifest.json")["facts"] == found
    assert (found["prompts"], found["responses"]) == (10, 3)
    within = reward.var(axis=1, ddof=1).mean()
    between = max(0.0, reward.mean(axis=1).var(ddof=1) - within / 3)
    assert found["score_sd_within"] == pytest.approx(within**0.5)
    assert found["score_sd"] == pytest.approx((between + within) ** 0.5)
    assert between_prompt_share({"reward_quality": folder}) == pytest.approx(between / (between + within))
    best = found["best_of_n"]
    picked = [gold[at, max(range(3), key=lambda n: reward[at, n])] for at in range(10)]
    assert best["best_by_reward"]["mean"] == pytest.approx(np.mean(picked))
    assert best["gain"]["mean"] == pytest.approx(np.mean(picked) - gold.mean())
    assert best["possible_gain"]["mean"] == pytest.approx(gold.max(axis=1).mean() - gold.mean())


def test_gold_that_does_not_apply_to_each_response() -> None:
    """A part of weight 0 may give no score: the prompt is left out of the best of n, and of nothing else."""
    scores = [(1.0, 0.0), (2.0, 1.0), (5.0, None), (3.0, 1.0), (0.0, 0.5), (1.0, 0.0)]
    samples = [{"scores": {"reward": reward, "gold": gold}} for reward, gold in scores]
    found = reward_quality.measure(samples, 2)
    assert found["prompts"] == found["between_prompt_share"]["n"] == 3
    assert (found["best_of_n"]["gain"]["n"], found["best_of_n"]["best_by_reward"]["mean"]) == (2, 0.5)
    assert found["best_of_n"]["one_response"]["mean"] == 0.375
    without = reward_quality.measure([{"scores": {"reward": reward}} for reward, _ in scores], 2)
    assert without == {name: value for name, value in found.items() if name != "best_of_n"}


def test_the_reward_stages_own_measures(run: Path) -> None:
    """On the held-out pairs: margins and accuracy as before, calibration and spread of the same scores."""
    found = read(unit(run, "reward") / "metrics.json")
    (only,), right = found["calibration"]["held_out"]["bins"], found["accuracy"]["held_out"]
    assert only["observed"] == right and right["n"] == found["spread"]["held_out"]["between_prompt_share"]["n"] == 13
    assert found["calibration"]["held_out"]["ece"] == pytest.approx(abs(right["mean"] - only["predicted"]))
    assert found["margin"]["held_out"]["n"] == 13


def test_both_are_printed(run: Path) -> None:
    said = (run / "said.txt").read_text("utf-8")
    assert "reward  ranks " in said and "of 13 held-out pairs right (" in said and "calibration error " in said
    assert "reward_quality  3 responses of seed-0 to each of 10 prompts: SD of the score " in said
    assert "reward_quality  best of 3 responses of seed-0: gold " in said


def test_centring_keeps_scores_near_zero(tmp_path: Path) -> None:
    """The term of the loss is the mean square of the sum of a pair's scores: with a large weight it is smaller."""
    sums = {}
    for coefficient in (None, 1.0):
        command(tmp_path / "run", "lora", "toy,data,sft,reward", **{"reward.center_rewards_coefficient": coefficient, "reward.num_train_epochs": 6, "reward.learning_rate": 5e-3})  # fmt: skip
        made = max(
            (tmp_path / "run" / "stages" / "reward").glob("*/metrics.json"), key=lambda path: path.stat().st_mtime_ns
        )
        spread = read(made)["spread"]["held_out"]
        sums[coefficient] = spread["score_mean"] ** 2 + spread["score_sd"] ** 2
    assert sums[1.0] < 0.5 * sums[None]


def units(*overrides: str) -> dict[str, Any]:
    recipe = load_recipe("quickstart", lora="lora", overrides=list(overrides)).recipe
    return {one.id: one for stage in STAGES.values() for one in stage.units(recipe, stage.run)}


def test_recipes_with_and_without_the_stage(tmp_path: Path) -> None:
    """It is there for any reward that policies learn from, and PPO reads it; not for DPO alone, and not for 0 prompts."""
    found = units()
    assert found["reward_quality"].inputs == ("toy", "sft/seed-0", "reward")
    assert "reward_quality" in found["ppo/salsa"].inputs and "reward_quality" in found["report"].inputs
    (tmp_path / "mine.py").write_text("def f(completions): ...")
    function = units(f"reward={tmp_path}/mine:f")
    assert function["reward_quality"].inputs == ("toy", "sft/seed-0") and "reward" not in function
    for sets in (("reward.quality_prompts=0",), ("policies={dpo: {reference: soup, algorithm: dpo}}", "evaluate.pairs=[[dpo, soup]]")):  # fmt: skip
        found = units(*sets)
        assert "reward_quality" not in found and not any("reward_quality" in one.inputs for one in found.values())
    rloo = units("policies={rloo: {reference: soup, algorithm: rloo}}")
    assert "reward_quality" in rloo and "reward_quality" not in rloo["rloo/rloo"].inputs


def test_keys() -> None:
    """How the reward is measured is in no reward model's key; centring is."""
    before, other = units(), units("reward.quality_prompts=5", "reward.quality_responses=2")
    assert before["reward"] == other["reward"] and before["reward_quality"] != other["reward_quality"]
    assert before["reward"] != units("reward.center_rewards_coefficient=null")["reward"]
    assert before["reward_quality"] == units("generation.batch_size=3")["reward_quality"]
    assert before["reward_quality"] != units("generation.temperature=0.5")["reward_quality"]
