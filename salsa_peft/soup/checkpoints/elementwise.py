"""Writes a checkpoint whose tensors are merged element by element, with one tensor of all members in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from salsa_peft.soup.checkpoints.alignment import Alignment
from salsa_peft.soup.checkpoints.read import FLOATS
from salsa_peft.soup.checkpoints.write import Output
from salsa_peft.soup.strategies.elementwise import Elementwise
from salsa_peft.utils.errors import require
from salsa_peft.utils.safetensors_io import NAMES, as_bytes

if TYPE_CHECKING:
    import torch


def write_merged(output: Output, aligned: Alignment, merge: Elementwise, count: Callable[[int], None]) -> None:
    """Write all shards. The rows of `aligned` are the members and, as the last one, the start."""
    for name, file in aligned.files.items():
        with output.shard(name, file.header) as write:
            for piece in file.pieces:
                content = as_bytes(merged_tensor(piece, aligned, merge))
                write(content)
                count(len(content))


def merged_tensor(piece: str, aligned: Alignment, merge: Elementwise) -> torch.Tensor:
    """One tensor of the soup, rounded once to the dtype of the layout. Integers must be the same in all models."""
    import torch

    places, dtype = [row[piece] for row in aligned.rows], aligned.layout[piece].entry.dtype
    values = [place.file.read_entry(place.entry) for place in places]
    if dtype not in FLOATS:
        odd = next((i for i, value in enumerate(values) if not torch.equal(value, values[0])), 0)
        require(
            odd == 0,
            f"{places[odd].file.path}: the integers in {piece} differ from those in {places[0].file.path}; integers"
            " cannot be merged, so they must be the same in all members",
        )
        return values[0]
    merged = merge(piece, values).to(getattr(torch, NAMES[dtype]))
    require(
        bool(merged.isfinite().all()),
        f"{places[0].file.path}: {piece} is not finite after the merge: a member has values that are not finite, or the"
        f" result has values that {NAMES[dtype]} cannot hold; use other members or a smaller scale",
    )
    return merged
