"""Where several checkpoints have the same tensors, and in which layout their sum is written; or why they cannot be averaged.

Checkpoints whose files agree in names are compared as they are, without torch. Where names differ (the Hub's GPT-2 beside what
Transformers saves, experts apart or in one tensor, prefixes of wrappers, tied output embeddings written or not), each name is resolved to
the one in the model that Transformers makes (utils/tensor_names.py). What is no parameter there (rotary frequencies, causal masks) is averaged
where every checkpoint has it, else copied from the one whose layout is written.
"""

from __future__ import annotations

import bisect
import itertools
import logging
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from salsa_peft.soup.checkpoints.configs import check_alike
from salsa_peft.soup.checkpoints.read import CONFIG, FLOATS, Checkpoint, Place
from salsa_peft.soup.checkpoints.vocabularies import check_vocabulary
from salsa_peft.utils import tensor_names
from salsa_peft.utils.errors import SalsaError, require
from salsa_peft.utils.fingerprints import EMBEDDINGS, HEAD
from salsa_peft.utils.safetensors_io import BITS, Entry, SafetensorsFile, make_header, read_exactly

if TYPE_CHECKING:
    import torch


logger = logging.getLogger(__name__)
HEADS = (HEAD, "embed_out.weight")
"""What output embeddings are called."""


class Written(NamedTuple):
    """A weight file of the result."""

    header: bytes
    pieces: list[str]
    """Keys of Alignment.rows in the order of their bytes."""
    size: int
    """Bytes of its tensors."""


class Alignment(NamedTuple):
    """Where each checkpoint has the pieces of the result, which has the layout of one of them."""

    checkpoint: Checkpoint
    """Whose files, names and dtypes the result has."""
    member: int
    """Its number."""
    files: dict[str, Written]
    rows: list[dict[str, Place]]
    """Of each checkpoint, in their order: piece (a tensor, or a part of one) → where it lies."""
    untied: bool
    """Whether the result has output embeddings of their own though config.json says that they are tied."""

    def layout(self) -> dict[str, Place]:
        """Piece → where the checkpoint whose layout is written has it, in the dtype that is written."""
        return self.rows[self.member]


def align(checkpoints: Sequence[Checkpoint]) -> Alignment:
    """Where every checkpoint has the tensors of the result. The layout is that of the first, or of the first whose output embeddings are
    not the input's.

    Raises SalsaError that names file and field or tensor for another architecture, vocabulary, tensor, shape or kind of dtype.
    """
    head = checkpoints[0]
    for other in checkpoints[1:]:
        check_alike(head.config, other.config, head.folder / CONFIG, other.folder / CONFIG)
        check_vocabulary(head.folder, other.folder)
    if all(_reads_alike(head, checkpoint) for checkpoint in checkpoints):
        rows = [dict(checkpoint.tensors) for checkpoint in checkpoints]
        files = {
            name: Written(file.header, list(file.entries), file.size - file.begin) for name, file in head.files.items()
        }
        return Alignment(head, 0, files, rows, untied=False)
    return _aligned_by_model([ModelTensors.of(checkpoint) for checkpoint in checkpoints])


def _reads_alike(head: Checkpoint, other: Checkpoint) -> bool:
    """Whether two checkpoints have the same tensors as far as the names in their files tell, and nothing asks for a closer look."""
    return (
        head.tensors.keys() == other.tensors.keys()
        and head.tied == other.tied
        and all(_fits(place.entry, other.tensors[name].entry) for name, place in head.tensors.items())
        and all(tensor_names.without_wrappers(name) == name for name in other.tensors)
        and not _without_head(head)
        and (not other.tied or all(_same_as_input(other, name) for name in other.tensors))
    )


def _without_head(checkpoint: Checkpoint) -> bool:
    """Whether a language model has no output embeddings of a usual name, though config.json does not say that they are the input's."""
    causal = any(str(name).endswith("ForCausalLM") for name in checkpoint.config.get("architectures") or ())
    with_input = any(name.endswith(EMBEDDINGS) for name in checkpoint.tensors)
    return (
        causal and with_input and not checkpoint.tied and not any(name.endswith(HEADS) for name in checkpoint.tensors)
    )


