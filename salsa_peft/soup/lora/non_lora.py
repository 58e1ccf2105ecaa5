"""Parameters besides LoRA factors: modules_to_save, biases, saved embeddings, rows of trained tokens.

    θ_soup = Σ_i w_i · θ_i, Σ w_i = 1

These parameters are averaged directly, one at a time. Weights that do not sum to 1 (such as those of a scaled-down
soup) are rejected, because the mean would need the base's own values, which the members do not hold.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from salsa_peft.soup.arrays import Array
from salsa_peft.soup.lora.read import CONFIG, MERGES
from salsa_peft.soup.lora.tensors import TOKENS, Member
from salsa_peft.utils.errors import SalsaError, require


def parameter_names(members: Sequence[Member]) -> list[str]:
    """Names in the base of all parameters besides LoRA factors (trained tokens: embedding + TOKENS)."""
    return sorted({name for member in members for name in member.non_lora})


def members_with(members: Sequence[Member], name: str) -> list[Member]:
    """The members whose file has the parameter. After check_same, only frozen parameters can be missing."""
    return [member for member in members if name in member.non_lora]


def check_same(members: Sequence[Member]) -> None:
    """Raise SalsaError if only some members hold a trained parameter, or if its shapes or tokens differ.

    Untrained weights of layers with LoRA, which PEFT saves in some cases, may be missing in some members.
    """
    for name in parameter_names(members):
        have = members_with(members, name)
        for member in have[1:]:
            check_tokens(have[0], member, name)
            shapes = [list(m.file.entries[m.non_lora[name]].shape) for m in (member, have[0])]
            require(
                shapes[0] == shapes[1],
                f"{member.file.path}: {name} has shape {shapes[0]}, but {shapes[1]} in {have[0].folder}: the"
                " members differ in their base or vocabulary; a soup needs members of one base",
            )
        lacks = next((member for member in members if name not in member.non_lora), None)
        if lacks is not None and not frozen(members, name):
            raise SalsaError(
                f"{lacks.file.path} has no {name}, but {have[0].folder} has it. This parameter is averaged directly,"
                " so every member must have it; train all with the same modules_to_save, bias and trained tokens, or"
                f" {MERGES}"
            )


def check_tokens(first: Member, member: Member, name: str) -> None:
    """Raise SalsaError if two members trained different tokens of an embedding. The order may differ."""
    if name.endswith(TOKENS):
        require(
            sorted(member.token_indices(name)) == sorted(first.token_indices(name)),
            f"{member.folder / CONFIG}: trainable_token_indices of {name.removesuffix(TOKENS)} differ from those of"
            f" {first.folder}, and a soup does not read untrained rows from the base; train the same tokens, or"
            f" {MERGES}",
        )


def frozen(members: Sequence[Member], name: str) -> bool:
    """Whether all members with this parameter hold it untrained (Member.frozen), with equal values."""
    have = members_with(members, name)
    if not all(name in member.frozen for member in have):
        return False
    own = have[0].read(have[0].non_lora[name]) if have[1:] else None
    return all(np.array_equal(own, member.read(member.non_lora[name])) for member in have[1:])  # type: ignore[arg-type]


def check_sum(members: Sequence[Member], weights: Sequence[float]) -> None:
    """Raise SalsaError for weights that do not sum to 1 if a trained parameter is averaged directly."""
    if abs(sum(weights) - 1) <= 1e-6:
        return
    for name in parameter_names(members):
        require(
            frozen(members, name),
            f"weights: {', '.join(f'{weight:g}' for weight in weights)} sum to {sum(weights):.9g}, but they must sum to"
            f" 1: {members_with(members, name)[0].folder} holds {name}, which is averaged directly, not as a"
            " delta; scale the weights",
        )


def check_frozen(members: Sequence[Member], option: str) -> None:
    """Raise SalsaError if a member trained a parameter without LoRA, for which `option` has no meaning."""
    for name in parameter_names(members):
        require(
            frozen(members, name),
            f"{option} works on LoRA deltas, but {members_with(members, name)[0].folder} also trained {name}, which is"
            " averaged directly; leave this option out",
        )


def mean(members: Sequence[Member], name: str, weights: Sequence[float]) -> Array:
    """Σ w_i x_i as x_p + Σ w_i (x_i − x_p), exact for equal values. p: member with the largest |w|."""
    have = [i for i, member in enumerate(members) if name in member.non_lora]
    pivot = max(have, key=lambda i: abs(weights[i]))
    start = values(members, pivot, name)
    total = start.astype(np.result_type(start, np.float32), copy=True)
    if len(have) < len(members) or abs(sum(weights) - 1) > 1e-6:
        return total  # a frozen value: check_same and check_sum reject all other cases
    for i in have:
        if i != pivot and weights[i]:
            total = total + (values(members, i, name) - start) * total.dtype.type(weights[i])
    return total


def values(members: Sequence[Member], i: int, name: str) -> Array:
    """Member i's values of a parameter, with rows of trained tokens in the order of the first member."""
    found = members[i].read(members[i].non_lora[name])
    if not name.endswith(TOKENS) or i == 0:
        return found
    mine = members[i].token_indices(name)
    return found[[mine.index(token) for token in members[0].token_indices(name)]]


def wrapped(name: str, wrappers: Mapping[str, int]) -> str:
    """Name of a parameter or module in a PEFT model. wrappers: module → number of wrappers around it."""
    *parents, found = name.split(".")
    for depth in range(len(parents), 0, -1):
        wraps = wrappers.get(".".join(parents[:depth]), 0)
        found = ".".join([parents[depth - 1], *["base_layer"] * wraps, found])
    return found
