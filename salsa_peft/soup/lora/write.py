"""Write a soup of adapters as a PEFT adapter folder, with one module's factors in memory at a time."""

import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from salsa_peft.models.adapters.names import PREFIX
from salsa_peft.soup import arrays
from salsa_peft.soup.arrays import Array
from salsa_peft.soup.checkpoints.write import check_free, locked_output
from salsa_peft.soup.lora import non_lora
from salsa_peft.soup.lora.config import config_fields
from salsa_peft.soup.lora.factors import Stack, Stacks
from salsa_peft.soup.lora.members import tokenizer_of, write_tokenizer
from salsa_peft.soup.lora.read import CONFIG, MORE_TEMPLATES, SUMMARY, TOKENIZER, WEIGHTS
from salsa_peft.soup.lora.svd import Moments, Recompressed, factorize, moments, recompress, squared_norm
from salsa_peft.soup.lora.targets import Shape
from salsa_peft.soup.lora.tensors import Member
from salsa_peft.soup.strategies.elementwise import Elementwise
from salsa_peft.soup.summary import Totals, recompression_errors, relative_norm, summarise
from salsa_peft.utils.errors import require
from salsa_peft.utils.files import sync_folder, write_atomic
from salsa_peft.utils.fingerprints import FINGERPRINT
from salsa_peft.utils.safetensors_io import BITS, NAMES, make_header, safetensors_writer

logger = logging.getLogger(__name__)


class TensorGroup(NamedTuple):
    """Consecutive tensors of the file: names, dtypes and shapes, and a function that yields the values."""

    layout: list[tuple[str, str, tuple[int, ...]]]
    make: Callable[[], Iterator[Array]]


