"""Several checkpoints read side by side, a piece at a time: their weighted sum, and how far apart they are.

    Σ w_i x_i = s · x_p + Σ w_i (x_i − x_p)        s = Σ w_i, p the member of the largest weight

in float32 for 16-bit tensors and in float64 for the others, rounded once to the dtype that is written. With s = 1 equal members
come out to the bit, and differences, of which the distances are made, fall out on the way: this and their products cost as much as
torch.lerp in bf16 with the distances apart, so there is one way only. Memory is bounded by the piece.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from salsa_peft.checkpoint_folders import FLOATS, Place
from salsa_peft.config import SalsaError, require
from salsa_peft.safetensors_files import BITS, NAMES, Buffer, as_bytes, fill

PIECE = {"cpu": 2**21, "cuda": 2**26}
"""Bytes of the widest member that are read at once: small enough to stay in a CPU's cache, large enough to keep a GPU busy."""
BLOCK = 2**18
"""Elements of one step of a CPU's arithmetic: its operands stay in the inner cache."""


@dataclass
class Run:
    """Tensors that lie one after the other, without a gap, in every member's file."""

    dtype: str
    """In which they are written."""
    tensors: list[tuple[str, int]]
    """Names and their numbers of elements."""
    places: list[Place]
    """In each member, of the first tensor."""
    end: list[int]
    """In each member, the byte after the last tensor."""

    def follows(self, dtype: str, places: Sequence[Place]) -> bool:
        """Whether a tensor at `places` goes on where this run ends, in the same files and dtypes."""
        return dtype == self.dtype and all(
            place.file is mine.file and place.entry.dtype == mine.entry.dtype and place.entry.begin == end
            for place, mine, end in zip(places, self.places, self.end, strict=True)
        )

    def name_of(self, element: int) -> str:
        """The tensor that an element of the run belongs to."""
        ends = itertools.accumulate(count for _, count in self.tensors)
        return next(name for (name, _), end in zip(self.tensors, ends, strict=True) if element < end)


def runs_of(names: Sequence[str], members: Sequence[Mapping[str, Place]], layout: Mapping[str, Place]) -> list[Run]:
    """Tensors in the order in which they are written, in the dtypes of `layout` → maximal runs."""
    runs: list[Run] = []
    for name in names:
        places, dtype = [member[name] for member in members], layout[name].entry.dtype
        count, end = math.prod(places[0].entry.shape), [place.entry.begin + place.entry.size for place in places]
        if runs and runs[-1].follows(dtype, places):
            runs[-1].tensors.append((name, count))
            runs[-1].end = end
        else:
            runs.append(Run(dtype, [(name, count)], places, end))
    return runs


def pieces(runs: Sequence[Run], members: int, size: int) -> Iterator[tuple[Run, int, list[torch.Tensor]]]:
    """(run, its first element, each member's values in its own dtype) on the CPU; the next is read while one is worked on.

    The tensors are reused: they hold until the next but one is asked for.
    """
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(1))
        buffers = [[torch.empty(size, dtype=torch.uint8) for _ in range(members)] for _ in range(2)]
        files: dict[Path, int] = {}

        def read(run: Run, start: int, count: int, into: list[torch.Tensor]) -> tuple[Run, int, list[torch.Tensor]]:
            values = []
            for (file, entry), buffer in zip(run.places, into, strict=True):
                if file.path not in files:
                    files[file.path] = os.open(file.path, os.O_RDONLY)
                    stack.callback(os.close, files[file.path])
                width = BITS[entry.dtype] // 8
                part = buffer[: count * width]
                fill(files[file.path], part.numpy().data, entry.begin + start * width, file.path)
                values.append(part.view(getattr(torch, NAMES[entry.dtype])))
            return run, start, values

        waiting = None
        for number, (run, start, count) in enumerate(_plan(runs, size)):
            ready = pool.submit(read, run, start, count, buffers[number % 2])
            if waiting is not None:
                yield waiting.result()
            waiting = ready
        if waiting is not None:
            yield waiting.result()


