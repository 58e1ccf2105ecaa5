"""What each of a stage's processes runs that `accelerate launch` started: the stage's function, as the forked process of one does.

    python -m salsa_peft.worker FOLDER

The first process speaks for all: what the others print is in the launcher's log, and what libraries print in C is there for all.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import warnings
from pathlib import Path

from salsa_peft import launching, processes
from salsa_peft.utils.files import write_atomic


def main(folder: Path) -> None:
    """Do the job in FOLDER and leave a report there. Ends the process: torch's own end would wait for others that are gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    launching.end_with_command(folder)
    rank = int(os.environ["RANK"])
    write_atomic(folder / f"pid-{rank}", str(os.getpid()))
    if rank == 0:  # the launcher's standard output is the command's standard error
        sys.stderr = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8", errors="backslashreplace")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    job, preload = launching.read_job(folder)
    for module in preload:
        importlib.import_module(module)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.")  # DeepSpeed calls what torch renamed
    report = processes.worked(job)
    launching.write_report(folder, rank, report)
    if "line" in report:
        sys.stderr.flush()
        os._exit(1)
    if "torch" in sys.modules and sys.modules["torch"].distributed.is_initialized():
        sys.modules["torch"].distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
