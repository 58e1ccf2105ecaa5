"""The LoRA factors of all members, stacked per module; read from files on access or held in memory.

    delta = Σ_i w_i · scaling_i · B_i · A_i = (B · diag(w · scaling)) · A        A = [A_0; A_1; …], B = [B_0, B_1, …]

The weight of a convolution is treated as a matrix with in · kernel columns. A member without LoRA on a module adds no
rows to A and no columns to B, so the member's delta of the module is zero.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from salsa_peft.models.adapters.names import PREFIX
from salsa_peft.soup import arrays
from salsa_peft.soup.arrays import Array
from salsa_peft.soup.lora.non_lora import wrapped
from salsa_peft.soup.lora.read import MERGES
from salsa_peft.soup.lora.svd import Moments
from salsa_peft.soup.lora.targets import WRAPPED, Shape, registration_order, strip_wrappers
from salsa_peft.soup.lora.tensors import Member
from salsa_peft.utils.errors import require


class Stack(NamedTuple):
    """The stacked factors of one module, with R = Σ r_i: A (R, in), B (out, R), bias (members, out).

    With several blocks (experts, groups): A (blocks, R, in) and B (blocks, out, R), where R and out are those of one
    block.
    """

    A: Array
    B: Array
    scaling: Array
    """Scaling of each column of B, in float64."""
    member: Array
    """Index of the member that each column of B belongs to."""
    bias: Array | None
    """scaling_i · b_i of each member in float64, zeros if a member has no bias; None without lora_bias."""

    def coefficients(self, weights: Sequence[float]) -> Array:
        """w_i · scaling_i for each column of B: (R,), float64."""
        return self.scaling * np.array(weights)[self.member]

    def weighted_B(self, weights: Sequence[float]) -> Array:
        """B with its columns scaled by their coefficients."""
        return self.B * self.coefficients(weights).astype(self.B.dtype)

    def weighted_bias(self, weights: Sequence[float]) -> Array | None:
        """Σ w_i · scaling_i · b_i: (out,), float64; None without lora_bias."""
        return None if self.bias is None else np.array(weights) @ self.bias

    def each_block(self) -> Iterator[tuple[Array, Array]]:
        """Yield A (R, in) and B (out, R) of each expert or group, or of the module if it has no blocks."""
        yield from zip(self.A, self.B, strict=True) if self.A.ndim == 3 else [(self.A, self.B)]

    def delta(self, member: int) -> Array:
        """The dense delta of one member, (out, in) or (blocks, out, in), in float64."""
        own = np.flatnonzero(self.member == member)
        return np.asarray((self.B[..., own] * self.scaling[own]) @ self.A[..., own, :].astype(np.float64))

    def gram(self, blocks: Sequence[Moments], n: int) -> Array:
        """⟨delta_i, delta_j⟩ = Σ (B_iᵀ B_j) ∘ (A_i A_jᵀ), summed over the module's blocks: (n, n), float64."""
        of_member = np.eye(n)[self.member] * self.scaling[:, None]
        return np.asarray(of_member.T @ sum(block.AA * block.BB for block in blocks) @ of_member)


