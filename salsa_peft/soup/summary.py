"""What a soup of adapters is, in figures: norms, distances and cosines of the deltas, what recompression and rounding changed."""

from __future__ import annotations

import math
from collections.abc import Sequence
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
    """The Hub's repository, of a folder in its cache."""
    revision: str | None
    """Its commit."""
    files: dict[str, dict[str, Any]]
    """Configuration and weights: size and SHA-256 (None: not known and not computed, see soup/provenance.py)."""
    fingerprint: str | None
    """Of a checkpoint: fingerprints.base_fingerprint."""
    base_fingerprint: str | None
    """Of the base that it was trained on, where its folder says it."""
    peft_version: str | None
    """Of an adapter, where its configuration says it."""


class MemberOrigin(Origin):
    """Of a member."""

    name: str
    weight: float


class Provenance(TypedDict):
    """Where all of a soup came from."""

    salsa_peft: str
    """The version that made the soup."""
    members: list[MemberOrigin]
    base: Origin | None
    """Of the base, where the soup reads it."""


class MemberSummary(TypedDict, total=False):
    """A member in figures."""

    name: str
    weight: float
    norm: float | None
    """Of what it adds to the base; None where the base was not read."""
    ranks: list[int]
    """Adapters: the ranks of its modules."""
    modules: int
    rslora: bool
    folder: str
    """Checkpoints."""
    read: bool
    """Checkpoints: False for a member of weight 0, whose values are not read."""


class PairSummary(TypedDict):
    """Two members in figures."""

    a: str
    b: str
    distance: float | None
    cosine: float | None
    """Of what they add to the base; None where that is zero or the base was not read."""


class SoupSummary(TypedDict, total=False):
    """A soup in figures. `kind` is missing for adapters; keys that not all soups have say whose they are."""

    kind: Literal["merged", "checkpoints"]
    strategy: str
    weights: list[float]
    """As the strategy chose them; `asked` as they were given."""
    asked: list[float]
    normalized: bool
    sum: float
    """Of the weights: other than 1 makes a scaled delta, not a mean."""
    tried: list[dict[str, Any]]
    """Strategies that choose: what was tried, and what it measured."""
    left_out: list[str]
    """Members of weight 0."""
    members: list[MemberSummary]
    pairs: list[PairSummary]
    norm: float | None
    """Of what the soup adds to the base."""
    provenance: Provenance
    bytes: int
    seconds: float
    dtype: str
    rounding: float
    """‖what rounding to the file's dtype changed‖ / ‖what the soup adds to the base‖."""
    modules: int
    """Adapters, merged."""
    ranks: list[int]
    """Adapters, merged: Σ r_i of each module."""
    rank: int | None
    """Adapters: what was recompressed to."""
    error: dict[str, Any] | None
    """Adapters: the relative error of the recompression."""
    averaged: list[str]
    """Adapters: values that are no delta and were averaged as they are."""
    base: str
    """Merged: the base's folder."""
    replaced: list[str]
    """Merged: tensors of the base that members had values of their own for."""
    rows: int | None
    """Merged: of the embeddings, where training added tokens."""
    untied: bool
    """Merged: whether input and output embeddings are no longer one tensor."""
    tokenizer: dict[str, Any] | str | None
    """Whose tokenizer and chat template go with the soup; None: the base's, or no member has one."""
    chat_template: str | None
    """Checkpoints: whose chat template goes with the soup."""
    quantized_base: str | None
    """Merged: what was done to the base."""
    requantised: int
    dequantised: int
    tensors: int
    """Checkpoints."""
    parameters: int
    """Merged, checkpoints: in all tensors of the result."""
    dtypes: dict[str, int]
    """Checkpoints."""
    device: str
    """Checkpoints."""
    shards: int
    """Merged, checkpoints."""
    shards_kept: int
    """Merged, checkpoints: shards that an earlier, killed call had finished."""
    files: list[str]
    """Merged, checkpoints (in soup.json alone)."""


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
    found = delta_statistics([member.name for member in members], weights, gram, listed)
    averaged = sorted({name for member in members for name in member.direct})
    return found | {"modules": len(ranks), "ranks": sorted(set(ranks.values())), "averaged": averaged}


def delta_statistics(
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
