"""The GPUs that are here: what nvidia-smi says, what a recipe without one is told, the plan beside what was measured."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
from paper_models import paper

from salsa_peft.config.job import Unit
from salsa_peft.config.load import load_recipe
from salsa_peft.models.architectures import memory
from salsa_peft.models.architectures.memory import GIB, Estimate, estimate
from salsa_peft.recipe import cache as runs
from salsa_peft.recipe import run as recipe
from salsa_peft.recipe.__main__ import main as salsa_run
from salsa_peft.recipe.estimates import hardware
from salsa_peft.utils.errors import SalsaError


def test_a_large_model_without_a_gpu_stops_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Code 2, one line that says what it needs, nothing written; a small one goes on, a plan too."""
    monkeypatch.setattr(hardware, "gpus", list)
    folder = tmp_path / "run"
    assert salsa_run(["llama2_full", "--lora", "--set", "evaluate.judge=null", "--output-dir", str(folder)]) == 2
    line = capsys.readouterr().err.strip()
    assert (
        "\n" not in line
        and "a model of 6.7 B parameters needs a CUDA GPU, and nvidia-smi lists none" in line
        and "at least about 23 GiB (for ppo)" in line
    )
    assert not folder.exists()
    assert hardware.check_gpu(load_recipe("smollm2", lora="lora", overrides=[]).recipe, []) == []
    there = [hardware.Gpu("A", 16 * GIB)]
    job = paper("llama2_full", "lora")[0]
    assert hardware.check_gpu(job, [], {"soup", "report"}) == []  # what needs none
    assert all(line.startswith("sft ") for line in hardware.check_gpu(job, there, {"sft", "soup"}))
    warned = hardware.check_gpu(job, there)
    assert any(
        line.startswith("ppo may not fit the GPU: it needs about 23.") and "A has 16 GiB" in line for line in warned
    )


@pytest.mark.parametrize(
    ("key", "package", "install"),
    [("ppo.rollout_backend=vllm", "vllm", "pip install 'salsa-peft[vllm]'"), ("report_to=[wandb]", "wandb", "pip install wandb"),
     ("ppo.optim=paged_adamw_8bit", "bitsandbytes", "pip install 'salsa-peft[qlora]'")],
)  # fmt: skip
def test_a_missing_package_is_found_before_the_first_stage(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    key: str,
    package: str,
    install: str,
) -> None:
    """Code 2, one line, nothing written; by the plan too, but not by one for another machine or for other stages."""
    real, here = hardware.importlib.util.find_spec, [hardware.Gpu("X", 80 * GIB)]
    monkeypatch.setattr(hardware, "gpus", lambda: here)
    monkeypatch.setattr(hardware.importlib.util, "find_spec", lambda name: None if name == package else real(name))
    words = ["quickstart", "--lora", "--set", key, "--output-dir", str(tmp_path / "run")]
    for more in ([], ["--dry-run"]):
        assert salsa_run([*words, *more]) == 2
        line = capsys.readouterr().err
        assert (
            line.count("\n") == 1 and f"needs the package {package}, which is not installed; run {install}, or" in line
        )
    for more in (["--gpu", "24"], ["--stages", "toy,data,sft"]):
        assert salsa_run([*words, "--dry-run", *more]) == 0
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("key", ["ppo.rollout_backend=vllm", "ppo.rollout_compile=true"])
def test_sampling_that_needs_a_gpu_is_refused_without_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str
) -> None:
    """Before the first stage; a plan does not need the GPU."""
    monkeypatch.setattr(hardware, "gpus", list)
    monkeypatch.setattr(hardware.importlib.util, "find_spec", lambda name: name)
    words = ["quickstart", "--lora", "--set", key, "--output-dir", str(tmp_path / "run")]
    assert salsa_run(words) == 2
    name, value = key.split("=")
    assert f"{name}: {value} needs a CUDA GPU, and nvidia-smi lists none" in capsys.readouterr().err
    assert salsa_run([*words, "--dry-run"]) == 0 and not (tmp_path / "run").exists()


def test_nvidia_smi_is_read_and_may_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names and MiB; no card where it is missing, slow or broken."""
    monkeypatch.setattr(hardware.shutil, "which", lambda name: f"/usr/bin/{name}")

    def answers(text: str, code: int = 0) -> None:
        monkeypatch.setattr(
            hardware.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], code, stdout=text)
        )

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    answers("GPU-4f1a, NVIDIA H200, 143771\nGPU-77b2, NVIDIA A10, Inc., 23028\n")
    both = [
        hardware.Gpu("NVIDIA H200", 143771 * 2**20, hardware.GPUS["H200"][1].speed),
        hardware.Gpu("NVIDIA A10, Inc.", 23028 * 2**20),
    ]
    assert hardware.gpus() == both
    for words, seen in (
        ("1", both[1:]),
        ("1,0", both[::-1]),
        ("GPU-77", both[1:]),
        ("", []),
        ("-1", []),
        ("7", []),
        ("MIG-1", both[:1]),
    ):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", words)
        assert hardware.gpus() == seen, words
    answers("NVIDIA-SMI has failed", 9)
    assert hardware.gpus() == []

    def slow(*_: Any, **__: Any) -> None:
        raise subprocess.TimeoutExpired("nvidia-smi", 5)

    monkeypatch.setattr(hardware.subprocess, "run", slow)
    assert hardware.gpus() == []


def test_the_measured_peak_stands_beside_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the card that is there, without CUDA's own; none for a stage without a base."""
    monkeypatch.setattr(hardware, "gpus", lambda: [hardware.Gpu("X", 80 * GIB)])
    job, size = paper("llama2_full", "lora")
    found: Estimate = estimate(job, "ppo", size, 80 * GIB)
    assert hardware.planned_mb(job, "ppo") == pytest.approx((found.total - memory.CONTEXT) / 1e6, abs=0.1)
    assert hardware.planned_mb(job, "soup") is None


def test_what_is_there_already_needs_no_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The report of a 7B run is made anywhere, and a finished stage is no reason to stop."""
    monkeypatch.setattr(hardware, "gpus", list)
    job, _ = paper("llama2_full", "lora")
    steps = {
        stage: runs.PlannedUnit(unit=Unit(stage=stage, name=stage, run=""), key="", folder=tmp_path, why=why)
        for stage, why in (("sft", None), ("ppo", "new"), ("report", "new"))
    }
    assert recipe.check_machine(job, steps, {"sft", "report"}) == []
    with pytest.raises(SalsaError, match="needs a CUDA GPU, and nvidia-smi lists none"):
        recipe.check_machine(job, steps, {"ppo", "report"})
