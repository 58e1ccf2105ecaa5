"""Several checkpoints read side by side, a piece at a time: their weighted sum, and how far apart they are.

    Σ w_i x_i = s · x_p − Σ w_i (x_p − x_i)        s = Σ w_i, p the member of the largest weight

in float32 for 16-bit tensors and in float64 for the others, rounded once to the dtype that is written. With s = 1 equal members
come out to the bit, and differences, of which the distances are made, fall out on the way. Two threads each read, compute and write
pieces of their own, at their places in the file; what a piece gives does not depend on the others, and the products are added up in
the pieces' order, so the same members give the same bytes and figures. Memory is bounded by the pieces.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import math
import os
import queue
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, NoReturn

from salsa_peft.soup.checkpoints.arithmetic import Fault, Kind, Plan, Summing, Sums
from salsa_peft.soup.checkpoints.read import FLOATS, Place
from salsa_peft.utils.errors import SalsaError, require
from salsa_peft.utils.safetensors_io import BITS, NAMES, Writer, read_exactly

PIECE = {"cpu": 2**21, "cuda": 2**26}
"""Bytes of the widest member that a thread takes at once."""
BLOCK = {"cpu": 2**18, "cuda": 2**25}
"""Elements of one step of the arithmetic: of a CPU so many that two threads seldom wait for Python's lock, few enough for its cache."""
THREADS = 2


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


class Piece(NamedTuple):
    """Elements of a run that one thread takes, and the byte at which their sum is written."""

    run: Run
    start: int
    elements: int
    place: int

    @property
    def size(self) -> int:
        """Bytes of the sum."""
        return self.elements * BITS[self.run.dtype] // 8


def pieces(runs: Sequence[Run], size: int) -> Iterator[Piece]:
    """All of the runs; `size` in bytes of the widest member."""
    place = 0
    for run in runs:
        total = sum(count for _, count in run.tensors)
        step = size * 8 // max(BITS[found.entry.dtype] for found in run.places)
        for start in range(0, total, step):
            piece = Piece(run, start, min(step, total - start), place)
            place += piece.size
            yield piece


def stream(
    names: Sequence[str],
    members: Sequence[Mapping[str, Place]],
    weights: Sequence[float] | None,
    *,
    pivot: int,
    layout: Mapping[str, Place] | None = None,
    write: Writer | None = None,
    device: str = "cpu",
    progress: Callable[[int], None] | None = None,
) -> list[list[float]]:
    """Tensors `names` in this order: Σ w_i x_i to `write`, in the dtypes of `layout`, and the products of the differences from the
    pivot: (members, members).

    Integer and bool tensors must be equal in all members of weight (to the bit); they add nothing to the products. `progress` is
    told the bytes of each piece. Raises SalsaError naming file and tensor, of several the first in the order of the names.
    """
    plan = Plan(len(members), weights, pivot)
    runs = runs_of(names, members, members[pivot] if layout is None else layout)
    total = [0.0] * len(plan.pairs)
    idle: queue.SimpleQueue[Summing] = queue.SimpleQueue()
    for _ in range(THREADS):
        idle.put(_summing(plan, device))
    with _opened(runs) as files, ThreadPoolExecutor(THREADS) as pool:

        def work(piece: Piece) -> list[float]:
            sums = idle.get()
            try:
                return _piece(piece, plan, sums, files, write, BLOCK[device])
            finally:
                idle.put(sums)

        for piece, products in _in_order(pool, work, pieces(runs, PIECE[device])):
            total = [a + b for a, b in zip(total, products, strict=True)]
            if write is not None:
                write.all_before(piece.place + piece.size)
            if progress is not None:
                progress(piece.size)
    return plan.table(total)


def _in_order(
    pool: ThreadPoolExecutor, work: Callable[[Piece], list[float]], tasks: Iterator[Piece]
) -> Iterator[tuple[Piece, list[float]]]:
    """Results in the tasks' order, a few tasks ahead; after an error no task is begun."""
    ahead: collections.deque[tuple[Piece, Future[list[float]]]] = collections.deque()
    try:
        for piece in tasks:
            ahead.append((piece, pool.submit(work, piece)))
            if len(ahead) > 8 * THREADS:
                first, future = ahead.popleft()
                yield first, future.result()
        while ahead:
            first, future = ahead.popleft()
            yield first, future.result()
    finally:
        for _, future in ahead:
            future.cancel()


