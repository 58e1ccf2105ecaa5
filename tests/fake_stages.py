"""Stages that do next to nothing, for tests of the command: what one does is said in the recipe's description (in no key)."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
from typing import Any

from salsa_peft.config import SalsaError
from salsa_peft.recipe import STAGES
from salsa_peft.runs import Job, canonical, write_atomic

FAKE = {name: stage._replace(run="fake_stages:run") for name, stage in STAGES.items()}


def run(job: Job) -> dict[str, Any]:
    """Write a file that depends on the slice and the inputs, unless the description asks for something else."""
    left = {path.name for path in job.folder.iterdir()} - {"begun.json"}
    assert not left or STAGES[job.unit.stage].resumes, "the folder was not empty"
    print("noise")
    done = "".join((job.inputs[name] / "result.txt").read_text() for name in job.unit.inputs)
    result = hashlib.sha256((canonical(job.unit.slice) + done).encode()).hexdigest()
    write_atomic(job.folder / "result.txt", f"{job.unit.id} {result}\n")
    write_atomic(job.folder / "deeper" / "more.bin", b"1234")
    if job.unit.stage == "report":
        write_atomic(job.folder / "report.html", result)
    action = json.loads(job.recipe.description or "{}").get(job.unit.id)
    if action == "refuse":
        raise SalsaError("data.prompts: found nothing, expected something")
    if str(action).startswith("memory-"):  # room for so many rows
        section = getattr(job.recipe, job.unit.stage)
        if (section.micro_batch_size or section.batch_size) > int(action.removeprefix("memory-")):
            raise MemoryError
    if action == "crash":
        raise RuntimeError("boom\nand more")
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if action == "exit":
        os._exit(3)
    if action == "memory":
        block = bytearray(300_000_000)
        time.sleep(0.3)
        del block
    if action == "sleep":
        print(f"pid {os.getpid()}", file=sys.stderr, flush=True)
        time.sleep(120)
    if action == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print(f"pid {os.getpid()}", file=sys.stderr, flush=True)
        time.sleep(120)
    return {"value": float("nan") if action == "nan" else 1.0, "pid": os.getpid()}


if __name__ == "__main__":
    from salsa_peft import processes, recipe

    processes.PRELOAD = ["fake_stages"]
    processes.GRACE = 1.0
    sys.exit(recipe.main(stages={name: stage._replace(run="fake_stages:run") for name, stage in STAGES.items()}))
