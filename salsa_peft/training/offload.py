"""Offloading: frozen models stay in CPU memory and move to the device, one at a time, to score.

The policy, its gradients and optimizer states are not offloaded, nor are adapters, which share the policy's base.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from salsa_peft.models.rewards.base import Reward
from salsa_peft.training.references import FrozenReference
from salsa_peft.utils.errors import require

if TYPE_CHECKING:
    from salsa_peft.training.ppo.config import SalsaPPOConfig

DeviceContext = Callable[[], AbstractContextManager[None]]
"""Function that returns a context in which a model is on the device."""


class OffloadedModel:
    """A frozen model in CPU memory (pinned if CUDA is available). `on` copies it to the device.

    Frozen weights do not change, so the copy on the device is simply dropped. Raises SalsaError for trainable weights,
    and for quantised weights, whose quantisation state would not be moved.
    """

    def __init__(self, model: nn.Module) -> None:
        weights = list(model.parameters())
        require(
            all(weight.is_floating_point() and not weight.requires_grad for weight in weights),
            f"offload: the {type(model).__name__} is trainable or quantised and cannot be offloaded; set offload: none",
        )
        self.tensors: list[Tensor] = [*weights, *model.buffers()]
        self.cpu_data: list[Tensor] = []
        for tensor in self.tensors:  # one by one, so that at most one tensor is in memory twice
            tensor.data = _pinned(tensor.data)
            self.cpu_data.append(tensor.data)

    @contextlib.contextmanager
    def on(self, device: torch.device) -> Iterator[None]:
        """Context in which the model is on the device. On leaving it, the model is on the CPU again."""
        try:
            for tensor, data in zip(self.tensors, self.cpu_data, strict=True):
                tensor.data = copy_to(data, device)
            yield
        finally:
            for tensor, data in zip(self.tensors, self.cpu_data, strict=True):
                tensor.data = data


def _pinned(tensor: Tensor) -> Tensor:
    tensor = tensor.cpu()
    return tensor.pin_memory() if torch.cuda.is_available() and not tensor.is_pinned() else tensor


def copy_to(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy of the tensor on the device, made without waiting for the device's running computations."""
    return tensor.to(device, non_blocking=True)


def place_frozen_models(
    references: Sequence[FrozenReference], reward: Reward, args: SalsaPPOConfig
) -> list[DeviceContext]:
    """Offload the models of references and rewards (`offload: frozen`), or move them to the device.

    Returns a DeviceContext for each reference. Raises SalsaError if `offload: frozen` has no such model.
    """
    device: torch.device = args.device  # type: ignore[assignment]
    models = [reference.model for reference in references]
    if args.offload == "none":
        for model in models:
            if model is not None:
                model.to(device)  # type: ignore[arg-type]
        return [contextlib.nullcontext for _ in models]
    scoring = [(one, frozen) for one in reward.components() if (frozen := one.frozen_model()) is not None]
    require(
        bool(scoring) or any(model is not None for model in models),
        "offload: frozen has nothing to offload, since each reference and reward is a function, an adapter on the"
        " policy's base, or that base. Set offload: none",
    )
    for one, frozen in scoring:
        one.on_device = partial(OffloadedModel(frozen).on, device)
    return [contextlib.nullcontext if model is None else partial(OffloadedModel(model).on, device) for model in models]
