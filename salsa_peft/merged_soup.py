"""A soup of adapters merged into their base, as a full checkpoint: streamed over the base's shards, a few rows at a time.

    W' = W + Σ_i w_i · scaling_i · B_i · A_i        added in float32, rounded once to the base's dtype

Layout, dtypes and files are the base's, the tokenizer the first member's where it has one. What members train in full
(modules_to_save, biases, tokens) replaces the base's. A base in bitsandbytes' 4 bits is dequantised, and `quantized_base` puts a plain
base through 4 bits and back first, since that is what a QLoRA adapter was trained on (quantised_bases.py); nothing is written in 4 bits.
Left out: grouped convolutions, parameters that are no module's weight, and values that the base has no tensor for (a score head).
"""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from salsa_peft.checkpoint_alignment import EMBEDDINGS, check_tied, tied_partner, vocabulary
from salsa_peft.checkpoint_folders import FLOATS, INDEX, Checkpoint, check_manifest, check_plain, read_checkpoint
from salsa_peft.checkpoint_output import Output, Progress, copy_others, counter, making
from salsa_peft.config import SalsaError, require
from salsa_peft.fingerprints import base_fingerprint
from salsa_peft.quantised_bases import Dequantised, PlainBase, open_base
from salsa_peft.safetensors_files import Buffer, as_bytes

if TYPE_CHECKING:
    from salsa_peft.stacked_adapter import StackedAdapter

logger = logging.getLogger(__name__)

ARITHMETIC = 1
"""Counted up when the same members would give other bytes."""
ELEMENTS = 2**20
"""Of a weight that are merged at once."""
CONV1D = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp")
"""Models whose linears (Conv1D) hold their weights as (in, out)."""


class Edit(NamedTuple):
    """What happens to one tensor of the base."""

    module: str | None = None
    """Its delta is this module's."""
    across: bool = False
    """The weight is (in, out): an embedding or Conv1D."""
    full: torch.Tensor | None = None
    """What replaces it, before anything is added."""
    plus: torch.Tensor | None = None
    """What is added to it."""
    rows: tuple[list[int], torch.Tensor] | None = None
    """Which of its rows are replaced, and by what."""


