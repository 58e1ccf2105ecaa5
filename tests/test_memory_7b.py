"""The benchmark that waits for a GPU, on a tiny model on a CPU: it runs, and a mode that does not fit does not end the others."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).resolve().parent / "benchmarks" / "memory_7b.py"


def load() -> Any:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("memory_7b", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow  # 20 s
def test_it_measures_every_phase() -> None:
    """One JSON line."""
    words = [
        sys.executable,
        str(SCRIPT),
        "--config",
        "tiny",
        "--device",
        "cpu",
        "--updates",
        "2",
        "--modes",
        "lora,full",
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
    if importlib.util.find_spec("torchao") is None:
        words += ["--precision", "master"]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert [row["mode"] for row in found["modes"]] == ["lora", "full"]
    for row in found["modes"]:
        assert set(row["peaks_gib"]) >= {"generate", "score", "train"} and all(
            v > 0 for v in row["tokens_per_s"].values()
        ), row
        assert row["peak_gib"] > 0.1 and row["met"] == {}


def test_a_mode_that_does_not_fit_says_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The phase in which it met its cap."""
    from salsa_peft import policies

    script = load()
    args = script.parse(["--config", "tiny", "--device", "cpu", "--updates", "1"])
    script.make(args, tmp_path)

    def full(job: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(policies, "run", full)
    for owner, name in (
        ("rollout_batch.RolloutMaker", "_sample"),
        ("rollout_batch.RolloutMaker", "_score"),
        ("ppo.SalsaPPOTrainer", "end_update"),
    ):
        module, kind = owner.split(".")
        owner_class = getattr(__import__(f"salsa_peft.{module}", fromlist=[kind]), kind)
        monkeypatch.setattr(
            owner_class, name, getattr(owner_class, name)
        )  # which the script replaces: put back afterwards
    row = script.one(args, "lora", tmp_path)
    assert row["out_of_memory"] == "loading"
    assert script.met(row) == {"fits": False}
    fitting = {"peak_gib": 20.0, "cap_gib": 24.0, "planned_gib": 21.0, "share_of_bound": 0.6}
    assert script.met(fitting) == {"fits": True, "half_of_the_bound": True, "plan_within_10_percent": True}
    assert script.met(fitting | {"planned_gib": 23.0, "share_of_bound": 0.4, "cap_gib": 19.0}) == {
        "fits": False, "half_of_the_bound": False, "plan_within_10_percent": False,
    }  # fmt: skip
