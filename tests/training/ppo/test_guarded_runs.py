"""Runs that go wrong on purpose are warned of within 20 updates; 20 healthy runs of the embedded world are not."""

from __future__ import annotations

import json
import random
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback

from salsa_peft import SalsaPPOConfig, SalsaPPOTrainer
from salsa_peft.config.job import Job, Unit
from salsa_peft.config.load import load_recipe
from salsa_peft.config.options.toy import Toy
from salsa_peft.data.toy import build
from salsa_peft.data.toy_language import LENGTHS_IN, draw_prompts, gold
from salsa_peft.training import ppo_stage
from salsa_peft.training.ppo.guards.monitor import GuardMonitor
from salsa_peft.utils.errors import SalsaError

SOON = 20
"""Number of updates within which a collapse must have been warned of."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of the embedded world, pre-trained as in the quickstart."""
    folder = tmp_path_factory.mktemp("world")
    small = {"demonstrations": 8, "preferences": 8, "prompts": 8, "eval_prompts": 8}
    build(Toy(**small), folder, lambda *_: None)  # type: ignore[arg-type]
    return folder / "base"


def words(completions: list[Any]) -> list[list[str]]:
    """The words of each response."""
    return [completion[-1]["content"].split() for completion in completions]


def oak(completions: list[Any], **_: Any) -> list[float]:
    """A reward that likes one word: its share of the words."""
    return [found.count("oak") / max(1, len(found)) for found in words(completions)]


def longer(completions: list[Any], **_: Any) -> list[float]:
    """A reward with a fault: it counts words."""
    return [0.2 * len(found) for found in words(completions)]


