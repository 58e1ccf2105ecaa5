"""UpdateTable: prints a row for each PPO update, where Transformers would print a dict of all metrics."""

from __future__ import annotations

import collections
import statistics
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console
from transformers import PrinterCallback, ProgressCallback

from salsa_peft.models.stage_context import ProgressBar
from salsa_peft.training.ppo.terminal.table import MISSING, Column, cells, columns_for, header, log_line, number
from salsa_peft.utils.console import styled, wrapped

if TYPE_CHECKING:
    from transformers import Trainer

WINDOW = 20
"""Number of the newest updates whose mean duration gives the time that is left."""
NOT_SHOWN = ("loss", "train_runtime")
"""Keys of Trainer's own logs, which are not printed: its mean loss every logging_steps, and its speeds at the end."""


def replace_printers(trainer: Trainer) -> UpdateTable:
    """Replace Transformers' callbacks that print by an UpdateTable and, unless args.disable_tqdm, a progress bar.

    In a notebook, the progress bar of Transformers stays.
    """
    shows_bar = any(isinstance(callback, ProgressCallback) for callback in trainer.callback_handler.callbacks)
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    table = UpdateTable()
    trainer.add_callback(table)
    if shows_bar:
        trainer.add_callback(ProgressBar("PPO", beside_table=True))
    return table


def close_bars(trainer: Trainer) -> None:
    """Close the progress bars that are still open, so that the traceback of an interruption starts on a line of its own."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, ProgressBar):
            callback.close()


class UpdateTable(PrinterCallback):
    """Callback that prints the metrics of each update on standard output, in the first process only.

    On a terminal it prints a row of a table with as many columns as fit, and the header again once per screen, after other
    output, and after a change of the terminal's width. Elsewhere it prints a line with names and values. Other logs, such
    as those of evaluations, are printed as names and values. `trainer.remove_callback(PrinterCallback)` removes it.
    """

    def __init__(self) -> None:
        self.name = ""
        """What is trained; it starts the lines of a log."""
        self.header_due = True
        """Whether to print the header before the next row. Set it after other output."""
        self._shown: tuple[list[Column], int] | None = None
        self._rows = 0
        self._durations: collections.deque[float] = collections.deque(maxlen=WINDOW)
        self._last = 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Forget the times of an earlier call of train()."""
        self._durations.clear()
        self.header_due = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Print a row for an update's metrics, and a line for other logs."""
        if not logs or not state.is_world_process_zero:
            return
        if "update" not in logs:
            if not any(key in logs for key in NOT_SHOWN):
                self._print_others(logs, state.global_step)
            return
        updates_left = (state.max_steps - state.global_step) / args.steps_per_update
        left = self._seconds_per_update(logs)
        row = {
            **logs,
            "step": state.global_step,
            "steps": state.max_steps,
            "left": None if left is None else left * updates_left,
        }
        if sys.stdout.isatty():
            self._print_row(row, critic=args.has_critic)
        else:
            self._write(f"{self.name}  " * bool(self.name) + log_line(row, critic=args.has_critic))

    def _seconds_per_update(self, logs: Mapping[str, Any]) -> float | None:
        """The mean duration of the newest updates of this process, with evaluations and checkpoints between them.

        Of the first update, `seconds` is used, which includes the time before a resume within the update.
        """
        now = time.perf_counter()
        duration = now - self._last if self._durations else logs.get("seconds")
        self._last = now
        if duration is not None:
            self._durations.append(duration)
        return statistics.fmean(self._durations) if self._durations else None

    def _print_row(self, row: Mapping[str, Any], *, critic: bool) -> None:
        size = Console(file=sys.stdout).size
        layout = columns_for(row, size.width, critic=critic)
        lines = []
        if self.header_due or layout != self._shown or self._rows >= max(size.height - 3, 10):
            lines.append(styled(header(*layout), "bold", sys.stdout))
            self._shown, self._rows, self.header_due = layout, 0, False
        self._write("\n".join([*lines, cells(row, *layout)]))
        self._rows += 1

    def _print_others(self, logs: Mapping[str, Any], step: int) -> None:
        values = (
            f"{key} {MISSING if value is None else number(value, 9, 4) if isinstance(value, int | float) else value}"
            for key, value in logs.items()
            if key != "epoch"
        )
        parts = [self.name, f"step {step}", *values] if self.name else [f"step {step}", *values]
        text = "  ".join(part.replace(" ", "\u00a0") for part in parts)  # so that a name and its value stay together
        self._write(wrapped(text, sys.stdout).replace("\u00a0", " "))
        self.header_due = True

    @staticmethod
    def _write(text: str) -> None:
        """Write to standard output, above progress bars."""
        from tqdm import tqdm

        with tqdm.external_write_mode(file=sys.stdout):
            sys.stdout.write(f"{text}\n")
            sys.stdout.flush()
