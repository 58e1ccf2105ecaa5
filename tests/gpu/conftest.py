"""What waits for a GPU. Without CUDA every test skips; SALSA_GPU_TESTS_ON=cpu runs them on a CPU, to try the tests: what only CUDA shows
is then not judged.

In a process of tests there is one GPU, as the engine has it; the others are for the processes that a test starts.
"""

from __future__ import annotations

import gc
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).resolve().parent
PLAIN = (torch.Tensor, torch.nn.Parameter)
TRIED = os.environ.get("SALSA_GPU_TESTS_ON") == "cpu"


def visible_gpus() -> list[str]:
    """Their numbers, without waking CUDA: what is hidden afterwards stays hidden."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip() not in ("", "-1")]
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
    except FileNotFoundError:
        return []
    return [str(number) for number in range(sum(line.startswith("GPU ") for line in listed.splitlines()))]


GPUS = [] if TRIED else visible_gpus()
if TRIED or len(GPUS) > 1:
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(GPUS[:1])


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """Mark and, without CUDA, skip every test of this folder."""
    for item in items:
        if HERE in Path(item.path).parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available() and not TRIED:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
            elif "PYTEST_XDIST_WORKER" in os.environ and not TRIED:
                item.add_marker(pytest.mark.skip(reason="two processes of tests share no GPU: pytest -n 0 tests/gpu"))


class Card:
    """Bytes that tensors take on the GPU. On a CPU those of the tensors that Python knows of, and no peak."""

    def __init__(self) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.counts = self.device.type == "cuda"

    def held(self) -> int:
        """By what is alive."""
        gc.collect()
        if self.counts:
            return torch.cuda.memory_allocated()
        storages = [thing.untyped_storage() for thing in gc.get_objects() if type(thing) in PLAIN]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    def start(self) -> int:
        """→ held; `peak` counts from here."""
        before = self.held()
        if self.counts:
            torch.cuda.reset_peak_memory_stats()
        return before

    def peak(self) -> int:
        """At most since `start`; 0 on a CPU."""
        return torch.cuda.max_memory_allocated() if self.counts else 0


@pytest.fixture
def card() -> Card:
    """The device that is tested."""
    return Card()


@pytest.fixture
def device(card: Card) -> torch.device:
    """cuda, or the CPU on which the tests are tried."""
    return card.device


@pytest.fixture
def on_gpu(device: torch.device) -> dict[str, Any]:
    """SalsaPPOConfig's arguments for it."""
    return {"use_cpu": device.type == "cpu"}


@pytest.fixture
def gpus() -> list[str]:
    """All of them, for CUDA_VISIBLE_DEVICES of other processes."""
    return GPUS
