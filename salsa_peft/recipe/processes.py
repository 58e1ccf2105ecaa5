"""Runs each stage in processes of its own, so that the stage's memory is freed when it ends.

One process is forked from a fork server that has imported the libraries (recipe/preload.py); several are started by
`accelerate launch`. In both cases the processes run recipe/worker.py: each connects to a Unix socket, receives the job
and sends back one report. The processes end when the command ends, even after kill -9. torch is not imported here.
"""

import contextlib
import multiprocessing
import os
import re
import signal
import socket
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from salsa_peft.config.job import Job
from salsa_peft.config.paths import bundled_folder
from salsa_peft.config.schema import Recipe
from salsa_peft.recipe import worker
from salsa_peft.utils.files import write_atomic

PRELOAD = ["salsa_peft.recipe.preload"]
GRACE = 120.0
"""Seconds between SIGTERM and SIGKILL, in which a stage may save a checkpoint."""
FAILURE = re.compile(r"^\s*rank\s*: (\d+) .*\n\s*exitcode\s*: (-?\d+)", re.MULTILINE)
"""Pattern of a failed process in the log of torch's launcher: its rank and its exit code."""
AFTER_OTHERS = (-signal.SIGTERM, -signal.SIGABRT, 128 + signal.SIGTERM)
"""Exit codes of processes that the launcher, NCCL or SIGTERM ended after another process had failed."""


class StageError(Exception):
    """A stage failed; the message is one line."""


class OutOfMemory(StageError):
    """A stage failed because it ran out of memory."""


class Terminated(BaseException):
    """The command received SIGTERM."""


@dataclass(frozen=True)
class Result:
    """Result and costs of a finished stage."""

    facts: dict[str, Any]
    """What the stage function returned."""
    seconds: float
    peak_mb: float
    """Sum over the processes of their peak resident memory, in MB."""
    gpu_peak_mb: float | None = None
    """Largest peak of a process's GPU memory (as PyTorch reserved it), in MB; None without a GPU."""


def run_job(job: Job, log: Path, *, count: int = 1, debug: bool = False) -> Result:
    """Run a job in `count` new processes and wait for them.

    log: file for the traceback of an error, or for the launcher's output. Raises StageError if a process fails or is
    killed. All processes have ended before any exception is raised.
    """
    with tempfile.TemporaryDirectory(prefix="salsa-") as folder, socket.socket(socket.AF_UNIX) as server:
        address = os.path.join(folder, "socket")
        server.bind(address)
        server.listen()
        _set_environment(job.recipe)
        process = _forked(job, address) if count == 1 else _launched(job, address, log)
        workers = _Workers(job, server, process)
        try:
            process.start()
            workers.serve()
            process.join()
        except BaseException:
            workers.end()
            if count > 1:
                log.unlink(missing_ok=True)
            raise
        finally:
            for connection in workers.connections:
                connection.close()
    failed = any("line" in report for report in workers.reports.values())
    printed = log.read_text("utf-8", "replace") if count > 1 else ""
    codes = {int(rank): int(code) for rank, code in FAILURE.findall(printed) if int(rank) not in workers.reports}
    crashed = [code for code in codes.values() if code not in AFTER_OTHERS]
    if crashed or not (failed or len(workers.reports) == count):
        code = next(iter([*crashed, *codes.values(), process.exitcode]))
        hint = f" (the output is in {log})" if count > 1 else ""
        raise StageError(f"{job.unit.id} failed: {exit_reason(code)}{hint}")
    if count > 1:
        log.unlink()
    return to_result(workers.reports, job.unit.id, log, debug=debug)


def to_result(reports: dict[int, dict[str, Any]], unit: str, log: Path, *, debug: bool) -> Result:
    """Combine the reports (by rank) of a job's processes; facts and seconds are those of rank 0.

    Raises StageError with the first error if any process failed, after writing the tracebacks to `log`.
    """
    failed = sorted((rank for rank in reports if "line" in reports[rank]), key=lambda rank: reports[rank]["time"])
    if not failed:
        gpu = [report["gpu_peak_mb"] for report in reports.values() if report["gpu_peak_mb"] is not None]
        memory = round(sum(report["peak_mb"] for report in reports.values()), 1)
        return Result(**{**reports[0], "peak_mb": memory, "gpu_peak_mb": max(gpu, default=None)})
    first = reports[failed[0]]
    traces = [f"process {rank}:\n{reports[rank]['trace']}" for rank in failed]
    trace = first["trace"] if failed == [0] else "\n".join(traces)
    sys.stderr.write(trace if debug else "")
    where = f"traceback in {log}"
    try:
        write_atomic(log, trace)
    except OSError as error:  # such as a full disk; the stage's own error is more important
        where = f"the traceback could not be written to {log}: {error.strerror}"
    hint = "" if first["known"] else f" ({'' if debug else 'add --debug to see the traceback; '}{where})"
    raise (OutOfMemory if first["out_of_memory"] else StageError)(f"{unit} failed: {first['line']}{hint}")


