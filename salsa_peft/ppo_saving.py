"""What the PPO trainer writes of its policy and reads back: an ordinary adapter or checkpoint, the value head, the optimizer; no pickles
of ours."""

from __future__ import annotations

import contextlib
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import save_fsdp_optimizer
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import Trainer
from transformers.trainer import SCHEDULER_NAME

from salsa_peft import checkpoints, ppo_setting
from salsa_peft.models import sharding
from salsa_peft.models.adapters import lora as adapters
from salsa_peft.models.base import causal_lm, load_weights, save_checkpoint
from salsa_peft.models.value_head import PolicyWithValueHead
from salsa_peft.ppo_config import SalsaPPOConfig
from salsa_peft.utils.errors import SalsaError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
            adapters.save(policy, str(self.policy_name), folder, self.processing_class, state_dict=weights)
            if self.model.value_adapter is not None:
                adapters.save(policy, self.model.value_adapter, folder / VALUE_ADAPTER, state_dict=weights)
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
            ppo_setting.take_rates(self.optimizer, self.lr_scheduler, options, self.args)

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
        self.accelerator.deepspeed_engine_wrapped = sharding.LateStep(engine)
        if resume_from_checkpoint is not None:
            engine.load_checkpoint(resume_from_checkpoint, load_module_strict=False)
            self._load_optimizer_and_scheduler(resume_from_checkpoint)  # the scheduler: the optimizer has been loaded
        return prepared

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """The policy's weights, the value adapter's and the value head's, in place."""
        folder = Path(resume_from_checkpoint)
        policy = self.model.policy
        if isinstance(policy, PeftModel):
            adapters.load(policy, str(self.policy_name), folder)
            if self.model.value_adapter is not None:
                adapters.load(policy, self.model.value_adapter, folder / VALUE_ADAPTER)
        else:
            load_weights(policy, folder)
        sharding.load(self.model.value_head, adapters.read_tensors(folder / VALUE_HEAD))


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
