"""Strategies that maximize a measure on held-out data: greedy and learned.

Both are of Wortsman et al. (2022), "Model soups": Recipe 1, and the appendix on learned soups. The caller passes the
measure: this module reads no model and no data.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from salsa_peft.soup.strategies.given import Choice, Measure, StrategyInput
from salsa_peft.utils.errors import SalsaError, require


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