def merge(
    out: Path | str,
    base: Path | str,
    stacked: StackedAdapter,
    weights: Sequence[float],
    *,
    quantized_base: str | None = None,
    strategy: str = "linear",
    progress: Progress | None = None,
    more: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write base + Σ w_i δ_i into the folder `out` and return the summary, also out/soup.json.

    quantized_base: nf4 or nf4-double, see quantised_bases.py. Raises SalsaError naming file and tensor; then nothing is left behind.
    A killed call, made again, goes on at the first shard that is not whole. `progress` is told (bytes written, bytes in all).
    """
    begun, out = time.perf_counter(), Path(out)
    numbers, checkpoint = stacked.check(weights), read_checkpoint(Path(base))
    source = open_base(checkpoint, quantized_base)
    if not isinstance(source, Dequantised):
        check_plain(checkpoint)
        _check_fingerprint(checkpoint, stacked)
    check_tied(checkpoint)
    edits = _edits(checkpoint, source, stacked, numbers)
    size = sum(map(source.size_of, checkpoint.files))
    folders = [member.folder for member in stacked.members]
    _check_tokenizer(checkpoint, source, folders[0])
    with making(
        out, _identity(checkpoint, stacked, numbers, quantized_base), [checkpoint.folder, *folders], size
    ) as output:
        kept = output.kept
        check_manifest(checkpoint)
        squares = _shards(output, source, edits, stacked, numbers, progress, size)
        _write_files(output, checkpoint, source, folders[0])
        summary = stacked.summary(numbers) | {"kind": "merged", "strategy": strategy, "base": str(checkpoint.folder)}
        summary |= source.said() | {
            "replaced": sorted(name for name, edit in edits.items() if edit.full is not None or edit.rows)
        }
        summary |= {"rounding": math.sqrt(squares[0] / squares[1]) if squares[1] else 0.0, "bytes": size}
        summary |= dict(more or {})
        summary |= {
            "shards": len(checkpoint.files),
            "shards_kept": kept,
            "seconds": round(time.perf_counter() - begun, 3),
        }
        output.finish(source.config(), summary := summary | dict(more or {}))
    return summary


def _identity(
    checkpoint: Checkpoint, stacked: StackedAdapter, weights: list[float], quantized_base: str | None
) -> dict[str, Any]:
    members = []
    for member in stacked.members:
        stat, config = member.file.path.stat(), (member.folder / "adapter_config.json").read_bytes()
        hashes = [hashlib.sha256(part).hexdigest() for part in (member.file.header, config)]
        members.append([str(member.folder.resolve()), stat.st_size, stat.st_mtime_ns, *hashes])
    return {"merged": ARITHMETIC, "weights": weights, "quantized_base": quantized_base, "members": members,
            "base": [str(checkpoint.folder.resolve()), *checkpoint.identity()]}  # fmt: skip


def _check_fingerprint(checkpoint: Checkpoint, stacked: StackedAdapter) -> None:
    """Raise SalsaError where a member says that it was trained on another base."""
    known = next((member for member in stacked.members if member.fingerprint is not None), None)
    if known is None:
        logger.warning(
            "warning: %s: no member says which base it was trained on: that it is this one is believed",
            checkpoint.folder,
        )
        return
    found = base_fingerprint(checkpoint.folder)
    require(
        found == known.fingerprint,
        f"{checkpoint.folder}: found base {found[:12]}…, expected {str(known.fingerprint)[:12]}…, which {known.folder} was trained on",
    )


def _check_tokenizer(checkpoint: Checkpoint, source: PlainBase, member: Path) -> None:
    """Raise SalsaError where the member's tokenizer, which goes with the merge, has new tokens that the base has no rows for."""
    path, own = member / "tokenizer.json", checkpoint.folder / "tokenizer.json"
    name = next((name for name in checkpoint.tensors if name.endswith(EMBEDDINGS)), None)
    if name is None or not path.is_file():
        return
    known = vocabulary(own) if own.is_file() else {}  # a base's own may have more than rows: Gemma 3's image token
    rows, tokens = source.shape(name)[0], {token: n for token, n in vocabulary(path).items() if known.get(token) != n}
    last = max(tokens, key=lambda token: tokens[token], default="")
    require(
        tokens.get(last, 0) < rows,
        f"{path}: found token {last!r:.40} with number {tokens.get(last)}, expected less than {rows}, the rows of {name} in"
        f" {checkpoint.folder}: resize the base's embeddings as in training and save it, or remove the tokenizer",
    )


def _edits(checkpoint: Checkpoint, source: PlainBase, stacked: StackedAdapter, weights: list[float]) -> dict[str, Edit]:
    """By the base's names. Raises SalsaError for what the base has no tensor of that shape for."""
    edits: dict[str, Edit] = {}
    for module, shape in stacked.stacks.shapes.items():
        name = _name_in(checkpoint, f"{module}.weight", stacked)
        lies = source.shape(name)
        across = shape.embedding or _across(checkpoint, stacked, module)
        if len(lies) == 2 and lies[0] != lies[1]:  # where the shape says it, it is right
            across = lies == (*shape.inner, shape.out)
        expected = (*shape.inner, shape.out) if across else (shape.out, *shape.inner)
        _require_shape(checkpoint, name, lies, expected)
        edits[name] = Edit(module=module, across=across)
    for name, tensor in stacked.full_tensors(weights).items():
        _put(edits, checkpoint, source, _name_in(checkpoint, name, stacked), Edit(full=tensor), tuple(tensor.shape))
    for name, tensor in stacked.bias_deltas(weights).items():
        _put(edits, checkpoint, source, _name_in(checkpoint, name, stacked), Edit(plus=tensor), tuple(tensor.shape))
    for name, (rows, values) in stacked.token_rows(weights).items():
        place = _name_in(checkpoint, name, stacked)
        count = source.shape(place)[0]
        where = f"{checkpoint.folder}: {place}"
        require(
            max(rows) < count,
            f"{where}: found {count} rows, expected more than {max(rows)}, a trained token of the adapters",
        )
        _put(edits, checkpoint, source, place, Edit(rows=(rows, values)), (count, values.shape[1]))
    _check_ties(checkpoint, edits)
    return edits


def _put(
    edits: dict[str, Edit], checkpoint: Checkpoint, source: PlainBase, name: str, edit: Edit, shape: tuple[int, ...]
) -> None:
    _require_shape(checkpoint, name, source.shape(name), shape)
    known = edits.get(
        name, Edit()
    )  # PEFT saves embeddings whole where LoRA is on them: their delta is added to what was saved
    alone = name not in edits or edit.rows is None
    require(
        alone,
        f"{checkpoint.folder}: {name}: found trained tokens and another change to it, expected one; merge with PEFT",
    )
    edits[name] = known._replace(
        **{field: value for field, value in edit._asdict().items() if value is not None and field != "across"}
    )


def _require_shape(checkpoint: Checkpoint, name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    dtype = checkpoint.tensors[name].entry.dtype
    file = checkpoint.tensors[name].file.path
    require(
        found == expected,
        f"{file}: {name}: found shape {list(found)} in the base, expected {list(expected)} by the adapters: they belong to another base",
    )
    require(dtype in (*FLOATS, "U8"), f"{file}: {name}: found {dtype}, expected floats that a delta can be added to")


def _name_in(checkpoint: Checkpoint, name: str, stacked: StackedAdapter) -> str:
    """The base's own name for a parameter: hubs' files may lack, or have, the model's first prefix (transformer., model.)."""
    ends = [known for known in checkpoint.tensors if known.endswith(f".{name}")]
    short = name.partition(".")[2]
    found = next((known for known in (name, short) if known in checkpoint.tensors), ends[0] if len(ends) == 1 else None)
    if found is None:
        tied = "; the base's are tied to the input's: untie them first" if name.endswith("lm_head.weight") else ""
        raise SalsaError(
            f"{checkpoint.folder}: found no {name}, which {stacked.members[0].folder} changes{tied}, expected its own base"
        )
    return found


def _across(checkpoint: Checkpoint, stacked: StackedAdapter, module: str) -> bool:
    """Whether a square weight is (in, out)."""
    written = all(member.config["fan_in_fan_out"] for member in stacked.members)
    return (written or checkpoint.config.get("model_type") in CONV1D) and not module.endswith("lm_head")


def _check_ties(checkpoint: Checkpoint, edits: dict[str, Edit]) -> None:
    """A change of tied input embeddings is one of the output's too: as PEFT has it for trained tokens, and for nothing else."""
    head = next((name for name in checkpoint.tensors if tied_partner(checkpoint, name) is not None), None)
    partner = None if head is None else tied_partner(checkpoint, head)
    for name in list(edits):
        ends = name.endswith(EMBEDDINGS)
        if not (ends or name == head) or checkpoint.tied is False or (checkpoint.tied is None and head is not None):
            continue
        require(
            edits[name].rows is not None,
            f"{checkpoint.folder}: {name}: found embeddings that are tied to the output's, expected none: merged, the change would be"
            " to both; untie them first",
        )
        if head is not None and name == partner:
            edits[head] = edits[name]


def _shards(output: Output, source: PlainBase, edits: dict[str, Edit], stacked: StackedAdapter, weights: list[float],
            progress: Progress | None, size: int) -> list[float]:  # fmt: skip
    """Write what is not there yet → [‖what rounding lost of the deltas‖², ‖deltas‖²]."""
    total, tell = [0.0, 0.0], counter(progress, size)
    for name in source.checkpoint.files:

        def make(write: Callable[[Buffer], None], name: str = name) -> dict[str, Any]:
            squares = [0.0, 0.0]
            tell(8 + len(source.header(name)))
            for tensor in source.names(name):
                for piece in _merged(source, tensor, edits.get(tensor), stacked, weights, squares):
                    write(piece)
                    tell(len(piece))
            return {"squares": squares}

        if name in output.done:
            tell(source.size_of(name))
        squares = output.shard(name, source.header(name), make)["squares"]
        total = [a + b for a, b in zip(total, squares, strict=True)]
    return total


def _merged(source: PlainBase, name: str, edit: Edit | None, stacked: StackedAdapter, weights: list[float],
            squares: list[float]) -> Iterator[memoryview]:  # fmt: skip
    """The bytes of a tensor, in pieces."""
    left, right = _factors(edit, stacked, weights)
    for start, given in source.pieces(name, ELEMENTS):
        if edit is None:
            yield as_bytes(given)
            continue
        values = given if edit.full is None else edit.full[start : start + len(given)].to(given.dtype)
        wide = values.to(torch.float64 if values.dtype == torch.float64 else torch.float32)
        delta = torch.zeros_like(wide)
        if left is not None and right is not None:
            delta = (left[start : start + len(values)].to(wide) @ right.to(wide)).reshape(wide.shape)
        elif edit.plus is not None:
            delta = edit.plus[start : start + len(values)].to(wide)
        merged = (wide + delta).to(values.dtype)
        for row, value in zip(*edit.rows, strict=True) if edit.rows else ():
            if start <= row < start + len(values):
                merged[row - start] = value.to(values.dtype)
        lost = float(torch.linalg.vector_norm((merged.to(wide) - wide).sub_(delta)))
        file = source.checkpoint.tensors[name].file.path
        require(
            math.isfinite(lost),
            f"{file}: {name}: found values that are not finite once the soup is merged, expected finite ones",
        )
        if edit.rows is None and edit.full is None:
            squares[0] += lost**2
            squares[1] += float(torch.linalg.vector_norm(delta)) ** 2
        yield as_bytes(merged)


def _factors(
    edit: Edit | None, stacked: StackedAdapter, weights: list[float]
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The delta as left (rows, R) @ right (R, columns)."""
    if edit is None or edit.module is None:
        return None, None
    stack = stacked.stacks[edit.module]
    B = stack.weighted_B(weights)
    return (stack.A.T.contiguous(), B.T.contiguous()) if edit.across else (B, stack.A)


def _write_files(output: Output, checkpoint: Checkpoint, source: PlainBase, member: Path) -> None:
    if (checkpoint.folder / INDEX).is_file():
        output.write(INDEX, source.index())
    copy_others(output, checkpoint.folder, member)
