"""Whether adapters are of one base, and of this one: by fingerprint, by what they call it, or by what lies at those places."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from salsa_peft.architectures import config_of
from salsa_peft.base_checks import text_part
from salsa_peft.config.paths import HUB_ID
from salsa_peft.utils.errors import SalsaError, require
from salsa_peft.utils.fingerprints import FINGERPRINT, base_fingerprint, read_fingerprint

if TYPE_CHECKING:
    from salsa_peft.adapter_tensors import Member

logger = logging.getLogger(__name__)

CACHED = re.compile(r".*/models--(?P<owner>[^/]+?)--(?P<name>[^/]+)/snapshots/(?P<revision>[0-9a-f]+)/?")
QUANTISED = re.compile(r"(-unsloth)?-bnb-[48]bit$")
"""How unsloth names a base that it has quantised beforehand: the same weights, in fewer bits."""
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


def check_one_base(members: Sequence[Member], same_base: bool = False, merging: bool = False) -> None:
    """Fingerprints decide where every member has one; what the configurations name decides otherwise.

    same_base: the caller says that the bases are the same, whatever they are called. merging: what can't be checked is not said, since
    the merge says it of each member and its base. Raises SalsaError naming two members.
    """
    unknown = [member for member in members if member.fingerprint is None]
    known = [member for member in members if member.fingerprint is not None]
    for member in known[1:]:
        require(
            same_base or member.fingerprint == known[0].fingerprint,
            f"{member.folder} was trained on base {str(member.fingerprint)[:12]}…, "
            f"{known[0].folder} on {str(known[0].fingerprint)[:12]}… (their {FINGERPRINT}): a soup needs members of one base; "
            "same_base=True (--same-base) asserts that the difference does not matter",
        )
    if not same_base and not merging and len(members) > 1:
        for member in unknown:
            logger.warning(
                "warning: %s has no %s: that its base is the others' is believed, not checked",
                member.folder,
                FINGERPRINT,
            )
    head = members[0]
    for member in members:
        require(
            same_base or not unknown or same_names(member, head),
            f"{member.folder} names the base {shown(member)}, {head.folder} {shown(head)}, and no {FINGERPRINT} says that they are the "
            "same: if they are, pass same_base=True (--same-base)",
        )
        tasks = [m.config["task_type"] for m in (member, head)]
        require(
            tasks[0] == tasks[1] or member.factors.keys() == head.factors.keys(),
            f"{member.folder} has task_type {tasks[0]!r}, {head.folder} {tasks[1]!r}, "
            "and other modules: a soup needs members of one task; train them with the same task_type",
        )


def shown(member: Member) -> str:
    """What a member calls its base, as the message has it."""
    name, revision = member.config["base_model_name_or_path"], member.config["revision"]
    return repr(f"{name or '(no name)'}@{revision or 'main'}")


def same_names(member: Member, other: Member) -> bool:
    """Whether two members name one base: the same id or folder, or two folders at hand with the same weights.

    The case of Hub ids does not count, nor do a closing slash, a path's other spelling, the Hub's cache as a path, or unsloth's suffix for
    a base quantised beforehand (which is said).
    """
    names = [canonical(m) for m in (member, other)]
    if names[0] == names[1]:
        return True
    plain = [(QUANTISED.sub("", name), revision) for name, revision in names]
    if plain[0] == plain[1]:
        logger.warning(
            "warning: %s and %s are taken for one base, one of them in fewer bits", shown(other), shown(member)
        )
        return True
    folders = [base_folder(m.config, m.folder) for m in (member, other)]
    return None not in folders and _weights(folders[0]) == _weights(folders[1]) is not None


def canonical(member: Member) -> tuple[str, str]:
    """(name or resolved path, revision) of the base that a member names."""
    name, revision = str(member.config["base_model_name_or_path"] or ""), member.config["revision"] or "main"
    if (cached := CACHED.fullmatch(name)) is not None:
        name = f"{cached['owner']}/{cached['name']}"
    elif (folder := local_folder(member.config, member.folder)) is not None:
        return str(folder), "main"
    short = name.rstrip("/") or name
    return short if short.startswith(("/", ".", "~")) else short.casefold(), revision


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


def _weights(folder: Path | None) -> str | None:
    try:
        return None if folder is None else base_fingerprint(folder)
    except SalsaError:  # no weights there that can be read: the names stay all that is known
        return None
