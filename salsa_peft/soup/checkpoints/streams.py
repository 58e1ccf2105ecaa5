"""Computes the weighted sum of checkpoints, and the products of their differences, piece by piece.

Two threads each read, compute and write pieces at their places in the file. A piece does not depend on other pieces,
and products are added in the order of the pieces, so the same members give the same bytes and statistics. The size of
the pieces bounds the memory.
"""

import collections
import contextlib
import itertools
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, NoReturn

from salsa_peft.soup.checkpoints.arithmetic import BlockDtypes, BlockSums, NotFinite, SumPlan
from salsa_peft.soup.checkpoints.read import FLOATS, Place
from salsa_peft.utils.errors import SalsaError
from salsa_peft.utils.safetensors_io import BITS, NAMES, Writer, read_exactly

PIECE = 2**21
"""The size of a piece that one thread computes, in bytes of the member with the widest dtype."""
BLOCK = 2**18
"""Number of elements added at once: large, so threads seldom wait for the GIL, yet within the cache."""
THREADS = 2


@dataclass
class Run:
    """Tensors that lie one after another without a gap in every member's file."""

    dtype: str
    """The dtype in which their sums are written."""
    tensors: list[tuple[str, int]]
    """The tensors' names and numbers of elements."""
    places: list[Place]
    """The place of the first tensor in each member."""
    end: list[int]
    """The offset of the end of the last tensor in each member's file."""
    plan: SumPlan
    """The weights of the members in these tensors."""

    def follows(self, dtype: str, places: Sequence[Place], plan: SumPlan) -> bool:
        """Whether a tensor at `places` continues this run: in the same files, dtypes and plan, without a gap."""
        return (
            dtype == self.dtype
            and plan is self.plan
            and all(
                place.file is mine.file and place.entry.dtype == mine.entry.dtype and place.entry.begin == end
                for place, mine, end in zip(places, self.places, self.end, strict=True)
            )
        )

    def name_of(self, element: int) -> str:
        """The name of the tensor that an element of the run belongs to."""
        ends = itertools.accumulate(count for _, count in self.tensors)
        return next(name for (name, _), end in zip(self.tensors, ends, strict=True) if element < end)


def runs_of(
    names: Sequence[str], members: Sequence[Mapping[str, Place]], layout: Mapping[str, Place], plans: Sequence[SumPlan]
) -> list[Run]:
    """Join tensors, in the order in which they are written, into runs. plans: each tensor's plan.

    `layout` has the written dtypes.
    """
    runs: list[Run] = []
    for name, plan in zip(names, plans, strict=True):
        places, dtype = [member[name] for member in members], layout[name].entry.dtype
        count, end = math.prod(places[0].entry.shape), [place.entry.begin + place.entry.size for place in places]
        if runs and runs[-1].follows(dtype, places, plan):
            runs[-1].tensors.append((name, count))
            runs[-1].end = end
        else:
            runs.append(Run(dtype, [(name, count)], places, end, plan))
    return runs


class Piece(NamedTuple):
    """Elements of a run that one thread computes, and the offset at which their sum is written."""

    run: Run
    start: int
    elements: int
    place: int

    @property
    def size(self) -> int:
        """Size of the written sum in bytes."""
        return self.elements * BITS[self.run.dtype] // 8


