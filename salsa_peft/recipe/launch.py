"""A stage in several processes, one for each GPU (or on CPUs, with gloo), started by `accelerate launch`; and what each of them runs.

accelerate launch --config_file recipes/accelerate/ddp.yaml --num_processes 2 … -m salsa_peft.recipe.launch FOLDER
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import importlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from salsa_peft.config.job import Job, Unit
from salsa_peft.config.load import RECIPE_TYPE
from salsa_peft.config.paths import bundled_folder
from salsa_peft.config.schema import Recipe
from salsa_peft.recipe import hardware, processes
from salsa_peft.utils.errors import require
from salsa_peft.utils.files import write_atomic

JOB, LAUNCHER_LOG = "job.json", "launcher.log"
FAILURE = re.compile(r"^\s*rank\s*: (\d+) .*\n\s*exitcode\s*: (-?\d+)", re.MULTILINE)  # as torch's launcher prints them
AFTER_OTHERS = (-signal.SIGTERM, -signal.SIGABRT, 128 + signal.SIGTERM)
"""How a process ends where another one failed first: by the launcher, by NCCL's watchdog, by saving on SIGTERM."""


def check(recipe: Recipe) -> None:
    """Raise SalsaError where this machine can't run the recipe's number of processes."""
    there, count, how = gpus(), recipe.num_processes, recipe.accelerate
    require(
        there > 0 or how == "ddp",
        f"accelerate: found {how} and no GPU (nvidia-smi lists none), expected ddp, the one that CPUs run too",
    )
    require(
        there == 0 or count <= there,
        f"num_processes: found {count}, expected at most {there}, the GPUs here: each process has one of its own",
    )
    require(
        how != "zero3" or importlib.util.find_spec("deepspeed") is not None,
        "accelerate: found zero3 and no DeepSpeed; pip install 'salsa-peft[deepspeed]'",
    )


def gpus() -> int:
    """That a process here can use: those of nvidia-smi that CUDA_VISIBLE_DEVICES leaves."""
    there, visible = len(hardware.cards()), os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return there
    return min(there, len([name for name in visible.split(",") if name.strip() not in ("", "-1")]))


def run(job: Job, log: Path, *, debug: bool = False) -> processes.Result:
    """As processes.run_in_process, in the recipe's number of processes. Facts and seconds are the first one's, peak_mb is the sum of all,
    what the machine needs; gpu_peak_mb the largest, what a card needs. Raises StageError with the first error of any of them, after all of them have ended."""
    log.parent.mkdir(parents=True, exist_ok=True)
    for left in log.parent.glob(f".{log.stem}.*"):  # of a command that was killed
        shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{log.stem}.", dir=log.parent))
    try:
        write_job(job, folder)
        with _held(folder / JOB):
            code = _launched(job, folder)
        return _outcome(job, folder, code, log, debug)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_job(job: Job, folder: Path) -> None:
    """job.json: the job, and what its processes import first."""
    unit = dataclasses.asdict(job.unit)
    said = {
        "recipe": dataclasses.asdict(job.recipe),
        "unit": unit,
        "folder": str(job.folder),
        "inputs": {name: str(path) for name, path in job.inputs.items()},
        "recipe_yaml": job.recipe_yaml,
        "preload": processes.PRELOAD,
    }
    write_atomic(folder / JOB, json.dumps(said, allow_nan=False))


def read_job(folder: Path) -> tuple[Job, list[str]]:
    """What `write_job` wrote → the job, and the modules to import first."""
    said = json.loads((folder / JOB).read_bytes())
    unit: Any = {name: tuple(value) if isinstance(value, list) else value for name, value in said["unit"].items()}
    job = Job(
        recipe=RECIPE_TYPE.validate_json(json.dumps(said["recipe"]), strict=True),
        unit=Unit(**unit),
        folder=Path(said["folder"]),
        inputs={name: Path(path) for name, path in said["inputs"].items()},
        recipe_yaml=said["recipe_yaml"],
    )
    return job, said["preload"]


@contextlib.contextmanager
def _held(file: Path) -> Iterator[None]:
    """Within the context a lock that goes with this process, also by kill -9."""
    handle = os.open(file, os.O_RDWR)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def end_with_command(folder: Path) -> None:
    """Called by each process first of all: once the command's lock is free this process is killed; one that comes too late ends at once."""
    try:
        handle = os.open(folder / JOB, os.O_RDWR)
    except FileNotFoundError:
        os._exit(1)

    def watch() -> None:
        fcntl.flock(handle, fcntl.LOCK_SH)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True, name="ends with the command").start()


