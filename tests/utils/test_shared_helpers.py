"""What every package uses: files replaced as a whole, JSON files, local folders of Hub ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from salsa_peft.utils.errors import SalsaError
from salsa_peft.utils.files import read_json, replacing, write_atomic
from salsa_peft.utils.hub import HUB_ID, local_folder


class TestReplacing:
    def test_the_file_appears_when_the_block_ends(self, tmp_path: Path) -> None:
        path = tmp_path / "new" / "a.txt"
        with replacing(path) as temporary:
            temporary.write_text("whole")
            assert not path.exists() and temporary.parent == path.parent and temporary.name.startswith(".a.txt.")
        assert path.read_text() == "whole" and list(path.parent.iterdir()) == [path]

    def test_after_an_error_the_old_file_is_there_and_nothing_else(self, tmp_path: Path) -> None:
        path = tmp_path / "a.txt"
        path.write_text("old")

        def fail() -> None:
            with replacing(path) as temporary:
                temporary.write_text("half")
                raise KeyError

        with pytest.raises(KeyError):
            fail()
        assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]

    def test_a_folder_of_that_name(self, tmp_path: Path) -> None:
        with pytest.raises(SalsaError, match="this is a folder, but a file with this name must be written"):
            write_atomic(tmp_path, "text")


class TestReadJson:
    def test_content(self, tmp_path: Path) -> None:
        write_atomic(tmp_path / "a.json", json.dumps({"ä": [1]}, ensure_ascii=False))
        assert read_json(tmp_path / "a.json") == {"ä": [1]}

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (None, "no such file; check the path"),
            (b"{", r"not valid JSON \(.*\); copy or save the file again"),
            (b"\xff", r"not valid JSON \(.*\); copy or save the file again"),
            (b"[" * 100_000, r"not valid JSON \(.*\); copy or save the file again"),
        ],
    )
    def test_a_file_that_is_missing_or_damaged_is_named(
        self, tmp_path: Path, content: bytes | None, message: str
    ) -> None:
        path = tmp_path / "a.json"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(SalsaError, match=f"^{path}: {message}"):
            read_json(path)

    def test_a_folder(self, tmp_path: Path) -> None:
        with pytest.raises(SalsaError, match=rf"^{tmp_path}: cannot be read \(Is a directory\)"):
            read_json(tmp_path)


class TestLocalFolder:
    def test_a_folder_is_used_as_it_is(self, tmp_path: Path) -> None:
        assert local_folder(str(tmp_path), patterns=["*.json"]) == tmp_path

    def test_a_hub_id_is_downloaded(self, tmp_path: Path, monkeypatch: Any) -> None:
        asked: dict[str, Any] = {}

        def download(name: str, **options: Any) -> str:
            asked.update(options, name=name)
            return str(tmp_path)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        assert local_folder("someone/model", patterns=("*.json",), revision="v1") == tmp_path
        assert asked == {"name": "someone/model", "allow_patterns": ["*.json"], "revision": "v1"}

    def test_what_is_neither_is_refused_before_the_hub_is_asked(self) -> None:
        with pytest.raises(SalsaError, match=r"^a/b/c: no such folder, and not a Hub id; use namespace/name"):
            local_folder("a/b/c")

    def test_the_hubs_errors_are_one_line(self, monkeypatch: Any) -> None:
        def download(name: str, **options: Any) -> str:
            raise huggingface_hub.errors.LocalEntryNotFoundError("cannot find the files")

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        with pytest.raises(SalsaError, match=r"^https://huggingface\.co/someone/model: not in the local cache"):
            local_folder("someone/model")

    @pytest.mark.parametrize("name", ["gpt2", "someone/model", "HuggingFaceTB/SmolLM2-1.7B", "a" * 96])
    def test_hub_ids(self, name: str) -> None:
        assert HUB_ID.match(name)

    @pytest.mark.parametrize("name", ["", "a--b", "a/b..c", "a/b/c", "./a", "a/b\n", "-a", "a" * 97])
    def test_no_hub_ids(self, name: str) -> None:
        assert not HUB_ID.match(name)
