"""SalsaPPOConfig: TrainingArguments and the engine's options. And the order in which prompts come."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pydantic
import torch
from pydantic import Field, ValidationError
from torch.utils.data import DataLoader, Sampler
from transformers import TrainingArguments
from transformers.integrations import unset_hf_deepspeed_config

from salsa_peft.config.fields import STRICT, Count, NonNegative, Positive, Seed
from salsa_peft.config.options.ppo import PPOOptions, Sampling
from salsa_peft.config.schema import PPO
from salsa_peft.utils.errors import SalsaError, require
from salsa_peft.utils.messages import explain_validation_error, short

UNFIT: dict[str, tuple[Any, str]] = {
    "save_only_model": (False, "PPO can't go on from weights alone; save_model() saves them"),
    "load_best_model_at_end": (False, "PPO keeps its last policy; the checkpoints have the others"),
    "push_to_hub": (False, "save_model(folder) and huggingface_hub's upload_folder put a policy there, without optimizer states"),
    "fp16": (False, "its loss scaler lets the first gradients overflow, at which PPO stops; set bf16=True"),
    "neftune_noise_alpha": (None, "PPO's ratio compares a network with itself, which noise on the embeddings changes"),
    "label_smoothing_factor": (0.0, "PPO has no labels; leave it out"),
    "auto_find_batch_size": (False, "it would begin anew in the middle of a run; set micro_batch_size and rollout_batch_size"),
}  # fmt: skip
"""TrainingArguments that PPO can't have otherwise, and why."""
FOLLOWS = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
"""TrainingArguments that follow from the batch fields, and their defaults."""


@pydantic.dataclasses.dataclass(config=STRICT, kw_only=True)
class _Checked(PPOOptions, Sampling):
    """What values SalsaPPOConfig's fields may have: the options' own bounds, as in a recipe, and those of some others."""

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
    """TrainingArguments and the engine's options (`PPOOptions`, `Sampling`). Batch sizes are responses, of all processes together;
    micro_batch_size and rollout_batch_size those of one process.

    `per_device_train_batch_size` and `gradient_accumulation_steps` follow from the three batch fields and are not read.
    """

    learning_rate: float = PPO.learning_rate
    """Paper A.3."""
    num_train_epochs: float = PPO.num_train_epochs
    """Passes over the prompts."""
    batch_size: int = PPO.batch_size
    """Responses of a rollout batch."""
    micro_batch_size: int | None = None
    """Responses of one forward and backward. None: a process's whole share of the minibatch."""
    eval_samples: int = 4
    """Responses of each evaluation that eval_completions.jsonl keeps."""
    offload: Literal["none", "frozen"] = "none"
    """frozen: references and classifiers with weights of their own wait in the CPU's memory, and are on the device one at a time while
    they score. Adapters have none to offload."""
    guards: dict[str, Any] | str | None = dataclasses.field(default_factory=dict, kw_only=True)  # type: ignore[assignment]
    """As PPOOptions has it; on a command line (HfArgumentParser) as JSON."""
    rollout_options: dict[str, Any] | str | None = dataclasses.field(default_factory=dict, kw_only=True)  # type: ignore[assignment]
    """As PPOOptions has it; on a command line as JSON."""

    def __post_init__(self) -> None:
        self.guards, self.rollout_options = (
            _mapping("guards", self.guards),
            _mapping("rollout_options", self.rollout_options),
        )
        self._check_values()
        self.check_batches("", self.batch_size, self.micro_batch_size)
        self.check_options("")
        self.remove_unused_columns = False
        self.logging_nan_inf_filter = False
        given = {name: getattr(self, name) for name in FOLLOWS}
        self.per_device_train_batch_size = self.gradient_accumulation_steps = 1  # until the processes are counted
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False
        super().__post_init__()
        unset_hf_deepspeed_config()  # or under ZeRO-3 from_pretrained would cut up models that stay whole: references, classifiers
        require(
            self.n_gpu <= 1,
            f"SalsaPPOConfig: found {self.n_gpu} GPUs in one process, expected one; use accelerate launch",
        )
        self._share_out()
        for name, usual in FOLLOWS.items():
            if given[name] not in (usual, getattr(self, name)):
                print(f"{name}: found {given[name]}, which is not read: {getattr(self, name)} follows from batch_size = {self.batch_size},"
                      " num_mini_batches and micro_batch_size", file=sys.stderr)  # fmt: skip
        require(
            self.min_new_tokens <= self.max_new_tokens,
            f"min_new_tokens: found {self.min_new_tokens}, expected at most max_new_tokens = {self.max_new_tokens}",
        )

    def _check_values(self) -> None:
        """Raise SalsaError for a value that its field can't have: a dataclass alone takes any."""
        for name, (expected, why) in UNFIT.items():
            found = getattr(self, name)
            require(found == expected, f"{name}: found {_said(found)}, expected {_said(expected)}: {why}")
        try:
            _Checked(**{field.name: getattr(self, field.name) for field in dataclasses.fields(_Checked)})
        except ValidationError as error:
            key, message = explain_validation_error(dict(error.errors(include_url=False)[0]))
            raise SalsaError(f"{key}: {message}") from error

    def _share_out(self) -> None:
        """The micro-batch of one process and the accumulation steps, from the global batches and the number of processes."""
        share = self.check_shares("", self.batch_size, self.micro_batch_size, self.world_size)
        self.per_device_train_batch_size = self.micro_batch_size or share
        self.gradient_accumulation_steps = share // self.per_device_train_batch_size

    @property
    def minibatch_size(self) -> int:
        """Responses of one optimizer step."""
        return self.batch_size // self.num_mini_batches

    @property
    def steps_per_update(self) -> int:
        """Optimizer steps that one rollout batch gives."""
        return self.num_ppo_epochs * self.num_mini_batches

    @property
    def micro_steps(self) -> int:
        """Forwards and backwards that one rollout batch gives."""
        return self.steps_per_update * self.gradient_accumulation_steps

    def set_max_steps(self, prompts: int) -> None:
        """Set max_steps from num_train_epochs in whole updates, rounded up, since an incomplete update is not logged.

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
    """A field that is a mapping; its JSON, from a command line; None → {}."""
    if not isinstance(value, str):
        return {} if value is None else value
    try:
        return json.loads(value)
    except ValueError as error:
        raise SalsaError(f"{name}: found {short(value)}, expected a mapping, or its JSON") from error


def _said(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value)


class RolloutBatches(Sampler[list[int]]):
    """Row indices of a rollout batch, each batch repeated once for every micro-step; a new order each epoch.

    The rows that don't fill the last batch of an epoch are left out of it.
    """

    def __init__(self, rows: int, batch_size: int, repeats: int, seed: int) -> None:
        self.rows, self.batch_size, self.repeats, self.seed, self.epoch = rows, batch_size, repeats, seed, 0

    def __len__(self) -> int:
        return self.rows // self.batch_size * self.repeats

    def set_epoch(self, epoch: int) -> None:
        """Called by transformers.Trainer, also where it resumes in the middle of an epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(
            self.rows, generator=torch.Generator().manual_seed(self.seed + 1_000_003 * self.epoch)
        ).tolist()
        for start in range(0, self.rows // self.batch_size * self.batch_size, self.batch_size):
            for _ in range(self.repeats):
                yield order[start : start + self.batch_size]


class RolloutLoader(DataLoader):
    """A DataLoader whose epoch reaches its batches."""

    def set_epoch(self, epoch: int) -> None:
        """Called by transformers.Trainer."""
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]
