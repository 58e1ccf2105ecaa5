"""Whether an adapter or a checkpoint was trained on this base: fingerprint.json beside it against the base's own files.

PEFT loads an adapter of another base in silence where shapes agree, so this is asked wherever weights come from a folder.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from salsa_peft.adapter_bases import require_same_family
from salsa_peft.architectures import config_of
from salsa_peft.models import causal_lm
from salsa_peft.utils.errors import require
from salsa_peft.utils.fingerprints import FINGERPRINT, base_fingerprints, read_fingerprint


def of_model(model: Any) -> list[str] | None:
    """The fingerprints (of this version and earlier ones) of the base that a model in memory was made of, by the files that its
    name_or_path leads to; None where it leads to none. A folder that was trained from another says which in its own fingerprint.json."""
    name = str(causal_lm(model).name_or_path or "")
    folder = _folder(name)
    if folder is None:
        return None
    written = read_fingerprint(folder)
    if written is not None:
        return [written]
    return base_fingerprints(folder) if any(folder.glob("*.safetensors")) else None


def _folder(name: str) -> Path | None:
    """A folder as it is, or that of a Hub id's files in the Hub's cache."""
    if name and Path(name).is_dir():
        return Path(name)
    if not name or name.startswith((".", "/")):
        return None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None


def check(folder: Path, base: list[str] | None, name: str) -> None:
    """Raise SalsaError where the weights in `folder` are of another base than the one of these fingerprints, which people call `name`;
    what can't be checked is said."""
    found = read_fingerprint(folder)
    if found is None or base is None:
        what = f"{folder}: no {FINGERPRINT}" if found is None else f"{name}: no files at hand to take a fingerprint of"
        used = _folder(name)
        config = None if used is None else config_of(str(used.resolve()), None)
        named = None if config is None else require_same_family(folder, config, name)
        other = "" if named is None or named == name else f"; it names the base {named}, and is used on {name}"
        print(f"{what}, so that its base can't be checked{other}", file=sys.stderr, flush=True)
        return
    require(
        found in base,
        f"{folder}: found weights of another base (fingerprint {found[:12]} …), expected ones of {name} ({base[0][:12]} …)",
    )
