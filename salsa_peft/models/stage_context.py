"""What every stage needs before its own work: the base's folder, its tokenizer, the base itself, its fingerprint, precision, a bar.

A Hub repository is fetched here, at the stage's start, into the Hub's own cache; from then on a base is a local folder.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from transformers import (
    AutoConfig,
    PrinterCallback,
    Trainer,
    TrainerCallback,
)

from salsa_peft.config.job import Job
from salsa_peft.config.options.training import Training
from salsa_peft.config.references import Reference
from salsa_peft.config.schema import Recipe
from salsa_peft.data.datasets import prompt_tokens
from salsa_peft.models import precision, sharding
from salsa_peft.models.adapters import bases, lora
from salsa_peft.models.architectures import checks, memory
from salsa_peft.models.base import causal_lm_class, device, load_base, load_classifier, resolve_dtype
from salsa_peft.models.tokenizers import compare_tokenizer, load_tokenizer
from salsa_peft.models.weights import cast_weights, save_checkpoint
from salsa_peft.utils.console import progress_bar
from salsa_peft.utils.errors import require
from salsa_peft.utils.files import write_atomic
from salsa_peft.utils.fingerprints import FINGERPRINT, base_fingerprint, base_fingerprints, read_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MODEL_FILES = ["*.safetensors", "*.json", "*.model", "*.jinja", "*.txt"]


@dataclass(frozen=True)
class StageContext:
    """A stage's base: where it lies, what it is called, its tokenizer."""

    recipe: Recipe
    folder: Path
    name: str
    tokenizer: PreTrainedTokenizerBase
    stage: str = ""

    @classmethod
    def of_job(cls, job: Job) -> StageContext:
        """The base of a job: the recipe's, else the embedded world's. Raises what huggingface_hub raises for a Hub id."""
        model = job.recipe.model
        if model.base is None:
            folder, name = job.inputs["toy"] / "base", "embedded world"
        elif Path(model.base).is_absolute():
            folder, name = Path(model.base), model.base
        else:
            from huggingface_hub import hf_hub_download, snapshot_download

            hf_hub_download(model.base, "config.json", revision=model.revision)
            checks.check(job.recipe)  # before the weights are fetched
            folder, name = (
                Path(snapshot_download(model.base, revision=model.revision, allow_patterns=MODEL_FILES)),
                model.base,
            )
        say = name if job.unit.id == "sft/seed-0" else None  # once a run
        tokenizer = load_tokenizer(str(folder), chat_template=model.chat_template, say=say)
        require(
            tokenizer.chat_template is not None,
            f"model.chat_template: {name} has no chat template of its own. Use chatml, zephyr, or a path to a Jinja file.",
        )
        return cls(job.recipe, folder, name, tokenizer, job.unit.stage)

    def load_base(self) -> PreTrainedModel:
        """The causal language model, frozen."""
        return self._named(load_base(str(self.folder), self.recipe.model, self.tokenizer))

    def empty_model(self) -> PreTrainedModel:
        """The causal language model without values, on the meta device: which modules it has, and of what shape."""
        with torch.device("meta"):
            config = AutoConfig.from_pretrained(str(self.folder), trust_remote_code=False)
            return causal_lm_class(config).from_config(config).requires_grad_(False)

    def load_trainable(self, start: Path | None = None) -> PreTrainedModel:
        """Full weights to train: the base's, or those of a checkpoint."""
        dtype = precision.weights_dtype(self.precision())
        return self._named(load_base(str(start or self.folder), self.recipe.model, self.tokenizer, dtype))

    def load_classifier(self, start: Path | None = None) -> PreTrainedModel:
        """The base with a score head, frozen; `start`: a checkpoint's full weights with a score head, to train."""
        dtype = None if start is None else precision.weights_dtype(self.precision())
        return self._named(load_classifier(str(start or self.folder), self.recipe.model, self.tokenizer, dtype))

    def _named(self, model: PreTrainedModel) -> PreTrainedModel:
        model.name_or_path = self.base_name
        return model

    @property
    def base_name(self) -> str:
        """What adapters of this run name as their base."""
        return str(self.folder) if self.recipe.model.base is None else self.name

    def precision(self) -> str:
        """master | stochastic, of the full weights that this stage trains: as the recipe says, or what this card has room for."""
        card = torch.cuda.get_device_properties(device()).total_memory if torch.cuda.is_available() else None
        return memory.choose_precision(self.recipe, self.stage, card)

    def arguments(self, section: Training, folder: Path, seed: int) -> dict[str, Any]:
        """What transformers.TrainingArguments and its heirs take from a recipe's section, precision included, which is said."""
        found = training_arguments(section, folder, seed, self.recipe.num_processes)
        if self.recipe.mode == "full":
            chosen = self.precision()
            found |= precision.arguments(chosen)
            held = str(precision.weights_dtype(chosen)).removeprefix("torch.")
            print(
                f"{self.stage}  precision {chosen}: weights in {held}, optimizer {found['optim']}",
                file=sys.stderr,
                flush=True,
            )
        return found

    def save(self, trainer: Trainer, folder: Path) -> None:
        """What was trained, with tokenizer and the base's fingerprint: an adapter, or full weights in the recipe's dtype (which the model
        then has too, unless it is sharded). The first process writes, the others wait for it."""
        model: Any = trainer.model
        weights, dtype = sharding.full_state_dict(trainer), resolve_dtype(self.recipe.model.dtype)
        if weights is None and not isinstance(model, PeftModel):
            cast_weights(model, dtype)
        if trainer.is_world_process_zero():
            self.write_fingerprint(folder)
            if isinstance(model, PeftModel):
                lora.save(model, "default", folder, self.tokenizer, state_dict=weights)
            else:
                save_checkpoint(model, folder, self.tokenizer, weights, dtype)
        trainer.accelerator.wait_for_everyone()

    def check(self, inputs: Mapping[str, Path], references: Iterable[Reference] = ()) -> None:
        """Raise SalsaError for an adapter or checkpoint of another base, by the fingerprint beside it; a reference without is noted.

        Every input but the embedded world is such a folder. One that has no fingerprint was noted when the stage before took it.
        """
        base = base_fingerprints(self.folder)
        made = [folder for unit, folder in inputs.items() if unit != "toy" and read_fingerprint(folder) is not None]
        given = [
            reference_folder(self.recipe, reference.path) for reference in references if reference.path is not None
        ]
        for folder in [*made, *given]:
            bases.require_same_base(folder, base, self.name)
        for folder in given:
            compare_tokenizer(folder, self.tokenizer, self.name)

    def write_fingerprint(self, folder: Path, checked: bool = True) -> None:
        """fingerprint.json beside an adapter or checkpoint: the base it belongs to; `checked`: false where that is the recipe's word alone."""
        told = {"base": base_fingerprint(self.folder), **({} if checked else {"checked": False})}
        write_atomic(folder / FINGERPRINT, json.dumps(told))


