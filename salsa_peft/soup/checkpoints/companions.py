"""The files beside the weights of a soup of checkpoints: which member's tokenizer, chat template and settings go with it.

Members may have no tokenizer, or one with fewer added tokens, or no chat template. The result gets the tokenizer that has all tokens of
the others (the first of them), its chat template or else the first that there is, and settings of generation and of a processor from the
first that has them. Ids that disagree are refused before (soup/checkpoints/alignment.py). Imports no torch.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from salsa_peft.soup.checkpoints.read import read_mapping
from salsa_peft.soup.checkpoints.vocabularies import vocabulary_of, warn_about_special_tokens
from salsa_peft.soup.checkpoints.write import Output, has_vocabulary, others

logger = logging.getLogger(__name__)

SETTINGS, DEFAULT = "tokenizer_config.json", "chat_template.jinja"


class Source(NamedTuple):
    """A member, or the base."""

    name: str
    folder: Path


def copy_companions(output: Output, members: Sequence[Source], base: Path | None = None) -> dict[str, str | None]:
    """Copy what goes with the weights, the base's where no member has a tokenizer, and say so where the members differ.

    → the names of whose tokenizer and chat template were taken.
    """
    found = {member: others(member.folder) for member in members}
    sources = list(members)
    if base is not None and not any(map(has_vocabulary, found.values())):
        sources.append(Source("base", base))
        found[sources[-1]] = others(base)
    files: dict[str, Path] = {}
    for part in ("generation", "processor"):
        first = next((given for given in found.values() if any(_part(name) == part for name in given)), {})
        files |= {name: path for name, path in first.items() if _part(name) == part}
    owner = _owner([source for source in sources if has_vocabulary(found[source])])
    files |= {name: path for name, path in found[owner or sources[0]].items() if _part(name) == "tokenizer"}
    with_template = [source for source in sources if _templates(source, found[source])]
    speaker = owner if owner in with_template else next(iter(with_template), None)
    for name, path in sorted(files.items()):
        output.copy(path, name)
    if speaker is not None and (speaker != owner or not _inside(found[speaker])):
        for name, text in _templates(speaker, found[speaker]).items():
            output.write(name, text)
    _say(sources, found, owner, speaker)
    return {"tokenizer": owner and owner.name, "chat_template": speaker and speaker.name}


def _part(name: str) -> str:
    if name == "generation_config.json":
        return "generation"
    if name in ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"):
        return "processor"
    return "template" if "chat_template" in name else "tokenizer"


def _owner(sources: Sequence[Source]) -> Source | None:
    """The first whose tokenizer has all tokens of the others."""
    if not sources:
        return None
    tokens = {source: (vocabulary_of(source.folder) or {}).keys() for source in sources}
    return max(sources, key=lambda source: len(tokens[source]))  # of equal ones the first


def _inside(given: Mapping[str, Path]) -> bool:
    """Whether a folder has no file of a chat template, so that one can only be inside tokenizer_config.json."""
    return not any(_part(name) == "template" for name in given)


def _templates(source: Source, given: Mapping[str, Path]) -> dict[str, bytes]:
    """File name → content of a folder's chat templates, those inside tokenizer_config.json as files of their own."""
    found = {name: path.read_bytes() for name, path in given.items() if _part(name) == "template"}
    if not _inside(given) or SETTINGS not in given:
        return found
    inside: Any = read_mapping(given[SETTINGS]).get("chat_template")
    if isinstance(inside, str):
        return {DEFAULT: inside.encode()}
    rows = [row for row in inside if isinstance(row, dict)] if isinstance(inside, list) else []
    named = {str(row.get("name")): str(row.get("template")) for row in rows}
    for name, text in named.items():
        if name == Path(name).name:  # the file's name, so no path
            found[DEFAULT if name == "default" else f"additional_chat_templates/{name}.jinja"] = text.encode()
    return found


def _say(
    sources: Sequence[Source], found: Mapping[Source, Mapping[str, Path]], owner: Source | None, speaker: Source | None
) -> None:
    """A line where the members differ in their tokens or in their chat template."""
    if owner is not None:
        tokens = {source: vocabulary_of(source.folder) for source in sources}
        other = [source.name for source in sources if tokens[source] != tokens[owner]]
        if other:
            logger.warning(
                "tokenizer: taken from %s, since %s has none or fewer tokens", owner.name, " and ".join(other)
            )
        warn_about_special_tokens(owner.name, {source.name: source.folder for source in sources})
    if speaker is not None:
        texts = {source: sorted(_templates(source, found[source]).values()) for source in sources}
        other = [source.name for source in sources if texts[source] != texts[speaker]]
        if other:
            logger.warning(
                "chat template: taken from %s, since %s has none or another", speaker.name, " and ".join(other)
            )
