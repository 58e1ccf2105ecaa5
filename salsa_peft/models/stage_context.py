"""Functions that several stages use: loading the base and its tokenizer, running a Trainer, saving.

If the base is on the Hub, a stage first downloads it to the Hub's cache, and then reads that local folder.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from tqdm import tqdm
from transformers import AutoConfig, PrinterCallback, Trainer, TrainerCallback

from salsa_peft.config.job import Job
from salsa_peft.config.options.training import Training
from salsa_peft.config.options.trl import ALGORITHMS
from salsa_peft.config.references import Reference
from salsa_peft.config.schema import Recipe
from salsa_peft.data.datasets import prompt_tokens
from salsa_peft.models import precision, sharding
from salsa_peft.models.adapters import bases, lora
from salsa_peft.models.architectures import checks, memory
from salsa_peft.models.base import (
    causal_lm_class,
    device,
    load_base,
    load_classifier,
    resolve_dtype,
    use_autocast_from_the_start,
)
from salsa_peft.models.tokenizers import compare_tokenizer, load_tokenizer
from salsa_peft.models.weights import cast_weights, save_checkpoint
from salsa_peft.utils.console import progress_bar, say
from salsa_peft.utils.errors import require
from salsa_peft.utils.files import write_atomic
from salsa_peft.utils.fingerprints import FINGERPRINT, base_fingerprint, base_fingerprints, read_fingerprint
from salsa_peft.utils.hub import local_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class StageContext:
    """The recipe, base model and tokenizer of a stage."""

    recipe: Recipe
    folder: Path
    """The base's local folder."""
    name: str
    """The base's name in messages: its path or Hub id in the recipe, or "embedded world" for the toy data's base."""
    tokenizer: PreTrainedTokenizerBase
    stage: str = ""

    @classmethod
    def of_job(cls, job: Job) -> StageContext:
        """Make the StageContext of a job: find or download its base, and load the tokenizer."""
        model = job.recipe.model
        if model.base is None:
            folder, name = job.inputs["toy"] / "base", "embedded world"
        elif Path(model.base).is_absolute():
            folder, name = Path(model.base), model.base
        else:
            local_folder(model.base, patterns=["config.json"], revision=model.revision)
            checks.check(job.recipe)  # before the weights are downloaded
            folder, name = local_folder(model.base, revision=model.revision), model.base
        report_as = name if job.unit.id == "sft/seed-0" else None  # printed once in a run
        tokenizer = load_tokenizer(str(folder), chat_template=model.chat_template, report_as=report_as)
        require(
            tokenizer.chat_template is not None,
            f"model.chat_template: {name} has no chat template. Set model.chat_template to chatml, zephyr, or the path"
            " of a Jinja file.",
        )
        return cls(job.recipe, folder, name, tokenizer, job.unit.stage)

    def load_base(self, start: Path | None = None) -> PreTrainedModel:
        """Load the base, or the checkpoint `start`, as a frozen causal language model."""
        return self._load(load_base, start, trained=False)

    def load_moving(self) -> PreTrainedModel:
        """Load the base as a frozen float32 model that moves towards a policy, and computes as the policy does."""
        model: Any = self.load_base()
        use_autocast_from_the_start(model)
        return model.float()

    def empty_model(self) -> PreTrainedModel:
        """Make the base's model on the meta device, where weights have shapes but no values."""
        with torch.device("meta"):
            config = AutoConfig.from_pretrained(str(self.folder), trust_remote_code=False)
            return causal_lm_class(config).from_config(config).requires_grad_(False)

    def load_trainable(self, start: Path | None = None) -> PreTrainedModel:
        """Load the base, or the checkpoint `start`, as a trainable causal language model."""
        return self._load(load_base, start, trained=True)

    def load_classifier(self, start: Path | None = None) -> PreTrainedModel:
        """Load the frozen base or, if given, the trainable checkpoint `start`, with a new score head."""
        return self._load(load_classifier, start, trained=start is not None)

    def _load(self, load: Callable[..., PreTrainedModel], start: Path | None, *, trained: bool) -> PreTrainedModel:
        dtype = precision.PRECISIONS[self.precision()].weights if trained else None
        model = load(str(start or self.folder), self.recipe.model, self.tokenizer, dtype)
        model.name_or_path = self.base_name
        return model

    @property
    def base_name(self) -> str:
        """The base_model_name_or_path that this run writes into its adapters."""
        return str(self.folder) if self.recipe.model.base is None else self.name

    def precision(self) -> str:
        """The precision of trained full weights: the recipe's or, for `auto`, one that fits on this GPU."""
        gpu = torch.cuda.get_device_properties(device()).total_memory if torch.cuda.is_available() else None
        return memory.choose_precision(self.recipe, self.stage, gpu)

    def arguments(self, section: Training, folder: Path, seed: int) -> dict[str, Any]:
        """TrainingArguments of a recipe's section. For full weights, sets and prints their precision too."""
        found, trained = training_arguments(section, folder, seed, self.recipe.num_processes), torch.float32
        if self.recipe.mode == "full":
            chosen = self.precision()
            found |= precision.arguments(chosen)
            trained = precision.PRECISIONS[chosen].weights
            name = str(trained).removeprefix("torch.")
            say(f"{self.stage}  precision {chosen}: weights in {name}, optimizer {found['optim']}")
        dtype = resolve_dtype(self.recipe.model.dtype)
        return {**found, "bf16": precision.uses_autocast(dtype, float32_weights=trained == torch.float32)}

    def save(self, trainer: Trainer, folder: Path) -> None:
        """Save the trained adapter or full weights, the tokenizer and the base's fingerprint.

        Full weights are saved in the recipe's dtype, and a model that is not sharded is cast to this dtype in place.
        Only the first process writes; all processes must call this method.
        """
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
        """Raise SalsaError if fingerprints show that an input or a reference has a base other than the run's.

        References without a fingerprint are reported in a printed line. Inputs without a fingerprint are skipped,
        because the stage that imported them has already reported them. References' tokenizers are compared, too.
        """
        base = base_fingerprints(self.folder)
        made = [folder for unit, folder in inputs.items() if unit != "toy" and read_fingerprint(folder) is not None]
        given = [reference_folder(self.recipe, path) for reference in references for path in reference.paths]
        for folder in [*made, *given]:
            bases.require_same_base(folder, base, self.name)
        for folder in given:
            compare_tokenizer(folder, self.tokenizer, self.name)

    def write_fingerprint(self, folder: Path, checked: bool = True) -> None:
        """Write the base's fingerprint. checked: whether it was verified that the weights have this base."""
        content = {"base": base_fingerprint(self.folder), **({} if checked else {"checked": False})}
        write_atomic(folder / FINGERPRINT, json.dumps(content))


