"""The policy with its value head: create, save and load it; and what must match on resume."""

from __future__ import annotations

import contextlib
import hashlib
import pickle
from array import array
from collections.abc import Iterable, Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DistributedType, save_fsdp_optimizer
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from salsa_peft.models import sharding
from salsa_peft.models.adapters import lora
from salsa_peft.models.base import causal_lm
from salsa_peft.models.rewards.base import Reward
from salsa_peft.models.rewards.reward import adapter_in
from salsa_peft.models.value_head import PolicyWithValueHead
from salsa_peft.models.weights import load_weights, save_checkpoint
from salsa_peft.training.ppo.config import SalsaPPOConfig
from salsa_peft.training.references import FrozenReference
from salsa_peft.utils.errors import SalsaError

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from salsa_peft.training.ppo.prompts import Prompt
    from salsa_peft.training.ppo.rollout import Rollout


VALUE_HEAD, VALUE_ADAPTER = "value_head.safetensors", "value"


def with_value_head(model: PeftModel | PreTrainedModel, args: SalsaPPOConfig, reward: Reward) -> PolicyWithValueHead:
    """Add a value head to the policy.

    With `value: adapter`, a value adapter and its head start as copies of the reward adapter and head. Raises
    SalsaError if there is no reward adapter.
    """
    if args.value == "head":
        return PolicyWithValueHead(model)
    start = adapter_in(reward)
    if not isinstance(model, PeftModel) or start is None:
        raise SalsaError(
            f"value: adapter starts from a reward adapter, and the reward is a {type(reward).__name__}. Set value: head"
        )
    name = lora.unused_name(model, VALUE_ADAPTER)
    lora.attach(model, start.folder, name, trainable=True)
    return PolicyWithValueHead(model, name, start.head.weight)


def train_only(model: PeftModel | PreTrainedModel, *adapters: str | None) -> None:
    """Make these adapters trainable and freeze all others."""
    for name in model.peft_config if isinstance(model, PeftModel) else ():
        lora.set_trainable(model, name, name in adapters)


