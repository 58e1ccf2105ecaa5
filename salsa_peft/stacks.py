"""Every member's factors of one module, side by side: read from the files where they are asked for, or held in memory.

    delta = Σ_i w_i · scaling_i · B_i · A_i = (B · diag(w · scaling)) · A        A = [A_0; A_1; …], B = [B_0, B_1, …]

Convolutions are their 2-D view, in · kernel columns. A module that a member lacks has no block of it: a delta of zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from . import float_arrays
from .adapter_tensors import PREFIX, Member
from .errors import require
from .float_arrays import Array
from .recompression import Moments

if TYPE_CHECKING:
    import torch


class Shape(NamedTuple):
    """What a module's stacked factors look like. `inner`: (in,), of an embedding (tokens,), of a convolution (in, *kernel)."""

    rank: int
    inner: tuple[int, ...]
    out: int
    embedding: bool

    @property
    def limit(self) -> int:
        """The highest rank that a delta of this shape can have."""
        return min(math.prod(self.inner), self.out)

    def names(self, module: str) -> tuple[str, str]:
        """PEFT's names of A and B."""
        parts = ("embedding_A", "embedding_B") if self.embedding else ("A.weight", "B.weight")
        return f"{PREFIX}{module}.lora_{parts[0]}", f"{PREFIX}{module}.lora_{parts[1]}"

    def saved(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes that PEFT saves A and B in."""
        return (rank, *self.inner), (self.out, rank, *(1 for _ in self.inner[1:]))


class Stack(NamedTuple):
    """As torch tensors, for a live model. Shapes, R = Σ r_i: A (R, in), B (out, R), scaling (R,), member (R,), bias (n, out)."""

    A: torch.Tensor
    B: torch.Tensor
    scaling: torch.Tensor
    member: torch.Tensor
    bias: torch.Tensor | None = None
    """Each member's scaling_i · b_i (lora_bias), float64; a member without one has zeros."""

    def weighted_B(self, weights: Sequence[float]) -> torch.Tensor:
        """B with w_i · scaling_i in its columns: (out, R). The n scalars are multiplied in float64."""
        return self.B * (self.scaling * self.scaling.new_tensor(weights)[self.member]).to(self.B)

    def weighted_bias(self, weights: Sequence[float]) -> torch.Tensor:
        """Σ w_i · scaling_i · b_i: (out,), float64."""
        assert self.bias is not None
        return self.bias.new_tensor(weights) @ self.bias


class Arrays(NamedTuple):
    """The same as NumPy arrays, for files."""

    A: Array
    B: Array
    scaling: Array
    member: Array
    bias: Array | None

    def coefficients(self, weights: Sequence[float]) -> Array:
        """w_i · scaling_i of each column of B: (R,), float64."""
        return self.scaling * np.array(weights)[self.member]

    def weighted_B(self, weights: Sequence[float]) -> Array:
        return self.B * self.coefficients(weights).astype(self.B.dtype)

    def gram(self, given: Moments, n: int) -> Array:
        """⟨delta_i, delta_j⟩ of this module: (n, n), float64. tr((B_i A_i)ᵀ B_j A_j) = Σ (B_iᵀ B_j) ∘ (A_i A_jᵀ)."""
        owner = np.eye(n)[self.member] * self.scaling[:, None]
        return np.asarray(owner.T @ (given.AA * given.BB) @ owner)


class Stacks(Mapping[str, Stack]):
    """Module → Stack. Raises SalsaError where members' layers differ, and, when read, where a value is not finite."""

    def __init__(self, members: Sequence[Member]) -> None:
        self.members = members
        modules = sorted({module for member in members for module in member.factors})
        self.shapes = {module: shape_of(module, members) for module in modules}
        self.dtype = float_arrays.promote(
            member.file.entries[key].dtype for member in members for f in member.factors.values() for key in (f.A, f.B)
        )
        """Safetensors' name of the dtype that holds every member's factors exactly."""
        self.with_bias = any(member.config["lora_bias"] for member in members)
        embedding = next((module for module, shape in self.shapes.items() if shape.embedding), None)
        require(
            not self.with_bias or embedding is None,
            f"{members[0].folder}: a soup of members with lora_bias and with LoRA on the embedding {embedding}: PEFT has no such "
            "adapter; leave one of them out",
        )
        self.held: dict[str, Arrays] = {}

    def __getitem__(self, module: str) -> Stack:
        import torch

        arrays = self.arrays(module)
        return Stack(*(None if part is None else torch.from_numpy(part) for part in arrays))  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def hold(self) -> None:
        """Read every factor now and keep it: for a model that moves between weights."""
        for module in self.shapes:
            self.held[module] = self.arrays(module)

    def arrays(self, module: str) -> Arrays:
        if module in self.held:
            return self.held[module]
        shape = self.shapes[module]
        owners = [(i, m, m.factors[module]) for i, m in enumerate(self.members) if module in m.factors]
        wide = np.float64 if self.dtype == "F64" else np.float32
        bias = np.zeros((len(self.members), shape.out)) if self.with_bias else None
        for i, member, factors in owners:
            if bias is not None and factors.bias is not None:
                bias[i] = factors.scaling * member.read(factors.bias).astype(np.float64)
        ranks = [factors.rank for _, _, factors in owners]
        return Arrays(
            np.concatenate([m.read(f.A).reshape(f.rank, -1) for _, m, f in owners], dtype=wide),
            np.concatenate([m.read(f.B).reshape(shape.out, f.rank) for _, m, f in owners], axis=1, dtype=wide),
            np.repeat([factors.scaling for _, _, factors in owners], ranks).astype(np.float64),
            np.repeat([i for i, _, _ in owners], ranks),
            bias,
        )


def shape_of(module: str, members: Sequence[Member]) -> Shape:
    owners = [(member, member.factors[module]) for member in members if module in member.factors]
    head, first = owners[0]
    for member, other in owners[1:]:
        found, expected = (f"maps {maps(f.shape_A[1:])} to {f.shape_B[0]} features" for f in (other, first))
        same = found == expected and other.embedding == first.embedding
        require(
            same,
            f"{member.file.path}: {module} {found}, in {head.file.path} {expected}: a soup needs members of one base",
        )
    return Shape(sum(f.rank for _, f in owners), first.shape_A[1:], first.shape_B[0], first.embedding)


def maps(inner: tuple[int, ...]) -> str:
    return " × ".join(str(size) for size in inner)
