"""Tokenizers that are a tokenizer.model alone are compared piece by piece."""

from __future__ import annotations

import json
import logging
import lzma
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from paths import SHARED

from salsa_peft.soup.checkpoints.vocabularies import check_vocabulary, vocabulary
from salsa_peft.soup.lora.members import tokenizer_of
from salsa_peft.utils.errors import SalsaError

PIECES = ["<unk>", "<s>", "</s>", "▁a", "b" * 200]


def field(number: int, content: bytes) -> bytes:
    """A protobuf field with a length."""
    length = len(content)
    size = bytes([length]) if length < 128 else bytes([length & 127 | 128, length >> 7])
    return bytes([number << 3 | 2]) + size + content


def model(pieces: list[str], more: bytes = b"") -> bytes:
    """SentencePiece's ModelProto: each piece with text, score (four bytes) and type (a number); then the trainer's and others' fields."""
    body = b"".join(field(1, field(1, text.encode()) + b"\x15\x00\x00\x80\xbf" + b"\x18\x03") for text in pieces)
    return body + field(2, b"\x08\x01" + more)


@pytest.fixture
def folders(tmp_path: Path) -> Any:
    """folders(pieces, pieces) → two folders with a tokenizer.model each."""

    def make(*given: list[str] | bytes) -> list[Path]:
        found = []
        for number, pieces in enumerate(given):
            folder = tmp_path / f"m{number}"
            folder.mkdir(exist_ok=True)
            (folder / "tokenizer.model").write_bytes(
                pieces if isinstance(pieces, bytes) else model(pieces, bytes([16, number]))
            )
            found.append(folder)
        return found

    return make


def of_adapters(one: Path, other: Path) -> None:
    """As a soup of adapters looks at them."""
    members: Any = [SimpleNamespace(name=folder.name, folder=folder) for folder in (one, other)]
    tokenizer_of(members)


both = pytest.mark.parametrize("check", [check_vocabulary, of_adapters])


@both
@pytest.mark.parametrize(
    ("other", "line"),
    [
        (PIECES, None),
        ([*PIECES, "c"], None),
        (
            ["<unk>", "</s>", "<s>", *PIECES[3:]],
            r"m1/tokenizer\.model: the id of token '</s>' is 1, but 2 in .*m0/token",
        ),
        (
            [*PIECES[:3], "▁c", PIECES[4]],
            r"m1/tokenizer\.model: the token of id 3 is '▁c', but '▁a' in .*m0/tokenizer\.m",
        ),
        (b"IQ== 0\nIg== 1\n", r"m1/tokenizer\.model: cannot be read as a SentencePiece model"),
        (model(PIECES)[:-3], r"m1/tokenizer\.model: cannot be read as a SentencePiece model"),
    ],
)
def test_two_tokenizer_models(folders: Any, check: Any, other: Any, line: str | None) -> None:
    one, two = folders(PIECES, other)
    if line is None:
        check(one, two)
        return
    with pytest.raises(SalsaError, match=line) as caught:
        check(one, two)
    assert "\n" not in str(caught.value)


@both
def test_added_tokens_count(folders: Any, check: Any) -> None:
    one, two = folders(PIECES, PIECES)
    for folder, token in ((one, "<x>"), (two, "<y>")):
        (folder / "added_tokens.json").write_text(json.dumps({token: 5}))
    (two / "tokenizer.model").write_bytes(model(PIECES, b"\x18\x01"))
    with pytest.raises(SalsaError, match="the token of id 5 is '<y>', but '<x>'"):
        check(one, two)


@both
def test_two_kinds_of_files_are_not_compared_and_that_is_said(folders: Any, check: Any, caplog: Any) -> None:
    one, two = folders(PIECES, PIECES)
    (two / "tokenizer.model").unlink()
    (two / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"other": 0}}}))
    with caplog.at_level(logging.WARNING):
        check(one, two)
    assert [line for line in caplog.messages if "were not compared" in line and str(one) in line and str(two) in line]


def test_mistrals_own() -> None:
    """The same ids as in its tokenizer.json."""
    folder = SHARED / "hub" / "models" / "mistral-7b-v0.1"
    if not folder.is_dir():
        pytest.skip(f"needs the real tokenizer in {folder}")
    whole = json.loads(lzma.decompress((folder / "tokenizer.json.xz").read_bytes()))
    assert vocabulary(folder / "tokenizer.model") == whole["model"]["vocab"] and len(whole["model"]["vocab"]) == 32_000
