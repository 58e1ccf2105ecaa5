"""The weighted sum of full checkpoints, computed in pieces of a few MB to bound the memory.

The soup has the shards, headers, dtypes and configuration of the first member, unless alignment.py chooses another.
Members may differ in shards, in float dtypes and in the names of the same tensors. Quantised weights are rejected.
Torch is imported only if names or configurations differ.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from salsa_peft.soup.arrays import Array
from salsa_peft.soup.checkpoints.alignment import Alignment, align
from salsa_peft.soup.checkpoints.companions import copy_companions
from salsa_peft.soup.checkpoints.elementwise import write_merged
from salsa_peft.soup.checkpoints.read import (
    CONFIG,
    INDEX,
    SINGLE,
    Checkpoint,
    check_manifest,
    check_plain,
    check_weights,
    default_names,
    read_checkpoint,
    read_mapping,
    text_part,
)
from salsa_peft.soup.checkpoints.streams import stream
from salsa_peft.soup.checkpoints.write import Output, Progress, byte_counter, open_output
from salsa_peft.soup.strategies.elementwise import Elementwise
from salsa_peft.utils.errors import require


def average(
    out: Path | str,
    members: Sequence[Path | str],
    weights: Sequence[float],
    *,
    layers: Mapping[str, Sequence[float]] | None = None,
    merge: Elementwise | None = None,
    names: Sequence[str] | None = None,
    base: Path | str | None = None,
    strategy: str = "linear",
    progress: Progress | None = None,
    more: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write Σ w_i θ_i into the folder `out` and return the summary, which is also in out/soup.json.

    Weights may have any sum. layers: tensor → weights of its own, of which `weights` are the means. merge: an
    element-wise strategy, which replaces the sum; its start is `base`. Of a member of weight 0, only the headers are checked; its values are not used. With `base`, the summary has the norms and cosines
    of the members' changes from the base; without `base`, only distances. `more` is added to the summary. Raises
    SalsaError naming file and tensor; then nothing is written.
    """
    begun = time.perf_counter()
    numbers = check_weights(weights, len(members))
    require(any(numbers), "weights: all of them are 0; give at least one member a weight other than 0")
    folders = [Path(member) for member in members]
    called = default_names(folders, names)
    read = [read_checkpoint(folder, name) for folder, name in zip(folders, called, strict=True)]
    origin = None if base is None else read_checkpoint(Path(base), "base")
    everything = read if origin is None else [*read, origin]
    for checkpoint in everything:
        check_plain(checkpoint)
    aligned = align(everything)
    with open_output(Path(out), [row.folder for row in everything], _size_of(aligned)) as output:
        for checkpoint in everything:
            check_manifest(checkpoint)
        if merge is None:
            products = _write_shards(output, aligned, numbers, layers, progress)
        else:
            write_merged(output, aligned, merge, byte_counter(progress, _size_of(aligned)))
            products = stream(list(aligned.rows[0]), aligned.rows, None, pivot=0)
        _write_index(output, aligned)
        used = [row for row, weight in zip(read, numbers, strict=True) if weight != 0]
        taken = copy_companions(output, used, origin)
        summary = {"kind": "checkpoints", "strategy": strategy} | _figures(read, numbers, products, base is not None)
        entries = [place.entry for place in aligned.checkpoint.tensors.values()]
        summary |= {"tensors": len(entries), "parameters": sum(math.prod(entry.shape) for entry in entries)}
        summary |= {"dtypes": dict(sorted(Counter(entry.dtype for entry in entries).items()))}
        summary |= {"bytes": sum(file.size for file in aligned.checkpoint.files.values())}
        summary |= {"shards": len(aligned.files)} | taken | dict(more or {})
        summary["seconds"] = round(time.perf_counter() - begun, 3)
        output.finish(_config(aligned), summary)
    return summary


def grams(members: Sequence[Path | str], base: Path | str, by_tensor: bool = False) -> dict[str, Array]:
    """⟨θ_i − θ_base, θ_j − θ_base⟩ of each tensor, or with all tensors as one vector: (members, members), float64."""
    read = [read_checkpoint(Path(folder)) for folder in (*members, base)]  # in the order of `average`
    for checkpoint in read:
        check_plain(checkpoint)
    rows, n = align(read).rows, len(members)
    parts = {name: [name] for name in rows[0]} if by_tensor else {"all tensors": list(rows[0])}
    return {name: np.array(stream(tensors, rows, None, pivot=n))[:n, :n] for name, tensors in parts.items()}


