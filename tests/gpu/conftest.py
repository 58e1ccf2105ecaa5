"""What waits for a GPU. Without CUDA every test skips; SALSA_GPU_TESTS_ON=cpu runs what is not CUDA's own on a CPU, to try the tests."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
TRIED = os.environ.get("SALSA_GPU_TESTS_ON") == "cpu"
HERE = Path(__file__).resolve().parent


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """Mark and, without CUDA, skip every test of this folder."""
    for item in items:
        if HERE in Path(item.path).parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available() and not TRIED:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture
def on_gpu() -> dict[str, Any]:
    """SalsaPPOConfig's arguments for the device that is tested."""
    return {"use_cpu": not torch.cuda.is_available()}


@pytest.fixture
def cuda() -> None:
    """A test of what only CUDA has."""
    if not torch.cuda.is_available():
        pytest.skip("only CUDA has it")
