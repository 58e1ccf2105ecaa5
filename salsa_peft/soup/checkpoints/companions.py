"""The files that go with a soup's weights: tokenizer, chat template and settings. Imports no torch.

Members may have no tokenizer, a tokenizer with fewer added tokens, or no chat template. The soup gets the tokenizer
with the most tokens (the first if several have as many), the chat template of that tokenizer's member or else of the
first member with a template, and the generation and processor settings of the first member that has them. Tokenizers
whose ids disagree were rejected before (vocabularies.py).
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from salsa_peft.soup.checkpoints.read import Checkpoint, read_mapping
from salsa_peft.soup.checkpoints.vocabularies import vocabulary_of, warn_about_special_tokens
from salsa_peft.soup.checkpoints.write import Output

logger = logging.getLogger(__name__)

SETTINGS, DEFAULT = "tokenizer_config.json", "chat_template.jinja"
PATTERNS = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "*.model", "*.tiktoken", "*.jinja", "*.jinja2", "chat_template.json", "processor_config.json",
    "preprocessor_config.json", "video_preprocessor_config.json", "additional_chat_templates/*.jinja",
)  # fmt: skip
"""Files that are copied besides weights and config.json: no model card, training state or code."""
VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt")


def companion_files(folder: Path) -> dict[str, Path]:
    """Name → path of the files that go with a folder's weights."""
    paths = [path for pattern in PATTERNS for path in folder.glob(pattern) if path.is_file()]
    return {path.relative_to(folder).as_posix(): path for path in paths}


def has_vocabulary(names: Iterable[str]) -> bool:
    """Whether files of these names include a tokenizer's vocabulary, and not only its settings."""
    return any(name in VOCABULARIES or name.endswith((".model", ".tiktoken")) for name in names)


def copy_companions(output: Output, members: Sequence[Checkpoint], base: Checkpoint | None) -> dict[str, str | None]:
    """Copy the files that go with the weights, and warn where the members differ in them.

    If no member has a tokenizer, the base's files may be copied too. Returns the names of the models that the tokenizer
    and the chat template come from.
    """
    found = {member: companion_files(member.folder) for member in members}
    if base is not None and not any(map(has_vocabulary, found.values())):
        found[base] = companion_files(base.folder)
    sources = list(found)
    files: dict[str, Path] = {}
    for part in ("generation", "processor"):
        first = next((given for given in found.values() if any(_part(name) == part for name in given)), {})
        files |= {name: path for name, path in first.items() if _part(name) == part}
    tokens = {source: vocabulary_of(source.folder) for source in sources}
    owners = [source for source in sources if has_vocabulary(found[source])]
    owner = max(owners, key=lambda source: len(tokens[source] or {}), default=None)  # of equal ones the first
    files |= {name: path for name, path in found[owner or sources[0]].items() if _part(name) == "tokenizer"}
    templates = {source: _templates(found[source]) for source in sources}
    speaker = owner if owner and templates[owner] else next((source for source in sources if templates[source]), None)
    for name, path in sorted(files.items()):
        output.write(name, path.read_bytes())
    if speaker is not None and (speaker != owner or _has_template_file(found[speaker])):
        for name, text in templates[speaker].items():
            output.write(name, text)
    if owner is not None:
        other = [source.name for source in sources if tokens[source] != tokens[owner]]
        _warn("tokenizer: taken from %s; missing or with fewer tokens in %s", owner, other)
        warn_about_special_tokens(owner.name, {source.name: source.folder for source in sources})
    if speaker is not None:
        texts = sorted(templates[speaker].values())
        other = [source.name for source in sources if sorted(templates[source].values()) != texts]
        _warn("chat template: taken from %s; missing or different in %s", speaker, other)
    return {"tokenizer": owner.name if owner else None, "chat_template": speaker.name if speaker else None}


def _warn(line: str, taken: Checkpoint, others: Sequence[str]) -> None:
    if others:
        logger.warning(line, taken.name, " and ".join(others))


def _part(name: str) -> str:
    """The kind of a file: "generation", "processor", "template" or "tokenizer"."""
    if name == "generation_config.json":
        return "generation"
    if name in ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"):
        return "processor"
    return "template" if "chat_template" in name else "tokenizer"


def _has_template_file(given: Mapping[str, Path]) -> bool:
    """Whether a chat template is among the files; if not, one may be inside tokenizer_config.json."""
    return any(_part(name) == "template" for name in given)


def _templates(given: Mapping[str, Path]) -> dict[str, bytes]:
    """File name → content of the chat templates. A template in tokenizer_config.json gets its own file."""
    if _has_template_file(given) or SETTINGS not in given:
        return {name: path.read_bytes() for name, path in given.items() if _part(name) == "template"}
    inside: Any = read_mapping(given[SETTINGS]).get("chat_template")
    if isinstance(inside, str):
        return {DEFAULT: inside.encode()}
    rows = [row for row in inside if isinstance(row, dict)] if isinstance(inside, list) else []
    named = {str(row.get("name")): str(row.get("template")) for row in rows}
    return {
        DEFAULT if name == "default" else f"additional_chat_templates/{name}.jinja": text.encode()
        for name, text in named.items()
        if name == Path(name).name  # the name becomes a file name, so it must not be a path
    }
