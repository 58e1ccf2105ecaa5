"""The reward stage: seed-0's adapter, or weights, copied, and a score head, trained by TRL's RewardTrainer; or a soup of such.

Loss −log σ(R(x, y_w) − R(x, y_l)); the head is linear on the last token that counts, without bias (paper 3.1, A.2).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

from salsa_peft.config.job import Job
from salsa_peft.config.schema import Recipe
from salsa_peft.data import datasets
from salsa_peft.models.adapters import lora
from salsa_peft.models.base import is_quantised
from salsa_peft.models.stage_context import ProgressBar, StageContext, mean_loss, remove_printer, report_left_out
from salsa_peft.models.weights import load_weights
from salsa_peft.utils.errors import require
from salsa_peft.utils.files import write_atomic
from salsa_peft.utils.statistics import mean_interval

SPLIT_SEED = 0
FEW = 30
"""Held-out pairs of which fewer say little: of 30 Wilson's interval is up to 0.34 wide."""


def run(job: Job) -> dict[str, Any]:
    """Train one reward model, or one for each of `reward.seeds` and average them; save it with its head as one ordinary PEFT adapter, or
    as a sequence classifier's checkpoint."""
    seeds = job.recipe.reward.seeds
    trainer, metrics = train(job, seeds[0], job.folder) if len(seeds) == 1 else average(job, seeds)
    if trainer.is_world_process_zero():
        write_atomic(job.folder / "metrics.json", json.dumps(metrics, indent=2))
        if (pairs := metrics["accuracy"]["held_out"]["n"]) < FEW:
            count = f"{pairs} pair{'s' * (pairs > 1)}"
            print(f"{job.unit.id}  warning: accuracy measured on {count} only", file=sys.stderr, flush=True)
    return metrics


def average(job: Job, seeds: Sequence[int]) -> tuple[Any, dict[str, Any]]:
    """The soup of a reward model for each seed: one start and one held-out set, other orders of the data (WARM, section 3)."""
    from salsa_peft.soup.average import soup

    members = []
    trainer: Any = None
    for seed in seeds:
        trainer = None  # the one before gives its memory back first
        trainer, found = train(job, seed, job.folder / f"seed-{seed}")
        members.append({"seed": seed, **found})
    names = [f"seed-{seed}" for seed in seeds]
    if trainer.is_world_process_zero():
        soup(job.folder / "cooked", [job.folder / name for name in names], names=names)
        for file in (job.folder / "cooked").iterdir():
            file.rename(job.folder / file.name)
        (job.folder / "cooked").rmdir()
    trainer.accelerator.wait_for_everyone()
    if isinstance(trainer.model, PeftModel):
        trainer.model = PeftModel.from_pretrained(StageContext.of_job(job).load_classifier(), job.folder).to(
            trainer.model.device
        )
    else:
        load_weights(trainer.model, job.folder)
    return trainer, {**members[-1], "seed": None, **held_out(trainer), "members": members}


def train(job: Job, seed: int, folder: Path) -> tuple[Any, dict[str, Any]]:
    """Train on the pairs, measure accuracy on the held-out ones, save → the trainer and its figures."""
    from trl import RewardConfig, RewardTrainer

    recipe, section = job.recipe, job.recipe.reward
    # 1. pairs
    context = StageContext.of_job(job)
    rows = datasets.preferences(
        datasets.training_sources(recipe, job.inputs.get("toy"))["preferences"], context.tokenizer
    )
    # 2. a score head on a copy of seed-0
    model = start(context, job.inputs["sft/seed-0"])
    # 3. the trainer
    trainer: Any = RewardTrainer(
        model=model,
        args=RewardConfig(
            **context.arguments(section, folder / "trainer", seed),
            per_device_eval_batch_size=section.micro_batch_size or section.batch_size // recipe.num_processes,
            max_length=recipe.model.max_length,
        ),
        train_dataset=datasets.to_dataset(rows),
        processing_class=context.tokenizer,
        callbacks=[ProgressBar(job.unit.id, folder)],
    )
    if is_quantised(model):
        lora.cast_trainable_to_float32(model)
        copy_adapter(model, job.inputs["sft/seed-0"])
    pad_apart(trainer)
    # 4. a share of the pairs that are short enough is held out
    fitting = len(trainer.train_dataset)
    kept_out = count_held_out(recipe, len(rows), fitting)
    limit = f"longer than model.max_length = {recipe.model.max_length} tokens"
    report_left_out(job, len(rows) - fitting, len(rows), limit)
    parts = trainer.train_dataset.train_test_split(test_size=kept_out, seed=SPLIT_SEED)
    trainer.train_dataset, trainer.eval_dataset = parts["train"], parts["test"]
    # 5. train, save, measure
    remove_printer(trainer)
    loss = mean_loss(trainer, trainer.train().training_loss)
    context.save(trainer, folder)
    return trainer, {
        **held_out(trainer),
        "loss": loss,
        "pairs": {"train": fitting - kept_out, "held_out": kept_out},
        "left_out": len(rows) - fitting,
        "steps": trainer.state.global_step,
    }


