"""The stages dpo, kto, rloo and grpo: policies trained by TRL's trainers against any reference.

With the soup as reference, these stages apply SALSA's idea to other algorithms (the paper's future work). A stage that
was killed goes on from its newest checkpoint (training/train.py). Sharding is not supported.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from salsa_peft.config.job import Job
from salsa_peft.data import datasets, tokenized
from salsa_peft.data.chat.template_fields import messages_for_template
from salsa_peft.data.chat.turn_ends import model_stop_token_ids
from salsa_peft.data.splits import Split, split_by_prompt
from salsa_peft.models import precision
from salsa_peft.models.adapters import lora
from salsa_peft.models.base import causal_lm, device, is_quantised
from salsa_peft.models.responses import pad_responses
from salsa_peft.models.rewards.reward import recipe_reward
from salsa_peft.models.stage_context import (
    ProgressBar,
    StageContext,
    prompts_that_fit,
    remove_printer,
    report_left_out,
)
from salsa_peft.training.ppo_stage import build_policy, export_merged, start_folder
from salsa_peft.training.reward_model import margin_metrics
from salsa_peft.training.train import resumable, run_trainer
from salsa_peft.training.trl_reference import use_reference
from salsa_peft.utils.files import write_atomic

if TYPE_CHECKING:
    from datasets import Dataset

    from salsa_peft.models.rewards.base import Reward
    from salsa_peft.training.references import FrozenReference


def run(job: Job) -> dict[str, Any]:
    """Train the policy that the unit names, and save it as an adapter or checkpoint.

    With `export: merged` an adapter is also saved merged into its base.
    """
    algorithm = job.unit.stage
    # 1. the policy starts from a trained model; references are frozen
    context = StageContext.of_job(job)
    model, references = build_policy(context, job, "default")  # TRL expects this adapter name
    # 2. TRL's trainer, with the recipe's references
    trainer, held_out, facts = TRAINERS[algorithm](context, job, model, references)
    if is_quantised(model):  # TRL has rounded the factors to bfloat16
        precision.make_trained_float32(model)
        lora.load(model, "default", start_folder(job))
    use_reference(trainer, references)
    remove_printer(trainer)
    # 3. train, measure, save
    loss = run_trainer(trainer, job.unit.id, references)
    facts = {
        "algorithm": algorithm,
        "reference": ", ".join(reference.label for reference in references),
        "kl_coef": {"start": trainer.beta, "end": trainer.beta},
        "steps": trainer.state.global_step,
        **facts,
        "loss": loss,
        **last_metrics(trainer),
        **({} if held_out is None else margins(trainer, held_out)),
    }
    context.save(trainer, job.folder)
    write_atomic(job.folder / "policy.json", json.dumps(facts, indent=2))
    del trainer, model
    export_merged(context, job)
    return facts


TrainerSetup = tuple[Any, "Dataset | None", dict[str, Any]]
"""A trainer, the held-out pairs (None without pairs), and the numbers of rows for policy.json."""


def arguments(context: StageContext, job: Job) -> dict[str, Any]:
    """The arguments for the config of any of the four TRL trainers."""
    section = getattr(job.recipe, job.unit.stage)
    return {
        **context.arguments(section, job.folder, section.seed),
        "beta": section.kl_coef,
        "disable_dropout": True,
    }


def pairs(job: Job) -> tuple[Dataset, Dataset, dict[str, Any]]:
    """Training pairs, held-out pairs and their numbers; pairs longer than model.max_length are left out.

    If the held-out share is the reward stage's, both stages hold out the same pairs.
    """
    section, longest = getattr(job.recipe, job.unit.stage), job.recipe.model.max_length
    rows = tokenized.load(job.inputs["data/preferences"])
    kept = tokenized.pairs_that_fit(rows, longest)
    report_left_out(job, len(rows) - len(kept), len(rows), f"longer than model.max_length = {longest} tokens")
    section.check_rows(len(kept), job.unit.stage)
    split = split_by_prompt(kept["prompt_digest"][:], section.held_out_rows(len(kept)))
    section.check_rows(len(kept), job.unit.stage, len(split.held_out))
    parts = [kept.remove_columns([*tokenized.PAIR_TOKENS, "prompt_digest"]).select(part) for part in split]
    facts = {"pairs": dict(zip(Split._fields, map(len, split), strict=True)), "left_out": len(rows) - len(kept)}
    return parts[0], parts[1], facts


def dpo(context: StageContext, job: Job, model: Any, references: list[FrozenReference]) -> TrainerSetup:
    """Set up DPO on the preference pairs."""
    from trl import DPOConfig, DPOTrainer

    train, test, facts = pairs(job)
    trainer = resumable(DPOTrainer)(
        model,
        ref_model=references[0].model,  # with full weights, TRL would otherwise load a reference itself
        args=DPOConfig(
            **arguments(context, job),
            loss_type=[job.recipe.dpo.loss_type],
            max_length=job.recipe.model.max_length,
            per_device_eval_batch_size=1,
        ),
        train_dataset=train,
        eval_dataset=test,
        processing_class=context.tokenizer,
        callbacks=[ProgressBar(job.unit.id, job.folder)],
    )
    return trainer, test, facts


def kto(context: StageContext, job: Job, model: Any, references: list[FrozenReference]) -> TrainerSetup:
    """Set up KTO: each preference pair gives one desirable and one undesirable response."""
    from trl import KTOConfig, KTOTrainer, maybe_extract_prompt, maybe_unpair_preference_dataset

    train, _, facts = pairs(job)
    trainer = resumable(KTOTrainer)(
        model,
        ref_model=references[0].model,
        args=KTOConfig(
            **arguments(context, job),
            desirable_weight=job.recipe.kto.desirable_weight,
            undesirable_weight=job.recipe.kto.undesirable_weight,
            max_length=job.recipe.model.max_length,
        ),
        train_dataset=maybe_unpair_preference_dataset(train.map(maybe_extract_prompt)),
        processing_class=context.tokenizer,
        callbacks=[ProgressBar(job.unit.id, job.folder)],
    )
    return trainer, None, facts


def rloo_or_grpo(context: StageContext, job: Job, model: Any, references: list[FrozenReference]) -> TrainerSetup:
    """Set up RLOO or GRPO with the recipe's reward.

    Raises SalsaError for rows with options for the chat template, which TRL does not pass to the template.
    """
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

    trainer: Any
    trainer, config = (RLOOTrainer, RLOOConfig) if job.unit.stage == "rloo" else (GRPOTrainer, GRPOConfig)
    recipe, section = job.recipe, getattr(job.recipe, job.unit.stage)
    source = datasets.training_sources(recipe, job.inputs)["prompts"]
    rows = datasets.prompts(source, columns=recipe.reward.reads_columns, tokenizer=context.tokenizer)
    datasets.check_no_template_options(rows, job.unit.stage)
    rows = [{**row, "prompt": messages_for_template(row["prompt"], context.tokenizer)} for row in rows]
    kept = prompts_that_fit(job, context, rows, "data.prompts")
    section.check_rows(len(kept), job.unit.stage)
    reward = recipe_reward(recipe, model, job.inputs, context.tokenizer, section.micro_batch_size or section.batch_size)
    if recipe.adapter is not None:
        sample_under_autocast(model)
    made = resumable(trainer)(
        model,
        args=config(
            **arguments(context, job),
            num_generations=section.num_generations,
            max_completion_length=recipe.generation.max_new_tokens,
            temperature=recipe.generation.temperature,
        ),
        reward_funcs=as_function(reward, context, model_stop_token_ids(context.tokenizer, causal_lm(model))),
        train_dataset=datasets.to_dataset(kept),
        processing_class=context.tokenizer,
        callbacks=[ProgressBar(job.unit.id, job.folder)],
    )
    return made, None, {"prompts": len(kept), "left_out": len(rows) - len(kept)}


def sample_under_autocast(model: Any) -> None:
    """Make model.generate run under autocast where training does, so that tokens are sampled as they are scored.

    A Trainer's autocast is around the forward of a PeftModel, which its generate does not call.
    """
    generate = model.generate

    def sample(*args: Any, **options: Any) -> Any:
        with precision.autocast(model):
            return generate(*args, **options)

    model.generate = sample


def as_function(reward: Reward, context: StageContext, ends: tuple[int, ...]) -> Callable[..., list[float]]:
    """Wrap a Reward as a TRL reward function. ends: ids of the tokens that end a response."""
    pad = int(context.tokenizer.pad_token_id)  # type: ignore[arg-type]
    idle = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric", "environments")

    def score(prompts: list[Any], completion_ids: list[list[int]], **given: Any) -> list[float]:
        columns = {name: values for name, values in given.items() if name not in idle}
        rows = [
            {"prompt": prompt, **{name: values[i] for name, values in columns.items()}}
            for i, prompt in enumerate(prompts)
        ]
        asked = [datasets.prompt_tokens(row, context.tokenizer) for row in rows]
        responses = pad_responses(asked, completion_ids, pad, ends, device())
        return reward(responses, rows).tolist()

    score.__name__ = "reward"
    return score


def last_metrics(trainer: Any) -> dict[str, float]:
    """The KL and reward metrics that the trainer logged last."""
    wanted = ("kl", "reward", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
    rows = [row for row in trainer.state.log_history if set(wanted) & set(row)]
    return {name: rows[-1][name] for name in wanted if rows and name in rows[-1]}


@torch.no_grad()
def margins(trainer: Any, held_out: Dataset) -> dict[str, Any]:
    """margin_metrics of DPO's implicit reward, β log(π / π_ref), on the held-out pairs."""
    model = trainer.model.eval()
    for batch in trainer.get_eval_dataloader():  # one pair in each batch
        trainer.compute_loss(model, trainer._prepare_inputs(batch))
    found = trainer._metrics["eval"].pop("rewards/margins")
    assert len(found) == len(held_out)
    return margin_metrics(found)


TRAINERS: dict[str, Callable[[StageContext, Job, Any, list[FrozenReference]], TrainerSetup]] = {
    "dpo": dpo,
    "kto": kto,
    "rloo": rloo_or_grpo,
    "grpo": rloo_or_grpo,
}