def pieces(runs: Sequence[Run], size: int) -> Iterator[Piece]:
    """Cut runs into pieces of at most `size` bytes in the member with the widest dtype."""
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
    layers: Mapping[str, Sequence[float]] | None = None,
    layout: Mapping[str, Place] | None = None,
    write: Writer | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[list[float]]:
    """Write Σ w_i x_i. Returns the products of the differences from member `pivot`, (members, members).

    layers: tensor → weights of its own; None if all tensors have `weights`. Without `write`, only the products are computed. The tensors `names` are written in this order and in the dtypes of
    `layout`. Integer and bool tensors must be equal in all members whose weight is not 0; they add nothing to the
    products. `progress` is called with the size of each piece in bytes. Raises SalsaError naming file and tensor, for
    the first error in the order of the pieces.
    """
    plan = SumPlan(len(members), weights, pivot)
    plans = [plan if layers is None else SumPlan(len(members), layers[name], pivot) for name in names]
    runs = runs_of(names, members, members[pivot] if layout is None else layout, plans)
    total = [0.0] * len(plan.pairs)
    local = threading.local()

    def start() -> None:
        local.sums = BlockSums(plan, BLOCK)

    paths = {place.file.path for run in runs for place in run.places}
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(THREADS, initializer=start) as pool:
        files = {path: stack.enter_context(path.open("rb", buffering=0)).fileno() for path in paths}

        def work(piece: Piece) -> list[float]:
            return _add_piece(piece, local.sums, files, write)

        for piece, products in _in_order(pool, work, pieces(runs, PIECE)):
            total = [a + b for a, b in zip(total, products, strict=True)]
            if write is not None:
                write.start_writeback(piece.place + piece.size)
            if progress is not None:
                progress(piece.size)
    return plan.table(total)


def _in_order(
    pool: ThreadPoolExecutor, work: Callable[[Piece], list[float]], tasks: Iterator[Piece]
) -> Iterator[tuple[Piece, list[float]]]:
    """Yield pieces and results in order, while later pieces are computed. An error cancels the later ones."""
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


def _add_piece(piece: Piece, sums: BlockSums, files: Mapping[Path, int], write: Writer | None) -> list[float]:
    """Read, add and write a piece in blocks. Returns the products of its differences."""
    run, plan = piece.run, piece.run.plan
    sums.plan = plan
    total = [0.0] * len(plan.pairs)
    dtypes = BlockDtypes(tuple(place.entry.dtype for place in run.places), run.dtype)
    for first in range(0, piece.elements, BLOCK):
        count, start = min(BLOCK, piece.elements - first), piece.start + first
        for (file, entry), raw in zip(run.places, sums.raw, strict=True):
            width = BITS[entry.dtype] // 8
            read_exactly(files[file.path], raw[: count * width], entry.begin + start * width, file.path)
        if run.dtype in FLOATS:
            try:
                products, out = sums.add(dtypes, count, write is not None)
            except NotFinite as error:
                _refuse(run, start + error.element, error.member, plan.weights)
            total = [a + b for a, b in zip(total, products, strict=True)]
        else:
            out = sums.raw[plan.pivot][: count * BITS[run.dtype] // 8]
            _require_equal(run, start, count, sums)
        if write is not None:
            write.at(piece.place + first * BITS[run.dtype] // 8, out)
    return total


def _refuse(run: Run, element: int, member: int | None, weights: Sequence[float] | None) -> NoReturn:
    """Raise SalsaError for a value of a member, or of the sum (member None), that is not finite."""
    name = run.name_of(element)
    if member is not None:
        raise SalsaError(
            f"{run.places[member].file.path}: {name} has a value that is not finite; train or save this model again"
        )
    shown = ", ".join(map(str, weights or ()))
    raise SalsaError(
        f"{run.places[0].file.path}: {name}: the weighted sum (weights {shown}) has values that {NAMES[run.dtype]}"
        " cannot hold; use weights of at least 0 that sum to 1, or put a member of a wider dtype first"
    )


def _require_equal(run: Run, start: int, count: int, sums: BlockSums) -> None:
    """Raise SalsaError if members whose weight is not 0 have different integers in a block."""
    width = BITS[run.dtype] // 8
    weights = sums.plan.weights or ()
    found = {i: bytes(sums.raw[i][: count * width]) for i, weight in enumerate(weights) if weight != 0}
    for i, values in list(found.items())[1:]:
        first, head = next(iter(found.items()))
        if values != head:
            byte = next(at for at, (a, b) in enumerate(zip(values, head, strict=True)) if a != b)
            raise SalsaError(
                f"{run.places[i].file.path}: the integers in {run.name_of(start + byte // width)} differ from those in"
                f" {run.places[first].file.path}; integers cannot be averaged, so they must be the same in all members"
            )
