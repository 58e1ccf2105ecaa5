"""Safetensors files a piece at a time: headers read and held against the file, tensors read where they lie, files written in order.

Own code, since the safetensors library reads by mmap, whose page faults cost more than a soup's arithmetic, and writes from a
dict that holds every tensor. What is read is copied into memory of its own, so that a file may change or go afterwards.
Imports torch only where a tensor is made.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from salsa_peft.utils.errors import SalsaError, require

if TYPE_CHECKING:
    import torch

BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "I64": 64, "I32": 32, "I16": 16, "I8": 8,
        "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8}  # fmt: skip
NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
         "F8_E5M2": "float8_e5m2", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U64": "uint64", "U32": "uint32",
         "U16": "uint16", "U8": "uint8", "BOOL": "bool"}  # fmt: skip
"""Safetensors' name of a dtype → torch's."""
Buffer = bytes | bytearray | memoryview
EARLY = 2**25
"""Bytes of which the disk is told to begin."""


class Entry(NamedTuple):
    """Where a tensor lies: its first byte in the file and how many bytes it has."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    size: int


class SafetensorsFile:
    """A file's tensors by name, in the order of their bytes. Raises SalsaError for a file that is missing, cut or no safetensors."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            with self.path.open("rb") as raw:
                self.begin = 8 + int.from_bytes(raw.read(8), "little")
                size = os.fstat(raw.fileno()).st_size
                require(8 < self.begin <= size, f"{path}: found {size} bytes, expected a header; {_AGAIN}")
                self.header = raw.read(self.begin - 8)
        except (FileNotFoundError, NotADirectoryError):
            raise SalsaError(
                f"{path}: found no such file, expected weights in safetensors; copy or download it again"
            ) from None
        try:
            entries = json.loads(self.header)
            self.metadata: dict[str, str] = entries.pop("__metadata__", {})
            found = {name: self._entry(given) for name, given in entries.items()}
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
            raise SalsaError(f"{path}: found a damaged header, expected safetensors; {_AGAIN}") from None
        self.entries = dict(sorted(found.items(), key=lambda item: item[1].begin))
        self.size = size
        self._check()

    def _entry(self, given: dict[str, Any]) -> Entry:
        first, last = given["data_offsets"]
        return Entry(given["dtype"], tuple(given["shape"]), self.begin + first, last - first)

    def _check(self) -> None:
        """Every tensor's bytes follow the one's before, are as many as its shape has, and end with the file."""
        place = self.begin
        for name, entry in self.entries.items():
            require(
                entry.dtype in BITS,
                f"{self.path}: {name}: found dtype {entry.dtype}, expected one of {', '.join(BITS)}",
            )
            bits = math.prod(entry.shape) * BITS[entry.dtype]
            fits = entry.begin == place and entry.size * 8 == bits
            require(fits, f"{self.path}: {name}: found other bytes than its shape has in the header; {_AGAIN}")
            place += entry.size
        require(
            place == self.size,
            f"{self.path}: found {self.size} bytes, expected {place}: it is cut or damaged; {_AGAIN}",
        )

    def read(self, name: str) -> torch.Tensor:
        """A copy of the tensor, on the CPU."""
        return self.read_entry(self.entries[name])

    def read_entry(self, entry: Entry) -> torch.Tensor:
        """The same of any bytes in the file."""
        import torch

        raw = torch.empty(entry.size, dtype=torch.uint8)
        self.read_into(raw.numpy().data, entry.begin)
        return raw.view(getattr(torch, NAMES[entry.dtype])).reshape(entry.shape)

    def read_into(self, buffer: memoryview, begin: int) -> None:
        """Fill a buffer with the bytes of the file from `begin` on."""
        with self.path.open("rb", buffering=0) as file:
            read_exactly(file.fileno(), buffer, begin, self.path)


_AGAIN = "copy or save it again"


def read_exactly(descriptor: int, buffer: memoryview, begin: int, path: Path) -> None:
    """Read len(buffer) bytes from `begin` on. Raises SalsaError where the file ends before."""
    done = 0
    while done < len(buffer):
        read = os.preadv(descriptor, [buffer[done:]], begin + done)
        require(
            read > 0,
            f"{path}: found its end at byte {begin + done}, expected more: it was cut while it was read; {_AGAIN}",
        )
        done += read


def make_header(layout: Iterable[tuple[str, str, Iterable[int]]], metadata: dict[str, str] | None = None) -> bytes:
    """Names, dtypes (safetensors' names) and shapes in the order of their bytes → a header, as SafetensorsFile.header has it."""
    entries: dict[str, Any] = {"__metadata__": metadata or {"format": "pt"}}
    place = 0
    for name, dtype, shape in layout:
        size = math.prod(shape := list(shape)) * BITS[dtype] // 8
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [place, place + size]}
        place += size
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    return text + b" " * (-len(text) % 8)


def safetensors_dtype(dtype: torch.dtype) -> str:
    """torch's dtype → safetensors' name."""
    name = str(dtype).removeprefix("torch.")
    return next(code for code, known in NAMES.items() if known == name)


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor on the CPU, contiguous, not copied."""
    import torch

    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


class Writer:
    """Takes the bytes that follow a file's header: one after the other by calling it, or each at its place by `at`, from any thread."""

    def __init__(self, descriptor: int, begin: int) -> None:
        self.descriptor, self.begin = descriptor, begin
        self.written = self._early = 0
        self._lock = threading.Lock()

    def __call__(self, content: Buffer) -> None:
        self.at(self.written, content)
        self.all_before(self.written)

    def at(self, place: int, content: Buffer) -> None:
        """At the byte `place` behind the header."""
        rest, begin = memoryview(content), self.begin + place
        done = 0
        while done < len(rest):
            done += os.pwrite(self.descriptor, rest[done:], begin + done)
        with self._lock:
            self.written += done

    def all_before(self, place: int) -> None:
        """All bytes before this one are there: the disk may begin with them, so that the fsync at the end finds little to do."""
        if sys.platform == "linux" and place - self._early >= EARLY:
            begin, self._early = self.begin + self._early, place
            os.posix_fadvise(self.descriptor, begin, self.begin + place - begin, os.POSIX_FADV_DONTNEED)


@contextlib.contextmanager
def safetensors_writer(path: Path, header: bytes) -> Iterator[Writer]:
    """Gives the Writer of a file that appears under its name when all bytes are there, or not at all. Its room is taken beforehand.

    Raises SalsaError where more or fewer bytes came than the header says.
    """
    entries = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
    expected = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    start = len(header).to_bytes(8, "little") + header
    try:
        with temporary.open("wb", buffering=0) as file:
            if sys.platform == "linux":
                os.posix_fallocate(file.fileno(), 0, len(start) + expected)
            Writer(file.fileno(), 0)(start)
            write = Writer(file.fileno(), len(start))
            yield write
            require(write.written == expected, f"{path}: {write.written} bytes were written, expected {expected}")
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
