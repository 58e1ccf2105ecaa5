"""A soup of adapters written as an ordinary PEFT adapter folder, module by module: memory is bounded by one module's factors.

Exact, or recompressed to a rank; computed in float32 (a smaller rank in float64), rounded once to the members' dtype. The weights appear
whole or not at all, soup.json after them and adapter_config.json last, so that a half-made folder opens nowhere.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from salsa_peft import direct_parts, float_arrays
from salsa_peft.adapter_folders import CONFIG, SUMMARY, WEIGHTS, check_out, make_room, remove_remains, write_json
from salsa_peft.adapter_tensors import Member
from salsa_peft.adapter_tokenizers import Tokenizer, tokenizer_of, write_tokenizer
from salsa_peft.checkpoint_output import LOCK
from salsa_peft.float_arrays import Array
from salsa_peft.recompression import moments, recompress, squared_norm
from salsa_peft.soup_config import config_fields
from salsa_peft.soup_summary import Tally, errors, relative, summarise
from salsa_peft.stacks import Shape, Stacks
from salsa_peft.utils.errors import require
from salsa_peft.utils.files import locked, sync_folder
from salsa_peft.utils.fingerprints import FINGERPRINT
from salsa_peft.utils.safetensors_io import BITS, NAMES, make_header, writing

logger = logging.getLogger(__name__)


class Section(NamedTuple):
    """Neighbouring tensors of the file: (name, dtype, shape) of each, and what makes them, in that order."""

    layout: list[tuple[str, str, tuple[int, ...]]]
    make: Callable[[], Iterator[Array]]


@dataclass(frozen=True, kw_only=True)
class SaveOptions:
    """How a soup's folder is written, besides members and weights."""

    strategy: str
    rank: int | None
    """Recompress modules above it. None: exact."""
    dtype: str | None
    """Of the factors. None: the members'."""
    progress: Callable[..., None] | None
    """Called as progress.Update is, once a module."""
    more: Mapping[str, Any]
    """What else the summary says."""


def save(
    members: Sequence[Member], stacks: Stacks, folder: Path, weights: Sequence[float], options: SaveOptions
) -> dict[str, Any]:
    """Write the folder and return the summary, which is its soup.json too.

    Raises SalsaError, and leaves nothing new behind, for what cannot be averaged or written, and for a folder that another process
    writes; an earlier soup in the folder stays until the new weights are there.
    """
    code, ranks = dtype_code(options.dtype, stacks.dtype), kept_ranks(stacks.shapes, options.rank)
    stacks.check_whole()
    check_out(folder, members)
    tokenizer = tokenizer_of(members)
    made = not folder.exists()
    with locked(folder):
        try:
            check_out(folder, members)  # again: until now another process may have written there
            remove_remains(folder)
            return _save(members, stacks, folder, weights, options, code, ranks, tokenizer)
        finally:
            (folder / LOCK).unlink(missing_ok=True)
            if made and not any(folder.iterdir()):
                folder.rmdir()


def _save(
    members: Sequence[Member], stacks: Stacks, folder: Path, weights: Sequence[float], options: SaveOptions,
    code: str, ranks: dict[str, int], tokenizer: Tokenizer | None,
) -> dict[str, Any]:  # fmt: skip
    """What `save` does in a folder that is locked."""
    start = time.perf_counter()
    tally = Tally(np.zeros((len(members), len(members))))
    with float_arrays.one_thread():
        write_weights(folder, sections(members, stacks, weights, code, ranks, tally, options.progress))
    summary = summarise(members, weights, tally.gram, ranks)
    rounding = relative(tally.rounding, sum(tally.norms.values()) - sum(tally.lost.values()))
    summary |= {"strategy": options.strategy, "dtype": NAMES[code], "rounding": rounding, "rank": options.rank}
    summary |= {"tokenizer": None if tokenizer is None else tokenizer.said()}
    summary |= {"error": errors(tally) if options.rank else None, **options.more}
    summary |= {"bytes": (folder / WEIGHTS).stat().st_size, "seconds": round(time.perf_counter() - start, 3)}
    write_json(folder / SUMMARY, summary)  # from here on what lies beside the weights is known as ours
    if tokenizer is not None:
        write_tokenizer(tokenizer, folder)
    fingerprints = {member.fingerprint for member in members}
    if len(fingerprints) == 1 and None not in fingerprints:
        write_json(folder / FINGERPRINT, {"base": fingerprints.pop()})
    write_json(folder / CONFIG, config_fields(members, stacks, ranks))
    sync_folder(folder)
    return summary


def dtype_code(asked: str | None, members: str) -> str:
    """A dtype as torch names it → as safetensors does; None: the members'."""
    codes = {NAMES[code]: code for code in float_arrays.DTYPES}
    name = NAMES[members] if asked is None else asked.removeprefix("torch.")
    require(name in codes, f"dtype: found {asked!r}, expected one of {', '.join(codes)}")
    return codes[name]


