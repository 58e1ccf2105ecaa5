"""The sft stage: one seed, an adapter or all weights trained on demonstrations by TRL's SFTTrainer, loss on the assistant's tokens only.

A seed sets the initialisation of the adapter, the order of the data, and (`sft.subset`) which share of it this seed sees.
"""

from __future__ import annotations

import json
import random
from typing import Any

from . import data
from .adapters import in_float32, lora_config
from .config import require
from .runs import Job, write_atomic
from .workbench import Bar, Workbench, mean_loss, note_left_out, quiet


def run(job: Job) -> dict[str, Any]:
    """Train the seed that the unit names (seed-N: position N in sft.seeds) and save it as an ordinary PEFT adapter or checkpoint."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    recipe, section = job.recipe, job.recipe.sft
    seed = section.seeds[int(job.unit.name.removeprefix("seed-"))]
    # 1. this seed's demonstrations
    rows = data.demonstrations(data.sources(recipe, job.inputs.get("toy"))["demonstrations"])
    if section.subset < 1:
        rows = random.Random(seed).sample(rows, max(1, round(section.subset * len(rows))))
    # 2. the trainer; rows whose answers lie beyond max_length have nothing to learn from
    bench = Workbench.of(job)
    trainer: Any = SFTTrainer(
        model=bench.base() if recipe.adapter else bench.trainable(),
        args=SFTConfig(
            **bench.arguments(section, job.folder / "trainer", seed),
            assistant_only_loss=True,
            max_length=recipe.model.max_length,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=bench.tokenizer,
        peft_config=lora_config(recipe.adapter) if recipe.adapter else None,
        callbacks=[Bar(job.unit.id, job.folder)],
    )
    if recipe.mode == "qlora":
        in_float32(trainer.model)
    trainer.train_dataset = trainer.train_dataset.filter(lambda row: any(label != -100 for label in row["labels"]))
    kept = len(trainer.train_dataset)
    require(
        kept >= section.batch_size,
        f"data.demonstrations: found {kept} rows with an answer within model.max_length = {recipe.model.max_length} tokens,"
        f" expected at least sft.batch_size = {section.batch_size}",
    )
    limit = f"no answer within model.max_length = {recipe.model.max_length} tokens"
    note_left_out(job, len(rows) - kept, len(rows), limit)
    # 3. train and save
    quiet(trainer)
    loss = mean_loss(trainer, trainer.train().training_loss)
    bench.save(trainer, job.folder)
    log = [row for row in trainer.state.log_history if "loss" in row]
    metrics = {
        "seed": seed,
        "rows": kept,
        "left_out": len(rows) - kept,
        "epochs": section.num_train_epochs,
        "steps": trainer.state.global_step,
        "train_loss": loss,
        "last_loss": log[-1]["loss"] if log else loss,
    }
    if trainer.is_world_process_zero():
        write_atomic(job.folder / "metrics.json", json.dumps(metrics, indent=2))
    return metrics
