"""Weights sharded by FSDP2 or DeepSpeed ZeRO-3: gathering them for rollouts, saving and loading.

Trainer and accelerate shard the policy with its value head, and the optimizer. Not sharded: references and classifiers
of full weights, which every process holds whole. Not supported: ZeRO 1 and 2, and offloading.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DistributedType, save_fsdp_optimizer
from accelerate.utils.deepspeed import DeepSpeedEngineWrapper
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import Trainer


def engine_of(accelerator: Accelerator) -> Any:
    """DeepSpeed's engine, which holds the policy during training; None without DeepSpeed."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED or accelerator.deepspeed_engine_wrapped is None:
        return None
    return accelerator.deepspeed_engine_wrapped.engine


@contextlib.contextmanager
def gathered(model: nn.Module, accelerator: Accelerator) -> Iterator[None]:
    """Context in which the weights are gathered, so that no process waits for another in a forward.

    They are gathered once, instead of for each layer and token, which needs memory for all of them. No effect on a
    model that is not sharded.
    """
    engine = engine_of(accelerator)
    if engine is not None:
        from deepspeed.runtime.zero import unwrap_model_for_generation

        with unwrap_model_for_generation(engine):
            yield
        return
    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if parts:  # or the first module that runs becomes the root, and here that may be a layer
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
    """Gather ZeRO-3 weights that are read outside of their module's forward, until the next optimizer step.

    Tied weights stay gathered until the next forward only. All processes must call it.
    """
    if engine_of(accelerator) is None:
        return
    from deepspeed.runtime.zero.utils import is_zero_param

    for parameter in filter(is_zero_param, module.parameters()):  # a reference's own model is not sharded
        parameter.all_gather()


class DeferredStep(DeepSpeedEngineWrapper):
    """accelerate's wrapper of the engine without an optimizer step in backward; `before_step` takes it.

    Between the two, gradients and ratios are checked.
    """

    def backward(self, loss: Tensor, sync_gradients: bool = True, **options: Any) -> None:
        """Accumulate gradients only."""
        self.engine.set_gradient_accumulation_boundary(is_boundary=sync_gradients)
        self.engine.backward(loss, **options)

    def get_global_grad_norm(self) -> float:
        """The norm of the present gradients; DeepSpeed's is that of the last step, -1 if not finite."""
        from deepspeed.utils import safe_get_local_grad

        trained = [parameter for parameter in self.engine.module.parameters() if parameter.requires_grad]
        squares = torch.stack([safe_get_local_grad(parameter).square().sum() for parameter in trained]).sum()
        torch.distributed.all_reduce(squares)
        return float(squares.sqrt())


def before_step(model: nn.Module, accelerator: Accelerator, *, drop: bool) -> None:
    """Prepare Trainer's optimizer step, which is to be called next; with `drop` that step changes nothing.

    drop: the gradients are removed, and the optimizer skips parameters without one. Under DeepSpeed the step is taken
    here, because Trainer's does nothing.
    """
    engine = engine_of(accelerator)
    if engine is not None and not drop:
        engine.step()
    elif drop:
        (model if engine is None else engine.optimizer).zero_grad(set_to_none=True)


def sharded_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, or this process's shard of it if `like` is sharded."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)


def full_state_dict(trainer: Trainer) -> dict[str, Tensor] | None:
    """The gathered weights of a Trainer's sharded model, in the first process; None if it is not sharded.

    All processes must call it.
    """
    if trainer.accelerator.distributed_type not in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        return None
    return trainer.accelerator.get_state_dict(trainer.model_wrapped)


def load(module: nn.Module, tensors: Mapping[str, Tensor], *, strict: bool = True) -> Any:
    """Module.load_state_dict with whole tensors, each sharded as the module's own."""
    held = module.state_dict()
    cut = {name: sharded_like(tensor, held[name]) if name in held else tensor for name, tensor in tensors.items()}
    return module.load_state_dict(cut, strict=strict)


def save_sharded_optimizer(accelerator: Accelerator, optimizer: Any, model: Any, folder: str) -> None:
    """Save the optimizer's shards under FSDP or DeepSpeed.

    Trainer would save all weights with them, a second time.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        engine_of(accelerator).save_checkpoint(folder, exclude_frozen_parameters=True)
    else:
        save_fsdp_optimizer(accelerator.state.fsdp_plugin, accelerator, optimizer, model, folder)