def kept_ranks(shapes: dict[str, Shape], rank: int | None) -> dict[str, int]:
    """Module → rank in the file: the stacked one where it is not above what was asked for."""
    right = rank is None or (isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1)
    require(right, f"rank: found {rank!r}, expected a whole number of 1 or more, or none for an exact soup")
    highest = max(shape.rank for shape in shapes.values())
    if rank is not None and rank >= highest:
        logger.warning("warning: rank %d: no module of the soup has more than %d, nothing is cut off", rank, highest)
    return {
        module: shape.rank
        if rank is None or rank >= shape.rank
        else min(max(rank // shape.groups, 1) * shape.groups, shape.limit)
        for module, shape in shapes.items()
    }


def write_weights(folder: Path, parts: list[Section]) -> None:
    header = make_header(entry for part in parts for entry in part.layout)
    with writing(folder / WEIGHTS, header) as write:
        for part in parts:
            for (name, code, _), values in zip(part.layout, part.make(), strict=True):
                require(
                    float_arrays.all_finite(float_arrays.widen(values, code)),
                    f"{folder / WEIGHTS}: {name} has values too large for {NAMES[code]}: ask for dtype float32",
                )
                write(float_arrays.as_bytes(values))
        make_room(folder)


def sections(members: Sequence[Member], stacks: Stacks, weights: Sequence[float], code: str, ranks: dict[str, int], tally: Tally,
             progress: Callable[..., None] | None) -> list[Section]:  # fmt: skip
    """Wide dtypes first, so that every tensor lies at a multiple of its values' size."""
    layout = [
        (name, code, shape) for module in stacks.shapes for name, shape in factor_layout(stacks, module, ranks[module])
    ]
    found = [Section(layout, partial(factors, stacks, weights, code, ranks, tally, progress))]
    for name in direct_parts.names(members):
        kept, holder = direct_parts.dtype_of(members, name), direct_parts.holders(members, name)[0]
        entry = (direct_parts.saved_as(name, stacks.wrappers), kept, holder.file.entries[holder.direct[name]].shape)
        found.append(Section([entry], partial(direct, members, name, weights, kept)))
    return sorted(found, key=lambda part: -BITS[part.layout[0][1]])


def direct(members: Sequence[Member], name: str, weights: Sequence[float], code: str) -> Iterator[Array]:
    yield float_arrays.narrow(direct_parts.mean(members, name, weights), code)


def factor_layout(stacks: Stacks, module: str, rank: int) -> list[tuple[str, tuple[int, ...]]]:
    """PEFT's names and shapes of a module's tensors."""
    shape = stacks.shapes[module]
    found = list(zip(stacks.names(module), shape.saved(rank), strict=True))
    return [*found, (found[1][0].removesuffix("weight") + "bias", (shape.out,))] if stacks.with_bias else found


def factors(stacks: Stacks, weights: Sequence[float], code: str, ranks: dict[str, int], tally: Tally,
            progress: Callable[..., None] | None) -> Iterator[Array]:  # fmt: skip
    """A, B and, with lora_bias, the bias of each module in turn, as they go into the file."""
    for module, shape in stacks.shapes.items():
        arrays = stacks.arrays(module)
        given = [moments(A, B) for A, B in arrays.each_block()]
        gram = arrays.gram(given, len(weights))
        tally.gram += gram
        tally.norms[module] = max(float(np.array(weights) @ gram @ np.array(weights)), 0.0)
        if ranks[module] < shape.rank:
            cut = [recompress(block, arrays.coefficients(weights), ranks[module] // shape.groups) for block in given]
            A, B = (
                np.stack(half) if shape.blocks > 1 else half[0] for half in ([c.A for c in cut], [c.B for c in cut])
            )
            tally.lost[module], tally.norms[module] = sum(c.lost for c in cut), sum(c.norm for c in cut)
        else:
            A, B = arrays.A, arrays.weighted_B(weights)
        narrowed = rounded(A, B, code, tally)
        yield narrowed[0].reshape(-1, narrowed[0].shape[-1])
        yield shape.whole_B(narrowed[1])
        if arrays.bias is not None:
            yield float_arrays.narrow(np.array(weights) @ arrays.bias, code)
        if progress is not None:
            progress(1, total=len(stacks.shapes))


def rounded(A: Array, B: Array, code: str, tally: Tally) -> list[Array]:
    """A and B in the file's dtype; what that changes in their product is added up: B̂Â − BA = (B̂ − B)Â + B(Â − A)."""
    narrowed = [float_arrays.narrow(values, code) for values in (A, B)]
    if code not in ("F32", "F64"):
        A_hat, B_hat = (float_arrays.widen(values, code) for values in narrowed)
        change_A, change_B = A_hat - A, B_hat - B
        if change_A.any():
            A_hat, change_B = np.concatenate([A_hat, change_A], axis=-2), np.concatenate([change_B, B], axis=-1)
        pairs = [(A_hat, change_B)] if A_hat.ndim == 2 else zip(A_hat, change_B, strict=True)
        tally.rounding += sum(squared_norm(*pair) for pair in pairs)
    return narrowed
