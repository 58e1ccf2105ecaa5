"""The run folder: what a unit of work depends on (its key), whether it is there whole (its manifest), who works on it (the lock).

A unit's folder is <run>/<stage>/[<name>/]<key, 12 digits>. Its manifest is written last: a folder without one is unfinished.
Files appear by write to a temporary name, fsync, rename. Imports no torch.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import salsa_peft
from salsa_peft.errors import SalsaError, require
from salsa_peft.fingerprints import base_fingerprint as base_fingerprint
from salsa_peft.fingerprints import canonical, fingerprint, sha256

if TYPE_CHECKING:
    from salsa_peft.config import Recipe

VERSIONS = ("torch", "transformers", "peft", "trl")  # and salsa-peft: what a result depends on beside recipe and data
MANIFEST = "manifest.json"
BEGUN = "begun.json"
ON_THE_WAY = re.compile(
    r"(checkpoint-\d+|\.?partial|not-finite)(/|\Z)|begun\.json\Z|(metrics|completions|eval_completions)\.\d+\.jsonl\Z"
)  # what a stage in the making holds, and no result
KEY_FOLDER = re.compile(r"[0-9a-f]{12}\Z")


@dataclass(frozen=True, kw_only=True)
class Unit:
    """One piece of work with a result of its own: a seed, the soup, a policy."""

    stage: str
    name: str
    """Of the piece: seed-0, salsa; the stage's own name where it has one piece only."""
    run: str
    """The function that does it: "salsa_peft.sft:run", run(job) → facts."""
    inputs: tuple[str, ...] = ()
    """Ids of units whose results it reads."""
    slice: dict[str, Any] = field(default_factory=dict)
    """The part of the resolved recipe that the result depends on, JSON-able, local paths out (they are in `files`)."""
    files: tuple[str, ...] = ()
    """Local files and folders whose content counts."""
    several: bool = False
    """Whether its stage is one of several pieces (sft, ppo), also where there is only one now."""

    @property
    def id(self) -> str:
        """sft/seed-0, or soup."""
        return f"{self.stage}/{self.name}" if self.several else self.stage


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a stage function is given."""

    recipe: Recipe
    unit: Unit
    folder: Path
    """Where the result goes; empty at the start."""
    inputs: dict[str, Path]
    """Unit id → its finished folder."""
    recipe_yaml: str
    """The resolved recipe, for the report and the cards."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """A unit in a plan: where its result is or will be, and why it has to be made, if it has."""

    unit: Unit
    key: str
    folder: Path
    why: str | None
    """None: cached."""


def write_atomic(path: str | Path, content: bytes | str) -> None:
    """The file is there whole or not at all, also after kill -9 and power loss: temporary name, fsync, rename. Raises SalsaError for a folder
    of that name."""
    path = Path(path)
    require(not path.is_dir(), f"{path}: found a folder, expected a file or nothing; move it away")
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = content.encode("utf-8") if isinstance(content, str) else content
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    sync_folder(path.parent)


def json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a jsonl file; only \\n ends a line, for U+2028 and its like stand unescaped in JSON, and in what people write."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def versions() -> dict[str, str]:
    """Of salsa-peft and the libraries that results depend on; "none" for one that is not installed."""
    import importlib.metadata

    found = {"salsa-peft": salsa_peft.__version__}
    for name in VERSIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    return found


def key(unit: Unit, keys: dict[str, str], made_with: dict[str, str], fingerprints: dict[str, str]) -> str:
    """SHA-256 over the unit's slice, its inputs' keys, its files' fingerprints and the versions.

    `fingerprints` holds those of files seen before, and is added to.
    """
    for file in unit.files:
        if file not in fingerprints:
            fingerprints[file] = fingerprint(file)
    parts = {
        "stage": unit.stage,
        "slice": unit.slice,
        "inputs": {name: keys[name] for name in unit.inputs},
        "files": [fingerprints[file] for file in unit.files],
        "versions": made_with,
    }
    return hashlib.sha256(canonical(parts).encode()).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """A unit folder's manifest, or None where there is none or it cannot be read."""
    try:
        data = json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    whole = isinstance(data, dict) and isinstance(data.get("files"), dict) and isinstance(data.get("inputs", {}), dict)
    return data if whole and all(_is_entry(entry) for entry in data["files"].values()) else None


def _is_entry(entry: Any) -> bool:
    """Whether a manifest says of a file what write_manifest does."""
    return isinstance(entry, dict) and {name: type(value) for name, value in entry.items()} == {
        "size": int,
        "sha256": str,
    }


def digest(manifest: dict[str, Any]) -> str:
    """Of a result: what its files hold."""
    return hashlib.sha256(canonical(manifest["files"]).encode()).hexdigest()


def write_manifest(step: Step, steps: dict[str, Step], **facts: Any) -> None:
    """Last of all files of a unit: key, files with sizes and SHA-256, its inputs' digests, and `facts`."""
    files = {}
    for file in sorted(step.folder.rglob("*")):
        name = file.relative_to(step.folder).as_posix()
        if file.is_file() and name != MANIFEST and not ON_THE_WAY.match(name):
            files[file.relative_to(step.folder).as_posix()] = {"size": file.stat().st_size, "sha256": sha256(file)}
    manifest = {"unit": step.unit.id, "key": step.key, "inputs": _digests(step, steps), "files": files, **facts}
    write_atomic(step.folder / MANIFEST, json.dumps(manifest, indent=2, allow_nan=False) + "\n")


def _digests(step: Step, steps: dict[str, Step]) -> dict[str, str]:
    return {name: digest(read_manifest(steps[name].folder) or {"files": {}}) for name in step.unit.inputs}


