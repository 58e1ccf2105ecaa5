"""The types of a soup's summary (soup.json), and the statistics of the members' deltas in it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, Literal, TypedDict

import numpy as np

from salsa_peft.soup.arrays import Array
from salsa_peft.soup.lora.tensors import Member


class Origin(TypedDict):
    """The origin of the folder of a member or base."""

    source: str
    """The path or Hub id that the user gave."""
    repository: str | None
    """The Hub repository, if the folder is in the Hub's cache."""
    revision: str | None
    """The commit in that repository, if the folder is in the Hub's cache."""
    files: dict[str, dict[str, Any]]
    """Name of each configuration or weight file → its size and SHA-256 (None if unknown)."""
    fingerprint: str | None
    """Checkpoints: the fingerprint of their weights (fingerprints.base_fingerprint)."""
    base_fingerprint: str | None
    """Fingerprint of the base that the model was trained on; None if the folder does not have it."""
    peft_version: str | None
    """Adapters: the PEFT version that adapter_config.json names; None if it names none."""


class MemberOrigin(Origin):
    """The origin of a member, with its name and weight."""

    name: str
    weight: float


class Provenance(TypedDict):
    """The origins of a soup's members and base."""

    salsa_peft: str
    """The version of this package."""
    members: list[MemberOrigin]
    base: Origin | None
    """The origin of the base; None if the soup does not read a base."""


class MemberSummary(TypedDict, total=False):
    """Statistics of a member."""

    name: str
    weight: float
    norm: float | None
    """Norm of the member's change from the base; None if unknown, as for checkpoints without a base."""
    ranks: list[int]
    """Adapters: the distinct ranks of the member's modules, ascending."""
    modules: int
    rslora: bool
    folder: str
    """Checkpoints: the member's folder."""
    read: bool
    """Checkpoints: False for a member of weight 0, whose values are not averaged."""


class PairSummary(TypedDict):
    """Statistics of two members."""

    a: str
    b: str
    distance: float | None
    cosine: float | None
    """Cosine of the members' deltas; None if one delta is zero or the base was not read."""


class SoupSummary(TypedDict, total=False):
    """Statistics of a soup of adapters (without `kind`), of merged adapters or of checkpoints.

    If only some kinds of soup have a key, the key's description begins with these kinds.
    """

    kind: Literal["merged", "checkpoints"]
    strategy: str
    weights: list[float]
    """The weights that the strategy chose."""
    asked: list[float]
    """The weights that were requested."""
    normalized: bool
    sum: float
    """Sum of the requested weights (checkpoints: of `weights`). If not 1, the result is a scaled delta."""
    tried: list[dict[str, Any]]
    """The weights that the strategy tried, with their measures; for slerp the angle."""
    left_out: list[str]
    """Adapters and merged adapters: names of the members that were left out, as their weight is 0."""
    members: list[MemberSummary]
    pairs: list[PairSummary]
    norm: float | None
    """Norm of the soup's delta; None if unknown, as for checkpoints without a base."""
    provenance: Provenance
    bytes: int
    seconds: float
    dtype: str
    rounding: float
    """Adapters and merged adapters: norm of the change by rounding / norm of the soup's delta."""
    modules: int
    """Adapters and merged adapters: number of modules with LoRA."""
    ranks: list[int]
    """Adapters and merged adapters: the distinct ranks of the soup's modules, ascending."""
    rank: int | None
    """Adapters: the requested rank; None if the soup is exact."""
    error: dict[str, Any] | None
    """Adapters: relative errors of the recompression to `rank`; None if the soup is exact."""
    averaged: list[str]
    """Adapters: parameters without LoRA, whose values were averaged directly."""
    base: str
    """Merged: the base's folder."""
    replaced: list[str]
    """Merged: names of the base's tensors that a member replaces with trained values."""
    rows: int | None
    """Merged: number of rows of the embeddings; None if it is the base's."""
    untied: bool
    """Merged: whether input and output embeddings are two tensors, though they are one in the base."""
    tokenizer: dict[str, Any] | str | None
    """The member whose tokenizer the soup has. None: no member has one (merged soups then get the base's)."""
    chat_template: str | None
    """Checkpoints: the member whose chat template the soup has."""
    quantized_base: str | None
    """Merged: the quantisation that was applied to the base and undone; None if there was none."""
    requantised: int
    dequantised: int
    tensors: int
    """Checkpoints: number of tensors."""
    parameters: int
    """Merged, checkpoints: number of elements of all tensors."""
    dtypes: dict[str, int]
    """Checkpoints: number of tensors of each dtype."""
    shards: int
    """Merged, checkpoints: number of weight files."""
    files: list[str]
    """Merged, checkpoints: names of the soup's files (only in soup.json)."""


@dataclass
class Totals:
    """Sums over the modules of a soup of adapters, collected while the soup is written."""

    gram: Array
    """⟨delta_i, delta_j⟩ of the members: (n, n)."""
    norms: dict[str, float] = field(default_factory=dict)
    """Module → squared norm of the soup's delta."""
    lost: dict[str, float] = field(default_factory=dict)
    """Module → squared norm of the part of the delta that recompression cut off."""
    rounding: float = 0.0
    """Squared norm, over all modules, of the change by rounding to the file's dtype."""


def relative_norm(part: float, whole: float) -> float:
    """√(part / whole), where part and whole are squared norms; 0 if the whole is 0."""
    return math.sqrt(part / whole) if whole > 0 else 0.0


def recompression_errors(totals: Totals) -> dict[str, Any]:
    """Relative Frobenius errors of the recompression: of all modules together, the worst, and each one."""
    layers = {module: relative_norm(totals.lost.get(module, 0.0), norm) for module, norm in totals.norms.items()}
    worst = max(layers, key=lambda module: layers[module])
    overall = relative_norm(sum(totals.lost.values()), sum(totals.norms.values()))
    return {"all": overall, "worst": {"module": worst, "error": layers[worst]}, "layers": layers}


def summarise(
    members: Sequence[Member], weights: Sequence[float], gram: Array, ranks: Sequence[Mapping[str, int]]
) -> dict[str, Any]:
    """Ranks, norms, distances and cosines of the members' deltas, with all parameters as one vector.

    gram: the inner products ⟨delta_i, delta_j⟩, (n, n). ranks: for each member, module → rank.
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
