"""Checkpoints that are whole or not there: written under another name, listed with their hashes, renamed; and found again.

A folder is a checkpoint if its manifest names every file with its SHA-256 and they agree. A kill inside a save leaves the one
before. Imports no torch.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from .config import SalsaError, require
from .fingerprints import sha256
from .runs import sync_folder, write_atomic

PREFIX, PARTIAL = "checkpoint-", ".partial"
MANIFEST, STATE = "checkpoint.json", "salsa_state.json"


def commit(partial: Path, folder: Path) -> None:
    """Turn the files in `partial` into the checkpoint `folder`: flush them, list them, rename; one of that name gives way."""
    files = sorted(file for file in partial.rglob("*") if file.is_file() and file.name != MANIFEST)
    listed = {}
    for file in files:
        with file.open("rb+") as handle:
            os.fsync(handle.fileno())
        listed[file.relative_to(partial).as_posix()] = {"size": file.stat().st_size, "sha256": sha256(file)}
    write_atomic(partial / MANIFEST, json.dumps(listed, indent=2))
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)
    sync_folder(folder.parent)


def fault(folder: Path) -> str | None:
    """Why a folder is no whole checkpoint, or None."""
    try:
        listed = json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError):
        return f"no {MANIFEST} that can be read"
    if not isinstance(listed, dict) or STATE not in listed:
        return f"{MANIFEST} names no {STATE}"
    for name, entry in listed.items():
        file = folder / name
        if not file.is_file():
            return f"missing: {name}"
        if file.stat().st_size != entry["size"] or sha256(file) != entry["sha256"]:
            return f"changed: {name}"
    return None


def checkpoints(output_dir: Path) -> list[Path]:
    """The folders checkpoint-N, the newest first, whole or not."""
    found = [path for path in output_dir.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(PREFIX)), reverse=True)


def last_whole(output_dir: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint, or None; and a line for each newer one that was passed over."""
    passed: list[str] = []
    for folder in checkpoints(output_dir):
        why = fault(folder)
        if why is None:
            return folder, passed
        passed.append(f"{folder}: not whole ({why}), passed over")
    return None, passed


def rotate(output_dir: Path, keep: int | None) -> None:
    """Remove all but the newest `keep` checkpoints (None, 0 or less, as in Transformers: remove none), and what saves that were
    killed left behind."""
    shutil.rmtree(output_dir / PARTIAL, ignore_errors=True)
    for folder in checkpoints(output_dir)[keep:] if keep is not None and keep > 0 else []:
        shutil.rmtree(folder)


def read_state(folder: Path, expected: dict[str, Any]) -> dict[str, Any]:
    """The engine's own state in a checkpoint. Raises SalsaError where it was made by another setting than `expected`."""
    state: dict[str, Any] = json.loads((folder / STATE).read_bytes())
    made = state["setting"]
    for key, value in expected.items():
        require(
            made.get(key) == value,
            f"{folder}: made with {key} {made.get(key)}, found {value} now, expected the same; start anew in another folder",
        )
    return state


def cut(file: Path, size: int) -> None:
    """Take off what was appended to a log after the checkpoint. Raises SalsaError where the log is shorter than it was."""
    found = file.stat().st_size if file.exists() else 0
    if found < size:
        raise SalsaError(f"{file}: found {found} bytes, expected at least {size}, as many as at the checkpoint")
    if file.exists():
        os.truncate(file, size)
