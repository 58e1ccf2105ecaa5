"""What commands write to a terminal: one-line errors of their arguments, and progress bars. Imports no torch."""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
import time
import warnings
from collections.abc import Iterator
from typing import Any, Protocol, TextIO

from salsa_peft.utils.messages import one_line


class Parser(argparse.ArgumentParser):
    """One line for an error, code 2."""

    def error(self, message: str) -> Any:
        """Print it and leave."""
        self.exit(2, f"{self.prog}: {one_line(message)} (--help says more)\n")


def say(line: str) -> None:
    """To standard error, at once."""
    print(line, file=sys.stderr, flush=True)


EVERY = 10.0  # seconds between lines where there is no terminal
NOTES = ("torchao", "bitsandbytes", "torch.utils._pytree")
"""Loggers of libraries that say on import what this machine can't use of theirs."""


def silence_import_warnings() -> None:
    """What NOTES say below an error, and what Transformers will rename of its own, is not shown; call it before they are imported."""
    for name in NOTES:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.")


class Update(Protocol):
    """Move a bar on by `n`, or to `done`, and say figures beside it; `total` and `what` can change on the way."""

    def __call__(
        self,
        n: int = 1,
        *,
        done: int | None = None,
        total: int | None = None,
        what: str | None = None,
        **figures: float | str,
    ) -> None: ...


@contextlib.contextmanager
def bar(total: int, what: str, *, stream: TextIO | None = None, every: float = EVERY) -> Iterator[Update]:
    """A loop of `total` rounds; gives the function that moves it on. Bars may stand inside one another."""
    stream = sys.stderr if stream is None else stream
    with _rich(total, what, stream) if stream.isatty() else _lines(total, what, stream, every) as update:
        yield update


_open: list[Any] = []  # the terminal's one live display, which inner bars join


@contextlib.contextmanager
def _rich(total: int, what: str, stream: TextIO) -> Iterator[Update]:
    from rich import progress
    from rich.console import Console

    inner = bool(_open)
    if inner:
        display = _open[-1]
    else:
        left = progress.TimeRemainingColumn()
        columns = (
            "{task.description}",
            progress.BarColumn(24),
            progress.MofNCompleteColumn(),
            left,
            "{task.fields[figures]}",
        )
        display = progress.Progress(*columns, console=Console(file=stream))
        display.start()
    _open.append(display)
    task = display.add_task(what, total=total, figures="")

    def update(
        n: int = 1,
        *,
        done: int | None = None,
        total: int | None = None,
        what: str | None = None,
        **figures: float | str,
    ) -> None:
        shown = {"figures": _figures(figures)} if figures else {}
        moved = {"advance": n} if done is None else {"completed": done}
        display.update(task, total=total, description=what, **moved, **shown)

    try:
        yield update
    finally:
        _open.pop()
        if inner:
            display.remove_task(task)
        else:
            display.stop()


@contextlib.contextmanager
def _lines(total: int, what: str, stream: TextIO, every: float) -> Iterator[Update]:
    start = said = time.monotonic()
    count, shown, text = 0, 0, ""
    whole, name = total, what

    def line() -> None:
        spent = time.monotonic() - start
        left = f"{clock(spent / count * (whole - count))} left" if 0 < count < whole else f"{clock(spent)} so far"
        share = f"{count / whole:.0%}" if whole else ""
        print(f"{name}  {count}/{whole}  {share}  {left}  {text}".rstrip(), file=stream, flush=True)

    def update(
        n: int = 1,
        *,
        done: int | None = None,
        total: int | None = None,
        what: str | None = None,
        **figures: float | str,
    ) -> None:
        nonlocal count, said, shown, text, whole, name
        count = count + n if done is None else done
        whole, name = whole if total is None else total, what or name
        text = _figures(figures) if figures else text
        if time.monotonic() - said >= every:
            said, shown = time.monotonic(), count
            line()

    yield update
    if time.monotonic() - start >= every and shown != count:
        line()


def _figures(figures: dict[str, float | str]) -> str:
    return "  ".join(f"{name} {value if isinstance(value, str) else f'{value:.4g}'}" for name, value in figures.items())


def clock(seconds: float) -> str:
    """1:05 or 2:01:05."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"
