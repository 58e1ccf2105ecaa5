"""The reward stage: TRL's RewardTrainer trains a reward model, or several, which are averaged.

A reward model starts from seed-0 with a new score head, which is linear on the last token and has no bias (paper 3.1,
A.2). With c = reward.center_rewards_coefficient (null: 0, as in the paper), the loss is

    −log σ(R(x, y_w) − R(x, y_l)) + c · (R(x, y_w) + R(x, y_l))²
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

from salsa_peft.config.job import Job
from salsa_peft.config.schema import Recipe
from salsa_peft.data import tokenized
from salsa_peft.data.splits import SPLIT_SEED, Split, split_by_prompt
from salsa_peft.data.tokenized import PAIR_TOKENS
from salsa_peft.models import precision
from salsa_peft.models.adapters import forward, lora
from salsa_peft.models.base import is_quantised, resolve_dtype
from salsa_peft.models.rewards.quality import accuracy, calibration, spread
from salsa_peft.models.stage_context import ProgressBar, StageContext, remove_printer, report_left_out
from salsa_peft.models.weights import cast_weights, load_weights
from salsa_peft.training import checkpoints
from salsa_peft.training.train import resumable, run_trainer
from salsa_peft.utils.console import say
from salsa_peft.utils.errors import require
from salsa_peft.utils.files import read_json, write_atomic
from salsa_peft.utils.statistics import mean_interval

FEW_PAIRS = 30
"""With fewer held-out pairs a warning is printed.

