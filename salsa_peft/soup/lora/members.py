"""Whether the members of a soup are adapters of one base, and which tokenizer goes with the soup."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from salsa_peft.models.adapters.bases import base_folder, local_folder
from salsa_peft.soup.checkpoints.vocabularies import check_vocabulary, vocabulary, warn_about_special_tokens
from salsa_peft.soup.lora.read import MORE_TEMPLATES, TOKENIZER, read_json, write_file
from salsa_peft.soup.lora.tensors import Member
from salsa_peft.utils.errors import SalsaError, require
from salsa_peft.utils.fingerprints import FINGERPRINT, base_fingerprint, sha256

if TYPE_CHECKING:
    from salsa_peft.soup.lora.tensors import Member


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


VOCABULARY, SETTINGS, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"


@dataclass(frozen=True)
class Tokenizer:
    """Where a soup's tokenizer and chat template come from."""

    folder: Path
    name: str
    template: str | None
    """The member's name whose template it is; None: no member has one."""
    written: str | None = None
    """The template's text, where it comes from another member than the tokenizer."""

    def said(self) -> dict[str, Any]:
        """For soup.json."""
        return {"from": self.name, "chat_template": self.template}


def tokenizer_of(members: Sequence[Member]) -> Tokenizer | None:
    """Raises SalsaError for tokenizers that give one token two ids, or one id two tokens; None where no member has one."""
    have = [member for member in members if any((member.folder / name).is_file() for name in TOKENIZER)]
    if not have:
        return None
    vocabularies = vocabularies_of(have)
    known = [member for member in have if member.name in vocabularies]
    for i, member in enumerate(known):
        for other in known[:i]:
            check_ids(other, vocabularies[other.name], member, vocabularies[member.name])
    for member in have[1:]:
        if not {have[0].name, member.name} <= vocabularies.keys():
            check_vocabulary(have[0].folder, member.folder)
    whole = {token for tokens in vocabularies.values() for token in tokens}
    taken = next((m for m in known if len(vocabularies[m.name]) == len(whole)), None if known else have[0])
    if taken is None:
        first, odd = known[0], next(token for token in sorted(whole) if token not in vocabularies[known[0].name])
        other = next(member for member in known if odd in vocabularies[member.name])
        raise SalsaError(
            f"{other.folder / VOCABULARY}: token {odd!r:.40} is not in {first.folder}, which has others that are missing here: no member's "
            "tokenizer has them all; put one tokenizer with all of them into every member's folder",
        )
    templates = {member.name: found for member in have if (found := template_of(member.folder)) is not None}
    source = taken.name if taken.name in templates else next(iter(templates), None)
    written = None if source in (None, taken.name) else templates[str(source)]
    say(members, taken, source, templates)
    return Tokenizer(taken.folder, taken.name, source, written)


def vocabularies_of(members: Sequence[Member]) -> dict[str, dict[str, int]]:
    """Member's name → token → id, of those that have a tokenizer.json. Files of the same bytes are read once, and not at all if all are."""
    paths = {m.name: m.folder / VOCABULARY for m in members if (m.folder / VOCABULARY).is_file()}
    digests = {name: sha256(path) for name, path in paths.items()}
    one = len(set(digests.values())) == 1
    read: dict[str, dict[str, int]] = {}
    for name, digest in digests.items():
        if digest not in read:
            read[digest] = {} if one else vocabulary(paths[name])
    return {name: read[digest] for name, digest in digests.items()}


def say(members: Sequence[Member], taken: Member, source: str | None, templates: dict[str, str]) -> None:
    """Which one was taken, where that was a choice."""
    others = [name for name, text in templates.items() if source is not None and text != templates[source]]
    if others:
        logger.warning(
            "warning: the chat template of %s goes with the soup; that of %s differs", source, ", ".join(others)
        )
    if taken is not members[0] or source not in (None, taken.name):
        template = "" if source in (None, taken.name) else f", with the chat template of {source}"
        logger.warning("warning: the tokenizer of %s goes with the soup%s", taken.name, template)
    warn_about_special_tokens(taken.name, {member.name: member.folder for member in members})


