"""A model whose weights are a point between members: moved in place, and asked for the slope of a loss along each member.

Of adapters the point is n scalars on the blocks of one stacked adapter, and nothing is re-made. Of checkpoints every weight
is read again from the members' files, one tensor at a time. What greedy and learned soups and landscapes stand on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch

from salsa_peft.models.adapters import lora
from salsa_peft.soup.lora.live_factors import live_factors
from salsa_peft.utils.errors import require

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from salsa_peft.soup.checkpoints.read import Checkpoint
    from salsa_peft.soup.lora.stacked_adapter import StackedAdapter


class LiveSoup(Protocol):
    """A model that can be set to any point between n members."""

    model: Any

    def set(self, weights: Sequence[float]) -> None:
        """Move the model's weights to Σ w_i θ_i (adapters: base + Σ w_i δ_i)."""

    def at_point(self) -> contextlib.AbstractContextManager[None]:
        """Within it a forward is that of the point."""

    def differentiable(self) -> contextlib.AbstractContextManager[None]:
        """Within it a backward leaves what `slopes` reads."""

    def slopes(self) -> list[float]:
        """∂ loss / ∂ w_i of the backward that was made last."""


class LiveAdapters:
    """Adapters as one stacked adapter `name` on a model that shares its base with other roles."""

    def __init__(self, model: PeftModel, stacked: StackedAdapter, name: str = "point") -> None:
        self.model, self.stacked, self.name = model, stacked, lora.unused_name(model, name)
        n = len(stacked.members)
        stacked.attach(model, self.name, [1 / n] * n)

    def set(self, weights: Sequence[float]) -> None:
        """n scalars on the blocks of B."""
        self.stacked.set_weights(self.model, self.name, weights)

    def at_point(self) -> contextlib.AbstractContextManager[None]:
        """The stacked adapter is active; the one that was before is again afterwards."""
        return lora.active(self.model, self.name)

    def _live(self) -> list[tuple[str, torch.Tensor, torch.Tensor | None]]:
        """Each module with its live B (out, R; of a convolution with its kernel's ones) and B's bias."""
        stacks = self.stacked.stacks
        return [(name, *live_factors(self.model, stacks, name, self.name)[1:]) for name in stacks]

    @contextlib.contextmanager
    def differentiable(self) -> Iterator[None]:
        """Every B, and its bias, requires a gradient; nothing else of the model changes."""
        live = [weight for _, *weights in self._live() for weight in weights if weight is not None]
        for weight in live:
            weight.requires_grad_(True)
        try:
            yield
        finally:
            for weight in live:
                weight.requires_grad_(False)
                weight.grad = None

    def slopes(self) -> list[float]:
        """B's column of member i is w_i · scaling_i · B_i, so ∂/∂w_i = Σ ∂/∂B ∘ (scaling_i · B_i) over its columns."""
        found = torch.zeros(len(self.stacked.members), dtype=torch.float64)
        stacks = self.stacked.stacks
        for name, B, bias in self._live():
            stack = stacks[name]
            if B.grad is not None:
                grad = stacks.shapes[name].blocks_B(B.grad.cpu().double())
                columns = (grad * stack.B.double()).flatten(0, -2).sum(0) * stack.scaling
                found.index_add_(0, stack.member, columns)
            if bias is not None and bias.grad is not None and stack.bias is not None:
                found += stack.bias @ bias.grad.cpu().double()
        return found.tolist()


class LiveCheckpoints:
    """Whole checkpoints in one model's weights: `model` is member 0, or any model of its architecture."""

    def __init__(self, model: PreTrainedModel, members: Sequence[Checkpoint]) -> None:
        from salsa_peft.soup.checkpoints.model_tensors import ModelTensors
        from salsa_peft.utils.tensor_names import ModelNames

        self.model, self.parameters = model, dict(model.named_parameters())
        names = ModelNames(model)
        self.members = [ModelTensors.of(member, names) for member in members]
        for member in self.members:
            folder = member.checkpoint.folder
            missing = next((name for name in self.parameters if name not in member.parts), None)
            require(
                missing is None,
                f"{folder}: found no tensor {missing}, which the model ({names}) has; take a checkpoint of the model's architecture",
            )
            own = next(iter(member.untied), None)
            require(
                own is None,
                f"{folder}: {own} has values of its own, but the model's output embeddings are tied to its input embeddings; load the"
                " model with tie_word_embeddings false",
            )

    @torch.no_grad()
    def set(self, weights: Sequence[float]) -> None:
        """Every tensor is the weighted mean, added up in float32 and rounded once to the model's dtype."""
        for name, parameter in self.parameters.items():
            total = torch.zeros(parameter.shape, device=parameter.device)
            for member, weight in zip(self.members, weights, strict=True):
                if weight:
                    total.add_(member.read(name).to(parameter.device).float(), alpha=weight)
            parameter.copy_(total)

    def at_point(self) -> contextlib.AbstractContextManager[None]:
        """The model itself."""
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def differentiable(self) -> Iterator[None]:
        """Every weight requires a gradient, as in full fine-tuning: memory for one more copy."""
        before = [(parameter, parameter.requires_grad) for parameter in self.parameters.values()]
        for parameter, _ in before:
            parameter.requires_grad_(True)
        try:
            yield
        finally:
            for parameter, required in before:
                parameter.requires_grad_(required)
                parameter.grad = None

    def slopes(self) -> list[float]:
        """∂/∂w_i = ⟨∂/∂θ, θ_i⟩, all tensors as one vector."""
        found = [0.0] * len(self.members)
        for name, parameter in self.parameters.items():
            if parameter.grad is not None:
                gradient = parameter.grad.double().cpu().flatten()
                for i, member in enumerate(self.members):
                    found[i] += float(gradient @ member.read(name).double().flatten())
        return found
