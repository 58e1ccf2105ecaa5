"""Strategies, which choose the weights of a soup from the requested weights and the members.

linear and slerp are closed forms. greedy and learned (Wortsman et al., 2022, "Model soups", Recipe 1 and the appendix
on learned soups) maximize a measure on held-out data, which the caller passes: this module reads no model and no data.
To add a strategy, write a function here and add an entry to STRATEGIES.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from salsa_peft.utils.errors import SalsaError, require

if TYPE_CHECKING:
    import torch


class Measure(Protocol):
    """Quality of a soup on held-out data as a function of its n weights; higher is better."""

    def __call__(self, weights: Sequence[float]) -> float: ...

    def gradient(self, weights: Sequence[float]) -> tuple[float, list[float]]:
        """The measure and its derivative by each weight. Raises SalsaError if the measure has no gradient."""


class StrategyInput(NamedTuple):
    """The arguments of a strategy."""

    weights: list[float]
    """The requested weight of each member, by default uniform."""
    gram: Callable[[], torch.Tensor]
    """Returns ⟨δ_i, δ_j⟩ as (n, n), float64. δ_i is member i's task vector (its change from the base)."""
    measure: Measure | None
    steps: int
    """Number of Adam steps of the strategy `learned`."""
    learning_rate: float
    """Adam's learning rate for the logits of the weights, in the strategy `learned`."""


class Choice(NamedTuple):
    """The weights of the soup, and the tried weights with their measures (for slerp, the angle)."""

    weights: list[float]
    tried: list[dict[str, Any]]


def linear(given: StrategyInput) -> Choice:
    """Use the requested weights: the soup is the weighted mean."""
    return Choice(given.weights, [])


def slerp(given: StrategyInput) -> Choice:
    """Spherical interpolation of two task vectors: (sin((1−t)ω) δ_0 + sin(tω) δ_1) / sin ω, ω their angle.

    All tensors count as one vector, and t is the second weight. If both vectors have the same norm, the result has that
    norm too, unlike their mean. For 0 < t < 1, the weights sum to more than 1. Vectors of the same direction are
    averaged linearly. Raises SalsaError unless there are two members, and for zero or opposite task vectors.
    """
    n = len(given.weights)
    require(n == 2, f"strategy slerp: there are {n} members, but slerp needs exactly two; use strategy linear")
    gram = given.gram()
    norms = [math.sqrt(max(float(gram[i, i]), 0.0)) for i in range(2)]
    require(min(norms) > 0, "strategy slerp: a member equals the base, so its change has no direction; use linear")
    cosine = min(1.0, max(-1.0, float(gram[0, 1]) / (norms[0] * norms[1])))
    require(
        cosine > -1 + 1e-6,
        "strategy slerp: the members change the base in opposite directions, so there is no shortest path; use linear",
    )
    angle, t = math.acos(cosine), given.weights[1]
    if angle < 1e-4:  # here sin((1−t)ω)/sin ω equals 1 − t to eight digits
        return Choice([1 - t, t], [])
    weights = [math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)]
    return Choice(weights, [{"angle_degrees": math.degrees(angle)}])


def greedy(given: StrategyInput) -> Choice:
    """Add to a uniform mean, best member first, each member that does not lower the measure (Recipe 1)."""
    measure, n = _measure(given, "greedy"), len(given.weights)
    tried: list[dict[str, Any]] = []

    def evaluate(members: Sequence[int]) -> float:
        weights = [1 / len(members) if i in members else 0.0 for i in range(n)]
        tried.append({"weights": weights, "measure": _finite(measure(weights), weights)})
        return float(tried[-1]["measure"])

    alone = [evaluate([i]) for i in range(n)]
    order = sorted(range(n), key=lambda i: -alone[i])
    chosen, best = order[:1], alone[order[0]]
    for i in order[1:]:
        value = evaluate([*chosen, i])
        if value >= best:
            chosen, best = [*chosen, i], value
    return Choice([1 / len(chosen) if i in chosen else 0.0 for i in range(n)], tried)


def learned(given: StrategyInput) -> Choice:
    """Maximize the measure with Adam over logits of the weights. The best weights of all steps are used.

    Adam starts from the requested weights, which must be positive. The members' tensors are not trained.
    """
    import torch

    measure = _measure(given, "learned")
    require(
        min(given.weights) > 0,
        f"strategy learned: the weights to start from, {given.weights}, must all be above 0; leave them out to start"
        " from uniform weights",
    )
    logits = torch.tensor(given.weights, dtype=torch.float64).log().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=given.learning_rate)
    tried: list[dict[str, Any]] = []
    for _ in range(given.steps):
        weights = logits.softmax(0)
        point = weights.tolist()
        value, slopes = measure.gradient(point)
        tried.append({"weights": point, "measure": _finite(value, point)})
        optimizer.zero_grad()
        weights.backward(-torch.tensor(slopes, dtype=torch.float64))
        optimizer.step()
    point = logits.softmax(0).tolist()
    tried.append({"weights": point, "measure": _finite(measure(point), point)})
    return Choice(max(tried, key=lambda point: point["measure"])["weights"], tried)


def _measure(given: StrategyInput, strategy: str) -> Measure:
    if given.measure is None:
        raise SalsaError(f"strategy {strategy}: a measure on held-out data is required; pass measure (--measure)")
    return given.measure


def _finite(value: float, weights: Sequence[float]) -> float:
    shown = ", ".join(f"{weight:g}" for weight in weights)
    require(
        math.isfinite(value),
        f"measure: the value at the weights {shown} is {value}, but a measure must return finite numbers",
    )
    return float(value)


STRATEGIES: dict[str, Callable[[StrategyInput], Choice]] = {
    "linear": linear,
    "slerp": slerp,
    "greedy": greedy,
    "learned": learned,
}
