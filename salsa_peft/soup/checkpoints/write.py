"""A checkpoint in the making: shards that appear whole, a journal of those that are done, config.json last.

A killed run, started again with the same members, keeps the shards that its journal names and ends with the same bytes; what is left
of another soup is not taken. Until config.json is there, the folder opens nowhere. A whole earlier soup in the folder stays until the
new one is whole too: that is made in a folder inside, so the disk holds both. Imports no torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from salsa_peft.soup.checkpoints.read import CONFIG, read_mapping
from salsa_peft.utils.errors import SalsaError, require
from salsa_peft.utils.files import locked, other_files, sync_folder, write_atomic
from salsa_peft.utils.fingerprints import canonical_json
from salsa_peft.utils.safetensors_io import Writer, safetensors_writer

JOURNAL, SUMMARY, LOCK, NEXT = ".soup-journal.json", "soup.json", ".lock", ".soup-next"
COPIED = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "*.model", "*.tiktoken", "*.jinja", "*.jinja2", "chat_template.json", "processor_config.json",
    "preprocessor_config.json", "video_preprocessor_config.json", "additional_chat_templates/*.jinja",
)  # fmt: skip
"""What goes with a checkpoint beside weights and configuration: no card, no optimizer, no state of a training, no code."""
VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt")
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
"""Of the tokenizer whose vocabulary lies beside them."""
Make = Callable[[Writer], dict[str, Any]]
Progress = Callable[[int, int], None]
"""Told (bytes written, bytes in all)."""


class Output:
    """A checkpoint in the making, for the folder `target`; `done` are its finished shards with what was measured while they were made.

    It is made in `folder`: the target itself, or a folder inside while the target holds an earlier soup.
    """

    def __init__(self, target: Path, folder: Path, key: str, done: dict[str, dict[str, Any]]) -> None:
        self.target, self.folder, self.key, self.done = target, folder, key, done
        self.kept = len(done)
        """Shards that an earlier, killed run had finished."""
        self.others: list[str] = []
        self.begun = False
        """Whether anything was written or removed: until then a refusal leaves all as it was."""

    def begin(self) -> None:
        """At the first write: all else of an earlier soup that was in the making is removed, the journal written."""
        if self.begun:
            return
        self.begun = True
        self.folder.mkdir(exist_ok=True)
        (self.folder / CONFIG).unlink(missing_ok=True)
        shutil.rmtree(self.folder / NEXT, ignore_errors=True)
        for path in self.folder.glob(".*.tmp"):  # of writes that were killed: the lock says that none is under way
            path.unlink()
        _clear(self.folder, keep=set(self.done))
        self.note()

    def shard(self, name: str, header: bytes, make: Make) -> dict[str, Any]:
        """A weight file, made by `make(write)` unless it is done, and what `make` measured (JSON-able)."""
        self.begin()
        if name not in self.done:
            with safetensors_writer(self.folder / name, header) as write:
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
        self.begin()
        if name not in self.others:
            self.others.append(name)
            self.note()
        (self.folder / name).parent.mkdir(exist_ok=True)
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
        if self.folder != self.target:
            self._take_place()
        write_atomic(self.target / CONFIG, config)
        (self.target / JOURNAL).unlink()
        sync_folder(self.target)

    def _take_place(self) -> None:
        """The earlier soup goes, its config.json first, and the new files come; after a kill the journal tells what is there."""
        (self.target / CONFIG).unlink(missing_ok=True)
        os.replace(self.folder / JOURNAL, self.target / JOURNAL)
        _clear(self.target)
        for name in (*self.done, *self.others):
            (self.target / name).parent.mkdir(exist_ok=True)
            os.replace(self.folder / name, self.target / name)
        shutil.rmtree(self.folder)


@contextlib.contextmanager
def making(folder: Path, identity: Mapping[str, Any], sources: Sequence[Path], size: int) -> Iterator[Output]:
    """The output of a soup that `identity` tells from all others, from the checkpoints or adapters in `sources`; `size` in bytes.

    Raises SalsaError for a folder that holds anything else than a soup, is a source, is being written, or has no room. A refusal
    (SalsaError) inside leaves nothing of the new soup behind, and a whole earlier one as it was; one before the first write leaves
    a killed run's shards too. After a kill or any other error the next run goes on.
    """
    new = not folder.exists()
    check_free(folder, sources)
    with locked(folder):
        key = hashlib.sha256(canonical_json(dict(identity)).encode()).hexdigest()
        try:
            output = _output(folder, key)
            _check_room(output, size - sum(entry["size"] for entry in output.done.values()))
            try:
                yield output
            except SalsaError:
                if output.begun:
                    _clear(output.folder)
                    (output.folder / JOURNAL).unlink(missing_ok=True)
                    shutil.rmtree(folder / NEXT, ignore_errors=True)
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
    """Tokenizer files and their like from `source`; `first` goes before it, its tokenizer where that has a vocabulary of its own."""
    found, given = others(source), {} if first is None else others(first)
    if has_vocabulary(given):
        found = {name: path for name, path in found.items() if name.endswith("generation_config.json")}
    else:
        given = {name: path for name, path in given.items() if name not in SETTINGS}
    found |= given
    for name, path in sorted(found.items()):
        output.copy(path, name)


def has_vocabulary(names: Iterable[str]) -> bool:
    """Whether files of these names make a tokenizer, not its settings alone."""
    return any(name in VOCABULARIES or name.endswith((".model", ".tiktoken")) for name in names)


def others(folder: Path) -> dict[str, Path]:
    """Name → path of what a folder has beside weights and configuration."""
    paths = [path for pattern in COPIED for path in folder.glob(pattern) if path.is_file()]
    return {path.relative_to(folder).as_posix(): path for path in paths}


def check_free(folder: Path, sources: Sequence[Path]) -> None:
    """Raise SalsaError for a folder that is a source, or holds what is no soup of full weights."""
    for source in sources:
        require(
            folder.resolve() != source.resolve(),
            f"{folder}: found a member of the soup itself, expected another folder for the result",
        )
    require(not folder.exists() or folder.is_dir(), f"{folder}: found a file, expected a folder; name another one")
    if (folder / "adapter_config.json").exists():
        raise SalsaError(
            f"{folder}: found an adapter there, expected an empty folder; Transformers would lay it over the checkpoint"
        )
    if (folder / SUMMARY).is_file() or (folder / JOURNAL).is_file():
        return
    held = other_files(folder) if folder.exists() else ""
    require(
        not held,
        f"{folder}: found {held} there and no {SUMMARY}, expected an empty folder or an earlier soup; name another one",
    )


def _output(target: Path, key: str) -> Output:
    """Where the soup is made, and what can be kept of its own earlier run; nothing is changed."""
    whole = (target / CONFIG).is_file() and (target / SUMMARY).is_file() and not (target / JOURNAL).exists()
    folder = target / NEXT if whole else target
    done: dict[str, dict[str, Any]] = {}
    journal = read_mapping(folder / JOURNAL) if (folder / JOURNAL).is_file() else {}
    if journal.get("key") == key:
        for name, entry in journal["done"].items():
            file = folder / name
            if file.is_file() and (file.stat().st_size, file.stat().st_mtime_ns) == (entry["size"], entry["mtime_ns"]):
                done[name] = entry
    _ours(target)
    return Output(target, folder, key, done)


def _ours(folder: Path) -> set[str]:
    """The files that journal and summary name, all of our own making. Raises SalsaError for one that lies elsewhere."""
    names: set[str] = set()
    if (folder / JOURNAL).is_file():
        journal = read_mapping(folder / JOURNAL)
        names |= {*journal.get("done", {}), *journal.get("others", [])}
    if (folder / SUMMARY).is_file():
        names |= {SUMMARY, *read_mapping(folder / SUMMARY).get("files", [])}
    for name in names:
        require(
            folder.resolve() in (folder / name).resolve().parents,
            f"{folder / SUMMARY}: found {name!r:.80} among its files; remove it by hand",
        )
    return names


def _clear(folder: Path, keep: set[str] | frozenset[str] = frozenset()) -> None:
    """Remove our own files, the summary last: while it is there, the rest is known as ours."""
    names = _ours(folder)
    for name in sorted(names - keep, key=lambda name: (name == SUMMARY, name)):
        (folder / name).unlink(missing_ok=True)
    for parent in {(folder / name).parent for name in names} - {folder}:
        if parent.is_dir() and not any(parent.iterdir()):
            parent.rmdir()


def _check_room(output: Output, size: int) -> None:
    """What is removed at the first write counts as free."""
    freed = [output.folder / name for name in _ours(output.folder) - set(output.done)]
    free = shutil.disk_usage(output.target).free + sum(path.stat().st_size for path in freed if path.is_file())
    beside = " beside the earlier one" if output.folder != output.target else ""
    require(
        free > size,
        f"{output.target}: found {free:,} free bytes on its disk, expected {size:,} for the soup{beside}; make room",
    )