def seed_folders(inputs: Mapping[str, Path]) -> dict[int, Path]:
    """Position in sft.seeds → its folder, of a job's inputs."""
    return {int(unit.rsplit("-", 1)[1]): folder for unit, folder in inputs.items() if unit.startswith("sft/")}


def training_arguments(section: Training, folder: Path, seed: int, processes: int = 1) -> dict[str, Any]:
    """What transformers.TrainingArguments and its heirs take from a recipe's section: no checkpoints, no reports, quiet. The section's
    batch is that of all processes together."""
    micro = section.micro_batch_size or section.batch_size // processes
    return {
        "output_dir": str(folder),
        "learning_rate": section.learning_rate,
        "num_train_epochs": section.num_train_epochs,
        "max_steps": section.max_steps,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": section.batch_size // (micro * processes),
        "weight_decay": section.weight_decay,
        "warmup_steps": section.warmup_ratio,
        "lr_scheduler_type": section.lr_scheduler_type,
        "max_grad_norm": section.max_grad_norm,
        "optim": _optimizer(section.optim),
        "gradient_checkpointing": section.gradient_checkpointing,
        "bf16": torch.cuda.is_available(),
        "use_cpu": not torch.cuda.is_available(),
        "seed": seed,
        "data_seed": seed,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_strategy": "steps",
        "logging_steps": 10,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "ddp_find_unused_parameters": False,
    }


