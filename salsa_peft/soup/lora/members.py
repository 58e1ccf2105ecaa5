"""Check that members share a base and a vocabulary, unify module names, choose the soup's tokenizer."""

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
"""Suffix of the names of unsloth's repositories with quantised bases."""


def check_one_base(members: Sequence[Member], same_base: bool = False, merging: bool = False) -> None:
    """Raise SalsaError if two members have different bases.

    If every member has a fingerprint, only the fingerprints are compared, else also the bases that the configurations
    name. Members with different task_types must have LoRA on the same modules. same_base: the caller asserts that the
    bases are the same. merging: do not warn about missing fingerprints, because the merge into the base does.
    """
    unknown = [member for member in members if member.fingerprint is None]
    known = [member for member in members if member.fingerprint is not None]
    for member in known[1:]:
        require(
            same_base or member.fingerprint == known[0].fingerprint,
            f"{member.folder} was trained on base {str(member.fingerprint)[:12]}…, {known[0].folder} on"
            f" base {str(known[0].fingerprint)[:12]}… (see their {FINGERPRINT}); a soup needs members of one base. If"
            " the difference does not matter, pass same_base=True (--same-base)",
        )
    if not same_base and not merging and len(members) > 1:
        for member in unknown:
            logger.warning(
                "warning: %s has no %s, so its base cannot be compared with those of the other members",
                member.folder,
                FINGERPRINT,
            )
    first = members[0]
    for member in members:
        require(
            same_base or not unknown or same_names(member, first),
            f"{member.folder} names the base {base_label(member)}, but {first.folder} names {base_label(first)}."
            f" Without a {FINGERPRINT} in every member only the names can be compared; if both name the same base, pass"
            " same_base=True (--same-base)",
        )
        tasks = [m.config["task_type"] for m in (member, first)]
        require(
            tasks[0] == tasks[1] or member.factors.keys() == first.factors.keys(),
            f"{member.folder} has task_type {tasks[0]!r}, {first.folder} has {tasks[1]!r}, and they have LoRA on"
            " different modules; train the members with the same task_type",
        )


def base_label(member: Member) -> str:
    """Name and revision of the base in a member's configuration, as shown in messages."""
    name, revision = member.config["base_model_name_or_path"], member.config["revision"]
    return repr(f"{name or '(no name)'}@{revision or 'main'}")


def same_names(member: Member, other: Member) -> bool:
    """Whether two members name the same base: one Hub id or folder, or two folders with the same weights.

    The case of Hub ids, trailing slashes and the spelling of paths are ignored, and a path into the Hub's cache counts
    as its Hub id. Names that differ only in unsloth's suffix of quantised bases count as the same, with a warning.
    """
    names = [canonical_base(m) for m in (member, other)]
    if names[0] == names[1]:
        return True
    plain = [(QUANTISED.sub("", name), revision) for name, revision in names]
    if plain[0] == plain[1]:
        logger.warning(
            "warning: %s and %s are treated as the same base; one of them is quantised",
            base_label(other),
            base_label(member),
        )
        return True
    folders = [base_folder(m.config, m.folder) for m in (member, other)]
    return None not in folders and _weights(folders[0]) == _weights(folders[1]) is not None


def canonical_base(member: Member) -> tuple[str, str]:
    """The base that a member names: Hub id or resolved path, and revision, in a form that can be compared."""
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
    """The member (folder, name) that gives the soup its tokenizer, and the source of the chat template."""

    folder: Path
    name: str
    template: str | None
    """Name of the member that the chat template comes from; None if no member has one."""
    written: str | None = None
    """Text of the chat template if it comes from another member than the tokenizer; else None."""

    def summary(self) -> dict[str, Any]:
        """The entry `tokenizer` of soup.json."""
        return {"from": self.name, "chat_template": self.template}


def tokenizer_of(members: Sequence[Member]) -> TokenizerSource | None:
    """Choose the member whose tokenizer has the tokens of all members; None if no member has a tokenizer.

    Raises SalsaError if a token has two ids or an id two tokens, or if no member's tokenizer has all tokens.
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
            f"{other.folder / VOCABULARY}: token {odd!r:.40} is missing in {first.folder}, and no member's tokenizer"
            " has the tokens of all members; put one tokenizer with all tokens into every member's folder"
        )
    templates = {member.name: found for member in have if (found := template_of(member.folder)) is not None}
    source = chosen.name if chosen.name in templates else next(iter(templates), None)
    warn_about_choice(members, chosen, source, templates)
    written = None if source in (None, chosen.name) else templates[str(source)]
    return TokenizerSource(chosen.folder, chosen.name, source, written)


def vocabularies_of(members: Sequence[Member]) -> dict[str, dict[str, int]]:
    """Member's name → token → id, for members with a tokenizer.json; all empty if these files are equal."""
    paths = {m.name: m.folder / VOCABULARY for m in members if (m.folder / VOCABULARY).is_file()}
    digests = {name: sha256(path) for name, path in paths.items()}
    files = {digests[name]: path for name, path in paths.items()}
    read = {digest: vocabulary(path) if len(files) > 1 else {} for digest, path in files.items()}
    return {name: read[digest] for name, digest in digests.items()}


