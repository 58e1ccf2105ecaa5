"""Maps the tensors of a checkpoint's files to those of the model that Transformers makes of it."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from salsa_peft.soup.checkpoints.read import CONFIG, Checkpoint, Place
from salsa_peft.utils import tensor_names
from salsa_peft.utils.errors import SalsaError
from salsa_peft.utils.safetensors_io import BITS, Entry

if TYPE_CHECKING:
    import torch


class Part(NamedTuple):
    """Consecutive elements of a model's tensor, beginning at `start`, and where they lie in the files."""

    start: int
    place: Place


class Span(NamedTuple):
    """Elements `start` to `stop` of the model's tensor `name`, which begin at `first` in a file's tensor."""

    first: int
    name: str
    start: int
    stop: int


@dataclass(eq=False)
class ModelTensors:
    """Where the tensors of a model lie in a checkpoint's files."""

    checkpoint: Checkpoint
    names: tensor_names.ModelNames
    parts: dict[str, list[Part]]
    """Name in the model → the tensor's parts in order. Tied embeddings have the same parts."""
    spans: dict[str, list[Span]]
    """Name of a tensor in the files → the ranges of the model's tensors that it holds; may be empty."""
    untied: set[str]
    """Names of output embeddings that the configuration ties, though the files have other values for them."""

    @classmethod
    def of(cls, checkpoint: Checkpoint, names: tensor_names.ModelNames | None = None) -> ModelTensors:
        """Find the tensors of the model `names`, by default of the model that config.json describes.

        Raises SalsaError for a tensor of the files that the model does not have.
        """
        where = str(checkpoint.folder)
        names = names or tensor_names.of_config(checkpoint.config, str(checkpoint.folder / CONFIG))
        found = names.resolve({name: place.entry.shape for name, place in checkpoint.tensors.items()}, where)
        for name in found.unknown:
            raise SalsaError(
                f"{checkpoint.tensors[name].file.path}: {name} has no place in {names}, the model that config.json"
                " describes; remove the tensor, or load the model with Transformers and save the model again"
            )
        parts: dict[str, list[Part]] = {}
        spans: dict[str, list[Span]] = {name: [] for name in checkpoint.tensors}
        for name, blocks in found.blocks.items():
            starts = list(itertools.accumulate((block.elements for block in blocks), initial=0))
            for block, (start, stop) in zip(blocks, itertools.pairwise(starts), strict=True):
                place = _slice(checkpoint.tensors[block.source], block.first, block.first + block.elements)
                parts.setdefault(name, []).append(Part(start, place))
                spans[block.source].append(Span(block.first, name, start, stop))
        untied = set()
        for target, source in names.tied.items():
            if target in parts and source in parts:
                one, other = ([part.place for part in parts[name]] for name in (target, source))
                if len(one) != len(other) or not all(map(same_bits, one, other)):
                    untied.add(target)
            elif target in parts:
                parts[source] = parts[target]
            elif source in parts:
                parts[target] = parts[source]
        return cls(checkpoint, names, parts, spans, untied)

    def at(self, name: str, start: int, stop: int) -> Place:
        """Where elements `start` to `stop` of a model's tensor lie. All must be in one of its parts."""
        parts = self.parts[name]
        part = parts[bisect.bisect_right([part.start for part in parts], start) - 1]
        return _slice(part.place, start - part.start, stop - part.start)

    def read(self, name: str) -> torch.Tensor:
        """Read a tensor of the model into a new tensor on the CPU."""
        import torch

        pieces = [part.place.file.read_entry(part.place.entry).flatten() for part in self.parts[name]]
        whole = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        return whole.reshape(self.names.shapes[name])


def _slice(place: Place, start: int, stop: int) -> Place:
    """The place of elements `start` to `stop` of a flattened tensor; for all elements, `place` itself."""
    entry, width = place.entry, BITS[place.entry.dtype] // 8
    if (start, stop) == (0, math.prod(entry.shape)):
        return place
    return Place(place.file, Entry(entry.dtype, (stop - start,), entry.begin + start * width, (stop - start) * width))


def same_bits(one: Place, other: Place) -> bool:
    """Whether two tensors have the same dtype and the same bytes."""
    if (one.entry.dtype, one.entry.size) != (other.entry.dtype, other.entry.size):
        return False
    return all(a == b for a, b in zip(_chunks(one), _chunks(other), strict=True))


def _chunks(place: Place) -> Iterator[bytearray]:
    for start in range(0, place.entry.size, 2**21):
        chunk = bytearray(min(2**21, place.entry.size - start))
        place.file.read_into(memoryview(chunk), place.entry.begin + start)
        yield chunk
