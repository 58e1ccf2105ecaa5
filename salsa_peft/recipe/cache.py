"""The cache of a run's results: each unit's key and folder, and whether its result is up to date.

A unit's folder is <run>/stages/<stage>/[<name>/]<first 12 digits of the key>. The manifest is written last, so a result
without a manifest is unfinished. torch is not imported.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from salsa_peft.config.job import Unit
from salsa_peft.utils.errors import SalsaError
from salsa_peft.utils.files import read_json, write_atomic
from salsa_peft.utils.fingerprints import canonical_json, fingerprint, sha256
from salsa_peft.utils.manifests import (
    MANIFEST,
    changed_file,
    content_digest,
    read_manifest,
    stages_folder,
    versions,
)
from salsa_peft.utils.messages import difference, listed

BEGUN = "begun.json"
TEMPORARY = re.compile(
    r"(checkpoint-\d+|\.?partial|not-finite)(/|\Z)|begun\.json\Z|(metrics|completions|eval_completions)\.\d+\.jsonl\Z|(.*/)?\.[^/]+\.tmp\Z"
)
"""Pattern of files in a unit's folder that are not part of its result, such as checkpoints."""
PROGRESS = re.compile(r"(seed-\d+/)?checkpoint-\d+/|seed-\d+/metrics\.json\Z|partial/")
"""Pattern of files in an unfinished result from which its stage can go on: checkpoints, finished members, partial results."""
KEY_FOLDER = re.compile(r"[0-9a-f]{12}\Z")


@dataclass(frozen=True, kw_only=True)
class PlannedUnit:
    """A unit in a plan: its key, the folder of its result, and whether it has to run."""

    unit: Unit
    key: str
    folder: Path
    why: str | None
    """Why the unit has to run; None if its result is cached."""
    parts: dict[str, Any] = field(default_factory=dict)
    """What the key is the hash of: see key_parts."""


Plan = dict[str, PlannedUnit]
"""Unit id → planned unit, in the order of the stages."""


class Change(NamedTuple):
    """A difference between a unit's key and that of a finished result."""

    kind: str
    """The part of the key, one of ORDER."""
    text: str
    is_setting: bool
    """Whether it is a setting that the finished result had too, with another value, or that the unit has no longer."""


def key(unit: Unit, keys: dict[str, str], made_with: dict[str, str], fingerprints: dict[str, str]) -> str:
    """SHA-256 of a unit's key_parts."""
    return _hash(key_parts(unit, keys, made_with, fingerprints))


def _hash(parts: dict[str, Any]) -> str:
    return hashlib.sha256(canonical_json(parts).encode()).hexdigest()


def key_parts(
    unit: Unit, keys: dict[str, str], made_with: dict[str, str], fingerprints: dict[str, str]
) -> dict[str, Any]:
    """A unit's key fields, its inputs' keys, its files' fingerprints and the library versions.

    fingerprints: file → fingerprint, a cache to which the fingerprints of further files are added.
    """
    for file in unit.files:
        if file not in fingerprints:
            fingerprints[file] = fingerprint(file)
    return {
        "stage": unit.stage,
        "slice": unit.key_fields,
        "inputs": {name: keys[name] for name in unit.inputs},
        "files": [fingerprints[file] for file in unit.files],
        "versions": made_with,
    }


def write_manifest(planned: PlannedUnit, plan: Plan, **facts: Any) -> None:
    """Write a result's last file, the manifest: key, digests of the inputs, hashes of the files, `facts`."""
    files = {}
    for file in sorted(planned.folder.rglob("*")):
        name = file.relative_to(planned.folder).as_posix()
        if file.is_file() and name != MANIFEST and not TEMPORARY.match(name):
            files[name] = {"size": file.stat().st_size, "sha256": sha256(file)}
    made_from = {"key": planned.key, "key_parts": planned.parts, "inputs": _digests(planned, plan)}
    manifest = {"unit": planned.unit.id, **made_from, "files": files, **facts}
    write_atomic(planned.folder / MANIFEST, json.dumps(manifest, indent=2, allow_nan=False) + "\n")


