"""What a soup of adapters is, in figures: norms, distances and cosines of the deltas, what recompression and rounding changed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np

from salsa_peft.soup.arrays import Array
from salsa_peft.soup.lora.tensors import Member


@dataclass
class Tally:
    """What is found out of the deltas on the way to the file."""

    gram: Array
    """⟨delta_i, delta_j⟩ summed over modules: (n, n)."""
    norms: dict[str, float] = field(default_factory=dict)
    """Module → squared norm of the soup's delta."""
    lost: dict[str, float] = field(default_factory=dict)
    """Module → squared norm of what recompression cut off."""
    rounding: float = 0.0
    """Squared norm of what rounding to the file's dtype changed."""


def relative(part: float, whole: float) -> float:
    """Of two squared norms."""
    return math.sqrt(part / whole) if whole > 0 else 0.0


def errors(tally: Tally) -> dict[str, Any]:
    """Relative Frobenius error of recompression: of all modules as one vector, of the worst, of each."""
    layers = {module: relative(tally.lost.get(module, 0.0), norm) for module, norm in tally.norms.items()}
    worst = max(layers, key=lambda module: layers[module])
    whole = relative(sum(tally.lost.values()), sum(tally.norms.values()))
    return {"all": whole, "worst": {"module": worst, "error": layers[worst]}, "layers": layers}


def summarise(members: Sequence[Member], weights: Sequence[float], gram: Array,
              ranks: dict[str, int]) -> dict[str, Any]:  # fmt: skip
    """Norms, distances and cosines of the members' deltas, all modules as one vector; a zero one has no cosine."""
    listed = [
        {
            "ranks": sorted(set(member.ranks.values())),
            "modules": len(member.ranks),
            "rslora": member.config["use_rslora"],
        }
        for member in members
    ]
    found = figures_of([member.name for member in members], weights, gram, listed)
    averaged = sorted({name for member in members for name in member.direct})
    return found | {"modules": len(ranks), "ranks": sorted(set(ranks.values())), "averaged": averaged}


def figures_of(
    names: Sequence[str], weights: Sequence[float], gram: Array, members: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """The same by the members' names and products; `members` is what else is said of each."""
    norms = [math.sqrt(max(gram[i, i], 0.0)) for i in range(len(names))]
    listed = [
        {"name": name, "weight": float(weight), **more, "norm": norm}
        for name, weight, more, norm in zip(names, weights, members, norms, strict=True)
    ]
    pairs = [
        {
            "a": names[i],
            "b": names[j],
            "distance": math.sqrt(max(gram[i, i] + gram[j, j] - 2 * gram[i, j], 0.0)),
            "cosine": float(gram[i, j]) / (norms[i] * norms[j]) if norms[i] * norms[j] else None,
        }
        for i, j in combinations(range(len(names)), 2)
    ]
    norm = math.sqrt(max(float(np.array(weights) @ gram @ np.array(weights)), 0.0))
    return {"weights": [float(weight) for weight in weights], "members": listed, "pairs": pairs, "norm": norm}
