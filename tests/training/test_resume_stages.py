"""A stage that is stopped at any step, or after any point of a landscape, goes on from its newest checkpoint and ends to the bit as one that was not."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from inline_stages import inline_stages
from small_recipe import SMALL, unit

from salsa_peft.evaluation import landscape
from salsa_peft.recipe import cache
from salsa_peft.recipe.__main__ import main as salsa_run
from salsa_peft.training import checkpoints, reward_model, train, trl_stages

SETS = SMALL | {
    "toy.demonstrations": 52, "toy.preferences": 60, "toy.prompts": 26, "toy.pretrain_steps": 20, "adapter.lora_dropout": 0.1,
    "sft.seeds": [0, 1], "sft.batch_size": 8, "sft.micro_batch_size": 4, "sft.num_train_epochs": 3, "sft.subset": 1, "sft.save_steps": 3,
    "reward.batch_size": 8, "reward.micro_batch_size": 4, "reward.num_train_epochs": 2, "reward.save_steps": 3, "reward.warmup_ratio": 0.2,
    "reward.seeds": [0, 1], "reward.held_out": 0.1, "landscape.plane": None, "landscape.alphas": [0.0, 0.5, 1.0], "landscape.scales": [0.6],
    "export": [], "evaluate.models": [],
    "policies": {name: {"algorithm": name, "reference": "seed-0"} for name in ("dpo", "kto", "rloo", "grpo")}
    | {"moving": {"algorithm": "dpo", "reference": {"soup": {"sync_every": 4, "mixup_alpha": 0.5}}}},
    "dpo.batch_size": 8, "dpo.micro_batch_size": 2, "dpo.num_train_epochs": 2, "dpo.save_steps": 3, "dpo.learning_rate": 1e-3,
    "kto.batch_size": 8, "kto.micro_batch_size": 4, "kto.save_steps": 3, "kto.max_steps": 13, "kto.learning_rate": 1e-3,
    "rloo.batch_size": 8, "rloo.micro_batch_size": 4, "rloo.num_train_epochs": 2, "rloo.save_steps": 3, "rloo.learning_rate": 1e-3,
    "grpo.batch_size": 8, "grpo.micro_batch_size": 4, "grpo.num_generations": 4, "grpo.save_steps": 3, "grpo.learning_rate": 1e-3,
}  # fmt: skip
TIMES = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "step_time", "seconds", "peak_mb")
"""Entries of log.jsonl and soup.json that are times, or memory."""
UNITS = ("sft/seed-0", "reward", "landscape", "dpo/dpo", "dpo/moving", "kto/kto", "rloo/rloo", "grpo/grpo")


class Stopped(BaseException):
    """Raised in place of a kill."""


MODES = {"lora": ["--lora"], "qlora": ["--lora", "qlora"], "full": []}


def command(folder: Path, *words: str) -> int:
    """`salsa run` of the cut quickstart in the mode that the folder is named after; its exit code."""
    given = SETS
    if folder.name == "full":
        given = {key: value for key, value in SETS.items() if not key.startswith("adapter.")}
        given["policies"] = {name: policy for name, policy in SETS["policies"].items() if name != "moving"}
    sets = [word for key, value in given.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    return salsa_run(["quickstart", *MODES[folder.name], *sets, "--output-dir", str(folder), *words])


def content(folder: Path) -> dict[str, Any]:
    """A unit's files by name: bytes, and for log.jsonl and soup.json the entries that are no times."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file.name != "manifest.json"]
    found: dict[str, Any] = {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}
    for name in [name for name in found if name.endswith(("log.jsonl", "soup.json"))]:
        rows = map(json.loads, found[name].splitlines() if name.endswith("log.jsonl") else [found[name]])
        found[name] = [{key: value for key, value in row.items() if key not in TIMES} for row in rows]
    return found


