"""The base that an adapter was trained on: where it is, and whether a given base is the same one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from salsa_peft.models.architectures.checks import text_part
from salsa_peft.models.architectures.sizes import config_of_base
from salsa_peft.utils.console import say
from salsa_peft.utils.errors import require
from salsa_peft.utils.files import read_json
from salsa_peft.utils.fingerprints import FINGERPRINT, base_fingerprints, read_fingerprint
from salsa_peft.utils.hub import HUB_ID, cached_folder

SIZES = (
    "hidden_size", "n_embd", "num_hidden_layers", "n_layer", "num_attention_heads", "n_head", "num_key_value_heads", "intermediate_size",
    "num_local_experts", "num_experts",
)  # fmt: skip
"""Fields of a configuration that fine-tuned models have in common with their base, also if embeddings were resized."""


def require_same_family(folder: Path, base: Mapping[str, Any], name: str, where: str = "") -> str | None:
    """Raise SalsaError if an adapter names a base of another architecture or size than `base`.

    PEFT loads such an adapter without an error if the shapes of its modules agree, as for Mistral and Llama 3. base: a
    config.json's content; name: its name; where: the recipe's key, for the message. Returns the name of the adapter's
    base if its config.json is not on this machine, and None if it was compared, if the adapter has a fingerprint to
    compare instead, or if it names no base.
    """
    file = folder / "adapter_config.json"
    if not file.is_file() or read_fingerprint(folder) is not None:
        return None
    config = read_json(file)
    trained_on = config.get("base_model_name_or_path")
    if not trained_on or not isinstance(trained_on, str):
        return None
    local = local_base(config, folder)
    known = local is not None or HUB_ID.match(trained_on) is not None
    own = config_of_base(str(local or trained_on), config.get("revision")) if known else None
    if own is None:
        return trained_on
    remedy = (
        f"Use {trained_on} as the base, or another adapter; if it was trained on {name}, say so in its"
        " adapter_config.json (base_model_name_or_path)"
    )
    start = f"{where + ': ' if where else ''}{folder} was trained on {trained_on}"
    mine, other = _model_types(own), _model_types(base)
    require(
        not mine or not other or mine[-1] == other[-1] or (len(mine) != len(other) and bool({*mine} & {*other})),
        f"{start}, a {mine[-1] if mine else ''} model, and {name} is a {other[-1] if other else ''} model. {remedy}",
    )
    for size in SIZES:
        found, expected = (text_part(one).get(size) for one in (own, base))
        require(
            found is None or expected is None or found == expected,
            f"{start}, which has {size} {found}, and {name} has {expected}. {remedy}",
        )
    return None


def _model_types(config: Mapping[str, Any]) -> list[str]:
    """The model type of a configuration and, if it is a multimodal one, that of its language model."""
    types = (config.get("model_type"), text_part(config).get("model_type"))
    return list(dict.fromkeys(one for one in types if isinstance(one, str)))


def local_base(config: dict[str, Any], adapter: Path) -> Path | None:
    """The base's folder if an adapter names a path, relative to here, to the adapter or to its parent."""
    name = config["base_model_name_or_path"]
    if not name:
        return None
    places = (Path(name).expanduser(), adapter / name, adapter.parent / name)
    return next((place.resolve() for place in places if (place / "config.json").is_file()), None)


def base_folder(config: dict[str, Any], adapter: Path) -> Path | None:
    """The base that an adapter names, if it is a local folder or a Hub id in the cache."""
    name = (config["base_model_name_or_path"] or "").rstrip("/")
    return local_base(config, adapter) or cached_folder(name, config["revision"])


def _folder(name: str) -> Path | None:
    """The folder of a model that is named by a path or a Hub id, if it is on this machine."""
    return Path(name) if name and Path(name).is_dir() else cached_folder(name)


def fingerprints_of(name: str) -> list[str] | None:
    """Fingerprints, in this and earlier formats, of the base of a model given by its folder or Hub id.

    A model that was trained from a base says its base's fingerprint in its own fingerprint.json. None if the files are
    not on this machine.
    """
    folder = _folder(name)
    if folder is not None and (written := read_fingerprint(folder)) is not None:
        return [written]
    return base_fingerprints(folder) if folder is not None and any(folder.glob("*.safetensors")) else None


def require_same_base(folder: Path, base: list[str] | None, name: str) -> None:
    """Raise SalsaError if weights were trained on another base than `name`, whose fingerprints are `base`.

    If one of the two has no fingerprint, architecture and size are compared, and a line says that the base cannot be
    checked.
    """
    found = read_fingerprint(folder)
    if found is None or base is None:
        missing = f"{folder}: no {FINGERPRINT}" if found is None else f"{name}: its files are not on this machine"
        used = _folder(name)
        config = None if used is None else config_of_base(str(used.resolve()), None)
        trained_on = None if config is None else require_same_family(folder, config, name)
        other = "" if trained_on in (None, name) else f"; it names the base {trained_on}, and is used on {name}"
        say(f"{missing}, so that its base cannot be checked{other}")
        return
    require(
        found in base,
        f"{folder}: these weights were trained on another base (fingerprint {found[:12]} …) than {name}"
        f" ({base[0][:12]} …); use the base that they were trained on",
    )
