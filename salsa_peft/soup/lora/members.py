"""Checks that members share a base, vocabulary and layout, and the choice of the soup's tokenizer."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from salsa_peft.models.adapters.bases import base_folder, local_base
from salsa_peft.soup.checkpoints.read import read_mapping
from salsa_peft.soup.checkpoints.vocabularies import check_vocabulary, vocabulary, warn_about_special_tokens
from salsa_peft.soup.lora.read import MORE_TEMPLATES, TOKENIZER
from salsa_peft.soup.lora.tensors import Member
from salsa_peft.utils.errors import SalsaError, require
from salsa_peft.utils.files import write_atomic
from salsa_peft.utils.fingerprints import FINGERPRINT, base_fingerprint, sha256

logger = logging.getLogger(__name__)
CACHED = re.compile(r".*/models--(?P<owner>[^/]+?)--(?P<name>[^/]+)/snapshots/(?P<revision>[0-9a-f]+)/?")
QUANTISED = re.compile(r"(-unsloth)?-bnb-[48]bit$")
"""Suffix of unsloth's repositories that hold a base in quantized form."""


def check_one_base(members: Sequence[Member], same_base: bool = False, merging: bool = False) -> None:
    """Raise SalsaError if two members have different bases.

    The fingerprints decide if every member has one; otherwise the bases that the configurations name are compared too.
    same_base: the caller asserts that the bases are the same. merging: no warning for members without a fingerprint,
    because the merge gives its own.
    """
    unknown = [member for member in members if member.fingerprint is None]
    known = [member for member in members if member.fingerprint is not None]
    for member in known[1:]:
        require(
            same_base or member.fingerprint == known[0].fingerprint,
            f"{member.folder} was trained on base {str(member.fingerprint)[:12]}…, {known[0].folder} on"
            f" {str(known[0].fingerprint)[:12]}… (see their {FINGERPRINT}); a soup needs members of one base. If the"
            " difference does not matter, pass same_base=True (--same-base)",
        )
    if not same_base and not merging and len(members) > 1:
        for member in unknown:
            logger.warning(
                "warning: %s has no %s, so its base cannot be compared with that of the others",
                member.folder,
                FINGERPRINT,
            )
    head = members[0]
    for member in members:
        require(
            same_base or not unknown or same_names(member, head),
            f"{member.folder} names the base {base_label(member)}, {head.folder} names {base_label(head)}, and without"
            f" a {FINGERPRINT} in every member they cannot be compared; if they are the same base, pass same_base=True"
            " (--same-base)",
        )
        tasks = [m.config["task_type"] for m in (member, head)]
        require(
            tasks[0] == tasks[1] or member.factors.keys() == head.factors.keys(),
            f"{member.folder} has task_type {tasks[0]!r}, {head.folder} has {tasks[1]!r}, and their modules differ; a"
            " soup needs members of one task, so train them with the same task_type",
        )


def base_label(member: Member) -> str:
    """The base that a member names, for messages."""
    name, revision = member.config["base_model_name_or_path"], member.config["revision"]
    return repr(f"{name or '(no name)'}@{revision or 'main'}")


def same_names(member: Member, other: Member) -> bool:
    """Whether two members name the same base: one Hub id or folder, or two folders with the same weights.

    Upper and lower case of Hub ids, trailing slashes, the spelling of paths, and the Hub's cache as a path make no
    difference. Neither does unsloth's suffix of quantized bases, which gives a warning.
    """
    names = [canonical_base(m) for m in (member, other)]
    if names[0] == names[1]:
        return True
    plain = [(QUANTISED.sub("", name), revision) for name, revision in names]
    if plain[0] == plain[1]:
        logger.warning(
            "warning: %s and %s are treated as the same base; one of them is quantized",
            base_label(other),
            base_label(member),
        )
        return True
    folders = [base_folder(m.config, m.folder) for m in (member, other)]
    return None not in folders and _weights(folders[0]) == _weights(folders[1]) is not None


