"""Which results of a run are up to date: the key of each unit, its folder, and why it has to be made again.

A unit's folder is <run>/<stage>/[<name>/]<key, 12 digits>. Its manifest is written last: a folder without one is unfinished. Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from salsa_peft.config.job import Unit
from salsa_peft.utils.files import write_atomic
from salsa_peft.utils.fingerprints import canonical_json, fingerprint, sha256
from salsa_peft.utils.manifests import MANIFEST, changed_file, content_digest, read_manifest, versions

BEGUN = "begun.json"
ON_THE_WAY = re.compile(
    r"(checkpoint-\d+|\.?partial|not-finite)(/|\Z)|begun\.json\Z|(metrics|completions|eval_completions)\.\d+\.jsonl\Z|(.*/)?\.[^/]+\.tmp\Z"
)  # what a stage in the making holds, and no result
KEY_FOLDER = re.compile(r"[0-9a-f]{12}\Z")


@dataclass(frozen=True, kw_only=True)
class Step:
    """A unit in a plan: where its result is or will be, and why it has to be made, if it has."""

    unit: Unit
    key: str
    folder: Path
    why: str | None
    """None: cached."""


def key(unit: Unit, keys: dict[str, str], made_with: dict[str, str], fingerprints: dict[str, str]) -> str:
    """SHA-256 over the unit's slice, its inputs' keys, its files' fingerprints and the versions.

    `fingerprints` holds those of files seen before, and is added to.
    """
    for file in unit.files:
        if file not in fingerprints:
            fingerprints[file] = fingerprint(file)
    parts = {
        "stage": unit.stage,
        "slice": unit.key_fields,
        "inputs": {name: keys[name] for name in unit.inputs},
        "files": [fingerprints[file] for file in unit.files],
        "versions": made_with,
    }
    return hashlib.sha256(canonical_json(parts).encode()).hexdigest()


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
    return {name: content_digest(read_manifest(steps[name].folder) or {"files": {}}) for name in step.unit.inputs}


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
    if (why := changed_file(folder, manifest)) is not None:
        return why
    for name, place in inputs.items():
        there = read_manifest(place)
        if there is None or manifest.get("inputs", {}).get(name) != content_digest(there):
            return f"its input {name} was made anew"
    return None


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