class _Workers:
    """A job's processes: connections, ids, reports. `process` is the only one, or the launcher of several."""

    def __init__(self, job: Job, server: socket.socket, process: Any) -> None:
        self.job, self.server, self.process = job, server, process
        self.connections: dict[Connection, int] = {}
        self.pids: list[int] = []
        self.reports: dict[int, dict[str, Any]] = {}
        """Rank → the report of that process."""

    def serve(self) -> None:
        """Give the job to each process that connects and receive its report, until `process` has ended."""
        while (ready := wait([self.server, *self.connections, self.process.sentinel])) != [self.process.sentinel]:
            for one in ready:
                if one is self.server:
                    self._accept()
                elif isinstance(one, Connection):
                    self._receive(one)

    def _accept(self) -> None:
        connection = Connection(self.server.accept()[0].detach())
        with contextlib.suppress(OSError, EOFError):  # if the process has ended, its exit code is reported
            rank, pid = connection.recv()
            connection.send((self.job, PRELOAD))
            self.connections[connection] = rank
            self.pids.append(pid)

    def _receive(self, connection: Connection) -> None:
        try:
            self.reports[self.connections[connection]] = connection.recv()
        except (OSError, EOFError):
            del self.connections[connection]
            connection.close()

    def end(self) -> None:
        """Send SIGTERM to the processes, and SIGKILL after GRACE seconds or a second signal.

        The launcher gets no SIGTERM, because it would kill the processes after 30 seconds.
        """
        if self.process.pid is None:
            return
        try:
            _send(signal.SIGTERM, self.pids or [self.process.pid])
            self.process.join(GRACE)
        finally:
            if self.process.exitcode is None:
                _send(signal.SIGKILL, [self.process.pid, *self.pids])
                self.process.join()


def _send(number: int, pids: Iterable[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _forked(job: Job, address: str) -> Any:
    """A process to be forked from the fork server, which is started first if it is not running."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # the fork server ignores Ctrl-C
    try:
        forkserver.ensure_running()
    finally:
        signal.signal(signal.SIGINT, before)
    return context.Process(target=worker.main, args=(address,), name=job.unit.id)


def _launched(job: Job, address: str, log: Path) -> Any:
    """A process that runs `accelerate launch`, which starts the recipe's num_processes processes."""
    log.parent.mkdir(parents=True, exist_ok=True)
    arguments = (launch_command(job.recipe, address), str(log))
    return multiprocessing.get_context("spawn").Process(target=_exec_launcher, args=arguments, name=job.unit.id)


def _set_environment(recipe: Recipe) -> None:
    """Set the processes' environment. Python 3.11's fork server finds modules only through PYTHONPATH."""
    package = str(Path(__file__).resolve().parents[2])
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if package not in paths:
        os.environ["PYTHONPATH"] = os.pathsep.join([*filter(None, paths), package])
    if recipe.threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(recipe.threads)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def launch_command(recipe: Recipe, address: str) -> list[str]:
    """The command line of `accelerate launch`."""
    config = bundled_folder("recipes") / "accelerate" / f"{recipe.accelerate}.yaml"
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // recipe.num_processes)))
    return [
        *(sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)),
        *("--num_processes", str(recipe.num_processes), "--num_cpu_threads_per_process", threads),
        *("--main_process_port", "0", "-m", "salsa_peft.recipe.worker", address),
    ]


def _exec_launcher(command: list[str], log: str) -> None:
    """Replace this process by the launcher, in a session that Ctrl-C does not reach.

    The launcher's standard output is the command's standard error. Its standard error is the log, where it writes the
    exit codes of failed processes.
    """
    os.setsid()
    os.dup2(2, 1)
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), 2)
    os.execv(command[0], command)


def exit_reason(code: int | None) -> str:
    """Text that says how a process without a report has ended."""
    if code is None or code >= 0:
        return f"its process ended with code {code} and without a result"
    name = signal.Signals(-code).name
    hint = ", perhaps for lack of memory; a smaller micro_batch_size needs less memory" if name == "SIGKILL" else ""
    return f"its process was killed by {name}{hint}"


@contextlib.contextmanager
def raise_on_sigterm() -> Iterator[None]:
    """Context in which SIGTERM raises Terminated, so that files are closed and processes are ended."""

    def stop(*_: Any) -> None:
        raise Terminated

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
