"""Models that can be set to any weighted mean of a soup's members, with derivatives by the weights.

Adapters are the blocks of one stacked adapter; each member's weight scales its block. For checkpoints, every parameter
is computed again from the members' files, one tensor at a time. Greedy and learned soups and landscapes use them.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from salsa_peft.models import precision
from salsa_peft.models.adapters import lora
from salsa_peft.soup.lora.stacked_adapter import StackedAdapter, live_factors
from salsa_peft.utils.errors import require

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from salsa_peft.soup.checkpoints.read import Checkpoint


@contextlib.contextmanager
def _with_gradients(parameters: Sequence[torch.Tensor]) -> Iterator[None]:
    """Context in which the given parameters require a gradient. Afterwards the gradients are dropped."""
    before = [parameter.requires_grad for parameter in parameters]
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, required in zip(parameters, before, strict=True):
            parameter.requires_grad_(required)
            parameter.grad = None


class LiveAdapters:
    """Adapters that are attached to a model as one stacked adapter. The model may have other adapters too."""

    def __init__(self, model: PeftModel, stacked: StackedAdapter, name: str = "point") -> None:
        self.model, self.stacked, self.name = model, stacked, lora.unused_name(model, name)
        n = len(stacked.members)
        stacked.attach(model, self.name, [1 / n] * n)

    def set(self, weights: Sequence[float]) -> None:
        """Set the model to base + Σ w_i δ_i by rescaling the blocks of B."""
        self.stacked.set_weights(self.model, self.name, weights)

    @contextlib.contextmanager
    def at_point(self) -> Iterator[None]:
        """Context for forwards with the stacked adapter; afterwards the previous adapter is active again."""
        with lora.active(self.model, self.name), precision.autocast(self.model):
            yield

    def _live(self) -> list[tuple[str, torch.Tensor, torch.Tensor | None]]:
        """Each module's name, its B in the model ((out, R), in convolutions (out, R, 1, …)) and its bias."""
        stacks = self.stacked.stacks
        return [(name, *live_factors(self.model, stacks, name, self.name)[1:]) for name in stacks]

    def differentiable(self) -> contextlib.AbstractContextManager[None]:
        """Context in which every B, and its bias if it has one, requires the gradient that `slopes` reads."""
        return _with_gradients([weight for _, *weights in self._live() for weight in weights if weight is not None])

    def slopes(self) -> list[float]:
        """The measure's derivative by each weight w_i, from the gradients of the measure's backward pass.

        Each module adds the sum of B.grad ∘ (scaling_i · B_i) over member i's columns, plus bias_i · bias.grad.
        """
        found = torch.zeros(len(self.stacked.members), dtype=torch.float64)
        stacks = self.stacked.stacks
        for name, B, bias in self._live():
            stack = stacks[name]
            if B.grad is not None:
                grad = stacks.shapes[name].blocks_B(B.grad.cpu().double())
                columns = (grad * torch.from_numpy(stack.B).double()).flatten(0, -2).sum(0)
                found.index_add_(0, torch.from_numpy(stack.member), columns * torch.from_numpy(stack.scaling))
            if bias is not None and bias.grad is not None and stack.bias is not None:
                found += torch.from_numpy(stack.bias) @ bias.grad.cpu().double()
        return found.tolist()


class LiveCheckpoints:
    """Full checkpoints whose weighted mean is set as the parameters of one model of their architecture."""

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
                f"{folder} has no tensor {missing}, which the model ({names}) needs; use a checkpoint of the model's"
                " architecture",
            )
            own = next(iter(member.untied), None)
            require(
                own is None,
                f"{folder}: {own} has values of its own, but the model's output embeddings are tied to its input"
                " embeddings; load the model with tie_word_embeddings false",
            )

    @torch.no_grad()
    def set(self, weights: Sequence[float]) -> None:
        """Set every parameter to the members' weighted mean, summed in float32 and rounded once."""
        for name, parameter in self.parameters.items():
            parameter.copy_(self._weighted_sum(name, parameter, weights))

    @torch.no_grad()
    def norm(self, weights: Sequence[float]) -> float:
        """‖Σ w_i θ_i‖ over all parameters, such as the distance of two members with the weights 1 and −1."""
        sums = (self._weighted_sum(name, parameter, weights) for name, parameter in self.parameters.items())
        return math.sqrt(sum(float(total.double().square().sum()) for total in sums))

    def _weighted_sum(self, name: str, parameter: torch.Tensor, weights: Sequence[float]) -> torch.Tensor:
        """Σ w_i θ_i of one parameter, in float32."""
        total = torch.zeros(parameter.shape, device=parameter.device)
        for member, weight in zip(self.members, weights, strict=True):
            if weight:
                total.add_(member.read(name).to(parameter.device).float(), alpha=weight)
        return total

    def at_point(self) -> contextlib.AbstractContextManager[None]:
        """Context that does nothing, because the mean is in the model's own parameters."""
        return contextlib.nullcontext()

    def differentiable(self) -> contextlib.AbstractContextManager[None]:
        """Context in which every parameter requires a gradient, which takes the memory of one more model."""
        return _with_gradients(list(self.parameters.values()))

    def slopes(self) -> list[float]:
        """The measure's derivative by each weight w_i: ⟨θ.grad, θ_i⟩ after the measure's backward pass."""
        found = [0.0] * len(self.members)
        for name, parameter in self.parameters.items():
            if parameter.grad is not None:
                gradient = parameter.grad.double().cpu().flatten()
                for i, member in enumerate(self.members):
                    found[i] += float(gradient @ member.read(name).double().flatten())
        return found


LiveSoup = LiveAdapters | LiveCheckpoints
"""A model that can be set to any weighted mean of n members."""