def _plan(runs: Sequence[Run], size: int) -> Iterator[tuple[Run, int, int]]:
    for run in runs:
        total = sum(count for _, count in run.tensors)
        step = size * 8 // max(BITS[place.entry.dtype] for place in run.places)
        for start in range(0, total, step):
            yield run, start, min(step, total - start)


class Mix:
    """The weighted sum of pieces, and the products of the members' differences from the pivot, all pieces added up.

    `weights`: one for each member; None: nothing is summed, the products alone are wanted. `products`: (members, members), float64.
    """

    def __init__(self, members: int, weights: Sequence[float] | None, pivot: int, device: str) -> None:
        self.weights, self.pivot, self.device = weights, pivot, device
        self.others = [i for i in range(members) if i != pivot]
        self.sum = 1.0 if weights is None else math.fsum(weights)
        self.mean = weights is not None and min(weights) >= 0 and self.sum <= 1 + 1e-6
        """Of members of one dtype it is no larger than they are."""
        self.products = [[0.0] * members for _ in range(members)]
        self._buffers: dict[torch.dtype, list[torch.Tensor]] = {}

    def add(self, run: Run, start: int, values: list[torch.Tensor], out: torch.Tensor | None) -> None:
        """Take in a piece: values and out (elements,). Raises SalsaError naming file and tensor for values that are not finite."""
        narrow = all(part.element_size() == 2 for part in (*values, *([] if out is None else [out])))
        wide = torch.float32 if narrow else torch.float64
        step = BLOCK if self.device == "cpu" else len(values[0])
        buffers = self._wide(wide, step)
        for first in range(0, len(values[0]), step):
            block = [value[first : first + step].to(self.device) for value in values]
            into = None if out is None else out[first : first + step]
            if not self._block(block, [buffer[: len(block[0])] for buffer in buffers], into):
                _refuse(run, start + first, block, into, self.weights)

    def _wide(self, dtype: torch.dtype, step: int) -> list[torch.Tensor]:
        if dtype not in self._buffers or len(self._buffers[dtype][0]) < step:
            self._buffers[dtype] = [
                torch.empty(step, dtype=dtype, device=self.device) for _ in range(1 + len(self.others))
            ]
        return self._buffers[dtype]

    def _block(self, block: list[torch.Tensor], wide: list[torch.Tensor], out: torch.Tensor | None) -> bool:
        """One step; whether all its values, and those of the sum, are finite."""
        total, differences = wide[0].copy_(block[self.pivot]), wide[1:]
        for i, difference in zip(self.others, differences, strict=True):
            difference.copy_(block[i]).sub_(total)
        products = self._products(differences)
        if not all(map(math.isfinite, products)):
            if not all(bool(value.isfinite().all()) for value in block):
                return False
            # the squares, or the differences themselves, pass float32's range
            total = block[self.pivot].to(torch.float64, copy=True)
            differences = [block[i].to(torch.float64, copy=True).sub_(total) for i in self.others]
            products = self._products(differences)
        if not differences and not math.isfinite(float(torch.dot(total, total))) and not bool(total.isfinite().all()):
            return False
        pairs, moves = iter(products), []
        for at, i in enumerate(self.others):
            for j in self.others[: at + 1]:
                product = next(pairs)
                self.products[i][j] += product
                self.products[j][i] += product if i != j else 0.0
            moves.append(product != 0 or bool(differences[at].any()))  # a small difference's square may be 0
        if out is None:
            return True
        self._sum(total, differences, moves, out)
        if self.mean and all(map(math.isfinite, products)) and all(value.dtype == out.dtype for value in block):
            return True
        square, largest = float(torch.dot(total, total)), torch.finfo(out.dtype).max
        held = math.isfinite(square) and square <= largest * largest  # so is every value; else they are looked at
        return held or bool(out.isfinite().all())

    @staticmethod
    def _products(differences: list[torch.Tensor]) -> list[float]:
        return [float(torch.dot(one, other)) for at, one in enumerate(differences) for other in differences[: at + 1]]

    def _sum(self, total: torch.Tensor, differences: list[torch.Tensor], moves: list[bool], out: torch.Tensor) -> None:
        assert self.weights is not None
        if abs(self.sum - 1) > 1e-6:
            total.mul_(self.sum)
        for i, difference, moved in zip(self.others, differences, moves, strict=True):
            if moved and self.weights[i] != 0:  # adding nothing: −0.0 + 0.0 would lose its sign
                total.add_(difference, alpha=self.weights[i])
        out.copy_(total)


