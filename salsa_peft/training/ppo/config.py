"""SalsaPPOConfig, which adds PPO's options to TrainingArguments."""

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field, ValidationError
from transformers import TrainingArguments
from transformers.integrations import unset_hf_deepspeed_config
from transformers.trainer_utils import HubStrategy

from salsa_peft.config.fields import STRICT, Count, NonNegative, Positive, Seed
from salsa_peft.config.options.ppo import PPOOptions, Sampling
from salsa_peft.config.schema import PPO
from salsa_peft.utils.console import say
from salsa_peft.utils.errors import SalsaError, require
from salsa_peft.utils.messages import explain_validation_error, short

UNSUPPORTED: dict[str, tuple[Any, str]] = {
    "save_only_model": (False, "PPO cannot resume from weights alone; save_model() saves them"),
    "load_best_model_at_end": (False, "PPO keeps its last policy; earlier ones are in the checkpoints"),
    "trust_remote_code": (False, "code of a repository is never run; use a model that Transformers supports itself"),
    "fp16": (False, "its loss scaler lets the first gradients overflow, at which PPO stops; set bf16=True"),
    "neftune_noise_alpha": (None, "PPO compares a network with itself, so its embeddings must have no noise"),
    "label_smoothing_factor": (0.0, "PPO has no labels"),
    "auto_find_batch_size": (
        False,
        "it would restart a run that has begun; set micro_batch_size and rollout_batch_size",
    ),
}
"""Options of TrainingArguments that PPO does not support: name → (the only value allowed, the reason)."""
DERIVED = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
"""Options of TrainingArguments that are computed from the batch sizes: name → default."""


@pydantic.dataclasses.dataclass(config=STRICT, kw_only=True)
class _Checked(PPOOptions, Sampling):
    """Types and bounds of SalsaPPOConfig's fields: those of a recipe's options, and those below."""

    learning_rate: NonNegative
    num_train_epochs: Positive
    max_grad_norm: NonNegative
    seed: Seed
    batch_size: Count
    micro_batch_size: Count | None
    eval_samples: Annotated[int, Field(ge=0)]
    offload: Literal["none", "frozen"]
    reward_weights: list[float] | None


