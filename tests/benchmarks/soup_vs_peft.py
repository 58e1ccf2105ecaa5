"""Soups of adapters: against PEFT's svd on one layer, and file to file on all 224 linears of Llama-2-7B's shapes.

    python tests/benchmarks/soup_vs_peft.py        one JSON line; about two minutes, one of them PEFT's; 700 MB of disk for a while

CPU seconds (time.process_time, and wait4's for whole processes), since wall time on a shared machine says little; BLAS on one thread for ours,
as it always is, and for PEFT as torch is set up. Errors are relative Frobenius norms, measured on dense deltas in float64.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

LAYERS, HIDDEN, FEED_FORWARD, RANK = 32, 4096, 11008, 16
LINEARS = {
    **{f"self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in "qkvo"},
    **{f"mlp.{name}_proj": (HIDDEN, FEED_FORWARD) for name in ("gate", "up")},
    "mlp.down_proj": (FEED_FORWARD, HIDDEN),
}
"""Of one layer: (in, out)."""
CALL = """
import sys, time
sys.path.insert(0, {root!r})
from salsa_peft.soup.lora.stacked_adapter import StackedAdapter
before = time.process_time()
StackedAdapter.load({members!r}).save({out!r}, [0.5, 0.5], rank={rank!r})
print(time.process_time() - before)
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
ROOT = str(Path(__file__).resolve().parents[2])


def make_member(folder: Path, seed: int) -> Path:
    """An adapter of all linears as PEFT would save it, float32, random."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(LAYERS):
        for name, (inner, out) in LINEARS.items():
            module = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{module}.lora_A.weight"] = torch.randn(RANK, inner, generator=generator)
            tensors[f"{module}.lora_B.weight"] = torch.randn(out, RANK, generator=generator)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "meta-llama/Llama-2-7b-hf"}
    targets = sorted(name.rpartition(".")[2] for name in LINEARS)
    config |= {"r": RANK, "lora_alpha": 2 * RANK, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def whole_process(code: str) -> dict[str, float]:
    """CPU seconds and peak RSS of a fresh interpreter, imports included, and what its call took by its own clock.

    The peak is the kernel's VmHWM at the end: wait4's ru_maxrss begins with that of the process that forked.
    """
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert child.stdout is not None
    said = child.stdout.read()
    _, status, used = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    assert child.returncode == 0, f"the measured process ended with {child.returncode}"
    call, peak = said.split()
    return {"process_cpu_s": used.ru_utime + used.ru_stime, "call_cpu_s": float(call), "peak_rss_mb": int(peak) / 1024}


def file_to_file(repeats: int = 3) -> dict[str, Any]:
    """Two members of 224 linears → an exact soup, and one of rank 16; the run of least CPU time of each."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        members = [str(make_member(folder / str(seed), seed)) for seed in range(2)]
        found["member_mb"] = round((Path(members[0]) / "adapter_model.safetensors").stat().st_size / 1e6)
        for label, rank in (("exact", None), ("recompressed", RANK)):
            code = CALL.format(root=ROOT, members=members, out=str(folder / label), rank=rank)
            runs = [whole_process(code) for _ in range(repeats)]
            found[label] = {
                key: round(value, 3) for key, value in min(runs, key=lambda run: run["process_cpu_s"]).items()
            }
    return found


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    result = function()
    return time.process_time() - start, result


def one_layer(size: int = HIDDEN, repeats: int = 5) -> dict[str, Any]:
    """Two adapters of rank 16 on one size × size layer → rank 16: ours and PEFT's svd, and the error of each."""
    import torch
    from peft import LoraConfig, get_peft_model

    from salsa_peft.soup.arrays import one_thread
    from salsa_peft.soup.lora.svd import moments, recompress

    torch.manual_seed(0)
    model = get_peft_model(
        torch.nn.Sequential(torch.nn.Linear(size, size, bias=False)), LoraConfig(r=RANK, target_modules=["0"]), "a"
    )
    model.add_adapter("b", LoraConfig(r=RANK, target_modules=["0"]))
    layer: Any = model.base_model.model[0]
    with torch.no_grad():
        for name in "ab":
            layer.lora_A[name].weight.normal_()
            layer.lora_B[name].weight.normal_()
    factors = [(layer.lora_A[name].weight.detach(), layer.lora_B[name].weight.detach()) for name in "ab"]
    A, B = torch.cat([a for a, _ in factors]).numpy(), torch.cat([b for _, b in factors], dim=1).numpy()
    coefficients = torch.tensor([0.25, 0.75], dtype=torch.float64).repeat_interleave(RANK).numpy() * layer.scaling["a"]

    def ours() -> Any:
        with one_thread():
            found = recompress(moments(A, B), coefficients, RANK)
        return found.A.astype("float32"), found.B.astype("float32")

    times = [timed(ours) for _ in range(repeats + 1)][1:]  # the first one loads libraries
    options = {"combination_type": "svd", "svd_rank": RANK}
    peft_time, _ = timed(lambda: model.add_weighted_adapter(["a", "b"], [0.25, 0.75], "c", **options))
    dense = torch.from_numpy(B).double() * torch.from_numpy(coefficients) @ torch.from_numpy(A).double()

    def error(a: Any, b: Any) -> float:
        product = torch.as_tensor(b).double() @ torch.as_tensor(a).double()
        return float((product - dense).norm() / dense.norm())

    median = sorted(seconds for seconds, _ in times)[repeats // 2]
    scaled_B = layer.lora_B["c"].weight.detach() * layer.scaling["c"]
    errors = {"error_ours": error(*times[0][1]), "error_peft": error(layer.lora_A["c"].weight.detach(), scaled_B)}
    return {"ours_cpu_s": median, "peft_cpu_s": peft_time, "times_faster": peft_time / median, **errors}


def measure() -> dict[str, Any]:
    """Every figure."""
    return {"llama_2_7b_files": file_to_file(), f"layer_{HIDDEN}": one_layer()}


if __name__ == "__main__":
    sys.path.insert(0, ROOT)
    print(json.dumps(measure()))
