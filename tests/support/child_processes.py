"""Processes that tests start and wait for."""

from __future__ import annotations

import os
import time
from pathlib import Path

from paths import ROOT, SUPPORT


def gone(pid: int, within: float = 5.0) -> bool:
    end = time.monotonic() + within
    while time.monotonic() < end:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


UNIT = "sft/seed-0"


def environment() -> dict[str, str]:
    """With the tests' modules for the processes to import."""
    paths = [str(SUPPORT), str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    more = {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "DS_ACCELERATOR": "cpu",
    }
    return os.environ | more
