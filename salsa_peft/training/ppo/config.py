"""SalsaPPOConfig, which adds PPO's options to TrainingArguments."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field, ValidationError
from transformers import TrainingArguments
from transformers.integrations import unset_hf_deepspeed_config

from salsa_peft.config.fields import STRICT, Count, NonNegative, Positive, Seed
from salsa_peft.config.options.ppo import PPOOptions, Sampling
from salsa_peft.config.schema import PPO
from salsa_peft.utils.console import say
from salsa_peft.utils.errors import SalsaError, require
from salsa_peft.utils.messages import explain_validation_error, short

UNSUPPORTED: dict[str, tuple[Any, str]] = {
    "save_only_model": (False, "PPO cannot resume from weights alone; save_model() saves them"),
    "load_best_model_at_end": (False, "PPO keeps its last policy; the checkpoints have the others"),
    "push_to_hub": (False, "call save_model(folder) and huggingface_hub's upload_folder instead"),
    "fp16": (False, "its loss scaler lets the first gradients overflow, at which PPO stops; set bf16=True"),
    "neftune_noise_alpha": (None, "PPO's ratio compares a network with itself, which noise on the embeddings changes"),
    "label_smoothing_factor": (0.0, "PPO has no labels"),
    "auto_find_batch_size": (
        False,
        "it would restart a run that has begun; set micro_batch_size and rollout_batch_size",
    ),
}
"""TrainingArguments that PPO does not support: their only value, and the reason."""
DERIVED = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
"""TrainingArguments that follow from the batch fields, and their defaults."""


@pydantic.dataclasses.dataclass(config=STRICT, kw_only=True)
class _Checked(PPOOptions, Sampling):
    """Bounds of SalsaPPOConfig's fields: those of the recipe's options, and some more."""

    learning_rate: NonNegative
    num_train_epochs: Positive
    max_grad_norm: NonNegative
    seed: Seed
    batch_size: Count
    micro_batch_size: Count | None
    eval_samples: Annotated[int, Field(ge=0)]
    offload: Literal["none", "frozen"]


@dataclass
class SalsaPPOConfig(PPOOptions, Sampling, TrainingArguments):
    """PPO's options (`PPOOptions`, `Sampling`) in addition to TrainingArguments.

    Batch sizes count responses of all processes; micro_batch_size and rollout_batch_size count those of one process.
    per_device_train_batch_size and gradient_accumulation_steps follow from them and are not read.
    """

    learning_rate: float = PPO.learning_rate
    """Paper A.3."""
    num_train_epochs: float = PPO.num_train_epochs
    """Passes over the prompts."""
    batch_size: int = PPO.batch_size
    """Responses in a rollout batch."""
    micro_batch_size: int | None = None
    """Responses in one forward and backward pass. None: a process's whole share of the minibatch."""
    eval_samples: int = 4
    """Responses of each evaluation that are written to eval_completions.jsonl."""
    offload: Literal["none", "frozen"] = "none"
    """frozen: models of references and classifiers stay in CPU memory and are moved in order to score.

    Adapters are not offloaded.
    """
    guards: dict[str, Any] | str | None = dataclasses.field(default_factory=dict, kw_only=True)  # type: ignore[assignment]
    """See PPOOptions. On a command line (HfArgumentParser) it is JSON."""
    rollout_options: dict[str, Any] | str | None = dataclasses.field(default_factory=dict, kw_only=True)  # type: ignore[assignment]
    """See PPOOptions. On a command line it is JSON."""

    def __post_init__(self) -> None:
        self.guards = _mapping("guards", self.guards)
        self.rollout_options = _mapping("rollout_options", self.rollout_options)
        self._check_values()
        self.check_shares("", self.batch_size, self.micro_batch_size)
        self.check_options("")
        self.remove_unused_columns = False
        self.logging_nan_inf_filter = False
        given = {name: getattr(self, name) for name in DERIVED}
        # until the number of processes is known
        self.per_device_train_batch_size = self.gradient_accumulation_steps = 1
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False
        super().__post_init__()
        unset_hf_deepspeed_config()  # otherwise from_pretrained would shard references and classifiers under ZeRO-3
        require(self.n_gpu <= 1, f"SalsaPPOConfig: one process has {self.n_gpu} GPUs; use accelerate launch")
        share = self.check_shares("", self.batch_size, self.micro_batch_size, self.world_size)
        self.per_device_train_batch_size = self.micro_batch_size or share
        self.gradient_accumulation_steps = share // self.per_device_train_batch_size
        for name, default in DERIVED.items():
            if given[name] not in (default, getattr(self, name)):
                say(
                    f"{name}: {given[name]} is ignored; {getattr(self, name)} follows from batch_size ="
                    f" {self.batch_size}, num_mini_batches and micro_batch_size"
                )
        require(
            self.min_new_tokens <= self.max_new_tokens,
            f"min_new_tokens: {self.min_new_tokens} is more than max_new_tokens = {self.max_new_tokens}",
        )

    def _check_values(self) -> None:
        """Raise SalsaError for a value that is not allowed; a dataclass alone accepts any."""
        for name, (value, why) in UNSUPPORTED.items():
            found = getattr(self, name)
            require(found == value, f"{name}: {_as_yaml(found)} is not supported, only {_as_yaml(value)}: {why}")
        try:
            _Checked(**{field.name: getattr(self, field.name) for field in dataclasses.fields(_Checked)})
        except ValidationError as error:
            key, message = explain_validation_error(dict(error.errors(include_url=False)[0]))
            raise SalsaError(f"{key}: {message}") from error

    @property
    def minibatch_size(self) -> int:
        """Responses in one optimizer step."""
        return self.batch_size // self.num_mini_batches

    @property
    def micro_steps(self) -> int:
        """Forward and backward passes of one process per rollout batch."""
        return self.steps_per_update * self.gradient_accumulation_steps

    def set_max_steps(self, prompts: int) -> None:
        """Set max_steps from num_train_epochs, in whole updates, because an incomplete one is not logged.

        Raises SalsaError if max_steps is given and ends within an update.
        """
        steps = self.steps_per_update
        require(
            self.max_steps < 1 or self.max_steps % steps == 0,
            f"max_steps: found {self.max_steps}, expected a multiple of {steps}, the optimizer steps of one update"
            " (num_ppo_epochs × num_mini_batches)",
        )
        if self.max_steps < 1:
            self.max_steps = math.ceil(self.num_train_epochs * (prompts // self.batch_size)) * steps


def _mapping(name: str, value: Any) -> Any:
    """A mapping, also from JSON; None becomes {}."""
    if not isinstance(value, str):
        return {} if value is None else value
    try:
        return json.loads(value)
    except ValueError as error:
        raise SalsaError(f"{name}: {short(value)} is neither a mapping nor its JSON") from error


def _as_yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value)
