"""How many rows are worked on at once: as many as were asked for, and half of them from the moment that the memory ran out.

transformers.Trainer's auto_find_batch_size would begin anew and make the global batch smaller too.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TypeVar

from .config import SalsaError
from .smaller import out_of_memory

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
