"""What every stage needs before its own work: the base's folder, its tokenizer, the base itself, its fingerprint, a bar.

A Hub repository is fetched here, at the stage's start, into the Hub's own cache; from then on a base is a local folder.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PrinterCallback, Trainer, TrainerCallback

from . import adapters, models
from .config import Recipe, Reference, Training, require
from .data import prompt_tokens
from .progress import bar
from .runs import Job, base_fingerprint, write_atomic

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MODEL_FILES = ["*.safetensors", "*.json", "*.model", "*.jinja", "*.txt"]


@dataclass(frozen=True)
class Workbench:
    """A stage's base: where it lies, what it is called, its tokenizer."""

    recipe: Recipe
    folder: Path
    name: str
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def of(cls, job: Job) -> Workbench:
        """The base of a job: the recipe's, else the embedded world's. Raises what huggingface_hub raises for a Hub id."""
        model = job.recipe.model
        if model.base is None:
            folder, name = job.inputs["toy"] / "base", "embedded world"
        elif Path(model.base).is_absolute():
            folder, name = Path(model.base), model.base
        else:
            from huggingface_hub import snapshot_download

            folder, name = (
                Path(snapshot_download(model.base, revision=model.revision, allow_patterns=MODEL_FILES)),
                model.base,
            )
        return cls(job.recipe, folder, name, models.load_tokenizer(str(folder), chat_template=model.chat_template))

    def base(self) -> PreTrainedModel:
        """The causal language model, frozen."""
        return self._named(models.load_base(str(self.folder), self.recipe.model, self.tokenizer))

    def classifier(self) -> PreTrainedModel:
        """The base with a score head."""
        return self._named(models.load_classifier(str(self.folder), self.recipe.model, self.tokenizer))

    def _named(self, model: PreTrainedModel) -> PreTrainedModel:
        model.name_or_path = str(self.folder) if self.recipe.model.base is None else self.name
        return model

    def save(self, model: PeftModel, adapter: str, folder: Path, **options: Any) -> None:
        """An adapter with its tokenizer and the fingerprint of the base it belongs to."""
        self.sign(folder)
        adapters.save(model, adapter, folder, self.tokenizer, **options)

    def check(self, inputs: Mapping[str, Path], references: Iterable[Reference] = ()) -> None:
        """Raise SalsaError for an adapter of another base, by the fingerprint beside it; one without is noted.

        Every input but the embedded world is an adapter's folder.
        """
        base = base_fingerprint(self.folder)
        folders = [folder for unit, folder in inputs.items() if unit != "toy"]
        folders += [adapters.local_folder(reference.path) for reference in references if reference.path is not None]
        for folder in folders:
            file = folder / "fingerprint.json"
            if not file.is_file():
                print(f"{folder}: no fingerprint.json, so that its base can't be checked", file=sys.stderr, flush=True)
                continue
            found = str(json.loads(file.read_text(encoding="utf-8")).get("base"))
            require(
                found == base,
                f"{folder}: found an adapter of another base (fingerprint {found[:12]} …), expected one of {self.name}"
                f" ({base[:12]} …)",
            )

    def sign(self, folder: Path) -> None:
        """fingerprint.json beside an adapter: the base it belongs to."""
        write_atomic(folder / "fingerprint.json", json.dumps({"base": base_fingerprint(self.folder)}))


def seeds_of(inputs: Mapping[str, Path]) -> dict[int, Path]:
    """Position in sft.seeds → adapter folder, of a job's inputs."""
    return {int(unit.rsplit("-", 1)[1]): folder for unit, folder in inputs.items() if unit.startswith("sft/")}


def training_arguments(section: Training, folder: Path, seed: int) -> dict[str, Any]:
    """What transformers.TrainingArguments and its heirs take from a recipe's section: no checkpoints, no reports, quiet."""
    import torch

    micro = section.micro_batch_size or section.batch_size
    return {
        "output_dir": str(folder),
        "learning_rate": section.learning_rate,
        "num_train_epochs": section.num_train_epochs,
        "max_steps": section.max_steps,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": section.batch_size // micro,
        "weight_decay": section.weight_decay,
        "warmup_steps": section.warmup_ratio,
        "lr_scheduler_type": section.lr_scheduler_type,
        "max_grad_norm": section.max_grad_norm,
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
    }


def note_left_out(job: Job, left_out: int, rows: int, why: str) -> None:
    """Say that some of the data is not used; the number is in the stage's metrics too."""
    if left_out:
        print(f"{job.unit.id}  {left_out} of {rows} rows left out: {why}", file=sys.stderr, flush=True)


def fitting(job: Job, bench: Workbench, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The prompts that leave room for a response within model.max_length; the others are noted. Raises SalsaError for none."""
    longest = bench.recipe.model.max_length - bench.recipe.generation.max_new_tokens
    kept = [row for row in rows if len(prompt_tokens(row, bench.tokenizer)) <= longest]
    why = f"prompts longer than {longest} tokens, model.max_length less generation.max_new_tokens"
    note_left_out(job, len(rows) - len(kept), len(rows), why)
    require(
        bool(kept),
        f"evaluate.prompts: found no prompt of at most {longest} tokens, expected some; raise model.max_length",
    )
    return kept


def quiet(trainer: Trainer) -> None:
    """Take away the callback that prints the Trainer's logs: they are in log.jsonl."""
    trainer.remove_callback(PrinterCallback)


class Bar(TrainerCallback):
    """A Trainer's progress as the project's own bar, and its log as log.jsonl."""

    def __init__(self, what: str, folder: Path | None = None) -> None:
        self.what, self.folder = what, folder
        self.figures: dict[str, float] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Opens the bar."""
        self.context = bar(state.max_steps, self.what)
        self.update = self.context.__enter__()
        self.update(done=state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """One optimizer step."""
        self.update(1, **self.figures)  # type: ignore[arg-type]

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Remembers the figures that the bar shows."""
        shown = {
            "loss": "loss",
            "objective/scores": "score",
            "objective/kl": "KL",
            "objective/response_length": "length",
        }
        self.figures |= {shown[key]: value for key, value in (logs or {}).items() if key in shown}

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Closes the bar, writes the log."""
        self.context.__exit__(None, None, None)
        if self.folder is not None:
            write_atomic(self.folder / "log.jsonl", "".join(json.dumps(row) + "\n" for row in state.log_history))