def command(recipe: Recipe, folder: Path, threads: str) -> list[str]:
    """What starts the processes."""
    config = bundled_folder("recipes") / "accelerate" / f"{recipe.accelerate}.yaml"
    return [
        *(sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)),
        *("--num_processes", str(recipe.num_processes), "--num_cpu_threads_per_process", threads),
        *("--main_process_port", "0", "-m", "salsa_peft.recipe.launch", str(folder)),
    ]


def _launched(job: Job, folder: Path) -> int:
    """Start the processes and wait for their end → the launcher's code. On any exception they are ended first."""
    recipe, environment = job.recipe, dict(os.environ)
    package = str(Path(__file__).resolve().parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(
        [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path] + [package]
    )
    environment.setdefault("TOKENIZERS_PARALLELISM", "false")
    share = str(max(1, (os.cpu_count() or 1) // recipe.num_processes))
    threads = str(recipe.threads or environment.get("OMP_NUM_THREADS", share))
    # a session of its own: Ctrl-C reaches the command alone, which decides. The processes' output is the launcher's standard output
    with (folder / LAUNCHER_LOG).open("wb") as said:
        launcher = subprocess.Popen(
            command(recipe, folder, threads), env=environment, stdout=2, stderr=said, start_new_session=True
        )
    try:
        return launcher.wait()
    except BaseException:
        _end(launcher, folder)
        raise


def _end(launcher: subprocess.Popen[bytes], folder: Path) -> None:
    """SIGTERM to the processes themselves: the launcher would give them 30 s only."""
    try:
        if not _signal(folder, signal.SIGTERM):
            launcher.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            launcher.wait(processes.GRACE)
    finally:
        if launcher.poll() is None:
            launcher.kill()
            _signal(folder, signal.SIGKILL)
            launcher.wait()


def _signal(folder: Path, number: int) -> int:
    """Send it to the processes that have begun → how many these are."""
    pids = [int(file.read_text()) for file in folder.glob("pid-*")]
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
    return len(pids)


def write_report(folder: Path, rank: int, report: dict[str, Any]) -> None:
    """What a process has to say at its end, and when that was: the first error is the cause of the others."""
    write_atomic(folder / f"report-{rank}.json", json.dumps({"time": time.time(), **report}))


def _outcome(job: Job, folder: Path, code: int, log: Path, debug: bool) -> processes.Result:
    """The processes' reports as one. Raises StageError."""
    reports: dict[int, dict[str, Any]] = {}
    for rank in range(job.recipe.num_processes):
        file = folder / f"report-{rank}.json"
        reports |= {rank: json.loads(file.read_bytes())} if file.exists() else {}
    times = {rank: report.pop("time") for rank, report in reports.items()}
    failed = [rank for rank in sorted(times, key=lambda rank: times[rank]) if "line" in reports[rank]]
    said = (folder / LAUNCHER_LOG).read_text("utf-8", "replace")
    codes = {int(rank): int(found) for rank, found in FAILURE.findall(said) if int(rank) not in reports}
    lost = [found for found in codes.values() if found not in AFTER_OTHERS]
    if lost or not (failed or len(reports) == job.recipe.num_processes):
        write_atomic(log, said)
        found = lost[0] if lost else next(iter(codes.values()), code)
        raise processes.StageError(f"{job.unit.id} failed: {processes.death(found)} ({log} has what was printed)")
    if failed:
        traces = [f"process {rank}:\n{reports[rank]['trace']}" for rank in failed]
        return processes.settled({**reports[failed[0]], "trace": "\n".join(traces)}, job.unit.id, log, debug=debug)
    memory = round(sum(report["peak_mb"] for report in reports.values()), 1)
    cards_memory = [report["gpu_peak_mb"] for report in reports.values() if report["gpu_peak_mb"] is not None]
    whole = {**reports[0], "peak_mb": memory, "gpu_peak_mb": max(cards_memory, default=None)}
    return processes.settled(whole, job.unit.id, log, debug=debug)


def main(folder: Path) -> None:
    """Do the job in FOLDER and leave a report there. Ends the process: torch's own end would wait for others that are gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    end_with_command(folder)
    rank = int(os.environ["RANK"])
    write_atomic(folder / f"pid-{rank}", str(os.getpid()))
    if rank == 0:  # the launcher's standard output is the command's standard error
        sys.stderr = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8", errors="backslashreplace")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    job, preload = read_job(folder)
    for module in preload:
        importlib.import_module(module)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.")  # DeepSpeed calls what torch renamed
    report = processes.worked(job)
    write_report(folder, rank, report)
    if "line" in report:
        sys.stderr.flush()
        os._exit(1)
    if "torch" in sys.modules and sys.modules["torch"].distributed.is_initialized():
        sys.modules["torch"].distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
