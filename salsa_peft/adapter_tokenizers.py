"""Which tokenizer goes with a soup of adapters: the one that knows every token of its members', with a template where any has one."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from salsa_peft.adapter_folders import MORE_TEMPLATES, TOKENIZER, read_json, write_file
from salsa_peft.adapter_tensors import Member
from salsa_peft.utils.errors import SalsaError, require
from salsa_peft.utils.fingerprints import sha256
from salsa_peft.vocabularies import check_vocabulary, say_special_tokens, vocabulary

logger = logging.getLogger(__name__)

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
    say_special_tokens(taken.name, {member.name: member.folder for member in members})


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
