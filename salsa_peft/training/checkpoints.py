"""Checkpoint folders, each complete or absent: write, verify, find and rotate them.

A checkpoint is written in a temporary folder, which is renamed when a manifest with the SHA-256 of each file is added.
So the previous checkpoint remains if a process is killed while it saves. This module does not import torch.
"""

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
    """Add a manifest to the folder `partial` and rename it to `folder`, replacing a checkpoint there."""
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
    """Rename a checkpoint, then remove it, so that a killed process leaves no incomplete checkpoint."""
    old = aside / f"{folder.name}.old"
    aside.mkdir(exist_ok=True)
    shutil.rmtree(old, ignore_errors=True)  # left by a killed process
    folder.rename(old)
    shutil.rmtree(old)


def fault(folder: Path) -> str | None:
    """Why a folder is not a complete checkpoint; None if all of its files match its manifest."""
    try:
        listed = json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError, RecursionError):
        return f"it has no readable {MANIFEST}"
    if not isinstance(listed, dict) or STATE not in listed:
        return f"{MANIFEST} does not list {STATE}"
    for name, entry in listed.items():
        file = folder / name
        if not isinstance(entry, dict):
            return f"{MANIFEST} lacks the size and hash of {name}"
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != entry.get("size") or sha256(file) != entry.get("sha256"):
            return f"{name} has changed"
    return None


def checkpoints(output_dir: Path) -> list[Path]:
    """The folders checkpoint-N, complete or not, sorted by when they were saved, newest first.

    N does not give this order: a second train() starts at step 1 again, and a run can resume from an earlier
    checkpoint. Folders whose save number cannot be read come first.
    """
    found = [path for path in output_dir.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdigit()]
    return sorted(found, key=lambda path: (save_number(path), int(path.name.removeprefix(PREFIX))), reverse=True)


def save_number(folder: Path) -> float:
    """Number of a checkpoint in the order of saving, from 1; infinity if it cannot be read."""
    try:
        state = json.loads((folder / STATE).read_bytes())
    except (OSError, ValueError, RecursionError):
        return math.inf
    count = state.get("saved", 0) if isinstance(state, dict) else None
    return count if type(count) is int else math.inf


def saved_after(checkpoint: Path) -> list[Path]:
    """The checkpoints that lie beside `checkpoint` and were saved after it."""
    return [folder for folder in checkpoints(checkpoint.parent) if save_number(folder) > save_number(checkpoint)]


def next_number(output_dir: Path) -> int:
    """Save number of the next checkpoint in output_dir."""
    numbers = [save_number(folder) for folder in checkpoints(output_dir)]
    return 1 + max((int(number) for number in numbers if number < math.inf), default=0)


def last_complete(output_dir: Path) -> tuple[Path | None, list[str]]:
    """The newest complete checkpoint or None, and a message for each newer, incomplete one."""
    skipped: list[str] = []
    for folder in checkpoints(output_dir):
        why = fault(folder)
        if why is None:
            return folder, skipped
        skipped.append(f"{folder}: skipped, because it is incomplete ({why})")
    return None, skipped


def rotate(output_dir: Path, keep: int | None, best: Path | None = None) -> None:
    """Remove all but the newest `keep` checkpoints, and the temporary files of killed processes.

    keep: None, 0 or less keeps all checkpoints, as in Transformers. best: a checkpoint that is always kept and
    counts towards `keep`. The newest checkpoint, and folders whose save number cannot be read, are always kept.
    """
    shutil.rmtree(output_dir / PARTIAL, ignore_errors=True)
    ours = [folder for folder in checkpoints(output_dir) if save_number(folder) < math.inf]
    first = [folder for folder in ours if folder == ours[0] or folder == best]
    kept = [*first, *(folder for folder in ours if folder not in first)][: max(keep or 0, len(first))]
    for folder in ours if keep is not None and keep > 0 else []:
        if folder not in kept:
            _remove(folder, output_dir / PARTIAL)
    shutil.rmtree(output_dir / PARTIAL, ignore_errors=True)


def read_state(folder: Path, expected: dict[str, Any]) -> dict[str, Any]:
    """PPO's state from a checkpoint. Raises SalsaError if its settings are not the `expected` ones."""
    state: dict[str, Any] = json.loads((folder / STATE).read_bytes())
    made = state["setting"]
    for key, value in expected.items():
        require(
            made.get(key) == value,
            f"{folder}: {key} was {made.get(key)} and is {value} now, so this run cannot be resumed. Start a new run in"
            " another output_dir; it can start from this checkpoint's policy",
        )
    return state


def truncate_log(file: Path, size: int) -> str | None:
    """Truncate a log to its size at the checkpoint. Returns a message if the log is already shorter."""
    found = file.stat().st_size if file.exists() else 0
    if found < size:
        sizes = f"the file has {found} bytes, but had {size} at the checkpoint"
        return f"{file}: lines from before the checkpoint are missing: {sizes}"
    if file.exists():
        os.truncate(file, size)
    return None