@pytest.fixture(
    scope="module", params=["lora", *(pytest.param(mode, marks=pytest.mark.slow) for mode in ("qlora", "full"))]
)
def whole(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, dict[str, Any]]]]:
    """A run's folder, and what its units left without an interruption. The units are its own again after each test."""
    folder = tmp_path_factory.mktemp("whole") / request.param
    with inline_stages():
        assert command(folder, "--stages", "toy,data,sft,reward,soup,dpo,kto,rloo,grpo,landscape") == 0
        yield folder, {name: content(unit(folder, name)) for name in UNITS if any((folder / "stages" / name).glob("*"))}


def stop_at(step: int, patch: pytest.MonkeyPatch, seed: int | None = None) -> None:
    """Stop training in the forward pass after `step` optimizer steps, of a trainer with that seed."""

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == step and seed in (None, self.args.seed):
            raise Stopped
        return super(train.Resumable, self).training_step(*args, **kwargs)

    patch.setattr(train.Resumable, "training_step", training_step, raising=False)


@pytest.fixture(autouse=True)
def kept(whole: tuple[Path, Any], request: pytest.FixtureRequest) -> Iterator[None]:
    """Give a test an unfinished unit, and put the finished one back afterwards, because other units' keys need it."""
    name = request.node.callspec.params.get("name", "sft/seed-0")
    if name not in whole[1]:
        pytest.skip("with full weights TRL's references do not move")
    place, aside = unit(whole[0], name), whole[0].parent / "aside"
    place.rename(aside)
    yield
    shutil.rmtree(place)
    aside.rename(place)


def run_stopped(folder: Path, name: str, step: int, seed: int | None = None) -> Path:
    """Run a unit and stop it. Returns its folder."""
    with pytest.MonkeyPatch.context() as patch:
        stop_at(step, patch, seed)
        with pytest.raises(Stopped):
            command(folder, "--stages", name)
    for draw in (random.seed, np.random.seed, torch.manual_seed):  # a new process would have other random numbers
        draw(step)
    (place,) = (folder / "stages" / name).iterdir()
    return place


def same(folder: Path, name: str, expected: dict[str, dict[str, Any]]) -> None:
    """Run a unit to its end and compare what it left."""
    assert command(folder, "--stages", name) == 0
    found = content(unit(folder, name))
    assert found.keys() == expected[name].keys()
    assert [file for file in found if found[file] != expected[name][file]] == []


@pytest.mark.parametrize(
    ("name", "step", "saved"),
    [
        ("sft/seed-0", 2, None), ("sft/seed-0", 5, 3), ("sft/seed-0", 8, 6), ("sft/seed-0", 13, 12), ("sft/seed-0", 20, 18),
        ("dpo/dpo", 5, 3), ("dpo/dpo", 11, 9), ("dpo/moving", 11, 9),
        ("kto/kto", 11, 9), ("rloo/rloo", 5, 3), ("rloo/rloo", 10, 9), ("grpo/grpo", 5, 3), ("grpo/grpo", 11, 9),
    ],
)  # fmt: skip
def test_to_the_bit(whole: Any, name: str, step: int, saved: int | None, capsys: Any) -> None:
    """In the middle of an epoch, at its end, in a later one; between two rows of the log; before the first checkpoint."""
    folder, expected = whole
    place = run_stopped(folder, name, step)
    assert [path.name for path in checkpoints.checkpoints(place)] == [f"checkpoint-{saved}"] * (saved is not None)
    capsys.readouterr()
    same(folder, name, expected)
    said = capsys.readouterr().err
    assert (f"{name}  resuming from checkpoint-{saved}" in said) == (saved is not None)
    assert not checkpoints.checkpoints(place)


