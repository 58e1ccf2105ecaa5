"""Which base an adapter names, where that is on this machine, and whether a given base is of the same architecture and size."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from salsa_peft.models.architectures.checks import text_part
from salsa_peft.models.architectures.sizes import config_of
from salsa_peft.utils.errors import require
from salsa_peft.utils.fingerprints import read_fingerprint
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
    own = config_of(str(at_hand) if at_hand else name, config.get("revision")) if at_hand or known else None
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
    """The base that an adapter names, where it is at hand: a folder, or a Hub id in the cache. Nothing is fetched."""
    folder = local_folder(config, adapter)
    name = config["base_model_name_or_path"]
    if folder is not None or not name or name.startswith(("/", ".", "~")) or name.count("/") > 1:
        return folder
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(name.rstrip("/"), "config.json", revision=config["revision"])
    return Path(cached).parent if isinstance(cached, str) else None