def save(
    members: Sequence[Member], stacks: Stacks, folder: Path, weights: Sequence[float],
    layers: Mapping[str, Sequence[float]], *, merge: Elementwise | None, strategy: str, rank: int | None,
    dtype: str | None, progress: Callable[[int, int], None] | None, more: Mapping[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """Write the folder and return the summary. The arguments are those of StackedAdapter.save; `layers` has all modules.

    Raises SalsaError, and leaves no new file behind, for a soup that cannot be computed or written and for a folder
    that another process is writing. An earlier soup in the folder stays until the new weights are complete.
    """
    stored_dtype = safetensors_dtype(dtype, stacks.dtype)
    ranks = output_ranks(stacks.shapes, rank) if merge is None else dense_ranks(stacks.shapes, rank)
    stacks.check_saveable()
    sources = [member.folder for member in members]
    check_free(folder, sources, adapter=True)
    tokenizer = tokenizer_of(members)
    with locked_output(folder):
        check_free(folder, sources, adapter=True)  # another process may have written before this one got the lock
        for name in (CONFIG, SUMMARY, FINGERPRINT, WEIGHTS, *TOKENIZER):
            for path in folder.glob(f".{name}.*.tmp"):  # left by a write that was killed
                path.unlink(missing_ok=True)
        start = time.perf_counter()
        totals = Totals(np.zeros((len(members), len(members))))
        with arrays.one_thread():
            write_weights(
                folder, tensor_groups(members, stacks, weights, layers, merge, stored_dtype, ranks, totals, progress)
            )
        summary = summarise(members, weights, totals.gram, [member.ranks for member in members])
        summary["norm"] = math.sqrt(sum(totals.norms.values()))
        summary |= {"modules": len(ranks), "ranks": sorted(set(ranks.values()))}
        summary |= {"averaged": non_lora.parameter_names(members)}
        rounding = relative_norm(totals.rounding, sum(totals.norms.values()) - sum(totals.lost.values()))
        summary |= {"strategy": strategy, "dtype": NAMES[stored_dtype], "rounding": rounding, "rank": rank}
        summary |= {"tokenizer": None if tokenizer is None else tokenizer.summary()}
        summary |= {"error": recompression_errors(totals) if rank or merge else None, **more}
        summary |= {"bytes": (folder / WEIGHTS).stat().st_size, "seconds": round(time.perf_counter() - start, 3)}
        write_json(folder / SUMMARY, summary)  # marks the other files of the folder as those of a soup
        if tokenizer is not None:
            write_tokenizer(tokenizer, folder)
        fingerprints = {member.fingerprint for member in members}
        if len(fingerprints) == 1 and None not in fingerprints:
            write_json(folder / FINGERPRINT, {"base": fingerprints.pop()})
        write_json(folder / CONFIG, config_fields(members, stacks, ranks))
        sync_folder(folder)
        return summary


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file. After a crash it has the old content or the new, never a part."""
    write_atomic(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def safetensors_dtype(dtype: str | None, default: str) -> str:
    """Safetensors' name (`BF16`) of a dtype with torch's name (`bfloat16`); `default` if dtype is None."""
    codes = {NAMES[stored_dtype]: stored_dtype for stored_dtype in arrays.DTYPES}
    name = NAMES[default] if dtype is None else dtype.removeprefix("torch.")
    require(name in codes, f"dtype: {dtype!r} is not supported; use one of {', '.join(codes)}")
    return codes[name]


def output_ranks(shapes: dict[str, Shape], rank: int | None, warn: bool = True) -> dict[str, int]:
    """Module → rank of the soup: the stacked rank, reduced where it exceeds `rank`. warn: about a useless `rank`."""
    require(
        rank is None or (isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1),
        f"rank: {rank!r} is not a whole number of at least 1; leave it out for an exact soup",
    )
    highest = max(shape.rank for shape in shapes.values())
    if warn and rank is not None and rank >= highest:
        logger.warning(
            "warning: rank %d has no effect, because no module of the soup has a rank above %d", rank, highest
        )
    return {
        module: shape.rank
        if rank is None or rank >= shape.rank
        else min(max(rank // shape.groups, 1) * shape.groups, shape.limit)
        for module, shape in shapes.items()
    }


def dense_ranks(shapes: dict[str, Shape], rank: int | None) -> dict[str, int]:
    """Module → rank of a soup of dense deltas: `rank`, by default the stacked rank, at most what the shape allows."""
    return {
        module: min(max((rank or shape.rank) // shape.groups, 1) * shape.groups, shape.limit)
        for module, shape in shapes.items()
    }


def write_weights(folder: Path, parts: list[TensorGroup]) -> None:
    """Write the weights. When they are complete, remove the files of an earlier soup.

    Without adapter_config.json the folder cannot be opened; `save` writes the new one last. soup.json is removed last
    here, because tokenizer files in a folder without soup.json count as the user's own and stay.
    """
    header = make_header(entry for part in parts for entry in part.layout)
    with safetensors_writer(folder / WEIGHTS, header) as write:
        for part in parts:
            for (name, stored_dtype, _), values in zip(part.layout, part.make(), strict=True):
                require(
                    arrays.all_finite(arrays.widen(values, stored_dtype)),
                    f"{folder / WEIGHTS}: {name} has values too large for {NAMES[stored_dtype]}; use dtype float32",
                )
                write(arrays.as_bytes(values))
        (folder / CONFIG).unlink(missing_ok=True)
        if (folder / SUMMARY).exists():
            shutil.rmtree(folder / MORE_TEMPLATES, ignore_errors=True)
            for name in (FINGERPRINT, *TOKENIZER, SUMMARY):
                (folder / name).unlink(missing_ok=True)


def tensor_groups(
    members: Sequence[Member], stacks: Stacks, weights: Sequence[float], layers: Mapping[str, Sequence[float]],
    merge: Elementwise | None, stored_dtype: str, ranks: dict[str, int], totals: Totals,
    progress: Callable[[int, int], None] | None,
) -> list[TensorGroup]:  # fmt: skip
    """The tensors of the file in groups, wide dtypes first, so that all are aligned to their element size."""
    layout = [
        (name, stored_dtype, shape) for module in stacks for name, shape in factor_layout(stacks, module, ranks[module])
    ]
    found = [TensorGroup(layout, partial(factors, stacks, layers, merge, stored_dtype, ranks, totals, progress))]
    for name in non_lora.parameter_names(members):
        entries = [member.file.entries[member.non_lora[name]] for member in non_lora.members_with(members, name)]
        kept = arrays.promote(entry.dtype for entry in entries)
        layout = [(PREFIX + non_lora.wrapped(name, stacks.wrappers), kept, entries[0].shape)]
        found.append(TensorGroup(layout, partial(averaged, members, name, weights, kept)))
    return sorted(found, key=lambda part: -BITS[part.layout[0][1]])


def averaged(members: Sequence[Member], name: str, weights: Sequence[float], stored_dtype: str) -> Iterator[Array]:
    """Yield the mean of a parameter that is averaged directly, computed when it is written."""
    yield arrays.narrow(non_lora.mean(members, name, weights), stored_dtype)


def factor_layout(stacks: Stacks, module: str, rank: int) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a module's tensors as PEFT saves them."""
    shape = stacks.shapes[module]
    found = list(zip(stacks.tensor_names(module), shape.saved(rank), strict=True))
    return [*found, (found[1][0].removesuffix("weight") + "bias", (shape.out,))] if stacks.with_bias else found


def factors(stacks: Stacks, layers: Mapping[str, Sequence[float]], merge: Elementwise | None, stored_dtype: str,
            ranks: dict[str, int], totals: Totals, progress: Callable[[int, int], None] | None) -> Iterator[Array]:  # fmt: skip
    """Compute and yield each module's A, B and, with lora_bias, bias; add their norms to `totals`."""
    for done, (module, shape) in enumerate(stacks.shapes.items(), 1):
        stack, weights = stacks[module], layers[module]
        blocks = [moments(A, B) for A, B in stack.each_block()]
        gram = stack.gram(blocks, len(weights))
        totals.gram += gram
        totals.norms[module] = max(float(np.array(weights) @ gram @ np.array(weights)), 0.0)
        if merge is not None:
            A, B, totals.lost[module], totals.norms[module] = merged(module, stack, shape, merge, ranks[module])
        elif ranks[module] < shape.rank:
            A, B, totals.lost[module], totals.norms[module] = reduced(stack, blocks, shape, weights, ranks[module])
        else:
            A, B = stack.A, stack.weighted_B(weights)
        narrowed = rounded(A, B, stored_dtype, totals)
        yield narrowed[0].reshape(-1, narrowed[0].shape[-1])
        yield shape.whole_B(narrowed[1])
        if (bias := stack.weighted_bias(weights)) is not None:
            yield arrays.narrow(bias, stored_dtype)
        if progress is not None:
            progress(done, len(stacks))


def reduced(
    stack: Stack, blocks: Sequence[Moments], shape: Shape, weights: Sequence[float], rank: int
) -> tuple[Array, Array, float, float]:
    """A and B of the best approximation of a module's delta with `rank`; squared norms of the lost part and the whole.

    blocks: the moments of each of the stack's blocks.
    """
    return joined([recompress(block, stack.coefficients(weights), rank // shape.groups) for block in blocks], shape)


def merged(module: str, stack: Stack, shape: Shape, merge: Elementwise, rank: int) -> tuple[Array, Array, float, float]:
    """The results of `reduced` for the dense matrix that an element-wise strategy makes of the members' deltas."""
    import torch

    n = len(merge.weights) + merge.has_start
    dense = merge(module, [torch.from_numpy(stack.delta(i)) for i in range(n)]).numpy()
    blocks = dense.reshape(shape.blocks, *dense.shape[-2:])
    return joined([factorize(block, rank // shape.groups) for block in blocks], shape)


def joined(cut: Sequence[Recompressed], shape: Shape) -> tuple[Array, Array, float, float]:
    """A and B of all blocks of a module, and the sums of their squared norms."""
    A, B = (np.stack(half) if shape.blocks > 1 else half[0] for half in ([c.A for c in cut], [c.B for c in cut]))
    return A, B, sum(c.lost for c in cut), sum(c.norm for c in cut)


def rounded(A: Array, B: Array, stored_dtype: str, totals: Totals) -> list[Array]:
    """Round A and B to the file's dtype. Adds ‖B̂Â − BA‖² = ‖(B̂ − B)Â + B(Â − A)‖² to `totals`."""
    narrowed = [arrays.narrow(values, stored_dtype) for values in (A, B)]
    if stored_dtype not in ("F32", "F64"):
        A_hat, B_hat = (arrays.widen(values, stored_dtype) for values in narrowed)
        change_A, change_B = A_hat - A, B_hat - B
        if change_A.any():
            A_hat, change_B = np.concatenate([A_hat, change_A], axis=-2), np.concatenate([change_B, B], axis=-1)
        pairs = [(A_hat, change_B)] if A_hat.ndim == 2 else zip(A_hat, change_B, strict=True)
        totals.rounding += sum(squared_norm(*pair) for pair in pairs)
    return narrowed
