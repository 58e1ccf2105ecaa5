"""The weighted sum of a block of the members' values, and the inner products of their differences.

This module uses NumPy and not torch, because importing torch takes longer than averaging 2 GB. NumPy has no bfloat16,
and converting with astype would take most of the time, so bfloat16 values are widened in pairs: in a little-endian
32-bit word u, u << 16 is the float32 of the even element, and u & 0xFFFF0000 is the float32 of the odd element. Even
and odd elements are kept apart until they are rounded, because sums and products do not depend on the order.

The sum Σ w_i x_i is computed in float64, in the order of the members, and rounded once to the dtype that is written. If
that dtype is float64, the sum is computed as one member, the pivot, minus the weighted differences of the others from
it, so that the soup of equal members equals them bit for bit. The differences, which also give the distances, are
float32 if all values have 16 bits, else float64.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from salsa_peft.soup.arrays import DTYPES, Array, narrow, widen
from salsa_peft.utils.safetensors_io import BITS, Buffer

ROW = 2**13
"""Number of elements of one dot product. Above 10,000, OpenBLAS uses threads, and last digits vary."""
UPPER = np.uint32(0xFFFF0000)
DROPPED = np.uint64(2**29 - 1)
"""The bits of a float64's mantissa that a float32 does not have."""
LARGEST = {"F64": float(np.finfo(np.float64).max), "F32": float(np.finfo(np.float32).max), "F16": 65504.0,
           "BF16": 2.0**128 - 2.0**120}  # fmt: skip


class BlockDtypes(NamedTuple):
    """The dtypes (safetensors' names) of each member's values in a block, and of their sum."""

    members: tuple[str, ...]
    out: str

    @property
    def narrow(self) -> bool:
        """Whether all dtypes have 16 bits. The differences are then float32, else float64."""
        return all(BITS[dtype] == 16 for dtype in (*self.members, self.out))

    @property
    def bfloat16(self) -> bool:
        """Whether all dtypes are bfloat16."""
        return {*self.members, self.out} == {"BF16"}


class NotFinite(Exception):
    """Raised if element `element` of a block is not finite in `member`, or in the sum (`member` is None)."""

    def __init__(self, member: int | None, element: int) -> None:
        super().__init__(member, element)
        self.member, self.element = member, element


class SumPlan:
    """What to compute: Σ w_i x_i unless `weights` is None, and products of differences from `pivot`."""

    def __init__(self, members: int, weights: Sequence[float] | None, pivot: int) -> None:
        self.members, self.weights, self.pivot = members, weights, pivot
        self.others = [i for i in range(members) if i != pivot]
        self.pairs = [(i, j) for at, i in enumerate(self.others) for j in self.others[: at + 1]]
        self.sum = 1.0 if weights is None else math.fsum(weights)
        self.mean = weights is not None and min(weights) >= 0 and self.sum <= 1 + 1e-6
        """Whether the weights are at least 0 and sum to at most 1.

        The soup of finite members is then finite in the members' dtype.
        """

    def table(self, products: Sequence[float]) -> list[list[float]]:
        """The matrix (members, members) of products given in the order of `pairs`; zeros for the pivot."""
        found = [[0.0] * self.members for _ in range(self.members)]
        for (i, j), product in zip(self.pairs, products, strict=True):
            found[i][j] = found[j][i] = product
        return found


