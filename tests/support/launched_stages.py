"""What test_launching.py launches in two processes instead of training: what each does is said in the recipe's description."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from typing import Any

from salsa_peft.config.job import Job
from salsa_peft.recipe.run import STAGES
from salsa_peft.utils.errors import SalsaError
from salsa_peft.utils.files import write_atomic

FAKE = {
    name: stage._replace(run="launched_stages:run" if stage.trains else "fake_stages:run")
    for name, stage in STAGES.items()
}


def run(job: Job) -> dict[str, Any]:
    """What the description says of this unit and process; without a word about it one file, written by the first."""
    rank = int(os.environ["RANK"])
    print(f"said by {rank}")
    print(f"error stream of {rank}", file=sys.stderr)
    action = json.loads(job.recipe.description or "{}").get(f"{job.unit.id} {rank}")
    if action == "refuse":
        raise SalsaError("data.prompts: found nothing, expected something")
    while action == "first" and not (job.folder / "late").exists():
        time.sleep(0.02)
    if action == "first":
        raise RuntimeError("boom\nand more")
    if action == "late":  # not ended by the launcher, as the ppo stage is not
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        write_atomic(job.folder / "late", "")
        time.sleep(1)
        raise RuntimeError("connection closed by peer")
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if action == "exit":
        os._exit(3)
    if action == "wait":
        print(f"pid {os.getpid()}", file=sys.stderr, flush=True)
        write_atomic(job.folder / f"waits-{rank}", str(os.getpid()))
        time.sleep(120)
    if action == "save":
        save_on_sigterm(job, rank)
    if rank == 0:
        write_atomic(job.folder / "result.txt", "done")
    return {"rank": rank, "inputs": sorted(job.inputs), "world": int(os.environ["WORLD_SIZE"])}


def save_on_sigterm(job: Job, rank: int) -> None:
    """As the ppo stage: note the signal, save for a while, end with 143."""
    got: list[int] = []
    signal.signal(signal.SIGTERM, lambda *_: got.append(1))
    write_atomic(job.folder / f"waits-{rank}", str(os.getpid()))
    while not got:
        time.sleep(0.05)
    time.sleep(1)
    write_atomic(job.folder / f"saved-{rank}", "")
    raise SystemExit(143)


if __name__ == "__main__":
    from salsa_peft.recipe import processes
    from salsa_peft.recipe.__main__ import main as salsa_run

    processes.PRELOAD = ["launched_stages"]
    sys.exit(salsa_run(stages=FAKE))
