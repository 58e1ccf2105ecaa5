"""What of an adapter is no delta: modules_to_save, biases and saved embeddings of the base, rows of trained tokens.

    θ_soup = Σ_i w_i · θ_i, Σ w_i = 1

They are averaged as they are, one tensor in memory at a time for each member. With weights of another sum (a shrunk delta, a point of a
landscape) there is no such mean, and none is made up: the base's own values are not in the members.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import TYPE_CHECKING

import numpy as np

from . import float_arrays
from .adapter_tensors import PREFIX, TOKENS, Member
from .errors import require
from .float_arrays import Array

if TYPE_CHECKING:
    import torch


def check_sum(members: Sequence[Member], weights: Sequence[float]) -> None:
    """Refuse weights whose sum is not 1 where something is averaged directly."""
    first = next(iter(members[0].direct), None)
    require(
        first is None or abs(sum(weights) - 1) <= 1e-6,
        f"weights: {', '.join(f'{weight:g}' for weight in weights)} sum to {sum(weights):.9g}, expected 1: "
        f"{members[0].folder} holds {first}, which is averaged as it is, not as a delta",
    )


def dtype_of(members: Sequence[Member], name: str) -> str:
    """Safetensors' name of the dtype that holds every member's tensor exactly."""
    return float_arrays.promote(member.file.entries[member.direct[name]].dtype for member in members)


def mean(members: Sequence[Member], name: str, weights: Sequence[float]) -> Array:
    """Σ w_i x_i, Σ w_i = 1, in float32: x_p + Σ w_i (x_i − x_p), so that equal members give themselves to the bit."""
    pivot = int(np.argmax(np.abs(weights)))
    start = members[pivot].read(members[pivot].direct[name])
    total = start.astype(np.result_type(start, np.float32), copy=True)
    for i, member in enumerate(members):
        if i != pivot and weights[i]:
            total = total + (member.read(member.direct[name]) - start) * total.dtype.type(weights[i])
    return total


def as_tensor(values: Array, dtype: str) -> torch.Tensor:
    """float32 or float64 values → a tensor of that dtype (safetensors' name)."""
    import torch

    from .safetensors_files import NAMES

    return torch.from_numpy(values).to(getattr(torch, NAMES[dtype]))


def is_tokens(name: str) -> bool:
    """Whether it is rows of trained tokens, and not a whole tensor."""
    return name.endswith(TOKENS)


def saved_as(name: str, modules: Container[str]) -> str:
    """PEFT's name of it beside LoRA on those modules: a layer that has LoRA is the base_layer of PEFT's."""
    module, _, leaf = name.rpartition(".")
    return f"{PREFIX}{module}.base_layer.{leaf}" if module in modules else f"{PREFIX}{name}"
