"""The cache of a run's results: each unit's key and folder, and whether its result is up to date.

A unit's folder is <run>/<stage>/[<name>/]<first 12 digits of the key>. The manifest is written last, so a result
without a manifest is unfinished. torch is not imported.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from salsa_peft.config.job import Unit
from salsa_peft.config.paths import is_local
from salsa_peft.config.schema import Recipe, Source
from salsa_peft.data.files import at_commit, hub_repository
from salsa_peft.utils.errors import SalsaError
from salsa_peft.utils.files import read_json, write_atomic
from salsa_peft.utils.fingerprints import canonical_json, fingerprint, sha256
from salsa_peft.utils.hub import COMMIT, Repository, resolve_commits
from salsa_peft.utils.manifests import MANIFEST, changed_file, content_digest, read_manifest, versions
from salsa_peft.utils.messages import short

BEGUN = "begun.json"
TEMPORARY = re.compile(
    r"(checkpoint-\d+|\.?partial|not-finite)(/|\Z)|begun\.json\Z|(metrics|completions|eval_completions)\.\d+\.jsonl\Z|(.*/)?\.[^/]+\.tmp\Z"
)
"""Pattern of files in a unit's folder that are not part of its result, such as checkpoints."""
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


def repositories(recipe: Recipe) -> dict[tuple[str, str], Repository]:
    """The repositories on the Hub that a recipe names: (base, model, data or prompts; name) → repository."""
    from salsa_peft.training.external_models import hub_models

    base, revision = recipe.model.base, recipe.model.revision
    sources = {("data", name): source for name, source in vars(recipe.data).items() if isinstance(source, Source)}
    sources |= {("prompts", name): source for name, source in recipe.evaluate.prompts.items()}
    found = {place: hub_repository(source) for place, source in sources.items()}
    models = {("model", name): Repository("model", name, recipe.revisions.get(name)) for name in hub_models(recipe)}
    bases = {} if base is None or is_local(base) else {("base", ""): Repository("model", base, revision)}
    return bases | models | {place: one for place, one in found.items() if one is not None}


def with_commits(recipe: Recipe, *, record: bool) -> Recipe:
    """The recipe with the commits of its repositories on the Hub in place of branches, tags and missing revisions.

    They are in the cache keys, so that what changes on the Hub is read again. A revision whose commit is not known stays.
    record: as in resolve_commits.
    """
    wanted = repositories(recipe)
    commits = resolve_commits(wanted.values(), record=record) if wanted else {}
    found = {place: commits[one] for place, one in wanted.items() if one in commits}
    data, prompts = recipe.data, recipe.evaluate.prompts
    return replace(
        recipe,
        model=replace(recipe.model, revision=found.get(("base", ""), recipe.model.revision)),
        revisions=recipe.revisions | {name: commit for (kind, name), commit in found.items() if kind == "model"},
        data=replace(
            data, **{name: at_commit(getattr(data, name), found[kind, name]) for kind, name in found if kind == "data"}
        ),
        evaluate=replace(
            recipe.evaluate,
            prompts=prompts
            | {name: at_commit(prompts[name], found[kind, name]) for kind, name in found if kind == "prompts"},
        ),
    )


def unknown_commits(recipe: Recipe) -> list[str]:
    """A line about the repositories on the Hub whose commits with_commits has not found; none if it has found all."""
    unknown = [one.name for one in repositories(recipe).values() if not COMMIT.match(one.revision or "")]
    names = ", ".join(dict.fromkeys(unknown))
    line = (
        f"the commit of {names} is unknown (not on the Hub and not in its local cache): a change there is not noticed"
    )
    return [line] if unknown else []


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


def write_begun(planned: PlannedUnit, plan: Plan) -> None:
    """Write a result's first file: the result's key and the digests of its inputs."""
    write_atomic(planned.folder / BEGUN, json.dumps({"key": planned.key, "inputs": _digests(planned, plan)}))


def has_same_inputs(planned: PlannedUnit, plan: Plan) -> bool:
    """Whether a unit's unfinished result was started with the key and inputs that the unit has now."""
    try:
        found = read_json(planned.folder / BEGUN)
    except SalsaError:
        return False
    return bool(found == {"key": planned.key, "inputs": _digests(planned, plan)})


def remove_temporary_files(folder: Path) -> None:
    """Remove the temporary files of a finished result, except files that its manifest lists."""
    listed = {name.split("/")[0] for name in (read_manifest(folder) or {"files": {}})["files"]}
    for path in folder.iterdir():
        if TEMPORARY.match(path.name) and path.name not in listed:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def why_new(parts: dict[str, Any], results: Path) -> str:
    """Why a unit has no result of this key: the first difference from its newest finished result, or "new" without one.

    results: the folder with the unit's results of all keys.
    """
    manifests = sorted(results.glob(f"*/{MANIFEST}"), key=lambda path: path.stat().st_mtime_ns)
    before = next((found for path in reversed(manifests) if (found := read_manifest(path.parent)) is not None), None)
    if before is None:
        return "new"
    old, new = _flat(before.get("key_parts") or {}), _flat(parts)
    changed = [name for name in {**new, **old} if old.get(name) != new.get(name)]
    if not old or not changed:
        return "outdated: the finished result was made by an earlier version of salsa-peft"
    changed.sort(key=lambda name: ORDER.index(name[0]))
    kind, name = changed[0]
    values = " → ".join(_shown(found.get((kind, name), "none")) for found in (old, new))
    words = {"inputs": f"its input {name} has changed", "files": "a file or folder that it reads has changed"}
    more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
    return f"outdated: {words.get(kind, f'{name} {values}')}{more}"


def _shown(value: Any) -> str:
    """A value as in a recipe: null, true and false, and text without quotes."""
    return short(value).strip("'") if not (value is None or isinstance(value, bool)) else json.dumps(value)


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
    made_with, forced = versions({name for unit in units for name in unit.libraries}), set(forced)
    for unit in units:
        touched = {name: made_with[name] for name in ("salsa-peft", *unit.libraries)}
        parts = key_parts(unit, keys, touched, fingerprints)
        keys[unit.id] = _hash(parts)
        folder = run / unit.id / keys[unit.id][:12]
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
    found = [path for stage in stages for path in (*(run / stage).glob("*"), *(run / stage).glob("*/*"))]
    folders = [path for path in found if KEY_FOLDER.match(path.name)]
    parents = {path.parent for path in folders}  # a policy may have a name that looks like a key
    old = [path for path in folders if path.is_dir() and path not in keep and path not in parents]
    for path in old:
        shutil.rmtree(path)
    return old
