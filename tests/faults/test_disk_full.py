"""A disk without room: said before a save where that can be known; a save that fails leaves the last good one, whole.

Two ways to run out, without a disk of one's own: a limit on the size of files (RLIMIT_FSIZE, which fails in the middle of a file, as a full
disk does), and a small tmpfs where this user may mount one.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from paths import ROOT

from salsa_peft.config import job as runs
from salsa_peft.config.load import load_recipe
from salsa_peft.models.adapters import lora as adapters
from salsa_peft.models.weights import save_checkpoint
from salsa_peft.recipe import worker
from salsa_peft.recipe.__main__ import main as salsa_run
from salsa_peft.training import checkpoints
from salsa_peft.training.ppo.state import stored_size
from salsa_peft.utils import files as disk
from salsa_peft.utils.errors import SalsaError
from salsa_peft.utils.files import write_atomic

SAVING: dict[str, Any] = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """Within the context a file of this process ends at so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def free(monkeypatch: Any, size: int) -> None:
    """From now on every disk has so many bytes left."""
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(2**40, 2**40 - size, size))


def digest(folder: Path) -> dict[str, bytes]:
    """All files."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class TestCheckpoints:
    @pytest.fixture
    def make(self, make_trainer: Any, tmp_path: Path) -> Callable[..., Any]:
        return lambda name, **options: make_trainer(folder=tmp_path / name, **(SAVING | options))

    @pytest.fixture
    def weights(self, make: Any) -> dict[str, torch.Tensor]:
        """What a run leaves that had room."""
        trainer = make("whole")
        trainer.train()
        return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}

    def fails_at(self, trainer: Any, step: int, how: Callable[[], Any]) -> None:
        """From that step's save on `how` is the context of saves."""
        save = trainer._save_checkpoint

        def failing(*args: Any) -> None:
            if trainer.state.global_step < step:
                save(*args)
            else:
                with how():
                    save(*args)

        trainer._save_checkpoint = failing

    @pytest.mark.parametrize("size", [0, 500, 4000, 12_000, 20_000], ids=lambda size: f"{size}-bytes")
    def test_a_save_that_fails_leaves_the_last_one(self, make: Any, tmp_path: Path, weights: Any, size: int) -> None:
        """In any of its files: one line, no half of a checkpoint, and from the last whole one the run ends as if nothing had been."""
        trainer = make("full")
        self.fails_at(trainer, 3, lambda: files_up_to(size))
        with pytest.raises(SalsaError, match="a file could not be written because the disk is full") as refusal:
            trainer.train()
        assert "\n" not in str(refusal.value) and str(tmp_path / "full") in str(refusal.value)
        there = checkpoints.checkpoints(tmp_path / "full")
        assert [folder.name for folder in there] == ["checkpoint-2", "checkpoint-1"]
        assert [checkpoints.fault(folder) for folder in there] == [None, None]
        assert not (tmp_path / "full" / checkpoints.PARTIAL).exists()
        again = make("full")
        again.train(resume_from_checkpoint=True)
        for name, parameter in again.model.named_parameters():
            assert not parameter.requires_grad or torch.equal(parameter, weights[name]), name

    def test_no_room_is_said_before_the_save(self, make: Any, tmp_path: Path, monkeypatch: Any) -> None:
        """What trains, its optimizer's two states, the rollout batch: known to the byte, so nothing of it is written."""
        trainer = make("full")
        trainer.train(resume_from_checkpoint=None)
        held = sum(p.numel() * 4 for p in trainer.model.parameters() if p.requires_grad) * 3
        other = make("other")
        save, write = other._save, other.checkpoints.write

        def not_at_step_3(*args: Any, **options: Any) -> None:
            assert other.state.global_step < 3, "it began to write"
            save(*args, **options)

        def late(state: Any, size: int | None) -> Any:
            if state.global_step == 3:
                free(monkeypatch, held - 1)
            return write(state, size)

        other._save, other.checkpoints.write = not_at_step_3, late
        with pytest.raises(
            SalsaError, match=r"checkpoint-3: needs .*, but only .* are free on the disk of .*\. Nothing was written"
        ):
            other.train()
        assert [folder.name for folder in checkpoints.checkpoints(tmp_path / "other")] == [
            "checkpoint-2",
            "checkpoint-1",
        ]
        assert checkpoints.last_complete(tmp_path / "other") == (tmp_path / "other" / "checkpoint-2", [])

    def test_what_it_takes_is_what_is_asked_for(self, make: Any, tmp_path: Path, monkeypatch: Any) -> None:
        """The tensors' bytes are no more than the checkpoint has: nothing that fits is refused. (The rest is a tokenizer and JSON.)"""
        asked: list[float] = []
        monkeypatch.setattr(disk, "require_disk_space", lambda folder, size, what: asked.append(size))
        make("a").train()
        newest = checkpoints.checkpoints(tmp_path / "a")[0]
        written = sum(file.stat().st_size for file in newest.iterdir())
        assert 0.4 * written < max(asked) < written