def _fits(one: Entry, other: Entry) -> bool:
    return one.shape == other.shape and (one.dtype == other.dtype or {one.dtype, other.dtype} <= set(FLOATS))


def _same_as_input(checkpoint: Checkpoint, name: str) -> bool:
    """False for output embeddings with other values than the input's."""
    partner = tied_partner(checkpoint, name)
    return partner is None or same_bits(checkpoint.tensors[name], checkpoint.tensors[partner])


class Part(NamedTuple):
    """Consecutive elements of a model's tensor, and where they lie."""

    start: int
    place: Place


class Span(NamedTuple):
    """Consecutive elements of a tensor in a file: the first of them, and which elements of the model's tensor they are."""

    first: int
    name: str
    start: int
    stop: int


@dataclass(eq=False)
class ModelTensors:
    """A checkpoint's tensors by the names of the model that Transformers makes of it."""

    checkpoint: Checkpoint
    names: tensor_names.ModelNames
    parts: dict[str, list[Part]]
    """The model's name → its elements in order; tied output embeddings are those of the input."""
    spans: dict[str, list[Span]]
    """Name in the files → the model's tensors that its elements belong to; none for what is no parameter."""
    untied: set[str]
    """Output embeddings that have values of their own."""

    @classmethod
    def of(cls, checkpoint: Checkpoint, names: tensor_names.ModelNames | None = None) -> ModelTensors:
        """By config.json, or in a model that is there. Raises SalsaError for a tensor that has no place in the model."""
        where = str(checkpoint.folder)
        names = names or tensor_names.of_config(checkpoint.config, str(checkpoint.folder / CONFIG))
        found = names.resolve({name: place.entry.shape for name, place in checkpoint.tensors.items()}, where)
        for name in found.unknown:
            raise SalsaError(
                f"{checkpoint.tensors[name].file.path}: {name} has no place in {names}, the model that config.json describes; remove the"
                " tensor, or load the model with Transformers and save it again"
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
        """Elements of a model's tensor that lie within one part of it."""
        parts = self.parts[name]
        part = parts[bisect.bisect_right([part.start for part in parts], start) - 1]
        return _slice(part.place, start - part.start, stop - part.start)

    def cuts(self, name: str) -> list[int]:
        """Where the parts of a model's tensor begin."""
        return [part.start for part in self.parts[name]]

    def read(self, name: str) -> torch.Tensor:
        """A copy of the model's tensor, on the CPU."""
        import torch

        pieces = [_read(part.place) for part in self.parts[name]]
        whole = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        return whole.reshape(self.names.shapes[name])


def _slice(place: Place, start: int, stop: int) -> Place:
    """Elements start to stop of a tensor as a tensor of one dimension; all of them: as it is."""
    entry, width = place.entry, BITS[place.entry.dtype] // 8
    if (start, stop) == (0, math.prod(entry.shape)):
        return place
    return Place(place.file, Entry(entry.dtype, (stop - start,), entry.begin + start * width, (stop - start) * width))


def _read(place: Place) -> torch.Tensor:
    return place.file.read_entry(place.entry).flatten()


def _aligned_by_model(views: Sequence[ModelTensors]) -> Alignment:
    """By the names of the models. What is changed in the names, or untied, is said."""
    for view in views:
        wrapped = next((name for name in view.checkpoint.tensors if tensor_names.without_wrappers(name) != name), None)
        if wrapped is not None:
            logger.warning("%s: prefixes of wrappers are taken off, as in %s", view.checkpoint.folder, wrapped)
    tied = {target for view in views for target in view.names.tied}
    own = next((v for v in views if any(t in v.untied or (t in v.parts and t not in v.names.tied) for t in tied)), None)
    shown = own or views[0]
    if own is not None and any(not view.untied and view.names.tied for view in views):
        logger.warning("%s has output embeddings of its own, so the soup has too", own.checkpoint.folder)
    for view in views:
        _check_same_tensors(shown, view)
    _check_head(shown)
    rows: list[dict[str, Place]] = [{} for _ in views]
    files = {}
    for file_name, file in shown.checkpoint.files.items():
        pieces: list[str] = []
        for name in file.entries:
            for piece, places in _pieces(shown, name, views):
                pieces.append(piece)
                for row, place in zip(rows, places, strict=True):
                    row[piece] = place
        files[file_name] = Written(_header(file), pieces, file.size - file.begin)
    return Alignment(
        shown.checkpoint, views.index(shown), files, rows, untied=own is not None and bool(shown.names.tied)
    )


def _check_same_tensors(shown: ModelTensors, view: ModelTensors) -> None:
    for name in sorted(shown.parts.keys() ^ view.parts.keys()):
        lacks, has = (view, shown) if name in shown.parts else (shown, view)
        raise SalsaError(
            f"{lacks.checkpoint.folder}: {lacks.names} there has no {name}, which is in {has.parts[name][0].place.file.path}"
            f" ({has.names}); members of a soup have the same tensors: leave one of them out, or save it again with this tensor"
        )
    for name in shown.parts:
        shape, other = shown.names.shapes[name], view.names.shapes[name]
        require(
            other == shape,
            f"{view.checkpoint.folder}: {name} has shape {list(other)}, but {list(shape)} in {shown.checkpoint.folder}; members of a soup"
            " have the same shapes: leave one of them out",
        )


def _check_head(view: ModelTensors) -> None:
    for name in view.names.parameters - view.parts.keys():
        require(
            not name.endswith(HEADS),
            f"{view.checkpoint.folder}: no member has {name}, which {view.names} needs: it would start at random values; save the models"
            " again with it, or set tie_word_embeddings in config.json if it is the input embeddings",
        )


def _pieces(shown: ModelTensors, name: str, views: Sequence[ModelTensors]) -> Iterator[tuple[str, list[Place]]]:
    """The pieces of a tensor of the layout, and where each checkpoint has them."""
    place = shown.checkpoint.tensors[name]
    spans, total = sorted(shown.spans[name]), math.prod(place.entry.shape)
    if not spans:
        yield name, [_ignored_in(view, name, place) for view in views]
        return
    require(
        sum(span.stop - span.start for span in spans) == total,
        f"{place.file.path}: Transformers takes only a part of {name}: load the model with Transformers and save it again",
    )
    for span in spans:
        inner = {cut for view in views for cut in view.cuts(span.name) if span.start < cut < span.stop}
        for start, stop in itertools.pairwise(sorted({span.start, span.stop, *inner})):
            places = [view.at(span.name, start, stop) for view in views]
            for found in places:
                _check_dtype(found, place, name)
            first = span.first + start - span.start
            yield name if stop - start == total else f"{name}[{first}:{first + stop - start}]", places


def _ignored_in(view: ModelTensors, name: str, place: Place) -> Place:
    """A tensor that is no parameter: the checkpoint's own floats of that name and shape, else what the layout's file has."""
    found = view.checkpoint.tensors[name] if view.spans.get(name) == [] else place
    return found if found.entry.shape == place.entry.shape and found.entry.dtype in FLOATS else place


def _check_dtype(found: Place, place: Place, name: str) -> None:
    require(
        found.entry.dtype == place.entry.dtype or {found.entry.dtype, place.entry.dtype} <= set(FLOATS),
        f"{found.file.path}: the values of {name} are {found.entry.dtype}, but {place.entry.dtype} in {place.file.path}; save one of the"
        " models again in the other's dtype",
    )


def _header(file: SafetensorsFile) -> bytes:
    """A file's header with the names that Transformers knows: without prefixes of wrappers."""
    names = {name: tensor_names.without_wrappers(name) for name in file.entries}
    if all(name == plain for name, plain in names.items()):
        return file.header
    return make_header(((names[name], entry.dtype, entry.shape) for name, entry in file.entries.items()), file.metadata)


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
    return all(a == b for a, b in zip(_chunks(one), _chunks(other), strict=True))


def _chunks(place: Place) -> Iterator[bytes]:
    descriptor = os.open(place.file.path, os.O_RDONLY)
    try:
        for start in range(0, place.entry.size, 2**21):
            piece = bytearray(min(2**21, place.entry.size - start))
            read_exactly(descriptor, memoryview(piece), place.entry.begin + start, place.file.path)
            yield bytes(piece)
    finally:
        os.close(descriptor)
