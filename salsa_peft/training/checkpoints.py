"""Checkpoints that are whole or not there: written under another name, listed with their hashes, renamed; and found again.

A folder is a checkpoint if its manifest names every file with its SHA-256 and they agree. A kill inside a save leaves the one
before. Imports no torch.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

from salsa_peft.utils.errors import require
from salsa_peft.utils.files import sync_folder, write_atomic
from salsa_peft.utils.fingerprints import sha256

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
        _remove(folder, partial.parent)
    partial.rename(folder)
    sync_folder(folder.parent)


def _remove(folder: Path, aside: Path) -> None:
    """Under another name first: a kill leaves no half of a checkpoint."""
    old = aside / f"{folder.name}.old"
    aside.mkdir(exist_ok=True)
    shutil.rmtree(old, ignore_errors=True)  # of a kill before
    folder.rename(old)
    shutil.rmtree(old)


def fault(folder: Path) -> str | None:
    """Why a folder is no whole checkpoint, or None."""
    try:
        listed = json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError, RecursionError):
        return f"no {MANIFEST} that can be read"
    if not isinstance(listed, dict) or STATE not in listed:
        return f"{MANIFEST} names no {STATE}"
    for name, entry in listed.items():
        file = folder / name
        if not isinstance(entry, dict):
            return f"{MANIFEST} says nothing of {name}"
        if not file.is_file():
            return f"missing: {name}"
        if file.stat().st_size != entry.get("size") or sha256(file) != entry.get("sha256"):
            return f"changed: {name}"
    return None


def checkpoints(output_dir: Path) -> list[Path]:
    """The folders checkpoint-N, the one saved last first, whole or not; those that don't say when they were saved before all others.

    Not by N alone: a trainer that trains a second time begins at step 1 again, a run can go on from an earlier checkpoint.
    """
    found = [path for path in output_dir.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdigit()]
    return sorted(found, key=lambda path: (save_number(path), int(path.name.removeprefix(PREFIX))), reverse=True)


def save_number(folder: Path) -> float:
    """How many checkpoints of its folder were saved up to this one; infinity where that can't be read."""
    try:
        state = json.loads((folder / STATE).read_bytes())
    except (OSError, ValueError, RecursionError):
        return math.inf
    count = state.get("saved", 0) if isinstance(state, dict) else None
    return count if type(count) is int else math.inf


def saved_after(checkpoint: Path) -> list[Path]:
    """Those in its folder that were saved after it."""
    return [folder for folder in checkpoints(checkpoint.parent) if save_number(folder) > save_number(checkpoint)]


def next_number(output_dir: Path) -> int:
    """`saved` of the next one."""
    numbers = [save_number(folder) for folder in checkpoints(output_dir)]
    return 1 + max((int(number) for number in numbers if number < math.inf), default=0)


def last_complete(output_dir: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint, or None; and a line for each newer one that was passed over."""
    passed: list[str] = []
    for folder in checkpoints(output_dir):
        why = fault(folder)
        if why is None:
            return folder, passed
        passed.append(f"{folder}: not whole ({why}), passed over")
    return None, passed


def rotate(output_dir: Path, keep: int | None, best: Path | None = None) -> None:
    """Remove all but the newest `keep` checkpoints (None, 0 or less, as in Transformers: remove none), and what saves that were
    killed left behind. The one saved last stays and so does `best`, which counts among them; so does what is not ours."""
    shutil.rmtree(output_dir / PARTIAL, ignore_errors=True)
    ours = [folder for folder in checkpoints(output_dir) if save_number(folder) < math.inf]
    first = [folder for folder in ours if folder == ours[0] or folder == best]
    kept = [*first, *(folder for folder in ours if folder not in first)][: max(keep or 0, len(first))]
    for folder in ours if keep is not None and keep > 0 else []:
        if folder not in kept:
            _remove(folder, output_dir / PARTIAL)
    shutil.rmtree(output_dir / PARTIAL, ignore_errors=True)


def read_state(folder: Path, expected: dict[str, Any]) -> dict[str, Any]:
    """The engine's own state in a checkpoint. Raises SalsaError where it was made by another setting than `expected`."""
    state: dict[str, Any] = json.loads((folder / STATE).read_bytes())
    made = state["setting"]
    for key, value in expected.items():
        require(
            made.get(key) == value,
            f"{folder}: made with {key} {made.get(key)}, found {value} now, expected the same; start anew in another folder, where"
            " this one's policy can be the model",
        )
    return state


def cut(file: Path, size: int) -> str | None:
    """Take off what was appended to a log after the checkpoint → a line where the log is shorter than it was: it stays as it is."""
    found = file.stat().st_size if file.exists() else 0
    if found < size:
        return f"{file}: found {found} bytes, {size} at the checkpoint: lines from before it are missing"
    if file.exists():
        os.truncate(file, size)
    return None
