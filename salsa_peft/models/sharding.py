"""Weights sharded over processes by FSDP2 or DeepSpeed's ZeRO-3: whole while a rollout is made, cut again where a checkpoint is loaded.

Elsewhere the engine does not know of it: Trainer and accelerate shard the policy with its value head, the optimizer follows. Left
out: models of their own (references and classifiers of full weights), which stay whole in every process; ZeRO 1 and 2, and offloading.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DistributedType
from accelerate.utils.deepspeed import DeepSpeedEngineWrapper
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import Trainer


def engine_of(accelerator: Accelerator) -> Any:
    """DeepSpeed's engine, which holds the policy while it is trained; None where there is none."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED or accelerator.deepspeed_engine_wrapped is None:
        return None
    return accelerator.deepspeed_engine_wrapped.engine


@contextlib.contextmanager
def gathered(model: nn.Module, accelerator: Accelerator) -> Iterator[None]:
    """Within the context every process holds the whole model, and no forward waits for another process: each may make as many as
    its rows need. One gathering instead of one for each layer and token, at the price of the weights' memory; nothing where nothing is sharded.
    """
    engine = engine_of(accelerator)
    if engine is not None:
        from deepspeed.runtime.zero import unwrap_model_for_generation

        with unwrap_model_for_generation(engine):
            yield
        return
    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if not parts:
        yield
        return
    root, layers = parts[0], parts[1:]
    root._get_fsdp_state()._lazy_init()  # the module that runs first becomes the root, and here that may be a layer
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
        for layer in layers:
            layer.set_reshard_after_forward(accelerator.state.fsdp_plugin.reshard_after_forward, recurse=False)


def gather_weights(module: nn.Module, accelerator: Accelerator) -> None:
    """Under ZeRO-3: weights that are read outside of their module's forward are whole from now to the next optimizer step (tied ones to
    the next forward). Called in all processes alike."""
    if engine_of(accelerator) is None:
        return
    from deepspeed.runtime.zero.utils import is_zero_param

    for parameter in filter(is_zero_param, module.parameters()):  # a reference's own model has none
        parameter.all_gather()


class DeferredStep(DeepSpeedEngineWrapper):
    """accelerate's takes the optimizer's step at the end of a backward, before anyone has looked at gradients and ratios; under this one
    `before_step` does."""

    def backward(self, loss: Tensor, sync_gradients: bool = True, **options: Any) -> None:
        """Only adds up gradients."""
        self.engine.set_gradient_accumulation_boundary(is_boundary=sync_gradients)
        self.engine.backward(loss, **options)

    def get_global_grad_norm(self) -> float:
        """Of the gradients at hand. (DeepSpeed's is the last step's, and -1 where it is not finite.)"""
        from deepspeed.utils import safe_get_local_grad

        trained = [parameter for parameter in self.engine.module.parameters() if parameter.requires_grad]
        squares = torch.stack([safe_get_local_grad(parameter).square().sum() for parameter in trained]).sum()
        torch.distributed.all_reduce(squares)
        return float(squares.sqrt())


def before_step(model: nn.Module, accelerator: Accelerator, *, drop: bool) -> None:
    """Called before Trainer calls the optimizer's step, which leaves out parameters without a gradient, and is an empty one under
    DeepSpeed: there it is taken here. drop: forget the gradients."""
    engine = engine_of(accelerator)
    if engine is not None and not drop:
        engine.step()
    elif drop:
        (model if engine is None else engine.optimizer).zero_grad(set_to_none=True)


def sharded_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor as `like` is held: this process's piece of it where that is sharded."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)


def full_state_dict(trainer: Trainer) -> dict[str, Tensor] | None:
    """All weights of what a Trainer trains, in the first process, where they are sharded; None where each process holds them whole.
    Called in all processes alike."""
    if trainer.accelerator.distributed_type not in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        return None
    return trainer.accelerator.get_state_dict(trainer.model_wrapped)


def load(module: nn.Module, tensors: Mapping[str, Tensor], *, strict: bool = True) -> Any:
    """Module.load_state_dict of whole tensors, each cut as the module holds it."""
    held = module.state_dict()
    cut = {name: sharded_like(tensor, held[name]) if name in held else tensor for name, tensor in tensors.items()}
    return module.load_state_dict(cut, strict=strict)