class Stacks(Mapping[str, Stack]):
    """Module or parameter → Stack, read on access. Raises SalsaError if the members cannot be stacked."""

    def __init__(self, members: Sequence[Member]) -> None:
        self.members = members
        check_parameters(members)
        check_invocation_tokens(members)
        modules = sorted({module for member in members for module in member.factors})
        self.shapes = {module: stacked_shape(module, members) for module in modules}
        self.dtype = arrays.promote(
            member.file.entries[key].dtype for member in members for f in member.factors.values() for key in (f.A, f.B)
        )
        """Safetensors' name of the dtype that represents every member's factors exactly."""
        self.with_bias = any(member.config["lora_bias"] for member in members)
        self.wrappers = Counter(shape.module for shape in self.shapes.values())
        """Module with LoRA → number of PEFT wrappers around it (one per targeted parameter of the module)."""
        self.held: dict[str, Stack] = {}

    def __getitem__(self, module: str) -> Stack:
        if module in self.held:
            return self.held[module]
        shape = self.shapes[module]
        having = [(i, m, m.factors[module]) for i, m in enumerate(self.members) if module in m.factors]
        wide = np.float64 if self.dtype == "F64" else np.float32
        bias = np.zeros((len(self.members), shape.out)) if self.with_bias else None
        for i, member, factors in having:
            if bias is not None and factors.bias is not None:
                bias[i] = factors.scaling * member.read(factors.bias).astype(np.float64)
        ranks = [factors.shape.rank // shape.groups for _, _, factors in having]
        return Stack(
            np.concatenate([shape.blocks_A(m.read(f.A)) for _, m, f in having], axis=-2, dtype=wide),
            np.concatenate([shape.blocks_B(m.read(f.B)) for _, m, f in having], axis=-1, dtype=wide),
            np.repeat([factors.scaling for _, _, factors in having], ranks).astype(np.float64),
            np.repeat([i for i, _, _ in having], ranks),
            bias,
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def load_in_memory(self) -> None:
        """Read all factors now and keep them, for an attached soup whose weights change."""
        self.held = dict(self.items())

    def check_saveable(self) -> None:
        """Raise SalsaError for lora_bias with LoRA on an embedding or parameter: PEFT has no such adapter."""
        odd = [module for module, shape in self.shapes.items() if shape.embedding or shape.parameter is not None]
        require(
            not self.with_bias or not odd,
            f"{self.members[0].folder}: PEFT has no adapter with lora_bias and LoRA on {odd[0] if odd else ''}, which"
            f" this soup would need; {MERGES}",
        )

    def check_no_bias(self, what: str) -> None:
        """Raise SalsaError for lora_bias, which `what` (a strategy) does not merge."""
        require(
            not self.with_bias,
            f"{what} merges weight matrices, but {self.members[0].folder} or another member has lora_bias; use linear,"
            " or train the members without lora_bias",
        )

    def check_not_alora(self) -> None:
        """Raise SalsaError for aLoRA adapters: a shared model cannot apply an adapter to some tokens only."""
        tokens = self.members[0].config["alora_invocation_tokens"]
        require(
            not tokens,
            f"{self.members[0].folder}: alora_invocation_tokens are {tokens}. aLoRA is active only after these tokens,"
            " so it can be neither merged nor used as a reference; save the soup as an adapter, or train the members"
            " as plain LoRA",
        )

    def wrapper_path(self, module: str) -> str:
        """The name in a PEFT model of the wrapper that holds a module's factors."""
        return wrapped(self.shapes[module].module, self.wrappers) + WRAPPED * self.depth(module)

    def depth(self, module: str) -> int:
        """Number of wrappers around a targeted parameter's wrapper: one per parameter registered later."""
        shape = self.shapes[module]
        if shape.parameter is None:
            return 0
        if not shape.parameter:
            return strip_wrappers(module)[1]
        others = [s.parameter for s in self.shapes.values() if s.module == shape.module and s.parameter is not None]
        return len(others) - 1 - sorted(others, key=registration_order).index(shape.parameter)

    def tensor_names(self, module: str) -> tuple[str, str]:
        """PEFT's tensor names of a module's A and B."""
        parts = ("embedding_A", "embedding_B") if self.shapes[module].embedding else ("A.weight", "B.weight")
        path = f"{PREFIX}{self.wrapper_path(module)}"
        return f"{path}.lora_{parts[0]}", f"{path}.lora_{parts[1]}"


def stacked_shape(module: str, members: Sequence[Member]) -> Shape:
    """The shape of a module's stacked factors. Raises SalsaError if the members' layers differ."""
    layers = [(member, member.factors[module].shape) for member in members if module in member.factors]
    first_member, first = layers[0]
    for member, shape in layers[1:]:
        found, expected = describe_layer(shape), describe_layer(first)
        require(
            found == expected and shape.embedding == first.embedding,
            f"{member.file.path}: {module} {found}, but in {first_member.file.path} it {expected}; a soup needs"
            " members of one base",
        )
    return first._replace(rank=sum(shape.rank for _, shape in layers))


def describe_layer(shape: Shape) -> str:
    """Describe a layer for a message, such as `maps 64 to 32 features in 4 experts`."""
    blocks = [(shape.experts, "experts"), (shape.groups, "groups")]
    parts = "".join(f" in {number} {name}" for number, name in blocks if number > 1)
    return f"maps {' × '.join(map(str, shape.inner))} to {shape.out} features{parts}"


def check_invocation_tokens(members: Sequence[Member]) -> None:
    """Raise SalsaError if the members' alora_invocation_tokens differ."""
    first = members[0]
    for member in members[1:]:
        tokens = [m.config["alora_invocation_tokens"] for m in (member, first)]
        require(
            tokens[0] == tokens[1],
            f"{member.folder}: alora_invocation_tokens are {tokens[0]}, but {tokens[1]} in {first.folder}. aLoRA is"
            " active only after these tokens, so no adapter is the mean; train the members with the same tokens",
        )


def check_parameters(members: Sequence[Member]) -> None:
    """Raise SalsaError if tensor names do not tell their parameter, which may differ between members.

    The parameter is the same if all members have the same target_parameters, and the members with such tensor names
    have neither a rank_pattern nor an alpha_pattern.
    """
    unclear = [(module, m) for m in members for module, f in m.factors.items() if f.shape.parameter == ""]
    for module, member in unclear:
        for other in members:
            same = sorted(other.config["target_parameters"] or ()) == sorted(member.config["target_parameters"] or ())
            require(
                same and not (member.config["rank_pattern"] or member.config["alpha_pattern"]),
                f"{member.file.path}: the name {module} does not tell which of target_parameters it belongs to, and"
                f" {other.folder} has different target_parameters, or this adapter has a rank_pattern or alpha_pattern;"
                " train the members with the same target_parameters and one rank",
            )