def result_folders(inputs: Mapping[str, Path]) -> dict[str, Path]:
    """Name of each model among a job's inputs, such as seed-0, soup or a policy's → its folder."""
    made = ("sft", "soup", "soups", "ppo", *ALGORITHMS)
    return {unit.rpartition("/")[2]: folder for unit, folder in inputs.items() if unit.partition("/")[0] in made}


def model_folder(recipe: Recipe, inputs: Mapping[str, Path], name: str) -> Path:
    """The folder of a model: a result among a job's inputs, or a folder or Hub id, which has a slash."""
    return reference_folder(recipe, name) if "/" in name else result_folders(inputs)[name]


SAME_NAMES = ("learning_rate", "num_train_epochs", "max_steps", "weight_decay", "lr_scheduler_type", "max_grad_norm", "gradient_checkpointing")  # fmt: skip
"""Settings that have the same name in a recipe's section and in transformers.TrainingArguments."""


def training_arguments(section: Training, folder: Path, seed: int, processes: int = 1) -> dict[str, Any]:
    """The transformers.TrainingArguments of a recipe's section, as a dict.

    The section's batch_size is the number of rows of an optimizer step in all processes together.
    """
    micro = section.micro_batch_size or section.batch_size // processes
    return {
        "output_dir": str(folder),
        **{name: getattr(section, name) for name in SAME_NAMES},
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": section.batch_size // (micro * processes),
        "warmup_steps": section.warmup_ratio,
        "optim": _optimizer(section.optim),
        "use_cpu": not torch.cuda.is_available(),
        "seed": seed,
        "data_seed": seed,
        "save_strategy": "no",  # training/train.py asks for checkpoints
        "save_steps": section.save_steps,
        "disable_tqdm": True,
        "logging_steps": 10,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "ddp_find_unused_parameters": False,
    }


def _optimizer(name: str) -> str:
    if not name.startswith("paged") or torch.cuda.is_available():
        return name
    say(f"optim: {name} needs a CUDA device, which this machine lacks; adamw_torch_fused is used instead")
    return "adamw_torch_fused"


def reference_folder(recipe: Recipe, path: str) -> Path:
    """The local folder of a reference adapter or checkpoint, which is downloaded if it is on the Hub."""
    return local_folder(path) if recipe.adapter is None else lora.adapter_folder(path)


