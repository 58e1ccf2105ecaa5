"""The sft stage: trains one SFT model (a seed) with TRL's SFTTrainer, or imports an existing one.

A seed is an adapter or full weights, trained on demonstrations with the loss on the assistant's tokens only. Its random
seed sets the adapter's initialisation, the order of the data and, with `sft.subset`, which rows it is trained on.
"""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from salsa_peft.config.job import Job
from salsa_peft.config.schema import Adapter
from salsa_peft.data import tokenized
from salsa_peft.models.adapters import bases, lora
from salsa_peft.models.adapters.lora import lora_config
from salsa_peft.models.architectures import checks
from salsa_peft.models.base import language_model_only
from salsa_peft.models.logprobs import check_head
from salsa_peft.models.stage_context import (
    ProgressBar,
    StageContext,
    reference_folder,
    remove_printer,
    report_left_out,
)
from salsa_peft.models.tokenizers import compare_tokenizer
from salsa_peft.models.weights import check_finite, read_tensors
from salsa_peft.soup.checkpoints.read import read_checkpoint
from salsa_peft.training import external_models
from salsa_peft.training.train import resumable, run_trainer
from salsa_peft.utils.console import say
from salsa_peft.utils.errors import require
from salsa_peft.utils.files import write_atomic
from salsa_peft.utils.fingerprints import FINGERPRINT, base_fingerprints, read_fingerprint

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel


def run(job: Job) -> dict[str, Any]:
    """Train or import the seed of the unit seed-N, where N is a position in sft.seeds."""
    from trl import SFTConfig, SFTTrainer

    recipe, section = job.recipe, job.recipe.sft
    position = int(job.unit.name.removeprefix("seed-"))
    seed, existing = section.seeds[position], section.existing_seed(position)
    if existing is not None:
        return import_seed(job, existing)
    # 1. this seed's demonstrations
    context = StageContext.of_job(job)
    rows = tokenized.load(job.inputs["data/demonstrations"])
    if section.subset < 1:
        rows = rows.select(random.Random(seed).sample(range(len(rows)), max(1, round(section.subset * len(rows)))))
    answered = rows_with_answers(job, rows)
    # 2. the trainer
    model = context.load_base() if recipe.adapter else context.load_trainable()
    if checks.needs_logprobs(recipe):  # otherwise PPO would raise the error later
        check_head(model)
    if recipe.adapter is not None:
        check_targets(recipe.adapter, model)
    trainer: Any = resumable(SFTTrainer)(
        model=model,
        args=SFTConfig(
            **context.arguments(section, job.folder, seed),
            max_length=None,
            dataset_kwargs={"skip_prepare_dataset": True},
            **router_loss(model, job.unit.id),
        ),
        train_dataset=answered,
        processing_class=context.tokenizer,
        peft_config=lora_config(recipe.adapter, **language_model_only(model)) if recipe.adapter else None,
        callbacks=[ProgressBar(job.unit.id, job.folder)],
    )
    # 3. train and save
    remove_printer(trainer)
    loss = run_trainer(trainer, job.unit.id)
    context.save(trainer, job.folder)
    log = [row for row in trainer.state.log_history if "loss" in row]
    metrics = {
        "seed": seed,
        "rows": len(answered),
        "left_out": len(rows) - len(answered),
        "epochs": section.num_train_epochs,
        "steps": trainer.state.global_step,
        "train_loss": loss,
        "last_loss": log[-1]["loss"] if log else loss,
    }
    if trainer.is_world_process_zero():
        write_atomic(job.folder / "metrics.json", json.dumps(metrics, indent=2))
    return metrics


def rows_with_answers(job: Job, rows: Dataset) -> Dataset:
    """The rows cut to model.max_length tokens, without those whose answers begin beyond them.

    Raises SalsaError if they fill no batch.
    """
    model, section = job.recipe.model, job.recipe.sft
    kept = tokenized.cut_demonstrations(rows, model.max_length)
    limit = f"answer within model.max_length = {model.max_length} tokens"
    require(
        len(kept) >= section.batch_size,
        f"data.demonstrations: {len(kept)} rows have an {limit}, fewer than sft.batch_size = {section.batch_size}."
        " Add rows, raise model.max_length or lower sft.batch_size",
    )
    report_left_out(job, len(rows) - len(kept), len(rows), f"no {limit}")
    return kept


