"""What a strategy gets and returns: weights, Gram matrix, measure; and the error for deltas without a direction."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from salsa_peft.utils.errors import SalsaError


class NoDirection(SalsaError):
    """A strategy on the sphere met deltas that have no direction or cancel; a single layer is then averaged linearly."""


class Measure(Protocol):
    """Quality of a soup on held-out data as a function of its n weights; higher is better."""

    def __call__(self, weights: Sequence[float]) -> float: ...

    def gradient(self, weights: Sequence[float]) -> tuple[float, list[float]]:
        """The measure and its derivative by each weight. Raises SalsaError if the measure has no gradient."""


class StrategyInput(NamedTuple):
    """The arguments of a strategy."""

    weights: list[float]
    """The requested weight of each member, by default uniform."""
    gram: Callable[[], Any]
    """Returns ⟨δ_i, δ_j⟩ as (n, n), float64. δ_i is member i's task vector (its change from the start)."""
    measure: Measure | None
    steps: int
    """Number of Adam steps of the strategy `learned`."""
    learning_rate: float
    """Adam's learning rate for the logits of the weights, in the strategy `learned`."""


class Choice(NamedTuple):
    """The weights of the soup, and the tried weights with their measures (for slerp, the angles)."""

    weights: list[float]
    tried: list[dict[str, Any]]
    layers: Mapping[str, list[float]] | None = None
    """Layer → its own weights; None if all layers have `weights`, which are else the means over the layers."""
