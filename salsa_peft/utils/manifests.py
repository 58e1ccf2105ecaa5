"""manifest.json of a result: what its files are, by size and SHA-256, and whether they still are. Imports no torch."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import salsa_peft
from salsa_peft.utils.errors import SalsaError
from salsa_peft.utils.fingerprints import canonical_json, sha256

VERSIONS = ("torch", "transformers", "peft", "trl")  # and salsa-peft: what a result depends on beside recipe and data
MANIFEST = "manifest.json"


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


def content_digest(manifest: dict[str, Any]) -> str:
    """Of a result: what its files hold."""
    return hashlib.sha256(canonical_json(manifest["files"]).encode()).hexdigest()


def changed_file(folder: Path, manifest: dict[str, Any]) -> str | None:
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


def latest_report(run: Path) -> Path | None:
    """The folder of the report that was finished last."""
    there = [path for path in run.glob(f"report/*/{MANIFEST}") if read_manifest(path.parent) is not None]
    return max(there, key=lambda path: path.stat().st_mtime_ns).parent if there else None


def finished_results(run: Path) -> dict[str, Path]:
    """Unit id → its folder, of what the run's newest report was made from, whatever the keys would be by now (other versions, data that moved).

    Raises SalsaError where there is no finished report, or something that it was made from is gone.
    """
    report = latest_report(run)
    if report is None:
        raise SalsaError(
            f"{run}: found no finished report, expected a finished run; salsa run {run}/recipe.yaml --output-dir {run}"
        )
    folders = {}
    for unit, wanted in (read_manifest(report) or {"inputs": {}})["inputs"].items():
        places = [path.parent for path in sorted(run.glob(f"{unit}/*/{MANIFEST}"))]
        fits = [place for place in places if content_digest(read_manifest(place) or {"files": {}}) == wanted]
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
