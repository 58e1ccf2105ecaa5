"""Checkpoint folders, each complete or absent: write, verify, find and rotate them.

A checkpoint is written in a temporary folder, which is renamed when a manifest with the SHA-256 of each file is added.
So the previous checkpoint remains if a process is killed while it saves. This module does not import torch.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from salsa_peft.utils import files
from salsa_peft.utils.console import say
from salsa_peft.utils.errors import SalsaError, require
from salsa_peft.utils.files import sync_folder, write_atomic
from salsa_peft.utils.fingerprints import sha256

if TYPE_CHECKING:
    from accelerate import Accelerator

PREFIX, PARTIAL = "checkpoint-", ".partial"
MANIFEST, STATE = "checkpoint.json", "salsa_state.json"


@contextlib.contextmanager
def writing(folder: Path, name: str, size: int | None, accelerator: Accelerator) -> Iterator[Path]:
    """Context that gives a temporary folder in `folder`, in which all processes write the checkpoint `name`.

    Its body ends with `commit` in the main process. size: number of bytes that will be written, if known. After an
    error the temporary folder is removed. Raises SalsaError if the disk is full.
    """
    partial, main = folder / PARTIAL, accelerator.is_main_process
    if main:
        shutil.rmtree(partial, ignore_errors=True)  # left by a killed process
    if size is not None:
        files.require_disk_space(folder, size, name)
    try:
        accelerator.wait_for_everyone()
        yield partial
    except Exception as error:
        if main:
            shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, SalsaError) or (line := files.disk_full_message(error, folder)) is None:
            raise
        raise SalsaError(line) from error
    accelerator.wait_for_everyone()


def commit(partial: Path, folder: Path) -> None:
    """Add a manifest to the folder `partial` and rename it to `folder`, replacing a checkpoint there."""
    written = sorted(file for file in partial.rglob("*") if file.is_file() and file.name != MANIFEST)
    listed = {}
    for file in written:
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


def newest_of(folder: Path, unit: str) -> Path | None:
    """The newest complete checkpoint of a unit of work, in its folder; printed, like each one that is skipped.

    If there is none, incomplete checkpoints are removed and None is returned.
    """
    checkpoint, skipped = last_complete(folder)
    for line in skipped:
        say(line)
    if checkpoint is None:
        remove_all(folder)
        return None
    say(f"{unit}  resuming from {checkpoint.name}")
    return checkpoint


def remove_all(folder: Path) -> None:
    """Remove all checkpoints in a folder, and what a killed process left of another one."""
    for path in checkpoints(folder):
        shutil.rmtree(path)
    shutil.rmtree(folder / PARTIAL, ignore_errors=True)


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


NEW_RUN = "Start a new run in another output_dir; it can start from this checkpoint's policy"
"""What to do if a run of SalsaPPOTrainer cannot be resumed."""


def start_again(unit: str) -> str:
    """What to do if a unit of a recipe cannot be resumed."""
    return f"Run it with the settings of before, or train it from the beginning with --force {unit}"


def read_state(folder: Path, expected: dict[str, Any], remedy: str = NEW_RUN) -> dict[str, Any]:
    """The state from a checkpoint. Raises SalsaError with `remedy` if its settings are not the `expected` ones."""
    state: dict[str, Any] = json.loads((folder / STATE).read_bytes())
    made = state["setting"]
    for key, value in expected.items():
        require(
            made.get(key) == value,
            f"{folder}: {key} was {made.get(key)} and is {value} now, so this run cannot be resumed. {remedy}",
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
