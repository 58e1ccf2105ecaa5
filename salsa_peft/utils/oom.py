"""Out of memory: recognising it, and halving the rows of a forward pass until it fits.

transformers.Trainer's auto_find_batch_size would begin again and make the global batch smaller too. torch is imported only when it happened.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TypeVar

from salsa_peft.utils.errors import SalsaError

PHRASES = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "PT_DEVMEM Allocation failed")
"""What CUDA, HIP, MPS, the CPU's allocator, cuBLAS and HPU say."""


def out_of_memory(error: BaseException) -> bool:
    """Whether it is for want of memory. (accelerate's should_reduce_batch_size takes a kernel that cuDNN lacks for one, and misses two.)"""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in PHRASES)
    )


def lesser(rows: int) -> int | None:
    """The largest divisor up to half, so that what rows divided into these divides into those; None of 1."""
    return next((part for part in range(rows // 2, 0, -1) if rows % part == 0), None)


T = TypeVar("T")


class Room:
    """`rows`: of one forward, at most. `what`: its name in a config, for what is said.

    alone: no other process waits for this one's part; where one does, an error in one process alone would leave it waiting.
    """

    def __init__(self, rows: int, what: str, *, alone: bool = True) -> None:
        self.rows, self.what, self.alone = rows, what, alone
        self.asked = rows

    def fit(self, work: Callable[[], T], rows: int | None = None) -> T:
        """work(), which goes by `self.rows`; where the memory ran out again, from its start, with half of them, and that is said.

        rows: how many there are, where that may be fewer. Raises SalsaError where one row alone was too much; the error itself
        where other processes wait.
        """
        while True:
            try:
                return work()
            except RuntimeError as error:
                self._halve(error, rows)
            from accelerate.utils.memory import clear_device_cache

            clear_device_cache(garbage_collection=True)  # here the frames of what failed are gone

    def _halve(self, error: RuntimeError, rows: int | None) -> None:
        if not self.alone or not out_of_memory(error):
            raise error
        now = min(self.rows, rows or self.rows)
        if now == 1:
            raise SalsaError(
                f"{self.what}: out of memory with one row at a time; shorten model.max_length or generation.max_new_tokens, set"
                f" gradient_checkpointing=true, or take --lora qlora ({' '.join(str(error).split())[:200]})"
            ) from error
        self.rows = now // 2
        print(
            f"{self.what}: out of memory with {now} rows; goes on with {self.rows}, the batches stay as they are",
            file=sys.stderr,
            flush=True,
        )
