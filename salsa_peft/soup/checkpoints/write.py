"""Writes the folder of a soup of full weights, so that it is never seen incomplete. Imports no torch.

All files are written to a hidden folder inside the output folder. When the soup is complete, an earlier soup is removed
and the new files are moved to the output folder, config.json last. No tool opens a folder without config.json, so an
interrupted soup is never taken for a complete one; the next run removes its remains. Until the earlier soup is removed,
the disk holds both soups.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from salsa_peft.soup.checkpoints.read import CONFIG, read_mapping
from salsa_peft.utils.errors import require
from salsa_peft.utils.files import locked, other_files, require_disk_space, sync_folder, write_atomic
from salsa_peft.utils.manifests import MANIFEST
from salsa_peft.utils.safetensors_io import Writer, safetensors_writer

SUMMARY, LOCK, PARTIAL = "soup.json", ".lock", ".soup-partial"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Progress = Callable[[int, int], None]
"""A function that is called with the number of bytes written and the total number of bytes."""


class Output:
    """A soup that is written to a hidden folder inside `target`, until `finish` moves it into `target`."""

    def __init__(self, target: Path) -> None:
        self.target, self.folder = target, target / PARTIAL
        self.names: dict[str, None] = {}
        """The files written so far, in order."""

    def shard(self, name: str, header: bytes) -> contextlib.AbstractContextManager[Writer]:
        """Context that gives the Writer of a weight file."""
        self.names[name] = None
        return safetensors_writer(self.folder / name, header)

    def write(self, name: str, content: bytes | str) -> None:
        """Write a file other than weights, such as a tokenizer's."""
        self.names[name] = None
        write_atomic(self.folder / name, content)

    def finish(self, config: bytes | str, summary: Mapping[str, Any]) -> None:
        """Write soup.json and config.json, remove an earlier soup, and move the new files into the target."""
        listed = dict(summary) | {"files": [*self.names, CONFIG]}
        others = [*self.names]
        self.write(SUMMARY, json.dumps(listed, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
        self.write(CONFIG, config)
        _remove_soup(self.target)
        for name in (SUMMARY, *others):  # the summary first: it tells the next run which files belong to the soup
            (self.target / name).parent.mkdir(exist_ok=True)
            os.replace(self.folder / name, self.target / name)
        sync_folder(self.target)
        os.replace(self.folder / CONFIG, self.target / CONFIG)
        sync_folder(self.target)


@contextlib.contextmanager
def open_output(folder: Path, sources: Sequence[Path], size: int) -> Iterator[Output]:
    """Context in which a soup of `size` bytes is written. sources: folders of the members and the base.

    Raises SalsaError if `folder` is a source, holds something other than a soup, is in use, or if the disk is too full.
    After an error, nothing of the new soup is left, and an earlier soup is unchanged.
    """
    check_free(folder, sources)
    with locked_output(folder):
        output = Output(folder)
        try:
            shutil.rmtree(output.folder, ignore_errors=True)
            whole = (folder / CONFIG).is_file()
            if not whole:
                _remove_soup(folder)
            require_disk_space(folder, size, f"{folder}: the soup" + (" beside the earlier soup" if whole else ""))
            output.folder.mkdir()
            yield output
        finally:
            shutil.rmtree(output.folder, ignore_errors=True)


@contextlib.contextmanager
def locked_output(folder: Path) -> Iterator[None]:
    """Context in which a folder is locked. At the end, the lock file and a new, empty folder are removed."""
    new = not folder.exists()
    with locked(folder):
        try:
            yield
        finally:
            (folder / LOCK).unlink(missing_ok=True)
            if new and not any(folder.iterdir()):
                folder.rmdir()


def byte_counter(progress: Progress | None, total: int) -> Callable[[int], None]:
    """A function that takes a piece's size and calls `progress` with the sum of sizes so far and `total`."""
    done = 0

    def count(size: int) -> None:
        nonlocal done
        done += size
        if progress is not None:
            progress(done, total)

    return count


def check_free(folder: Path, sources: Sequence[Path], adapter: bool = False) -> None:
    """Raise SalsaError if `folder` is a source, or holds something that the new soup may not replace.

    adapter: whether the new soup is an adapter.
    """
    require(
        all(folder.resolve() != source.resolve() for source in sources),
        f"{folder}: this folder is a member or the base of the soup; choose another folder for the soup",
    )
    require(not folder.exists() or folder.is_dir(), f"{folder}: this is a file; choose a folder for the soup")
    require(
        not (folder / MANIFEST).exists(),
        f"{folder}: this folder is a result of a run, which other results may depend on; choose another folder for the soup",
    )
    require(
        not adapter or not (folder / CONFIG).exists(),
        f"{folder}: this folder holds a full model, but the soup is an adapter; choose another folder for the soup",
    )
    require(
        adapter or not (folder / ADAPTER_CONFIG).exists(),
        f"{folder}: this folder holds an adapter, which Transformers would add to the soup; choose another folder for"
        " the soup",
    )
    whole = (folder / SUMMARY).is_file()
    require(
        whole or not (folder / ADAPTER_CONFIG).exists(),
        f"{folder} holds an adapter that is not a soup; choose another folder for the soup (OUT comes first, then the"
        " members)",
    )
    left = (ADAPTER_WEIGHTS,) if adapter else ()  # weights alone are left by a write of adapters that was killed
    held = other_files(folder, *left) if folder.exists() and not whole else ""
    require(
        not held,
        f"{folder}: this folder holds {held} but no {SUMMARY}, so it is not overwritten; choose an empty folder or one"
        " of an earlier soup",
    )


def _remove_soup(folder: Path) -> None:
    """Remove the files that soup.json lists: config.json first, soup.json last."""
    if not (folder / SUMMARY).is_file():
        return
    names = read_mapping(folder / SUMMARY).get("files", [])
    for name in names:
        require(
            folder.resolve() in (folder / name).resolve().parents,
            f"{folder / SUMMARY}: it lists {name!r:.80}, which is outside of this folder; remove the soup by hand",
        )
    for name in sorted(names, key=lambda name: name != CONFIG):
        if name != SUMMARY:
            (folder / name).unlink(missing_ok=True)
    for parent in {(folder / name).parent for name in names} - {folder}:
        if parent.is_dir() and not any(parent.iterdir()):
            parent.rmdir()
    (folder / SUMMARY).unlink()
