"""Rollout correction in whole updates: a sampler unlike the policy, the weights of the loss, the metrics, and checkpoints."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from salsa_peft.config.options.ppo import Sampling
from salsa_peft.models.adapters import lora
from salsa_peft.models.generation import generate
from salsa_peft.models.responses import Responses
from salsa_peft.training.ppo import resume
from salsa_peft.training.ppo.backends import HF
from salsa_peft.training.ppo.rollout import Rollout

METRICS = [
    "sampling/importance_sampling_ratio/min", "sampling/importance_sampling_ratio/mean",
    "sampling/importance_sampling_ratio/max", "sampling/importance_sampling_ratio/clipped",
    "sampling/sampling_logp_difference/mean", "sampling/sampling_logp_difference/max",
]  # fmt: skip
ON = {"importance_sampling_correction": True}


class Hotter(HF):
    """A sampler unlike the policy: the same model at twice the temperature. It reports its own log-probs."""

    def __call__(self, prompts: Any, seeds: Any, *, recording: Any = None, check: Any = None) -> Responses:
        sampling = Sampling(max_new_tokens=self.args.max_new_tokens, temperature=2.0)
        return generate(self.model, prompts, sampling, self.tokenizer, seeds, recording=recording, check=check)


@pytest.fixture
def hotter(make_trainer: Any) -> Callable[..., tuple[Any, list[Rollout], list[dict[str, float]]]]:
    """Train for two updates with the sampler Hotter: the trainer, its rollouts, and the metrics of its updates."""

    def run(**options: Any) -> tuple[Any, list[Rollout], list[dict[str, float]]]:
        trainer = make_trainer(**{"max_steps": 2, "learning_rate": 1e-12, "num_ppo_epochs": 1} | options)
        args = trainer.args
        trainer.rollout_maker.backend = Hotter(trainer.model.policy, args, trainer.processing_class)
        rollouts, end = [], trainer.end_update

        def end_update() -> None:
            rollouts.append(trainer.ppo.rollout)
            end()

        trainer.end_update = end_update
        trainer.train()
        return trainer, rollouts, [row for row in trainer.state.log_history if "val/ratio" in row]

    return run


@torch.no_grad()
def response_logprobs_at(trainer: Any, rollout: Rollout, temperature: float) -> Tensor:
    """Log-probs (B, T) of the responses from the policy's full logits, 0 outside the mask."""
    responses, table = rollout.responses, torch.zeros(rollout.logprobs.shape)
    with lora.active(trainer.model.policy, "policy"):
        for row in range(len(table)):
            prompt = responses.prompt_ids[row][responses.prompt_mask[row]]
            answer = responses.response_ids[row][responses.response_mask[row]]
            logits = trainer.model.policy(input_ids=torch.cat([prompt, answer])[None]).logits[0, len(prompt) - 1 : -1]
            found = (logits / temperature).log_softmax(-1).gather(-1, answer[:, None])[:, 0]
            table[row, : len(answer)] = found
    return table


