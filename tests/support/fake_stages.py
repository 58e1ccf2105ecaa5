"""Stages that do next to nothing, for tests of the command: what one does is said in the recipe's description (in no key)."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from paths import ROOT, SUPPORT

from salsa_peft.config.job import Job
from salsa_peft.recipe.run import STAGES
from salsa_peft.utils.errors import SalsaError
from salsa_peft.utils.files import write_atomic
from salsa_peft.utils.fingerprints import canonical_json
from salsa_peft.utils.hub import PINNED

TINY = """
name: tiny
toy: {}
policies:
  ppo: {reference: seed-0}
  salsa: {reference: soup, kl_coef: 0.01}
"""
FAKE = {name: stage._replace(run="fake_stages:run") for name, stage in STAGES.items()}


def as_in_a_terminal() -> None:
    """Let SIGINT interrupt this process."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(folder: Path, recipe_file: str, *words: str, **options: Any) -> subprocess.Popen[str]:
    """The command with these stages on a recipe in `folder`; options: Popen's.

    A shell's background job ignores SIGINT, and its children with it: this one is as in a terminal, wherever the tests run.
    """
    options.setdefault("preexec_fn", as_in_a_terminal)
    argv = [sys.executable, __file__, recipe_file, "--lora", *words]
    path = os.pathsep.join([str(SUPPORT), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.Popen(argv, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True, **options)


def run(job: Job) -> dict[str, Any]:
    """Write a file that depends on the slice and the inputs, unless the description asks for something else."""
    left = {path.name for path in job.folder.iterdir()} - {"begun.json"}
    assert not left or STAGES[job.unit.stage].resumes, "the folder was not empty"
    print("noise")
    done = "".join((job.inputs[name] / "result.txt").read_text() for name in job.unit.inputs)
    result = hashlib.sha256((canonical_json(job.unit.key_fields) + done).encode()).hexdigest()
    write_atomic(job.folder / "result.txt", f"{job.unit.id} {result}\n")
    write_atomic(job.folder / "deeper" / "more.bin", b"1234")
    if job.unit.stage == "report":
        write_atomic(job.folder / "report.html", result)
        write_atomic(job.folder / "summary.json", "{}")
    actions = json.loads(job.recipe.description or "{}")
    replicate = next((part for part in job.folder.parts if part.startswith("replicate-")), "")
    action = actions.get(f"{replicate}/{job.unit.id}", actions.get(job.unit.id))
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
    return {"value": float("nan") if action == "nan" else 1.0, "pid": os.getpid(), "pinned": dict(PINNED)}


if __name__ in ("__main__", "__mp_main__"):  # the second is the name in the processes of replicates
    from salsa_peft.recipe import processes

    processes.PRELOAD = ["fake_stages"]
    processes.GRACE = 1.0


if __name__ == "__main__":
    from salsa_peft.recipe.__main__ import main as salsa_run

    sys.exit(salsa_run(stages={name: stage._replace(run="fake_stages:run") for name, stage in STAGES.items()}))
