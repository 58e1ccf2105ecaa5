"""Whether adapters are of one base, and of this one: by fingerprint, by what they call it, or by what lies at those places."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from salsa_peft.models.adapters.bases import base_folder, local_folder
from salsa_peft.utils.errors import SalsaError, require
from salsa_peft.utils.fingerprints import FINGERPRINT, base_fingerprint

if TYPE_CHECKING:
    from salsa_peft.adapter_tensors import Member


logger = logging.getLogger(__name__)
CACHED = re.compile(r".*/models--(?P<owner>[^/]+?)--(?P<name>[^/]+)/snapshots/(?P<revision>[0-9a-f]+)/?")
QUANTISED = re.compile(r"(-unsloth)?-bnb-[48]bit$")
"""How unsloth names a base that it has quantised beforehand: the same weights, in fewer bits."""


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


def _weights(folder: Path | None) -> str | None:
    try:
        return None if folder is None else base_fingerprint(folder)
    except SalsaError:  # no weights there that can be read: the names stay all that is known
        return None
