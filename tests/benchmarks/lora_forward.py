"""LoRA under bf16 autocast: our forward (models/adapters/forward.py) and PEFT's, in turn. Prints one JSON line.

    OMP_NUM_THREADS=1 python tests/benchmarks/lora_forward.py MODEL_FOLDER [--rows 4] [--length 256] [--repeats 5]
    OMP_NUM_THREADS=1 python tests/benchmarks/lora_forward.py llama-2-7b   # one layer of its shape, random weights

A bf16 base, float32 factors of rank 16 on all linears; a forward and a backward under autocast, as PPO makes them. Figures
of each side: CPU seconds (median of `repeats`); operators per LoRA layer that compute something (views and allocations are not
counted; the model's other operators are in both sides' numbers), of them casts, and the elements that they write for a token; MB that the forward
keeps for the backward, and the largest that both take beyond weights and gradients (torch.profiler). `errors`: of hidden
states and factors' gradients against the same weights in float64, norm of the difference over the norm.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch.profiler import ProfilerActivity  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from salsa_peft.models.adapters import forward as our_forward  # noqa: E402
from salsa_peft.models.adapters import lora  # noqa: E402

RANK, ALPHA = 16, 24
WIDE = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_hidden_layers": 1, "vocab_size": 512}  # fmt: skip
"""One layer of Llama-2-7B, with a small vocabulary."""


class OperatorCount(TorchDispatchMode):
    """Counts operators that are neither views nor allocations, and the elements that they write."""

    def __init__(self) -> None:
        super().__init__()
        self.operators, self.elements = Counter[str](), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not func.is_view and "empty" not in name and name not in ("detach", "_unsafe_view"):
            self.operators[name] += 1
            self.elements += out.numel() if isinstance(out, torch.Tensor) else 0
        return out


def build(name: str) -> Any:
    """The decoder in bf16 with float32 factors of random weights, also in B, where PEFT has zeros."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModel, LlamaConfig, LlamaModel

    torch.manual_seed(0)
    model = LlamaModel(LlamaConfig(**WIDE)) if name == "llama-2-7b" else AutoModel.from_pretrained(name)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear")
    model = get_peft_model(model.to(torch.bfloat16), config, autocast_adapter_dtype=True)
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            parameter.data.normal_(0, 0.02)
    return model.train()


def forward(model: Any, ids: torch.Tensor, autocast: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """A weighted mean of the last hidden states, and the states."""
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        hidden = model(input_ids=ids, use_cache=False)[0]
    weights = torch.randn(hidden.shape[-1], generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return (hidden.double() @ weights).mean(), hidden


def passes(model: Any, ids: torch.Tensor, autocast: bool = True) -> list[torch.Tensor]:
    """The last hidden states and all factors' gradients."""
    model.zero_grad()
    loss, hidden = forward(model, ids, autocast)
    loss.backward()
    return [hidden.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def errors(found: list[torch.Tensor], exact: list[torch.Tensor]) -> dict[str, float]:
    """Relative errors of hidden states and gradients."""
    of = [((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True)]
    numbers = {"hidden": of[0], "gradients_median": statistics.median(of[1:]), "gradients_largest": max(of[1:])}
    return {name: round(number, 5) for name, number in numbers.items()}


def allocated(profiler: Any) -> list[int]:
    """Bytes allocated beyond the start, after each allocation and release."""
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    found = [0]
    for event in sorted(events, key=lambda event: event.start_ns()):
        found.append(found[-1] + event.nbytes())
    return found


def memory(model: Any, ids: torch.Tensor) -> dict[str, float]:
    """MB kept by the forward, and at the peak of forward and backward. Gradients are there already."""
    loss = []
    with torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True) as first:
        loss.append(forward(model, ids)[0])
    with torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True) as second:
        loss.pop().backward()
    before, after = allocated(first), allocated(second)
    peak = max(*before, *(before[-1] + more for more in after))
    return {"kept_mb": round(before[-1] / 1e6, 1), "peak_mb": round(peak / 1e6, 1)}


def operators(model: Any, ids: torch.Tensor, layers: int) -> dict[str, float]:
    """Operators and casts per LoRA layer, and elements that they write per LoRA layer and token."""
    found: dict[str, float] = {}
    with OperatorCount() as first:
        loss, _ = forward(model, ids)
    with OperatorCount() as second:
        loss.backward()
    for name, count in (("forward", first), ("backward", second)):
        found |= {
            name: round(count.operators.total() / layers, 2),
            f"{name}_casts": round(count.operators["_to_copy"] / layers, 2),
            f"{name}_elements": round(count.elements / layers / ids.numel()),
        }
    return found


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Both sides on the same weights and tokens."""
    torch.set_num_threads(args.threads)
    sides = {"peft": build(args.model), "ours": build(args.model)}
    our_forward.install(sides["ours"])
    layers = len(lora.tuner_layers(sides["ours"]))
    vocabulary = sides["ours"].config.vocab_size
    ids = torch.randint(3, vocabulary, (args.rows, args.length), generator=torch.Generator().manual_seed(1))
    few = ids[:2, :64]
    exact = passes(copy.deepcopy(sides["peft"]).double(), few, autocast=False)
    found: dict[str, Any] = {name: {"errors": errors(passes(model, few), exact)} for name, model in sides.items()}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(args.repeats + 1):  # the first warms up and is dropped
        for name, model in sides.items():
            start = time.process_time()
            forward(model, ids)[0].backward()
            seconds[name].append(time.process_time() - start)
    for name, model in sides.items():
        cpu_s = round(statistics.median(seconds[name][1:]), 3)
        found[name] |= {"cpu_s": cpu_s, **memory(model, ids), **operators(model, ids, layers)}
    ratios = {key: round(found["ours"][key] / found["peft"][key], 3) for key in ("cpu_s", "kept_mb", "peak_mb")}
    return {"layers": layers, "rows": args.rows, "length": args.length, "ours_over_peft": ratios, **found}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder of a causal LM, or llama-2-7b")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    git = ["git", "rev-parse", "--short", "HEAD"]
    facts = {
        "commit": subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip(),
        "machine": platform.machine(), "load_before": round(os.getloadavg()[0], 2), "threads": args.threads,
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")},
    }  # fmt: skip
    print(json.dumps({"benchmark": "lora_forward", "model": Path(args.model).name, **measure(args), **facts}))


if __name__ == "__main__":
    main()