def check_targets(adapter: Adapter, model: PreTrainedModel) -> None:
    """Raise SalsaError for a target module that the model lacks; PEFT raises only if it lacks all."""
    modules, names = adapter.target_modules, [name for name, _ in model.named_modules() if name]
    linear = (name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D))
    checks.require_targets(modules, names)
    regex = isinstance(modules, str) and modules != "all-linear"
    require(
        not regex or any(re.fullmatch(str(modules), name) for name in names),
        f"adapter.target_modules: no module of the base matches the regular expression {modules}. It must match a"
        f" module's full name, such as {next(linear, '')}; all-linear adapts every linear layer",
    )


def router_loss(model: PreTrainedModel, unit: str) -> dict[str, Any]:
    """SFTConfig options that turn off the router's loss if a model lacks `num_experts`, which TRL reads."""
    text = model.config.get_text_config(decoder=True)
    options = text.to_dict()
    if "output_router_logits" not in options or "num_experts" in {*options, *text.attribute_map}:
        return {}
    if any(options.get(key) for key in checks.EXPERTS):
        say(f"{unit}  trained without the router's auxiliary loss, which TRL does not compute for {text.model_type}")
    return {"router_aux_loss_coef": 0.0}


def import_seed(job: Job, path: str) -> dict[str, Any]:
    """Import an existing adapter or checkpoint of this run's base as the seed of this stage.

    Only weights, configuration and the run's tokenizer are written. Raises SalsaError for weights that are of another
    base, not finite or not in safetensors files.
    """
    context, recipe = StageContext.of_job(job), job.recipe
    folder = reference_folder(recipe, path)
    known = read_fingerprint(folder) is not None
    if known:
        bases.require_same_base(folder, base_fingerprints(context.folder), context.name)
    tokenizer_differs = compare_tokenizer(folder, context.tokenizer, context.name)
    named = (copy_checkpoint if recipe.adapter is None else copy_adapter)(context, folder, job.folder)
    existing = recipe.sft.from_ or [None]
    if checks.needs_logprobs(recipe) and None not in existing and job.unit.name == "seed-0":
        check_head(context.load_base())  # which run() does only if it trains the seed
    if not known:
        same = named in (None, context.name) or Path(str(named)).resolve() == context.folder.resolve()
        other = "" if same else f" It names {named} as its base."
        say(
            f"{job.unit.id}  {folder} has no {FINGERPRINT}, so its base cannot be checked.{other}"
            f" It is assumed to be trained on {context.name}"
        )
    context.write_fingerprint(job.folder, checked=known)
    context.tokenizer.save_pretrained(job.folder)
    metrics = {"from": Path(path).name if Path(path).is_absolute() else path}
    if folder.parent.name == "snapshots":  # of the Hub's cache
        metrics["commit"] = folder.name
    if not known:
        metrics["base"] = "not checked"
    if tokenizer_differs:
        metrics["tokenizer"] = "differs from the run's"
    write_atomic(job.folder / "metrics.json", json.dumps(metrics, indent=2))
    return metrics


def copy_adapter(context: StageContext, folder: Path, out: Path) -> str | None:
    """Copy an adapter and set this run's base in its configuration. Returns the base that was set before."""
    recipe, role = context.recipe, external_models.SEED
    external_models.check_adapter(
        "sft.from", folder, role, external_models.base_of(recipe), checks.needs_logprobs(recipe)
    )
    external_models.check_family(recipe, folder, "sft.from")
    config, tensors = lora.read(folder)
    factors = {name: tensor for name, tensor in tensors.items() if ".lora_" in name}
    # load_base gives the values with which weights other than LoRA factors are compared
    base: Any = context.load_base() if len(factors) < len(tensors) else context.empty_model()
    lora.attach(base, folder, "taken")
    save_file(factors, out / lora.WEIGHTS, metadata={"format": "pt"})
    named, config.base_model_name_or_path, config.revision = config.base_model_name_or_path, context.base_name, None
    config.inference_mode = True
    config.save_pretrained(str(out))
    return named


def copy_checkpoint(context: StageContext, folder: Path, out: Path) -> str | None:
    """Copy a checkpoint's weights and configuration. Returns the model that the configuration names."""
    external_models.check_checkpoint("sft.from", folder, external_models.base_of(context.recipe))
    checkpoint = read_checkpoint(folder)
    for name in checkpoint.files:
        check_finite(read_tensors(folder / name), str(folder / name))
    for name in (*checkpoint.files, "config.json", "generation_config.json", "model.safetensors.index.json"):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, out / name)
    return checkpoint.config.get("_name_or_path")