def pad_apart(trainer: Any) -> None:
    """Pad with a token that stands at no sequence's end, where the tokenizer's padding token might: Transformers' classifiers score the last
    token that is not the padding token's id, and have no other way of finding a sequence's end."""
    pad = trainer.processing_class.pad_token_id
    lasts = {ids[-1] for side in ("chosen_ids", "rejected_ids") for ids in trainer.train_dataset[side]}
    if pad in lasts:
        pad = next(token for token in range(len(lasts) + 1) if token not in lasts)
        trainer.data_collator.pad_token_id = trainer.model.config.get_text_config().pad_token_id = pad


def count_held_out(recipe: Recipe, pairs: int, fitting: int) -> int:
    """Pairs that are held out, of those that are short enough. Raises SalsaError where the others don't fill a batch."""
    section = recipe.reward
    kept_out = section.held_out_rows(fitting)
    require(
        fitting - kept_out >= section.batch_size,
        f"data.preferences: found {pairs} pairs, {pairs - fitting} longer than model.max_length = {recipe.model.max_length} tokens and"
        f" {kept_out} held out (reward.held_out {section.held_out:g}), which leaves {fitting - kept_out} to train on, expected at least"
        f" reward.batch_size = {section.batch_size}; add pairs, raise model.max_length or lower reward.batch_size",
    )
    return kept_out


def start(context: StageContext, seed: Path) -> Any:
    """A new score head on seed-0: on its weights, or on the base under a copy of its adapter."""
    torch.manual_seed(SPLIT_SEED)
    if context.recipe.adapter is None:
        return context.load_classifier(seed)
    config, _ = lora.read(seed)
    config.task_type, config.modules_to_save, config.inference_mode = "SEQ_CLS", ["score"], False
    model = get_peft_model(context.load_classifier(), config)
    copy_adapter(model, seed)
    return model


def copy_adapter(model: Any, folder: Path) -> None:
    """The factors of the adapter in `folder`; the score head stays."""
    set_peft_model_state_dict(model, get_peft_model_state_dict(model) | lora.read(folder)[1])


def held_out(trainer: Any) -> dict[str, Any]:
    """Accuracy and margin on the held-out pairs, with intervals."""
    margins = held_out_margins(trainer)
    return {"accuracy": {"held_out": accuracy(margins)}, "margin": {"held_out": asdict(mean_interval(margins))}}


def accuracy(margins: Sequence[float]) -> dict[str, float]:
    """Share of pairs whose chosen response scores more, with Wilson's 95% interval, which few pairs, all of them right, leave wide."""
    from scipy.stats import binomtest

    found = binomtest(sum(margin > 0 for margin in margins), len(margins))
    interval = found.proportion_ci(method="wilson")
    return {"mean": found.statistic, "low": float(interval.low), "high": float(interval.high), "n": len(margins)}


@torch.no_grad()
def held_out_margins(trainer: Any) -> list[float]:
    """R(chosen) − R(rejected) of every pair of the trainer's evaluation set, in its order, in all processes."""
    trainer.model.eval()
    margins: list[float] = []
    for batch in trainer.get_eval_dataloader():
        scores = (
            trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
            .logits.squeeze(-1)
            .float()
        )
        chosen, rejected = scores.chunk(2)
        margins += trainer.accelerator.gather_for_metrics(chosen - rejected).tolist()
    return margins
