"""The reward stage: an adapter that starts as a copy of seed-0's and a score head, trained by TRL's RewardTrainer.

Loss −log σ(R(x, y_w) − R(x, y_l)); the head is linear on the last token that counts, without bias (paper 3.1, A.2).
"""

from __future__ import annotations

import json
import random
from dataclasses import asdict
from typing import Any

import torch
from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

from . import adapters, data
from .config import require
from .runs import Job, write_atomic
from .statistics import mean_interval
from .workbench import Bar, Workbench, quiet, training_arguments

SPLIT_SEED = 0


def run(job: Job) -> dict[str, Any]:
    """Train on the pairs, measure accuracy on the held-out ones, save adapter and head as one ordinary PEFT adapter."""
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    recipe, section = job.recipe, job.recipe.reward
    # 1. pairs, a share of them held out
    rows = data.preferences(data.sources(recipe, job.inputs.get("toy"))["preferences"])
    random.Random(SPLIT_SEED).shuffle(rows)
    held_out = max(1, round(section.held_out * len(rows)))
    require(
        len(rows) - held_out >= section.batch_size,
        f"data.preferences: found {len(rows)} pairs, {held_out} of them held out, expected at least reward.batch_size ="
        f" {section.batch_size} to train on",
    )
    # 2. the base with a score head, its adapter a copy of seed-0's
    bench = Workbench.of(job)
    torch.manual_seed(SPLIT_SEED)
    config, tensors = adapters.read(job.inputs["sft/seed-0"])
    config.task_type, config.modules_to_save, config.inference_mode = "SEQ_CLS", ["score"], False
    model = get_peft_model(bench.classifier(), config)
    set_peft_model_state_dict(model, get_peft_model_state_dict(model) | tensors)
    # 3. train
    trainer = RewardTrainer(
        model=model,
        args=RewardConfig(
            **training_arguments(section, job.folder / "trainer", SPLIT_SEED),
            per_device_eval_batch_size=section.micro_batch_size or section.batch_size,
            max_length=recipe.model.max_length,
        ),
        train_dataset=Dataset.from_list(rows[held_out:]),
        eval_dataset=Dataset.from_list(rows[:held_out]),
        processing_class=bench.tokenizer,
        callbacks=[Bar(job.unit.id, job.folder)],
    )
    counts = {"train": len(trainer.train_dataset), "held_out": len(trainer.eval_dataset)}
    require(
        counts["train"] >= section.batch_size and counts["held_out"] > 0,
        f"data.preferences: found {counts['train']} pairs to train on and {counts['held_out']} held out within"
        f" model.max_length = {recipe.model.max_length} tokens, expected at least {section.batch_size} and 1",
    )
    quiet(trainer)
    result = trainer.train()
    margins = held_out_margins(trainer)
    bench.save(model, "default", job.folder)
    # 4. what came out
    metrics = {
        "accuracy": {"held_out": asdict(mean_interval([float(margin > 0) for margin in margins]))},
        "margin": {"held_out": asdict(mean_interval(margins))},
        "loss": result.training_loss,
        "pairs": counts,
        "left_out": len(rows) - sum(counts.values()),
        "steps": trainer.state.global_step,
    }
    write_atomic(job.folder / "metrics.json", json.dumps(metrics, indent=2))
    return metrics


@torch.no_grad()
def held_out_margins(trainer: Any) -> list[float]:
    """R(chosen) − R(rejected) of every pair of the trainer's evaluation set."""
    trainer.model.eval()
    margins: list[float] = []
    for batch in trainer.get_eval_dataloader():
        scores = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.squeeze(-1).float()
        chosen, rejected = scores.chunk(2)
        margins += (chosen - rejected).tolist()
    return margins
