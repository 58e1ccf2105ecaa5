"""An update waits for the device once for each token of decoding and each optimizer step, and a few times besides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from host_syncs import HostSyncs
from plain_ppo import PROMPTS

from salsa_peft.models.adapters import lora as adapters
from salsa_peft.models.adapters.names import SCORE_HEAD

BESIDES = 24
"""Waits of an update of one optimizer step without those of decoding; the responses go to the host for reward and logs."""


def waits(trainer: Any) -> int:
    """Number of waits in one update."""
    trainer.checkpoints.settings()  # digests of the weights, computed once in a run
    with HostSyncs() as syncs:
        trainer.train()
    return syncs.total


@pytest.fixture
def update(make_trainer: Any, tmp_path: Path) -> Any:
    """Count the waits of an update of 64 responses: update(micro-batch size, new tokens, …)."""

    def count(micro: int, tokens: int, **options: Any) -> int:
        settings = {
            "prompts": PROMPTS * 4, "batch_size": 64, "micro_batch_size": micro, "min_new_tokens": tokens, "max_new_tokens": tokens,
            "max_steps": 1, "base": {"max_position_embeddings": 256, "num_hidden_layers": 1}, "folder": tmp_path / f"{micro}-{tokens}",
        }  # fmt: skip
        return waits(make_trainer(**(settings | options)))

    return count


def test_the_number_of_waits(update: Any) -> None:
    """The same for 8 and 64 micro-batches; one more for each new token, with 16 and with 128."""
    assert update(8, 16) == update(1, 16) == 16 + BESIDES
    assert update(8, 128) == 128 + BESIDES


def test_each_optimizer_step_waits_once_and_each_epoch_shuffles_once(update: Any) -> None:
    steps = {"num_mini_batches": 4, "num_ppo_epochs": 2, "max_steps": 8}
    options = steps | {"prompts": PROMPTS, "batch_size": 16}
    assert update(4, 8, **options) == update(1, 8, **options) == 8 + BESIDES + 7 + 1


@pytest.mark.parametrize(
    "options",
    [
        {"kl_estimator": "full", "references": ["soup", "seed-0", "base"]},
        {"reference_mean": "geometric", "references": ["soup", "seed-0", "base"]},
        {"reference_mean": "arithmetic", "reference_weights_step": 0.1, "references": ["soup", "seed-0", "base"]},
        {"value": "adapter", "reward": "reward"},
        {"full": True},
        {"value": "none"},
        {"value": "group"},
        {"lam_length_alpha": 1.0, "lam_value": 1.0},
        {"old_logprobs": "rollout"},
        {"bf16": True, "whiten_rewards": True, "kl_per": "token", "missing_eos_penalty": 1.0, "score_clip": 2.0},
        {"entropy_floor": 9.0, "score_length_exponent": -0.5},
        {"micro_batch_tokens": 128},
        {"importance_sampling_correction": True},
        {"importance_sampling_correction": True, "importance_sampling_mode": "sequence_mask"},
    ],
    ids=lambda options: "-".join(options),
)
def test_no_kind_of_update_waits_for_micro_batches_or_tokens(
    update: Any, make_base: Any, make_adapter: Any, tmp_path: Path, options: dict[str, Any]
) -> None:
    if "reward" in options:
        head = torch.ones(1, 32)
        reward = make_adapter(make_base(max_position_embeddings=256, num_hidden_layers=1), "reward", 9)
        adapters.save(reward, "reward", tmp_path / "reward", extra={SCORE_HEAD: head})
        options = options | {"reward": str(tmp_path / "reward")}
    options = options | {"prompts": PROMPTS, "batch_size": 16}
    few, many, longer = update(4, 8, **options), update(1, 8, **options), update(4, 24, **options)
    assert few == many == longer - 16
    assert few <= 8 + BESIDES + 4