def _summing(plan: Plan, device: str) -> Summing:
    if device == "cpu":
        return Sums(plan, BLOCK[device])
    from salsa_peft.soup.checkpoints.cuda_arithmetic import TorchSums

    return TorchSums(plan, BLOCK[device], device)


@contextlib.contextmanager
def _opened(runs: Sequence[Run]) -> Iterator[dict[Path, int]]:
    """Path → descriptor of every member's files."""
    with contextlib.ExitStack() as stack:
        files: dict[Path, int] = {}
        for path in dict.fromkeys(place.file.path for run in runs for place in run.places):
            files[path] = os.open(path, os.O_RDONLY)
            stack.callback(os.close, files[path])
        yield files


def _piece(
    piece: Piece, plan: Plan, sums: Summing, files: Mapping[Path, int], write: Writer | None, block: int
) -> list[float]:
    """Read, add and write a piece, a block at a time → its products."""
    run, total = piece.run, [0.0] * len(plan.pairs)
    kind = Kind(tuple(place.entry.dtype for place in run.places), run.dtype)
    for first in range(0, piece.elements, block):
        count, start = min(block, piece.elements - first), piece.start + first
        for (file, entry), raw in zip(run.places, sums.raw, strict=True):
            width = BITS[entry.dtype] // 8
            read_exactly(files[file.path], raw[: count * width], entry.begin + start * width, file.path)
        if run.dtype in FLOATS:
            try:
                products, out = sums.add(kind, count, write is not None)
            except Fault as fault:
                _refuse(run, start + fault.element, fault.member, plan.weights)
            total = [a + b for a, b in zip(total, products, strict=True)]
        else:
            out = sums.raw[plan.pivot][: count * BITS[run.dtype] // 8]
            _require_equal(run, start, count, sums, plan.weights)
        if write is not None:
            write.at(piece.place + first * BITS[run.dtype] // 8, out)
    return total


def _refuse(run: Run, element: int, member: int | None, weights: Sequence[float] | None) -> NoReturn:
    """Raise SalsaError that names the file and the tensor of a value that is not finite: a member's, or else of the sum."""
    name = run.name_of(element)
    if member is not None:
        raise SalsaError(
            f"{run.places[member].file.path}: {name}: found a value that is not finite, expected finite ones; train or save that model"
            " again"
        )
    shown = ", ".join(map(str, weights or ()))
    raise SalsaError(
        f"{run.places[0].file.path}: {name}: found a weighted sum that {NAMES[run.dtype]} cannot hold (weights {shown}), expected finite"
        " values; take weights of a mean (0 or more, sum 1), or a first member of a wider dtype"
    )


def _require_equal(run: Run, start: int, count: int, sums: Summing, weights: Sequence[float] | None) -> None:
    """Raise SalsaError where members of weight differ in whole numbers."""
    width = BITS[run.dtype] // 8
    found = {i: bytes(sums.raw[i][: count * width]) for i, weight in enumerate(weights or ()) if weight != 0}
    for i, values in list(found.items())[1:]:
        first, head = next(iter(found.items()))
        if values != head:
            byte = next(at for at, (a, b) in enumerate(zip(values, head, strict=True)) if a != b)
            raise SalsaError(
                f"{run.places[i].file.path}: {run.name_of(start + byte // width)}: found other whole numbers than in"
                f" {run.places[first].file.path}, expected the same: only floats are averaged"
            )


def check_device(device: str) -> None:
    """Raise SalsaError for a device that is not there."""
    require(device in PIECE, f"device: found {device!r:.40}, expected {' or '.join(PIECE)}")
    if device == "cuda":
        import torch

        require(torch.cuda.is_available(), "device: found cuda, but no CUDA device is here; take cpu")
