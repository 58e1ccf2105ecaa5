"""Strategies that drop a part of the elements of dense task vectors: ties and dare, by PEFT's functions.

Their result is no weighted sum of the members, so an adapter's deltas are computed as full matrices, never as A and B
apart, merged, and reduced to a rank by the SVD. Every module, or tensor of a checkpoint, is merged alone.
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

DENSITY = {"ties": 0.2, "dare": 0.1}
"""Share of the elements that is kept by default: the top 20% (Yadav et al., 2023), a random 10% (Yu et al., 2024)."""


def ties(deltas: list[Tensor], weights: Tensor, density: float) -> Tensor:
    """TIES (Yadav et al., 2023): keep the largest elements, elect a sign, average the members that have this sign.

    For uniform weights this is the paper's disjoint mean; other weights multiply a member's elements by n · w_i.
    """
    from peft.utils.merge_utils import ties as merge

    return merge(deltas, weights * len(weights), density)


def dare(deltas: list[Tensor], weights: Tensor, density: float) -> Tensor:
    """DARE (Yu et al., 2024): drop elements at random, divide the rest by `density`, and take the weighted sum."""
    from peft.utils.merge_utils import dare_linear as merge

    return merge(deltas, weights, density)


ELEMENTWISE: dict[str, Callable[[list[Tensor], Tensor, float], Tensor]] = {"ties": ties, "dare": dare}


class Elementwise(NamedTuple):
    """An element-wise strategy with its options."""

    strategy: str
    weights: list[float]
    """One per member."""
    scale: float
    """Factor of the merged change."""
    density: float
    """Share of the elements that is kept, above 0."""
    seed: int
    """Seed of the random choice in dare. Each layer draws from a generator of its own."""
    has_start: bool
    """Whether the start is one more entry of the values; otherwise it is zero."""

    def __call__(self, layer: str, values: Sequence[Tensor]) -> Tensor:
        """start + scale · merge(values_i − start), in float64.

        values: those of the members and, with `has_start`, of the start.
        """
        import torch

        n = len(self.weights)
        start = values[n].double() if self.has_start else torch.zeros_like(values[0], dtype=torch.float64)
        deltas = [value.double() - start for value in values[:n]]
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # PEFT's about a density of 1, which keeps all elements
            torch.manual_seed(zlib.crc32(f"{self.seed} {layer}".encode()))
            merged = ELEMENTWISE[self.strategy](deltas, torch.tensor(self.weights, dtype=torch.float64), self.density)
        return start + self.scale * merged
