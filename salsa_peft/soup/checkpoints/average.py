"""Full checkpoints → their weighted sum, streamed: memory is bounded by a piece of a few MB, whatever the models' size.

What is written has member 0's shards, headers, dtypes and configuration; where another member has output embeddings of its own and member
0 has them tied, that one's. Members may be cut into other shards, be of other float dtypes and have other names for the same tensors
(soup/checkpoints/alignment.py). Left out: quantised weights, members of another architecture or vocabulary. On a CPU torch is not imported
unless names or configurations differ, and NumPy not before there is something to add.
    python -m salsa_peft.soup.checkpoints.average OUT MEMBER MEMBER … [--weights 0.25,0.75]
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from salsa_peft.soup.checkpoints import read as checkpoint_folders
from salsa_peft.soup.checkpoints.alignment import Alignment, Written, align
from salsa_peft.soup.checkpoints.companions import Source, copy_companions
from salsa_peft.soup.checkpoints.read import (
    CONFIG,
    INDEX,
    SINGLE,
    Checkpoint,
    check_manifest,
    check_plain,
    default_names,
    read_checkpoint,
    read_mapping,
    text_part,
)
from salsa_peft.soup.checkpoints.write import Output, Progress, counter, making
from salsa_peft.utils.errors import SalsaError, require
from salsa_peft.utils.safetensors_io import Writer

if TYPE_CHECKING:
    import torch

ARITHMETIC = 3
"""Counted up when the same members would give other bytes: a killed soup of an older version is not gone on with."""


def average(
    out: Path | str,
    members: Sequence[Path | str],
    weights: Sequence[float],
    *,
    names: Sequence[str] | None = None,
    device: str = "cpu",
    base: Path | str | None = None,
    strategy: str = "linear",
    progress: Progress | None = None,
    more: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write Σ w_i θ_i, of weights with any sum, into the folder `out` and return the summary, also out/soup.json.

    A member of weight 0 is held against the others by its headers; its values are not read. With `base` the summary has norms and
    cosines of what each member adds to it, else distances alone. Raises SalsaError naming file and tensor; then nothing is left
    behind. A killed call, made again, goes on at the first shard that is not whole.
    """
    from salsa_peft.soup.checkpoints.streams import check_device

    begun, out = time.perf_counter(), Path(out)
    numbers = check_weights(weights, len(members))
    check_device(device)
    folders = [Path(member) for member in members]
    called = default_names(folders, names)
    read = [read_checkpoint(folder, name) for folder, name in zip(folders, called, strict=True)]
    origin = None if base is None else read_checkpoint(Path(base))
    everything = [*read, *([] if origin is None else [origin])]
    for checkpoint in everything:
        check_plain(checkpoint)
    aligned = align(everything)
    identity = {"arithmetic": ARITHMETIC, "weights": numbers, "device": device, "base": origin is not None,
                "members": [[str(row.folder.resolve()), *row.identity()] for row in everything]}  # fmt: skip
    with making(out, identity, [row.folder for row in everything], size_of(aligned)) as output:
        kept = output.kept
        for checkpoint in everything:
            check_manifest(checkpoint)
        products = _shards(output, aligned, numbers, device, progress)
        _write_index(output, aligned)
        used = [row for row, weight in zip(read, numbers, strict=True) if weight != 0]
        taken = copy_companions(
            output, [Source(row.name, row.folder) for row in used], None if base is None else Path(base)
        )
        summary = {"kind": "checkpoints", "strategy": strategy} | _figures(read, numbers, products, origin is not None)
        summary |= sizes(aligned.checkpoint) | {"device": device, "shards": len(aligned.files), "shards_kept": kept}
        summary |= taken | dict(more or {})
        summary |= {"seconds": round(time.perf_counter() - begun, 3), **(more or {})}
        output.finish(_config(aligned), summary)
    return summary


def gram(
    members: Sequence[Path | str], base: Path | str, *, device: str = "cpu", progress: Progress | None = None
) -> torch.Tensor:
    """⟨θ_i − θ_base, θ_j − θ_base⟩, all tensors as one vector: (members, members), float64. Streamed; nothing is written."""
    import torch

    from salsa_peft.soup.checkpoints.streams import check_device, stream

    check_device(device)
    read = [read_checkpoint(Path(folder)) for folder in (base, *members)]
    for checkpoint in read:
        check_plain(checkpoint)
    aligned = align(read)
    tell = counter(progress, size_of(aligned))
    products = stream(list(aligned.rows[0]), aligned.rows, None, pivot=0, device=device, progress=tell)
    return torch.tensor(products, dtype=torch.float64)[1:, 1:]


def _shards(
    output: Output, aligned: Alignment, numbers: Sequence[float], device: str, progress: Progress | None
) -> list[list[float]]:
    """Write what is not there yet; the products of the differences from the member of the largest weight, all shards added up.

    Their rows are the members of a weight other than 0, and the base last, whose weight here is 0.
    """
    from salsa_peft.soup.checkpoints.streams import stream

    used = [i for i in range(len(aligned.rows)) if i >= len(numbers) or numbers[i] != 0]
    rows, weights = [aligned.rows[i] for i in used], [*(weight for weight in numbers if weight != 0)]
    weights += [0.0] * (len(rows) - len(weights))
    pivot = max(range(len(rows)), key=lambda i: abs(weights[i]))
    layout = aligned.layout()
    total = [[0.0] * len(rows) for _ in rows]
    tell = counter(progress, size_of(aligned))
    for name, file in aligned.files.items():

        def make(write: Writer, file: Written = file) -> dict[str, Any]:
            products = stream(
                file.pieces, rows, weights, pivot=pivot, layout=layout, write=write, device=device, progress=tell
            )
            return {"products": products}

        if name in output.done:
            tell(file.size)
        products = output.shard(name, file.header, make)["products"]
        total = [[a + b for a, b in zip(mine, yours, strict=True)] for mine, yours in zip(total, products, strict=True)]
    return total


