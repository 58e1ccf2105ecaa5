"""The arithmetic of soup/checkpoints/arithmetic.py on a GPU, with torch: the same sums, a large block at a time.

Only the order of additions within a product differs, so distances agree to float32's digits; the sums are rounded as a CPU rounds them
but where the GPU fuses a multiplication and an addition in float64.
"""

from __future__ import annotations

import math

import torch

from salsa_peft.soup.checkpoints.arithmetic import Fault, Kind, Plan
from salsa_peft.utils.safetensors_io import BITS, NAMES, Buffer


class TorchSums:
    """arithmetic.Summing on a torch device. `block`: elements at most."""

    def __init__(self, plan: Plan, block: int, device: str) -> None:
        self.plan, self.device = plan, device
        self._raw = [torch.empty(block * 8, dtype=torch.uint8) for _ in range(plan.members)]
        self.raw = [row.numpy().data for row in self._raw]

    def add(self, kind: Kind, count: int, write: bool) -> tuple[list[float], Buffer]:
        """As Summing says."""
        given = [
            row[: count * BITS[dtype] // 8].view(getattr(torch, NAMES[dtype])).to(self.device)
            for row, dtype in zip(self._raw, kind.members, strict=True)
        ]
        total, differences, products = self._differences(given, torch.float32 if kind.narrow else torch.float64)
        held = [*products.values()] or [_dot(total, total)]
        if not all(map(math.isfinite, held)):
            for i, values in enumerate(given):
                _check(values, i)
            # the squares, or the differences themselves, pass float32's range
            total, differences, products = self._differences(given, torch.float64)
        if not write:
            return list(products.values()), b""
        if kind.out == "F64":
            found = self._sum(total, differences, products)
        else:
            found = self._direct(given)
            zero = (found == 0) & (total == 0)  # of equal members, whatever the signs of the weights
            found = torch.where(zero, total.to(found), found)
            found = found if kind.out == "F32" else _round_to_odd(found)
        out = found.to(getattr(torch, NAMES[kind.out]))
        _check(out, None)
        return list(products.values()), out.cpu().view(torch.uint8).numpy().data

    def _differences(
        self, given: list[torch.Tensor], wide: torch.dtype
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor], dict[tuple[int, int], float]]:
        """The pivot's values, the pivot's minus each other member's, and the products of these."""
        total = given[self.plan.pivot].to(wide, copy=True)
        differences = {i: total - given[i].to(wide) for i in self.plan.others}
        return total, differences, {(i, j): _dot(differences[i], differences[j]) for i, j in self.plan.pairs}

    def _sum(
        self, total: torch.Tensor, differences: dict[int, torch.Tensor], products: dict[tuple[int, int], float]
    ) -> torch.Tensor:
        assert self.plan.weights is not None
        if abs(self.plan.sum - 1) > 1e-6:
            total.mul_(self.plan.sum)
        for i, difference in differences.items():
            # where members are equal nothing is done, whatever the weight's sign; a small difference's square may be 0
            if self.plan.weights[i] != 0 and (products[i, i] != 0 or bool(difference.any())):
                total.sub_(difference, alpha=self.plan.weights[i])
        return total

    def _direct(self, given: list[torch.Tensor]) -> torch.Tensor:
        """Σ w_i x_i in the members' order, in float64."""
        assert self.plan.weights is not None
        total = given[0].to(torch.float64) * self.plan.weights[0]
        for values, weight in zip(given[1:], self.plan.weights[1:], strict=True):
            total += values.to(torch.float64) * weight
        return total


def _round_to_odd(values: torch.Tensor) -> torch.Tensor:
    """float64 → float32 as arrays.round_to_odd has it, since torch rounds float64 to 16 bits by way of float32, that is twice."""
    found = values.float()
    back, bits = found.double(), found.view(torch.int32)
    bits -= (back.abs() > values.abs()).int()
    bits |= (back != values).int()
    return found


def _dot(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(torch.dot(one, other))


def _check(values: torch.Tensor, member: int | None) -> None:
    """Raise Fault for the first value that is not finite."""
    wrong = ~values.isfinite()
    if bool(wrong.any()):
        raise Fault(member, int(wrong.nonzero()[0]))
