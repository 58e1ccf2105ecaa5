"""What stays on the card: nothing after a run, no more from update to update, next to nothing for another reference."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback


class Allocated(TrainerCallback):
    """Bytes on the card after each optimizer step."""

    def __init__(self) -> None:
        self.bytes: list[int] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.bytes.append(torch.cuda.memory_allocated())


def test_an_update_leaves_what_it_found(make_trainer: Any, on_gpu: dict[str, Any], cuda: None) -> None:
    """The same bytes after the third update and after the tenth."""
    watch = Allocated()
    make_trainer(max_steps=10, callbacks=[watch], num_train_epochs=10, **on_gpu).train()
    assert abs(watch.bytes[9] - watch.bytes[2]) < 2**20


def test_a_run_leaves_nothing(make_trainer: Any, on_gpu: dict[str, Any], cuda: None) -> None:
    """When the trainer is gone its memory is."""
    gc.collect()
    before = torch.cuda.memory_allocated()
    trainer = make_trainer(max_steps=2, **on_gpu)
    trainer.train()
    del trainer
    gc.collect()
    assert torch.cuda.memory_allocated() - before < 2**21


def test_three_references_are_thin(make_trainer: Any, on_gpu: dict[str, Any], cuda: None, tmp_path: Path) -> None:
    """With LoRA the base is there once."""
    peaks = []
    for number, references in enumerate((["soup"], ["soup", "seed-0", "base"])):
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        base = {"hidden_size": 512, "intermediate_size": 1024}
        make_trainer(references, folder=tmp_path / str(number), base=base, max_steps=1, **on_gpu).train()
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] <= 1.05 * peaks[0]
