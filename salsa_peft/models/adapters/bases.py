"""Which base an adapter names, where that is on this machine, and whether a given base is of the same architecture and size."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from salsa_peft.models.architectures.checks import text_part
from salsa_peft.models.architectures.sizes import config_of_base
from salsa_peft.utils.errors import require
from salsa_peft.utils.fingerprints import FINGERPRINT, base_fingerprints, read_fingerprint
from salsa_peft.utils.hub import HUB_ID

SIZES = (
    "hidden_size", "n_embd", "num_hidden_layers", "n_layer", "num_attention_heads", "n_head", "num_key_value_heads", "intermediate_size",
    "num_local_experts", "num_experts",
)  # fmt: skip
"""Of a configuration: what models of one base have alike, also where embeddings were resized."""


def require_same_family(folder: Path, base: Mapping[str, Any], called: str, where: str = "") -> str | None:
    """Raise SalsaError where the adapter in `folder` names a base of another architecture or size than `base`, a config.json's content.

    PEFT loads such an adapter in silence where the shapes of its modules agree (Mistral and Llama 3). → The base's name where its
    config.json is not at hand; None where it was compared, a fingerprint decides, or the adapter names none. called: what people call
    `base`; where: the recipe's key, in front of the message.
    """
    file = folder / "adapter_config.json"
    if not file.is_file() or read_fingerprint(folder) is not None:
        return None
    config = json.loads(file.read_text(encoding="utf-8"))
    name = config.get("base_model_name_or_path")
    if not name or not isinstance(name, str):
        return None
    at_hand = local_folder(config, folder)
    known = HUB_ID.match(name) is not None
    own = config_of_base(str(at_hand) if at_hand else name, config.get("revision")) if at_hand or known else None
    if own is None:
        return name
    remedy = (
        f"Use {name} as the base, or another adapter; if it was trained on {called}, say so in its adapter_config.json"
        " (base_model_name_or_path)"
    )
    start = f"{where + ': ' if where else ''}{folder} was trained on {name}"
    mine, other = _kinds(own), _kinds(base)
    require(
        not mine or not other or mine[-1] == other[-1] or (len(mine) != len(other) and bool({*mine} & {*other})),
        f"{start}, a {mine[-1] if mine else ''} model, and {called} is a {other[-1] if other else ''} model. {remedy}",
    )
    for size in SIZES:
        found, expected = (text_part(one).get(size) for one in (own, base))
        require(
            found is None or expected is None or found == expected,
            f"{start}, which has {size} {found}, and {called} has {expected}. {remedy}",
        )
    return None


def _kinds(config: Mapping[str, Any]) -> list[str]:
    """The model type of the whole, then of its language model where that has one of its own."""
    said = (config.get("model_type"), text_part(config).get("model_type"))
    return list(dict.fromkeys(kind for kind in said if isinstance(kind, str)))


def local_folder(config: dict[str, Any], adapter: Path) -> Path | None:
    """The base's folder, where its name is one: seen from here, from the adapter's folder, or from the folder around that."""
    name = config["base_model_name_or_path"]
    if not name:
        return None
    places = (Path(name).expanduser(), adapter / name, adapter.parent / name)
    return next((place.resolve() for place in places if (place / "config.json").is_file()), None)


def base_folder(config: dict[str, Any], adapter: Path) -> Path | None:
    """The base that an adapter names, where it is on this machine: a folder, or a Hub id in the cache. Nothing is downloaded."""
    return local_folder(config, adapter) or _cached(config["base_model_name_or_path"] or "", config["revision"])


def _cached(name: str, revision: str | None = None) -> Path | None:
    """The snapshot folder of a Hub id in the local cache; None if it is not there or `name` is no Hub id."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(name.rstrip("/"), "config.json", revision=revision)
    except HFValidationError:
        return None
    return Path(cached).parent if isinstance(cached, str) else None


def _folder(name: str) -> Path | None:
    """The folder of a model that is named by a path or a Hub id, where it is on this machine."""
    return Path(name) if name and Path(name).is_dir() else _cached(name)


def fingerprints_of(name: str) -> list[str] | None:
    """Fingerprints, one for each version of the format, of the base that the model `name` (a folder or Hub id) was made of.

    None if its files are not on this machine. A folder trained from another base holds that base's fingerprint in its fingerprint.json.
    """
    folder = _folder(name)
    if folder is None:
        return None
    written = read_fingerprint(folder)
    if written is not None:
        return [written]
    return base_fingerprints(folder) if any(folder.glob("*.safetensors")) else None


def require_same_base(folder: Path, base: list[str] | None, name: str) -> None:
    """Raise SalsaError if the weights in `folder` were trained on another base than `name`, whose fingerprints are `base`.

    If one of the two has no fingerprint, the architectures are compared and a line on standard error says what could not be checked.
    """
    found = read_fingerprint(folder)
    if found is None or base is None:
        what = f"{folder}: no {FINGERPRINT}" if found is None else f"{name}: no files at hand to take a fingerprint of"
        used = _folder(name)
        config = None if used is None else config_of_base(str(used.resolve()), None)
        named = None if config is None else require_same_family(folder, config, name)
        other = "" if named is None or named == name else f"; it names the base {named}, and is used on {name}"
        print(f"{what}, so that its base can't be checked{other}", file=sys.stderr, flush=True)
        return
    require(
        found in base,
        f"{folder}: found weights of another base (fingerprint {found[:12]} …), expected ones of {name} ({base[0][:12]} …)",
    )
