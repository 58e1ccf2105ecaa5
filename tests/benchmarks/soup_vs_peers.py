"""Soups against PEFT, mergekit and `cp`. Prints one JSON line.

    python tests/benchmarks/soup_vs_peers.py --mergekit-python VENV/bin/python [--gigabytes 2] [--repeats 3] [--folder TMP]

Two random bf16 checkpoints with Llama's names and shapes, two shards each, are made in a temporary folder and read once, so that all
three start from a warm cache. Whole processes are timed, Python's start included, in turn within every repeat; medians. Ours is the
command `salsa soup`. `cp` does
not fsync, ours does: `cp_sync` is cp and sync of what it wrote, `ours_unsynced` is ours with fsync made a no-op. On a virtual machine
the first touch of a page that the host has not given yet, or has taken back since it was freed, costs more than what is written into
it (2 GB of page cache: 5 s, later 0.6 s), and who comes first would pay it. So before every run, of whomever, a process of its own
touches memory for 3.5 times a checkpoint and ends. Peak RSS is the kernel's (ru_maxrss of os.wait4). The result is held against the
float64 mean rounded to bf16, all of it.
Targets: at least 5 times faster than mergekit, at most 2.5 times cp, peak RSS under 300 MB, and no difference but ties, each at
most 1 ulp of the largest |w_i x_i|. Without --mergekit-python that row is left out.
The adapters' part is soup_vs_peft.py's: recompression against PEFT's svd, and a 7B model's adapters file to file.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = (0.3, 0.7)
TARGETS = {"times_mergekit": 5.0, "times_cp": 2.5, "peak_mb": 300.0}
UNSYNCED = """
import os
os.environ["OPENBLAS_NUM_THREADS"], os.fsync = "1", lambda descriptor: None
from salsa_peft.soup.__main__ import main
raise SystemExit(main())
"""


def make_checkpoint(folder: Path, seed: int, gigabytes: float) -> None:
    """Random bf16 weights in Llama's shapes (hidden 2048), the layers over two shards."""
    import torch
    from safetensors.torch import save_file

    hidden, inner, vocabulary = 2048, 5632, 32000
    shapes = {f"self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"}
    shapes |= {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
    shapes |= {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
    ends = 2 * vocabulary * hidden
    layers = max(2, round((gigabytes * 5e8 - ends) / (4 * hidden**2 + 3 * hidden * inner)))
    generator = torch.Generator().manual_seed(seed)
    folder.mkdir(parents=True)
    index: dict[str, str] = {}
    for number in (1, 2):
        part = range(layers // 2) if number == 1 else range(layers // 2, layers)
        whole = {f"model.layers.{i}.{name}.weight": shape for i in part for name, shape in shapes.items()}
        if number == 1:
            whole["model.embed_tokens.weight"] = (vocabulary, hidden)
        else:
            whole |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}
        name = f"model-{number:05}-of-00002.safetensors"
        tensors = {key: torch.randn(shape, generator=generator).mul_(0.02).bfloat16() for key, shape in whole.items()}
        save_file(tensors, folder / name, metadata={"format": "pt"})
        index |= dict.fromkeys(whole, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "intermediate_size": inner,
              "num_hidden_layers": layers, "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": vocabulary,
              "tie_word_embeddings": False, "torch_dtype": "bfloat16", "dtype": "bfloat16"}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


TOUCH = """
import mmap, sys
size = int(sys.argv[1])
memory = mmap.mmap(-1, size)
for place in range(0, size, mmap.PAGESIZE):
    memory[place] = 1
"""


def touch(size: float) -> None:
    """Have the machine hold that many bytes of free memory, at most half of what is available."""
    with open("/proc/meminfo") as file:
        available = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    subprocess.run([sys.executable, "-c", TOUCH, str(int(min(size, available / 2)))], check=True)


def run(command: list[str], environment: dict[str, str]) -> dict[str, float]:
    """Seconds, CPU seconds and peak RSS (MB) of a whole process."""
    start = time.perf_counter()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    said = process.stderr.read().decode(errors="replace")
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if os.waitstatus_to_exitcode(status):
        raise SystemExit(f"{' '.join(command)}\n{said[-2000:]}")
    return {"seconds": seconds, "cpu_seconds": usage.ru_utime + usage.ru_stime, "peak_mb": usage.ru_maxrss / 1024}


def commands(folder: Path, mergekit: str | None) -> dict[str, list[str]]:
    """What is compared, each writing folder/<name>."""
    members = [str(folder / "a"), str(folder / "b")]
    numbers = ",".join(map(str, WEIGHTS))
    found = {
        "ours": [sys.executable, "-m", "salsa_peft.soup", str(folder / "ours"), *members, "--weights", numbers],
        "ours_unsynced": [sys.executable, "-c", UNSYNCED, str(folder / "ours_unsynced"), *members, "--weights", numbers],
        "cp": ["cp", "-r", members[0], str(folder / "cp")],
        "cp_sync": ["sh", "-c", f"cp -r {members[0]} {folder / 'cp_sync'} && sync {folder / 'cp_sync'}/*"],
    }  # fmt: skip
    if mergekit is not None:
        models = [
            {"model": member, "parameters": {"weight": weight}} for member, weight in zip(members, WEIGHTS, strict=True)
        ]
        config = {"merge_method": "linear", "dtype": "bfloat16", "parameters": {"normalize": False}, "models": models}
        (folder / "merge.yaml").write_text(json.dumps(config))
        script = "from mergekit.scripts.run_yaml import main; main()"
        found["mergekit"] = [
            mergekit,
            "-c",
            script,
            str(folder / "merge.yaml"),
            str(folder / "mergekit"),
            "--no-copy-tokenizer",
        ]
    return found


def compare(folder: Path, repeats: int, mergekit: str | None) -> dict[str, Any]:
    """Medians of each command, in turn within every repeat; what was written is removed after each, outside the time."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hub")}
    runs: dict[str, list[dict[str, float]]] = {}
    for repeat in range(repeats):
        for name, command in commands(folder, mergekit).items():
            for path in (*(folder / "a").glob("*.safetensors"), *(folder / "b").glob("*.safetensors")):
                warm(path)
            os.sync()  # so that nobody waits for what another wrote
            touch(3.5 * sum(path.stat().st_size for path in (folder / "a").iterdir()))
            runs.setdefault(name, []).append(run(command, environment))
            if name not in ("ours", "mergekit") or repeat < repeats - 1:
                shutil.rmtree(folder / name)
    return {
        name: {figure: round(statistics.median(one[figure] for one in found), 2) for figure in found[0]}
        | {"all_seconds": [round(one["seconds"], 2) for one in found]}
        for name, found in runs.items()
    }


def warm(path: Path) -> None:
    """Read a file, so that it is in the page cache."""
    with path.open("rb", buffering=0) as file:
        while file.read(2**24):
            pass


def exactness(folder: Path, result: Path) -> dict[str, Any]:
    """Against the float64 mean rounded to bf16: how many elements differ, how many of them not by 1 ulp at a tie, and the largest
    difference, in ulps of the result and of the largest |w_i x_i|. A tie: the mean is as near to both, to 2⁻²¹ of the terms."""
    import torch
    from safetensors import safe_open

    found: dict[str, Any] = {
        "elements": 0,
        "differing": 0,
        "no_ties": 0,
        "largest_ulp": 0.0,
        "largest_ulp_of_terms": 0.0,
    }
    for path in sorted(result.glob("*.safetensors")):
        with safe_open(path, "pt") as got:
            for name in got.keys():  # noqa: SIM118
                terms = [
                    tensor_of(folder / member, name).double() * weight
                    for member, weight in zip("ab", WEIGHTS, strict=True)
                ]
                tensor, exact = got.get_tensor(name), terms[0] + terms[1]
                wrong = (tensor != exact.bfloat16()).nonzero(as_tuple=True)
                found["elements"] += tensor.numel()
                found["differing"] += len(wrong[0])
                if not len(wrong[0]):
                    continue
                tensor, exact, one, other = (t[wrong].double() for t in (tensor, exact, *terms))
                largest = torch.maximum(one.abs(), other.abs())
                error = (tensor - exact.bfloat16().double()).abs()
                ulp, ulp_of_terms = (
                    2.0 ** (number.abs().clamp(min=2.0**-120).log2().floor() - 7) for number in (exact, largest)
                )
                tie = (tensor - exact).abs() <= ulp / 2 + largest * 2.0**-21
                found["no_ties"] += int((~tie).sum())
                for name_of, unit in (("largest_ulp", ulp), ("largest_ulp_of_terms", ulp_of_terms)):
                    found[name_of] = max(found[name_of], float((error / unit).max()))
    return found


def tensor_of(folder: Path, name: str) -> Any:
    """A tensor of a checkpoint in shards."""
    from safetensors import safe_open

    file = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name]
    with safe_open(folder / file, "pt") as opened:
        return opened.get_tensor(name)


def measure(gigabytes: float, repeats: int, mergekit: str | None, parent: str | None) -> dict[str, Any]:
    """The checkpoints' part: every figure, and which targets were met."""
    with tempfile.TemporaryDirectory(dir=parent) as name:
        folder = Path(name)
        free = shutil.disk_usage(folder).free
        if free < 6 * gigabytes * 1e9:
            raise SystemExit(
                f"{folder}: found {free / 1e9:.1f} GB free, expected {6 * gigabytes:.0f}; pass --folder on another disk"
            )
        for number, member in enumerate("ab"):  # in another process: a child's peak RSS begins with its parent's
            made = multiprocessing.get_context("spawn").Process(
                target=make_checkpoint, args=(folder / member, number, gigabytes)
            )
            made.start()
            made.join()
            if made.exitcode:
                raise SystemExit(f"{folder / member}: the checkpoint was not made")
        found: dict[str, Any] = {"bytes": sum(path.stat().st_size for path in (folder / "a").iterdir())}
        found["runs"] = runs = compare(folder, repeats, mergekit)
        found["ours_against_float64"] = exactness(folder, folder / "ours")
        summary = json.loads((folder / "ours" / "soup.json").read_text())
        found["distance"] = summary["pairs"][0]["distance"]
        if mergekit is not None:
            found["mergekit_against_float64"] = exactness(folder, folder / "mergekit")
            found["times_mergekit"] = round(runs["mergekit"]["seconds"] / runs["ours"]["seconds"], 2)
    found["times_cp"] = round(runs["ours"]["seconds"] / runs["cp"]["seconds"], 2)
    found["times_cp_unsynced"] = round(runs["ours_unsynced"]["seconds"] / runs["cp"]["seconds"], 2)
    found["times_cp_sync"] = round(runs["ours"]["seconds"] / runs["cp_sync"]["seconds"], 2)
    met = {"times_cp": found["times_cp"] <= TARGETS["times_cp"], "peak_mb": runs["ours"]["peak_mb"] < TARGETS["peak_mb"],
           "exact": found["ours_against_float64"]["no_ties"] == 0}  # fmt: skip
    if mergekit is not None:
        met["times_mergekit"] = found["times_mergekit"] >= TARGETS["times_mergekit"]
    return found | {"targets": TARGETS, "met": met}


def main() -> int:
    """0, also where a target was missed: the line says which."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mergekit-python", metavar="PATH")
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", metavar="TMP", help="where the checkpoints are made (default: the system's)")
    args = parser.parse_args()
    load = os.getloadavg()
    adapters = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("soup_vs_peft.py"))], check=True, capture_output=True, text=True
    )
    found = {
        "adapters": json.loads(adapters.stdout),
        "checkpoints": measure(args.gigabytes, args.repeats, args.mergekit_python, args.folder),
    }
    found |= {"load_before": load, "machine": f"{platform.machine()}, {os.cpu_count()} cores"}
    print(json.dumps(found | {"python": platform.python_version()}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
