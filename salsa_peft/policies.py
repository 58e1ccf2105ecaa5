"""The ppo stage: one policy of the recipe, trained by SalsaPPOTrainer against its references, all on one base."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from typing import Any

from . import adapters, checkpoints, data, rewards
from .config import PPOOptions, Recipe, Sampling
from .ppo import SalsaPPOTrainer
from .ppo_config import SalsaPPOConfig
from .references import Frozen, attach_reference
from .runs import Job, write_atomic
from .workbench import Bar, Workbench, quiet, seeds_of, training_arguments


def ppo_config(recipe: Recipe, policy: str, folder: str) -> SalsaPPOConfig:
    """A policy's SalsaPPOConfig: the `ppo` and `generation` sections and the policy's own β."""
    section, own = recipe.ppo, recipe.policies[policy].kl_coef
    arguments = training_arguments(section, folder, section.seed)  # type: ignore[arg-type]
    for derived in ("per_device_train_batch_size", "gradient_accumulation_steps"):
        del arguments[derived]
    engine = {field.name: getattr(section, field.name) for field in dataclasses.fields(PPOOptions)}
    sampling = {field.name: getattr(recipe.generation, field.name) for field in dataclasses.fields(Sampling)}
    batches = {"batch_size": section.batch_size, "micro_batch_size": section.micro_batch_size}
    engine["kl_coef"] = section.kl_coef if own is None else own
    engine["max_prompt_length"] = (
        section.max_prompt_length or recipe.model.max_length - recipe.generation.max_new_tokens
    )
    saving = {"save_strategy": "steps", "save_steps": section.save_steps, "save_total_limit": 2}
    asked = section.eval_prompts is not None
    logs = {"logging_strategy": "no", "report_to": recipe.report_to or "none", "eval_steps": section.eval_steps}
    logs["eval_strategy"] = "steps" if asked else "no"
    return SalsaPPOConfig(**(arguments | engine | sampling | batches | saving | logs))


def run(job: Job) -> dict[str, Any]:
    """Train the policy that the unit names and save it as an adapter (and merged, where the recipe's `export` says so)."""
    recipe, name = job.recipe, job.unit.name
    # 1. one base; the policy starts at seed-0
    bench = Workbench.of(job)
    seeds = seeds_of(job.inputs)
    model = adapters.attach(bench.base(), seeds[0], "policy", trainable=True)
    # 2. references and reward, frozen adapters on the same base
    wanted = recipe.policies[name].references(f"policies.{name}")
    bench.check(job.inputs, wanted)
    references: list[Frozen] = []
    for index, reference in enumerate(wanted):
        references.append(attach_reference(model, reference, seeds, job.inputs.get("soup"), f"reference-{index}"))
    micro = recipe.ppo.rollout_batch_size or recipe.ppo.batch_size
    reward = rewards.of_recipe(recipe, model, job.inputs, bench.tokenizer, micro)
    # 3. PPO
    source = data.sources(recipe, job.inputs.get("toy"))["prompts"]
    prompts = data.prompts(source, columns=recipe.reward.reads_columns)
    trainer = SalsaPPOTrainer(
        model,
        ppo_config(recipe, name, str(job.folder)),
        prompts,
        references=references,
        reward=reward,
        processing_class=bench.tokenizer,
        eval_dataset=evaluation_prompts(job),
        callbacks=[Bar(job.unit.id, job.folder)],
    )
    quiet(trainer)
    checkpoint, passed = checkpoints.last_whole(job.folder)
    for line in [*passed, *([f"{job.unit.id}  goes on from {checkpoint.name}"] if checkpoint else [])]:
        print(line, file=sys.stderr, flush=True)
    if checkpoint is None:  # what is there is not whole, and the stage's own
        for folder in checkpoints.checkpoints(job.folder):
            shutil.rmtree(folder)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    # 4. the policy, its value head, what was run
    trainer.save_model(str(job.folder))
    bench.sign(job.folder)
    facts = {
        "reference": ", ".join(reference.label for reference in references),
        "kl_coef": {"start": trainer.args.kl_coef, "end": trainer.kl_coef},
        "updates": trainer.update,
        "prompts": len(prompts) - trainer.left_out,
        "left_out": trainer.left_out,
        "skipped_minibatches": trainer.skipped,
    }
    write_atomic(job.folder / "policy.json", json.dumps(facts, indent=2))
    if "merged" in recipe.export:
        del trainer, model, reward
        merge(bench, job)
    return facts


def evaluation_prompts(job: Job) -> list[dict[str, Any]] | None:
    """The rows of `ppo.eval_prompts`, or None."""
    section = job.recipe.ppo
    if section.eval_prompts is None:
        return None
    source = data.evaluation_sources(job.recipe, job.inputs.get("toy"))[section.eval_prompts]
    return data.prompts(source, columns=job.recipe.reward.reads_columns)[: section.eval_limit]


def merge(bench: Workbench, job: Job) -> None:
    """The policy merged into the base, in the base's dtype, as a plain Transformers checkpoint: <folder>/merged."""
    merged = adapters.attach(bench.base(), job.folder, "policy")
    with adapters.active(merged, "policy"):
        plain: Any = merged.merge_and_unload(adapter_names=["policy"])  # type: ignore[operator]
    plain.save_pretrained(job.folder / "merged")
    bench.tokenizer.save_pretrained(job.folder / "merged")
