"""What of an adapter is no delta: modules_to_save, biases and saved embeddings of the base, rows of trained tokens.

    θ_soup = Σ_i w_i · θ_i, Σ w_i = 1

They are averaged as they are, one tensor in memory at a time for each member. With weights of another sum (a shrunk delta, a point of a
landscape) there is no such mean, and none is made up: the base's own values are not in the members.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from salsa_peft.models.adapters.names import PREFIX
from salsa_peft.soup import arrays
from salsa_peft.soup.arrays import Array
from salsa_peft.soup.lora.read import CONFIG, MERGES
from salsa_peft.soup.lora.tensors import TOKENS, Member
from salsa_peft.utils.errors import SalsaError, require

if TYPE_CHECKING:
    import torch


def names(members: Sequence[Member]) -> list[str]:
    """Of everything in a soup that is no delta, under the base's names (of trained tokens with TOKENS behind the embedding's)."""
    return sorted({name for member in members for name in member.direct})


def holders(members: Sequence[Member], name: str) -> list[Member]:
    """The members that have it: all of them, unless it is frozen."""
    return [member for member in members if name in member.direct]


def check_same(members: Sequence[Member]) -> None:
    """Refuse full values that only some members have: what the others have there is the base's, which a soup does not read.

    Weights that PEFT saves with a layer that has LoRA are the base's own, so that they need not be in every file.
    """
    for name in names(members):
        have = holders(members, name)
        lacks = next((member for member in members if name not in member.direct), None)
        for member in have[1:]:
            check_tokens(have[0], member, name)
            shapes = [list(m.file.entries[m.direct[name]].shape) for m in (member, have[0])]
            require(
                shapes[0] == shapes[1],
                f"{member.file.path}: {name} has shape {shapes[0]}, in {have[0].folder} {shapes[1]}: the bases differ, at least in their "
                "vocabulary; a soup needs members of one base",
            )
        if lacks is not None and not frozen(members, name):
            raise SalsaError(
                f"{lacks.file.path}: found no {name}, which {have[0].folder} has: what is trained in full is averaged as it is, so that every "
                f"member must have it; train them with the same modules_to_save, bias and trained tokens, or with the base at hand: {MERGES}"
            )


def check_tokens(head: Member, member: Member, name: str) -> None:
    """Refuse rows of trained tokens that are not of the same tokens; their order may be another."""
    if is_tokens(name):
        require(
            sorted(member.token_indices(name)) == sorted(head.token_indices(name)),
            f"{member.folder / CONFIG}: trainable_token_indices of {name.removesuffix(TOKENS)} are not those of {head.folder}: the rows of the "
            f"others are the base's, which a soup does not read; train the same tokens, or with the base at hand: {MERGES}",
        )


def frozen(members: Sequence[Member], name: str) -> bool:
    """Whether it is the base's own value in every member that has it, to the bit the same."""
    have = holders(members, name)
    if not all(name in member.frozen for member in have):
        return False
    first = have[0].read(have[0].direct[name]) if have[1:] else None
    return all(np.array_equal(first, member.read(member.direct[name])) for member in have[1:])  # type: ignore[arg-type]


def check_sum(members: Sequence[Member], weights: Sequence[float]) -> None:
    """Refuse weights whose sum is not 1 where something is averaged directly."""
    if abs(sum(weights) - 1) <= 1e-6:
        return
    for name in names(members):
        require(
            frozen(members, name),
            f"weights: {', '.join(f'{weight:g}' for weight in weights)} sum to {sum(weights):.9g}, expected 1: "
            f"{holders(members, name)[0].folder} holds {name}, which is averaged as it is, not as a delta",
        )


def dtype_of(members: Sequence[Member], name: str) -> str:
    """Safetensors' name of the dtype that holds every member's tensor exactly."""
    return arrays.promote(member.file.entries[member.direct[name]].dtype for member in holders(members, name))


def mean(members: Sequence[Member], name: str, weights: Sequence[float]) -> Array:
    """Σ w_i x_i, Σ w_i = 1, in float32: x_p + Σ w_i (x_i − x_p), so that equal members give themselves to the bit."""
    have = [i for i, member in enumerate(members) if name in member.direct]
    pivot = max(have, key=lambda i: abs(weights[i]))
    start = values(members, pivot, name)
    total = start.astype(np.result_type(start, np.float32), copy=True)
    if len(have) < len(members) or abs(sum(weights) - 1) > 1e-6:
        return total  # the base's own, checked by check_same and check_sum
    for i in have:
        if i != pivot and weights[i]:
            total = total + (values(members, i, name) - start) * total.dtype.type(weights[i])
    return total


def values(members: Sequence[Member], i: int, name: str) -> Array:
    """What member i has there; rows of trained tokens in the first member's order."""
    found = members[i].read(members[i].direct[name])
    if not is_tokens(name) or i == 0:
        return found
    mine = members[i].token_indices(name)
    return found[[mine.index(token) for token in members[0].token_indices(name)]]


def as_tensor(values: Array, dtype: str) -> torch.Tensor:
    """float32 or float64 values → a tensor of that dtype (safetensors' name)."""
    import torch

    from salsa_peft.utils.safetensors_io import NAMES

    return torch.from_numpy(values).to(getattr(torch, NAMES[dtype]))


def is_tokens(name: str) -> bool:
    """Whether it is rows of trained tokens, and not a whole tensor."""
    return name.endswith(TOKENS)


def saved_as(name: str, wrappers: Mapping[str, int]) -> str:
    """PEFT's name of it beside LoRA. wrappers: module with LoRA → how many of PEFT's wrappers are around it."""
    return PREFIX + wrapped(name, wrappers)


def wrapped(name: str, wrappers: Mapping[str, int]) -> str:
    """A parameter's or module's name in a model where PEFT's wrappers are around some of the modules that it lies in."""
    parts = name.split(".")
    found: list[str] = []
    for i, part in enumerate(parts):
        found.append(part)
        if i < len(parts) - 1:
            found += ["base_layer"] * wrappers.get(".".join(parts[: i + 1]), 0)
    return ".".join(found)
