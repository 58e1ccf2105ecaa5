"""The arithmetic of a soup of full checkpoints on a CPU, a block at a time: weighted sum, and products of the members' differences.

NumPy and not torch, whose import takes longer than averaging 2 GB. NumPy has no bfloat16, and astype would be most of the time, so
bfloat16 is widened in pairs: of a little-endian 32-bit word u, u << 16 is the float32 of the even element and u & 0xFFFF0000 that of the
odd one. The halves stay apart, since neither a sum nor a product asks for the order, and are joined when they are rounded, to nearest and
ties to even.

The sum is Σ w_i x_i in float64, in the members' order, rounded once to the dtype that is written, so no other arithmetic comes closer to
the float64 mean. To float64 it is the pivot minus weighted differences, of which equal members come out to the bit. Differences, for the
distances, are float32's where all is of 16 bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from salsa_peft.soup.arrays import DTYPES, Array, narrow, widen
from salsa_peft.utils.safetensors_io import BITS, Buffer

ROW = 2**13
"""Elements of one dot product. OpenBLAS shares one of more than 10,000 among threads, and then its last digits depend on who was busy."""
UPPER = np.uint32(0xFFFF0000)
DROPPED = np.uint64(2**29 - 1)
"""Bits of a float64 that a float32 has not."""
LARGEST = {"F64": float(np.finfo(np.float64).max), "F32": float(np.finfo(np.float32).max), "F16": 65504.0,
           "BF16": 2.0**128 - 2.0**120}  # fmt: skip


class Kind(NamedTuple):
    """What a block's values are: safetensors' names of each member's dtype, and of the sum's."""

    members: tuple[str, ...]
    out: str

    @property
    def narrow(self) -> bool:
        """All of 16 bits: differences are taken in float32, else in float64."""
        return all(BITS[dtype] == 16 for dtype in (*self.members, self.out))

    @property
    def halves(self) -> bool:
        return {*self.members, self.out} == {"BF16"}


class Fault(Exception):
    """A value that is not finite: whose (a member's number, or None: the sum's), and which element of the block."""

    def __init__(self, member: int | None, element: int) -> None:
        super().__init__(member, element)
        self.member, self.element = member, element


class Summing(Protocol):
    """Where a block's members are put, and what makes one block's sum of them. One for each thread."""

    raw: list[memoryview]
    """Of each member: read into, in its own dtype."""

    def add(self, kind: Kind, count: int, write: bool) -> tuple[list[float], Buffer]:
        """→ the products of the differences (Plan.pairs' order), and the sum's bytes in its dtype, if it is to be written.

        Raises Fault.
        """


class Plan:
    """What is done with every block. `weights`: one for each member; None: nothing is summed, the products alone are wanted."""

    def __init__(self, members: int, weights: Sequence[float] | None, pivot: int) -> None:
        self.members, self.weights, self.pivot = members, weights, pivot
        self.others = [i for i in range(members) if i != pivot]
        self.pairs = [(i, j) for at, i in enumerate(self.others) for j in self.others[: at + 1]]
        self.sum = 1.0 if weights is None else math.fsum(weights)
        self.mean = weights is not None and min(weights) >= 0 and self.sum <= 1 + 1e-6
        """Of members of one dtype it is no larger than they are."""

    def table(self, products: Sequence[float]) -> list[list[float]]:
        """In the pairs' order → (members, members), with zeros for the pivot."""
        found = [[0.0] * self.members for _ in range(self.members)]
        for (i, j), product in zip(self.pairs, products, strict=True):
            found[i][j] = found[j][i] = product
        return found


class Sums:
    """Summing with NumPy. `block`: elements at most."""

    def __init__(self, plan: Plan, block: int) -> None:
        size = -(-block // ROW) * ROW
        self.plan = plan
        self._raw = np.empty((plan.members, size * 8), np.uint8)  # memory that is not touched costs nothing
        self.raw = [row.data for row in self._raw]
        self._wide = {kind: np.empty((plan.members, size), kind) for kind in (np.float32, np.float64)}
        self._direct = np.empty((2, size), np.float64)
        self._spare, self._out = np.empty(size, np.uint32), np.empty(size, np.uint16)

    def add(self, kind: Kind, count: int, write: bool) -> tuple[list[float], Buffer]:
        """As Summing says."""
        with np.errstate(all="ignore"):
            found = self._add(kind, count, write, kind.halves, np.float32 if kind.narrow else np.float64)
            if found is None:  # a value is not finite, or squares, or the differences themselves, pass float32's range
                self._check(kind, count)
                found = self._add(kind, count, write, False, np.float64, careful=True)
        assert found is not None
        return found

    def _add(
        self, kind: Kind, count: int, write: bool, halves: bool, wide: type[np.floating], careful: bool = False
    ) -> tuple[list[float], Buffer] | None:
        plan, padded = self.plan, -(-count // ROW) * ROW  # zeros behind the last value change no sum
        values = self._wide[wide][:, :padded]
        if halves:
            self._load_halves(count, values.view(np.uint32))
        else:
            self._load(kind, count, values)
        total = values[plan.pivot]
        direct = self._direct_sum(values) if write and kind.out != "F64" else None
        for i in plan.others:
            np.subtract(total, values[i], out=values[i])
        products = [dot(values[i], values[j]) for i, j in plan.pairs]
        held = products or [dot(total, total)]
        if not careful and not all(map(math.isfinite, held)):
            return None
        if not write:
            return products, b""
        if direct is None:
            self._sum(values, dict(zip(plan.pairs, products, strict=True)))
        else:
            total = self._keep_zeros(direct, values)
        safe = plan.mean and all(map(math.isfinite, held)) and set(kind.members) == {kind.out}
        if not safe:  # squares tell it of all values at once, else they are looked at one by one
            square = dot(total, total)
            safe = math.isfinite(square) and square <= LARGEST[kind.out] * LARGEST[kind.out]
        out = self._join(total, values[plan.pivot])[:count] if halves else narrow(total[:count], kind.out)
        if not safe:
            check_finite(widen(out, kind.out), None)
        return products, out.view(np.uint8).data

    def _load_halves(self, count: int, bits: Array) -> None:
        """Even elements, then odd ones; bits: (members, padded)."""
        padded = bits.shape[1]
        self._raw[:, 2 * count : 2 * padded] = 0
        pairs = self._raw[:, : 2 * padded].view("<u4")
        np.left_shift(pairs, 16, out=bits[:, : padded // 2])
        np.bitwise_and(pairs, UPPER, out=bits[:, padded // 2 :])

    def _load(self, kind: Kind, count: int, values: Array) -> None:
        for row, into, dtype in zip(self._raw, values, kind.members, strict=True):
            into[:count] = widen(row[: count * BITS[dtype] // 8].view(DTYPES[dtype]), dtype)
        values[:, count:] = 0

    def _sum(self, values: Array, products: dict[tuple[int, int], float]) -> None:
        """Into the pivot's row. The differences are subtracted, not their negatives added: −0.0 − 0.0 is −0.0."""
        plan, total = self.plan, values[self.plan.pivot]
        assert plan.weights is not None
        if abs(plan.sum - 1) > 1e-6:
            np.multiply(total, values.dtype.type(plan.sum), out=total)
        for i in plan.others:
            # where members are equal nothing is done, whatever the weight's sign; a small difference's square may be 0
            if plan.weights[i] != 0 and (products[i, i] != 0 or values[i].any()):
                np.multiply(values[i], values.dtype.type(plan.weights[i]), out=values[i])
                np.subtract(total, values[i], out=total)

    def _direct_sum(self, values: Array) -> Array:
        """Σ w_i x_i in the members' order, in a row of its own."""
        assert self.plan.weights is not None
        total, term = self._direct[:, : values.shape[1]]
        np.multiply(values[0], self.plan.weights[0], out=total, dtype=np.float64)
        for row, weight in zip(values[1:], self.plan.weights[1:], strict=True):
            np.add(total, np.multiply(row, weight, out=term, dtype=np.float64), out=total)
        return total

    def _keep_zeros(self, total: Array, values: Array) -> Array:
        """Where all members are zero, so is the sum, of the pivot's sign whatever the signs of the weights. `values`: as _sum takes them."""
        if not self.plan.mean:
            zeros = np.flatnonzero(total == 0)
            same = zeros[(values[:, zeros] == 0).all(0)]
            total[same] = values[self.plan.pivot, same]
        return total

    def _join(self, total: Array, wide: Array) -> Array:
        """Halves of float64 → bfloat16 in order. Changes `total`, and `wide`, a row of float32.

        To float32 towards zero, the last bit set where that is not exact; then bits + 0x7FFF + (their last bit that stays), cut off.
        """
        long, rest = total.view(np.uint64), self._direct[1, : len(total)].view(np.uint64)
        np.bitwise_and(long, DROPPED, out=rest)
        np.add(rest, DROPPED, out=rest)  # carries into the last bit that stays
        np.bitwise_or(long, rest, out=long)
        np.bitwise_and(long, ~DROPPED, out=long)
        wide[:] = total
        bits, half = wide.view(np.uint32), len(total) // 2
        spare, out = self._spare[: len(total)], self._out[: len(total)]
        np.right_shift(bits, 16, out=spare)
        np.bitwise_and(spare, 1, out=spare)
        np.add(spare, 0x7FFF, out=spare)
        np.add(bits, spare, out=bits)
        even, odd = bits[:half], bits[half:]
        np.right_shift(even, 16, out=even)
        np.bitwise_and(odd, UPPER, out=odd)
        np.bitwise_or(even, odd, out=out.view("<u4"))
        return out

    def _check(self, kind: Kind, count: int) -> None:
        for i, (row, dtype) in enumerate(zip(self._raw, kind.members, strict=True)):
            check_finite(widen(row[: count * BITS[dtype] // 8].view(DTYPES[dtype]), dtype), i)


def check_finite(values: Array, member: int | None) -> None:
    """Raise Fault for the first value that is not."""
    finite = np.isfinite(values)
    if not finite.all():
        raise Fault(member, int(np.argmin(finite)))


def dot(one: Array, other: Array) -> float:
    """⟨one, other⟩ of whole rows, each row's in their dtype, the rows' added up in float64."""
    return float(np.vecdot(one.reshape(-1, ROW), other.reshape(-1, ROW)).sum(dtype=np.float64))