def _optimizer(name: str) -> str:
    if not name.startswith("paged") or torch.cuda.is_available():
        return name
    print(
        f"optim: found {name} and no CUDA device, whose memory it pages; adamw_torch_fused is taken",
        file=sys.stderr,
        flush=True,
    )
    return "adamw_torch_fused"


def reference_folder(recipe: Recipe, path: str) -> Path:
    """The folder of a reference, a Hub id fetched: an adapter's files, or with full weights a checkpoint's."""
    if recipe.adapter is not None or Path(path).is_dir():
        return lora.local_folder(path)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(path, allow_patterns=MODEL_FILES))


def report_left_out(job: Job, left_out: int, rows: int, why: str) -> None:
    """Say that some of the data is not used; the number is in the stage's metrics too."""
    if left_out:
        print(f"{job.unit.id}  {left_out} of {rows} rows left out: {why}", file=sys.stderr, flush=True)


def prompts_that_fit(
    job: Job, context: StageContext, rows: list[dict[str, Any]], where: str = "evaluate.prompts"
) -> list[dict[str, Any]]:
    """The prompts that leave room for a response within model.max_length; the others are noted. Raises SalsaError for none."""
    longest = context.recipe.model.max_length - context.recipe.generation.max_new_tokens
    kept = [row for row in rows if len(prompt_tokens(row, context.tokenizer)) <= longest]
    why = f"prompts longer than {longest} tokens, model.max_length less generation.max_new_tokens"
    report_left_out(job, len(rows) - len(kept), len(rows), why)
    require(
        bool(kept),
        f"{where}: found no prompt of at most {longest} tokens, expected some; raise model.max_length",
    )
    return kept


def remove_printer(trainer: Trainer) -> None:
    """Take away the callback that prints the Trainer's logs: they are in log.jsonl."""
    trainer.remove_callback(PrinterCallback)


def mean_loss(trainer: Trainer, loss: float) -> float:
    """Trainer's loss of the whole training, of all processes: of the steps since its last log it counts this one's alone."""
    if trainer.accelerator.num_processes == 1:
        return loss
    own = torch.tensor(loss, dtype=torch.float64, device=trainer.accelerator.device)
    return trainer.accelerator.reduce(own, "mean").item()


FIGURES = {"loss": "loss", "objective/scores": "score", "objective/kl": "KL", "objective/response_length": "length"}
"""Keys of a Trainer's logs → their names beside the progress bar."""


class ProgressBar(TrainerCallback):
    """A Trainer's progress bar, with the latest figures beside it; `folder`: where the Trainer's log is saved as log.jsonl.

    transformers' ProgressCallback names no stage, prints every log in full, and writes unreadable text where there is no terminal.
    """

    def __init__(self, description: str, folder: Path | None = None) -> None:
        self.description, self.folder = description, folder
        self.context = contextlib.ExitStack()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Opens the bar."""
        self.bar = self.context.enter_context(progress_bar(state.max_steps, self.description))
        self.bar.n = self.bar.initial = state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Advances the bar by one optimizer step."""
        self.bar.update()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Shows the figures from the next step on."""
        found = {FIGURES[key]: value for key, value in (logs or {}).items() if key in FIGURES}
        if found:
            self.bar.set_postfix(found, refresh=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Closes the bar and writes the log."""
        self.context.close()
        if self.folder is not None and state.is_world_process_zero:
            write_atomic(self.folder / "log.jsonl", "".join(json.dumps(row) + "\n" for row in state.log_history))
