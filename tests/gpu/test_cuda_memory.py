"""What stays on the card: nothing after a run, no more from update to update, next to nothing for another reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from plain_ppo import PROMPTS, length_reward
from transformers import TrainerCallback

from salsa_peft import SalsaPPOConfig, SalsaPPOTrainer

WIDE = {"hidden_size": 512, "intermediate_size": 1024}  # 24 MB in float32


class Allocated(TrainerCallback):
    """Bytes on the card after each optimizer step."""

    def __init__(self, card: Any) -> None:
        self.card, self.bytes = card, []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.bytes.append(self.card.held())


def test_no_update_leaves_more_than_the_one_before(make_trainer: Any, on_gpu: dict[str, Any], card: Any) -> None:
    """The same bytes after the third update and after the tenth, for adapters on a base of 24 MB."""
    watch = Allocated(card)
    make_trainer(base=WIDE, max_steps=10, callbacks=[watch], num_train_epochs=10, **on_gpu).train()
    assert len(watch.bytes) == 10
    assert max(watch.bytes[3:]) - watch.bytes[2] < 2**18


def test_a_run_leaves_nothing(make_trainer: Any, on_gpu: dict[str, Any], card: Any, tmp_path: Path) -> None:
    """When the trainer is gone its memory is. The first run leaves cuBLAS's workspace."""
    for full in (False, True):
        for number in range(2):
            before = card.held()
            trainer = make_trainer(full=full, base=WIDE, folder=tmp_path / f"{full}-{number}", max_steps=2, **on_gpu)
            during = card.held()
            trainer.train()
            del trainer
        assert card.held() - before < 2**20
        assert during - before > 10**7  # what would have been left


def test_three_references_are_thin(
    make_base: Any, make_adapter: Any, tokenizer: Any, on_gpu: dict[str, Any], card: Any, tmp_path: Path
) -> None:
    """With LoRA the base is there once: the peak with three references is at most 5% above that with one."""
    peaks = []
    for count in (1, 3):
        before = card.start()
        model = make_base(**WIDE).to(card.device)
        names = [f"seed-{number}" for number in range(count)]
        for seed, name in enumerate(["policy", *names]):
            model = make_adapter(model, name, seed)
        model.set_adapter("policy")
        args = SalsaPPOConfig(output_dir=str(tmp_path / str(count)), batch_size=8, max_new_tokens=7, max_steps=4, report_to="none",
                              save_strategy="no", disable_tqdm=True, **on_gpu)  # fmt: skip
        trainer = SalsaPPOTrainer(
            model,
            args=args,
            train_dataset=PROMPTS,
            references=names,
            reward_funcs=length_reward,
            processing_class=tokenizer,
        )
        trainer.train()
        peaks.append(card.peak() - before)
        del trainer, model
    assert not card.counts or 0 < peaks[1] <= 1.05 * peaks[0]


def test_a_card_that_runs_out_halves_the_micro_batch(
    make_trainer: Any, on_gpu: dict[str, Any], card: Any, tmp_path: Path
) -> None:
    """CUDA's own error: this process may hold what a quarter of the micro-batch needs, not what all of it does. The same weights come out."""
    wide = {"hidden_size": 1024, "intermediate_size": 8192, "num_hidden_layers": 8}

    def trained(name: str, **options: Any) -> tuple[Any, int, int]:
        held = card.start()
        trainer = make_trainer(base=wide, folder=tmp_path / name, max_steps=2, **options, **on_gpu)
        trainer.train()
        return trainer, held, card.peak()

    whole, _, most = trained("whole", rollout_batch_size=2)
    weights = {name: p.detach().cpu() for name, p in whole.model.named_parameters() if p.requires_grad}
    del whole
    quarter, _, least = trained("quarter", micro_batch_size=2, rollout_batch_size=2)
    del quarter
    if card.counts:
        assert least < most
        limit = (least + most) / 2 / torch.cuda.get_device_properties(0).total_memory
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(limit)
    try:
        small, _, _ = trained("small", rollout_batch_size=2)
    finally:
        if card.counts:
            torch.cuda.set_per_process_memory_fraction(1.0)
    assert not card.counts or small.micro_batch_limit.rows < small.micro_batch_limit.configured == 8
    for name, parameter in small.model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.detach().cpu(), weights[name], rtol=1e-3, atol=1e-4, msg=name)
