"""Counts operations for which the host would wait for a GPU, in tests on a CPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

READS = {"tolist", "cpu", "numpy", "__array__"}
"""Methods that copy a tensor to the host, without an operation of their own on a CPU tensor."""
SIZES = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique", "unique_")
"""Starts of the names of operations that read a value, or whose result's shape depends on values."""


class HostSyncs(TorchDispatchMode):
    """Context that counts the operations of a block: name → number. `total` is their sum."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.functions = _Reads(self.counts)

    @property
    def total(self) -> int:
        """Number of operations counted so far."""
        return self.counts.total()

    def __enter__(self) -> HostSyncs:
        self.functions.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.functions.__exit__(*error)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = func.__name__.partition(".")[0]
        by_mask = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if by_mask or name.startswith(SIZES) or func.__name__ == "repeat_interleave.Tensor":
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


class _Reads(TorchFunctionMode):
    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()
        self.counts = counts

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        to_host = name == "to" and "cpu" in [value for value in args[1:] if isinstance(value, str)]
        if (name in READS or to_host) and isinstance(args[0], Tensor):
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))