def _write_index(output: Output, aligned: Alignment) -> None:
    """The index as it is where it is right; made anew where tensors are renamed, its size is wrong, or there is none for several files."""
    path = aligned.checkpoint.folder / INDEX
    known = read_mapping(path) if path.is_file() else {}
    if not known and list(aligned.files) == [SINGLE]:
        return
    names = {name: file for file, written in aligned.files.items() for name in json.loads(written.header)}
    names.pop("__metadata__", None)
    given = known.get("metadata")
    metadata = {**(given if isinstance(given, dict) else {}), "total_size": size_of(aligned)}
    if known.get("weight_map") == names and given == metadata:
        output.copy(path, INDEX)
        return
    made = known | {"metadata": metadata, "weight_map": dict(sorted(names.items()))}
    output.write(INDEX, json.dumps(made, indent=2) + "\n")


def _config(aligned: Alignment) -> bytes | str:
    """config.json as it is, unless output embeddings that it calls tied have values of their own."""
    if not aligned.untied:
        return (aligned.checkpoint.folder / CONFIG).read_bytes()
    config = dict(aligned.checkpoint.config) | {"tie_word_embeddings": False}
    if "tie_word_embeddings" in (part := text_part(config)):
        config["text_config"] = part | {"tie_word_embeddings": False}
    return json.dumps(config, indent=2) + "\n"


def size_of(aligned: Alignment) -> int:
    """Bytes of the result's tensors."""
    return sum(file.size for file in aligned.files.values())


def sizes(head: Checkpoint) -> dict[str, Any]:
    """Of the summary: what was written."""
    entries = [place.entry for place in head.tensors.values()]
    dtypes = {
        dtype: sum(entry.dtype == dtype for entry in entries) for dtype in sorted({entry.dtype for entry in entries})
    }
    return {"tensors": len(entries), "parameters": sum(math.prod(entry.shape) for entry in entries), "dtypes": dtypes,
            "bytes": sum(file.size for file in head.files.values())}  # fmt: skip


def _figures(
    read: Sequence[Checkpoint], weights: Sequence[float], products: list[list[float]], with_base: bool
) -> dict[str, Any]:
    """Of the summary: members, pairs and, with a base (the last row of `products`), what each adds to it.

    Products are those of differences from one of the members, ⟨a, b⟩ below; of differences from the base o they are
    ⟨a, b⟩ − ⟨a, o⟩ − ⟨b, o⟩ + ⟨o, o⟩.
    """
    used = [i for i, weight in enumerate(weights) if weight != 0]
    o = len(used)
    vectors = [[products[a][b] - products[a][o] - products[b][o] + products[o][o] for b in range(o)]
               for a in range(o)] if with_base else None  # fmt: skip
    norms = {i: None if vectors is None else root(vectors[a][a]) for a, i in enumerate(used)}
    members = [
        {"name": row.name, "folder": str(row.folder), "weight": weight, "read": i in norms, "norm": norms.get(i)}
        for i, (row, weight) in enumerate(zip(read, weights, strict=True))
    ]
    pairs = []
    for a, b in combinations(range(o), 2):
        one, other = norms[used[a]], norms[used[b]]
        cosine = vectors[a][b] / (one * other) if vectors is not None and one and other else None
        distance = root(products[a][a] + products[b][b] - 2 * products[a][b])
        pairs.append({"a": read[used[a]].name, "b": read[used[b]].name, "distance": distance, "cosine": cosine})
    total = None
    if vectors is not None:  # of Σ w_i δ_i; where Σ w_i is not 1, the soup is another point than base + that
        total = root(sum(weights[used[a]] * weights[used[b]] * vectors[a][b] for a in range(o) for b in range(o)))
    return {"weights": list(weights), "sum": math.fsum(weights), "members": members, "pairs": pairs, "norm": total}


def root(square: float) -> float | None:
    """Rounding may leave a sum of squares just under zero; None where it passed float64's range."""
    return math.sqrt(max(square, 0.0)) if math.isfinite(square) else None


def check_weights(weights: Sequence[float], members: int) -> list[float]:
    """As floats. Raises SalsaError for other than one finite number for each member, or zeros alone."""
    require(members > 0, "a soup of no members: expected at least one checkpoint")
    numbers = checkpoint_folders.check_weights(weights, members)
    require(any(numbers), f"weights: found {', '.join(map(str, weights))}, expected at least one that is not 0")
    return numbers


def main(argv: Sequence[str] | None = None) -> int:
    """The arithmetic alone, without the soup command's strategies and Hub ids: 0, or 2 and one line on stderr."""
    import argparse

    parser = argparse.ArgumentParser(prog="python -m salsa_peft.soup.checkpoints.average")
    parser.add_argument("out", type=Path)
    parser.add_argument("members", type=Path, nargs="+")
    parser.add_argument("--weights", type=lambda text: [float(number) for number in text.split(",")], help="0.25,0.75")
    parser.add_argument("--base", type=Path)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args(argv)
    weights = args.weights or [1 / len(args.members)] * len(args.members)
    try:
        summary = average(args.out, args.members, weights, base=args.base, device=args.device)
    except SalsaError as error:
        print(error, file=sys.stderr)
        return 2
    print(json.dumps(summary))
    return 0


if __name__ == "__main__":
    os.environ.setdefault(
        "OPENBLAS_NUM_THREADS", "1"
    )  # NumPy, which is not loaded yet, is spared threads that only wait
    raise SystemExit(main())
