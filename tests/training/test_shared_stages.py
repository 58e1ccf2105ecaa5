"""What the training stages make in two processes, by `accelerate launch`: what one process makes, but for rounding. Minutes long."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from child_processes import UNIT, environment
from paths import SUPPORT
from small_recipe import SMALL, read, unit

SHARED: dict[str, Any] = SMALL | {
    "toy.pretrain_steps": 1, "toy.pretrain_examples": 64, "landscape": None, "precision": "master", "sft.seeds": [0, 1], "export": [],
    "reward.held_out": 0.125, "ppo.save_steps": 1, "ppo.eval_prompts": "in", "ppo.eval_steps": 2, "ppo.eval_limit": 6,
    "policies": {"both": {"reference": ["seed-0", "base"]}}, "evaluate.models": [], "sft.micro_batch_size": 8, "sft.num_train_epochs": 12,
}  # fmt: skip
"""Rows that fill their batches: 32 demonstrations, 112 pairs and 16 held out, 32 prompts. More than ten steps of SFT: one log."""


def words_of(folder: Path, mode: list[str], **more: Any) -> list[str]:
    """The quickstart up to one policy."""
    given = SHARED | {key.replace("__", "."): value for key, value in more.items()}
    if mode:  # of full weights alone
        del given["precision"]
    sets = [word for key, value in given.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    stages = ["--stages", f"toy,data,{UNIT},reward,reward_quality,ppo/both"]
    return [
        sys.executable,
        str(SUPPORT / "launched_recipe.py"),
        "quickstart",
        *mode,
        *sets,
        "--output-dir",
        str(folder),
        *stages,
    ]


def made(folder: Path, mode: list[str], **more: Any) -> Path:
    """Its run folder."""
    done = subprocess.run(
        words_of(folder, mode, **more), env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def close(one: Any, other: Any, tolerance: float) -> None:
    """Figures of any nesting."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            close(one[key], other[key], tolerance)
    elif isinstance(one, list):
        for a, b in zip(one, other, strict=True):
            close(a, b, tolerance)
    else:
        assert other == (pytest.approx(one, rel=tolerance, abs=tolerance) if isinstance(one, float) else one)


def check_equal(one: Path, two: Path, tolerance: float = 1e-4) -> None:
    """Files, figures and weights of all units."""
    from safetensors.torch import load_file

    for name in ("toy", UNIT, "reward", "ppo/both"):
        a, b = unit(one, name), unit(two, name)
        assert a.name == b.name, "the number of processes is in no key"
        assert {p.relative_to(a) for p in a.rglob("*")} == {p.relative_to(b) for p in b.rglob("*")}
        for file in (*a.glob("metrics.json"), *a.glob("policy.json")):
            close(read(file), read(b / file.name), tolerance)
        for file in (*a.glob("metrics.jsonl"), *a.glob("*completions.jsonl")):
            rows = [[json.loads(line) for line in (f / file.name).read_text().splitlines()] for f in (a, b)]
            close(*rows, tolerance)
        for file in a.glob("*.safetensors"):
            weights, others = load_file(file), load_file(b / file.name)
            assert weights.keys() == others.keys()
            apart = sum((weights[key] - others[key]).square().sum() for key in weights) ** 0.5
            # not each by itself: where a gradient is next to nothing Adam's first steps go by the sign of its rounding
            assert apart <= tolerance * sum(tensor.square().sum() for tensor in weights.values()) ** 0.5, file


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What one process makes, by mode; made when first asked for."""
    out = tmp_path_factory.mktemp("one")

    def get(mode: str) -> Path:
        return out / mode if (out / mode).exists() else made(out / mode, MODES[mode])

    return get


MODES: dict[str, list[str]] = {"lora": ["--lora"], "full": []}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("how", ["ddp", "fsdp2", "zero3"])
def test_two_processes_make_what_one_makes(one: Any, tmp_path: Path, how: str, mode: str) -> None:
    """SFT with accumulation, reward with held-out margins, PPO with an eval set; copies in both, or pieces (of the frozen base too)."""
    if how == "zero3":
        pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    check_equal(one(mode), made(tmp_path / "two", MODES[mode], num_processes=2, accelerate=how))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_policy_that_was_stopped_goes_on(tmp_path: Path) -> None:
    """SIGTERM to the command: both processes save, and the same command ends what it began."""
    words = words_of(tmp_path / "two", ["--lora"], num_processes=2, ppo__num_train_epochs=40)
    process = subprocess.Popen(words, env=environment(), stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not list((tmp_path / "two").glob("stages/ppo/both/*/metrics.jsonl")):
        time.sleep(0.05)
    process.terminate()
    assert process.wait(60) == 143
    err = subprocess.run(words, env=environment(), capture_output=True, text=True, check=False).stderr
    assert err.count("ppo/both  resuming from checkpoint-") == 1 and "ppo/both … done" in err, err[-2000:]
    rows = (unit(tmp_path / "two", "ppo/both") / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["update"] for row in rows] == list(range(1, 81))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_pieces_are_saved_in_the_recipes_dtype(tmp_path: Path) -> None:
    """Trained in float32; the score head stays float32."""
    from safetensors.torch import load_file

    half = made(tmp_path / "half", [], num_processes=2, accelerate="fsdp2", model__dtype="bfloat16")
    for name in (UNIT, "reward", "ppo/both"):
        weights = load_file(unit(half, name) / "model.safetensors")
        if name == "reward":
            assert str(weights.pop("score.weight").dtype) == "torch.float32"
        assert {str(tensor.dtype) for tensor in weights.values()} == {"torch.bfloat16"}
        assert read(unit(half, name) / "config.json")["dtype"] == "bfloat16"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_several_reward_models(tmp_path: Path) -> None:
    """The first process averages them, both measure the average."""
    several = made(tmp_path / "one", ["--lora"], reward__seeds=[0, 1])
    check_equal(several, made(tmp_path / "two", ["--lora"], num_processes=2, reward__seeds=[0, 1]))


KILLED = {"sft.batch_size": 8, "sft.micro_batch_size": 2, "sft.num_train_epochs": 12, "sft.save_steps": 3}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
@pytest.mark.parametrize("mode", MODES)
def test_a_stage_that_was_killed_goes_on(tmp_path: Path, how: str, mode: str) -> None:
    """kill -9 of command and processes in a later epoch: weights to the bit, metrics and log too, times aside."""
    more = {key.replace(".", "__"): value for key, value in KILLED.items()}
    words = words_of(tmp_path / "run", MODES[mode], num_processes=2, accelerate=how, **more)
    words[-1] = f"toy,data,{UNIT}"

    def run() -> str:
        return subprocess.run(words, env=environment(), capture_output=True, text=True, check=True).stderr

    def left(folder: Path) -> Any:
        rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        log = [{key: value for key, value in row.items() if not key.startswith("train_")} for row in rows]
        return (
            log,
            read(folder / "metrics.json"),
            {file.name: file.read_bytes() for file in folder.glob("*.safetensors")},
        )

    run()
    place = unit(tmp_path / "run", UNIT)
    whole = left(place)
    place.rename(tmp_path / "aside")
    process = subprocess.Popen(words, env=environment(), stderr=subprocess.DEVNULL, start_new_session=True)
    while process.poll() is None and not list(place.glob("checkpoint-2?")):  # of 48 steps, 4 in an epoch
        time.sleep(0.005)
    process.kill()  # its processes end with it
    process.wait(60)
    time.sleep(2)
    assert f"{UNIT}  resuming from checkpoint-" in run()
    assert left(place) == whole
