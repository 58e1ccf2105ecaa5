"""Saving and loading a policy with its value head and optimizer, and which settings a checkpoint must share to go on from it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import pickle
from array import array
from collections.abc import Iterable, Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import save_fsdp_optimizer
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import Trainer
from transformers.trainer import SCHEDULER_NAME

from salsa_peft.models import sharding
from salsa_peft.models.adapters import lora
from salsa_peft.models.base import causal_lm
from salsa_peft.models.rewards.base import Reward
from salsa_peft.models.value_head import PolicyWithValueHead
from salsa_peft.models.weights import load_weights, read_tensors, save_checkpoint
from salsa_peft.training import checkpoints
from salsa_peft.training.ppo.config import SalsaPPOConfig
from salsa_peft.training.references import Frozen
from salsa_peft.utils.errors import SalsaError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from salsa_peft.training.ppo.config import SalsaPPOConfig
    from salsa_peft.training.ppo.prompts import Prompt


VALUE_HEAD, VALUE_ADAPTER = "value_head.safetensors", "value"


class SavingTrainer(Trainer):
    """A Trainer of a policy with a value head; ResumableTrainer has the checkpoints around it."""

    args: SalsaPPOConfig
    model: PolicyWithValueHead  # type: ignore[assignment]
    processing_class: PreTrainedTokenizerBase  # type: ignore[assignment]
    policy_name: str | None
    saved_dtype: torch.dtype | None = None
    """Of full weights that are sharded, once they are trained; None: as they are held."""

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """The policy as an ordinary PEFT adapter or checkpoint with the tokenizer, the value head (and adapter) beside it; no pickles.

        state_dict: all weights, which Trainer gives where they are sharded (in process 0)."""
        if not self.args.should_save:
            return
        folder = Path(str(output_dir or self.args.output_dir))
        policy, head = self.model.policy, self.model.value_head.state_dict()
        weights = None
        if state_dict is not None:
            tied = {
                f"policy.{name}" for name in causal_lm(policy).all_tied_weights_keys or ()
            }  # copies of what they are tied to
            state_dict = {name: tensor for name, tensor in state_dict.items() if name not in tied}
            weights, head = within("policy.", state_dict), within("value_head.", state_dict)
        if isinstance(policy, PeftModel):
            lora.save(policy, str(self.policy_name), folder, self.processing_class, state_dict=weights)
            if self.model.value_adapter is not None:
                lora.save(policy, self.model.value_adapter, folder / VALUE_ADAPTER, state_dict=weights)
        else:
            save_checkpoint(policy, folder, self.processing_class, weights, self.saved_dtype)
        head = {name: tensor.detach().cpu() for name, tensor in head.items()}
        save_file(head, folder / VALUE_HEAD, metadata={"format": "pt"})

    def push_to_hub(self, *_: Any, **__: Any) -> Any:
        """Not in this version."""
        raise SalsaError(
            "push_to_hub: found a PPO trainer, which does not push yet; save_model(folder) and huggingface_hub's"
            " upload_folder(repo_id=…, folder_path=folder) put its policy on the Hub"
        )

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Not in this version."""
        raise SalsaError(
            "create_model_card: found a PPO trainer, which writes no card yet; write README.md beside the saved policy"
        )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As Trainer's; learning rates that were changed take the place of the checkpoint's."""
        with no_pickles(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            options = json.loads((Path(checkpoint) / checkpoints.STATE).read_bytes())["options"]
            take_rates(self.optimizer, self.lr_scheduler, options, self.args)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """As Trainer's."""
        with no_pickles(checkpoint):
            super()._load_rng_state(checkpoint)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """As Trainer's; where the weights are sharded without its second copy of them, frozen ones too, that nothing reads."""
        if self.is_deepspeed_enabled:
            sharding.engine_of(self.accelerator).save_checkpoint(output_dir, exclude_frozen_parameters=True)
        elif self.is_fsdp_enabled:
            plugin = self.accelerator.state.fsdp_plugin
            save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        else:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        assert self.lr_scheduler is not None
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        """As Trainer's. DeepSpeed's part of a checkpoint holds no frozen weights, and Trainer would ask for them."""
        if not self.is_deepspeed_enabled:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        engine = sharding.engine_of(self.accelerator)
        self.accelerator.deepspeed_engine_wrapped = sharding.DeferredStep(engine)
        if resume_from_checkpoint is not None:
            engine.load_checkpoint(resume_from_checkpoint, load_module_strict=False)
            self._load_optimizer_and_scheduler(resume_from_checkpoint)  # the scheduler: the optimizer has been loaded
        return prepared

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """The policy's weights, the value adapter's and the value head's, in place."""
        folder = Path(resume_from_checkpoint)
        policy = self.model.policy
        if isinstance(policy, PeftModel):
            lora.load(policy, str(self.policy_name), folder)
            if self.model.value_adapter is not None:
                lora.load(policy, self.model.value_adapter, folder / VALUE_ADAPTER)
        else:
            load_weights(policy, folder)
        sharding.load(self.model.value_head, read_tensors(folder / VALUE_HEAD))


def stored(tensor: Tensor) -> int:
    """Bytes of a tensor in a file; of one that stands for others (torchao's states of 8 bits) theirs."""
    if is_traceable_wrapper_subclass(tensor):
        return sum(stored(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.nbytes


@contextlib.contextmanager
def no_pickles(checkpoint: str | None) -> Iterator[None]:
    """Within the context torch's refusal to run what a pickle holds (Trainer loads with weights_only) is a SalsaError of one line."""
    try:
        yield
    except pickle.UnpicklingError as error:
        raise SalsaError(
            f"{checkpoint}: found a pickle that holds more than tensors and numbers (optimizer.pt, scheduler.pt or rng_state*.pth), expected"
            " the files that training wrote; it was not run, go on from another checkpoint"
        ) from error


def within(prefix: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a part of the model, by their names in it."""
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}


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
    code = [one.code for one in reward.components()]
    return {key: _plain(vars(args)[key]) for key in CHANGEABLE} | {"reward": code}


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
        own = {id(weight) for name in model.peft_config for weight in lora.parameters(model, name)}
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
    identified = [one.weights() for one in reward.components()]
    found["reward models"] = [digest(model) for model in identified if model is not None]
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
    layers = [layer for layer in lora.tuner_layers(model) if isinstance(layer, LoraLayer)]
    scaling = [layer.scaling[name] for layer in layers if name in layer.scaling]
    return digest([*lora.parameters(model, name), torch.tensor(scaling)])


def _plain(value: Any) -> Any:
    """As JSON gives it back: the value of an enum (transformers has strings as such)."""
    return str(value.value) if isinstance(value, Enum) else value
