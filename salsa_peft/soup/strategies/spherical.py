"""Strategies that read the angles between task vectors: slerp, karcher and model_stock.

A task vector δ_i is a member's change from the start. All three results lie in the span of the task vectors, so that
each is a weighted sum whose weights follow from the Gram matrix ⟨δ_i, δ_j⟩, for the whole model or for each layer.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from salsa_peft.soup.arrays import Array
from salsa_peft.soup.strategies.given import Choice, NoDirection, StrategyInput
from salsa_peft.utils.errors import require

PARALLEL = 1e-4
"""Angle (radians) below which sin((1−t)ω)/sin ω is taken as 1 − t, which it equals to eight digits."""
ITERATIONS = 1000
"""Most iterations of the Karcher mean; task vectors within a half sphere need fewer than 50."""


def slerp(given: StrategyInput) -> Choice:
    """Spherical interpolation of two task vectors: (sin((1−t)ω) δ_0 + sin(tω) δ_1) / sin ω, ω their angle.

    More members are merged one after the other, as in WARP (Ramé et al., 2024): member m into the result so far, with t
    = w_m / Σ_{j≤m} w_j, which is 1/m for uniform weights. Vectors of the same norm keep it, unlike in their mean. For 0
    < t < 1 the weights sum to more than 1. Vectors of the same direction are averaged linearly. Raises NoDirection for
    zero or opposite task vectors.
    """
    gram, n = np.asarray(given.gram(), np.float64), len(given.weights)
    require(n >= 2, f"strategy slerp: there is {n} member, but slerp needs at least two; use strategy linear")
    check_norms(gram, "slerp")
    merged, total = np.eye(n)[0], given.weights[0]
    tried: list[dict[str, Any]] = []
    for m in range(1, n):
        total += given.weights[m]
        require(
            abs(total) > 1e-12,
            f"strategy slerp: the first {m + 1} weights, {given.weights[: m + 1]}, sum to 0; change their order or one"
            " of them",
        )
        norms = [math.sqrt(max(float(merged @ gram @ merged), 0.0)), math.sqrt(gram[m, m])]
        angle, t = angle_of(float(merged @ gram[m]), norms, "slerp"), given.weights[m] / total
        if angle < PARALLEL:
            shares = (1 - t, t)
        else:
            shares = (math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle))
            tried.append({"angle_degrees": math.degrees(angle)})
        merged = shares[0] * merged + shares[1] * np.eye(n)[m]
    return Choice(merged.tolist(), tried)


def karcher(given: StrategyInput) -> Choice:
    """The Karcher mean of the task vectors' directions on the unit sphere, times the mean of their norms.

    The mean m minimizes Σ w_i ω_i², ω_i the angle between m and δ_i. It is the fixed point of m ← exp_m(Σ w_i
    log_m(δ_i / ‖δ_i‖)), iterated in coordinates of the span. The norm is Σ w_i ‖δ_i‖. Raises NoDirection for a zero
    task vector, and for directions that cancel.
    """
    gram, weights = np.asarray(given.gram(), np.float64), np.array(given.weights)
    require(
        bool((weights >= 0).all()) and weights.sum() > 0,
        f"strategy karcher: the weights {given.weights} must be at least 0, and one of them above 0; change them",
    )
    norms, shares = check_norms(gram, "karcher"), weights / weights.sum()
    values, vectors = np.linalg.eigh(gram / np.outer(norms, norms))
    points = vectors * np.sqrt(values.clip(0))  # row i has the coordinates of member i's direction in the span
    at = shares.copy()
    for _ in range(ITERATIONS):
        length = float(np.linalg.norm(at @ points))
        if length < 1e-6:
            break
        at = at / length
        cosines = (points @ (at @ points)).clip(-1, 1)
        angles = np.arccos(cosines)
        pulls = shares / np.sinc(angles / math.pi).clip(1e-12)  # w_i ω_i / sin ω_i
        step = pulls - at * (pulls @ cosines)  # the coefficients of Σ w_i log_m(δ_i / ‖δ_i‖)
        length = float(np.linalg.norm(step @ points))
        at = math.cos(length) * at + np.sinc(length / math.pi) * step
        if length < 1e-12:
            return Choice((at * (shares @ norms) / norms).tolist(), [])
    raise NoDirection(
        "strategy karcher: the members' changes have no unique mean direction, as they point in opposite directions;"
        " use linear"
    )


def model_stock(given: StrategyInput) -> Choice:
    """Model stock (Jang et al., 2024): t times the mean of the task vectors, t = N cos θ / (1 + (N − 1) cos θ).

    cos θ is the mean cosine of the pairs, and t = 0 if it is negative: the task vectors then share nothing. Raises
    NoDirection for a zero task vector.
    """
    n = len(given.weights)
    require(n >= 2, f"strategy model_stock: there is {n} member, but model_stock needs at least two; use linear")
    require(
        max(given.weights) - min(given.weights) <= 1e-9,
        f"strategy model_stock chooses the weights itself; leave out the weights {given.weights}",
    )
    gram = np.asarray(given.gram(), np.float64)
    norms = check_norms(gram, "model_stock")
    cosine = max(float((gram / np.outer(norms, norms))[~np.eye(n, dtype=bool)].mean()), 0.0)
    t = n * cosine / (1 + (n - 1) * cosine)
    return Choice([t / n] * n, [{"cosine": cosine, "t": t}])


def check_norms(gram: Array, strategy: str) -> Array:
    """The norms of the task vectors. Raises NoDirection if one is zero."""
    norms: Array = np.sqrt(gram.diagonal().clip(0))
    if not norms.min() > 0:
        raise NoDirection(
            f"strategy {strategy}: a member equals the base or start, so its change has no direction; use linear"
        )
    return norms


def angle_of(product: float, norms: list[float], strategy: str) -> float:
    """The angle (radians) of two vectors. Raises NoDirection for opposite vectors, or if one has vanished."""
    cosine = product / (norms[0] * norms[1]) if norms[0] > 0 else -1.0
    if not cosine > -1 + 1e-6:
        raise NoDirection(
            f"strategy {strategy}: the members change the base or start in opposite directions, so there is no shortest"
            " path; use linear"
        )
    return math.acos(min(1.0, cosine))
