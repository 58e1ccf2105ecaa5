"""What the training stages make in two processes, by `accelerate launch`: what one process makes, but for rounding. Minutes long."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from test_launching import HERE, UNIT, environment
from test_pipeline import SMALL, read, unit

SHARED: dict[str, Any] = SMALL | {
    "toy.pretrain_steps": 1, "toy.pretrain_examples": 64, "landscape": None, "precision": "master", "sft.seeds": [0, 1], "export": [],
    "reward.held_out": 0.125, "ppo.save_steps": 1, "ppo.eval_prompts": "in", "ppo.eval_steps": 2, "ppo.eval_limit": 6,
    "policies": {"both": {"reference": ["seed-0", "base"]}}, "evaluate.models": [], "sft.micro_batch_size": 8, "sft.num_train_epochs": 12,
}  # fmt: skip
"""Rows that fill their batches: 32 demonstrations, 112 pairs and 16 held out, 32 prompts. More than ten steps of SFT: one log."""


def words_of(folder: Path, mode: list[str], **more: Any) -> list[str]:
    """The quickstart up to one policy."""
    given = SHARED | {key.replace("__", "."): value for key, value in more.items()}
    sets = [word for key, value in given.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    stages = ["--stages", f"toy,{UNIT},reward,ppo/both"]
    return [
        sys.executable,
        str(HERE / "launched_recipe.py"),
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
            assert all((weights[key] - others[key]).abs().max() <= tolerance for key in weights), (name, file.name)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_adapters_are_what_one_process_makes(tmp_path: Path) -> None:
    """SFT with accumulation, reward with held-out margins, PPO with an eval set. Then a PPO of the same run that is stopped by SIGTERM: it
    saves, and goes on."""
    one, two = made(tmp_path / "one", ["--lora"]), made(tmp_path / "two", ["--lora"], num_processes=2)
    check_equal(one, two)
    words = words_of(two, ["--lora"], num_processes=2, ppo__num_train_epochs=40)
    process = subprocess.Popen(words, env=environment(), stderr=subprocess.PIPE, text=True)
    before = set(two.glob("ppo/both/*"))
    while process.poll() is None and not [
        f for p in set(two.glob("ppo/both/*")) - before for f in p.glob("metrics.jsonl")
    ]:
        time.sleep(0.05)
    process.terminate()
    assert process.wait(60) == 143
    err = subprocess.run(words, env=environment(), capture_output=True, text=True, check=False).stderr
    assert err.count("ppo/both  goes on from checkpoint-") == 1 and "ppo/both … done" in err, err[-2000:]
    (folder,) = set(two.glob("ppo/both/*")) - before
    assert [json.loads(line)["update"] for line in (folder / "metrics.jsonl").read_text().splitlines()] == list(
        range(1, 81)
    )


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_full_weights_are_what_one_process_makes(tmp_path: Path) -> None:
    """Copies in each process; and in pieces by FSDP2, saved whole, in the recipe's dtype."""
    from safetensors.torch import load_file

    one, two = made(tmp_path / "one", []), made(tmp_path / "two", [], num_processes=2)
    check_equal(one, two)
    check_equal(one, made(tmp_path / "cut", [], num_processes=2, accelerate="fsdp2"))
    half = made(tmp_path / "half", [], num_processes=2, accelerate="fsdp2", model__dtype="bfloat16")
    for name in (UNIT, "ppo/both"):
        weights = load_file(unit(half, name) / "model.safetensors")
        assert {str(tensor.dtype) for tensor in weights.values()} == {"torch.bfloat16"}
        assert read(unit(half, name) / "config.json")["dtype"] == "bfloat16"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_adapters_in_pieces(tmp_path: Path) -> None:
    """FSDP2, which holds the frozen base in pieces too; and an ensemble of reward models in two processes."""
    one = made(tmp_path / "one", ["--lora"])
    check_equal(one, made(tmp_path / "two", ["--lora"], num_processes=2, accelerate="fsdp2"))
    seeds = {"reward__seeds": [0, 1]}
    check_equal(made(one, ["--lora"], **seeds), made(tmp_path / "several", ["--lora"], num_processes=2, **seeds))
