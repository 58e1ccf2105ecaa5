"""Runs several tasks at the same time, each in a process of its own, and prints their lines with their names.

A task's process is spawned, not forked, and may start processes itself. Its output goes through a pipe to this process,
so that lines of two tasks are never mixed, and its progress bars become lines. It ends when this process ends, even by
kill -9. torch is not imported.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

from salsa_peft.recipe.parallel.outcome import EXPECTED, Outcome, outcome
from salsa_peft.recipe.processes import Terminated, exit_reason, raise_on_sigterm
from salsa_peft.utils.console import complain, say
from salsa_peft.utils.messages import one_line

CHUNK = 1 << 16
"""Maximum number of bytes that are read from a pipe at once."""


class Task(NamedTuple):
    """A call that runs in a process of its own."""

    name: str
    """Name in front of its lines, such as "replicate 2"."""
    call: Callable[[], None]
    """Picklable."""
    folder: Path
    """Folder of the task, for messages about the disk."""
    debug: bool = False
    """Whether the traceback of an error is printed."""


def run_together(
    tasks: Sequence[Task], slots: Sequence[Mapping[str, str]], finished: Callable[[Task], None]
) -> dict[str, Outcome]:
    """Run tasks, as many at a time as there are slots, in the order given; returns the outcomes of those that failed.

    slots: environment variables of the tasks that run in each slot. finished: called when a task has ended without an
    error. A failed task does not stop the others. Any exception here, such as Ctrl-C, first stops all tasks by SIGTERM; a
    second one kills them.
    """
    waiting, free = list(tasks), list(slots)
    running: list[_Process] = []
    failed: dict[str, Outcome] = {}
    try:
        while waiting or running:
            while waiting and free:
                running.append(_Process(waiting.pop(0), free.pop(0)))
            for process in _step(running):
                free.append(process.slot)
                if (found := process.outcome()) is None:
                    finished(process.task)
                else:
                    failed[process.task.name] = found
    except BaseException:
        _stop(running)
        raise
    return failed


def _step(running: list["_Process"]) -> list["_Process"]:
    """Wait until there is output or a process has ended; print the output, and take out those that have ended."""
    there = wait([one for process in running for one in (process.output, process.process.sentinel) if one is not None])
    ended = []
    for process in list(running):
        if process.output in there:
            process.read()
        if process.process.sentinel in there:
            process.end()
            running.remove(process)
            ended.append(process)
    return ended


def _stop(running: list["_Process"]) -> None:
    """End all processes, and print what they say meanwhile. A second signal kills them."""
    for process in running:
        process.process.terminate()
    try:
        while running:
            _step(running)
    finally:
        for process in running:
            process.process.kill()


class _Process:
    """The process of one task, and the pipes from it."""

    def __init__(self, task: Task, slot: Mapping[str, str]) -> None:
        self.task, self.slot = task, slot
        self.output: Connection | None
        self.output, output = multiprocessing.Pipe(duplex=False)
        self.reply, reply = multiprocessing.Pipe(duplex=False)
        self.rest = b""
        """The beginning of a line whose end has not been read yet."""
        context = multiprocessing.get_context("spawn")
        self.process: Any = context.Process(target=_run, args=(task, dict(slot), output, reply), name=task.name)
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches this process, which ends the others
        try:
            self.process.start()
        finally:
            signal.signal(signal.SIGINT, before)
            output.close()
            reply.close()

    def read(self) -> None:
        """Print the whole lines that have come, each with the task's name. A bar's line is shown as it was last."""
        assert self.output is not None
        chunk = os.read(self.output.fileno(), CHUNK)
        *lines, self.rest = (self.rest + chunk).split(b"\n")
        self._print(lines)
        if not chunk:
            self._close()

    def end(self) -> None:
        """Print the rest of the output of a process that has ended."""
        self.process.join()
        if self.output is not None:
            os.set_blocking(self.output.fileno(), False)  # a process that the task started may keep the pipe open
            with contextlib.suppress(BlockingIOError):
                while self.output is not None:
                    self.read()
        self._close()

    def _close(self) -> None:
        if self.output is not None:
            self.output.close()
            self.output = None
            self._print([self.rest] if self.rest else [])
            self.rest = b""

    def _print(self, lines: Sequence[bytes]) -> None:
        for line in lines:
            shown = line.rstrip(b"\r").rpartition(b"\r")[2].decode("utf-8", "replace").rstrip()
            say(f"[{self.task.name}] {shown}".rstrip())

    def outcome(self) -> Outcome | None:
        """How the task failed; None if it did not."""
        code = self.process.exitcode
        try:
            found: Outcome | None = self.reply.recv() if self.reply.poll() else None
        except EOFError:
            found = None
        self.reply.close()
        return found if found is not None or code == 0 else Outcome(1, [exit_reason(code)])


def _run(task: Task, environment: Mapping[str, str], output: Connection, reply: Connection) -> None:
    """Run a task in this new process, and send its outcome if it failed."""
    for number in (1, 2):
        os.dup2(output.fileno(), number)
    output.close()
    os.environ.update(environment)
    threading.Thread(target=_end_with_parent, daemon=True, name="ends with the command").start()
    try:
        with raise_on_sigterm():
            task.call()
    except EXPECTED as error:
        if task.debug and not isinstance(error, Terminated):
            traceback.print_exc()
        found = outcome(error, task.folder)
        if not isinstance(error, Terminated):
            for line in found.lines:
                complain(one_line(line))
        reply.send(found)
        sys.exit(found.code)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGKILL)