def save_policy(
    model: PolicyWithValueHead,
    policy_name: str | None,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    weights: dict[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Save the policy as a PEFT adapter or checkpoint with the tokenizer, and the value head beside it.

    A value adapter is saved in a subfolder. weights: all weights, gathered by Trainer, if the model is sharded. dtype:
    of a checkpoint with full weights; None keeps the model's.
    """
    policy, head = model.policy, model.value_head.state_dict()
    if weights is not None:
        tied = {f"policy.{name}" for name in causal_lm(policy).all_tied_weights_keys or ()}  # copies of other weights
        head = _of_submodule("value_head.", weights)
        weights = _of_submodule("policy.", {name: weight for name, weight in weights.items() if name not in tied})
    if isinstance(policy, PeftModel):
        lora.save(policy, str(policy_name), folder, tokenizer, state_dict=weights)
        if model.value_adapter is not None:
            lora.save(policy, model.value_adapter, folder / VALUE_ADAPTER, state_dict=weights)
    else:
        save_checkpoint(policy, folder, tokenizer, weights, dtype)
    head = {name: tensor.detach().cpu() for name, tensor in head.items()}
    save_file(head, folder / VALUE_HEAD, metadata={"format": "pt"})


def load_policy(model: PolicyWithValueHead, policy_name: str | None, folder: Path) -> None:
    """Load in place what `save_policy` saved."""
    policy = model.policy
    if isinstance(policy, PeftModel):
        lora.load(policy, str(policy_name), folder)
        if model.value_adapter is not None:
            lora.load(policy, model.value_adapter, folder / VALUE_ADAPTER)
    else:
        load_weights(policy, folder)
    sharding.load(model.value_head, lora.read_tensors(folder / VALUE_HEAD))


def _of_submodule(prefix: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}


def save_sharded_optimizer(accelerator: Accelerator, optimizer: Any, model: Any, folder: str) -> None:
    """Save the optimizer's shards under FSDP or DeepSpeed.

    Trainer would save all weights with them, a second time.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        sharding.engine_of(accelerator).save_checkpoint(folder, exclude_frozen_parameters=True)
    else:
        save_fsdp_optimizer(accelerator.state.fsdp_plugin, accelerator, optimizer, model, folder)


def update_learning_rates(optimizer: Any, scheduler: Any, saved: Mapping[str, Any], args: SalsaPPOConfig) -> None:
    """Apply changed learning rates to the optimizer and schedule that a checkpoint restored.

    The position in the schedule stays: the new rate is scaled by what the schedule had made of the `saved` one.
    """
    if all(saved[key] == vars(args)[key] for key in ("learning_rate", "value_head_learning_rate")):
        return
    state = scheduler.state_dict()
    head = None if args.value_head_learning_rate is None else len(optimizer.param_groups) - 1
    rates = list(state.get("base_lrs", ()))
    for index, group in enumerate(optimizer.param_groups):
        key = "value_head_learning_rate" if index == head else "learning_rate"
        before, now = saved[key], vars(args)[key]
        if before != now:
            rate = now * (float(group["lr"]) / before if before else 1.0)
            is_tensor = isinstance(group["lr"], Tensor)  # torchao's optimizers require one
            group.update(lr=torch.full_like(group["lr"], rate) if is_tensor else rate, initial_lr=now)
            rates[index : index + 1] = [now] * bool(rates)
    if rates:
        scheduler.load_state_dict(
            {**state, "base_lrs": rates, "_last_lr": [group["lr"] for group in optimizer.param_groups]}
        )


def checkpoint_size(model: nn.Module, optimizer: torch.optim.Optimizer, rollout: Rollout | None) -> int:
    """Bytes of a checkpoint's large parts: trained weights, optimizer states and the rollout batch."""
    tensors: list[Tensor] = [parameter for parameter in model.parameters() if parameter.requires_grad]
    tensors += [entry for state in optimizer.state.values() for entry in state.values() if isinstance(entry, Tensor)]
    if rollout is not None:
        tensors += [*rollout.responses, *(field for field in rollout if isinstance(field, Tensor))]
    return sum(map(stored_size, tensors))


def stored_size(tensor: Tensor) -> int:
    """Bytes of a tensor in a file.

    A tensor subclass (torchao's 8-bit states) has those of the tensors that it consists of.
    """
    if is_traceable_wrapper_subclass(tensor):
        return sum(stored_size(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.nbytes


@contextlib.contextmanager
def no_pickles(checkpoint: str | None) -> Iterator[None]:
    """Context in which torch's refusal to load more than tensors from a pickle becomes a SalsaError."""
    try:
        yield
    except pickle.UnpicklingError as error:
        raise SalsaError(
            f"{checkpoint}: optimizer.pt, scheduler.pt or rng_state*.pth holds a pickle with more than tensors and"
            " numbers, which training does not write. It was not loaded; resume from another checkpoint"
        ) from error


REQUIRED = (
    "seed", "batch_size", "num_mini_batches", "num_ppo_epochs", "max_new_tokens", "min_new_tokens", "temperature",
    "kl_estimator", "kl_per", "kl_control", "gamma", "lam", "cliprange", "cliprange_value", "vf_coef", "value",
    "whiten_rewards", "missing_eos_penalty", "score_clip", "normalize_scores", "optim", "optim_args", "weight_decay",
    "adam_beta1", "adam_beta2", "adam_epsilon",
)  # fmt: skip
"""Options that must match on resume."""
CHANGEABLE = (
    "learning_rate", "value_head_learning_rate", "lr_scheduler_type", "warmup_steps", "max_grad_norm", "kl_coef",
    "kl_target", "kl_horizon", "kl_coef_min", "kl_coef_max", "max_ratio", "target_kl", "rollout_backend",
    "old_logprobs", "bf16",
)  # fmt: skip
"""Options that may change on resume; a change is logged."""
LORA_OPTIONS = ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")
"""Options of LoraConfig that must match on resume."""
SAMPLE = 4096
"""Elements of each weight that a digest covers."""


def required_options(args: SalsaPPOConfig) -> dict[str, Any]:
    """The options of REQUIRED by name.

    And whether the value head has its own learning rate, and with it its own group in the optimizer's state.
    """
    own = args.value_head_learning_rate is not None
    return {key: _as_json(vars(args)[key]) for key in REQUIRED} | {"own value_head_learning_rate": own}


def changeable_options(args: SalsaPPOConfig, reward: Reward) -> dict[str, Any]:
    """CHANGEABLE by name, and the names of reward functions, whose code cannot be compared."""
    code = [one.code for one in reward.components()]
    return {key: _as_json(vars(args)[key]) for key in CHANGEABLE} | {"reward": code}


def changes(saved: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """A line for each option that differs from the checkpoint's."""
    for key, value in now.items():
        if saved[key] != value:
            yield f"{key} {saved[key]} → {value}"


def identity(
    model: Any,
    policy: str | None,
    references: Iterable[FrozenReference],
    reward: Reward,
    prompts: Iterable[Prompt],
) -> dict[str, Any]:
    """What must match on resume besides options: policy, base, references, reward models and prompts.

    Models are compared by digests of their weights, so that their paths may change. policy: the adapter's name; None
    for full weights.
    """
    dtype = str(causal_lm(model).dtype).removeprefix("torch.")
    weights = "weights" if dtype == "float32" else f"weights in {dtype}"
    found: dict[str, Any] = {"policy": weights if policy is None else "adapter"}
    if isinstance(model, PeftModel) and policy is not None:
        config = model.peft_config[policy]
        if isinstance(config, LoraConfig):
            found |= {key: _as_json(vars(config)[key]) for key in LORA_OPTIONS}
        own = {id(weight) for name in model.peft_config for weight in lora.parameters(model, name)}
        base = (weight for weight in model.parameters() if id(weight) not in own)
        # without 4-bit weights, whose layout depends on the machine
        found["base"] = digest(weight for weight in base if weight.is_floating_point())
    found["references"] = [
        digest(reference.model.parameters())
        if reference.model is not None
        else _digest_adapter(model, reference.adapter)
        for reference in references
    ]
    moves = [f"every {one.sync_every}, α {one.mixup_alpha:g}" for one in references if one.sync_every is not None]
    found |= {"moving references": moves} if moves else {}
    identified = [one.weights() for one in reward.components()]
    found["reward models"] = [digest(model) for model in identified if model is not None]
    tokens = hashlib.sha256()
    count = 0
    for prompt in prompts:
        count += 1
        tokens.update(array("q", [len(prompt.tokens), *prompt.tokens]).tobytes())
    return found | {"prompts": f"{count} ({tokens.hexdigest()[:12]})"}


def digest(weights: Iterable[Tensor]) -> str:
    """12 hex digits that identify weights by their shapes and first elements.

    Elements are compared in float32, so that the dtype does not matter.
    """
    found = hashlib.sha256()
    for weight in weights:
        sample = weight.detach().reshape(-1)[:SAMPLE].cpu()
        found.update(str(tuple(weight.shape)).encode())
        found.update((sample.float() if sample.is_floating_point() else sample).contiguous().numpy().tobytes())
    return found.hexdigest()[:12]


def _digest_adapter(model: PeftModel, name: str | None) -> str:
    if name is None:
        return "base"
    layers = [layer for layer in lora.tuner_layers(model) if isinstance(layer, LoraLayer)]
    scaling = [layer.scaling[name] for layer in layers if name in layer.scaling]
    return digest([*lora.parameters(model, name), torch.tensor(scaling)])


def _as_json(value: Any) -> Any:
    """The value of an enum, as JSON stores it; any other value as it is."""
    return str(value.value) if isinstance(value, Enum) else value