Wilson's 95% interval of an accuracy on 30 pairs is up to 0.34 wide.
"""


def run(job: Job) -> dict[str, Any]:
    """Train a reward model for each of `reward.seeds`; average them if there are several.

    The result is saved with its score head as a PEFT adapter, or as a sequence classifier's checkpoint.
    """
    seeds = job.recipe.reward.seeds
    if len(seeds) == 1:
        trainer, facts = make_trainer(job, seeds[0], job.folder)
        metrics = train(job, trainer, job.folder) | facts
    else:
        trainer, metrics = train_soup(job, seeds)
    if trainer.is_world_process_zero():
        write_atomic(job.folder / "metrics.json", json.dumps(metrics, indent=2))
        say(f"{job.unit.id}  {describe(metrics)}")
        if (pairs := metrics["accuracy"]["held_out"]["n"]) < FEW_PAIRS:
            say(
                f"{job.unit.id}  warning: the accuracy was measured on {pairs} held-out pair{'s' * (pairs > 1)} only",
                "yellow",
            )
    return metrics


def train_soup(job: Job, seeds: Sequence[int]) -> tuple[Any, dict[str, Any]]:
    """Train a reward model for each seed and average the models (WARM, section 3).

    Returns the trainer of the average, and its metrics. All members start from the same weights and hold out the
    same pairs; the seed sets the order of the data. A member that was trained before the stage was killed is not
    trained again.
    """
    from salsa_peft.soup.average import soup

    members: list[dict[str, Any]] = []
    trainer: Any = None
    finished = False
    for seed in seeds:
        folder = job.folder / f"seed-{seed}"
        metrics, finished = folder / "metrics.json", (folder / "metrics.json").is_file()
        if not finished or seed == seeds[-1]:  # the last trainer is needed to measure the average
            trainer = None  # frees the previous trainer's memory
            trainer, facts = make_trainer(job, seed, folder)
        if not finished:
            found = {"seed": seed, **train(job, trainer, folder), **facts}
            if trainer.is_world_process_zero():
                write_atomic(metrics, json.dumps(found, indent=2))
        if trainer is None or trainer.is_world_process_zero():
            checkpoints.remove_all(folder)  # also those of a member that was finished just before a kill
        members.append(read_json(metrics) if finished else found)
    names = [f"seed-{seed}" for seed in seeds]
    if trainer.is_world_process_zero():
        average = job.folder / "average"
        shutil.rmtree(average, ignore_errors=True)  # left by a killed process
        soup(average, [job.folder / name for name in names], names=names)
        for file in average.iterdir():
            file.rename(job.folder / file.name)
        average.rmdir()
    trainer.accelerator.wait_for_everyone()
    if isinstance(trainer.model, PeftModel):
        base, device = StageContext.of_job(job).load_classifier(), trainer.model.device
        trainer.model = PeftModel.from_pretrained(base, job.folder).to(device)
        forward.install(trainer.model)
    else:
        if finished:  # the last member was saved, and cast for that, before the stage was killed
            cast_weights(trainer.model, resolve_dtype(job.recipe.model.dtype))
        load_weights(trainer.model, job.folder)
    return trainer, {**members[-1], "seed": None, **held_out_metrics(held_out_scores(trainer)), "members": members}


def make_trainer(job: Job, seed: int, folder: Path) -> tuple[Any, dict[str, Any]]:
    """The trainer of a reward model, with training and held-out pairs, and the numbers of pairs for metrics.json."""
    from trl import RewardConfig, RewardTrainer

    recipe, section = job.recipe, job.recipe.reward
    # 1. pairs
    context = StageContext.of_job(job)
    rows = tokenized.load(job.inputs["data/preferences"], *PAIR_TOKENS, "prompt_digest")
    fitting = tokenized.pairs_that_fit(rows, recipe.model.max_length)
    limit = f"longer than model.max_length = {recipe.model.max_length} tokens"
    report_left_out(job, len(rows) - len(fitting), len(rows), limit)
    pairs = split_pairs(recipe, len(rows), fitting["prompt_digest"][:])
    # 2. a score head on a copy of seed-0
    model = start_from_seed(context, job.inputs["sft/seed-0"])
    # 3. the trainer
    trainer: Any = resumable(RewardTrainer)(
        model=model,
        args=RewardConfig(
            **context.arguments(section, folder, seed),
            per_device_eval_batch_size=section.micro_batch_size or section.batch_size // recipe.num_processes,
            max_length=None,
            center_rewards_coefficient=section.center_rewards_coefficient,
        ),
        train_dataset=fitting.select(pairs.train),
        eval_dataset=fitting.select(pairs.held_out),
        processing_class=context.tokenizer,
        callbacks=[ProgressBar(job.unit.id, folder)],
    )
    if is_quantised(model):  # TRL has rounded the factors to bfloat16
        precision.make_trained_float32(model)
        copy_adapter(model, job.inputs["sft/seed-0"])
    set_padding_token(trainer)
    remove_printer(trainer)
    numbers = {"train": len(pairs.train), "held_out": len(pairs.held_out)}
    return trainer, {"pairs": numbers, "left_out": len(rows) - len(fitting)}


def train(job: Job, trainer: Any, folder: Path) -> dict[str, Any]:
    """Train, save (in `folder`) and evaluate a reward model. Returns its metrics."""
    loss = run_trainer(trainer, job.unit.id)
    StageContext.of_job(job).save(trainer, folder)
    return {**held_out_metrics(held_out_scores(trainer)), "loss": loss, "steps": trainer.state.global_step}


def set_padding_token(trainer: Any) -> None:
    """Set a new padding token if sequences of the pairs end with the tokenizer's padding token.

    Transformers' classifiers compute the score at the last token that is not the padding token.
    """
    pad = trainer.processing_class.pad_token_id
    parts = [part for part in (trainer.train_dataset, trainer.eval_dataset) if part is not None]
    last_tokens = {ids[-1] for part in parts for side in PAIR_TOKENS for ids in part[side]}
    if pad in last_tokens:
        pad = next(token for token in range(len(last_tokens) + 1) if token not in last_tokens)
        trainer.data_collator.pad_token_id = trainer.model.config.get_text_config().pad_token_id = pad


def split_pairs(recipe: Recipe, pairs: int, prompts: Sequence[str]) -> Split:
    """Split the pairs that are short enough by prompt. Raises SalsaError if the training pairs do not fill a batch.

    pairs: number of all pairs. prompts: the prompt of each pair that is short enough.
    """
    section, fitting, wanted = recipe.reward, len(prompts), recipe.reward.held_out_rows(len(prompts))
    split = split_by_prompt(prompts, wanted) if wanted < fitting else Split([], [])
    require(
        len(split.train) >= section.batch_size,
        f"data.preferences: of {pairs} pairs, {pairs - fitting} are longer than model.max_length ="
        f" {recipe.model.max_length} tokens, and {len(split.held_out) or wanted} are held out (reward.held_out ="
        f" {section.held_out:g}). The {len(split.train)} pairs left to train on are fewer than reward.batch_size ="
        f" {section.batch_size}. Add pairs, raise model.max_length or lower reward.batch_size",
    )
    return split


def start_from_seed(context: StageContext, seed: Path) -> Any:
    """A classifier with seed-0's full weights, or with the base and a copy of seed-0's adapter."""
    torch.manual_seed(SPLIT_SEED)
    adapters = context.recipe.adapter is not None
    classifier: Any = context.load_classifier(None if adapters else seed)
    if context.recipe.reward.zero_score_head:
        torch.nn.init.zeros_(classifier.score.weight)
    if not adapters:
        return classifier
    config, _ = lora.read(seed)
    config.task_type, config.modules_to_save, config.inference_mode = "SEQ_CLS", ["score"], False
    model = get_peft_model(classifier, config)
    copy_adapter(model, seed)
    forward.install(model)
    return model


def copy_adapter(model: Any, folder: Path) -> None:
    """Load the LoRA factors of the adapter in `folder`, and leave the model's score head unchanged."""
    set_peft_model_state_dict(model, get_peft_model_state_dict(model) | lora.read(folder)[1])