def report_left_out(job: Job, left_out: int, rows: int, why: str) -> None:
    """Print how many rows of the data are left out, and why. Nothing is printed if no row is left out."""
    if left_out:
        say(f"{job.unit.id}  {left_out} of {rows} rows left out: {why}")


def prompts_that_fit(
    job: Job, context: StageContext, rows: list[dict[str, Any]], where: str = "evaluate.prompts"
) -> list[dict[str, Any]]:
    """The prompts that leave room for a response within model.max_length. Prints how many do not.

    where: the recipe's key for the error message. Raises SalsaError if no prompt fits.
    """
    longest = context.recipe.model.max_length - context.recipe.generation.max_new_tokens
    kept = [row for row in rows if len(prompt_tokens(row, context.tokenizer)) <= longest]
    why = f"prompts longer than {longest} tokens (model.max_length minus generation.max_new_tokens)"
    report_left_out(job, len(rows) - len(kept), len(rows), why)
    require(bool(kept), f"{where}: every prompt is longer than {longest} tokens; raise model.max_length")
    return kept


def remove_printer(trainer: Trainer) -> None:
    """Remove the callback that prints a Trainer's logs, which are saved in log.jsonl anyway."""
    trainer.remove_callback(PrinterCallback)


FIGURES = {
    "loss": "loss",
    "mean_token_accuracy": "accuracy",
    "accuracy": "accuracy",
    "rewards/accuracies": "accuracy",
    "reward": "reward",
    "kl": "KL",
    "learning_rate": "lr",
    "num_tokens": "tokens",
}
"""Key of a metric in the logs of Trainer and TRL → its name beside the progress bar, the most important first."""
NARROW_BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
"""tqdm's format without the steps per second."""


class ProgressBar(TrainerCallback):
    """Callback that shows a progress bar with the latest metrics, and saves the log as folder/log.jsonl.

    transformers' ProgressCallback does not show the stage, prints every log in full, and writes unreadable text if the
    output is not a terminal. The bar is shown in the first process only. beside_table: whether a table shows the metrics, so
    that the bar shows none, and nothing is printed if standard error is not a terminal.
    """

    def __init__(self, description: str, folder: Path | None = None, *, beside_table: bool = False) -> None:
        self.description, self.folder, self.beside_table = description, folder, beside_table
        self.context = contextlib.ExitStack()
        self.bar: Any = None
        self.figures: dict[str, float] = {}
        """The newest metrics: name beside the bar → value."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Open the progress bar."""
        if state.is_world_process_zero and (sys.stderr.isatty() or not self.beside_table):
            self.bar = self.context.enter_context(progress_bar(state.max_steps, self.description))
            self.bar.n = self.bar.initial = state.global_step

    def close(self) -> None:
        """Close the progress bar if it is open."""
        self.context.close()
        self.bar = None

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Advance the progress bar by one optimizer step."""
        if self.bar is not None:
            self.bar.update()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Set the metrics that the progress bar shows when it is next drawn: those for which a terminal has room."""
        self.figures |= {name: (logs or {})[key] for key, name in FIGURES.items() if key in (logs or {})}
        if self.bar is not None and self.figures and not self.beside_table:
            texts = {name: f"{value:.3g}" for name, value in self.figures.items()}
            texts |= {name: tqdm.format_sizeof(value) for name, value in self.figures.items() if name == "tokens"}
            shown = [f"{name}={texts[name]}" for name in dict.fromkeys(FIGURES.values()) if name in texts]
            room = self._make_room()
            while len(shown) > 1 and len(", ".join(shown)) > room:
                shown.pop()
            self.bar.set_postfix_str(", ".join(shown), refresh=False)

    def _make_room(self) -> float:
        """Number of characters for metrics beside a bar of five; a narrow terminal shows no steps per second."""
        if not sys.stderr.isatty():
            return math.inf
        width = self.bar.dynamic_ncols(self.bar.fp)[0] if self.bar.dynamic_ncols else self.bar.ncols
        self.bar.bar_format = None if width >= 100 else NARROW_BAR
        rate = ", 999.99it/s" * (width >= 100)
        return width - len(f"{self.bar.desc}100%|█████| {self.bar.total}/{self.bar.total} [00:00<00:00{rate}, ]")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Close the progress bar and write log.jsonl."""
        self.close()
        if self.folder is not None and state.is_world_process_zero:
            write_atomic(self.folder / "log.jsonl", "".join(json.dumps(row) + "\n" for row in state.log_history))
