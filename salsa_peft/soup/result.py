"""The types of what `soup()` returns and soup.json holds. Plain dictionaries, so that they are JSON; which keys are there depends on the kind."""

from __future__ import annotations

from typing import Any, Literal, TypedDict


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
    shards: int
    """Merged, checkpoints."""
    files: list[str]
    """Merged, checkpoints (in soup.json alone)."""
