"""Whose tokenizer, chat template and settings go with a soup of checkpoints: nothing that a member has is lost, and it is said."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from checkpoint_folders import parameters, write
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from salsa_peft.soup.checkpoints.average import average
from salsa_peft.utils.errors import SalsaError

TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


def tokenizer(folder: Path, *added: str, template: str | None = None) -> None:
    """Three words, and what is added to them; Transformers saves the template as a file of its own."""
    words = Tokenizer(models.WordLevel({"<unk>": 0, "one": 1, "two": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    made.add_tokens(list(added))
    made.chat_template = template
    made.save_pretrained(folder)


def inside(folder: Path, template: Any) -> None:
    """The template in tokenizer_config.json, as versions before 4.50 saved it."""
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))


def members(tmp_path: Path) -> list[Path]:
    return [write(tmp_path / name, parameters(seed)) for seed, name in enumerate("ab")]


def soup(tmp_path: Path, folders: list[Path], **options: Any) -> tuple[Any, dict[str, Any]]:
    """The result's tokenizer, as Transformers opens it, and soup.json."""
    average(tmp_path / "out", folders, [1 / len(folders)] * len(folders), **options)
    found = json.loads((tmp_path / "out" / "soup.json").read_text())
    return AutoTokenizer.from_pretrained(tmp_path / "out"), found


@pytest.mark.parametrize("owner", [0, 1])
def test_a_tokenizer_and_a_template_that_only_one_member_has(
    tmp_path: Path, owner: int, caplog: pytest.LogCaptureFixture
) -> None:
    folders = members(tmp_path)
    tokenizer(folders[owner], template=TEMPLATE)
    (folders[1] / "generation_config.json").write_text('{"temperature": 0.5}')
    with caplog.at_level(logging.WARNING, "salsa_peft"):
        found, said = soup(tmp_path, folders)
    name, other = "ab"[owner], "ba"[owner]
    assert (found.get_vocab(), found.chat_template) == ({"<unk>": 0, "one": 1, "two": 2}, TEMPLATE)
    assert (said["tokenizer"], said["chat_template"]) == (name, name)
    assert caplog.messages == [
        f"tokenizer: taken from {name}; missing or with fewer tokens in {other}",
        f"chat template: taken from {name}; missing or different in {other}",
    ]
    assert (tmp_path / "out" / "generation_config.json").read_text() == '{"temperature": 0.5}'


@pytest.mark.parametrize("how", ["file", "inside", "several"])
def test_added_tokens_of_one_member_and_the_template_of_another(
    tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The tokenizer of b, which has all tokens, and the template of a, wherever it is written."""
    folders = members(tmp_path)
    tokenizer(folders[0], template=TEMPLATE if how == "file" else None)
    if how != "file":
        rows = [{"name": "default", "template": TEMPLATE}, {"name": "tools", "template": "{{ tools }}"}]
        inside(folders[0], TEMPLATE if how == "inside" else rows)
    tokenizer(folders[1], "<think>")
    with caplog.at_level(logging.WARNING, "salsa_peft"):
        found, said = soup(tmp_path, folders)
    assert found.get_vocab()["<think>"] == 3
    expected = {"default": TEMPLATE, "tools": "{{ tools }}"} if how == "several" else TEMPLATE
    assert found.chat_template == expected
    assert (said["tokenizer"], said["chat_template"]) == ("b", "a")
    assert len(caplog.messages) == 2


def test_equal_ones_are_taken_from_the_first_without_a_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Byte by byte; and the base's where no member has one."""
    folders = members(tmp_path)
    with caplog.at_level(logging.WARNING, "salsa_peft"):
        for folder in folders:
            tokenizer(folder, template=TEMPLATE)
        inside(folders[0], "not read where there is a file")
        _, said = soup(tmp_path, folders)
        assert (said["tokenizer"], said["chat_template"], caplog.messages) == ("a", "a", [])
        for path in folders[0].iterdir():
            if "token" in path.name or "template" in path.name:
                assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    base = write(tmp_path / "base", parameters(2))
    tokenizer(base, template=TEMPLATE)
    bare = [write(tmp_path / "bare" / name, parameters(seed)) for seed, name in enumerate("ab")]
    found, said = soup(tmp_path, bare, base=base)
    assert (len(found), found.chat_template, said["tokenizer"]) == (3, TEMPLATE, "base")
    _, said = soup(tmp_path, [folders[1], bare[0]], base=base)
    assert said["tokenizer"] == "b"


def test_ids_that_disagree_are_refused_also_by_vocab_json(tmp_path: Path) -> None:
    folders = members(tmp_path)
    tokenizer(folders[0], "<think>")
    (folders[1] / "vocab.json").write_text(json.dumps({"<unk>": 0, "two": 1, "one": 2}))
    with pytest.raises(SalsaError, match=r"b/vocab.json: the id of token 'two' is 1, but 2 in .*a/tokenizer.json"):
        average(tmp_path / "out", folders, [0.5, 0.5])
    (folders[1] / "vocab.json").write_text(json.dumps({"<unk>": 0, "one": 1, "two": 2}))
    (folders[1] / "added_tokens.json").write_text(json.dumps({"<other>": 3}))
    with pytest.raises(SalsaError, match=r"b/vocab.json: the token of id 3 is '<other>', but '<think>' in"):
        average(tmp_path / "out", folders, [0.5, 0.5])