def _write_shards(
    output: Output, aligned: Alignment, numbers: Sequence[float], layers: Mapping[str, Sequence[float]] | None,
    progress: Progress | None,
) -> list[list[float]]:  # fmt: skip
    """Write all shards. Returns the products of the differences from the member of the largest weight.

    The result has a row and a column for each member whose weight is not 0, then for the base, if there is one.
    """
    used = [i for i in range(len(aligned.rows)) if i >= len(numbers) or numbers[i] != 0]
    rows, weights = [aligned.rows[i] for i in used], [weight for weight in numbers if weight != 0]
    unread = [0.0] * (len(rows) - len(weights))  # of the base, whose differences are measured
    weights += unread
    own = layers and {
        name: [*(row[i] for i in used[: len(used) - len(unread)]), *unread] for name, row in layers.items()
    }
    pivot = max(range(len(rows)), key=lambda i: abs(weights[i]))
    total = [[0.0] * len(rows) for _ in rows]
    count = byte_counter(progress, _size_of(aligned))
    for name, file in aligned.files.items():
        with output.shard(name, file.header) as write:
            products = stream(
                file.pieces, rows, weights, pivot=pivot, layers=own, layout=aligned.layout, write=write, progress=count
            )
        total = [[a + b for a, b in zip(old, new, strict=True)] for old, new in zip(total, products, strict=True)]
    return total


def _write_index(output: Output, aligned: Alignment) -> None:
    """Copy the index if it is right, else write a new one. A single file without an index gets none."""
    path = aligned.checkpoint.folder / INDEX
    known = read_mapping(path) if path.is_file() else {}
    if not known and list(aligned.files) == [SINGLE]:
        return
    names = {name: file for file, written in aligned.files.items() for name in json.loads(written.header)}
    names.pop("__metadata__", None)
    given = known.get("metadata")
    metadata = {**(given if isinstance(given, dict) else {}), "total_size": _size_of(aligned)}
    if known.get("weight_map") == names and given == metadata:
        output.write(INDEX, path.read_bytes())
    else:
        new = known | {"metadata": metadata, "weight_map": dict(sorted(names.items()))}
        output.write(INDEX, json.dumps(new, indent=2) + "\n")


def _config(aligned: Alignment) -> bytes | str:
    """The soup's config.json: that of its layout's checkpoint, with tie_word_embeddings false if untied."""
    if not aligned.untied:
        return (aligned.checkpoint.folder / CONFIG).read_bytes()
    config = dict(aligned.checkpoint.config) | {"tie_word_embeddings": False}
    if "tie_word_embeddings" in (part := text_part(config)):
        config["text_config"] = part | {"tie_word_embeddings": False}
    return json.dumps(config, indent=2) + "\n"


def _size_of(aligned: Alignment) -> int:
    """The size of the soup's tensors in bytes."""
    return sum(file.size - file.begin for file in aligned.checkpoint.files.values())


def _figures(
    read: Sequence[Checkpoint], weights: Sequence[float], products: list[list[float]], with_base: bool
) -> dict[str, Any]:
    """The summary's members, pairs and norms. The base, if there is one, is the last row of `products`.

    `products` has ⟨a, b⟩, where a and b are the differences of two models from one member. For the base's difference o,
    the inner product of their differences from the base is ⟨a, b⟩ − ⟨a, o⟩ − ⟨b, o⟩ + ⟨o, o⟩.
    """
    used = [i for i, weight in enumerate(weights) if weight != 0]
    o = len(used)
    deltas = [[products[a][b] - products[a][o] - products[b][o] + products[o][o] for b in range(o)]
              for a in range(o)] if with_base else None  # fmt: skip
    norms = {i: None if deltas is None else _root(deltas[a][a]) for a, i in enumerate(used)}
    members = [
        {"name": row.name, "folder": str(row.folder), "weight": weight, "read": i in norms, "norm": norms.get(i)}
        for i, (row, weight) in enumerate(zip(read, weights, strict=True))
    ]
    pairs = []
    for a, b in combinations(range(o), 2):
        one, other = norms[used[a]], norms[used[b]]
        cosine = deltas[a][b] / (one * other) if deltas is not None and one and other else None
        distance = _root(products[a][a] + products[b][b] - 2 * products[a][b])
        pairs.append({"a": read[used[a]].name, "b": read[used[b]].name, "distance": distance, "cosine": cosine})
    total = None
    if deltas is not None:  # the norm of Σ w_i δ_i; the soup is the base plus this sum only if Σ w_i is 1
        total = _root(sum(weights[used[a]] * weights[used[b]] * deltas[a][b] for a in range(o) for b in range(o)))
    return {"weights": list(weights), "sum": math.fsum(weights), "members": members, "pairs": pairs, "norm": total}


def _root(square: float) -> float | None:
    """The square root of a sum of squares: 0 if rounding made the sum negative, None if it overflowed."""
    return math.sqrt(max(square, 0.0)) if math.isfinite(square) else None
