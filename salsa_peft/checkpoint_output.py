"""A checkpoint in the making: shards that appear whole, a journal of those that are done, config.json last.

A killed run, started again with the same members, keeps the shards that its journal names and ends with the same bytes; what is left
of another soup is not taken. Until config.json is there, the folder opens nowhere. Imports no torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from salsa_peft.checkpoint_folders import CONFIG, INDEX, read_mapping
from salsa_peft.config import SalsaError, require
from salsa_peft.fingerprints import canonical
from salsa_peft.runs import locked, sync_folder, write_atomic
from salsa_peft.safetensors_files import Buffer, writing

JOURNAL, SUMMARY, LOCK = ".soup-journal.json", "soup.json", ".lock"
FOREIGN = ("adapter_config.json", "*.safetensors", "*.bin", "*.pt", "*.pth")
COPIED = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "*.model", "*.tiktoken", "*.jinja", "*.jinja2", "chat_template.json", "processor_config.json",
    "preprocessor_config.json", "video_preprocessor_config.json", "additional_chat_templates/*.jinja",
)  # fmt: skip
"""What goes with a checkpoint beside weights and configuration: no card, no optimizer, no state of a training, no code."""
Make = Callable[[Callable[[Buffer], None]], dict[str, Any]]
Progress = Callable[[int, int], None]
"""Told (bytes written, bytes in all)."""


class Output:
    """The folder of a checkpoint in the making; `done` are its finished shards with what was measured while they were made."""

    def __init__(self, folder: Path, key: str, done: dict[str, dict[str, Any]]) -> None:
        self.folder, self.key, self.done = folder, key, done
        self.kept = len(done)
        """Shards that an earlier, killed run had finished."""
        self.others: list[str] = []

    def shard(self, name: str, header: bytes, make: Make) -> dict[str, Any]:
        """A weight file, made by `make(write)` unless it is done, and what `make` measured (JSON-able)."""
        if name not in self.done:
            with writing(self.folder / name, header) as write:
                measured = make(write)
            stat = (self.folder / name).stat()
            self.done[name] = {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "measured": measured}
            self.note()
        measured = self.done[name]["measured"]
        return dict(measured)

    def copy(self, source: Path, name: str) -> None:
        """A file beside the weights."""
        self.write(name, source.read_bytes())

    def write(self, name: str, content: bytes | str) -> None:
        """A file beside the weights, noted first, so that nothing is there that the journal does not name."""
        if name not in self.others:
            self.others.append(name)
            self.note()
        write_atomic(self.folder / name, content)

    def note(self) -> None:
        """Write the journal."""
        write_atomic(self.folder / JOURNAL, json.dumps({"key": self.key, "done": self.done, "others": self.others}))

    def finish(self, config: bytes | str, summary: Mapping[str, Any]) -> None:
        """The summary, then config.json, and the journal goes."""
        files = [*self.done, *self.others, CONFIG]
        self.write(
            SUMMARY, json.dumps(dict(summary) | {"files": files}, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        )
        write_atomic(self.folder / CONFIG, config)
        (self.folder / JOURNAL).unlink()
        sync_folder(self.folder)


@contextlib.contextmanager
def making(folder: Path, identity: Mapping[str, Any], sources: Sequence[Path], size: int) -> Iterator[Output]:
    """The output of a soup that `identity` tells from all others, from the checkpoints or adapters in `sources`; `size` in bytes.

    Raises SalsaError for a folder that holds anything else than a soup, is a source, is being written, or has no room. A refusal
    (SalsaError) inside leaves nothing behind; after a kill or any other error the next run goes on.
    """
    for source in sources:
        require(
            folder.resolve() != source.resolve(),
            f"{folder}: found a member of the soup itself, expected another folder for the result",
        )
    new = not folder.exists()
    _check_free(folder)
    with locked(folder):
        key = hashlib.sha256(canonical(dict(identity)).encode()).hexdigest()
        try:
            output = _begin(folder, key)
            _check_room(folder, size - sum(entry["size"] for entry in output.done.values()))
            yield output
        except SalsaError:
            _clear(folder)
            (folder / JOURNAL).unlink(missing_ok=True)
            raise
        finally:
            (folder / LOCK).unlink(missing_ok=True)
            if new and not any(folder.iterdir()):
                folder.rmdir()


def counter(progress: Progress | None, total: int) -> Callable[[int], None]:
    """Takes the bytes of each piece and tells `progress` of all so far."""
    done = 0

    def tell(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    return tell


def copy_others(output: Output, source: Path, first: Path | None = None) -> None:
    """Tokenizer files and their like from `source`; `first` goes before it where it has a tokenizer."""
    found = _others(source)
    if first is not None and (given := _others(first)):
        tokenizer = any(name.startswith("tokenizer") for name in given)
        found = {
            name: path for name, path in found.items() if not tokenizer or name.endswith("generation_config.json")
        } | given
    for name, path in sorted(found.items()):
        output.copy(path, name)


def _others(folder: Path) -> dict[str, Path]:
    paths = [path for pattern in COPIED for path in folder.glob(pattern) if path.is_file()]
    return {path.relative_to(folder).as_posix(): path for path in paths}


def _check_free(folder: Path) -> None:
    """Raise SalsaError for a folder that holds what is no soup of full weights."""
    require(not folder.exists() or folder.is_dir(), f"{folder}: found a file, expected a folder; name another one")
    if (folder / "adapter_config.json").exists():
        raise SalsaError(
            f"{folder}: found an adapter there, expected an empty folder; Transformers would lay it over the checkpoint"
        )
    if (folder / SUMMARY).is_file() or (folder / JOURNAL).is_file():
        return
    found = next((path.name for pattern in (CONFIG, INDEX, *FOREIGN) for path in folder.glob(pattern)), None)
    require(
        found is None,
        f"{folder}: found {found} there and no {SUMMARY}, expected an empty folder or an earlier soup; name another one",
    )


def _begin(folder: Path, key: str) -> Output:
    """What can be kept of the same soup's earlier run, all else of an earlier soup removed; the journal written."""
    (folder / CONFIG).unlink(missing_ok=True)
    for path in folder.glob(".*.tmp"):  # of writes that were killed: the lock says that none is under way
        path.unlink()
    done: dict[str, dict[str, Any]] = {}
    journal = read_mapping(folder / JOURNAL) if (folder / JOURNAL).is_file() else {}
    if journal.get("key") == key:
        for name, entry in journal["done"].items():
            file = folder / name
            if file.is_file() and (file.stat().st_size, file.stat().st_mtime_ns) == (entry["size"], entry["mtime_ns"]):
                done[name] = entry
    _clear(folder, keep=set(done))
    output = Output(folder, key, done)
    output.note()
    return output


def _clear(folder: Path, keep: set[str] | frozenset[str] = frozenset()) -> None:
    """Remove the files that journal and summary name, all of our own making."""
    names: set[str] = set()
    if (folder / JOURNAL).is_file():
        journal = read_mapping(folder / JOURNAL)
        names |= {*journal.get("done", {}), *journal.get("others", [])}
    if (folder / SUMMARY).is_file():
        names |= {SUMMARY, *read_mapping(folder / SUMMARY).get("files", [])}
    for name in sorted(
        names - keep, key=lambda name: (name == SUMMARY, name)
    ):  # while it is there, the rest is known as ours
        path = folder / name
        require(
            folder.resolve() in path.resolve().parents,
            f"{folder / SUMMARY}: found {name!r:.80} among its files; remove it by hand",
        )
        path.unlink(missing_ok=True)
    for parent in {(folder / name).parent for name in names} - {folder}:
        if parent.is_dir() and not any(parent.iterdir()):
            parent.rmdir()


def _check_room(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    require(free > size, f"{folder}: found {free:,} free bytes on its disk, expected {size:,} for the soup; make room")
