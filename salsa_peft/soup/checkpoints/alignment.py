"""Finds the same tensors in several checkpoints, and the layout in which their weighted sum is saved.

If the tensor names in the files agree, the files are compared without torch. If names differ (the Hub's GPT-2 and what
Transformers saves, separate or fused experts, prefixes of wrappers, tied output embeddings that are saved or not), each
name is resolved to a name in the model that Transformers makes of the checkpoint (utils/tensor_names.py). A tensor that
is no parameter of the model (rotary frequencies, causal masks) is averaged too; if a checkpoint lacks the tensor, the
tensor of the checkpoint whose layout is written takes its place.
"""

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
"""Endings of the names of output embeddings."""


class OutputFile(NamedTuple):
    """A weight file of the soup."""

    header: bytes
    pieces: list[str]
    """Keys of the dicts in Alignment.rows, in the order in which the pieces lie in the file."""


class Alignment(NamedTuple):
    """Where each checkpoint has the pieces of the soup. The soup has the layout of one checkpoint."""

    checkpoint: Checkpoint
    """The checkpoint whose files, names and dtypes the soup has."""
    files: dict[str, OutputFile]
    rows: list[dict[str, Place]]
    """For each checkpoint a dict: piece (a tensor or a part of a tensor) → its place in the files."""
    layout: dict[str, Place]
    """The dict in `rows` of the checkpoint whose layout the soup has."""
    untied: bool
    """Whether the soup has separate output embeddings, though the checkpoint's config.json ties them."""


def align(checkpoints: Sequence[Checkpoint]) -> Alignment:
    """Find the tensors of the soup in every checkpoint.

    The soup has the layout of the first checkpoint. But if some checkpoints tie the embeddings and others have separate
    output embeddings, the soup has the layout of the first with separate ones. Raises SalsaError naming
    the file and the field or tensor if architectures, vocabularies, tensors, shapes or dtypes (except floats) differ.
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
    """Whether the files alone, without the model, show that two checkpoints have the same tensors."""
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
    """Whether the dtypes of two tensors are equal, or both floats."""
    return one.dtype == other.dtype or {one.dtype, other.dtype} <= set(FLOATS)


def _lacks_head(checkpoint: Checkpoint) -> bool:
    """Whether a language model lacks output embeddings, though config.json does not tie them."""
    causal = any(str(name).endswith("ForCausalLM") for name in checkpoint.config.get("architectures") or ())
    with_input = any(name.endswith(EMBEDDINGS) for name in checkpoint.tensors)
    with_head = any(name.endswith(HEADS) for name in checkpoint.tensors)
    return causal and with_input and not checkpoint.tied and not with_head


def _differing_head(checkpoint: Checkpoint) -> tuple[str, str] | None:
    """Names of output and input embeddings of the same shape but different values; None if there are none."""
    inputs = {name: place for name, place in checkpoint.tensors.items() if name.endswith(EMBEDDINGS)}
    for name, head in checkpoint.tensors.items():
        if name == HEAD or name.endswith(f".{HEAD}"):
            partner = next((other for other, place in inputs.items() if place.entry.shape == head.entry.shape), None)
            if partner is not None and not same_bits(head, inputs[partner]):
                return name, partner
    return None


def check_tied(checkpoint: Checkpoint) -> None:
    """Raise SalsaError if config.json ties the embeddings, but the files have different values for them."""
    if checkpoint.tied and (differing := _differing_head(checkpoint)) is not None:
        head, embeddings = differing
        raise SalsaError(
            f"{checkpoint.tensors[head].file.path}: {head} differs from {embeddings}, though config.json says that they"
            " are tied; save the model again"
        )


def _align_by_model(views: Sequence[ModelTensors]) -> Alignment:
    """Align by the models' parameter names. Warns about removed prefixes and about untied embeddings."""
    for view in views:
        wrapped = next((name for name in view.checkpoint.tensors if tensor_names.without_wrappers(name) != name), None)
        if wrapped is not None:
            logger.warning("%s: prefixes of wrappers are removed, as from %s", view.checkpoint.folder, wrapped)
    tied = {target for view in views for target in view.names.tied}
    own = next((v for v in views if any(t in v.untied or (t in v.parts and t not in v.names.tied) for t in tied)), None)
    chosen = own or views[0]
    if own is not None and any(not view.untied and view.names.tied for view in views):
        logger.warning("%s has separate output embeddings, so the soup has them too", own.checkpoint.folder)
    for view in views:
        _check_same_tensors(chosen, view)
    for name in chosen.names.parameters - chosen.parts.keys():
        require(
            not name.endswith(HEADS),
            f"{chosen.checkpoint.folder}: no member has {name}, so {chosen.names} would initialise it at random; save"
            f" the models again with {name}, or, if it equals the input embeddings, set tie_word_embeddings to true in"
            " config.json",
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
            f"{lacks.checkpoint.folder}: its model ({lacks.names}) has no {name}, which is in"
            f" {has.parts[name][0].place.file.path} ({has.names}); members of a soup must have the same tensors: leave"
            f" out one of these two members, or save {lacks.checkpoint.folder} again with {name}"
        )
    for name in chosen.parts:
        shape, other = chosen.names.shapes[name], view.names.shapes[name]
        require(
            other == shape,
            f"{view.checkpoint.folder}: {name} has shape {list(other)}, but {list(shape)} in"
            f" {chosen.checkpoint.folder}; all shapes must be equal: leave out one of these two members",
        )


def _pieces(chosen: ModelTensors, name: str, views: Sequence[ModelTensors]) -> Iterator[tuple[str, list[Place]]]:
    """Yield the pieces of a tensor of the chosen layout, each with its places in all checkpoints."""
    place = chosen.checkpoint.tensors[name]
    spans, total = sorted(chosen.spans[name]), math.prod(place.entry.shape)
    if not spans:
        yield name, [_no_parameter(view, name, place) for view in views]
        return
    require(
        sum(span.stop - span.start for span in spans) == total,
        f"{place.file.path}: Transformers reads only a part of {name}; load the model with Transformers and"
        " save it again",
    )
    for span in spans:
        cuts = {part.start for view in views for part in view.parts[span.name]}
        inner = {cut for cut in cuts if span.start < cut < span.stop}
        for start, stop in itertools.pairwise(sorted({span.start, span.stop, *inner})):
            places = [view.at(span.name, start, stop) for view in views]
            for found in places:
                require(
                    _same_kind(found.entry, place.entry),
                    f"{found.file.path}: {name} has dtype {found.entry.dtype}, but {place.entry.dtype} in"
                    f" {place.file.path}; save one of these two models again in the dtype of the other",
                )
            first = span.first + start - span.start
            yield name if stop - start == total else f"{name}[{first}:{first + stop - start}]", places


def _no_parameter(view: ModelTensors, name: str, place: Place) -> Place:
    """The place of a tensor that is no parameter: this checkpoint's if it fits and is float, else `place`."""
    found = view.checkpoint.tensors[name] if view.spans.get(name) == [] else place
    return found if found.entry.shape == place.entry.shape and found.entry.dtype in FLOATS else place


def _header(file: SafetensorsFile) -> bytes:
    """A file's header, with tensor names that Transformers knows (without prefixes of wrappers)."""
    names = {name: tensor_names.without_wrappers(name) for name in file.entries}
    if all(name == plain for name, plain in names.items()):
        return file.header
    return make_header(((names[name], entry.dtype, entry.shape) for name, entry in file.entries.items()), file.metadata)
