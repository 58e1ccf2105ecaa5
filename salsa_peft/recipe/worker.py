"""A stage's process: receives a job from the command, runs it, and reports the result or the error.

`python -m salsa_peft.recipe.worker ADDRESS` does the same in each process of `accelerate launch`. ADDRESS is a Unix
socket of the command. The connection closes when the command ends, even by kill -9, and the process then kills itself.
"""

import contextlib
import importlib
import json
import os
import resource
import signal
import socket
import sys
import threading
import time
import traceback
import warnings
from multiprocessing.connection import Connection, wait
from typing import Any

from salsa_peft.config.job import Job
from salsa_peft.utils.errors import SalsaError
from salsa_peft.utils.files import disk_full_message
from salsa_peft.utils.hub import explain_hub_error, pinned
from salsa_peft.utils.oom import is_out_of_memory


def main(address: str, *, launched: bool = False) -> None:
    """Run one job. launched: whether `accelerate launch` started this process as one of several."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the command ends this one
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    connection, job, preload = receive_job(address, int(os.environ["RANK"]) if launched else 0)
    _redirect_output(launched)
    for module in preload:
        importlib.import_module(module)
    if launched:
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.")  # DeepSpeed uses deprecated names
    if job.recipe.threads is not None and "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(job.recipe.threads)
    with pinned(job.recipe.model_revisions):
        report = run_stage(job)
    with contextlib.suppress(BrokenPipeError):
        connection.send(report)
    if launched and "line" in report:
        sys.stderr.flush()
        os._exit(1)  # torch's own exit handlers would wait for processes that have already failed
    if launched and "torch" in sys.modules and sys.modules["torch"].distributed.is_initialized():
        sys.modules["torch"].distributed.destroy_process_group()


def receive_job(address: str, rank: int) -> tuple[Connection, Job, list[str]]:
    """The connection to the command, the job, and the modules to import first.

    Ends this process if the command is gone.
    """
    client = socket.socket(socket.AF_UNIX)
    try:
        client.connect(address)
        connection = Connection(client.detach())
        connection.send((rank, os.getpid()))
        job, preload = connection.recv()
    except (OSError, EOFError):
        os._exit(1)

    def watch() -> None:
        wait([connection])  # the command sends nothing more, so the connection is readable only when it is closed
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True, name="ends with the command").start()
    return connection, job, preload


def _redirect_output(launched: bool) -> None:
    """Send standard output to standard error, because the command's standard output is only for results.

    The launcher's standard output is the command's standard error. Of several processes only rank 0 writes there; the
    output of the other ranks goes to the launcher's log.
    """
    if launched and os.environ["RANK"] == "0":
        sys.stderr = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8", errors="backslashreplace")
    os.dup2(2, 1)
    if launched:
        sys.stdout = sys.stderr


def run_stage(job: Job) -> dict[str, Any]:
    """Call a job's stage function and return a report: facts and costs, or the error."""
    start = time.perf_counter()
    try:
        module, name = job.unit.run.split(":")
        facts = getattr(importlib.import_module(module), name)(job)
        json.dumps(facts, allow_nan=False)
        seconds = round(time.perf_counter() - start, 3)
        return {"facts": facts, "seconds": seconds, "peak_mb": round(peak_mb(), 1), "gpu_peak_mb": gpu_peak_mb()}
    except Exception as error:
        known = str(error) if isinstance(error, SalsaError) else explain_hub_error(error, job.recipe.model.base)
        known = known or disk_full_message(error, job.folder)
        line = known or f"{type(error).__name__}: {error}"
        return {
            "line": " ".join(line.split())[:1000],
            "known": known is not None,
            "trace": traceback.format_exc(),
            "out_of_memory": is_out_of_memory(error),
            "time": time.time(),
        }


def peak_mb() -> float:
    """Peak resident memory of this process so far, in MB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == "darwin" else 1e3)


def gpu_peak_mb() -> float | None:
    """Peak GPU memory that PyTorch's allocator reserved in this process, in MB; None if it used no GPU."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return None
    return round(torch.cuda.max_memory_reserved() / 1e6, 1)


if __name__ == "__main__":
    main(sys.argv[1], launched=True)
