"""Everything that a GPU computes is on the GPU: generation and scoring on fake CUDA tensors.

FakeTensorMode raises an error where an operation gets a CPU tensor beside a CUDA tensor, as CUDA does, and needs no GPU
for it. It has no CUDA autograd on a machine without CUDA, so training is not rehearsed here.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import rehearsal
import torch
from fake_tensors import fake_tensors
from transformers.trainer_utils import TrainOutput

from salsa_peft.models import generation, responses
from salsa_peft.models.architectures.sizes import architecture_of_recipe
from salsa_peft.training.ppo import rollout
from salsa_peft.training.ppo.trainer import SalsaPPOTrainer

LENGTH = 48
SEEN: list[Any] = []


@pytest.fixture(autouse=True)
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are made up on a fake GPU, and the ppo stage makes one rollout in place of training."""
    rehearsal.replace_files(monkeypatch)
    rehearsal.compute_as_cuda(monkeypatch)
    rehearsal.place_on_cuda(monkeypatch)
    monkeypatch.setattr(SalsaPPOTrainer, "train", one_rollout)
    SEEN.clear()


def one_rollout(trainer: SalsaPPOTrainer, **_: Any) -> TrainOutput:
    """Sample responses to two prompts and score them; the rollout is put into SEEN."""
    prompts: Any = trainer.train_dataset
    SEEN.append(trainer.rollout_maker(prompts[:2], 1, 0.1, lambda: None))
    return TrainOutput(0, 0.0, {})


def run(folder: Path, stage: str, mode: str, more: dict[str, Any], **ppo: Any) -> Any:
    """Run a stage's first unit on fake CUDA tensors."""
    folder.mkdir(exist_ok=True)
    more = {"generation": {"max_new_tokens": 2}, **more}
    recipe = rehearsal.recipe_of(folder, 1, mode, LENGTH, rehearsal.SMALL, more, **ppo)
    size = architecture_of_recipe(recipe)
    assert size is not None
    inputs = rehearsal.write_inputs(folder, recipe, size)
    module = {"ppo": "training.ppo_stage", "landscape": "evaluation.landscape"}.get(stage, f"evaluation.{stage}")
    stage_function = importlib.import_module(f"salsa_peft.{module}").run
    with fake_tensors(), torch.no_grad():
        return stage_function(rehearsal.job_of(recipe, stage, folder, inputs))


@pytest.mark.parametrize("mode", ["lora", "stochastic"])
def test_a_rollout(mode: str, tmp_path: Path) -> None:
    """Responses, policy, reference and reward, by adapters or as own models: all results are on the GPU."""
    run(tmp_path, "ppo", mode, {})
    assert {tensor.device.type for tensor in SEEN[0].tensors().values()} == {"cuda"}


def test_a_rollout_with_options(tmp_path: Path) -> None:
    """Several references and rewards, one of them a classifier; exact KL; log-probs recorded while sampling."""
    classifier = str(rehearsal.write_classifier(tmp_path / "classifier", 1, **rehearsal.SMALL))
    more = {"policies": {"salsa": {"reference": ["soup", "seed-1", "base"], "kl_coef": 0.01}}}
    more |= {"reward": {"model": ["adapter", classifier], **rehearsal.COMMON}}
    options = {"kl_estimator": "full", "missing_eos_penalty": 1.0, "normalize_scores": True}
    run(tmp_path, "ppo", "lora", more, value="adapter", whiten_rewards=True, **options)
    run(tmp_path / "2", "ppo", "lora", {}, old_logprobs="rollout")
    assert len(SEEN) == 2
    assert all({tensor.device.type for tensor in rollout.tensors().values()} == {"cuda"} for rollout in SEEN)


@pytest.mark.parametrize("mode", ["lora", pytest.param("stochastic", marks=pytest.mark.slow)])
def test_evaluation(mode: str, tmp_path: Path) -> None:
    """Answers of seed-0, soup and policy to questions of two turns, and their scores."""
    questions = rehearsal.write_rows(tmp_path, "questions", [{"turns": ["owl wren", "crow"]}, {"turns": ["finch"]}])
    assert run(tmp_path, "evaluate", mode, {"evaluate": {"prompts": {"asked": questions}}}) == {"asked": 2}


@pytest.mark.parametrize(
    ("module", "name", "wrong"),
    [
        (rollout, "apply_score_options", lambda right: lambda scores, *rest: right(scores.cpu(), *rest)),
        (responses, "send", lambda right: lambda parts, device: right(parts, torch.device("cpu"))),
        (generation, "pad_tokens", lambda right: lambda ids, pad, device, *side: right(ids, pad, "cpu", *side)),
    ],
)
def test_a_cpu_tensor_is_found(
    module: Any, name: str, wrong: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores, places of tokens or prompts that stay on the CPU end a rollout with an error."""
    monkeypatch.setattr(module, name, wrong(getattr(module, name)))
    with pytest.raises(Exception, match=r"cuda:0 and cpu|two different devices|same device"):
        run(tmp_path, "ppo", "lora", {})
