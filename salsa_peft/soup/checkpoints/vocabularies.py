"""Reads and compares the files of tokenizers: the ids of tokens, and the BOS and EOS tokens."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from salsa_peft.soup.checkpoints.read import read_mapping
from salsa_peft.utils.errors import SalsaError, require

logger = logging.getLogger(__name__)

TOKENS, PIECES = ("tokenizer.json", "vocab.json"), ("tokenizer.model",)
"""The files that list the tokens of a vocabulary: JSON of Transformers, and protobuf of SentencePiece."""


def special_tokens(folder: Path) -> dict[str, str]:
    """The bos_token and eos_token that a folder's tokenizer_config.json names."""
    path = folder / "tokenizer_config.json"
    settings = read_mapping(path) if path.is_file() else {}
    given = {name: settings.get(name) for name in ("bos_token", "eos_token")}
    texts = {name: token.get("content") if isinstance(token, dict) else token for name, token in given.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def warn_about_special_tokens(taken: str, folders: Mapping[str, Path]) -> None:
    """Warn if a member (name → folder) has another BOS or EOS token than the member `taken`."""
    own = special_tokens(folders[taken])
    for name, folder in folders.items():
        for token, text in special_tokens(folder).items():
            if text != own.get(token):
                line = "the soup's tokenizer comes from %s, where %s is %r; in %s it is %r"
                logger.warning(line, taken, token, own.get(token, "not set"), name, text)


def check_vocabulary(head: Path, other: Path) -> None:
    """Raise SalsaError if two tokenizers have different ids for a token, or different tokens for an id.

    Such tokenizers cannot share a soup, because rows of embeddings are averaged by id.
    """
    pairs = [(_vocabulary_file(head, names), _vocabulary_file(other, names)) for names in (TOKENS, PIECES)]
    head_file, other_file = next((pair for pair in pairs if all(pair)), (None, None))
    if head_file is None or other_file is None:
        if all(any(found) for found in zip(*pairs, strict=True)):
            logger.warning(
                "the tokenizers of %s and %s were not compared: one has tokenizer.model, the other only JSON",
                head, other,
            )  # fmt: skip
        return
    if head_file.read_bytes() == other_file.read_bytes():
        return
    known, found = vocabulary(head_file), vocabulary(other_file)
    remedy = (
        "rows of embeddings are averaged by id, so members of a soup must share a vocabulary; leave out one of these"
        " two members"
    )
    for token, number in found.items():
        require(
            known.get(token, number) == number,
            f"{other_file}: the id of token {token!r:.40} is {number}, but {known.get(token)} in {head_file}: {remedy}",
        )
    tokens: dict[int, set[str]] = {}
    for token, number in known.items():
        tokens.setdefault(number, set()).add(token)
    shared = {number for token, number in found.items() if known.get(token) == number}
    for token, number in found.items():
        expected = "" if number in shared else min(tokens.get(number, {""}))
        require(
            expected == "",
            f"{other_file}: the token of id {number} is {token!r:.40}, but {expected!r:.40} in {head_file}: {remedy}",
        )


def _vocabulary_file(folder: Path, names: Sequence[str] = TOKENS) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_file()), None)


def vocabulary_of(folder: Path) -> dict[str, int] | None:
    """Token → id of a folder's tokenizer.json or vocab.json; None if the folder has neither file."""
    path = _vocabulary_file(folder)
    return None if path is None else vocabulary(path)


def vocabulary(path: Path) -> dict[str, int]:
    """Token → id of a tokenizer.json, or of a tokenizer.model or vocab.json with its added_tokens.json."""
    if path.suffix == ".model" or path.name == "vocab.json":
        listed = _pieces(path) if path.suffix == ".model" else read_mapping(path)
        beside = path.with_name("added_tokens.json")
        return listed | (read_mapping(beside) if beside.is_file() else {})
    content = read_mapping(path)
    model, added = content.get("model"), content.get("added_tokens")
    given = model.get("vocab") if isinstance(model, dict) else None
    pairs: list[tuple[Any, Any]] = list(given.items()) if isinstance(given, dict) else []
    if isinstance(given, list):  # Unigram: [token, score] in the order of ids
        pairs = [(row[0], number) for number, row in enumerate(given) if isinstance(row, list) and row]
    if isinstance(added, list):
        pairs += [
            (row["content"], row["id"]) for row in added if isinstance(row, dict) and {"content", "id"} <= row.keys()
        ]
    return dict(pairs)


def _pieces(path: Path) -> dict[str, int]:
    """Token → id of a tokenizer.model.

    The file is a ModelProto of SentencePiece. Field 1 holds the pieces in the order of ids; field 1 of a piece, its
    text.
    """
    refusal = (
        f"{path}: cannot be read as a SentencePiece model and compared with the other members' tokenizers; save each"
        " tokenizer with Transformers (save_pretrained writes tokenizer.json), or put the same file into every folder"
    )
    try:
        pieces = [piece for number, piece in _fields(path.read_bytes()) if number == 1]
        texts = [next(text for number, text in _fields(piece) if number == 1).decode() for piece in pieces]
    except (IndexError, KeyError, ValueError, StopIteration) as error:
        raise SalsaError(refusal) from error
    require(bool(texts), refusal)
    return {text: number for number, text in enumerate(texts)}


def _fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield (number, content) of the length-delimited fields of a protobuf message."""
    place = 0

    def varint() -> int:
        nonlocal place
        value = shift = 0
        while True:
            byte = message[place]
            place, value, shift = place + 1, value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value

    while place < len(message):
        tag = varint()
        if tag & 7 == 0:
            varint()
            continue
        size = varint() if tag & 7 == 2 else {1: 8, 5: 4}[tag & 7]
        if place + size > len(message):
            raise IndexError(place)
        if tag & 7 == 2:
            yield tag >> 3, message[place : place + size]
        place += size
