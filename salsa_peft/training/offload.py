"""Where frozen models wait: on the device, or in the CPU's memory and on the device one at a time, while they score.

Left out: the policy, its gradients and its optimizer, which stay; what shares the policy's base (adapters), of which there is no second copy.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from salsa_peft.models.rewards.base import Reward
from salsa_peft.training.references import FrozenReference
from salsa_peft.utils.errors import require

if TYPE_CHECKING:
    from salsa_peft.training.ppo.config import SalsaPPOConfig

DeviceContext = Callable[[], AbstractContextManager[None]]
"""→ a context within which a model is on the device."""


class OffloadedModel:
    """A frozen model whose weights lie in the CPU's memory, pinned where there is CUDA, and on the device within `on`.

    The one copy is the CPU's: frozen weights need no way back, and what was on the device is let go. Raises SalsaError for a model with
    weights that train, and for one whose weights are no floating-point numbers (quantised ones carry a state that would stay behind).
    """

    def __init__(self, model: nn.Module) -> None:
        weights = list(model.parameters())
        require(
            all(weight.is_floating_point() and not weight.requires_grad for weight in weights),
            f"offload: found frozen with a {type(model).__name__} that trains or is quantised, expected frozen float weights; set none",
        )
        self.held: list[Tensor] = [*weights, *model.buffers()]
        self.home: list[Tensor] = []
        for tensor in self.held:  # one by one: two copies of one tensor at most
            tensor.data = _pinned(tensor.data)
            self.home.append(tensor.data)

    @contextlib.contextmanager
    def on(self, device: torch.device) -> Iterator[None]:
        """Within the context the model is on the device; afterwards it is back, on exceptions too."""
        try:
            for tensor, home in zip(self.held, self.home, strict=True):
                tensor.data = copied(home, device)
            yield
        finally:
            for tensor, home in zip(self.held, self.home, strict=True):
                tensor.data = home


def _pinned(tensor: Tensor) -> Tensor:
    tensor = tensor.cpu()
    return tensor.pin_memory() if torch.cuda.is_available() and not tensor.is_pinned() else tensor


def copied(home: Tensor, device: torch.device) -> Tensor:
    """Onto the device, behind what it is doing; on a CPU it is the tensor itself."""
    return home.to(device, non_blocking=True)


def place_models(references: Sequence[FrozenReference], reward: Reward, args: SalsaPPOConfig) -> list[DeviceContext]:
    """Put the references' own models, and classifiers in the reward, where `offload` says → one DeviceContext for each reference.

    Raises SalsaError for `offload: frozen` where all of them share the policy's base.
    """
    device: torch.device = args.device  # type: ignore[assignment]
    own = [reference.model for reference in references]
    if args.offload == "none":
        for model in own:
            if model is not None:
                model.to(device)  # type: ignore[arg-type]
        return [contextlib.nullcontext for _ in own]
    scoring = [(one, frozen) for one in reward.components() if (frozen := one.frozen_model()) is not None]
    require(
        bool(scoring) or any(model is not None for model in own),
        "offload: found frozen where references and reward are adapters on the policy's base, or functions, expected none: they hold no"
        " weights of their own to offload",
    )
    for one, frozen in scoring:
        one.on_device = _presence(frozen, device)
    return [contextlib.nullcontext if model is None else _presence(model, device) for model in own]


def _presence(model: nn.Module, device: torch.device) -> DeviceContext:
    parked = OffloadedModel(model)
    return lambda: parked.on(device)
