"""Tasks for the tests of recipe/parallel/pool.py, which are called in processes of their own."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from salsa_peft.utils.errors import SalsaError


def meet(folder: str, name: str, other: str) -> None:
    """Print half a line, wait until the other task has done the same, and print the rest; then a bar."""
    print(f"half of {name}", end="", file=sys.stderr, flush=True)
    (Path(folder) / name).touch()
    end = time.monotonic() + 20
    while not (Path(folder) / other).exists():
        assert time.monotonic() < end, "the tasks do not run at the same time"
        time.sleep(0.01)
    print(" and the rest", file=sys.stderr, flush=True)
    print(f"threads {os.environ['OMP_NUM_THREADS']}", flush=True)
    sys.stderr.write(" 10%|#  |\r 90%|## |\r100%|###|\n\nno end of line")


def refuse() -> None:
    raise SalsaError("data.prompts: wrong")


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