def warn_about_choice(members: Sequence[Member], chosen: Member, source: str | None, templates: dict[str, str]) -> None:
    """Warn if chat templates or special tokens differ, or if the tokenizer is not the first member's."""
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
            f"{other.folder / VOCABULARY}: token {token!r:.40} has id {number}, but id {own} in {mine.folder}; the"
            " members of a soup must share a vocabulary, so train them with one tokenizer",
        )
        require(
            token in known or number not in tokens,
            f"{other.folder / VOCABULARY}: id {number} is token {token!r:.40}, but {tokens.get(number, '')!r:.40} in"
            f" {mine.folder}; the members of a soup must share a vocabulary. Give added tokens distinct ids",
        )


def template_of(folder: Path) -> str | None:
    """Chat template in a folder's chat_template.jinja or tokenizer_config.json; None if neither has one."""
    path = folder / TEMPLATE
    if path.is_file():
        return path.read_text(encoding="utf-8")
    settings = read_mapping(folder / SETTINGS) if (folder / SETTINGS).is_file() else {}
    given = settings.get("chat_template")
    if isinstance(given, list):  # several named templates
        rows = (row for row in given if isinstance(row, dict) and row.get("name") == "default")
        given = next((row.get("template") for row in rows), None)
    return given if isinstance(given, str) else None


def write_tokenizer(tokenizer: TokenizerSource, folder: Path) -> None:
    """Copy the files of the chosen tokenizer, with the chosen chat template, into the soup's folder."""
    for pattern in (*TOKENIZER, f"{MORE_TEMPLATES}/*.jinja"):
        for path in tokenizer.folder.glob(pattern):
            write_atomic(folder / path.relative_to(tokenizer.folder), path.read_bytes())
    if tokenizer.written is not None:
        write_atomic(folder / TEMPLATE, tokenizer.written)


TOWER = ("model", "language_model")
"""Parts of a module's name that moved when Transformers changed the layout of multimodal models."""


def unify_layouts(members: Sequence[Member]) -> list[Member]:
    """Rename modules of multimodal models to the newest layout where members use different layouts."""
    variants: dict[tuple[str, ...], set[str]] = {}
    apart: set[tuple[str, ...]] = set()  # keys that fit two modules of one member, so neither is renamed
    for member in members:
        mine: set[tuple[str, ...]] = set()
        for name in (*member.factors, *member.non_lora):
            key = tuple(part for part in name.split(".") if part not in TOWER)
            variants.setdefault(key, set()).add(name)
            apart |= {key} & mine
            mine.add(key)
    moved = {key: names for key, names in variants.items() if len(names) > 1 and key not in apart}
    renamed = {name: newest_name(names) for names in moved.values() for name in names}
    return [rename_modules(member, renamed) for member in members] if renamed else list(members)


def newest_name(names: set[str]) -> str:
    """A module's name in the newest layout. names: the module's names in several layouts."""
    layers = {name for name in names if name.startswith("model.")}
    if not layers:
        return min(names, key=len)
    inside = max(layers, key=lambda name: (name.count("language_model"), -len(name)))
    if "language_model" in inside or not any("language_model" in name for name in names):
        return inside
    return f"model.language_model.{inside.removeprefix('model.')}"


def rename_modules(member: Member, renamed: dict[str, str]) -> Member:
    """A copy of the member with renamed modules and parameters. renamed: old name → new name."""
    factors = {}
    for name, given in member.factors.items():
        new, shape = renamed.get(name, name), given.shape
        module = new.removesuffix(f".{shape.parameter}") if shape.parameter else new
        target = module if shape.target == shape.module else module.rpartition(".")[0]
        factors[new] = given._replace(shape=shape._replace(module=module, target=target))
    non_lora = {renamed.get(name, name): key for name, key in member.non_lora.items()}
    frozen = frozenset(renamed.get(name, name) for name in member.frozen)
    return replace(
        member, factors=dict(sorted(factors.items())), non_lora=dict(sorted(non_lora.items())), frozen=frozen
    )
