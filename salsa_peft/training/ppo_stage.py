"""The ppo stage: SalsaPPOTrainer trains one policy of the recipe against its references."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list

from salsa_peft.config.job import Job
from salsa_peft.config.options.ppo import PPOOptions, Sampling
from salsa_peft.data import datasets
from salsa_peft.models.adapters import forward, lora
from salsa_peft.models.base import resolve_dtype
from salsa_peft.models.rewards.quality import between_prompt_share
from salsa_peft.models.rewards.reward import recipe_reward
from salsa_peft.models.stage_context import ProgressBar, StageContext, model_folder, result_folders
from salsa_peft.models.weights import cast_weights
from salsa_peft.soup.average import soup
from salsa_peft.training import checkpoints
from salsa_peft.training.ppo.config import SalsaPPOConfig
from salsa_peft.training.ppo.trainer import SalsaPPOTrainer
from salsa_peft.training.references import FrozenReference, attach_reference, freeze, load_reference
from salsa_peft.utils.files import write_atomic


def ppo_config(context: StageContext, folder: Path) -> SalsaPPOConfig:
    """The SalsaPPOConfig of a policy's recipe: its `ppo` and `generation`."""
    recipe, section = context.recipe, context.recipe.ppo
    arguments = context.arguments(section, folder, section.seed)
    for derived in ("per_device_train_batch_size", "gradient_accumulation_steps"):
        del arguments[derived]
    arguments |= {field.name: getattr(section, field.name) for field in dataclasses.fields(PPOOptions)}
    arguments |= {field.name: getattr(recipe.generation, field.name) for field in dataclasses.fields(Sampling)}
    arguments |= {
        "batch_size": section.batch_size,
        "micro_batch_size": section.micro_batch_size,
        "max_prompt_length": section.max_prompt_length or recipe.model.max_length - recipe.generation.max_new_tokens,
        "save_strategy": "steps",
        "save_steps": section.save_steps,
        "save_total_limit": 2,
        "logging_strategy": "no",
        "report_to": recipe.report_to or "none",
        "eval_strategy": "no" if section.eval_prompts is None else "steps",
        "eval_steps": section.eval_steps,
        "offload": recipe.offload,
    }
    return SalsaPPOConfig(**arguments)


def build_policy(context: StageContext, job: Job, name: str = "policy") -> tuple[Any, list[FrozenReference]]:
    """The policy, which is a trainable copy of its start, and its frozen references.

    With LoRA, policy and references are adapters on one base, and the policy's adapter is called `name`. With full
    weights, the policy and each reference are separate models.
    """
    start = start_folder(job)
    wanted = context.recipe.policies[job.unit.name].references(f"policies.{job.unit.name}")
    context.check(job.inputs, wanted)
    if context.recipe.adapter is not None:
        model: Any = lora.attach(context.load_base(), start, name, trainable=True)
        references = [
            attach_reference(model, reference, result_folders(job.inputs), f"reference-{index}", start)
            for index, reference in enumerate(wanted)
        ]
        forward.install(model)  # also for TRL's trainers
        return model, references
    model, frozen = context.load_trainable(start), []
    for reference in wanted:
        own = context.load_base() if reference.sync_every is None else context.load_moving()
        load_reference(own, reference, context, job.inputs)
        sync = {"sync_every": reference.sync_every, "mixup_alpha": reference.mixup_alpha}
        frozen.append(freeze(model, own, reference.label)._replace(**sync))  # type: ignore[arg-type]
    return model, frozen


def start_folder(job: Job) -> Path:
    """The folder of the model where the training of the unit's policy starts."""
    return model_folder(job.recipe, job.inputs, job.recipe.policies[job.unit.name].start)


def run(job: Job) -> dict[str, Any]:
    """Train the policy that the unit names, and save it as an adapter or checkpoint.

    With `export: merged` an adapter is also saved merged into its base.
    """
    recipe = job.recipe
    # 1. the policy starts from a trained model; references and reward are frozen
    context = StageContext.of_job(job)
    model, references = build_policy(context, job)
    micro = recipe.ppo.rollout_batch_size or recipe.ppo.batch_size
    reward = recipe_reward(recipe, model, job.inputs, context.tokenizer, micro)
    # 2. PPO
    source = datasets.training_sources(recipe, job.inputs)["prompts"]
    prompts = datasets.prompts(source, columns=recipe.reward.reads_columns)
    trainer = SalsaPPOTrainer(
        model,
        args=ppo_config(context, job.folder),
        train_dataset=prompts,
        references=references,
        reward_funcs=reward,
        processing_class=context.tokenizer,
        eval_dataset=evaluation_prompts(job),
        callbacks=[ProgressBar(job.unit.id, job.folder, beside_table=True)],
    )
    trainer.guards.between_prompt_share = between_prompt_share(job.inputs)
    trainer.how_to_resume = "the same command continues from it"
    trainer.checkpoints.remedy = checkpoints.start_again(job.unit.id)
    trainer.table.name = job.unit.id
    (checkpoint,) = broadcast_object_list(
        [checkpoints.newest_of(job.folder, job.unit.id) if trainer.is_world_process_zero() else None]
    )
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    # 3. save the policy in the base's dtype, its value head, and facts about the run
    if recipe.adapter is None:
        trainer.saved_dtype = resolve_dtype(recipe.model.dtype)
        if not recipe.sharded:
            cast_weights(model, trainer.saved_dtype)
    trainer.save_model(str(job.folder))
    facts: dict[str, Any] = {
        "reference": ", ".join(reference.label for reference in references),
        "kl_coef": {"start": trainer.args.kl_coef, "end": trainer.ppo.kl_coef},
        "updates": trainer.ppo.update,
        "prompts": len(prompts) - trainer.left_out,
        "left_out": trainer.left_out,
        "skipped_minibatches": trainer.ppo.skipped,
    }
    maker = trainer.rollout_maker
    for limit in (trainer.micro_batch_limit, maker.scoring_limit, maker.micro_batch_limit):
        if limit.rows < limit.configured:  # halved after an out-of-memory error
            facts[limit.option] = min(limit.rows, facts.get(limit.option, limit.rows))
    if not trainer.is_world_process_zero():
        return facts
    context.write_fingerprint(job.folder)
    write_atomic(job.folder / "policy.json", json.dumps(facts, indent=2))
    del trainer, model, reward
    export_merged(context, job)
    return facts


def evaluation_prompts(job: Job) -> list[dict[str, Any]] | None:
    """The rows of the prompt source that `ppo.eval_prompts` names; None if the option is not set."""
    section = job.recipe.ppo
    if section.eval_prompts is None:
        return None
    source = datasets.evaluation_sources(job.recipe, job.inputs.get("toy"))[section.eval_prompts]
    return datasets.prompts(source, columns=job.recipe.reward.reads_columns)[: section.eval_limit]


def export_merged(context: StageContext, job: Job) -> None:
    """With `export: merged`, save the policy's adapter merged into its base, in the folder `merged`.

    The dtype is that of the base's files; a quantised base is dequantised first. Does nothing for full weights.
    """
    folder, recipe = job.folder / "merged", job.recipe
    if "merged" in recipe.export and recipe.adapter is not None:
        soup(folder, [job.folder], merge=True, base=context.folder, quantized_base=recipe.model.quantization)
        context.tokenizer.save_pretrained(folder)
