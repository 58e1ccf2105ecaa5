"""Checkpoints: whole or not there, whatever moment a save is broken off at; found again, newest first; logs cut back."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from salsa_peft.training import checkpoints
from salsa_peft.utils.errors import SalsaError

FILES = {"salsa_state.json": b"{}", "model.safetensors": b"weights", "value/adapter.safetensors": b"\0" * 5000}


def filled(folder: Path, mark: str = "") -> Path:
    """The files of a checkpoint that is being made; `mark` tells one from another."""
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content + mark.encode() * (name != checkpoints.STATE))
    return folder


def state(folder: Path, **values: Any) -> None:
    """Write the engine's state anew (the manifest is of the one before)."""
    (folder / checkpoints.STATE).write_text(json.dumps(values))


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Path]:
    """A committed checkpoint-`number`."""

    def make(number: int, mark: str = "") -> Path:
        name = f"checkpoint-{number}"
        checkpoints.commit(filled(tmp_path / checkpoints.PARTIAL / name, mark), tmp_path / name)
        return tmp_path / name

    return make


class TestCommit:
    def test_the_manifest_lists_every_file(self, make: Any, tmp_path: Path) -> None:
        """With size and SHA-256, of folders inside too; nothing is left under the other name."""
        folder = make(3)
        expected = {n: {"size": len(c), "sha256": hashlib.sha256(c).hexdigest()} for n, c in FILES.items()}
        assert json.loads((folder / checkpoints.MANIFEST).read_text()) == expected
        assert {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} == {
            *FILES,
            checkpoints.MANIFEST,
        }
        assert list((tmp_path / checkpoints.PARTIAL).iterdir()) == []
        assert checkpoints.fault(folder) is None

    def test_one_of_that_name_gives_way(self, make: Any) -> None:
        """Whole or not: what it held is gone."""
        (make(3, "old") / "left.txt").write_text("x")
        folder = make(3, "new")
        assert (folder / "model.safetensors").read_bytes() == b"weightsnew"
        assert not (folder / "left.txt").exists() and checkpoints.fault(folder) is None

    def test_every_file_is_on_the_disk_before_the_name_is(
        self, make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Content, then manifest, then the folder's name, then the entry of that name."""
        events: list[str] = []
        fsync, rename = os.fsync, Path.rename

        def note(handle: int) -> None:
            events.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
            fsync(handle)

        def renamed(self: Path, target: Path) -> Any:
            events.append(f"→ {Path(target).name}")
            return rename(self, target)

        monkeypatch.setattr(os, "fsync", note)
        monkeypatch.setattr(Path, "rename", renamed)
        make(3)
        at = events.index("→ checkpoint-3")
        contents = [events.index(Path(name).name) for name in FILES]
        manifest = next(i for i, event in enumerate(events) if checkpoints.MANIFEST in event)
        assert max(contents) < manifest < at and tmp_path.name in events[at + 1 :]

    @pytest.mark.parametrize("again", [False, True])
    def test_broken_off_at_any_moment(
        self, make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: bool
    ) -> None:
        """At each call that changes the disk: checkpoint-3 is the last whole one until checkpoint-4 is, and that one is the new."""
        calls = {"count": 0, "stop": -1}

        def breaking(function: Any) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                calls["count"] += 1
                if calls["count"] == calls["stop"]:
                    raise KeyboardInterrupt
                return function(*args, **kwargs)

            return call

        for owner, name in (
            (os, "fsync"),
            (os, "replace"),
            (Path, "rename"),
            (checkpoints, "sha256"),
            (shutil, "rmtree"),
        ):
            monkeypatch.setattr(owner, name, breaking(getattr(owner, name)))
        seen = []
        for stop in range(1, 100):
            calls["stop"] = -1
            for old in tmp_path.glob("checkpoint-*"):
                shutil.rmtree(old)
            make(3, "old")
            if again:
                make(4, "old")
            calls["count"], calls["stop"] = 0, stop
            try:
                make(4, "new")
                broken = False
            except KeyboardInterrupt:
                broken = True
            calls["stop"] = -1
            found, passed = checkpoints.last_complete(tmp_path)
            assert found is not None and passed == []
            seen.append((found.name, (found / "model.safetensors").read_bytes()))
            if not broken:
                break
        assert not broken and seen[-1] == ("checkpoint-4", b"weightsnew") and len(seen) > 8
        before = {("checkpoint-3", b"weightsold"), ("checkpoint-4", b"weightsold")}
        assert set(seen[:-3]) <= before and set(seen) <= before | {seen[-1]}


class TestFault:
    def test_whole(self, make: Any) -> None:
        assert checkpoints.fault(make(3)) is None

    @pytest.mark.parametrize("name", [name for name in FILES if name != checkpoints.STATE])
    @pytest.mark.parametrize("damage", ["missing", "longer", "shorter", "flipped", "folder"])
    def test_each_damage_to_each_file_is_named(self, make: Any, name: str, damage: str) -> None:
        file = make(3) / name
        raw = file.read_bytes()
        file.unlink()
        if damage == "folder":
            file.mkdir()
        elif damage != "missing":
            file.write_bytes({"longer": raw + b"x", "shorter": raw[:-1], "flipped": raw[:-1] + b"\1"}[damage])
        assert (
            checkpoints.fault(file.parents[name.count("/")])
            == f"{name} {'is missing' if damage in ('missing', 'folder') else 'has changed'}"
        )

    @pytest.mark.parametrize("manifest", [None, "", "{", "[]", "3", "{}", '{"model.safetensors": {}}', "\0\0"])
    def test_no_manifest_or_none_of_ours(self, make: Any, manifest: str | None) -> None:
        """Also an ordinary Trainer's checkpoint, which has none."""
        folder = make(3)
        (folder / checkpoints.MANIFEST).unlink()
        if manifest is not None:
            (folder / checkpoints.MANIFEST).write_text(manifest)
        why = checkpoints.fault(folder)
        assert why is not None and checkpoints.MANIFEST in why
        assert checkpoints.fault(folder.parent / "none") is not None


class TestFinding:
    def test_newest_first_by_number(self, make: Any, tmp_path: Path) -> None:
        """10 after 9, not before 2; other names are none of them."""
        for number in (9, 10, 2, 100):
            make(number)
        for other in ("checkpoint-best", "checkpoint-3.tmp", "checkpoint-", "xcheckpoint-5"):
            (tmp_path / other).mkdir()
        assert [path.name for path in checkpoints.checkpoints(tmp_path)] == [f"checkpoint-{n}" for n in (100, 10, 9, 2)]

    def test_the_newest_whole_one(self, make: Any, tmp_path: Path) -> None:
        """Each that is passed over is said, those older than what is found are not looked at."""
        assert checkpoints.last_complete(tmp_path) == (None, [])
        for number in (1, 2, 3, 4):
            make(number)
        (tmp_path / "checkpoint-4" / checkpoints.MANIFEST).unlink()
        (tmp_path / "checkpoint-3" / "model.safetensors").unlink()
        (tmp_path / "checkpoint-1" / "model.safetensors").unlink()
        found, passed = checkpoints.last_complete(tmp_path)
        assert found == tmp_path / "checkpoint-2" and len(passed) == 2
        assert "checkpoint-4: skipped, because it is incomplete (it has no readable checkpoint.json)" in passed[0]
        assert "checkpoint-3: skipped, because it is incomplete (model.safetensors is missing)" in passed[1]
        (tmp_path / "checkpoint-2" / checkpoints.STATE).unlink()
        assert checkpoints.last_complete(tmp_path)[0] is None and len(checkpoints.last_complete(tmp_path)[1]) == 4

    @pytest.mark.parametrize(
        ("keep", "left"), [(None, [12, 11, 9, 2]), (1, [12]), (3, [12, 11, 9]), (9, [12, 11, 9, 2])]
    )
    def test_rotation_keeps_the_newest(self, make: Any, tmp_path: Path, keep: int | None, left: list[int]) -> None:
        """And clears away what a killed save left."""
        for number in (9, 12, 2, 11):
            make(number)
        filled(tmp_path / checkpoints.PARTIAL / "checkpoint-13")
        checkpoints.rotate(tmp_path, keep)
        assert [path.name for path in checkpoints.checkpoints(tmp_path)] == [f"checkpoint-{n}" for n in left]
        assert not (tmp_path / checkpoints.PARTIAL).exists()

    def test_what_was_saved_last_is_the_newest(self, make: Any, tmp_path: Path) -> None:
        """Whatever its number: a second training begins at 1 again. One that can't be read comes first, so that it is said."""
        for number, count in ((4, 1), (1, 2), (3, 3)):
            state(make(number), saved=count)
        assert [path.name for path in checkpoints.checkpoints(tmp_path)] == [
            "checkpoint-3",
            "checkpoint-1",
            "checkpoint-4",
        ]
        assert checkpoints.next_number(tmp_path) == 4
        (tmp_path / "checkpoint-4" / checkpoints.STATE).write_text("{")
        found, passed = checkpoints.last_complete(tmp_path)
        assert checkpoints.next_number(tmp_path) == 4 and "checkpoint-4: skipped, because it is incomplete" in passed[0]
        assert found is None or found.name != "checkpoint-4"

    @pytest.mark.parametrize(("keep", "left"), [(1, [9, 1]), (2, [9, 1]), (3, [9, 2, 1]), (None, [9, 8, 2, 1])])
    def test_rotation_spares_the_last_and_the_best(
        self, make: Any, tmp_path: Path, keep: int | None, left: list[int]
    ) -> None:
        """1 was saved last, 9 is the best; what is not ours counts for nothing and stays."""
        for number, count in ((9, 1), (8, 2), (2, 3), (1, 4)):
            state(make(number), saved=count)
        (tmp_path / "checkpoint-50").mkdir()
        checkpoints.rotate(tmp_path, keep, tmp_path / "checkpoint-9")
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted(f"checkpoint-{n}" for n in [*left, 50])

    @pytest.mark.parametrize("keep", [0, -1])
    def test_a_limit_that_is_none_removes_nothing(self, make: Any, tmp_path: Path, keep: int) -> None:
        """TrainingArguments.save_total_limit of 0 or less means no limit in Transformers."""
        for number in (1, 2, 3):
            make(number)
        checkpoints.rotate(tmp_path, keep)
        assert len(checkpoints.checkpoints(tmp_path)) == 3


class TestState:
    def test_of_the_same_setting(self, make: Any) -> None:
        """Given back as it was written."""
        folder, state = make(3), {"setting": {"seed": 1, "temperature": 0.7}, "kl_coef": 0.1 + 0.2}
        (folder / checkpoints.STATE).write_text(json.dumps(state))
        assert checkpoints.read_state(folder, {"seed": 1, "temperature": 0.7}) == state

    @pytest.mark.parametrize(
        ("now", "line"),
        [
            (
                {"seed": 2},
                "checkpoint-3: seed was 1 and is 2 now, so this run cannot be resumed. Start a new run in another output_dir",
            ),
            ({"seed": 1, "temperature": 1.0}, "temperature was 0.7 and is 1.0 now"),
            ({"prompts": 16}, "prompts was None and is 16 now"),
        ],
    )
    def test_of_another_setting(self, make: Any, now: dict[str, Any], line: str) -> None:
        """The first that differs is named with both values."""
        folder = make(3)
        (folder / checkpoints.STATE).write_text(json.dumps({"setting": {"seed": 1, "temperature": 0.7}}))
        with pytest.raises(SalsaError, match=line):
            checkpoints.read_state(folder, now)


class TestCut:
    def test_what_came_after_the_checkpoint_is_taken_off(self, tmp_path: Path) -> None:
        (tmp_path / "log").write_text("one\ntwo\nhal")
        checkpoints.truncate_log(tmp_path / "log", 8)
        assert (tmp_path / "log").read_text() == "one\ntwo\n"
        checkpoints.truncate_log(tmp_path / "log", 8)
        assert (tmp_path / "log").read_text() == "one\ntwo\n"
        checkpoints.truncate_log(tmp_path / "log", 0)
        assert (tmp_path / "log").read_text() == ""

    def test_a_log_that_is_not_there(self, tmp_path: Path) -> None:
        """Is one of 0 bytes, and is not made."""
        assert checkpoints.truncate_log(tmp_path / "log", 0) is None
        assert not (tmp_path / "log").exists()
        line = checkpoints.truncate_log(tmp_path / "log", 4)
        assert (
            line is not None
            and "log: lines from before the checkpoint are missing: the file has 0 bytes, but had 4 at the checkpoint"
            in line
        )

    def test_a_log_that_is_too_short_is_left_as_it_is(self, tmp_path: Path) -> None:
        """And said: os.truncate would fill it up with zeros, and lost lines are no reason to lose the checkpoint."""
        (tmp_path / "log").write_text("one\n")
        line = checkpoints.truncate_log(tmp_path / "log", 5)
        assert (
            line is not None
            and "log: lines from before the checkpoint are missing: the file has 4 bytes, but had 5 at the checkpoint"
            in line
        )
        assert (tmp_path / "log").read_text() == "one\n"


@pytest.mark.parametrize(("micro", "then"), [(8, 4), (4, 8)])
def test_another_micro_batch_in_the_middle_of_an_update(
    make_trainer: Any, tmp_path: Path, micro: int, then: int
) -> None:
    """What the update logs is what it would have logged, up to rounding: 1 of its 4 steps was made with other micro-batches."""
    options: dict[str, Any] = {
        "num_ppo_epochs": 4,
        "save_strategy": "steps",
        "save_steps": 1,
        "max_steps": 4,
        "learning_rate": 1e-2,
    }
    whole = make_trainer(folder=tmp_path / "run", micro_batch_size=micro, **options)
    whole.train()
    expected = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    again = make_trainer(folder=tmp_path / "run", micro_batch_size=then, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text()) == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert expected["val/ratio_var"] > 0
