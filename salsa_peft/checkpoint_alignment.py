"""Whether checkpoints are of one architecture and vocabulary, and where each has the tensors of the first; or refused with the reason.

Output embeddings may be saved apart though they are tied to the input's: fine where the bits are equal.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from salsa_peft.checkpoint_folders import CONFIG, FLOATS, Checkpoint, Place, read_mapping, text_part
from salsa_peft.errors import SalsaError, require
from salsa_peft.safetensors_files import fill

ARCHITECTURE = (
    "model_type", "architectures", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "hidden_act", "hidden_activation", "rms_norm_eps", "sliding_window", "rope_theta", "rope_scaling",
    "rope_parameters", "tie_word_embeddings", "n_embd", "n_layer", "n_head", "activation_function",
)  # fmt: skip
"""What config.json must say alike: what changes the function of the same tensors. Where only one says it, shapes decide."""
HEAD = "lm_head.weight"
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight", "tok_embeddings.weight")


def align(head: Checkpoint, other: Checkpoint) -> dict[str, Place]:
    """Where `other` has each tensor of `head`; output embeddings that are tied are found at the input's, to the bit the same.

    Raises SalsaError for another architecture, vocabulary, key, shape or kind of dtype.
    """
    _check_config(head, other)
    _check_vocabulary(head, other)
    places, mine, yours = dict(other.tensors), _both_embeddings(head), _both_embeddings(other)
    if mine is not None and yours is not None:
        places[mine] = places.pop(yours)
    for name in sorted(head.tensors.keys() ^ places.keys()):
        lacks, has = (other, head) if name in head.tensors else (head, other)
        partner = tied_partner(has, name)
        if partner is None or has.tied is False or lacks.tied is False or partner not in other.tensors:
            path = has.tensors[name].file.path
            raise SalsaError(
                f"{path}: {name}: found no such tensor in {lacks.folder}, expected the same names in all members"
            )
        _require_tied(has, name, partner)
        if lacks is other:
            places[name] = other.tensors[partner]
        else:
            del places[name]
    for name, (file, entry) in head.tensors.items():
        there = places[name]
        require(
            there.entry.shape == entry.shape,
            f"{there.file.path}: {name}: found shape {list(there.entry.shape)}, expected {list(entry.shape)} as in {file.path}",
        )
        same = there.entry.dtype == entry.dtype or (there.entry.dtype in FLOATS and entry.dtype in FLOATS)
        require(same, f"{there.file.path}: {name}: found {there.entry.dtype}, expected {entry.dtype} as in {file.path}")
    return places


def _both_embeddings(checkpoint: Checkpoint) -> str | None:
    """The one tensor that is input and output embeddings of a tied model, under either name."""
    names = [name for name in checkpoint.tensors if name.endswith((HEAD, *EMBEDDINGS))]
    return names[0] if checkpoint.tied and len(names) == 1 else None


def check_tied(checkpoint: Checkpoint) -> None:
    """Raise SalsaError where output embeddings are said to be tied and saved apart, with other values."""
    for name in checkpoint.tensors if checkpoint.tied else ():
        partner = tied_partner(checkpoint, name)
        if partner is not None:
            _require_tied(checkpoint, name, partner)


def tied_partner(checkpoint: Checkpoint, name: str) -> str | None:
    """The input embeddings that output embeddings may be tied to, or None where `name` is no output embedding."""
    if name != HEAD and not name.endswith(f".{HEAD}"):
        return None
    shape = checkpoint.tensors[name].entry.shape
    return next(
        (n for n, place in checkpoint.tensors.items() if n.endswith(EMBEDDINGS) and place.entry.shape == shape), None
    )


def _require_tied(checkpoint: Checkpoint, name: str, partner: str) -> None:
    file = checkpoint.tensors[name].file.path
    require(
        same_bits(checkpoint.tensors[name], checkpoint.tensors[partner]),
        f"{file}: {name}: found other values than {partner}'s, expected the same, since they are tied; save the model again",
    )


def same_bits(one: Place, other: Place) -> bool:
    """Whether two tensors have the same bytes (and dtype)."""
    if (one.entry.dtype, one.entry.size) != (other.entry.dtype, other.entry.size):
        return False
    return all(a == b for a, b in zip(_pieces(one), _pieces(other), strict=True))


def _pieces(place: Place) -> Iterator[bytes]:
    descriptor = os.open(place.file.path, os.O_RDONLY)
    try:
        for start in range(0, place.entry.size, 2**21):
            piece = bytearray(min(2**21, place.entry.size - start))
            fill(descriptor, memoryview(piece), place.entry.begin + start, place.file.path)
            yield bytes(piece)
    finally:
        os.close(descriptor)


def _check_config(head: Checkpoint, other: Checkpoint) -> None:
    for mine, yours in ((head.config, other.config), (text_part(head.config), text_part(other.config))):
        for field in ARCHITECTURE:
            if field in mine and field in yours:
                require(
                    mine[field] == yours[field],
                    f"{other.folder / CONFIG}: {field}: found {yours[field]!r:.80}, expected {mine[field]!r:.80} as in {head.folder}:"
                    " members of a soup are of one architecture",
                )
        known = _rope(mine)
        for field, value in _rope(yours).items():
            require(
                known.get(field, value) == value,
                f"{other.folder / CONFIG}: {field} of the rotary embeddings: found {value!r:.80}, expected {known.get(field)!r:.80} as in"
                f" {head.folder}: members of a soup are of one architecture",
            )


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """Rotary embeddings as Transformers 5 writes them (rope_parameters), also where 4 did (rope_theta, rope_scaling)."""
    given = config.get("rope_parameters")
    if isinstance(given, dict):  # of layers of several kinds, the ones that version 4's fields are about
        given = given.get("full_attention", given)
    elif "rope_theta" in config or "rope_scaling" in config:
        given = {key: config[key] for key in ("rope_theta", "partial_rotary_factor") if key in config}
        given |= config.get("rope_scaling") or {}
    if not isinstance(given, dict):
        return {}
    kind = str(given.get("rope_type", given.get("type", "default")))
    renamed = {"mrope": "default", "su": "longrope"}.get(kind, kind)
    return {key: value for key, value in given.items() if key != "type"} | {"rope_type": renamed}


def _check_vocabulary(head: Checkpoint, other: Checkpoint) -> None:
    """A token that both have has the same number in both, and a number the same token: rows of embeddings are averaged by number."""
    mine, yours = (checkpoint.folder / "tokenizer.json" for checkpoint in (head, other))
    if not (mine.is_file() and yours.is_file()) or mine.read_bytes() == yours.read_bytes():
        return
    known, others = vocabulary(mine), vocabulary(yours)
    tokens: dict[int, set[str]] = {}
    for token, number in known.items():
        tokens.setdefault(number, set()).add(token)
    for token, number in others.items():
        require(
            known.get(token, number) == number,
            f"{yours}: token {token!r:.40}: found number {number}, expected {known.get(token)} as in {mine}: members of a soup share"
            " the vocabulary",
        )
    shared = {number for token, number in others.items() if known.get(token) == number}
    for token, number in others.items():
        there = "" if number in shared else min(tokens.get(number, {""}))
        require(
            there == "",
            f"{yours}: number {number}: found token {token!r:.40}, expected {there!r:.40} as in {mine}: members of a soup share the"
            " vocabulary",
        )


def vocabulary(path: Path) -> dict[str, int]:
    """Token → number by a tokenizer.json."""
    content = read_mapping(path)
    model, added = content.get("model"), content.get("added_tokens")
    given = model.get("vocab") if isinstance(model, dict) else None
    pairs: list[tuple[Any, Any]] = list(given.items()) if isinstance(given, dict) else []
    if isinstance(given, list):  # Unigram: [token, score] in the order of numbers
        pairs = [(row[0], number) for number, row in enumerate(given) if isinstance(row, list) and row]
    if isinstance(added, list):
        pairs += [
            (row["content"], row["id"]) for row in added if isinstance(row, dict) and {"content", "id"} <= row.keys()
        ]
    return dict(pairs)