def canonical_base(member: Member) -> tuple[str, str]:
    """(name or resolved path, revision) of the base that a member names."""
    name, revision = str(member.config["base_model_name_or_path"] or ""), member.config["revision"] or "main"
    if (cached := CACHED.fullmatch(name)) is not None:
        name = f"{cached['owner']}/{cached['name']}"
    elif (folder := local_base(member.config, member.folder)) is not None:
        return str(folder), "main"
    short = name.rstrip("/") or name
    return short if short.startswith(("/", ".", "~")) else short.casefold(), revision


def _weights(folder: Path | None) -> str | None:
    try:
        return None if folder is None else base_fingerprint(folder)
    except SalsaError:  # without readable weights only the names can be compared
        return None


VOCABULARY, SETTINGS, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"


@dataclass(frozen=True)
class TokenizerSource:
    """The members whose tokenizer and chat template the soup gets."""

    folder: Path
    name: str
    template: str | None
    """Name of the member whose chat template it is; None if no member has one."""
    written: str | None = None
    """The template's text if it comes from another member than the tokenizer."""

    def summary(self) -> dict[str, Any]:
        """The entry in soup.json."""
        return {"from": self.name, "chat_template": self.template}


def tokenizer_of(members: Sequence[Member]) -> TokenizerSource | None:
    """The tokenizer with all tokens of the members; None if no member has a tokenizer.

    Raises SalsaError if a token has two ids or an id two tokens, or if no tokenizer has all tokens.
    """
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
    tokens = {token for vocabulary in vocabularies.values() for token in vocabulary}
    chosen = next((m for m in known if len(vocabularies[m.name]) == len(tokens)), None if known else have[0])
    if chosen is None:
        first = known[0]
        odd = min(tokens - vocabularies[first.name].keys())
        other = next(member for member in known if odd in vocabularies[member.name])
        raise SalsaError(
            f"{other.folder / VOCABULARY}: token {odd!r:.40} is missing in {first.folder}, which has tokens that are"
            " missing here, so no member's tokenizer has all tokens; put one tokenizer with all of them into every"
            " member's folder",
        )
    templates = {member.name: found for member in have if (found := template_of(member.folder)) is not None}
    source = chosen.name if chosen.name in templates else next(iter(templates), None)
    warn_about_choice(members, chosen, source, templates)
    written = None if source in (None, chosen.name) else templates[str(source)]
    return TokenizerSource(chosen.folder, chosen.name, source, written)


def vocabularies_of(members: Sequence[Member]) -> dict[str, dict[str, int]]:
    """Member's name → token → id, for members with a tokenizer.json. If all files are equal, none is read."""
    paths = {m.name: m.folder / VOCABULARY for m in members if (m.folder / VOCABULARY).is_file()}
    digests = {name: sha256(path) for name, path in paths.items()}
    files = {digests[name]: path for name, path in paths.items()}
    read = {digest: vocabulary(path) if len(files) > 1 else {} for digest, path in files.items()}
    return {name: read[digest] for name, digest in digests.items()}


def warn_about_choice(members: Sequence[Member], chosen: Member, source: str | None, templates: dict[str, str]) -> None:
    """Log whose tokenizer and chat template the soup gets if the members differ."""
    others = [name for name, text in templates.items() if source is not None and text != templates[source]]
    if others:
        logger.warning("warning: the soup gets the chat template of %s; that of %s differs", source, ", ".join(others))
    if chosen is not members[0] or source not in (None, chosen.name):
        template = "" if source in (None, chosen.name) else f", with the chat template of {source}"
        logger.warning("warning: the soup gets the tokenizer of %s%s", chosen.name, template)
    warn_about_special_tokens(chosen.name, {member.name: member.folder for member in members})


