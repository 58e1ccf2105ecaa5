"""Gathering, saving and loading weights that FSDP2 or DeepSpeed ZeRO-3 shards.

Trainer and accelerate shard the policy, its value head and the optimizer. References and classifiers with full weights
are not sharded: every process holds a copy of each. ZeRO 1 and 2, and ZeRO's and FSDP's offloading, are unsupported.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DistributedType, save_fsdp_optimizer
from accelerate.utils.deepspeed import DeepSpeedEngineWrapper
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.trainer import SCHEDULER_NAME

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import Trainer


def engine_of(accelerator: Accelerator) -> Any:
    """The DeepSpeed engine that wraps the policy during training; None without DeepSpeed."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED or accelerator.deepspeed_engine_wrapped is None:
        return None
    return accelerator.deepspeed_engine_wrapped.engine


@contextlib.contextmanager
def gathered(model: nn.Module, accelerator: Accelerator) -> Iterator[None]:
    """Context in which every process holds all weights, so that forwards need no communication.

    Gathering all weights once is faster than gathering each layer for each token, but needs the memory of the whole
    model. A model that is not sharded is left unchanged.
    """
    engine = engine_of(accelerator)
    if engine is not None:
        from deepspeed.runtime.zero import unwrap_model_for_generation

        with unwrap_model_for_generation(engine):
            yield
        return
    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if parts:  # without this, FSDP treats the first module that runs as the root, and that may be a layer
        parts[0]._get_fsdp_state()._lazy_init()
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
        for layer in parts[1:]:
            layer.set_reshard_after_forward(accelerator.state.fsdp_plugin.reshard_after_forward, recurse=False)


def gather_weights(module: nn.Module, accelerator: Accelerator) -> None:
    """Gather ZeRO-3 weights that are read outside their module's forward, until the next optimizer step.

    Tied weights stay gathered only until the next forward. All processes must call this function.
    """
    if engine_of(accelerator) is None:
        return
    from deepspeed.runtime.zero.utils import is_zero_param

    for parameter in filter(is_zero_param, module.parameters()):  # the model of a reference is not sharded
        parameter.all_gather()


class DeferredStep(DeepSpeedEngineWrapper):
    """Wrapper of the DeepSpeed engine, as accelerate's, but its backward takes no optimizer step.

    PPO checks gradients and ratios after backward; `before_step` then takes the step.
    """

    def backward(self, loss: Tensor, sync_gradients: bool = True, **options: Any) -> None:
        """Compute and accumulate gradients, without an optimizer step."""
        self.engine.set_gradient_accumulation_boundary(is_boundary=sync_gradients)
        self.engine.backward(loss, **options)

    def get_global_grad_norm(self) -> float:
        """The norm of the current gradients. DeepSpeed's method returns the norm of the last step, or -1."""
        from deepspeed.utils import safe_get_local_grad

        trained = [parameter for parameter in self.engine.module.parameters() if parameter.requires_grad]
        squares = torch.stack([safe_get_local_grad(parameter).square().sum() for parameter in trained]).sum()
        torch.distributed.all_reduce(squares)
        return float(squares.sqrt())


def before_step(model: nn.Module, accelerator: Accelerator, *, drop: bool) -> None:
    """Prepare the optimizer step that Trainer takes next.

    drop: whether to remove the gradients, so that the step changes no weight. Under DeepSpeed Trainer's step does
    nothing, so this function takes the step itself unless `drop`.
    """
    engine = engine_of(accelerator)
    if engine is not None and not drop:
        engine.step()
    elif drop:
        (model if engine is None else engine.optimizer).zero_grad(set_to_none=True)


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of one that FSDP2 shards; any other tensor itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sharded_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Shard a full tensor in the same way as `like`. Returns `tensor` itself if `like` is not sharded."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)


def full_state_dict(trainer: Trainer) -> dict[str, Tensor] | None:
    """The gathered weights of a Trainer's sharded model; None if the model is not sharded.

    All processes must call this function, but only the first process gets the weights.
    """
    if trainer.accelerator.distributed_type not in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        return None
    return trainer.accelerator.get_state_dict(trainer.model_wrapped)


def load(module: nn.Module, tensors: Mapping[str, Tensor], *, strict: bool = True) -> Any:
    """Load full tensors into a module. Each is first sharded like the module's tensor of the same name."""
    held = module.state_dict()
    cut = {name: sharded_like(tensor, held[name]) if name in held else tensor for name, tensor in tensors.items()}
    return module.load_state_dict(cut, strict=strict)


def save_optimizer_and_scheduler(trainer: Any, folder: str) -> None:
    """Save the optimizer's shards under FSDP or DeepSpeed, and the schedule, in Trainer's files.

    Trainer's own method would also save all weights, which the checkpoint has already.
    """
    accelerator = trainer.accelerator
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        engine_of(accelerator).save_checkpoint(folder, exclude_frozen_parameters=True)
    else:
        save_fsdp_optimizer(accelerator.state.fsdp_plugin, accelerator, trainer.optimizer, trainer.model, folder)
    if trainer.args.should_save:
        torch.save(trainer.lr_scheduler.state_dict(), Path(folder) / SCHEDULER_NAME)