def write_begun(step: Step, steps: dict[str, Step]) -> None:
    """First of all files of a unit: what it is made from."""
    write_atomic(step.folder / BEGUN, json.dumps({"key": step.key, "inputs": _digests(step, steps)}))


def begun(step: Step, steps: dict[str, Step]) -> bool:
    """Whether the unfinished folder of a unit was begun from the inputs as they are now."""
    try:
        found = json.loads((step.folder / BEGUN).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return bool(found == {"key": step.key, "inputs": _digests(step, steps)})


def tidy(folder: Path) -> None:
    """Remove what a finished unit needed on the way; nothing that its manifest lists."""
    listed = {name.split("/")[0] for name in (read_manifest(folder) or {"files": {}})["files"]}
    for path in folder.iterdir():
        if ON_THE_WAY.match(path.name) and path.name not in listed:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def wrong(step_key: str, folder: Path, inputs: dict[str, Path]) -> str | None:
    """Why the result in `folder` cannot be used, or None: it is whole, and made from its inputs as they are now."""
    if not folder.is_dir():
        return "new"
    if (manifest := read_manifest(folder)) is None:
        return "unfinished"
    if manifest.get("key") != step_key:
        return "made for another key"
    if (why := changed(folder, manifest)) is not None:
        return why
    for name, place in inputs.items():
        there = read_manifest(place)
        if there is None or manifest.get("inputs", {}).get(name) != digest(there):
            return f"its input {name} was made anew"
    return None


def changed(folder: Path, manifest: dict[str, Any]) -> str | None:
    """The first file of a result that is not as its manifest says, in words; None: all are."""
    for name, entry in manifest["files"].items():
        file = folder / name
        try:
            if not file.is_file():
                return f"missing: {name}"
            if file.stat().st_size != entry.get("size") or sha256(file) != entry.get("sha256"):
                return f"changed: {name}"
        except OSError as error:
            return f"unreadable: {name} ({error.strerror})"
    return None


def newest_report(run: Path) -> Path | None:
    """The folder of the report that was finished last."""
    there = [path for path in run.glob(f"report/*/{MANIFEST}") if read_manifest(path.parent) is not None]
    return max(there, key=lambda path: path.stat().st_mtime_ns).parent if there else None


def plan(units: list[Unit], run: Path, forced: Iterable[str] = ()) -> dict[str, Step]:
    """Unit id → step, in order: keys, folders, and what has to be made and why (what hangs on it included). Writes nothing."""
    keys: dict[str, str] = {}
    steps: dict[str, Step] = {}
    fingerprints: dict[str, str] = {}
    made_with, forced = versions(), set(forced)
    for unit in units:
        keys[unit.id] = key(unit, keys, made_with, fingerprints)
        folder = run / unit.id / keys[unit.id][:12]
        waits = [name for name in unit.inputs if steps[name].why is not None]
        if unit.id in forced or unit.stage in forced:
            why: str | None = "forced"
        else:
            why = wrong(keys[unit.id], folder, {name: steps[name].folder for name in unit.inputs if name not in waits})
            if why is None and waits:
                why = f"waits for {waits[0]}"
        steps[unit.id] = Step(unit=unit, key=keys[unit.id], folder=folder, why=why)
    return steps


def finished(run: Path) -> dict[str, Path]:
    """Unit id → its folder, of what the run's newest report was made from, whatever the keys would be by now (other versions, data that moved).

    Raises SalsaError where there is no finished report, or something that it was made from is gone.
    """
    report = newest_report(run)
    if report is None:
        raise SalsaError(
            f"{run}: found no finished report, expected a finished run; salsa run {run}/recipe.yaml --output-dir {run}"
        )
    folders = {}
    for unit, wanted in (read_manifest(report) or {"inputs": {}})["inputs"].items():
        places = [path.parent for path in sorted(run.glob(f"{unit}/*/{MANIFEST}"))]
        fits = [place for place in places if digest(read_manifest(place) or {"files": {}}) == wanted]
        if not fits:
            raise SalsaError(
                f"{run}: found no {unit} that its report was made from, expected it; salsa run {run}/recipe.yaml --output-dir {run}"
            )
        for name, entry in (read_manifest(fits[0]) or {"files": {}})["files"].items():
            file = fits[0] / name
            if not file.is_file() or file.stat().st_size != entry.get("size"):
                raise SalsaError(
                    f"{run}: found {unit}/{fits[0].name}/{name} missing or changed, expected it as it was written; salsa run {run}/recipe.yaml --output-dir {run}"
                )
        folders[unit] = fits[0]
    return folders


def prune(run: Path, stages: Iterable[str], steps: dict[str, Step]) -> list[Path]:
    """Remove the folders of keys that the plan has not, among those of its stages; returns them."""
    keep = {step.folder for step in steps.values()}
    found = [path for stage in stages for path in (*(run / stage).glob("*"), *(run / stage).glob("*/*"))]
    folders = [path for path in found if KEY_FOLDER.match(path.name) and path.is_dir() and path not in keep]
    parents = {path.parent for path in found}  # a policy may be named like a key
    old = [
        path
        for path in folders
        if not (path in parents and any(KEY_FOLDER.match(inner.name) for inner in path.iterdir()))
    ]
    for path in old:
        shutil.rmtree(path)
    return old


def now() -> str:
    """Local time to the second, with its offset."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def holder(run: Path) -> str | None:
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


def foreign(folder: Path, *own: str) -> str:
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
        os.pwrite(handle, f"host {socket.gethostname()}, pid {os.getpid()}, since {now()}\n".encode(), 0)
        yield
        os.ftruncate(handle, 0)
    finally:
        os.close(handle)
