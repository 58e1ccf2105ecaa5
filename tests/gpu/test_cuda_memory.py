"""What stays on the card: nothing after a run, no more from update to update, next to nothing for another reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
            model, args, PROMPTS, references=names, reward=length_reward, processing_class=tokenizer
        )
        trainer.train()
        peaks.append(card.peak() - before)
        del trainer, model
    assert not card.counts or 0 < peaks[1] <= 1.05 * peaks[0]
