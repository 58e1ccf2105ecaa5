"""Soup strategies: the members and the weights that were asked for → the weights of the soup.

linear and slerp are closed forms. greedy and learned (Wortsman et al., 2022, "Model soups", Recipe 1 and appendix on learned soups)
look for weights by a measure on held-out data, which is passed in: nothing here knows of models or data.
"I want to add a strategy" is a function here and a row in STRATEGIES.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from salsa_peft.utils.errors import require

if TYPE_CHECKING:
    import torch


class Measure(Protocol):
    """How good a point between the members is on held-out data: weights (n,) → a number, higher is better."""

    def __call__(self, weights: Sequence[float]) -> float: ...

    def gradient(self, weights: Sequence[float]) -> tuple[float, list[float]]:
        """The measure and its derivative by each weight. Raises SalsaError where it has none."""


class Ask(NamedTuple):
    """What a strategy is given."""

    weights: list[float]
    """One for each member, as asked for, or uniform."""
    gram: Callable[[], torch.Tensor]
    """⟨δ_i, δ_j⟩ of the members' task vectors δ (what was added to the base): (n, n), float64."""
    measure: Measure | None
    steps: int
    """Of learned."""
    learning_rate: float
    """Of learned: Adam's, of the logits of the weights."""


class Choice(NamedTuple):
    """The soup's weights, and what was tried on the way with what it measured."""

    weights: list[float]
    tried: list[dict[str, Any]]


def linear(ask: Ask) -> Choice:
    """The weighted mean: the weights that were asked for."""
    return Choice(ask.weights, [])


def slerp(ask: Ask) -> Choice:
    """The point of the great circle between two task vectors: sin((1−t)ω)/sin ω · δ_0 + sin(tω)/sin ω · δ_1, where ω is their angle,
    all tensors as one vector, and t the second weight. Its norm does not sink between members that differ; the weights sum to more
    than 1. Vectors of one direction: linear. Raises SalsaError for other than two members, a zero task vector or opposite ones."""
    n = len(ask.weights)
    require(n == 2, f"strategy slerp: found {n} members, expected two; average more of them with linear")
    gram = ask.gram()
    norms = [math.sqrt(max(float(gram[i, i]), 0.0)) for i in range(2)]
    require(
        min(norms) > 0,
        "strategy slerp: found a member that adds nothing to the base, which has no direction; use linear",
    )
    cosine = min(1.0, max(-1.0, float(gram[0, 1]) / (norms[0] * norms[1])))
    require(
        cosine > -1 + 1e-6, "strategy slerp: found opposite members, between which no path is the shortest; use linear"
    )
    angle, t = math.acos(cosine), ask.weights[1]
    if angle < 1e-4:  # there sin((1−t)ω)/sin ω is 1 − t to eight digits
        return Choice([1 - t, t], [])
    weights = [math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)]
    return Choice(weights, [{"angle_degrees": math.degrees(angle)}])


def greedy(ask: Ask) -> Choice:
    """Members in the order of their own measure; each joins the uniform mean if that does not fall (Wortsman et al., Recipe 1)."""
    measure, n = _measure(ask, "greedy"), len(ask.weights)
    tried: list[dict[str, Any]] = []

    def look(members: Sequence[int]) -> float:
        weights = [1 / len(members) if i in members else 0.0 for i in range(n)]
        tried.append({"weights": weights, "measure": _finite(measure(weights), weights)})
        return float(tried[-1]["measure"])

    alone = [look([i]) for i in range(n)]
    order = sorted(range(n), key=lambda i: -alone[i])
    chosen, best = order[:1], alone[order[0]]
    for i in order[1:]:
        found = look([*chosen, i])
        if found >= best:
            chosen, best = [*chosen, i], found
    return Choice([1 / len(chosen) if i in chosen else 0.0 for i in range(n)], tried)


def learned(ask: Ask) -> Choice:
    """Adam's ascent of the measure over n logits, whose softmax are the weights; the best point met is taken.

    Starts from the weights asked for, which must be above 0. The members' tensors are not trained: n scalars are.
    """
    import torch

    measure = _measure(ask, "learned")
    require(
        min(ask.weights) > 0,
        f"strategy learned: found weights {ask.weights} to start from, expected each above 0; leave them out for uniform ones",
    )
    logits = torch.tensor(ask.weights, dtype=torch.float64).log().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=ask.learning_rate)
    tried: list[dict[str, Any]] = []
    for step in range(ask.steps + 1):
        weights = logits.softmax(0)
        given = weights.tolist()
        if step == ask.steps:  # where the last step led
            tried.append({"weights": given, "measure": _finite(measure(given), given)})
            break
        value, slope = measure.gradient(given)
        tried.append({"weights": given, "measure": _finite(value, given)})
        optimizer.zero_grad()
        weights.backward(-torch.tensor(slope, dtype=torch.float64))
        optimizer.step()
    return Choice(max(tried, key=lambda point: point["measure"])["weights"], tried)


def _measure(ask: Ask, strategy: str) -> Measure:
    require(
        ask.measure is not None, f"strategy {strategy}: found no measure, expected one of held-out data to choose by"
    )
    assert ask.measure is not None
    return ask.measure


def _finite(value: float, weights: Sequence[float]) -> float:
    shown = ", ".join(f"{weight:g}" for weight in weights)
    require(math.isfinite(value), f"measure: found {value} at weights {shown}, expected a finite number")
    return float(value)


STRATEGIES: dict[str, Callable[[Ask], Choice]] = {
    "linear": linear,
    "slerp": slerp,
    "greedy": greedy,
    "learned": learned,
}