def check_ids(mine: Member, known: dict[str, int], other: Member, given: dict[str, int]) -> None:
    """A token that both have has the same id in both, and an id that both have the same token."""
    if known is given:
        return
    tokens = {number: token for token, number in known.items()}
    for token, number in given.items():
        there = known.get(token, number)
        require(
            there == number,
            f"{other.folder / VOCABULARY}: token {token!r:.40} has id {number}, but {there} in {mine.folder}: the members of a soup share the "
            "vocabulary; if one was trained with another tokenizer, it cannot be averaged",
        )
        require(
            token in known or number not in tokens,
            f"{other.folder / VOCABULARY}: id {number} is token {token!r:.40}, but {tokens.get(number, '')!r:.40} in {mine.folder}: the members of a "
            "soup share the vocabulary; give the tokens that were added ids of their own and train again",
        )


def template_of(folder: Path) -> str | None:
    """A folder's chat template: a file, or a field of the tokenizer's settings."""
    path = folder / TEMPLATE
    if path.is_file():
        return path.read_text(encoding="utf-8")
    settings = read_json(folder / SETTINGS) if (folder / SETTINGS).is_file() else {}
    given = settings.get("chat_template")
    if isinstance(given, list):  # several, by name
        given = next(
            (row.get("template") for row in given if isinstance(row, dict) and row.get("name") == "default"), None
        )
    return given if isinstance(given, str) else None


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Copy its files into the soup's folder."""
    for name in TOKENIZER:
        source = tokenizer.folder / name
        if source.is_file():
            write_file(folder / name, partial(shutil.copyfile, source))
    for source in sorted((tokenizer.folder / MORE_TEMPLATES).glob("*.jinja")):
        (folder / MORE_TEMPLATES).mkdir(exist_ok=True)
        write_file(folder / MORE_TEMPLATES / source.name, partial(shutil.copyfile, source))
    if tokenizer.written is not None:
        text = tokenizer.written
        write_file(folder / TEMPLATE, lambda temporary: temporary.write_text(text, encoding="utf-8"))


TOWER = ("model", "language_model")
"""Parts of a name that moved when multimodal models were laid out anew."""


def in_one_layout(members: Sequence[Member]) -> list[Member]:
    """Members whose modules are named in two of a multimodal model's layouts, all in the newest: they are one set of modules."""
    variants: dict[tuple[str, ...], set[str]] = {}
    apart: set[tuple[str, ...]] = set()  # one member has two of these names: they are two modules
    for member in members:
        mine: set[tuple[str, ...]] = set()
        for name in (*member.factors, *member.direct):
            key = without_tower(name)
            variants.setdefault(key, set()).add(name)
            apart |= {key} & mine
            mine.add(key)
    moved = {key: names for key, names in variants.items() if len(names) > 1 and key not in apart}
    renamed = {name: newest(names) for names in moved.values() for name in names}
    return [in_layout(member, renamed) for member in members] if renamed else list(members)


def without_tower(name: str) -> tuple[str, ...]:
    return tuple(part for part in name.split(".") if part not in TOWER)


def newest(names: set[str]) -> str:
    """Of one module's names in several layouts."""
    layers = {name for name in names if name.startswith("model.")}
    tail = min(names, key=len)
    if not layers:
        return tail
    inside = max(layers, key=lambda name: (name.count("language_model"), -len(name)))
    if "language_model" in inside or not any("language_model" in name for name in names):
        return inside
    return f"model.language_model.{inside.removeprefix('model.')}"


def in_layout(member: Member, renamed: dict[str, str]) -> Member:
    """A member with other names for its modules."""
    factors = {}
    for name, given in member.factors.items():
        new = renamed.get(name, name)
        holder = new.removesuffix(f".{given.parameter}") if given.parameter else new
        owner = holder if given.owner == given.holder else holder.rpartition(".")[0]
        factors[new] = given._replace(holder=holder, owner=owner)
    direct = {renamed.get(name, name): key for name, key in member.direct.items()}
    frozen = frozenset(renamed.get(name, name) for name in member.frozen)
    return replace(member, factors=dict(sorted(factors.items())), direct=dict(sorted(direct.items())), frozen=frozen)
