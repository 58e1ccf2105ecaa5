"""Stages of a recipe that run in the tests' process instead of a process of their own."""

from __future__ import annotations

import contextlib
import importlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from salsa_peft.recipe import processes


def run_here(job: Any, log: Path, **_: Any) -> processes.Result:
    """In place of processes.run_job; a stage's exception is raised as it is."""
    module, name = job.unit.run.split(":")
    start = time.perf_counter()
    facts = getattr(importlib.import_module(module), name)(job)
    json.dumps(facts, allow_nan=False)
    return processes.Result(facts=facts, seconds=time.perf_counter() - start, peak_mb=1.0)


@contextlib.contextmanager
def inline_stages() -> Iterator[None]:
    """Within the context, every stage runs in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "run_job", run_here)
        yield
