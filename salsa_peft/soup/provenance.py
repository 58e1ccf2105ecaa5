"""The origin of a soup's members, for soup.json: paths or Hub ids, revisions, hashes, and bases.

The files of an adapter are hashed whole. The weights of a checkpoint are not, because SHA-256 takes longer than
averaging them: their hash is given if it is known (from a run's manifest or the Hub's cache), and the fingerprint
covers the name, shape, dtype and first 64 KiB of every tensor. No entry depends on the time of the call.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from salsa_peft import __version__
from salsa_peft.soup.lora.read import CONFIG as ADAPTER_CONFIG
from salsa_peft.soup.lora.read import WEIGHTS as ADAPTER_WEIGHTS
from salsa_peft.soup.summary import Origin, Provenance
from salsa_peft.utils.files import read_json
from salsa_peft.utils.fingerprints import base_fingerprint, read_fingerprint, sha256
from salsa_peft.utils.manifests import read_manifest

SNAPSHOT = re.compile(r"/models--(?P<owner>[^/]+?)--(?P<name>[^/]+)/snapshots/(?P<commit>[0-9a-f]{40})(/|$)")
DIGEST = re.compile(r"[0-9a-f]{64}")


def provenance(
    members: Sequence[tuple[str, Path | str, Path]], weights: Sequence[float], base: tuple[Path | str, Path] | None
) -> Provenance:
    """The origins of a soup's members, each given as (name, path or Hub id, folder), and of its base."""
    listed = [
        {"name": name, "weight": weight, **folder_origin(given, folder)}
        for (name, given, folder), weight in zip(members, weights, strict=True)
    ]
    return {
        "salsa_peft": __version__,
        "members": listed,  # type: ignore[typeddict-item]
        "base": None if base is None else folder_origin(*base),
    }


def folder_origin(given: Path | str, folder: Path) -> Origin:
    """The origin of an adapter or checkpoint. given: the path or Hub id that the user gave for its folder."""
    cached = SNAPSHOT.search(str(folder.absolute()))
    adapter = (folder / ADAPTER_CONFIG).is_file()
    weights = sorted(path.name for path in folder.glob("*.safetensors"))
    names = [ADAPTER_CONFIG, ADAPTER_WEIGHTS] if adapter else ["config.json", *weights]
    known = (read_manifest(folder) or {}).get("files", {})
    return {
        "source": str(given),
        "repository": None if cached is None else f"{cached['owner']}/{cached['name']}",
        "revision": None if cached is None else cached["commit"],
        "files": {name: _file(folder / name, known, hashed=adapter or name.endswith(".json")) for name in names},
        "fingerprint": None if adapter else base_fingerprint(folder),
        "base_fingerprint": read_fingerprint(folder),
        "peft_version": read_json(folder / ADAPTER_CONFIG).get("peft_version") if adapter else None,
    }


def _file(path: Path, known: Mapping[str, Any], hashed: bool) -> dict[str, Any]:
    """Size and SHA-256 of a file. The hash is the Hub cache's, else computed if `hashed`, else `known`."""
    blob = path.resolve().name
    if DIGEST.fullmatch(blob):  # the Hub's cache names a large file by its SHA-256
        digest: str | None = blob
    else:
        digest = sha256(path) if hashed else known.get(path.name, {}).get("sha256")
    return {"size": path.stat().st_size, "sha256": digest}
