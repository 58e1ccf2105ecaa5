"""A stage that is stopped at any step goes on from its newest checkpoint and ends to the bit as one that was not."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from inline_stages import inline_stages
from small_recipe import SMALL, unit

from salsa_peft.recipe.__main__ import main as salsa_run
from salsa_peft.training import checkpoints, train

SETS = SMALL | {
    "toy.demonstrations": 52, "toy.preferences": 60, "toy.prompts": 26, "toy.pretrain_steps": 20, "adapter.lora_dropout": 0.1,
    "sft.seeds": [0], "sft.batch_size": 8, "sft.micro_batch_size": 4, "sft.num_train_epochs": 3, "sft.subset": 1, "sft.save_steps": 3,
    "reward.batch_size": 8, "reward.micro_batch_size": 4, "reward.num_train_epochs": 2, "reward.save_steps": 3, "reward.warmup_ratio": 0.2,
    "reward.seeds": [0, 1], "reward.held_out": 0.1, "soup.members": [0], "landscape": None, "export": [], "evaluate.models": [],
    "policies": {name: {"algorithm": name, "reference": "seed-0"} for name in ("dpo", "kto", "rloo", "grpo")},
    "dpo.batch_size": 8, "dpo.micro_batch_size": 2, "dpo.num_train_epochs": 2, "dpo.save_steps": 3, "dpo.learning_rate": 1e-3,
    "kto.batch_size": 8, "kto.micro_batch_size": 4, "kto.save_steps": 3, "kto.learning_rate": 1e-3,
    "rloo.batch_size": 8, "rloo.micro_batch_size": 4, "rloo.num_train_epochs": 2, "rloo.save_steps": 3, "rloo.learning_rate": 1e-3,
    "grpo.batch_size": 8, "grpo.micro_batch_size": 4, "grpo.num_generations": 4, "grpo.save_steps": 3, "grpo.learning_rate": 1e-3,
}  # fmt: skip
SETS = {key: value for key, value in SETS.items() if not key.startswith("landscape.")}
TIMES = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "step_time")
"""Entries of log.jsonl that are times."""
UNITS = ("sft/seed-0", "reward", "dpo/dpo", "kto/kto", "rloo/rloo", "grpo/grpo")


class Stopped(BaseException):
    """Raised in place of a kill."""


def command(folder: Path, *words: str) -> int:
    """`salsa run` of the cut quickstart with adapters; its exit code."""
    sets = [word for key, value in SETS.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    return salsa_run(["quickstart", "--lora", *sets, "--output-dir", str(folder), *words])


def content(folder: Path) -> dict[str, Any]:
    """A unit's files by name: bytes, and for log.jsonl its rows without times."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file.name != "manifest.json"]
    found: dict[str, Any] = {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}
    for name in [name for name in found if name.endswith("log.jsonl")]:
        rows = map(json.loads, found[name].splitlines())
        found[name] = [{key: value for key, value in row.items() if key not in TIMES} for row in rows]
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, dict[str, Any]]]]:
    """A run's folder, and what its units left without an interruption. The units are its own again after each test."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    with inline_stages():
        assert command(folder, "--stages", "toy,sft,reward,dpo,kto,rloo,grpo") == 0
        yield folder, {name: content(unit(folder, name)) for name in UNITS}


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
    name = request.node.callspec.params["name"]
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
    (place,) = (folder / name).iterdir()
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
        ("dpo/dpo", 5, 3), ("dpo/dpo", 11, 9),
        ("kto/kto", 13, 12), ("rloo/rloo", 5, 3), ("rloo/rloo", 10, 9), ("grpo/grpo", 5, 3), ("grpo/grpo", 11, 9),
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
