"""What the stages hold at Llama-2-7B's shapes, on fake tensors, against what `--dry-run` plans for a GPU.

MemTracker counts every tensor of sft, reward and ppo: two optimizer steps of two micro-batches each, or two rollouts with
their steps, with gradient checkpointing, 2,048 tokens a sequence and a bf16 base. The plan's CUDA context and its factor
for fragmentation are left out of the comparison.

Not rehearsed: generation at full length (each token takes a forward); the kernels of bitsandbytes, Triton and
torchao's compiled step, whose own temporary tensors are counted neither here nor, but for one dequantised weight and
12 bytes per number of the largest weight, in the plan; CUDA's autograd and streams; flash attention (here SDPA);
reading and writing files. `python tests/gpu_rehearsal/test_peaks.py` prints the table of docs/measurements.md.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import pytest

MODES = ("lora", "qlora", "master", "stochastic")
SMALL = [("lora", "sft"), ("stochastic", "reward")]
"""Two layers of the real widths, in a few seconds each."""


@pytest.mark.parametrize(("mode", "stage"), SMALL)
def test_two_layers(mode: str, stage: str, tmp_path: Path) -> None:
    """Each phase's peak within 10% of the plan."""
    check(tmp_path, mode, stage, layers=2)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
@pytest.mark.parametrize("mode", MODES)
def test_seven_billion(mode: str, stage: str, tmp_path: Path) -> None:
    """All 32 layers."""
    check(tmp_path, mode, stage, layers=32)


def check(folder: Path, mode: str, stage: str, layers: int) -> None:
    """Each phase's peak, and its weights, gradients and optimizer states, are within 10% of the plan."""
    from rehearsal import rehearse

    phases = rehearse(folder, mode, stage, layers, 2048)
    assert [one.name for one in phases] == [*(["score"] if stage == "ppo" else []), "train", "step"]
    ratios = {one.name: round(one.ratio, 3) for one in phases}
    assert all(0.9 < ratio < 1.1 for ratio in ratios.values()), ratios
    step = phases[-1]
    kept = {
        kind: getattr(step.planned, kind) / max(step.measured[kind], 1)
        for kind in ("weights", "gradients", "optimizer")
    }
    assert all(0.95 < ratio < 1.05 for ratio in kept.values()), kept


def table(modes: list[str], stages: list[str], layers: int) -> None:
    """Print a row for each phase: GiB by kind as measured, the sum as planned, and their ratio."""
    from rehearsal import rehearse, tensors

    print("| mode | stage | phase | weights | gradients | optimizer | activations | measured | planned | ratio |")
    print("|---|---|---|---:|---:|---:|---:|---:|---:|---:|")
    for mode in modes:
        for stage in stages:
            start = time.perf_counter(), time.process_time()
            with tempfile.TemporaryDirectory() as folder:
                phases = rehearse(Path(folder), mode, stage, layers, 2048)
            for one in phases:
                kinds = [one.measured[kind] for kind in ("weights", "gradients", "optimizer", "activations", "total")]
                numbers = " | ".join(f"{number / 2**30:.2f}" for number in (*kinds, tensors(one.planned)))
                print(f"| {mode} | {stage} | {one.name} | {numbers} | {one.ratio:.3f} |", flush=True)
            took = time.perf_counter() - start[0], time.process_time() - start[1]
            print(f"{mode} {stage}: {took[0]:.0f} s, {took[1]:.0f} s of CPU time", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
    words = sys.argv[1:]
    table(words[0].split(",") if words else list(MODES), words[1].split(",") if words[1:] else ["sft", "reward", "ppo"],
          int(words[2]) if words[2:] else 32)  # fmt: skip