@pytest.mark.parametrize("name", ["reward"])
def test_a_reward_model_that_was_trained_is_not_trained_again(whole: Any, name: str) -> None:
    """Of two members the first stays as it is; the second goes on; once both are trained, neither is."""
    folder, expected = whole
    place = run_stopped(folder, name, 5, seed=1)
    first = (place / "seed-0" / "metrics.json").stat().st_mtime_ns
    assert [path.name for path in checkpoints.checkpoints(place / "seed-1")] == ["checkpoint-3"]
    assert not checkpoints.checkpoints(place / "seed-0")
    (place / "seed-0" / "checkpoint-9").mkdir()  # as after a kill just before it is removed
    (place / "seed-0" / "checkpoint-9" / "trained.pt").write_bytes(b"")
    with pytest.MonkeyPatch.context() as patch:
        stop_at(3, patch, seed=1)  # where it goes on
        with pytest.raises(Stopped):
            command(folder, "--stages", name)
    same(folder, name, expected)
    assert (place / "seed-0" / "metrics.json").stat().st_mtime_ns == first
    (place / "manifest.json").unlink()
    (place / "begun.json").write_text(json.dumps({"key": None}))
    with pytest.MonkeyPatch.context() as patch:  # the same unit, but for its manifest
        patch.setattr(cache, "seconds_so_far", lambda *_: 0.0)
        stop_at(0, patch)
        same(folder, name, expected)


@pytest.mark.parametrize("name", ["reward", "dpo/dpo"])
def test_a_kill_in_the_held_out_evaluation_costs_no_step(whole: Any, name: str) -> None:
    """The last step is saved before it: nothing is trained again."""
    folder, expected = whole
    stage, measure = (reward_model, "held_out_scores") if name == "reward" else (trl_stages, "margins")

    def stop(*_: Any) -> None:
        raise Stopped

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, measure, stop)
        with pytest.raises(Stopped):
            command(folder, "--stages", name)
    (place,) = (folder / "stages" / name).iterdir()
    (saved,) = checkpoints.checkpoints(place / "seed-0" if name == "reward" else place)
    state = json.loads((saved / "trainer_state.json").read_text())
    assert state["global_step"] == state["max_steps"]
    with pytest.MonkeyPatch.context() as patch:  # of the reward, the second member has not been trained
        stop_at(state["max_steps"] - 1, patch, seed=0)
        same(folder, name, expected)


