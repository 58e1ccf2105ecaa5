"""Milliseconds per adapter switch on one base: ours, TRL's use_adapter, PEFT's set_adapter. Prints one JSON line.

    OMP_NUM_THREADS=1 python tests/benchmarks/toggle_speed.py MODEL_FOLDER [--repeats 200]

The base carries what a SALSA run has: policy, two references and a reward adapter (rank 16 on all linears). `visit` is a whole
`with`: another adapter (or none: the base) and back, as one reference's log-probs need it, two switches. `switch` is one: half a
visit, or one call of set_adapter. Ours, TRL's and PEFT's are timed in turn within every repeat, on one thread; medians in ms; the
target is 5 ms a switch. Every visit is checked to reach the adapter it names and to come back. `trainable_references`: tensors of
frozen adapters that required grad during a visit.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

TARGET_MS = 5.0
ADAPTERS = ("policy", "seed-0", "soup", "reward")


def build(folder: str) -> Any:
    """The base with four adapters, policy active and alone trainable."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config, adapter_name=ADAPTERS[0])
    for name in ADAPTERS[1:]:
        model.add_adapter(name, config)
    model.set_adapter(ADAPTERS[0])
    return model


def visit(
    model: Any, toggle: Callable[[str | None], AbstractContextManager[None]], name: str | None
) -> tuple[float, int]:
    """One `with toggle(name)` → (seconds, weights of frozen adapters that could be trained meanwhile); checks are not timed."""
    start = time.perf_counter()
    with toggle(name):
        entered = time.perf_counter()
        expect(model, (name,) if name else ())
        trainable = trainable_references(model)
        left = time.perf_counter()
    seconds = time.perf_counter() - left + entered - start
    expect(model, ADAPTERS[:1])
    return seconds, trainable


def expect(model: Any, active: tuple[str, ...]) -> None:
    """Raise unless these adapters are active in every adapted layer; (): adapters are off."""
    from salsa_peft.models.adapters import lora as adapters

    layers = adapters.tuner_layers(model)
    found = {() if layer.disable_adapters else tuple(layer.active_adapters) for layer in layers}
    if found != {active}:
        raise RuntimeError(f"active adapters: found {found}, expected {active} in every layer")


def trainable_references(model: Any) -> int:
    """Weights of the adapters other than the policy's that require grad: 0 is right."""
    from salsa_peft.models.adapters import lora as adapters

    return sum(p.requires_grad for name in ADAPTERS[1:] for p in adapters.parameters(model, name))


def measure(folder: str, repeats: int) -> dict[str, Any]:
    """Medians in ms of a visit to a reference and to the base, and of one set_adapter."""
    import torch
    from trl.trainer.utils import use_adapter

    from salsa_peft.models.adapters import lora as adapters

    torch.set_num_threads(1)
    model = build(folder)
    contexts = {"ours": adapters.Toggle(model), "trl": lambda name: use_adapter(model, name)}
    seconds: dict[str, list[float]] = {f"{who} {to}": [] for who in contexts for to in ("adapter", "base")}
    seconds["peft set_adapter"] = []
    trainable = dict.fromkeys(contexts, 0)
    for repeat in range(repeats + 1):  # the first warms up and is dropped
        name = ADAPTERS[1 + repeat % (len(ADAPTERS) - 1)]
        for who, toggle in contexts.items():
            for to, wanted in (("adapter", name), ("base", None)):
                taken, found = visit(model, toggle, wanted)
                seconds[f"{who} {to}"].append(taken)
                trainable[who] = max(trainable[who], found)
        start = time.perf_counter()
        model.set_adapter(name)
        seconds["peft set_adapter"].append(time.perf_counter() - start)
        model.set_adapter(ADAPTERS[0])
    medians = {key: statistics.median(values[1:]) * 1000 for key, values in seconds.items()}
    switch = {
        "ours": medians["ours adapter"] / 2, "trl use_adapter": medians["trl adapter"] / 2,
        "peft set_adapter": medians["peft set_adapter"],
    }  # fmt: skip
    return {
        "layers": len(adapters.tuner_layers(model)), "adapters": list(ADAPTERS), "repeats": repeats,
        "visit_ms": {key: round(value, 3) for key, value in medians.items() if not key.startswith("peft")},
        "switch_ms": {key: round(value, 3) for key, value in switch.items()},
        "worst_ours_visit_ms": round(max(seconds["ours adapter"][1:] + seconds["ours base"][1:]) * 1000, 3),
        "trainable_references": trainable, "target_ms": TARGET_MS, "within_target": switch["ours"] <= TARGET_MS,
    }  # fmt: skip


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--repeats", type=int, default=200)
    args = parser.parse_args()
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "trl", "peft")}
    print(json.dumps({"benchmark": "toggle_speed", **measure(args.model, args.repeats), "versions": versions}))


if __name__ == "__main__":
    main()