class BlockSums:
    """Computes the sums of blocks of at most `block` elements. Only one thread at a time may use it."""

    def __init__(self, plan: SumPlan, block: int) -> None:
        size = -(-block // ROW) * ROW
        self.plan = plan
        self._raw = np.empty((plan.members, size * 8), np.uint8)  # untouched memory costs nothing
        self.raw = [row.data for row in self._raw]
        """For each member, the buffer into which its values are read in the member's dtype."""
        self._wide = {dtype: np.empty((plan.members, size), dtype) for dtype in (np.float32, np.float64)}
        self._direct = np.empty((2, size), np.float64)
        self._spare, self._out = np.empty(size, np.uint32), np.empty(size, np.uint16)

    def add(self, dtypes: BlockDtypes, count: int, write: bool) -> tuple[list[float], Buffer]:
        """The products of the differences, in the order of SumPlan.pairs, and the bytes of the sum if `write`.

        Raises NotFinite if a value of a member or of the sum is not finite.
        """
        with np.errstate(all="ignore"):
            found = self._add(dtypes, count, write, dtypes.bfloat16, np.float32 if dtypes.narrow else np.float64)
            if found is None:  # a value is not finite, or a difference or its square overflows float32
                for i, given in enumerate(self._given(dtypes, count)):
                    check_finite(given, i)
                found = self._add(dtypes, count, write, False, np.float64, careful=True)
        assert found is not None
        return found

    def _add(
        self, dtypes: BlockDtypes, count: int, write: bool, halves: bool, wide: type[np.floating], careful: bool = False
    ) -> tuple[list[float], Buffer] | None:
        """Compute `add`; None if a product is not finite, unless `careful`. halves: widen bfloat16 in pairs."""
        plan, padded = self.plan, -(-count // ROW) * ROW  # zeros after the last value change no sum
        values = self._wide[wide][:, :padded]
        if halves:
            self._load_halves(count, values.view(np.uint32))
        else:
            values[:, count:] = 0
            for into, given in zip(values, self._given(dtypes, count), strict=True):
                into[:count] = given
        total = values[plan.pivot]
        direct = self._direct_sum(values) if write and dtypes.out != "F64" else None
        for i in plan.others:
            np.subtract(total, values[i], out=values[i])
        products = [dot(values[i], values[j]) for i, j in plan.pairs]
        held = products or [dot(total, total)]
        if not careful and not all(map(math.isfinite, held)):
            return None
        if not write:
            return products, b""
        if direct is None:
            self._sum(values)
        else:
            total = self._keep_zeros(direct, values)
        safe = plan.mean and all(map(math.isfinite, held)) and set(dtypes.members) == {dtypes.out}
        if not safe:  # a small sum of squares proves that all values are finite; otherwise each is checked
            square = dot(total, total)
            safe = math.isfinite(square) and square <= LARGEST[dtypes.out] * LARGEST[dtypes.out]
        out = self._join(total, values[plan.pivot])[:count] if halves else narrow(total[:count], dtypes.out)
        if not safe:
            check_finite(widen(out, dtypes.out), None)
        return products, out.view(np.uint8).data

    def _load_halves(self, count: int, bits: Array) -> None:
        """Widen bfloat16 values into `bits` (members, padded): the even elements, then the odd ones."""
        padded = bits.shape[1]
        self._raw[:, 2 * count : 2 * padded] = 0
        pairs = self._raw[:, : 2 * padded].view("<u4")
        np.left_shift(pairs, 16, out=bits[:, : padded // 2])
        np.bitwise_and(pairs, UPPER, out=bits[:, padded // 2 :])

    def _given(self, dtypes: BlockDtypes, count: int) -> Iterator[Array]:
        """Yield the values of each member, widened to float32 or float64."""
        for row, dtype in zip(self._raw, dtypes.members, strict=True):
            yield widen(row[: count * BITS[dtype] // 8].view(DTYPES[dtype]), dtype)

    def _sum(self, values: Array) -> None:
        """Compute the sum in the pivot's row. Subtracting zeros keeps the sign of −0.0; adding does not."""
        plan, total = self.plan, values[self.plan.pivot]
        assert plan.weights is not None
        if abs(plan.sum - 1) > 1e-6:
            np.multiply(total, values.dtype.type(plan.sum), out=total)
        for i in plan.others:
            if plan.weights[i] != 0 and values[i].any():  # skips equal members, so that zeros keep their sign
                np.multiply(values[i], values.dtype.type(plan.weights[i]), out=values[i])
                np.subtract(total, values[i], out=total)

    def _direct_sum(self, values: Array) -> Array:
        """Σ w_i x_i in float64, in the order of the members. `values` is not changed."""
        assert self.plan.weights is not None
        total, term = self._direct[:, : values.shape[1]]
        np.multiply(values[0], self.plan.weights[0], out=total, dtype=np.float64)
        for row, weight in zip(values[1:], self.plan.weights[1:], strict=True):
            np.add(total, np.multiply(row, weight, out=term, dtype=np.float64), out=total)
        return total

    def _keep_zeros(self, total: Array, values: Array) -> Array:
        """Where all members are 0, use the pivot's 0.0 or −0.0. values: the pivot and its differences."""
        if not self.plan.mean:
            zeros = np.flatnonzero(total == 0)
            same = zeros[(values[:, zeros] == 0).all(0)]
            total[same] = values[self.plan.pivot, same]
        return total

    def _join(self, total: Array, wide: Array) -> Array:
        """Round even and odd elements to bfloat16 and join them.

        Overwrites `total` and `wide`, a row of float32. Rounds to float32, towards zero, with the last bit set if that
        is not exact (round to odd); then to 16 bits, to nearest, ties to even: bits + 0x7FFF + (the last kept bit).
        """
        long, rest = total.view(np.uint64), self._direct[1, : len(total)].view(np.uint64)
        np.bitwise_and(long, DROPPED, out=rest)
        np.add(rest, DROPPED, out=rest)  # carries into the last bit that is kept
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


def check_finite(values: Array, member: int | None) -> None:
    """Raise NotFinite for the first value that is not finite."""
    finite = np.isfinite(values)
    if not finite.all():
        raise NotFinite(member, int(np.argmin(finite)))


def dot(one: Array, other: Array) -> float:
    """⟨one, other⟩: rows of ROW elements are multiplied in the arrays' dtype, and added up in float64."""
    return float(np.vecdot(one.reshape(-1, ROW), other.reshape(-1, ROW)).sum(dtype=np.float64))
