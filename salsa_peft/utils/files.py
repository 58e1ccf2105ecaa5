"""Files that appear whole or not at all, the lock of a run's folder, JSON lines, and what is said of a full disk. Imports no torch."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from salsa_peft.utils.errors import SalsaError, require

UNWRITTEN = ("No space left on device", "StorageFull", "File too large", "FileTooLarge", "Disk quota exceeded", "PytorchStreamWriter failed",
             "unexpected pos ")  # fmt: skip
"""What safetensors (Rust) and torch (C++) say of a file that could not be written; torch does not say why."""


def require_disk_space(folder: Path, size: float, what: str) -> None:
    """Raise SalsaError, before it is written, where so many bytes can't fit on a folder's disk."""
    place = existing_parent(folder)
    total, _, free = shutil.disk_usage(place)
    if size > free and total > 0:  # some file systems tell no size
        raise SalsaError(
            f"{what}: found {size_text(free)} free on the disk of {place}, expected {size_text(size)}; nothing of it was written, what was saved before is"
            " whole: make room, then go on from there"
        )


def disk_full_message(error: BaseException, folder: Path) -> str | None:
    """What to do about an error in writing for want of room: a full disk, a quota, a limit on files, of Python's, safetensors' or torch's
    writing; else None."""
    seen: list[BaseException] = []
    one: BaseException | None = error
    while one is not None and one not in seen:
        seen.append(one)
        one = one.__cause__ or (None if one.__suppress_context__ else one.__context__)
    cause = next(filter(_is_full, seen), None)
    if cause is None:
        return None
    named = cause.filename if isinstance(cause, OSError) else None
    folder = Path(os.path.abspath(os.fsdecode(named))).parent if isinstance(named, str | bytes) else folder
    place = existing_parent(folder)
    return (
        f"{folder}: found no room to write a file ({size_text(shutil.disk_usage(place).free)} free on its disk; quotas and limits count too),"
        " expected some; what was saved before is whole: make room, then go on from there"
    )


def _is_full(error: BaseException) -> bool:
    """Python's codes, or what torch, safetensors and tokenizers (a plain Exception) say; not of memory that is mapped, whose room is another."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "/dev/shm" not in str(error.filename)
    written = isinstance(error, RuntimeError) or type(error) is Exception or type(error).__name__ == "SafetensorError"
    return written and "mmap" not in str(error) and any(words in str(error) for words in UNWRITTEN)


def existing_parent(folder: Path) -> Path:
    """The folder, or the first above it that is there."""
    return next(path for path in (folder, *folder.parents) if path.is_dir())


def size_text(number: float) -> str:
    """GiB or MiB."""
    unit, name = (2**30, "GiB") if abs(number) >= 2**30 else (2**20, "MiB")
    return f"{number / unit:.1f} {name}"


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Gives a temporary path in the same folder, which becomes `path` when the block ends without an error.

    The file is flushed to the disk before it is renamed, so that `path` is never seen half-written, not even after kill -9 or a power
    loss. After an error the temporary file is removed and `path` is unchanged. Raises SalsaError if `path` is a folder.
    """
    path = Path(path)
    require(
        not path.is_dir(), f"{path}: this is a folder, but a file of this name is to be written; move the folder away"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_atomic(path: str | Path, content: bytes | str) -> None:
    """Write a file through `replacing`: it is there whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)


def read_json(path: str | Path) -> Any:
    """The content of a JSON file. Raises SalsaError, which begins with the path, for a file that cannot be read or is not JSON."""
    try:
        return json.loads(Path(path).read_bytes())
    except FileNotFoundError as error:
        raise SalsaError(f"{path}: no such file; check the path") from error
    except OSError as error:
        raise SalsaError(f"{path}: cannot be read ({error.strerror}); check the file and its permissions") from error
    except (ValueError, RecursionError) as error:
        raise SalsaError(f"{path}: not valid JSON ({error}); copy or save the file again") from error


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a jsonl file; only \\n ends a line, for U+2028 and its like stand unescaped in JSON, and in what people write."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def timestamp() -> str:
    """Local time to the second, with its offset."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def lock_holder(run: Path) -> str | None:
    """Who works on a run's folder, in words, or None: nobody. Writes nothing."""
    try:
        handle = os.open(run / ".lock", os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _holder(handle)
    finally:
        os.close(handle)
    return None


def _holder(handle: int) -> str:
    return " ".join(os.pread(handle, 500, 0).decode("utf-8", "replace").split()) or "another process"


def other_files(folder: Path, *own: str) -> str:
    """What a folder holds besides hidden files and `own`, for a message; empty for nothing."""
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith(".") and path.name not in own)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


@contextlib.contextmanager
def locked(run: Path) -> Iterator[None]:
    """One process per run folder. Raises SalsaError that names the holder; the lock of a process that is gone is free."""
    run.mkdir(parents=True, exist_ok=True)
    require(not (run / ".lock").is_dir(), f"{run / '.lock'}: found a folder, expected a file or nothing; move it away")
    handle = os.open(run / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise SalsaError(f"{run}: in use by {_holder(handle)}; wait for it, or use another --output-dir") from error
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"host {socket.gethostname()}, pid {os.getpid()}, since {timestamp()}\n".encode(), 0)
        yield
        os.ftruncate(handle, 0)
    finally:
        os.close(handle)
