"""run_trainer makes every trained weight float32, over a base in bf16: what a step moves is then kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from peft.tuners.lora import Linear
from trl import SFTConfig, SFTTrainer

from salsa_peft.models import precision
from salsa_peft.training import train
from salsa_peft.training.train import resumable, run_trainer
from salsa_peft.utils.errors import SalsaError

RATE = 1e-6
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "embeddings": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "tokens": {"trainable_token_indices": [7, 9]},
}


@pytest.fixture
def make_sft(make_base: Any, tokenizer: Any, tmp_path: Path) -> Any:
    """make_sft(config, dtype) → TRL's SFTTrainer of an adapter, over a base in this dtype."""

    def make(dtype: torch.dtype, **config: Any) -> Any:
        torch.manual_seed(0)
        args = SFTConfig(
            output_dir=str(tmp_path / "out"), per_device_train_batch_size=4, max_steps=4, learning_rate=RATE, report_to="none", use_cpu=True,
            bf16=dtype == torch.bfloat16, save_strategy="no", disable_tqdm=True, max_length=None, lr_scheduler_type="constant",
        )  # fmt: skip
        return resumable(SFTTrainer)(
            model=make_base().to(dtype),
            args=args,
            train_dataset=Dataset.from_list([{"input_ids": [5 + row, 7, 9, 12, 2]} for row in range(16)]),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **config),
        )

    return make


def trained(trainer: Any) -> dict[str, torch.Tensor]:
    """A copy of each trained weight."""
    return {name: weight.detach().clone() for name, weight in trainer.model.named_parameters() if weight.requires_grad}


@pytest.mark.parametrize("kind", KINDS)
def test_what_trains_is_float32(make_sft: Any, kind: str) -> None:
    """Factors, magnitudes, whole modules and single tokens; each keeps the steps of a small learning rate, as in float32.

    In bf16 a weight of 0.3 moves by 0.002 or not at all.
    """
    trainer = make_sft(torch.bfloat16, **KINDS[kind])
    before = trained(trainer)
    if kind == "embeddings":
        assert torch.bfloat16 in {weight.dtype for weight in before.values()}, "PEFT leaves whole modules as they are"
    run_trainer(trainer, "sft/seed-0")
    after = trained(trainer)
    assert {weight.dtype for weight in after.values()} == {torch.float32}
    assert {weight.dtype for weight in trainer.model.parameters()} == {torch.float32, torch.bfloat16}
    for name, weight in after.items():
        moved = (weight - before[name].float()).abs()
        if "lora_A" not in name:  # whose gradient is 0 as long as B is
            assert 0 < moved.max() <= 4.1 * RATE, name
    states = [state["exp_avg"].dtype for state in trainer.optimizer.state.values()]
    assert set(states) == {torch.float32}


def test_the_lora_forward_of_this_package_is_used(make_sft: Any) -> None:
    """models/adapters/forward.py under autocast; never PEFT's."""
    trainer = make_sft(torch.bfloat16)
    with patch.object(Linear, "forward", autospec=True, side_effect=Linear.forward) as theirs:
        run_trainer(trainer, "sft/seed-0")
    assert trainer.state.global_step == 4 and not theirs.called


def test_a_weight_that_is_not_float32_is_named(make_sft: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first step."""
    trainer = make_sft(torch.bfloat16, **KINDS["embeddings"])
    monkeypatch.setattr(train, "make_trained_float32", lambda model: None)
    with pytest.raises(SalsaError, match=r"model: .*modules_to_save.* is in bfloat16, which rounds small updates away"):
        run_trainer(trainer, "sft/seed-0")
    assert trainer.state.global_step == 0


def test_no_trainer_of_trl_makes_its_optimizer_early(make_sft: Any) -> None:
    """The cast of run_trainer comes after the trainer was made, so an optimizer made there would hold the old weights."""
    assert make_sft(torch.bfloat16).optimizer is None


def test_frozen_weights_stay_as_they_are(make_base: Any) -> None:
    model = make_base().bfloat16().requires_grad_(False)
    model.lm_head.requires_grad_(True)
    precision.make_trained_float32(model)
    dtypes = {name: weight.dtype for name, weight in model.named_parameters()}
    assert [name for name, dtype in dtypes.items() if dtype == torch.float32] == ["lm_head.weight"]
