"""The sft stage: one seed, an adapter or all weights trained on demonstrations by TRL's SFTTrainer, loss on the assistant's tokens only; or taken
from a folder or the Hub.

A seed sets the initialisation of the adapter, the order of the data, and (`sft.subset`) which share of it this seed sees.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from salsa_peft.config.job import Job
from salsa_peft.config.schema import Adapter
from salsa_peft.data import datasets
from salsa_peft.data.chat.template_fields import trained_tokens
from salsa_peft.models.adapters import bases, lora
from salsa_peft.models.adapters.lora import cast_trainable_to_float32, lora_config
from salsa_peft.models.architectures import checks
from salsa_peft.models.base import is_quantised, language_model_only
from salsa_peft.models.logprobs import check_head
from salsa_peft.models.stage_context import (
    ProgressBar,
    StageContext,
    mean_loss,
    reference_folder,
    remove_printer,
    report_left_out,
)
from salsa_peft.models.tokenizers import compare_tokenizer
from salsa_peft.models.weights import check_finite, read_tensors
from salsa_peft.soup.checkpoints.read import read_checkpoint
from salsa_peft.training import taken_results
from salsa_peft.utils.errors import require
from salsa_peft.utils.files import write_atomic
from salsa_peft.utils.fingerprints import FINGERPRINT, base_fingerprints, read_fingerprint

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def run(job: Job) -> dict[str, Any]:
    """Train the seed that the unit names (seed-N: position N in sft.seeds) and save it as an ordinary PEFT adapter or checkpoint."""
    from trl import SFTConfig, SFTTrainer

    recipe, section = job.recipe, job.recipe.sft
    position = int(job.unit.name.removeprefix("seed-"))
    seed, taken = section.seeds[position], section.existing_seed(position)
    if taken is not None:
        return take(job, taken)
    # 1. this seed's demonstrations
    context = StageContext.of_job(job)
    rows = datasets.demonstrations(
        datasets.training_sources(recipe, job.inputs.get("toy"))["demonstrations"], context.tokenizer
    )
    if section.subset < 1:
        rows = random.Random(seed).sample(rows, max(1, round(section.subset * len(rows))))
    # 2. the trainer; rows whose answers lie beyond max_length have nothing to learn from
    model = context.load_base() if recipe.adapter else context.load_trainable()
    if checks.needs_logprobs(recipe):  # what PPO would refuse is refused before anything trains
        check_head(model)
    if recipe.adapter is not None:
        check_targets(recipe.adapter, model)
    trainer: Any = SFTTrainer(
        model=model,
        args=SFTConfig(
            **context.arguments(section, job.folder / "trainer", seed),
            max_length=recipe.model.max_length,
            **router_loss(model, job.unit.id),
        ),
        train_dataset=labelled(rows, context.tokenizer),
        processing_class=context.tokenizer,
        peft_config=lora_config(recipe.adapter, **language_model_only(model)) if recipe.adapter else None,
        callbacks=[ProgressBar(job.unit.id, job.folder)],
    )
    if is_quantised(model):
        cast_trainable_to_float32(trainer.model)
    trainer.train_dataset = trainer.train_dataset.filter(lambda row: any(label != -100 for label in row["labels"]))
    kept = len(trainer.train_dataset)
    require(
        kept >= section.batch_size,
        f"data.demonstrations: found {kept} rows with an answer within model.max_length = {recipe.model.max_length} tokens,"
        f" expected at least sft.batch_size = {section.batch_size}",
    )
    limit = f"no answer within model.max_length = {recipe.model.max_length} tokens"
    report_left_out(job, len(rows) - kept, len(rows), limit)
    # 3. train and save
    remove_printer(trainer)
    loss = mean_loss(trainer, trainer.train().training_loss)
    context.save(trainer, job.folder)
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


def check_targets(adapter: Adapter, model: PreTrainedModel) -> None:
    """Raise SalsaError for target modules that the model does not have, as PEFT would, and where it would pass over some."""
    names, modules = [name for name, _ in model.named_modules() if name], adapter.target_modules
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    checks.require_targets(modules, names)
    regex = isinstance(modules, str) and modules != "all-linear"
    require(
        not regex or any(re.fullmatch(str(modules), name) for name in names),
        f"adapter.target_modules: no module of the base fits the regular expression {modules}, which must match a whole name such as"
        f" {next(iter(linear), '')}; all-linear takes every linear layer",
    )


def router_loss(model: PreTrainedModel, unit: str) -> dict[str, Any]:
    """SFTConfig's coefficient of the routers' loss: 0 for a configuration without `num_experts`, which TRL (1.16) reads (Granite)."""
    text = model.config.get_text_config(decoder=True)
    said = text.to_dict()
    if "output_router_logits" not in said or "num_experts" in {*said, *text.attribute_map}:
        return {}
    if any(said.get(key) for key in checks.EXPERTS):
        line = f"{unit}  trained without the routers' balancing loss, which TRL does not compute for {text.model_type}"
        print(line, file=sys.stderr, flush=True)
    return {"router_aux_loss_coef": 0.0}


def labelled(rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Rows {messages} → {input_ids, labels}, the form that TRL trains on as it is: labels are −100 but for the assistant's tokens."""

    def tokens(row: dict[str, Any]) -> dict[str, list[int]]:
        ids, mask = trained_tokens(row, tokenizer)
        return {
            "input_ids": ids,
            "labels": [token if counts else -100 for token, counts in zip(ids, mask, strict=True)],
        }

    made = datasets.to_dataset(rows)
    # a fingerprint names cached results, and rows in memory have none: hashing the tokenizer for it would take seconds
    return made.map(tokens, remove_columns=made.column_names, new_fingerprint="labelled")


