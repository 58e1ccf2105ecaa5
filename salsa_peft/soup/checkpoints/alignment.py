"""Finds where several checkpoints have the same tensors, and the layout in which their sum is written.

Checkpoints whose files agree in names are compared as they are, without torch. If names differ (the Hub's GPT-2 and what Transformers
saves, experts apart or in one tensor, prefixes of wrappers, tied output embeddings saved or not), each name is resolved to that in the
model that Transformers makes (utils/tensor_names.py). A tensor that is no parameter of the model (rotary frequencies, causal masks) is
averaged if every checkpoint has it, else copied from the checkpoint whose layout is written.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from salsa_peft.soup.checkpoints.configs import check_alike
from salsa_peft.soup.checkpoints.model_tensors import ModelTensors, same_bits
from salsa_peft.soup.checkpoints.read import CONFIG, FLOATS, Checkpoint, Place
from salsa_peft.soup.checkpoints.vocabularies import check_vocabulary
from salsa_peft.utils import tensor_names
from salsa_peft.utils.errors import SalsaError, require
from salsa_peft.utils.fingerprints import EMBEDDINGS, HEAD
from salsa_peft.utils.safetensors_io import Entry, SafetensorsFile, make_header

logger = logging.getLogger(__name__)
HEADS = (HEAD, "embed_out.weight")
"""The ends of the names of output embeddings."""


class OutputFile(NamedTuple):
    """A weight file of the soup."""

    header: bytes
    pieces: list[str]
    """Keys of Alignment.rows, in the order of their bytes."""


class Alignment(NamedTuple):
    """Where each checkpoint has the pieces of the soup, which has the layout of one of them."""

    checkpoint: Checkpoint
    """The checkpoint whose files, names and dtypes the soup has."""
    files: dict[str, OutputFile]
    rows: list[dict[str, Place]]
    """For each checkpoint: piece (a tensor or a part of one) → where it is."""
    layout: dict[str, Place]
    """The row of the checkpoint whose layout is written."""
    untied: bool
    """Whether the soup has output embeddings of its own, though config.json says that they are tied."""


def align(checkpoints: Sequence[Checkpoint]) -> Alignment:
    """Find the tensors of the soup in every checkpoint.

    The layout is that of the first checkpoint, or of the first whose output embeddings differ from its input embeddings. Raises SalsaError naming file and field or tensor for another architecture, vocabulary, tensor, shape or kind of dtype.
    """
    head = checkpoints[0]
    for other in checkpoints[1:]:
        check_alike(head.config, other.config, head.folder / CONFIG, other.folder / CONFIG)
        check_vocabulary(head.folder, other.folder)
    if all(_same_names(head, checkpoint) for checkpoint in checkpoints):
        rows = [dict(checkpoint.tensors) for checkpoint in checkpoints]
        files = {name: OutputFile(file.header, list(file.entries)) for name, file in head.files.items()}
        return Alignment(head, files, rows, rows[0], untied=False)
    return _align_by_model([ModelTensors.of(checkpoint) for checkpoint in checkpoints])


def _same_names(head: Checkpoint, other: Checkpoint) -> bool:
    """Whether the names in the files are enough to tell that two checkpoints have the same tensors."""
    return (
        head.tensors.keys() == other.tensors.keys()
        and head.tied == other.tied
        and all(place.entry.shape == other.tensors[name].entry.shape for name, place in head.tensors.items())
        and all(_same_kind(place.entry, other.tensors[name].entry) for name, place in head.tensors.items())
        and all(tensor_names.without_wrappers(name) == name for name in other.tensors)
        and not _lacks_head(head)
        and (not other.tied or _differing_head(other) is None)
    )


def _same_kind(one: Entry, other: Entry) -> bool:
    """Whether two dtypes are equal, or both floats."""
    return one.dtype == other.dtype or {one.dtype, other.dtype} <= set(FLOATS)


def _lacks_head(checkpoint: Checkpoint) -> bool:
    """Whether a language model lacks output embeddings, though config.json does not tie them."""
    causal = any(str(name).endswith("ForCausalLM") for name in checkpoint.config.get("architectures") or ())
    with_input = any(name.endswith(EMBEDDINGS) for name in checkpoint.tensors)
    with_head = any(name.endswith(HEADS) for name in checkpoint.tensors)
    return causal and with_input and not checkpoint.tied and not with_head


def _differing_head(checkpoint: Checkpoint) -> tuple[str, str] | None:
    """The names of output and input embeddings of the same shape but with different values."""
    inputs = {name: place for name, place in checkpoint.tensors.items() if name.endswith(EMBEDDINGS)}
    for name, head in checkpoint.tensors.items():
        if name == HEAD or name.endswith(f".{HEAD}"):
            partner = next((other for other, place in inputs.items() if place.entry.shape == head.entry.shape), None)
            if partner is not None and not same_bits(head, inputs[partner]):
                return name, partner
    return None


def check_tied(checkpoint: Checkpoint) -> None:
    """Raise SalsaError if the files have other values for output embeddings that config.json ties."""
    if checkpoint.tied and (differing := _differing_head(checkpoint)) is not None:
        head, embeddings = differing
        raise SalsaError(
            f"{checkpoint.tensors[head].file.path}: {head} differs from {embeddings}, though config.json says that they are tied; save the"
            " model again"
        )


def _align_by_model(views: Sequence[ModelTensors]) -> Alignment:
    """Align by the names of the models. Warns about names that are changed and embeddings that are untied."""
    for view in views:
        wrapped = next((name for name in view.checkpoint.tensors if tensor_names.without_wrappers(name) != name), None)
        if wrapped is not None:
            logger.warning("%s: prefixes of wrappers are removed, as in %s", view.checkpoint.folder, wrapped)
    tied = {target for view in views for target in view.names.tied}
    own = next((v for v in views if any(t in v.untied or (t in v.parts and t not in v.names.tied) for t in tied)), None)
    chosen = own or views[0]
    if own is not None and any(not view.untied and view.names.tied for view in views):
        logger.warning("%s has output embeddings of its own, so the soup has them too", own.checkpoint.folder)
    for view in views:
        _check_same_tensors(chosen, view)
    for name in chosen.names.parameters - chosen.parts.keys():
        require(
            not name.endswith(HEADS),
            f"{chosen.checkpoint.folder}: no member has {name}, so {chosen.names} would initialise it at random; save the models again with"
            " it, or set tie_word_embeddings in config.json if it is the input embeddings",
        )
    rows: list[dict[str, Place]] = [{} for _ in views]
    files = {}
    for file_name, file in chosen.checkpoint.files.items():
        pieces: list[str] = []
        for name in file.entries:
            for piece, places in _pieces(chosen, name, views):
                pieces.append(piece)
                for row, place in zip(rows, places, strict=True):
                    row[piece] = place
        files[file_name] = OutputFile(_header(file), pieces)
    untied = own is not None and bool(chosen.names.tied)
    return Alignment(chosen.checkpoint, files, rows, rows[views.index(chosen)], untied)


def _check_same_tensors(chosen: ModelTensors, view: ModelTensors) -> None:
    for name in sorted(chosen.parts.keys() ^ view.parts.keys()):
        lacks, has = (view, chosen) if name in chosen.parts else (chosen, view)
        raise SalsaError(
            f"{lacks.checkpoint.folder}: the model ({lacks.names}) has no {name}, but {has.parts[name][0].place.file.path} has it"
            f" ({has.names}); members of a soup must have the same tensors: leave one out, or save it again with this tensor"
        )
    for name in chosen.parts:
        shape, other = chosen.names.shapes[name], view.names.shapes[name]
        require(
            other == shape,
            f"{view.checkpoint.folder}: {name} has shape {list(other)}, but {list(shape)} in {chosen.checkpoint.folder}; members of a soup"
            " must have the same shapes: leave one out",
        )


def _pieces(chosen: ModelTensors, name: str, views: Sequence[ModelTensors]) -> Iterator[tuple[str, list[Place]]]:
    """The pieces of a tensor of the chosen layout, and where each checkpoint has them."""
    place = chosen.checkpoint.tensors[name]
    spans, total = sorted(chosen.spans[name]), math.prod(place.entry.shape)
    if not spans:
        yield name, [_no_parameter(view, name, place) for view in views]
        return
    require(
        sum(span.stop - span.start for span in spans) == total,
        f"{place.file.path}: Transformers reads only a part of {name}; load the model with Transformers and save it again",
    )
    for span in spans:
        cuts = {part.start for view in views for part in view.parts[span.name]}
        inner = {cut for cut in cuts if span.start < cut < span.stop}
        for start, stop in itertools.pairwise(sorted({span.start, span.stop, *inner})):
            places = [view.at(span.name, start, stop) for view in views]
            for found in places:
                require(
                    _same_kind(found.entry, place.entry),
                    f"{found.file.path}: the values of {name} are {found.entry.dtype}, but {place.entry.dtype} in {place.file.path}; save"
                    " one of the models again in the dtype of the other",
                )
            first = span.first + start - span.start
            yield name if stop - start == total else f"{name}[{first}:{first + stop - start}]", places


def _no_parameter(view: ModelTensors, name: str, place: Place) -> Place:
    """Where to read a tensor that is no parameter: the checkpoint's own floats, else `place`."""
    found = view.checkpoint.tensors[name] if view.spans.get(name) == [] else place
    return found if found.entry.shape == place.entry.shape and found.entry.dtype in FLOATS else place


def _header(file: SafetensorsFile) -> bytes:
    """A file's header with the names that Transformers knows, without prefixes of wrappers."""
    names = {name: tensor_names.without_wrappers(name) for name in file.entries}
    if all(name == plain for name, plain in names.items()):
        return file.header
    return make_header(((names[name], entry.dtype, entry.shape) for name, entry in file.entries.items()), file.metadata)