def margin_metrics(margins: Sequence[float] | np.ndarray) -> dict[str, Any]:
    """Accuracy and mean of the held-out margins R(chosen) − R(rejected), each with its 95% interval."""
    return {"accuracy": {"held_out": accuracy(margins)}, "margin": {"held_out": asdict(mean_interval(margins))}}


def held_out_metrics(scores: np.ndarray) -> dict[str, Any]:
    """Measures on the held-out pairs' scores (N, 2), chosen and rejected: margin_metrics, calibration and spread.

    In `spread`, a pair is a prompt with two responses.
    """
    margins = scores[:, 0] - scores[:, 1]
    more = {"calibration": {"held_out": calibration(margins)}, "spread": {"held_out": spread(scores)}}
    return {**margin_metrics(margins), **more}


def describe(metrics: dict[str, Any]) -> str:
    """A line on the held-out pairs: accuracy, in all and for the smallest and largest margins, and calibration."""
    right, table = metrics["accuracy"]["held_out"], metrics["calibration"]["held_out"]
    ends = [f"{table['bins'][place]['observed']['mean']:.0%}" for place in (0, -1)]
    return (
        f"ranks {right['mean']:.1%} [{right['low']:.1%}, {right['high']:.1%}] of {right['n']} held-out pairs right"
        f" ({ends[0]} at the smallest margins, {ends[1]} at the largest); calibration error {table['ece']:.1%}"
    )


@torch.no_grad()
def held_out_scores(trainer: Any) -> np.ndarray:
    """Scores (N, 2) of chosen and rejected of all held-out pairs, in their order; the same in all processes."""
    trainer.model.eval()
    scores: list[list[float]] = []
    for batch in trainer.get_eval_dataloader():
        with precision.autocast(trainer.model):  # also of an average, which no Trainer has prepared
            output = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        pairs = torch.stack(output.logits.squeeze(-1).float().chunk(2), dim=-1)
        scores += trainer.accelerator.gather_for_metrics(pairs).tolist()
    return np.array(scores)
