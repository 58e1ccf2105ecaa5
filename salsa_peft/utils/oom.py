"""Out-of-memory errors: detecting them, and halving the micro-batch size until the forward pass fits.

transformers.Trainer's auto_find_batch_size restarts training with a smaller global batch; here the global batch keeps
its size. torch is not imported; accelerate is imported only after an out-of-memory error.
"""

from collections.abc import Callable
from typing import TypeVar

from salsa_peft.utils.console import say
from salsa_peft.utils.errors import SalsaError

PHRASES = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "PT_DEVMEM Allocation failed")
"""Parts of the out-of-memory messages of CUDA, HIP, MPS, the CPU allocator, cuBLAS and HPU."""
T = TypeVar("T")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is an out-of-memory error of Python, the CPU or an accelerator.

    accelerate's should_reduce_batch_size is not used: it also accepts missing cuDNN kernels and lacks two of PHRASES.
    """
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in PHRASES)
    )


def largest_proper_divisor(rows: int) -> int | None:
    """Largest divisor of `rows` that is less than `rows`; None for 1."""
    return next((part for part in range(rows // 2, 0, -1) if rows % part == 0), None)


class MicroBatchLimit:
    """The largest number of rows in one forward pass, halved after an out-of-memory error.

    rows: the current limit. configured: the initial limit. option: the configuration option that sets the limit, for
    messages. single_process: False if other processes wait for this one in collective operations. The limit is then
    never changed, because the processes would run different numbers of forward passes.
    """

    def __init__(self, rows: int, option: str, *, single_process: bool = True) -> None:
        self.rows = self.configured = rows
        self.option, self.single_process = option, single_process

    def run(self, work: Callable[[], T], rows: int | None = None) -> T:
        """Call `work`, which processes `self.rows` rows at a time; halve `self.rows` until memory suffices.

        rows: total number of rows, if it can be below `self.rows`. Raises SalsaError if a single row does not fit, and
        the out-of-memory error itself if `single_process` is False.
        """
        while True:
            try:
                return work()
            except RuntimeError as error:
                self._halve(error, rows)
            from accelerate.utils.memory import clear_device_cache

            # outside `except`, since the failed call's frames, which hold tensors, are freed only here
            clear_device_cache(garbage_collection=True)

    def _halve(self, error: RuntimeError, rows: int | None) -> None:
        if not self.single_process or not is_out_of_memory(error):
            raise error
        used = min(self.rows, rows or self.rows)
        if used == 1:
            raise SalsaError(
                f"{self.option}: out of memory with one row at a time; shorten model.max_length or"
                " generation.max_new_tokens, set gradient_checkpointing=true, or use --lora qlora"
                f" ({' '.join(str(error).split())[:200]})"
            ) from error
        self.rows = used // 2
        going_on = f"continuing with {self.rows} rows; the batch size stays the same"
        say(f"{self.option}: out of memory with {used} rows; {going_on}")
