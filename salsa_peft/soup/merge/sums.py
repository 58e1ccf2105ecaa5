"""Sums of merged adapters, and their statistics: norms, inner products and the change by rounding."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from salsa_peft.utils.errors import require

ELEMENTS = 2**20
"""Number of elements of a parameter that are added at once."""


class Figures:
    """Statistics of a merge, summed over the parameters that were merged."""

    def __init__(self, members: int) -> None:
        self.lost = self.delta = 0.0
        """Squared norms: of the change by rounding (lost), and of Σ w_i δ_i (delta)."""
        self.gram = torch.zeros(members, members, dtype=torch.float64)
        """⟨δ_i, δ_j⟩, with all parameters as one vector."""

    def add(self, other: Figures) -> None:
        """Add the statistics of further parameters."""
        self.lost, self.delta = self.lost + other.lost, self.delta + other.delta
        self.gram += other.gram

    def add_products(self, deltas: Sequence[torch.Tensor | None]) -> None:
        """Add the inner products ⟨δ_i, δ_j⟩ over some elements; None is a member without a delta."""
        for i, one in enumerate(deltas):
            for j, other in enumerate(deltas[: i + 1]):
                if one is not None and other is not None:
                    product = float(torch.dot(one, other))
                    self.gram[i, j] += product
                    if i != j:
                        self.gram[j, i] += product


def add_deltas(
    start: torch.Tensor, merged: Sequence[torch.Tensor | None], weights: Sequence[float], dtype: torch.dtype, figures: Figures, what: str
) -> torch.Tensor:  # fmt: skip
    """start + Σ w_i (merged_i − start) of one parameter, computed in float64 and rounded once to `dtype`.

    merged: None for a member that does not change the parameter. what: text that names the parameter in an error.
    """
    result = torch.empty(start.shape, dtype=dtype)
    flat = [None if value is None else value.reshape(-1) for value in merged]
    for begin in range(0, start.numel(), ELEMENTS):
        piece = slice(begin, begin + ELEMENTS)
        base = start.reshape(-1)[piece].double()
        deltas = [None if value is None else value[piece].double() - base for value in flat]
        total = torch.zeros_like(base)
        for weight, delta in zip(weights, deltas, strict=True):
            if delta is not None:
                total.add_(delta, alpha=weight)
        result.view(-1)[piece] = rounded(base, total, dtype, figures, what)
        figures.add_products(deltas)
    return result


def rounded(base: torch.Tensor, total: torch.Tensor, dtype: torch.dtype, figures: Figures, what: str) -> torch.Tensor:
    """Round base + total to `dtype`. Raises SalsaError if a value is not finite."""
    merged = (base + total).to(dtype)
    lost = float(torch.linalg.vector_norm((merged.to(base.dtype) - base).sub_(total)))
    require(
        math.isfinite(lost),
        f"{what} is not finite after the merge: the base or an adapter has values that are not finite, or the sum has"
        f" values that {str(dtype).removeprefix('torch.')} cannot hold; use other members or smaller weights",
    )
    figures.lost += lost**2
    figures.delta += float(torch.linalg.vector_norm(total)) ** 2
    return merged