def test_states_of_8_bits_are_counted_as_they_are_stored() -> None:
    """torchao's stand for float32 tensors and hold a quarter of them, with a scale for each block."""
    from torchao.optim.subclass_8bit import OptimState8bit

    state = OptimState8bit.zeros((1024, 4), signed=True, block_size=256)
    assert 4096 < stored_size(state) < 4096 * 1.5 and stored_size(torch.zeros(1024, 4)) == 4 * 4096


def test_what_a_kill_left_counts_as_free(make_trainer: Any, make_base: Any, make_adapter: Any, tokenizer: Any, tmp_path: Path, monkeypatch: Any) -> None:  # fmt: skip
    """It goes before the disk is asked: a resumed run must not be refused for want of what it is about to free."""
    left = [
        tmp_path / "out" / checkpoints.PARTIAL / "x",
        tmp_path / "full" / ".saving" / "x",
        tmp_path / "seed" / f".{adapters.WEIGHTS}.7-7.tmp",
    ]
    for file in left:
        file.parent.mkdir(parents=True)
        file.write_bytes(b"0" * 100)
    monkeypatch.setattr(
        disk, "require_disk_space", lambda folder, size, what: asked.append([file.exists() for file in left])
    )
    asked: list[Any] = []
    make_trainer(max_steps=1, save_strategy="steps", save_steps=1).train()
    assert asked[0] == [False, True, True]
    save_checkpoint(make_base(), tmp_path / "full", tokenizer)
    adapters.save(make_adapter(make_base(), "seed", 1), "seed", tmp_path / "seed", None)
    assert asked[-2:] == [[False, False, True], [False, False, False]]


def test_a_disk_that_tells_no_size(monkeypatch: Any, tmp_path: Path) -> None:
    """As some network file systems: nothing is refused for it."""
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, 0))
    disk.require_disk_space(tmp_path, 1e9, "x")


def test_the_disk_that_is_full_is_named(tmp_path: Path) -> None:
    """Not the run's, where another one is; and not memory that is mapped."""
    (tmp_path / "cache").mkdir()
    line = disk.disk_full_message(
        OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "cache" / "blob")), Path("/work")
    )
    assert line is not None and line.startswith(
        f"{tmp_path}/cache: a file could not be written because the disk is full"
    )
    assert disk.disk_full_message(RuntimeError("unable to mmap 64 bytes: No space left on device"), tmp_path) is None
    assert disk.disk_full_message(ValueError("my reward: File too large: x.txt"), tmp_path) is None


