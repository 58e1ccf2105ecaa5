"""Where the members of a soup came from: paths or Hub ids, revisions, hashes and the base that each was trained on, for soup.json.

An adapter's files are hashed whole. A checkpoint's are not, since SHA-256 takes longer than averaging them: there the hash is given
where it is known (the manifest of a run, the Hub's cache), and the fingerprint covers every tensor's name, shape, dtype and first
64 KiB. Nothing here depends on the time.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from salsa_peft import __version__
from salsa_peft.soup.lora.read import CONFIG as ADAPTER_CONFIG
from salsa_peft.soup.lora.read import WEIGHTS as ADAPTER_WEIGHTS
from salsa_peft.soup.lora.read import read_json
from salsa_peft.soup.summary import Origin, Provenance
from salsa_peft.utils.fingerprints import base_fingerprint, read_fingerprint, sha256
from salsa_peft.utils.manifests import read_manifest

SNAPSHOT = re.compile(r"/models--(?P<owner>[^/]+?)--(?P<name>[^/]+)/snapshots/(?P<commit>[0-9a-f]{40})(/|$)")
DIGEST = re.compile(r"[0-9a-f]{64}")


def provenance(
    members: Sequence[tuple[str, Path | str, Path]], weights: Sequence[float], base: tuple[Path | str, Path] | None
) -> Provenance:
    """Of a soup's members (name, as given, folder) and, where one is read, its base (as given, folder)."""
    listed = [
        {"name": name, "weight": weight, **of_folder(given, folder)}
        for (name, given, folder), weight in zip(members, weights, strict=True)
    ]
    return {
        "salsa_peft": __version__,
        "members": listed,  # type: ignore[typeddict-item]
        "base": None if base is None else of_folder(*base),
    }


def of_folder(given: Path | str, folder: Path) -> Origin:
    """Of one adapter's or checkpoint's folder."""
    cached = SNAPSHOT.search(str(folder.absolute()))
    adapter = (folder / ADAPTER_CONFIG).is_file()
    config = read_json(folder / ADAPTER_CONFIG) if adapter else {}
    names = [ADAPTER_CONFIG, ADAPTER_WEIGHTS] if adapter else ["config.json", *_weights(folder)]
    known = (read_manifest(folder) or {}).get("files", {})
    return {
        "source": str(given),
        "repository": None if cached is None else f"{cached['owner']}/{cached['name']}",
        "revision": None if cached is None else cached["commit"],
        "files": {name: _file(folder / name, known, whole=adapter or name.endswith(".json")) for name in names},
        "fingerprint": None if adapter else base_fingerprint(folder),
        "base_fingerprint": read_fingerprint(folder),
        "peft_version": config.get("peft_version"),
    }


def _weights(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.safetensors"))


def _file(path: Path, known: Mapping[str, Any], whole: bool) -> dict[str, Any]:
    """Size and SHA-256; None where finding the hash would take long."""
    blob = path.resolve().name
    if DIGEST.fullmatch(blob):  # the Hub's cache names a large file by its SHA-256
        digest: str | None = blob
    else:
        digest = sha256(path) if whole else known.get(path.name, {}).get("sha256")
    return {"size": path.stat().st_size, "sha256": digest}
