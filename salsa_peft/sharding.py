"""Weights sharded over processes by FSDP2: whole while a rollout is made, cut again where a checkpoint is loaded.

Elsewhere the engine does not know of it: Trainer and accelerate shard the policy with its value head, the optimizer follows. Left
out: models of their own (references and classifiers of full weights), which stay whole in every process.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor

from .config import require

if TYPE_CHECKING:
    from accelerate import Accelerator

    from .ppo_config import SalsaPPOConfig

ROOM = "use recipes/accelerate/ddp.yaml, or fsdp2.yaml where the model is too large for one GPU"


def check(accelerator: Accelerator, args: SalsaPPOConfig) -> None:
    """Raise SalsaError for a way of sharding that the engine does not run under. FSDP2 then adds up gradients and gives values in
    float32, also with bf16, where accelerate has both in bf16."""
    kind = accelerator.distributed_type
    require(kind != DistributedType.DEEPSPEED, f"accelerate: found DeepSpeed, which PPO does not run under; {ROOM}")
    if kind != DistributedType.FSDP:
        return
    plugin: Any = accelerator.state.fsdp_plugin
    require(plugin.fsdp_version == 2, f"fsdp_version: found {plugin.fsdp_version}, expected 2; {ROOM}")
    whole = plugin.state_dict_type.name
    require(
        whole == "FULL_STATE_DICT",
        f"fsdp_state_dict_type: found {whole}, expected FULL_STATE_DICT, which a checkpoint is saved from",
    )
    for key in ("cpu_ram_efficient_loading", "activation_checkpointing"):
        instead = " (set gradient_checkpointing in SalsaPPOConfig)" if key == "activation_checkpointing" else ""
        require(not vars(plugin)[key], f"fsdp_{key}: found true, expected false{instead}")
    require(
        args.rollout_backend == "hf" and not args.rollout_compile,
        f"rollout_backend: found {args.rollout_backend}{', compiled,' if args.rollout_compile else ''} with FSDP2, expected hf,"
        " not compiled",
    )
    if plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=plugin.mixed_precision_policy.param_dtype, reduce_dtype=torch.float32
        )


@contextlib.contextmanager
def gathered(model: nn.Module, accelerator: Accelerator) -> Iterator[None]:
    """Within the context every process holds the whole model, and no forward waits for another process: each may make as many as
    its rows need. One gathering instead of one for each layer and token, at the price of the weights' memory; nothing where nothing is sharded.
    """
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


def placed(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor as `like` is held: this process's piece of it where that is sharded."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)


def load(module: nn.Module, tensors: Mapping[str, Tensor], *, strict: bool = True) -> Any:
    """Module.load_state_dict of whole tensors, each cut as the module holds it."""
    held = module.state_dict()
    cut = {name: placed(tensor, held[name]) if name in held else tensor for name, tensor in tensors.items()}
    return module.load_state_dict(cut, strict=strict)