def check_ids(mine: Member, known: dict[str, int], other: Member, given: dict[str, int]) -> None:
    """Raise SalsaError if a token has different ids in two vocabularies, or an id different tokens."""
    if known is given:
        return
    tokens = {number: token for token, number in known.items()}
    for token, number in given.items():
        own = known.get(token, number)
        require(
            own == number,
            f"{other.folder / VOCABULARY}: token {token!r:.40} has id {number}, but {own} in {mine.folder}; the members"
            " of a soup share a vocabulary, and an adapter that was trained with another tokenizer cannot be averaged",
        )
        require(
            token in known or number not in tokens,
            f"{other.folder / VOCABULARY}: id {number} is token {token!r:.40}, but {tokens.get(number, '')!r:.40} in"
            f" {mine.folder}; the members of a soup share a vocabulary. Give the added tokens different ids and train"
            " again",
        )


def template_of(folder: Path) -> str | None:
    """A folder's chat template: a file of its own, or a field of the tokenizer's settings."""
    path = folder / TEMPLATE
    if path.is_file():
        return path.read_text(encoding="utf-8")
    settings = read_mapping(folder / SETTINGS) if (folder / SETTINGS).is_file() else {}
    given = settings.get("chat_template")
    if isinstance(given, list):  # several templates by name
        rows = (row for row in given if isinstance(row, dict) and row.get("name") == "default")
        given = next((row.get("template") for row in rows), None)
    return given if isinstance(given, str) else None


def write_tokenizer(tokenizer: TokenizerSource, folder: Path) -> None:
    """Copy the tokenizer's files into the soup's folder."""
    for pattern in (*TOKENIZER, f"{MORE_TEMPLATES}/*.jinja"):
        for path in tokenizer.folder.glob(pattern):
            write_atomic(folder / path.relative_to(tokenizer.folder), path.read_bytes())
    if tokenizer.written is not None:
        write_atomic(folder / TEMPLATE, tokenizer.written)


TOWER = ("model", "language_model")
"""Parts of a module's name that moved when Transformers changed the layout of multimodal models."""


def unify_layouts(members: Sequence[Member]) -> list[Member]:
    """Rename modules that members name by different layouts of a multimodal model to the newest layout."""
    variants: dict[tuple[str, ...], set[str]] = {}
    apart: set[tuple[str, ...]] = set()  # one member has two of these names, so they are two modules
    for member in members:
        mine: set[tuple[str, ...]] = set()
        for name in (*member.factors, *member.direct):
            key = tuple(part for part in name.split(".") if part not in TOWER)
            variants.setdefault(key, set()).add(name)
            apart |= {key} & mine
            mine.add(key)
    moved = {key: names for key, names in variants.items() if len(names) > 1 and key not in apart}
    renamed = {name: newest_name(names) for names in moved.values() for name in names}
    return [rename_modules(member, renamed) for member in members] if renamed else list(members)


def newest_name(names: set[str]) -> str:
    """The name in the newest layout, out of one module's names in several layouts."""
    layers = {name for name in names if name.startswith("model.")}
    if not layers:
        return min(names, key=len)
    inside = max(layers, key=lambda name: (name.count("language_model"), -len(name)))
    if "language_model" in inside or not any("language_model" in name for name in names):
        return inside
    return f"model.language_model.{inside.removeprefix('model.')}"


def rename_modules(member: Member, renamed: dict[str, str]) -> Member:
    """The member with new names of its modules."""
    factors = {}
    for name, given in member.factors.items():
        new, shape = renamed.get(name, name), given.shape
        holder = new.removesuffix(f".{shape.parameter}") if shape.parameter else new
        owner = holder if shape.owner == shape.holder else holder.rpartition(".")[0]
        factors[new] = given._replace(shape=shape._replace(holder=holder, owner=owner))
    direct = {renamed.get(name, name): key for name, key in member.direct.items()}
    frozen = frozenset(renamed.get(name, name) for name in member.frozen)
    return replace(member, factors=dict(sorted(factors.items())), direct=dict(sorted(direct.items())), frozen=frozen)
