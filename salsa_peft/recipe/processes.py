"""A stage in a process of its own, forked from a server that has the imports: its memory is gone when it ends.

The parent imports no torch. The child ends with the parent, also after kill -9 of it.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import multiprocessing
import os
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from salsa_peft.config.job import Job
from salsa_peft.utils import files
from salsa_peft.utils import hub as hub_errors
from salsa_peft.utils.errors import SalsaError
from salsa_peft.utils.files import write_atomic
from salsa_peft.utils.oom import is_out_of_memory

PRELOAD = ["salsa_peft.recipe.preload"]
GRACE = 120.0  # seconds between SIGTERM and kill, in which a stage may save; a second signal cuts them short


class StageError(Exception):
    """A stage failed; one line."""


class OutOfMemory(StageError):
    """A stage failed for want of memory."""


class Terminated(BaseException):
    """The command got SIGTERM."""


@dataclass(frozen=True)
class Result:
    """What a stage's process reports."""

    facts: dict[str, Any]
    seconds: float
    peak_mb: float
    """Largest resident memory of the process."""
    gpu_peak_mb: float | None = None
    """What PyTorch's allocator held of its GPU at most; None without one."""


def run_in_process(job: Job, log: Path, *, debug: bool = False) -> Result:
    """Run the job's function in a process of its own. Raises StageError; on any exception the process is ended first."""
    context = _context(job.recipe.threads)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, job), name=job.unit.id, daemon=False)
    try:
        process.start()
        sender.close()
        report = _receive(receiver, process.sentinel)
        process.join()
    except BaseException:
        _end(process)
        raise
    if report is None:
        raise StageError(f"{job.unit.id} failed: {death(process.exitcode)}")
    return settled(report, job.unit.id, log, debug=debug)


def settled(report: dict[str, Any], unit: str, log: Path, *, debug: bool) -> Result:
    """What a stage's process reported. Raises StageError for an error, whose trace is then in `log`."""
    if "line" in report:
        sys.stderr.write(report["trace"] if debug else "")
        where = f"trace in {log}"
        try:
            write_atomic(log, report["trace"])
        except OSError as error:  # the disk is full: what the stage has to say goes first
            where = f"no trace: {log} cannot be written, {error.strerror}"
        hint = "" if report["known"] else f" ({'' if debug else 'add --debug for the trace; '}{where})"
        failure = OutOfMemory if report.get("out_of_memory") else StageError
        raise failure(f"{unit} failed: {report['line']}{hint}")
    return Result(**report)


def _context(threads: int | None) -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    package = str(Path(__file__).resolve().parents[2])
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if package not in paths:  # the server of Python 3.11 looks for the modules to preload on its own path only
        os.environ["PYTHONPATH"] = os.pathsep.join([path for path in paths if path] + [package])
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server is not the one to answer Ctrl-C
    try:
        forkserver.ensure_running()
    finally:
        signal.signal(signal.SIGINT, before)
    return context


def _receive(receiver: Connection, sentinel: int) -> dict[str, Any] | None:
    """The child's report, or None where it ended without one."""
    wait([receiver, sentinel])
    if not receiver.poll():
        return None
    try:
        return receiver.recv()
    except EOFError:
        return None


def _end(process: Any) -> None:
    if process.pid is None:
        return
    process.terminate()
    process.join(GRACE)
    if process.exitcode is None:
        process.kill()
        process.join()


def death(code: int | None) -> str:
    """How a process ended that left no report."""
    if code is None or code >= 0:
        return f"its process ended with code {code} and without a result"
    name = signal.Signals(-code).name
    hint = "; out of memory? a smaller micro_batch_size needs less" if name == "SIGKILL" else ""
    return f"its process was killed by {name}{hint}"


def _child(sender: Connection, job: Job) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _end_with_parent()
    os.dup2(2, 1)  # standard output is the command's own
    if job.recipe.threads is not None and "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(job.recipe.threads)
    report = worked(job)
    with contextlib.suppress(BrokenPipeError):
        sender.send(report)
    sender.close()


def worked(job: Job) -> dict[str, Any]:
    """Run the job's function in this process → what to report: facts and costs, or the error."""
    start = time.perf_counter()
    try:
        module, name = job.unit.run.split(":")
        facts = getattr(importlib.import_module(module), name)(job)
        json.dumps(facts, allow_nan=False)
        seconds = time.perf_counter() - start
        return {
            "facts": facts,
            "seconds": round(seconds, 3),
            "peak_mb": round(peak_mb(), 1),
            "gpu_peak_mb": gpu_peak_mb(),
        }
    except Exception as error:
        known = str(error) if isinstance(error, SalsaError) else None
        known = (
            known
            or hub_errors.explain_hub_error(error, job.recipe.model.base)
            or files.disk_full_message(error, job.folder)
        )
        line = known or f"{type(error).__name__}: {error}"
        return {
            "line": " ".join(line.split())[:1000],
            "known": known is not None,
            "trace": traceback.format_exc(),
            "out_of_memory": is_out_of_memory(error),
        }


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    sentinel = parent.sentinel

    def watch() -> None:
        wait([sentinel])
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True, name="ends with the parent").start()


def peak_mb() -> float:
    """Largest resident memory of this process so far, in MB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == "darwin" else 1e3)


def gpu_peak_mb() -> float | None:
    """What this process's allocator held of its GPU at most, in MB; None where it used none."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return None
    return round(torch.cuda.max_memory_reserved() / 1e6, 1)


@contextlib.contextmanager
def signals() -> Iterator[None]:
    """SIGTERM raises Terminated, so that what is open closes."""

    def stop(*_: Any) -> None:
        raise Terminated

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