def _same_place(named: str, context: StageContext) -> bool:
    """Whether an adapter's base_model_name_or_path leads to this run's base, by its name or by its folder, also a relative one."""
    return named == context.name or Path(named).resolve() == context.folder.resolve()


def take(job: Job, path: str) -> dict[str, Any]:
    """A seed that is there already: a copy of an adapter of this base, or of a checkpoint, as this run's stages write them.

    Files beside the weights (optimizer, logs, cards) are neither read nor copied. Raises SalsaError for weights of another base, for ones
    that are not finite, and for what is no such thing in safetensors.
    """
    context = StageContext.of_job(job)
    folder = reference_folder(job.recipe, path)
    known = read_fingerprint(folder) is not None
    if known:
        bases.require_same_base(folder, base_fingerprints(context.folder), context.name)
    tokenizer_differs = compare_tokenizer(folder, context.tokenizer, context.name)
    if job.recipe.adapter is not None:
        named = take_adapter(context, folder, path, job.folder)
    else:
        named = take_checkpoint(context, folder, path, job.folder)
    taken = job.recipe.sft.from_ or [None]
    if checks.needs_logprobs(job.recipe) and None not in taken and job.unit.name == "seed-0":
        check_head(context.load_base())  # as a seed that is trained does, before the reward model trains
    if not known:
        other = "" if named is None or _same_place(named, context) else f", and it names another ({named})"
        told = f"{job.unit.id}  {folder}: no {FINGERPRINT} says which base it was trained on{other}; it is taken as trained on {context.name}"
        print(told, file=sys.stderr, flush=True)
    context.write_fingerprint(job.folder, checked=known)
    context.tokenizer.save_pretrained(job.folder)
    commit = folder.name if folder.parent.name == "snapshots" else None
    metrics = {
        "from": Path(path).name if Path(path).is_absolute() else path,
        **({} if commit is None else {"commit": commit}),
        **({} if known else {"base": "not checked"}),
        **({"tokenizer": "differs from the run's"} if tokenizer_differs else {}),
    }
    write_atomic(job.folder / "metrics.json", json.dumps(metrics, indent=2))
    return metrics


def take_adapter(context: StageContext, folder: Path, path: str, out: Path) -> str | None:
    """Copy an adapter's factors, held against the base's modules, with a configuration that names this run's base → the base it named."""
    recipe, role = context.recipe, taken_results.SEED
    taken_results.check_adapter("sft.from", folder, role, taken_results.base_of(recipe), checks.needs_logprobs(recipe))
    taken_results.check_family(context.recipe, folder, "sft.from")
    config, tensors = lora.read(folder)
    saved = [name for name in tensors if ".lora_" not in name]
    base: Any = (
        context.load_base() if saved else context.empty_model()
    )  # what is saved beside the factors must be the base's own values
    lora.attach(base, folder, "taken")
    save_file(
        {name: tensors[name] for name in tensors if name not in saved},
        out / lora.WEIGHTS,
        metadata={"format": "pt"},
    )
    named, config.base_model_name_or_path, config.revision = config.base_model_name_or_path, context.base_name, None
    config.inference_mode = True
    config.save_pretrained(str(out))
    return named


def take_checkpoint(context: StageContext, folder: Path, path: str, out: Path) -> str | None:
    """Copy a checkpoint's weights and configuration → the model that it says it was made from."""
    taken_results.check_checkpoint("sft.from", folder, taken_results.base_of(context.recipe))
    found = read_checkpoint(folder)
    names = [*found.files, "config.json", "generation_config.json", "model.safetensors.index.json"]
    for name in names:
        if (folder / name).is_file():
            if name in found.files:
                check_finite(read_tensors(folder / name), str(folder / name))
            shutil.copyfile(folder / name, out / name)
    return found.config.get("_name_or_path")