def uncentred(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
    """The gold reward, and a level of its own for each prompt, as a pairwise loss leaves it free."""
    levels = [random.Random(prompt[-1]["content"]).gauss(0, 2) for prompt in prompts]
    return [level + one for level, one in zip(levels, gold(prompts, completions, **columns), strict=True)]


def trainer_of(
    world: Path,
    folder: Path,
    reward: Any,
    prompts: int = 3000,
    copies: int = 1,
    share: float | None = None,
    seed: int = 0,
    **options: Any,
) -> SalsaPPOTrainer:
    """PPO from the base, which is the reference, with a LoRA adapter. share: what reward_quality measured."""
    torch.manual_seed(seed)
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(world), config)
    drawn = draw_prompts(random.Random(seed), prompts, LENGTHS_IN, 0)
    settings = {
        "batch_size": 64, "num_mini_batches": 2, "num_ppo_epochs": 2, "max_new_tokens": 10, "kl_control": "fixed", "kl_coef": 0.1,
        "learning_rate": 3e-3, "lr_scheduler_type": "constant", "num_train_epochs": 100, "max_steps": 4 * SOON, "seed": seed, "shown_every": None,
        "report_to": "none", "use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "output_dir": str(folder),
    }  # fmt: skip
    trainer = SalsaPPOTrainer(
        model, args=SalsaPPOConfig(**(settings | options)),  # type: ignore[arg-type]
        train_dataset=[{"prompt": [{"role": "user", "content": text}]} for text in drawn * copies],
        references=["base"], reward_funcs=reward, processing_class=AutoTokenizer.from_pretrained(world),
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.guards.between_prompt_share = share
    return trainer


def rows_of(folder: Path) -> list[dict[str, float]]:
    """The rows of metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("reward", "guards", "options"),
    [
        (oak, {"collapse"}, {"kl_coef": 0.02}),
        ([oak, (gold, 0.0, "gold")], {"collapse", "over_optimization"}, {"kl_coef": 0.02}),
        (longer, {"length_high", "unfinished"}, {"kl_coef": 0.02}),
        (uncentred, {"between_prompts"}, {"share": 0.9}),
    ],
    ids=[
        "one word",
        "one word, with a held-out reward",
        "length",
        "uncentred",
    ],
)
def test_a_run_that_goes_wrong_is_warned_of_and_stopped(
    world: Path, tmp_path: Path, capsys: Any, reward: Any, guards: set[str], options: dict[str, Any]
) -> None:
    """Each expected guard warns within 20 updates; as `stop` it ends the run at the warning, with a checkpoint."""
    trainer = trainer_of(world, tmp_path / "warned", reward, guards={"collapse": "warn"}, **options)
    trainer.train()
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("guards.")]
    first = {
        line.split(": ")[0].removeprefix("guards."): int(line.split(": ")[1].split()[-1]) for line in reversed(said)
    }
    assert guards <= set(first)
    for guard in guards:
        folder = tmp_path / guard
        others = dict.fromkeys(set(first) - {guard}, "warn")
        stopped = trainer_of(world, folder, reward, guards=others | {guard: "stop"}, **options)
        with pytest.raises(
            SalsaError, match=rf"guards.{guard}: update {first[guard]}: .*; checkpoint-{4 * first[guard]} is"
        ):
            stopped.train()
        assert len(rows_of(folder)) == first[guard]


HEALTHY: list[dict[str, Any]] = [
    *({"kl_coef": beta, "seed": seed} for seed, beta in enumerate((0.05, 0.1, 0.2, 0.3, 0.5, 1.0))),
    *({"learning_rate": rate, "seed": 10 + seed} for seed, rate in enumerate((3e-4, 1e-3, 2e-3))),
    {"batch_size": 16, "learning_rate": 1e-3, "seed": 20},
    {"batch_size": 32, "seed": 21},
    {"batch_size": 128, "seed": 22},
    {"kl_control": "adaptive", "kl_target": 2.0, "kl_horizon": 1000.0, "seed": 30},
    {"kl_per": "token", "seed": 31},
    {"kl_estimator": "full", "seed": 32},
    {"kl_estimator": "k3", "seed": 33},
    {"num_ppo_epochs": 1, "max_steps": 2 * 40, "seed": 34},
    {"lam": 1.0, "seed": 35},
    {"temperature": 0.7, "seed": 36},
    {"prompts": 16, "copies": 4, "seed": 37},
]


@pytest.mark.slow
@pytest.mark.parametrize("options", HEALTHY, ids=lambda options: "-".join(f"{k}={v}" for k, v in options.items()))
def test_a_healthy_run_has_no_alarm(world: Path, tmp_path: Path, capsys: Any, options: dict[str, Any]) -> None:
    """The gold reward is the reward and the held-out reward. The score does not fall by more than noise (SE 0.03)."""
    trainer = trainer_of(world, tmp_path, [gold, (gold, 0.0, "held out")], **options)
    trainer.train()
    assert [line for line in capsys.readouterr().err.splitlines() if line.startswith("guards.")] == []
    scores = [row["objective/scores"] for row in rows_of(tmp_path)]
    assert fmean(scores[-5:]) > fmean(scores[:2]) - 0.05


class Prepared(Exception):
    """Raised when the ppo stage has prepared its trainer, which it carries."""


def test_the_ppo_stage_gives_the_guards_the_share_that_reward_quality_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without that stage the share is not known."""

    def prepared(trainer: Any) -> None:
        raise Prepared(trainer)

    def trainer(*_: Any, **__: Any) -> SimpleNamespace:
        made = SimpleNamespace(guards=GuardMonitor({}), checkpoints=SimpleNamespace(), table=SimpleNamespace())
        made.is_world_process_zero = lambda: prepared(made)
        return made

    monkeypatch.setattr(ppo_stage, "SalsaPPOTrainer", trainer)
    monkeypatch.setattr(
        ppo_stage.StageContext, "of_job", lambda job: SimpleNamespace(recipe=job.recipe, tokenizer=None)
    )
    monkeypatch.setattr(ppo_stage, "build_policy", lambda *_: (None, []))
    for name in ("recipe_reward", "ppo_config", "evaluation_prompts", "ProgressBar"):
        monkeypatch.setattr(ppo_stage, name, lambda *_, **__: None)
    monkeypatch.setattr(ppo_stage.datasets, "prompts", lambda *_, **__: [])
    recipe = load_recipe("quickstart", lora="lora", overrides=[]).recipe
    unit = Unit(stage="ppo", name="ppo", run="", multi_unit=True)
    (tmp_path / "metrics.json").write_text('{"between_prompt_share": {"mean": 0.75}}')
    for measured, share in (({"reward_quality": tmp_path}, 0.75), ({}, None)):
        inputs = {"toy": tmp_path, **measured}
        with pytest.raises(Prepared) as found:
            ppo_stage.run(Job(recipe=recipe, unit=unit, folder=tmp_path, inputs=inputs, recipe_yaml=""))
        assert found.value.args[0].guards.between_prompt_share == share
