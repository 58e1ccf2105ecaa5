"""Atomic file writes, JSON files, the lock of a run's folder, and disk space. torch is not imported."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from salsa_peft.utils.errors import SalsaError, require

WRITE_FAILED = ("No space left on device", "StorageFull", "File too large", "FileTooLarge", "Disk quota exceeded",
                "PytorchStreamWriter failed", "unexpected pos ")  # fmt: skip
"""Parts of the messages with which safetensors (Rust) and torch (C++) report a failed write."""


def require_disk_space(folder: Path, size: float, what: str) -> None:
    """Raise SalsaError if `size` bytes do not fit on the disk of a folder."""
    place = existing_parent(folder)
    total, _, free = shutil.disk_usage(place)
    if size > free and total > 0:  # some file systems report a size of 0
        raise SalsaError(
            f"{what}: needs {size_text(size)}, but only {size_text(free)} are free on the disk of {place}. Nothing was"
            " written, and earlier files are complete; free some space and run the same command again"
        )


def disk_full_message(error: BaseException, folder: Path) -> str | None:
    """Message for an error that a full disk caused, with advice; None for any other error.

    An exceeded quota or file size limit counts as a full disk. folder: the folder of the files, for errors that name
    no file.
    """
    chain: list[BaseException] = []
    one: BaseException | None = error
    while one is not None and one not in chain:
        chain.append(one)
        one = one.__cause__ or (None if one.__suppress_context__ else one.__context__)
    cause = next(filter(_is_disk_full, chain), None)
    if cause is None:
        return None
    named = cause.filename if isinstance(cause, OSError) else None
    folder = Path(os.path.abspath(os.fsdecode(named))).parent if isinstance(named, str | bytes) else folder
    free = shutil.disk_usage(existing_parent(folder)).free
    return (
        f"{folder}: a file could not be written because the disk is full ({size_text(free)} free; a quota or a limit on"
        " file sizes can also be the reason). Earlier files are complete; free some space and run the same command again"
    )


def _is_disk_full(error: BaseException) -> bool:
    """Whether the error number or message reports a full disk; full shared memory does not count."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "/dev/shm" not in str(error.filename)
    written = isinstance(error, RuntimeError) or type(error) is Exception or type(error).__name__ == "SafetensorError"
    return written and "mmap" not in str(error) and any(words in str(error) for words in WRITE_FAILED)


def existing_parent(folder: Path) -> Path:
    """The folder itself, or the nearest folder above it that exists."""
    return next(path for path in (folder, *folder.parents) if path.is_dir())


def size_text(size: float) -> str:
    """A number of bytes as text, in GiB or MiB."""
    unit, name = (2**30, "GiB") if abs(size) >= 2**30 else (2**20, "MiB")
    return f"{size / unit:.1f} {name}"


def _require_no_folder(path: Path) -> None:
    message = "this is a folder, but a file with this name must be written; move or rename the folder"
    require(not path.is_dir(), f"{path}: {message}")


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Give a temporary path, which is renamed to `path` when the block ends without an error.

    The temporary file is in the same folder, and is flushed to the disk before it is renamed. `path` is therefore never
    incomplete, not even after kill -9 or a power loss. After an error the temporary file is removed and `path` is
    unchanged. Raises SalsaError if `path` is a folder.
    """
    path = Path(path)
    _require_no_folder(path)
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
    """Write a file through `replacing`: after a crash `path` has the old or the new content, never a part."""
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)


def read_json(path: str | Path) -> Any:
    """The content of a JSON file.

    Raises SalsaError, which begins with the path, for a file that cannot be read or is not JSON.
    """
    try:
        return json.loads(Path(path).read_bytes())
    except FileNotFoundError as error:
        raise SalsaError(f"{path}: no such file; check the path") from error
    except OSError as error:
        raise SalsaError(f"{path}: cannot be read ({error.strerror}); check the file and its permissions") from error
    except (ValueError, RecursionError) as error:
        raise SalsaError(f"{path}: not valid JSON ({error}); copy or save the file again") from error


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file.

    Only \\n ends a line: JSON strings may contain other line separators such as U+2028.
    """
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def append_checked_lines(path: Path, rows: Iterable[Any]) -> None:
    """Append rows as JSON, each line with a checksum, and sync the file to the disk.

    They start on a new line, because the file's last line may be incomplete.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row).encode() for row in rows]
    with path.open("ab") as file:
        file.write(b"\n" + b"".join(_digest(line) + b" " + line + b"\n" for line in lines))
        file.flush()
        os.fsync(file.fileno())


def read_checked_lines(path: Path) -> tuple[list[Any], str | None]:
    """The rows that `append_checked_lines` wrote, and how many lines are damaged, as text; None if none is."""
    lines = [line for line in path.read_bytes().split(b"\n") if line] if path.exists() else []
    whole = [row for digest, _, row in (line.partition(b" ") for line in lines) if digest == _digest(row)]
    damaged = len(lines) - len(whole)
    words = f"{path}: {damaged} of {len(lines)} lines are damaged or incomplete" if damaged else None
    return [json.loads(row) for row in whole], words


def _digest(line: bytes) -> bytes:
    return hashlib.sha256(line).hexdigest()[:16].encode()


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def timestamp() -> str:
    """The local time as text, to the second, with the offset from UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def other_files(folder: Path, *own: str) -> str:
    """Names in a folder as text, except `own` and hidden names: at most three, and the number of others."""
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith(".") and path.name not in own)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Context in which this process holds the lock of a run's folder. A lock ends with its process.

    Raises SalsaError, which names the process that holds the lock, if the folder is locked.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = folder / ".lock"
    _require_no_folder(lock)
    handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise SalsaError(
                f"{folder}: in use by {_read_holder(handle)}; wait for it, or use another folder as --output-dir"
            ) from error
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"host {socket.gethostname()}, pid {os.getpid()}, since {timestamp()}\n".encode(), 0)
        yield
        os.ftruncate(handle, 0)
    finally:
        os.close(handle)


def lock_holder(folder: Path) -> str | None:
    """Process that holds the lock of a run's folder, as text; None if it is unlocked. Writes nothing."""
    try:
        handle = os.open(folder / ".lock", os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _read_holder(handle)
    finally:
        os.close(handle)
    return None


def _read_holder(handle: int) -> str:
    return " ".join(os.pread(handle, 500, 0).decode("utf-8", "replace").split()) or "another process"
