"""Every member's factors of one module, side by side: read from the files where they are asked for, or held in memory.

    delta = Σ_i w_i · scaling_i · B_i · A_i = (B · diag(w · scaling)) · A        A = [A_0; A_1; …], B = [B_0, B_1, …]

Convolutions are their 2-D view, in · kernel columns. A module that a member lacks has no block of it: a delta of zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from salsa_peft.models.adapters.names import PREFIX
from salsa_peft.soup import arrays as float_arrays
from salsa_peft.soup.arrays import Array
from salsa_peft.soup.lora.direct_parts import wrapped
from salsa_peft.soup.lora.read import MERGES
from salsa_peft.soup.lora.svd import Moments
from salsa_peft.soup.lora.targets import WRAPPED, registered
from salsa_peft.soup.lora.tensors import Factors, Member, unnested
from salsa_peft.utils.errors import require

if TYPE_CHECKING:
    import torch


class Shape(NamedTuple):
    """What a module's stacked factors look like. `inner`: (in,), of an embedding (tokens,), of a convolution (in, *kernel).

    A stack of experts (target_parameters) and a convolution in groups have a delta for each of their `blocks`.
    """

    rank: int
    inner: tuple[int, ...]
    out: int
    embedding: bool
    experts: int = 1
    groups: int = 1
    holder: str = ""
    """The module whose wrapper holds the factors."""
    parameter: str | None = None
    """Of target_parameters: the parameter's name in `holder`, "" where names do not say it. None: the factors are a layer's."""
    owner: str = ""
    """The module that is targeted."""

    @property
    def blocks(self) -> int:
        return self.experts * self.groups

    @property
    def limit(self) -> int:
        """The highest rank that a delta of this shape can have."""
        return min(math.prod(self.inner), self.out // self.groups) * self.groups

    def saved(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes that PEFT saves A and B in."""
        rows = rank * self.experts
        return (rows, *self.inner), (self.out, rows // self.groups, *(1 for _ in self.inner[1:]))

    def blocks_A(self, A: Any) -> Any:
        """A as PEFT has it → (R, in), of several blocks (blocks, R / groups, in). An array or a tensor, as the others here."""
        return A.reshape(len(A), -1) if self.blocks == 1 else A.reshape(self.blocks, len(A) // self.blocks, -1)

    def blocks_B(self, B: Any) -> Any:
        """B as PEFT has it → (out, R), of several blocks (blocks, out / groups, R / groups)."""
        if self.blocks == 1:
            return B.reshape(len(B), -1)
        if self.groups > 1:
            return B.reshape(self.groups, self.out // self.groups, -1)
        return B.reshape(self.out, -1, self.experts).swapaxes(0, 1).swapaxes(0, 2)

    def whole_B(self, B: Any) -> Any:
        """The way back from blocks_B; as a matrix (out, columns)."""
        if self.experts > 1:
            B = B.swapaxes(0, 2).swapaxes(0, 1)
        return B.reshape(self.out, -1)


class Stack(NamedTuple):
    """As torch tensors, for a live model. Shapes, R = Σ r_i: A (R, in), B (out, R), scaling (R,), member (R,), bias (n, out).

    Of several blocks (experts, groups): A (blocks, R, in), B (blocks, out, R), with R and out those of one block.
    """

    A: torch.Tensor
    B: torch.Tensor
    scaling: torch.Tensor
    member: torch.Tensor
    bias: torch.Tensor | None = None
    """Each member's scaling_i · b_i (lora_bias), float64; a member without one has zeros."""

    def weighted_B(self, weights: Sequence[float]) -> torch.Tensor:
        """B with w_i · scaling_i in its columns. The n scalars are multiplied in float64."""
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

    def each_block(self) -> Iterator[tuple[Array, Array]]:
        """A (R, in) and B (out, R) of each expert or group; of other modules the one pair that there is."""
        yield from zip(self.A, self.B, strict=True) if self.A.ndim == 3 else [(self.A, self.B)]

    def gram(self, given: Sequence[Moments], n: int) -> Array:
        """⟨delta_i, delta_j⟩ of this module: (n, n), float64. tr((B_i A_i)ᵀ B_j A_j) = Σ (B_iᵀ B_j) ∘ (A_i A_jᵀ), of all blocks."""
        owner = np.eye(n)[self.member] * self.scaling[:, None]
        return np.asarray(owner.T @ sum(block.AA * block.BB for block in given) @ owner)


class Stacks(Mapping[str, Stack]):
    """Module → Stack. Raises SalsaError where members' layers differ, and, when read, where a value is not finite."""

    def __init__(self, members: Sequence[Member]) -> None:
        self.members = members
        check_parameters(members)
        check_invocation(members)
        modules = sorted({module for member in members for module in member.factors})
        self.shapes = {module: shape_of(module, members) for module in modules}
        self.dtype = float_arrays.promote(
            member.file.entries[key].dtype for member in members for f in member.factors.values() for key in (f.A, f.B)
        )
        """Safetensors' name of the dtype that holds every member's factors exactly."""
        self.with_bias = any(member.config["lora_bias"] for member in members)
        self.wrappers = wrappers_of(self.shapes)
        """Module with LoRA → how many of PEFT's wrappers are around it: one, but for several parameters of one module."""
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

    def check_whole(self) -> None:
        """Refuse what no PEFT adapter can hold, though a model can: then the soup is merged, not saved as an adapter."""
        odd = [module for module, shape in self.shapes.items() if shape.embedding or shape.parameter is not None]
        require(
            not self.with_bias or not odd,
            f"{self.members[0].folder}: a soup of members with lora_bias and with LoRA on {odd[0] if odd else ''}: PEFT has no such adapter; "
            f"{MERGES}",
        )

    def check_everywhere(self) -> None:
        """Refuse what is not active for every token, so that neither a merged base nor a model of several roles can be it."""
        tokens = self.members[0].config["alora_invocation_tokens"]
        require(
            not tokens,
            f"{self.members[0].folder}: alora_invocation_tokens are {tokens}: aLoRA is active only after its tokens, which no merged weights "
            "and no reference can be; make a soup that is an adapter, or train the members as plain LoRA",
        )

    def place(self, module: str) -> str:
        """Where the wrapper that holds a module's factors lies in the model, under PEFT's names."""
        shape = self.shapes[module]
        return wrapped(shape.holder, self.wrappers) + WRAPPED * self.depth(module)

    def depth(self, module: str) -> int:
        """How many wrappers of other parameters of the same module are around this one's: the first registered lies innermost."""
        shape = self.shapes[module]
        if shape.parameter is None:
            return 0
        if not shape.parameter:
            return unnested(module)[1]
        there = [s.parameter for s in self.shapes.values() if s.holder == shape.holder and s.parameter is not None]
        return len(there) - 1 - sorted(there, key=registered).index(shape.parameter)

    def names(self, module: str) -> tuple[str, str]:
        """PEFT's names of A and B."""
        parts = ("embedding_A", "embedding_B") if self.shapes[module].embedding else ("A.weight", "B.weight")
        place = f"{PREFIX}{self.place(module)}"
        return f"{place}.lora_{parts[0]}", f"{place}.lora_{parts[1]}"

    def weight(self, module: str) -> str:
        """The base's own name of the parameter that a module's delta is added to."""
        shape = self.shapes[module]
        if shape.parameter is not None:
            return module
        inner = f"{module}.out_proj"  # torch's MultiheadAttention: PEFT wraps both, in_proj has no module of its own
        attention = inner in self.shapes and self.shapes[inner].owner == module
        return f"{module}.in_proj_weight" if attention else f"{module}.weight"

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
        ranks = [factors.rank // shape.groups for _, _, factors in owners]
        return Arrays(
            np.concatenate([shape.blocks_A(m.read(f.A)) for _, m, f in owners], axis=-2, dtype=wide),
            np.concatenate([shape.blocks_B(m.read(f.B)) for _, m, f in owners], axis=-1, dtype=wide),
            np.repeat([factors.scaling for _, _, factors in owners], ranks).astype(np.float64),
            np.repeat([i for i, _, _ in owners], ranks),
            bias,
        )


def wrappers_of(shapes: Mapping[str, Shape]) -> dict[str, int]:
    """Module with LoRA → how many of PEFT's wrappers are around it."""
    found: dict[str, int] = {}
    for shape in shapes.values():
        found[shape.holder] = found.get(shape.holder, 0) + 1
    return found


def shape_of(module: str, members: Sequence[Member]) -> Shape:
    owners = [(member, member.factors[module]) for member in members if module in member.factors]
    head, first = owners[0]
    for member, other in owners[1:]:
        found, expected = (f"maps {maps(f.shape_A[1:])} to {f.shape_B[0]} features{blocks(f)}" for f in (other, first))
        same = found == expected and other.embedding == first.embedding
        require(
            same,
            f"{member.file.path}: {module} {found}, in {head.file.path} {expected}: a soup needs members of one base",
        )
    rank = sum(f.rank for _, f in owners)
    shape = Shape(rank, first.shape_A[1:], first.shape_B[0], first.embedding, first.experts, first.groups)
    return shape._replace(holder=first.holder, parameter=first.parameter, owner=first.owner)


def blocks(factors: Factors) -> str:
    """For messages: of how many experts or groups."""
    many = [(factors.experts, "experts"), (factors.groups, "groups")]
    return "".join(f" in {number} {name}" for number, name in many if number > 1)


def check_invocation(members: Sequence[Member]) -> None:
    """Refuse members of which some are active only after invocation tokens (aLoRA), or after others."""
    head = members[0]
    for member in members[1:]:
        tokens = [m.config["alora_invocation_tokens"] for m in (member, head)]
        require(
            tokens[0] == tokens[1],
            f"{member.folder}: alora_invocation_tokens are {tokens[0]}, in {head.folder} {tokens[1]}: aLoRA is active only after its "
            "tokens, so that no adapter is the mean; train the members with the same tokens",
        )


def check_parameters(members: Sequence[Member]) -> None:
    """Refuse members that target different parameters of one module, where the names do not say which factors belong to which."""
    unclear = [(module, m) for m in members for module, factors in m.factors.items() if factors.parameter == ""]
    for module, member in unclear:
        for other in members:
            same = sorted(other.config["target_parameters"] or ()) == sorted(member.config["target_parameters"] or ())
            require(
                same and not (member.config["rank_pattern"] or member.config["alpha_pattern"]),
                f"{member.file.path}: {module}: its name does not say which of target_parameters it belongs to, which matters since "
                f"{other.folder} has others, or patterns; train the members with the same target_parameters and one rank",
            )


def maps(inner: tuple[int, ...]) -> str:
    return " × ".join(str(size) for size in inner)