def _digests(planned: PlannedUnit, plan: Plan) -> dict[str, str]:
    return {name: content_digest(read_manifest(plan[name].folder) or {"files": {}}) for name in planned.unit.inputs}


def write_begun(planned: PlannedUnit, plan: Plan, seconds: float = 0.0) -> None:
    """Write a result's first file, when a process starts to make it: the result's key and the digests of its inputs.

    seconds: those of earlier processes, whose work this one continues.
    """
    content = {"key": planned.key, "inputs": _digests(planned, plan), "seconds": seconds}
    write_atomic(planned.folder / BEGUN, json.dumps(content))


def seconds_so_far(planned: PlannedUnit, plan: Plan) -> float | None:
    """Seconds that an unfinished result has taken up to its newest checkpoint or partial result.

    None if its stage cannot go on with it: it has neither, or the unit's key or inputs are others now. Both times are file
    times, so that those of a copied folder do not matter.
    """
    begun = planned.folder / BEGUN
    try:
        found = read_json(begun)
    except SalsaError:
        return None
    files = (path for path in planned.folder.rglob("*") if path.is_file())
    saved = [path for path in files if PROGRESS.match(path.relative_to(planned.folder).as_posix())]
    expected = {"key": planned.key, "inputs": _digests(planned, plan)}
    if not saved or not isinstance(found, dict) or {name: found.get(name) for name in expected} != expected:
        return None
    earlier, newest = found.get("seconds", 0.0), max(path.stat().st_mtime for path in saved)
    return earlier + max(0.0, newest - begun.stat().st_mtime) if isinstance(earlier, int | float) else None


