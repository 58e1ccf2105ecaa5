"""Parameters besides LoRA factors: modules_to_save, biases, saved embeddings, rows of trained tokens.

    θ_soup = Σ_i w_i · θ_i, Σ w_i = 1

They are averaged directly, with one tensor per member in memory at a time. If the weights have another sum (a shrunk
delta, a point of a landscape), this mean does not exist, because the members do not hold the base's own values; such
weights are rejected.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from salsa_peft.soup.arrays import Array
from salsa_peft.soup.lora.read import CONFIG, MERGES
from salsa_peft.soup.lora.tensors import TOKENS, Member
from salsa_peft.utils.errors import SalsaError, require


def parameter_names(members: Sequence[Member]) -> list[str]:
    """The base's names of all such parameters (for trained tokens, the embedding's name + TOKENS)."""
    return sorted({name for member in members for name in member.direct})


def holders(members: Sequence[Member], name: str) -> list[Member]:
    """The members that hold a parameter: all of them, unless it is frozen."""
    return [member for member in members if name in member.direct]


def check_same(members: Sequence[Member]) -> None:
    """Raise SalsaError if only some members hold a trained parameter, or if they hold it in other shapes.

    Untrained weights that PEFT saves with a layer that has LoRA may be missing in some files.
    """
    for name in parameter_names(members):
        have = holders(members, name)
        for member in have[1:]:
            check_tokens(have[0], member, name)
            shapes = [list(m.file.entries[m.direct[name]].shape) for m in (member, have[0])]
            require(
                shapes[0] == shapes[1],
                f"{member.file.path}: {name} has shape {shapes[0]}, but {shapes[1]} in {have[0].folder}: the bases"
                " differ, at least in their vocabulary; a soup needs members of one base",
            )
        lacks = next((member for member in members if name not in member.direct), None)
        if lacks is not None and not frozen(members, name):
            raise SalsaError(
                f"{lacks.file.path} has no {name}, but {have[0].folder} has it. It is averaged directly, so every"
                " member must have it; train them with the same modules_to_save, bias and trained tokens, or use the"
                f" base: {MERGES}"
            )


def check_tokens(head: Member, member: Member, name: str) -> None:
    """Raise SalsaError if two members trained different tokens. The order may differ."""
    if name.endswith(TOKENS):
        require(
            sorted(member.token_indices(name)) == sorted(head.token_indices(name)),
            f"{member.folder / CONFIG}: trainable_token_indices of {name.removesuffix(TOKENS)} are not those of"
            f" {head.folder}, and a soup does not read the other rows from the base; train the same tokens, or use the"
            f" base: {MERGES}",
        )


def frozen(members: Sequence[Member], name: str) -> bool:
    """Whether all members that hold a parameter hold the base's own value, equal to the bit."""
    have = holders(members, name)
    if not all(name in member.frozen for member in have):
        return False
    first = have[0].read(have[0].direct[name]) if have[1:] else None
    return all(np.array_equal(first, member.read(member.direct[name])) for member in have[1:])  # type: ignore[arg-type]


def check_sum(members: Sequence[Member], weights: Sequence[float]) -> None:
    """Raise SalsaError for weights that do not sum to 1 if a trained parameter is averaged directly."""
    if abs(sum(weights) - 1) <= 1e-6:
        return
    for name in parameter_names(members):
        require(
            frozen(members, name),
            f"weights: {', '.join(f'{weight:g}' for weight in weights)} sum to {sum(weights):.9g}, but they must sum to"
            f" 1: {holders(members, name)[0].folder} holds {name}, which is averaged directly, not as a delta",
        )


def mean(members: Sequence[Member], name: str, weights: Sequence[float]) -> Array:
    """Σ w_i x_i in float32, as x_p + Σ w_i (x_i − x_p), so that the mean of equal values is exact."""
    have = [i for i, member in enumerate(members) if name in member.direct]
    pivot = max(have, key=lambda i: abs(weights[i]))
    start = values(members, pivot, name)
    total = start.astype(np.result_type(start, np.float32), copy=True)
    if len(have) < len(members) or abs(sum(weights) - 1) > 1e-6:
        return total  # the base's own value, as check_same and check_sum made sure
    for i in have:
        if i != pivot and weights[i]:
            total = total + (values(members, i, name) - start) * total.dtype.type(weights[i])
    return total


def values(members: Sequence[Member], i: int, name: str) -> Array:
    """The values of member i; rows of trained tokens in the first member's order."""
    found = members[i].read(members[i].direct[name])
    if not name.endswith(TOKENS) or i == 0:
        return found
    mine = members[i].token_indices(name)
    return found[[mine.index(token) for token in members[0].token_indices(name)]]


def wrapped(name: str, wrappers: Mapping[str, int]) -> str:
    """The name of a parameter or module in a model where PEFT has wrapped some of the modules above it."""
    *parents, found = name.split(".")
    for depth in range(len(parents), 0, -1):
        wraps = wrappers.get(".".join(parents[:depth]), 0)
        found = ".".join([parents[depth - 1], *["base_layer"] * wraps, found])
    return found
