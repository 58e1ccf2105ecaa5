"""The manifest.json of a result: reading it, and checking files against their size and SHA-256."""

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import salsa_peft
from salsa_peft.utils.errors import SalsaError
from salsa_peft.utils.files import read_json
from salsa_peft.utils.fingerprints import canonical_json, sha256

LIBRARIES = ("torch", "transformers", "peft", "trl")
"""The libraries, besides salsa-peft itself, whose versions are in reports and in most cache keys."""
MANIFEST = "manifest.json"
STAGES = "stages"
"""Folder, in a run's folder, of the results of all stages: stages/<stage>/[<name>/]<key>."""
RESULTS = "results.json"
"""File, in a run's folder, that says which results are the current ones: name → {"unit", "folder"}."""
REPLICATE = re.compile(r"replicate-(0|[1-9]\d*)")
"""Name of the folder of a run's replicate."""


def versions(libraries: Iterable[str] = LIBRARIES) -> dict[str, str]:
    """The versions of salsa-peft and of libraries; "none" for a library that is not installed."""
    import importlib.metadata

    found = {"salsa-peft": salsa_peft.__version__}
    for name in libraries:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    return found


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a result; None if it is missing or damaged."""
    try:
        data = read_json(folder / MANIFEST)
    except SalsaError:
        return None
    whole = isinstance(data, dict) and isinstance(data.get("files"), dict) and isinstance(data.get("inputs", {}), dict)
    return data if whole and all(_is_entry(entry) for entry in data["files"].values()) else None


def _is_entry(entry: Any) -> bool:
    """Whether a manifest's entry of a file has the form {"size": …, "sha256": …}."""
    types = {name: type(value) for name, value in entry.items()} if isinstance(entry, dict) else {}
    return types == {"size": int, "sha256": str}


def content_digest(manifest: dict[str, Any]) -> str:
    """SHA-256 over the names, sizes and hashes of a result's files."""
    return hashlib.sha256(canonical_json(manifest["files"]).encode()).hexdigest()


def changed_file(folder: Path, manifest: dict[str, Any]) -> str | None:
    """The first mismatch between files and manifest, such as "changed: NAME"; None if all files match."""
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


def stages_folder(run: Path) -> Path:
    """The folder of a run's stages.

    This is the run's folder itself in a run that an earlier version of salsa_peft made, until it is run again.
    """
    made = run / STAGES
    old = not made.is_dir() and any(next(run.glob(f"{depth}/{MANIFEST}"), None) for depth in ("*/*", "*/*/*"))
    return run if old else made


def named_results(run: Path) -> dict[str, tuple[str, Path]]:
    """Name of each current result, such as seed-0 or report → id of its unit, and its folder (results.json).

    Results that are no longer there are left out. Raises SalsaError if results.json cannot be read.
    """
    path = run / RESULTS
    if not path.is_file():
        return {}
    try:
        rows = {str(name): (str(row["unit"]), run / row["folder"]) for name, row in read_json(path).items()}
    except (AttributeError, KeyError, TypeError) as error:
        raise SalsaError(f"{path}: is damaged; remove the file, and run the recipe again to write it again") from error
    return {name: (unit, folder) for name, (unit, folder) in rows.items() if folder.is_dir()}


def latest_report(run: Path) -> Path | None:
    """The folder of the run's current report, or else of the most recent finished one; None if there is none."""
    current = named_results(run).get("report")
    if current is not None and read_manifest(current[1]) is not None:
        return current[1]
    found = stages_folder(run).glob(f"report/*/{MANIFEST}")
    there = [path for path in found if read_manifest(path.parent) is not None]
    return max(there, key=lambda path: path.stat().st_mtime_ns).parent if there else None


def replicate_folder(run: Path, number: int) -> Path:
    """The folder of one replicate of a run."""
    return run / f"replicate-{number}"


def replicate_folders(run: Path) -> list[Path]:
    """The folders of a run's replicates that have been begun, by number; [] for a run without replicates."""
    found = {int(match[1]): path for path in run.glob("replicate-*") if (match := REPLICATE.fullmatch(path.name))}
    return [found[number] for number in sorted(found)]


def finished_results(run: Path) -> dict[str, Path]:
    """Unit id → folder of the results that the run's latest report was made from.

    The results are found by content, since a new plan may give them different cache keys, for example after a library
    update.

    Raises SalsaError if there is no finished report, or if one of these results is missing or changed.
    """
    report, again = latest_report(run), f"run the recipe again: salsa run {run}/recipe.yaml --output-dir {run}"
    if report is None:
        raise SalsaError(f"{run}: this run has no finished report; {again}")
    folders = {}
    for unit, wanted in (read_manifest(report) or {"inputs": {}})["inputs"].items():
        places = [path.parent for path in sorted(stages_folder(run).glob(f"{unit}/*/{MANIFEST}"))]
        fits = [place for place in places if content_digest(read_manifest(place) or {"files": {}}) == wanted]
        if not fits:
            raise SalsaError(f"{run}: the result of {unit} that the report was made from is missing; {again}")
        for name, entry in (read_manifest(fits[0]) or {"files": {}})["files"].items():
            file = fits[0] / name
            if not file.is_file() or file.stat().st_size != entry.get("size"):
                raise SalsaError(f"{run}: {unit}/{fits[0].name}/{name} is missing or has changed; {again}")
        folders[unit] = fits[0]
    return folders