@pytest.mark.parametrize("name", ["landscape"])
def test_a_landscape_goes_on_with_its_next_point(whole: Any, name: str) -> None:
    """Each of its four points is measured once."""
    folder, expected = whole
    measured: list[int] = []
    mean_scores = landscape.mean_scores

    def stopping(*args: Any) -> Any:
        if len(measured) == 2:
            measured.append(0)
            raise Stopped
        measured.append(1)
        return mean_scores(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(landscape, "mean_scores", stopping)
        with pytest.raises(Stopped):
            command(folder, "--stages", name)
        same(folder, name, expected)
    assert measured == [1, 1, 0, 1, 1]


class TestSigterm:
    @pytest.mark.parametrize(
        ("name", "step"), [("sft/seed-0", 5), ("sft/seed-0", 21), ("kto/kto", 13), ("grpo/grpo", 5)]
    )
    def test_it_saves_a_checkpoint_and_leaves(self, whole: Any, name: str, step: int, capsys: Any) -> None:
        """Code 143, after the step that was running; of the last step too, in the middle of an epoch or at its end, after which there is none."""
        folder, expected = whole

        def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
            if self.state.global_step == step - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return super(train.Resumable, self).training_step(*args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train.Resumable, "training_step", training_step, raising=False)
            with pytest.raises(SystemExit) as left:
                command(folder, "--stages", name)
        assert left.value.code == 143
        assert f"{name}  stopped: the same command goes on from checkpoint-{step}" in capsys.readouterr().err
        (place,) = (folder / "stages" / name).iterdir()
        assert [path.name for path in checkpoints.checkpoints(place)] == [f"checkpoint-{step}"]
        with pytest.MonkeyPatch.context() as patch:
            stop_at(-1 if step == 5 else step, patch)
            before = json.loads((place / f"checkpoint-{step}" / "progress-0.json").read_text())["seconds"]
            same(folder, name, expected)
        last = json.loads((place / "log.jsonl").read_text().splitlines()[-1])
        assert last["train_runtime"] >= round(before, 4) > 0, "time before the stop counts"
        assert json.loads((place / "manifest.json").read_text())["seconds"] >= round(before, 3)


class TestCheckpoint:
    def test_one_that_is_not_whole_is_skipped(self, whole: Any, capsys: Any) -> None:
        """Training starts from the beginning if there is no other, and ends as ever."""
        folder, expected = whole
        place = run_stopped(folder, "sft/seed-0", 5)
        (place / "checkpoint-3" / train.WEIGHTS).write_bytes(b"half")
        same(folder, "sft/seed-0", expected)
        said = capsys.readouterr().err
        assert "checkpoint-3: skipped, because it is incomplete (trained.pt has changed)" in said
        assert "resuming from" not in said

    def test_another_setting_is_refused_in_one_line(self, whole: Any, capsys: Any) -> None:
        """With what to do; the checkpoint stays."""
        folder, _ = whole
        place = run_stopped(folder, "sft/seed-0", 5)
        file = place / "checkpoint-3" / checkpoints.STATE
        state = json.loads(file.read_text())
        state["setting"]["num_processes"] = 2
        file.write_text(json.dumps(state))
        checkpoints.commit(place / "checkpoint-3", place / "checkpoint-2")
        assert command(folder, "--stages", "sft/seed-0") != 0
        assert (
            "checkpoint-2: num_processes was 2 and is 1 now, so this run cannot be resumed. Run it with the settings of"
            " before, or train it from the beginning with --force sft/seed-0\n"
        ) in capsys.readouterr().err
        assert (place / "checkpoint-2").is_dir()

    def test_another_micro_batch_goes_on(self, whole: Any, capsys: Any) -> None:
        """After an out-of-memory error the rows of a step are the same, in smaller micro-batches: equal up to rounding."""
        folder, expected = whole
        run_stopped(folder, "sft/seed-0", 5)
        before = train.Resumable.train_from_newest

        def smaller(self: Any, *args: Any) -> Any:
            self.args.per_device_train_batch_size, self.args.gradient_accumulation_steps = 2, 4
            self._train_batch_size = 2
            self.accelerator.gradient_accumulation_steps = 4
            return before(self, *args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train.Resumable, "train_from_newest", smaller)
            assert command(folder, "--stages", "sft/seed-0") == 0
        assert "resuming from checkpoint-3" in capsys.readouterr().err
        found, whole_run = (
            json.loads(where["metrics.json"]) for where in (content(unit(folder, "sft/seed-0")), expected["sft/seed-0"])
        )
        assert found["steps"] == whole_run["steps"] == 21
        assert found["train_loss"] == pytest.approx(whole_run["train_loss"], rel=0.02)  # dropout draws other numbers

    def test_a_full_disk_is_one_line_and_costs_nothing_that_is_saved(self, whole: Any, capsys: Any) -> None:
        """The second checkpoint cannot be written: the first stays, no piece of the second does, and the same command goes on."""
        folder, expected = whole
        save, calls = torch.save, []

        def full(*args: Any, **kwargs: Any) -> None:
            calls.append(0)
            if len(calls) == 6:  # the second file of the second checkpoint
                raise OSError(errno.ENOSPC, "No space left on device")
            save(*args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "save", full)
            assert command(folder, "--stages", "sft/seed-0") != 0
        (place,) = (folder / "stages" / "sft" / "seed-0").iterdir()
        assert "a file could not be written because the disk is full" in capsys.readouterr().err
        assert [path.name for path in checkpoints.checkpoints(place)] == ["checkpoint-3"]
        assert not (place / checkpoints.PARTIAL).exists()
        same(folder, "sft/seed-0", expected)
        assert "resuming from checkpoint-3" in capsys.readouterr().err

    def test_a_pickle_of_more_than_tensors_is_not_loaded(self, whole: Any, capsys: Any) -> None:
        """Though the manifest lists it."""
        folder, _ = whole
        place = run_stopped(folder, "sft/seed-0", 5)
        torch.save({"trained": Path("x")}, place / "checkpoint-3" / train.WEIGHTS)
        checkpoints.commit(place / "checkpoint-3", place / "checkpoint-2")
        assert command(folder, "--stages", "sft/seed-0") != 0
        assert "holds more than tensors and numbers, which training does not write" in capsys.readouterr().err