def remove_temporary_files(folder: Path) -> None:
    """Remove the temporary files of a finished result, except files that its manifest lists."""
    listed = {name.split("/")[0] for name in (read_manifest(folder) or {"files": {}})["files"]}
    for path in folder.iterdir():
        if TEMPORARY.match(path.name) and path.name not in listed:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def finished(results: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Folder and manifest of each finished result of a unit, the newest first. results: the folder with all its keys."""
    for path in sorted(results.glob(f"*/{MANIFEST}"), key=lambda path: path.stat().st_mtime_ns, reverse=True):
        manifest = read_manifest(path.parent)
        if manifest is not None:
            yield path.parent, manifest


def changes(manifest: dict[str, Any], parts: dict[str, Any]) -> list[Change]:
    """The differences of a unit's key parts from those of a finished result, in the order of ORDER."""
    old, new = _flat(manifest.get("key_parts") or {}), _flat(parts)
    names = [name for name in {**new, **old} if old.get(name) != new.get(name)]
    names.sort(key=lambda name: ORDER.index(name[0]))
    words = {"inputs": "its input {} has changed", "files": "a file or folder that it reads has changed"}
    found = []
    for kind, name in names if old else []:
        before, now = (_shown(one.get((kind, name), "none")) for one in (old, new))
        text = words[kind].format(name) if kind in words else f"{name} {difference(before, now)}"
        found.append(Change(kind, text, kind == "slice" and (kind, name) in old))
    return found


def why_new(parts: dict[str, Any], results: Path) -> str:
    """Why a unit has no result of this key: the first difference from its newest finished result, or "new" without one.

    results: the folder with the unit's results of all keys.
    """
    newest = next(finished(results), None)
    if newest is None:
        return "new"
    found = changes(newest[1], parts)
    if not found:
        return "outdated: the finished result was made by an earlier version of salsa-peft"
    return f"outdated: {found[0].text}" + (f" (and {len(found) - 1} more)" if len(found) > 1 else "")


def with_outdated(plan: Plan, asked: Collection[str]) -> tuple[Plan, str | None]:
    """The plan for `asked`, with finished results that an upgrade has outdated, and a line that names these.

    A result that was made with another setting stays outdated, for this reason. A setting that the result's version of
    salsa-peft did not have is part of the upgrade.
    """
    found, names = dict(plan), []
    causes: dict[str, None] = {}
    for name in [name for name, planned in plan.items() if planned.why is not None and name not in asked]:
        for folder, manifest in finished(plan[name].folder.parent):
            differences = changes(manifest, plan[name].parts)
            settings = [change.text for change in differences if change.is_setting]
            if not settings and changed_file(folder, manifest) is None:
                found[name] = replace(plan[name], folder=folder, why=None)
                names.append(name)
                causes |= {change.text: None for change in differences if change.kind != "inputs"}
                break
            if settings:
                found[name] = replace(plan[name], why=f"outdated: {settings[0]}")
    if not names:
        return found, None
    units = f"{names[0]} is" if len(names) == 1 else f"{names[0]} and {len(names) - 1} more units are"
    why = f" ({listed(list(causes))})" if causes else ""
    return found, f"{units} outdated{why}; the report shows these results as they are, and `salsa run` makes them again"


def _shown(value: Any) -> str:
    """A value as in a recipe: null, true and false, and text without quotes."""
    return repr(value).strip("'") if not (value is None or isinstance(value, bool)) else json.dumps(value)


ORDER = ("stage", "versions", "slice", "files", "inputs")
"""Parts of a key, in the order in which differences are named."""


def _flat(parts: dict[str, Any]) -> dict[tuple[str, str], Any]:
    """Key parts as (part, dotted name) → value."""

    def leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
        if isinstance(value, dict) and value:
            for key, inside in value.items():
                yield from leaves(f"{name}.{key}" if name else key, inside)
        else:
            yield name, value

    return {(part, name): value for part, given in parts.items() for name, value in leaves("", given)}


def why_outdated(key: str, folder: Path, inputs: dict[str, Path]) -> str | None:
    """Why the result in `folder` cannot be used; None if it is complete and made from these inputs."""
    if not folder.is_dir():
        return "new"
    if (manifest := read_manifest(folder)) is None:
        return "unfinished"
    if manifest.get("key") != key:
        return "made with a different key"
    if (why := changed_file(folder, manifest)) is not None:
        return why
    for name, place in inputs.items():
        there = read_manifest(place)
        if there is None or manifest.get("inputs", {}).get(name) != content_digest(there):
            return f"its input {name} has changed"
    return None


def plan(units: list[Unit], run: Path, forced: Iterable[str] = ()) -> Plan:
    """The plan of a run. A unit has to run if one of its inputs has to. Writes nothing.

    forced: units or stages that run even if their results are up to date.
    """
    keys: dict[str, str] = {}
    plan: Plan = {}
    fingerprints: dict[str, str] = {}
    stages = stages_folder(run)
    made_with, forced = versions({name for unit in units for name in unit.libraries}), set(forced)
    for unit in units:
        touched = {name: made_with[name] for name in ("salsa-peft", *unit.libraries)}
        parts = key_parts(unit, keys, touched, fingerprints)
        keys[unit.id] = _hash(parts)
        folder = stages / unit.id / keys[unit.id][:12]
        cached = {name: plan[name].folder for name in unit.inputs if plan[name].why is None}
        waits = next((f"waits for {name}" for name in unit.inputs if name not in cached), None)
        is_forced = unit.id in forced or unit.stage in forced
        why = "forced" if is_forced else why_outdated(keys[unit.id], folder, cached) or waits
        why = why_new(parts, folder.parent) if why == "new" else why
        plan[unit.id] = PlannedUnit(unit=unit, key=keys[unit.id], folder=folder, parts=parts, why=why)
    return plan


def prune(run: Path, stages: Iterable[str], plan: Plan) -> list[Path]:
    """Remove the results of these stages that are not in the plan, and return the removed folders."""
    keep = {planned.folder for planned in plan.values()}
    places = [stages_folder(run) / stage for stage in stages]
    found = [path for place in places for path in (*place.glob("*"), *place.glob("*/*"))]
    folders = [path for path in found if KEY_FOLDER.match(path.name)]
    parents = {path.parent for path in folders}  # a policy may have a name that looks like a key
    old = [path for path in folders if path.is_dir() and path not in keep and path not in parents]
    for path in old:
        shutil.rmtree(path)
    return old
