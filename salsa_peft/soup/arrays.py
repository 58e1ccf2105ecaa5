"""Reads float tensors of safetensors files as NumPy arrays, and converts them between dtypes.

This module uses NumPy and not torch, because importing torch takes longer than averaging a 7B model's adapters. NumPy
has no bfloat16, so its bits are taken as the upper half of a float32. Values are rounded to nearest, ties to even.
"""

import contextlib
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from salsa_peft.utils.errors import require
from salsa_peft.utils.safetensors_io import Buffer, SafetensorsFile

Array = NDArray[Any]
DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
"""Safetensors' name of a float dtype → NumPy's name; bits of bfloat16 are kept as unsigned integers."""


def read(file: SafetensorsFile, name: str) -> Array:
    """Read a tensor as float32, or float64 if saved so. Raises SalsaError if a value is not finite."""
    entry = file.entries[name]
    raw = np.empty(entry.size, np.uint8)
    file.read_into(raw.data, entry.begin)
    values = widen(raw.view(DTYPES[entry.dtype]), entry.dtype).reshape(entry.shape)
    require(all_finite(values), f"{file.path}: {name} has values that are not finite; train or save this adapter again")
    return values


def all_finite(values: Array) -> bool:
    """Whether all values are finite. A finite sum proves this, at a tenth of the cost of isfinite."""
    with np.errstate(all="ignore"):
        return math.isfinite(values.sum()) or bool(np.isfinite(values).all())


def widen(values: Array, dtype: str) -> Array:
    """Convert values of a dtype in DTYPES exactly to float32; F64 stays float64."""
    if dtype == "BF16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32) if dtype == "F16" else values


def narrow(values: Array, dtype: str) -> Array:
    """Round float32 or float64 to a dtype in DTYPES, ties to even; too large values become infinite."""
    with np.errstate(over="ignore"):
        if dtype != "BF16":
            return values.astype(DTYPES[dtype], copy=False)
        single = round_to_odd(values) if values.dtype == np.float64 else values
        bits = np.ascontiguousarray(single, np.float32).view(np.uint32)
    return ((bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16).astype(np.uint16)


def round_to_odd(values: Array) -> Array:
    """Round float64 to float32 by round-to-odd. Rounding the result to 16 bits equals rounding once."""
    found = values.astype(np.float32)
    back, bits = found.astype(np.float64), found.view(np.uint32)
    bits -= np.abs(back) > np.abs(values)
    bits |= back != values
    return found


def as_bytes(values: Array) -> Buffer:
    """An array's bytes in C order, without a copy if it is contiguous."""
    return np.ascontiguousarray(values).reshape(-1).data.cast("B")


def promote(dtypes: Iterable[str]) -> str:
    """The smallest dtype that holds all values of `dtypes` exactly, as torch.promote_types finds it."""
    found = set(dtypes)
    return found.pop() if len(found) == 1 else "F64" if "F64" in found else "F32"


def one_thread() -> contextlib.AbstractContextManager[Any]:
    """Context in which BLAS uses one thread: with thin matrices, more threads take 20 times the CPU time."""
    from threadpoolctl import threadpool_limits

    return threadpool_limits(limits=1, user_api="blas")  # type: ignore[no-any-return]