def _refuse(
    run: Run, start: int, block: list[torch.Tensor], out: torch.Tensor | None, weights: Sequence[float] | None
) -> None:
    """Raise SalsaError that names the file and the tensor of the first value that is not finite: a member's, or else of the sum."""
    for place, value in zip(run.places, block, strict=True):
        if not bool(value.isfinite().all()):
            name = run.name_of(start + int((~value.isfinite()).nonzero()[0]))
            raise SalsaError(
                f"{place.file.path}: {name}: found a value that is not finite, expected finite ones; train or save that model again"
            )
    assert out is not None and weights is not None
    name, shown = run.name_of(start + int((~out.isfinite()).nonzero()[0])), ", ".join(map(str, weights))
    raise SalsaError(
        f"{run.places[0].file.path}: {name}: found a weighted sum that {NAMES[run.dtype]} cannot hold (weights {shown}), expected finite"
        " values; take weights of a mean (0 or more, sum 1), or a first member of a wider dtype"
    )


def stream(
    names: Sequence[str],
    members: Sequence[Mapping[str, Place]],
    weights: Sequence[float] | None,
    *,
    pivot: int,
    layout: Mapping[str, Place] | None = None,
    write: Callable[[Buffer], None] | None = None,
    device: str = "cpu",
    progress: Callable[[int], None] | None = None,
) -> list[list[float]]:
    """Tensors `names` in this order: Σ w_i x_i to `write`, in the dtypes of `layout`, and the products of the differences (Mix).

    Integer and bool tensors must be equal in all members of weight (to the bit); they add nothing to the products. `progress` is
    told the bytes of each piece. Raises SalsaError naming file and tensor.
    """
    mix = Mix(len(members), weights, pivot, device)
    runs = runs_of(names, members, members[pivot] if layout is None else layout)
    outs = [torch.empty(PIECE[device] * 4, dtype=torch.uint8) for _ in range(2)]  # a piece of 16 bits, written in 64
    threads = torch.get_num_threads()
    torch.set_num_threads(
        1
    )  # operands of one step are too small to share; the other core reads ahead and writes behind
    try:
        with ThreadPoolExecutor(1) as pool:
            writing: Future[None] | None = None
            for number, (run, start, values) in enumerate(pieces(runs, len(members), PIECE[device])):
                out = outs[number % 2][: len(values[pivot]) * BITS[run.dtype] // 8]
                part = out.view(getattr(torch, NAMES[run.dtype]))
                if run.dtype in FLOATS:
                    mix.add(run, start, values, None if write is None else part)
                elif weights is not None:
                    _require_equal(run, start, values, weights)
                    part.copy_(values[pivot])
                if writing is not None:
                    writing.result()
                writing = None if write is None else pool.submit(write, as_bytes(part))
                if progress is not None:
                    progress(part.numel() * part.element_size())
            if writing is not None:
                writing.result()
    finally:
        torch.set_num_threads(threads)
    return mix.products


def _require_equal(run: Run, start: int, values: list[torch.Tensor], weights: Sequence[float]) -> None:
    first, *others = (i for i in range(len(values)) if weights[i] != 0)
    for i in others:
        if not torch.equal(values[i], values[first]):
            name = run.name_of(start + int((values[i] != values[first]).nonzero()[0]))
            raise SalsaError(
                f"{run.places[i].file.path}: {name}: found other whole numbers than in {run.places[first].file.path}, expected the same:"
                " only floats are averaged"
            )


def check_device(device: str) -> None:
    """Raise SalsaError for a device that is not there."""
    require(device in PIECE, f"device: found {device!r:.40}, expected {' or '.join(PIECE)}")
    require(device != "cuda" or torch.cuda.is_available(), "device: found cuda, but no CUDA device is here; take cpu")
