"""What a PPO run is, to be held against a checkpoint: what must be as it was, and what may be another and is taken up, and said.

Refused is what the checkpoint's own state hangs on (data order, the rollout batch in it, the optimizer's moments) and what is
trained towards (references, reward models, GAE, losses). Strengths may change: a guard that stops a run advises just that.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Mapping
from enum import Enum
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from salsa_peft.models.adapters import lora as adapters
from salsa_peft.models.base import causal_lm
from salsa_peft.models.rewards.classifier import ClassifierReward
from salsa_peft.models.rewards.function import FunctionReward
from salsa_peft.models.rewards.reward import AdapterReward, Reward, WeightedReward
from salsa_peft.references import Frozen

if TYPE_CHECKING:
    from salsa_peft.ppo_config import SalsaPPOConfig
    from salsa_peft.prompts import Prompt

KEPT = (
    "seed", "batch_size", "num_mini_batches", "num_ppo_epochs", "max_new_tokens", "min_new_tokens", "temperature", "kl_estimator",
    "kl_per", "kl_control", "gamma", "lam", "cliprange", "cliprange_value", "vf_coef", "value", "whiten_rewards", "missing_eos_penalty",
    "score_clip", "normalize_scores", "optim", "optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon",
)  # fmt: skip
"""Options that a run goes on with or not at all."""
CHANGEABLE = (
    "learning_rate", "value_head_learning_rate", "lr_scheduler_type", "warmup_steps", "max_grad_norm", "kl_coef", "kl_target",
    "kl_horizon", "kl_coef_min", "kl_coef_max", "max_ratio", "target_kl", "rollout_backend", "old_logprobs", "bf16",
)  # fmt: skip
"""Options that hold from the checkpoint on where they were changed."""
FACTORS = ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")
SAMPLE = 4096  # elements of each tensor that go into a digest


def kept_options(args: SalsaPPOConfig) -> dict[str, Any]:
    """KEPT by name, and whether the value head has a rate, and so a part of the optimizer's state, of its own."""
    own = args.value_head_learning_rate is not None
    return {key: _plain(vars(args)[key]) for key in KEPT} | {"own value_head_learning_rate": own}


def changeable_options(args: SalsaPPOConfig, reward: Reward) -> dict[str, Any]:
    """CHANGEABLE by name, and what the reward's functions are called: their code can't be compared."""
    functions = [part.name if isinstance(part, FunctionReward) else type(part).__name__ for part in _parts(reward)]
    return {key: _plain(vars(args)[key]) for key in CHANGEABLE} | {"reward": functions}


def changes(made: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """A line for each option of a checkpoint that is another now."""
    for key, value in now.items():
        if made[key] != value:
            yield f"{key} {made[key]} → {value}"


def take_rates(optimizer: Any, scheduler: Any, made: Mapping[str, Any], args: SalsaPPOConfig) -> None:
    """Learning rates that are others than at the checkpoint, where it stands in its schedule; optimizer and schedule were loaded,
    and with them the old ones."""
    if all(made[key] == vars(args)[key] for key in ("learning_rate", "value_head_learning_rate")):
        return
    state = scheduler.state_dict()
    head = None if args.value_head_learning_rate is None else len(optimizer.param_groups) - 1
    rates = list(state.get("base_lrs", ()))
    for place, group in enumerate(optimizer.param_groups):
        key = "value_head_learning_rate" if place == head else "learning_rate"
        before, now = made[key], vars(args)[key]
        if before != now:
            rate = now * (float(group["lr"]) / before if before else 1.0)
            held = isinstance(group["lr"], Tensor)  # torchao's optimizers take no other
            group.update(lr=torch.full_like(group["lr"], rate) if held else rate, initial_lr=now)
            rates[place : place + 1] = [now] * bool(rates)
    if rates:
        scheduler.load_state_dict(
            {**state, "base_lrs": rates, "_last_lr": [group["lr"] for group in optimizer.param_groups]}
        )


def identity(model: Any, policy: str | None, references: Iterable[Frozen], reward: Reward, prompts: Iterable[Prompt]) -> dict[str, Any]:  # fmt: skip
    """What no option names, as digests of samples, so that paths may be others: the policy's adapter (`policy`; None: full
    weights) and its base, the references, models in the reward, the prompts' tokens."""
    dtype = str(causal_lm(model).dtype).removeprefix("torch.")
    weights = "weights" if dtype == "float32" else f"weights in {dtype}"
    found: dict[str, Any] = {"policy": weights if policy is None else "adapter"}
    if isinstance(model, PeftModel) and policy is not None:
        config = model.peft_config[policy]
        if isinstance(config, LoraConfig):
            found |= {key: _plain(vars(config)[key]) for key in FACTORS}
        own = {id(weight) for name in model.peft_config for weight in adapters.parameters(model, name)}
        base = (weight for weight in model.parameters() if id(weight) not in own)
        found["base"] = digest(
            weight for weight in base if weight.is_floating_point()
        )  # 4-bit ones hang on the machine
    found["references"] = [
        digest(reference.model.parameters()) if reference.model is not None else _adapter(model, reference.adapter)
        for reference in references
    ]
    moves = [f"every {one.sync_every}, α {one.mixup_alpha:g}" for one in references if one.sync_every is not None]
    found |= {"moving references": moves} if moves else {}
    found["reward models"] = [one for part in _parts(reward) if (one := _reward_model(part)) is not None]
    tokens = hashlib.sha256()
    count = 0
    for prompt in prompts:
        count += 1
        tokens.update(array("q", [len(prompt.tokens), *prompt.tokens]).tobytes())
    return found | {"prompts": f"{count} ({tokens.hexdigest()[:12]})"}


def digest(weights: Iterable[Tensor]) -> str:
    """12 hex digits of the weights' shapes and first elements, in float32: the same in whichever dtype they are held."""
    found = hashlib.sha256()
    for weight in weights:
        sample = weight.detach().reshape(-1)[:SAMPLE].cpu()
        found.update(str(tuple(weight.shape)).encode())
        found.update((sample.float() if sample.is_floating_point() else sample).contiguous().numpy().tobytes())
    return found.hexdigest()[:12]


def _adapter(model: PeftModel, name: str | None) -> str:
    if name is None:
        return "base"
    layers = [layer for layer in adapters.tuner_layers(model) if isinstance(layer, LoraLayer)]
    scaling = [layer.scaling[name] for layer in layers if name in layer.scaling]
    return digest([*adapters.parameters(model, name), torch.tensor(scaling)])


def _reward_model(part: Any) -> str | None:
    if isinstance(part, AdapterReward):
        return digest([*adapters.parameters(part.model, part.adapter), part.head.weight])
    if isinstance(part, ClassifierReward):
        return digest(part.classifier.parameters())
    return digest(part.parameters()) if isinstance(part, nn.Module) else None


def _parts(reward: Reward) -> list[Reward]:
    """The rewards of a sum, or the one."""
    return [part.reward for part in reward.parts] if isinstance(reward, WeightedReward) else [reward]


def _plain(value: Any) -> Any:
    """As JSON gives it back: the value of an enum (transformers has strings as such)."""
    return str(value.value) if isinstance(value, Enum) else value
