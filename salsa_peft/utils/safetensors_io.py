"""Reading and writing safetensors files piece by piece, with checked headers.

The safetensors library is not used, because it reads by mmap, whose page faults cost more time than a soup's
arithmetic, and because it writes from a dict that holds all tensors. Tensors are copied, so that the file may be
changed or removed afterwards. torch is imported only to make a tensor.
"""

from __future__ import annotations

import contextlib
import json
import math
import operator
import os
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from salsa_peft.utils.errors import SalsaError, require
from salsa_peft.utils.files import replacing

if TYPE_CHECKING:
    import torch

BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "I64": 64, "I32": 32, "I16": 16, "I8": 8,
        "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8}  # fmt: skip
NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
         "F8_E5M2": "float8_e5m2", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U64": "uint64", "U32": "uint32",
         "U16": "uint16", "U8": "uint8", "BOOL": "bool"}  # fmt: skip
"""safetensors' name of a dtype → torch's name."""
NO_SAFETENSORS = (
    "this folder has no safetensors file, and weights in other formats are not read. If you trust the weights, load"
    " the model with Transformers and save it again (save_pretrained writes safetensors)"
)
Buffer = bytes | bytearray | memoryview
EARLY = 2**25
"""Number of bytes after which writing to the disk starts, so that the fsync at the end is short."""


class Entry(NamedTuple):
    """A tensor in a file: its dtype and shape, its first byte (begin), and its number of bytes (size)."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    size: int


class SafetensorsFile:
    """The tensors of a safetensors file, in the order in which they lie in the file.

    Raises SalsaError for a file that is missing or damaged.

    any_dtype: accept dtypes that are not in BITS; tensors of these dtypes cannot be read.
    """

    def __init__(self, path: str | Path, *, any_dtype: bool = False) -> None:
        self.path = Path(path)
        try:
            with self.path.open("rb") as raw:
                self.begin = 8 + int.from_bytes(raw.read(8), "little")
                self.size = os.fstat(raw.fileno()).st_size
                self.header = raw.read(self.begin - 8) if self.begin <= self.size else b""
            entries = json.loads(self.header)
            self.metadata: dict[str, str] = entries.pop("__metadata__", {})
            found = [(name, self._entry(given)) for name, given in entries.items()]
        except OSError as error:
            raise SalsaError(
                f"{path}: cannot be read ({error.strerror}); copy or download the weights again"
            ) from error
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
            raise SalsaError(f"{path}: not a safetensors file, or damaged; {_AGAIN}") from None
        self.entries = dict(sorted(found, key=lambda item: item[1].begin))
        place = self.begin
        for name, entry in self.entries.items():
            require(
                any_dtype or entry.dtype in BITS,
                f"{path}: {name} has the unsupported dtype {entry.dtype}; use one of {', '.join(BITS)}",
            )
            bits = math.prod(entry.shape) * BITS[entry.dtype] if entry.dtype in BITS else 8 * entry.size
            fits = entry.begin == place and entry.size * 8 == bits
            require(fits, f"{path}: damaged: the byte range of {name} does not fit its dtype and shape; {_AGAIN}")
            place += entry.size
        require(place == self.size, f"{path}: truncated or damaged: it has {self.size} bytes, not {place}; {_AGAIN}")

    def _entry(self, given: dict[str, Any]) -> Entry:
        first, last = map(operator.index, given["data_offsets"])
        return Entry(given["dtype"], tuple(map(operator.index, given["shape"])), self.begin + first, last - first)

    def read(self, name: str) -> torch.Tensor:
        """A copy of the tensor, on the CPU."""
        return self.read_entry(self.entries[name])

    def read_entry(self, entry: Entry) -> torch.Tensor:
        """A copy of the tensor that an Entry describes, on the CPU."""
        import torch

        raw = torch.empty(entry.size, dtype=torch.uint8)
        self.read_into(raw.numpy().data, entry.begin)
        return raw.view(getattr(torch, NAMES[entry.dtype])).reshape(entry.shape)

    def read_into(self, buffer: memoryview, begin: int) -> None:
        """Fill a buffer with the bytes of the file from `begin` on."""
        with self.path.open("rb", buffering=0) as file:
            read_exactly(file.fileno(), buffer, begin, self.path)


_AGAIN = "copy or save the file again"


def read_exactly(descriptor: int, buffer: memoryview, begin: int, path: Path) -> None:
    """Fill `buffer` with bytes of a file from `begin` on. Raises SalsaError if the file is too short."""
    done = 0
    while done < len(buffer):
        read = os.preadv(descriptor, [buffer[done:]], begin + done)
        require(read > 0, f"{path}: ends at byte {begin + done}; the file became shorter while it was read; {_AGAIN}")
        done += read


def make_header(layout: Iterable[tuple[str, str, Iterable[int]]], metadata: dict[str, str] | None = None) -> bytes:
    """The bytes of a safetensors header, as in SafetensorsFile.header.

    layout: (name, dtype, shape) of each tensor, in the order in which the tensors are written.
    """
    entries: dict[str, Any] = {"__metadata__": metadata or {"format": "pt"}}
    place = 0
    for name, dtype, shape in layout:
        size = math.prod(shape := list(shape)) * BITS[dtype] // 8
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [place, place + size]}
        place += size
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    return text + b" " * (-len(text) % 8)


def safetensors_dtype(dtype: torch.dtype) -> str:
    """safetensors' name of a torch dtype."""
    name = str(dtype).removeprefix("torch.")
    return next(code for code, known in NAMES.items() if known == name)


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor on the CPU, without a copy if it is contiguous."""
    import torch

    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


class Writer:
    """Writes tensor data after a file's header: a call appends, and `at` writes at a given byte."""

    def __init__(self, descriptor: int, begin: int) -> None:
        self.descriptor, self.begin = descriptor, begin
        self.written = self._early = 0
        self._lock = threading.Lock()

    def __call__(self, content: Buffer) -> None:
        self.at(self.written, content)
        self.start_writeback(self.written)

    def at(self, place: int, content: Buffer) -> None:
        """Write at byte `place` after the header."""
        rest, begin, done = memoryview(content), self.begin + place, 0
        while done < len(rest):
            done += os.pwrite(self.descriptor, rest[done:], begin + done)
        with self._lock:
            self.written += done

    def start_writeback(self, place: int) -> None:
        """Start writing the bytes before `place` to the disk, so that the fsync at the end is short."""
        if sys.platform == "linux" and place - self._early >= EARLY:
            begin, self._early = self.begin + self._early, place
            os.posix_fadvise(self.descriptor, begin, self.begin + place - begin, os.POSIX_FADV_DONTNEED)


@contextlib.contextmanager
def safetensors_writer(path: Path, header: bytes) -> Iterator[Writer]:
    """Context that gives the Writer of a new file, which appears under its name when the block ends.

    On Linux the file's disk space is allocated first.

    Raises SalsaError if more or fewer bytes are written than the header says.
    """
    entries = [entry for name, entry in json.loads(header).items() if name != "__metadata__"]
    expected = max((entry["data_offsets"][1] for entry in entries), default=0)
    start = len(header).to_bytes(8, "little") + header
    with replacing(path) as temporary, temporary.open("wb", buffering=0) as file:
        if sys.platform == "linux":
            os.posix_fallocate(file.fileno(), 0, len(start) + expected)
        Writer(file.fileno(), 0)(start)
        write = Writer(file.fileno(), len(start))
        yield write
        require(write.written == expected, f"{path}: {write.written} bytes were written instead of {expected}")