class TestFiles:
    def test_an_adapter_that_was_there_stays(self, make_base: Any, make_adapter: Any, tmp_path: Path) -> None:
        """Its weights go first to another name."""
        model = make_adapter(make_base(), "seed-0", 1)
        adapters.save(model, "seed-0", tmp_path / "seed", None)
        before = digest(tmp_path / "seed")
        for parameter in adapters.parameters(model, "seed-0"):
            parameter.data.add_(1)
        with files_up_to(1000), pytest.raises(Exception) as failure:
            adapters.save(model, "seed-0", tmp_path / "seed", None)
        assert disk.disk_full_message(failure.value, tmp_path) is not None
        after = digest(tmp_path / "seed")
        assert {name: after[name] for name in before} == before
        adapters.read(tmp_path / "seed")

    def test_a_checkpoint_that_was_there_stays(self, make_base: Any, tokenizer: Any, tmp_path: Path) -> None:
        """Full weights too: they are whole beside the old ones before these give way, and shards that the new one has not go."""
        first, second = make_base(seed=1), make_base(seed=2)
        save_checkpoint(first, tmp_path / "policy", tokenizer)
        before = digest(tmp_path / "policy")
        with files_up_to(1000), pytest.raises(Exception) as failure:
            save_checkpoint(second, tmp_path / "policy", tokenizer)
        assert disk.disk_full_message(failure.value, tmp_path) is not None and digest(tmp_path / "policy") == before
        (tmp_path / "policy" / "model-00002-of-00002.safetensors").write_bytes(b"of a larger one")
        save_checkpoint(second, tmp_path / "policy", tokenizer)
        after = digest(tmp_path / "policy")
        assert after.keys() == before.keys() and after["model.safetensors"] != before["model.safetensors"]

    def test_no_room_for_weights_is_said_before_they_are_written(self, make_base: Any, make_adapter: Any, tokenizer: Any, tmp_path: Path, monkeypatch: Any) -> None:  # fmt: skip
        """To the byte, tied weights counted once."""
        base = make_base(tie_word_embeddings=True)
        size = sum(parameter.nbytes for parameter in base.parameters())
        free(monkeypatch, size - 1)
        with pytest.raises(
            SalsaError, match=r"policy: needs .*, but only .* are free on the disk of .*\. Nothing was written"
        ):
            save_checkpoint(base, tmp_path / "policy", tokenizer)
        free(monkeypatch, size)
        save_checkpoint(base, tmp_path / "policy", tokenizer)
        model = make_adapter(make_base(), "seed-0", 1)
        free(monkeypatch, sum(parameter.nbytes for parameter in adapters.parameters(model, "seed-0")) - 1)
        with pytest.raises(SalsaError, match=r"seed: needs .*, but only .* are free on"):
            adapters.save(model, "seed-0", tmp_path / "seed", None)
        assert not (tmp_path / "seed").exists()

    def test_a_file_that_was_there_stays(self, tmp_path: Path) -> None:
        """And nothing of the one that failed."""
        write_atomic(tmp_path / "a.json", b"old")
        with files_up_to(100), pytest.raises(OSError) as failure:
            write_atomic(tmp_path / "a.json", b"new" * 1000)
        assert digest(tmp_path) == {"a.json": b"old"} and disk.disk_full_message(failure.value, tmp_path) is not None

    @pytest.mark.parametrize(
        ("error", "is_full"),
        [
            (OSError(errno.ENOSPC, "No space left on device"), True),
            (OSError(errno.EDQUOT, "Disk quota exceeded"), True),
            (OSError(errno.EACCES, "Permission denied"), False),
            (RuntimeError("[enforce fail at inline_container.cc:626] . unexpected pos 64 vs 0"), True),
            (RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed"), True),
            (Exception("No space left on device (os error 28)"), True),  # tokenizers'
            (RuntimeError("PytorchStreamReader failed reading zip archive: failed finding central directory"), False),
            (ValueError("shapes"), False),
        ],
    )  # fmt: skip
    def test_what_is_for_want_of_room(self, error: Exception, is_full: bool, tmp_path: Path) -> None:
        """Also where another error was raised from it; a folder that is not there yet has a disk too."""
        wrapped = RuntimeError("could not save")
        wrapped.__cause__ = error
        for one in (error, wrapped):
            line = disk.disk_full_message(one, tmp_path / "not" / "there")
            assert (line is not None) == is_full and "\n" not in (line or "")


class TestACommand:
    def test_a_run_that_cannot_fit_is_refused_before_it_writes(
        self, tmp_path: Path, monkeypatch: Any, capsys: Any
    ) -> None:
        """Code 2, one line, no folder."""
        monkeypatch.chdir(tmp_path)
        free(monkeypatch, 1_000_000)
        assert salsa_run(["quickstart", "--lora"]) == 2
        said = capsys.readouterr().err
        assert (
            said.count("\n") == 1
            and "but only 1.0 MiB are free on the disk of" in said
            and not list(tmp_path.iterdir())
        )

    def test_a_stage_that_finds_none_says_so_in_a_line(self, tmp_path: Path) -> None:
        """No trace to look for; the trace is in the log all the same."""
        error = OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "weights"))

        def work(job: Any) -> Any:
            raise error

        sys.modules["full_disk_stage"] = type("Stage", (), {"run": staticmethod(work)})  # type: ignore[assignment]
        unit = runs.Unit(stage="sft", name="seed-0", run="full_disk_stage:run")
        loaded = load_recipe("quickstart", lora="lora", overrides=[])
        report = worker.run_stage(runs.Job(recipe=loaded.recipe, unit=unit, folder=tmp_path, inputs={}, recipe_yaml=""))
        assert report["known"] and report["line"].startswith(
            f"{tmp_path}: a file could not be written because the disk is full ("
        )

    @pytest.mark.slow
    def test_a_small_disk_that_runs_full_in_the_middle(self, tmp_path: Path, tally: Any) -> None:
        """A tmpfs that fills up at some moment of a run: one line, code 1 or 2, no trace; with room again the same command goes on, and
        what was finished before is not made again."""
        words = [
            sys.executable,
            "-m",
            "salsa_peft.recipe",
            "quickstart",
            "--lora",
            "--output-dir",
            "disk/run",
            "--stages",
            "toy,data,sft",
        ]
        sets = {"toy.pretrain_steps": 20, "toy.pretrain_examples": 200, "toy.demonstrations": 32, "toy.preferences": 64, "toy.prompts": 128, "reward.batch_size": 16,
                "toy.hidden_size": 32, "sft.num_train_epochs": 1, "sft.batch_size": 16}  # fmt: skip
        words += [word for key, value in sets.items() for word in ("--set", f"{key}={json.dumps(value)}")]
        script = (
            "import os, shutil, subprocess, sys\nfrom pathlib import Path\n"
            "Path('disk').mkdir()\n"
            "if subprocess.run(['mount', '-t', 'tmpfs', '-o', f'size={sys.argv[1]}k', 'none', 'disk']).returncode: sys.exit(77)\n"
            "first = subprocess.run(sys.argv[2:], stderr=subprocess.PIPE, text=True)\n"
            "print(first.returncode, first.stderr.count('Traceback'), 'the disk is full' in first.stderr or 'free on' in first.stderr, flush=True)\n"
            "done = len(list(Path('disk/run/stages').glob('**/manifest.json')))\n"
            "subprocess.run(['mount', '-o', 'remount,size=200m', 'disk'], check=True)\n"
            "again = subprocess.run(sys.argv[2:], stderr=subprocess.PIPE, text=True)\n"
            "print(again.returncode, again.stderr.count('cached') >= done, len(list(Path('disk/run/stages').glob('**/manifest.json'))), flush=True)\n"
        )
        sizes = (40, 300, 420)
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        for size in sizes:
            folder = tmp_path / str(size)
            folder.mkdir()
            argv = ["unshare", "-rm", sys.executable, "-c", script, str(size), *words]
            try:
                done = subprocess.run(
                    argv, cwd=folder, env=environment, capture_output=True, text=True, timeout=250, check=False
                )
            except FileNotFoundError:
                pytest.skip("needs unshare, to mount a small disk")
            if done.returncode in (1, 77) and not done.stdout:
                pytest.skip("this user may not mount a small disk")
            first, again = done.stdout.splitlines()
            assert first in ("1 0 True", "2 0 True"), (size, done.stdout, done.stderr)
            assert again == "0 True 4", (size, done.stdout, done.stderr)
        tally(tries=len(sizes))