@pytest.mark.parametrize("micro", [1, 2, 8])
def test_the_loss_is_weighted_by_policy_over_sampler(hotter: Any, micro: int) -> None:
    """The first and only step on each batch: every ratio to the old policy is 1, so the policy loss is −mean of w · A."""
    trainer, rollouts, rows = hotter(**ON, micro_batch_size=micro, importance_sampling_clip_max=1.5)
    assert len(rollouts) == len(rows) == 2
    for rollout, row in zip(rollouts, rows, strict=True):
        mask = rollout.responses.response_mask
        cold, hot = (response_logprobs_at(trainer, rollout, temperature) for temperature in (1.0, 2.0))
        assert rollout.sampling_logprobs is not None
        assert rollout.importance_weights is not None
        torch.testing.assert_close(rollout.sampling_logprobs, hot, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(rollout.logprobs, cold, rtol=1e-4, atol=1e-4)
        weights = (cold - hot).exp()[mask].clamp(max=1.5)
        torch.testing.assert_close(rollout.importance_weights[mask], weights, rtol=1e-3, atol=1e-3)
        expected = -(weights * rollout.advantages[mask]).mean().item()
        assert row["loss/policy_avg"] == pytest.approx(expected, abs=1e-3)
        assert abs(expected) > 0.01  # without weights it is 0, because advantages are whitened
        assert row["val/ratio"] == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
def test_the_metrics(hotter: Any, mode: str) -> None:
    """Minimum, mean and maximum of the weights, the share outside the bounds, and the difference of the log-probs.

    As TRL's, over tokens, or in sequence modes over responses.
    """
    low, high = (0.01, 40.0) if mode.startswith("sequence") else (0.7, 1.3)  # within these are some, but not all
    bounds = {"importance_sampling_clip_min": low, "importance_sampling_clip_max": high}
    _, rollouts, rows = hotter(**ON, **bounds, importance_sampling_mode=mode)
    for rollout, row in zip(rollouts, rows, strict=True):
        mask, sampled = rollout.responses.response_mask, rollout.sampling_logprobs
        assert sampled is not None
        difference = (rollout.logprobs - sampled).masked_fill(~mask, 0.0)
        ratios = (difference.sum(-1) if mode.startswith("sequence") else difference[mask]).exp()
        outside = (ratios < low) | (ratios > high)
        weights = ratios.clamp(low, high) if mode.endswith("truncate") else ratios.masked_fill(outside, 0.0)
        expected = [weights.min(), weights.mean(), weights.max(), outside.float().mean(),
                    difference[mask].abs().mean(), difference.abs().max()]  # fmt: skip
        assert 0 < outside.float().mean() < 1
        assert [row[name] for name in METRICS] == pytest.approx(torch.stack(expected).tolist(), rel=1e-5)
        assert all(name in METRICS for name in row if name.startswith("sampling/"))


def test_a_sampler_that_reports_no_log_prob_of_some_tokens(hotter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """These tokens (NaN) have the weight 1, and are left out of the difference's mean."""
    call = Hotter.__call__

    def forgetful(self: Any, prompts: Any, seeds: Any, *, recording: Any = None, check: Any = None) -> Responses:
        found = call(self, prompts, seeds, recording=recording, check=check)
        recording.logprobs[0].fill_(torch.nan)
        return found

    monkeypatch.setattr(Hotter, "__call__", forgetful)
    _, rollouts, rows = hotter(**ON)
    for rollout, row in zip(rollouts, rows, strict=True):
        mask, weights = rollout.responses.response_mask, rollout.importance_weights
        assert weights is not None
        assert weights[:, 0].tolist() == [1.0] * len(weights)
        assert (weights[:, 1:][mask[:, 1:]] != 1).all()
        later = (rollout.logprobs - rollout.sampling_logprobs)[:, 1:][mask[:, 1:]]  # type: ignore[operator]
        assert row["sampling/sampling_logp_difference/mean"] == pytest.approx(later.abs().mean().item(), rel=1e-5)


def test_without_correction_nothing_is_weighted_or_logged(hotter: Any) -> None:
    _, rollouts, rows = hotter()
    for rollout, row in zip(rollouts, rows, strict=True):
        assert rollout.importance_weights is rollout.sampling_logprobs is None
        assert row["loss/policy_avg"] == pytest.approx(0, abs=1e-5)
        assert not [name for name in row if name.startswith("sampling/")]


def test_hf_needs_no_correction(make_trainer: Any, tmp_path: Path) -> None:
    """Its log-probs while sampling are those of the forward pass up to rounding: the same policy with weights or without."""
    policies = []
    for corrected in (False, True):
        trainer = make_trainer(folder=tmp_path / str(corrected), importance_sampling_correction=corrected, max_steps=4,
                               num_ppo_epochs=2, learning_rate=1e-2)  # fmt: skip
        trainer.train()
        policies.append(torch.cat([p.detach().flatten() for p in lora.parameters(trainer.model.policy, "policy")]))
    torch.testing.assert_close(*policies, rtol=1e-4, atol=1e-5)
    row = [row for row in trainer.state.log_history if "val/ratio" in row][-1]
    assert [row[name] for name in METRICS] == pytest.approx([1, 1, 1, 0, 0, 0], abs=1e-4)


def test_paged_is_corrected_by_default(make_trainer: Any, tmp_path: Path) -> None:
    """Its figures are in metrics.jsonl; in float32 on a CPU it differs from the forward pass by rounding only."""
    trainer = make_trainer(rollout_backend="paged", rollout_options={"page_size": 16}, max_steps=2)
    trainer.train()
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    for row in rows:
        assert [row[name] for name in METRICS] == pytest.approx([1, 1, 1, 0, 0, 0], abs=1e-3)


def test_the_weights_are_in_a_checkpoint_within_an_update(make_trainer: Any, tmp_path: Path) -> None:
    """A resumed run logs the same metrics to the bit; correction may be switched off or on when a run is resumed."""
    options: dict[str, Any] = {"num_mini_batches": 2, "max_steps": 8, "num_ppo_epochs": 2, "learning_rate": 1e-2}
    trainer = make_trainer(folder=tmp_path / "a", **ON, **options, save_strategy="steps", save_steps=2)
    trainer.train()
    expected = (tmp_path / "a" / "metrics.jsonl").read_bytes()
    saved = load_file(tmp_path / "a" / "checkpoint-2" / "rollout.safetensors")
    assert saved["importance_weights"].shape == saved["sampling_logprobs"].shape == saved["logprobs"].shape
    for step in (4, 6, 8):
        shutil.rmtree(tmp_path / "a" / f"checkpoint-{step}")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    make_trainer(folder=tmp_path / "a", **ON, **options).train(resume_from_checkpoint=True)
    assert (tmp_path / "a" / "metrics.jsonl").read_bytes() == expected
    make_trainer(folder=tmp_path / "b", **options).train(resume_from_checkpoint=True)
    rows = [json.loads(line) for line in (tmp_path / "b" / "metrics.jsonl").read_text().splitlines()]
    assert [METRICS[0] in row for row in rows] == [True, False]  # the second rollout was made without


def test_a_checkpoint_from_before_these_options_existed(
    make_trainer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Is resumed: the rest of its rollout is trained on without weights, the next is corrected."""
    options: dict[str, Any] = {"num_mini_batches": 2, "max_steps": 8, "num_ppo_epochs": 2}
    older = tuple(name for name in resume.CHANGEABLE if not name.startswith("importance_sampling"))
    with monkeypatch.context() as patch:
        patch.setattr(resume, "CHANGEABLE", older)
        make_trainer(**options, save_strategy="steps", save_steps=2).train()
    for step in (4, 6, 8):
        shutil.rmtree(tmp_path / "out" / f"checkpoint-{step}")
    make_trainer(**ON, **options).train(resume_from_checkpoint=True)
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [METRICS[0] in row for row in rows] == [False, True]
