"""The sft stage: one seed, an adapter or all weights trained on demonstrations by TRL's SFTTrainer, loss on the assistant's tokens only; or taken
from a folder or the Hub.

A seed sets the initialisation of the adapter, the order of the data, and (`sft.subset`) which share of it this seed sees.
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import data, same_base
from .adapters import CONFIG, WEIGHTS, check_factors_alone, check_finite, in_float32, lora_config, read, read_tensors
from .config import require
from .fingerprints import FINGERPRINT, base_fingerprints
from .runs import BEGUN, MANIFEST, Job, write_atomic
from .template_fields import trained_tokens
from .workbench import Bar, Workbench, local, mean_loss, note_left_out, quiet

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


def run(job: Job) -> dict[str, Any]:
    """Train the seed that the unit names (seed-N: position N in sft.seeds) and save it as an ordinary PEFT adapter or checkpoint."""
    from trl import SFTConfig, SFTTrainer

    recipe, section = job.recipe, job.recipe.sft
    position = int(job.unit.name.removeprefix("seed-"))
    seed, taken = section.seeds[position], section.taken(position)
    if taken is not None:
        return take(job, taken)
    # 1. this seed's demonstrations
    bench = Workbench.of(job)
    rows = data.demonstrations(data.sources(recipe, job.inputs.get("toy"))["demonstrations"], bench.tokenizer)
    if section.subset < 1:
        rows = random.Random(seed).sample(rows, max(1, round(section.subset * len(rows))))
    # 2. the trainer; rows whose answers lie beyond max_length have nothing to learn from
    trainer: Any = SFTTrainer(
        model=bench.base() if recipe.adapter else bench.trainable(),
        args=SFTConfig(
            **bench.arguments(section, job.folder / "trainer", seed),
            max_length=recipe.model.max_length,
        ),
        train_dataset=labelled(rows, bench.tokenizer),
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


def labelled(rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Rows {messages} → {input_ids, labels}, the form that TRL trains on as it is: labels are −100 but for the assistant's tokens."""

    def tokens(row: dict[str, Any]) -> dict[str, list[int]]:
        ids, mask = trained_tokens(row, tokenizer)
        return {
            "input_ids": ids,
            "labels": [token if counts else -100 for token, counts in zip(ids, mask, strict=True)],
        }

    made = data.dataset(rows)
    return made.map(tokens, remove_columns=made.column_names)


def take(job: Job, path: str) -> dict[str, Any]:
    """A seed that is there already: a copy of an adapter of this base, or of a checkpoint. Raises SalsaError for one of another base, for
    weights that are not finite, and for what is no such thing in safetensors."""
    bench = Workbench.of(job)
    folder = local(job.recipe, path)
    same_base.check(folder, base_fingerprints(bench.folder), bench.name)
    if job.recipe.adapter is not None:
        config, _ = read(folder)
        check_factors_alone(config, str(folder))
        names = [WEIGHTS, CONFIG, FINGERPRINT]
    else:
        names = [file.name for file in folder.iterdir() if file.suffix in (".safetensors", ".json")]
        require(
            any(name.endswith(".safetensors") for name in names),
            f"{path}: found no safetensors file, expected a checkpoint's weights in one (other formats are not read)",
        )
        for name in filter(lambda name: name.endswith(".safetensors"), names):
            check_finite(read_tensors(folder / name), str(folder / name))
    for name in names:
        if (folder / name).is_file() and name not in (MANIFEST, BEGUN):
            shutil.copyfile(folder / name, job.folder / name)
    bench.tokenizer.save_pretrained(job.folder)
    commit = folder.name if folder.parent.name == "snapshots" else None
    metrics = {
        "from": Path(path).name if Path(path).is_absolute() else path,
        **({} if commit is None else {"commit": commit}),
    }
    write_atomic(job.folder / "metrics.json", json.dumps(metrics, indent=2))
    return metrics
