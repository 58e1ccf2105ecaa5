"""Finding the base that an adapter was trained on, and checking that a run uses the same base."""

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
"""Keys of config.json whose values must be the same in the adapter's base and the base used, if both have the key."""


def require_same_family(folder: Path, base: Mapping[str, Any], name: str, where: str = "") -> str | None:
    """Raise SalsaError if an adapter names a base whose architecture or size differs from `base`.

    PEFT loads such an adapter without an error if the module shapes agree, as between Mistral and Llama 3. base: the
    content of a config.json. name: the name of this base. where: the recipe's key for the error message. Returns the
    name of the adapter's base if it could not be compared, because its config.json is not on this machine. Otherwise
    returns None, also for an adapter with a fingerprint, which is not compared here.
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
        f"Use {trained_on} as the base, or an adapter trained on {name}; if this adapter was in fact trained on {name},"
        " correct base_model_name_or_path in its adapter_config.json"
    )
    start = f"{where + ': ' if where else ''}{folder} was trained on {trained_on}"
    mine, other = _model_types(own), _model_types(base)
    require(
        not mine or not other or mine[-1] == other[-1] or (len(mine) != len(other) and bool({*mine} & {*other})),
        f"{start}, a {mine[-1] if mine else ''} model, but {name} is a {other[-1] if other else ''} model. {remedy}",
    )
    for size in SIZES:
        found, expected = (text_part(one).get(size) for one in (own, base))
        require(
            found is None or expected is None or found == expected,
            f"{start}, which has {size} {found}, but {name} has {size} {expected}. {remedy}",
        )
    return None


def _model_types(config: Mapping[str, Any]) -> list[str]:
    """Model type of a configuration and, in a multimodal configuration, also that of its language model."""
    types = (config.get("model_type"), text_part(config).get("model_type"))
    return list(dict.fromkeys(one for one in types if isinstance(one, str)))


def local_base(config: dict[str, Any], adapter: Path) -> Path | None:
    """Folder that an adapter names as its base; None if it is not found.

    A relative path is looked up in the current folder, in the adapter's folder and in its parent folder.
    """
    name = config["base_model_name_or_path"]
    if not name:
        return None
    places = (Path(name).expanduser(), adapter / name, adapter.parent / name)
    return next((place.resolve() for place in places if (place / "config.json").is_file()), None)


def base_folder(config: dict[str, Any], adapter: Path) -> Path | None:
    """Folder of the base that an adapter names by path or Hub id; None if it is not on this machine."""
    name = (config["base_model_name_or_path"] or "").rstrip("/")
    return local_base(config, adapter) or cached_folder(name, config["revision"])


def _folder(name: str) -> Path | None:
    """The folder of a model given by path or Hub id; None if it is not on this machine."""
    return Path(name) if name and Path(name).is_dir() else cached_folder(name)


def fingerprints_of(name: str) -> list[str] | None:
    """Fingerprints, in the current and earlier formats, of the base of a model given by folder or Hub id.

    A trained model has the fingerprint of its base in its fingerprint.json; any other model is its own base. Returns
    None if the files are not on this machine.
    """
    folder = _folder(name)
    if folder is not None and (written := read_fingerprint(folder)) is not None:
        return [written]
    return base_fingerprints(folder) if folder is not None and any(folder.glob("*.safetensors")) else None


def require_same_base(folder: Path, base: list[str] | None, name: str) -> None:
    """Raise SalsaError if the weights in `folder` were trained on a base other than `name`.

    base: fingerprints of `name`. If the weights or `name` have no fingerprint, architecture and size are compared, and
    a printed line says that the base cannot be checked.
    """
    found = read_fingerprint(folder)
    if found is None or base is None:
        missing = f"{folder}: no {FINGERPRINT}" if found is None else f"{name}: its files are not on this machine"
        used = _folder(name)
        config = None if used is None else config_of_base(str(used.resolve()), None)
        trained_on = None if config is None else require_same_family(folder, config, name)
        other = (
            "" if trained_on in (None, name) else f"; the adapter names the base {trained_on}, but is used on {name}"
        )
        say(f"{missing}, so the base of {folder} cannot be checked{other}")
        return
    require(
        found in base,
        f"{folder}: these weights were trained on a base with the fingerprint {found[:12]} …, but {name} has"
        f" {base[0][:12]} …; use the base that these weights were trained on",
    )
