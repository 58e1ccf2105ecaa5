"""The summary of a soup (soup.json): its types, and the statistics of the members' deltas."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, Literal, TypedDict

import numpy as np

from salsa_peft.soup.arrays import Array
from salsa_peft.soup.lora.tensors import Member


class Origin(TypedDict):
    """Where a folder came from."""

    source: str
    """The path or Hub id as given."""
    repository: str | None
    """The Hub repository, for a folder in the Hub's cache."""
    revision: str | None
    """The commit of that repository."""
    files: dict[str, dict[str, Any]]
    """Size and SHA-256 of configuration and weights; None for a hash that was not computed."""
    fingerprint: str | None
    """Checkpoints: fingerprints.base_fingerprint."""
    base_fingerprint: str | None
    """Fingerprint of the base that it was trained on, if its folder has one."""
    peft_version: str | None
    """Adapters: the PEFT version, if the configuration has it."""


class MemberOrigin(Origin):
    """Where a member came from."""

    name: str
    weight: float


class Provenance(TypedDict):
    """Where a soup came from."""

    salsa_peft: str
    """The version of this package."""
    members: list[MemberOrigin]
    base: Origin | None
    """The base, if the soup reads it."""


class MemberSummary(TypedDict, total=False):
    """Statistics of a member."""

    name: str
    weight: float
    norm: float | None
    """Norm of its delta; None if the base was not read."""
    ranks: list[int]
    """Adapters: the ranks of its modules."""
    modules: int
    rslora: bool
    folder: str
    """Checkpoints."""
    read: bool
    """Checkpoints: False for a member of weight 0, whose values are not read."""


class PairSummary(TypedDict):
    """Statistics of two members."""

    a: str
    b: str
    distance: float | None
    cosine: float | None
    """Cosine of their deltas; None if one is zero or the base was not read."""


class SoupSummary(TypedDict, total=False):
    """Statistics of a soup. `kind` is missing for adapters. A key of some kinds only names them first."""

    kind: Literal["merged", "checkpoints"]
    strategy: str
    weights: list[float]
    """The weights that the strategy chose."""
    asked: list[float]
    """The weights that were requested."""
    normalized: bool
    sum: float
    """Sum of the requested weights. If it is not 1, the result is a scaled delta, not a mean."""
    tried: list[dict[str, Any]]
    """Strategies that choose weights: the points that were tried, with their measures."""
    left_out: list[str]
    """Members of weight 0."""
    members: list[MemberSummary]
    pairs: list[PairSummary]
    norm: float | None
    """Norm of the soup's delta."""
    provenance: Provenance
    bytes: int
    seconds: float
    dtype: str
    rounding: float
    """‖change by rounding to the file's dtype‖ / ‖the soup's delta‖."""
    modules: int
    """Adapters, merged."""
    ranks: list[int]
    """Adapters, merged: Σ r_i of each module."""
    rank: int | None
    """Adapters: the rank that was requested."""
    error: dict[str, Any] | None
    """Adapters: the relative error of the recompression."""
    averaged: list[str]
    """Adapters: parameters that were averaged directly because they have no delta."""
    base: str
    """Merged: the base's folder."""
    replaced: list[str]
    """Merged: tensors of the base that members hold trained values of."""
    rows: int | None
    """Merged: rows of the embeddings, if tokens were added in training."""
    untied: bool
    """Merged: whether input and output embeddings were one tensor and are two now."""
    tokenizer: dict[str, Any] | str | None
    """Whose tokenizer and chat template the soup has; None: the base's, or no member has one."""
    chat_template: str | None
    """Checkpoints: whose chat template the soup has."""
    quantized_base: str | None
    """Merged: the quantization that the base was put through."""
    requantised: int
    dequantised: int
    tensors: int
    """Checkpoints."""
    parameters: int
    """Merged, checkpoints: in all tensors of the result."""
    dtypes: dict[str, int]
    """Checkpoints."""
    shards: int
    """Merged, checkpoints."""
    files: list[str]
    """Merged, checkpoints (only in soup.json)."""


@dataclass
class Totals:
    """Sums over modules that are collected while the soup is written."""

    gram: Array
    """⟨delta_i, delta_j⟩ of the members: (n, n)."""
    norms: dict[str, float] = field(default_factory=dict)
    """Module → squared norm of the soup's delta."""
    lost: dict[str, float] = field(default_factory=dict)
    """Module → squared norm of what recompression cut off."""
    rounding: float = 0.0
    """Squared norm of the change by rounding to the file's dtype."""


def relative_norm(part: float, whole: float) -> float:
    """√(part / whole) of two squared norms; 0 if the whole is 0."""
    return math.sqrt(part / whole) if whole > 0 else 0.0


def recompression_errors(totals: Totals) -> dict[str, Any]:
    """Relative Frobenius error of the recompression: over all modules, of the worst module, and of each."""
    layers = {module: relative_norm(totals.lost.get(module, 0.0), norm) for module, norm in totals.norms.items()}
    worst = max(layers, key=lambda module: layers[module])
    overall = relative_norm(sum(totals.lost.values()), sum(totals.norms.values()))
    return {"all": overall, "worst": {"module": worst, "error": layers[worst]}, "layers": layers}


def summarise(
    members: Sequence[Member], weights: Sequence[float], gram: Array, ranks: Sequence[Mapping[str, int]]
) -> dict[str, Any]:
    """Ranks, norms, distances and cosines of the members' deltas, with all parameters as one vector.

    gram: ⟨delta_i, delta_j⟩, (n, n). ranks: for each member, module → rank.
    """
    norms = [math.sqrt(max(gram[i, i], 0.0)) for i in range(len(members))]
    listed = [
        {
            "name": member.name,
            "weight": float(weight),
            "ranks": sorted(set(own.values())),
            "modules": len(own),
            "rslora": member.config["use_rslora"],
            "norm": norm,
        }
        for member, weight, own, norm in zip(members, weights, ranks, norms, strict=True)
    ]
    pairs = [
        {
            "a": members[i].name,
            "b": members[j].name,
            "distance": math.sqrt(max(gram[i, i] + gram[j, j] - 2 * gram[i, j], 0.0)),
            "cosine": float(gram[i, j]) / (norms[i] * norms[j]) if norms[i] * norms[j] else None,
        }
        for i, j in combinations(range(len(members)), 2)
    ]
    norm = math.sqrt(max(float(np.array(weights) @ gram @ np.array(weights)), 0.0))
    return {"weights": [float(weight) for weight in weights], "members": listed, "pairs": pairs, "norm": norm}