@dataclass
class SalsaPPOConfig(PPOOptions, Sampling, TrainingArguments):
    """PPO's options (`PPOOptions`, `Sampling`) in addition to TrainingArguments.

    batch_size counts the responses of all processes; micro_batch_size and rollout_batch_size count those of one
    process. per_device_train_batch_size and gradient_accumulation_steps are computed from them; values given for
    these two are ignored.
    """

    learning_rate: float = PPO.learning_rate
    """Learning rate of the optimizer. The default is the paper's (A.3)."""
    num_train_epochs: float = PPO.num_train_epochs
    """Number of passes over the prompts."""
    batch_size: int = PPO.batch_size
    """Number of responses in a rollout batch."""
    micro_batch_size: int | None = None
    """Maximum number of responses in a forward and backward pass, which are split further by length. None: a process's
    whole share of the minibatch."""
    eval_samples: int = 4
    """Number of responses that each evaluation writes to eval_completions.jsonl."""
    offload: Literal["none", "frozen"] = "none"
    """Where the models of references and classifiers are; adapters are not offloaded.

    none: on the device. frozen: in CPU memory; they are moved to the device while they score.
    """
    model_init_kwargs: dict[str, Any] | str | None = None
    """Arguments of `from_pretrained` for a model that the trainer loads from its name, such as dtype (default float32, as
    in TRL), revision and attn_implementation; on a command line, a JSON object."""
    trust_remote_code: bool = False
    """As in TRL's configs; only False is supported."""
    reward_weights: list[float] | None = None
    """Weight of each entry of the trainer's reward_funcs. None: 1 each, or the weights in the entries (reward, weight)."""
    guards: dict[str, Any] | str | None = dataclasses.field(default_factory=dict, kw_only=True)  # type: ignore[assignment]
    """As in PPOOptions; on a command line (HfArgumentParser), a JSON object."""
    rollout_options: dict[str, Any] | str | None = dataclasses.field(default_factory=dict, kw_only=True)  # type: ignore[assignment]
    """As in PPOOptions; on a command line (HfArgumentParser), a JSON object."""

    def __post_init__(self) -> None:
        self.guards = _mapping("guards", self.guards)
        self.model_init_kwargs = _mapping("model_init_kwargs", self.model_init_kwargs)
        self.rollout_options = _mapping("rollout_options", self.rollout_options)
        self._check_values()
        self.check_shares("", self.batch_size, self.micro_batch_size)
        self.check_options("")
        self.remove_unused_columns = False
        self.logging_nan_inf_filter = False
        given = {name: getattr(self, name) for name in DERIVED}
        # computed below, when TrainingArguments knows the number of processes
        self.per_device_train_batch_size = self.gradient_accumulation_steps = 1
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False
        super().__post_init__()
        unset_hf_deepspeed_config()  # otherwise from_pretrained would shard references and classifiers under ZeRO-3
        require(
            self.hub_strategy in (HubStrategy.END, HubStrategy.EVERY_SAVE),
            f"hub_strategy: {HubStrategy(self.hub_strategy).value} is not supported, because checkpoints hold prompts and responses; use"
            " every_save or end",
        )
        require(self.n_gpu <= 1, f"SalsaPPOConfig: one process has {self.n_gpu} GPUs, not one; use accelerate launch")
        share = self.check_shares("", self.batch_size, self.micro_batch_size, self.world_size)
        self.per_device_train_batch_size = self.micro_batch_size or share
        self.gradient_accumulation_steps = share // self.per_device_train_batch_size
        for name, default in DERIVED.items():
            if given[name] not in (default, getattr(self, name)):
                say(
                    f"{name}: {given[name]} is ignored; it is {getattr(self, name)}, computed from batch_size ="
                    f" {self.batch_size}, num_mini_batches and micro_batch_size"
                )
        require(
            self.min_new_tokens <= self.max_new_tokens,
            f"min_new_tokens: {self.min_new_tokens} is more than max_new_tokens = {self.max_new_tokens}; lower it",
        )

    def _check_values(self) -> None:
        """Raise SalsaError for a value that is not allowed, which a dataclass does not check."""
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
        """Number of responses in one optimizer step, of all processes together."""
        return self.batch_size // self.num_mini_batches

    @property
    def prompts_per_update(self) -> int:
        """Number of prompts in a rollout batch, of all processes together."""
        return self.batch_size // self.responses_per_prompt

    @property
    def micro_steps(self) -> int:
        """Number of forward and backward passes of one process for a rollout batch."""
        return self.steps_per_update * self.gradient_accumulation_steps

    def set_max_steps(self, prompts: int) -> None:
        """If max_steps is not set, compute it from num_train_epochs, as a whole number of updates.

        Raises SalsaError if max_steps is set and ends within an update, or if the policy would not be trained. prompts:
        number of prompts.
        """
        steps = self.steps_per_update
        require(
            self.max_steps < 1 or self.max_steps % steps == 0,
            f"max_steps: {self.max_steps} is not a multiple of {steps}, the number of optimizer steps in one update"
            " (num_ppo_epochs × num_mini_batches)",
        )
        if self.max_steps < 1:
            self.max_steps = math.ceil(self.num_train_epochs * (prompts // self.prompts_per_update)) * steps
        updates = self.max_steps // steps
        require(
            self.value_warmup_updates < updates,
            f"value_warmup_updates: {self.value_warmup_updates} must be less than {updates}, the number of updates of the"
            " run, or the policy would not be trained",
        )


def _mapping(name: str, value: Any) -> Any:
    """Parse an option that is a mapping, its JSON, or None for an empty mapping."""
    if not isinstance(value, str):
        return {} if value is None else value
    try:
        return json.loads(value)
    except ValueError as error:
        raise SalsaError(f"{name}: {short(value)} is neither a mapping nor a JSON object") from error


def _as_yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value)
