"""Choose a soup's weights for the whole model or for each layer, from a start and with a scale.

    θ = θ_start + scale · Σ_i w_i (θ_i − θ_start) = Σ_i scale · w_i · θ_i + (1 − scale · Σ_i w_i) · θ_start

So the start is one more member. A scale below 1 is the interpolation towards the initialization (LITI) of WARP.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from salsa_peft.soup.arrays import Array
from salsa_peft.soup.strategies import STRATEGIES
from salsa_peft.soup.strategies.elementwise import ELEMENTWISE
from salsa_peft.soup.strategies.given import Choice, NoDirection, StrategyInput

if TYPE_CHECKING:
    from salsa_peft.soup.options import Options

Grams = Callable[[], Mapping[str, Array]]
"""Returns layer → ⟨δ_i, δ_j⟩ of the members' changes from the start: (n, n), float64."""
ROUNDING = 1e-14
"""Squared norm of a change, as a share of the squared norms of its ends, that counts as zero: float32's rounding."""


def choose(options: Options, weights: list[float], grams: Grams) -> Choice:
    """Apply a strategy to the whole model, or (per: layer) to each layer with the layer's own angles.

    Element-wise strategies use the requested weights. In a layer where a member has no change, or where the changes cancel, the requested weights are used. Raises
    NoDirection if that is so for the whole model.
    """
    strategy = STRATEGIES["linear" if options.strategy in ELEMENTWISE else options.strategy]

    def given(gram: Callable[[], Any]) -> StrategyInput:
        return StrategyInput(weights, gram, options.measure, options.steps, options.step_size)

    if options.per == "model":
        return strategy(given(lambda: sum(grams().values())))
    layers: dict[str, list[float]] = {}
    averaged: list[str] = []
    for name, gram in grams().items():
        try:
            layers[name] = strategy(given(partial(np.asarray, gram))).weights
        except NoDirection:
            layers[name] = weights
            averaged.append(name)
    return Choice(_mean(layers), [{"averaged_linearly": averaged}] if averaged else [], layers)


def scaled(choice: Choice, scale: float, has_start: bool) -> Choice:
    """Multiply the weights by `scale`, and add the weight of the start as the last one if `has_start`."""

    def own(weights: list[float]) -> list[float]:
        found = [scale * weight for weight in weights]
        rest = 1 - math.fsum(found)
        return [*found, 0.0 if abs(rest) < 1e-9 else rest] if has_start else found

    if choice.layers is None:
        return choice._replace(weights=own(choice.weights))
    layers = {name: own(weights) for name, weights in choice.layers.items()}
    return choice._replace(weights=_mean(layers), layers=layers)


def changes_from_last(gram: Array) -> Array:
    """⟨θ_i − s, θ_j − s⟩ from the Gram matrix of the members' θ_i and, as the last row, the start s."""
    to_start = gram[:-1, -1]
    changes: Array = gram[:-1, :-1] - to_start[:, None] - to_start[None, :] + gram[-1, -1]
    none = changes.diagonal() <= ROUNDING * (gram.diagonal()[:-1] + gram[-1, -1])
    changes[none] = changes[:, none] = 0.0
    return changes


def _mean(layers: Mapping[str, list[float]]) -> list[float]:
    return [float(mean) for mean in np.mean(list(layers.values()), axis=0)]
