"""The commands' argument parser, messages on standard error, Ctrl-C, and progress bars. Imports no torch."""

import argparse
import contextlib
import io
import logging
import os
import sys
import textwrap
import threading
import warnings
from collections.abc import Iterator
from typing import Any, NoReturn

from salsa_peft.utils.messages import did_you_mean, one_line

INTERVAL = 10.0
"""Seconds between two progress lines if standard error is not a terminal."""
NOISY_LOGGERS = ("torchao", "bitsandbytes", "torch.utils._pytree")
"""Loggers of libraries that warn at import about features that this machine does not support."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, with exit code 2. Options cannot be abbreviated."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Print the error in one line and exit with code 2. For an unknown option, name the nearest option."""
        _, _, unknown = message.partition("unrecognized arguments: ")
        if unknown:
            words = unknown.split()
            word = next((word for word in words if word.startswith("-")), words[0]).partition("=")[0]
            options = [option for action in self._actions for option in action.option_strings]
            if word.startswith("-"):
                message = f"{word}: no such option; {did_you_mean(word, options, 'options')}"
            else:
                message = f"{word}: unexpected argument; put positional arguments before the options"
        self.exit(2, f"{self.prog}: {one_line(message).removeprefix('argument ')}; see {self.prog} --help\n")


def say(line: str, style: str = "") -> None:
    """Print a line on standard error and flush it. On a terminal, it is wrapped between words, and has a style of rich.

    The environment variables NO_COLOR and TERM have the meaning that rich gives them.
    """
    print(styled(wrapped(line, sys.stderr), style, sys.stderr), file=sys.stderr, flush=True)


def wrapped(line: str, stream: Any, indent: int = 2) -> str:
    """The line, and if the stream is a terminal, wrapped between words, with `indent` spaces before further lines.

    A word that is longer than a line, such as a path, stays whole.
    """
    if not stream.isatty():
        return line
    width = columns(stream)
    if len(line) <= width:
        return line
    return textwrap.fill(line, width, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)


def columns(stream: Any) -> int:
    """The width of the stream's terminal."""
    from rich.console import Console

    return Console(file=stream).width


def styled(text: str, style: str, stream: Any) -> str:
    """The text with the escape sequences of a style of rich if the stream is a terminal, else the text itself."""
    if not (style and stream.isatty()):
        return text
    from rich.console import Console
    from rich.text import Text

    console = Console(file=stream)
    with console.capture() as captured:
        console.print(Text(text, style=style), soft_wrap=True, end="")
    return captured.get()


def complain(line: str) -> None:
    """Print an error in red on standard error, on a line of its own: a bar that was interrupted is erased."""
    if sys.stderr.isatty():
        sys.stderr.write("\r\x1b[J")  # to the end of the screen
    say(line, "red")


@contextlib.contextmanager
def no_echo_of_control_characters() -> Iterator[None]:
    """Context in which the terminal does not print ^C for Ctrl-C, which would break the line of a progress bar.

    Nothing is changed for a process in the background, which the kernel would stop.
    """
    import termios

    def in_foreground() -> bool:
        try:
            return sys.stdin is not None and os.tcgetpgrp(sys.stdin.fileno()) == os.getpgrp()
        except (OSError, ValueError):  # no terminal, another session's terminal, or closed
            return False

    if not in_foreground():
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    quiet = [*before[:3], before[3] & ~termios.ECHOCTL, *before[4:]]
    termios.tcsetattr(sys.stdin, termios.TCSANOW, quiet)
    try:
        yield
    finally:
        if in_foreground():
            termios.tcsetattr(sys.stdin, termios.TCSANOW, before)


def silence_import_warnings() -> None:
    """Hide import warnings of NOISY_LOGGERS and Transformers. Call it before importing these libraries."""
    for name in NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.")


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Context, or decorator of a function, in which the warnings of `silence_import_warnings` are hidden."""
    loggers = [logging.getLogger(name) for name in NOISY_LOGGERS]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        silence_import_warnings()
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


@contextlib.contextmanager
def progress_bar(total: int, description: str, *, interval: float = INTERVAL) -> Iterator[Any]:
    """Show a tqdm bar on standard error; without a terminal, print a line every `interval` seconds.

    Lines printed on standard error in the meantime appear above the bar. Bars can be nested.
    """
    from tqdm import tqdm
    from tqdm.contrib import DummyTqdmFile

    use_thread_lock()
    options: dict[str, Any] = {"total": total, "desc": description, "miniters": 1}
    if not sys.stderr.isatty():
        with tqdm(**options, file=_Lines(), mininterval=interval, delay=interval, position=0, ascii=True) as bar:
            yield bar
        return
    outer = sys.stderr if isinstance(sys.stderr, DummyTqdmFile) else None
    above: Any = outer or DummyTqdmFile(sys.stderr)
    with (
        tqdm(**options, file=above.wrapper_getattr("_wrapped"), leave=outer is None, **_width()) as bar,
        contextlib.redirect_stderr(above),
    ):
        yield bar


def use_thread_lock() -> None:
    """Let tqdm lock with threads only.

    Its default lock is also for several processes: a named semaphore, which a process that is killed leaks.
    """
    from tqdm import tqdm

    if "_lock" not in vars(tqdm):
        tqdm.set_lock(threading.RLock())


def _width() -> dict[str, Any]:
    """tqdm's options for the width of a bar. Some terminals have no size (0 × 0), which tqdm would take literally."""
    try:
        known = all(os.get_terminal_size(sys.__stderr__.fileno()))  # type: ignore[union-attr]
    except (OSError, ValueError, AttributeError):
        known = False
    return {"dynamic_ncols": True} if known else {"ncols": 80, "nrows": 24}


class _Lines(io.StringIO):
    """A stream that prints each state of a progress bar as a line on standard error."""

    def write(self, text: str) -> int:
        if text.strip():
            say(text.strip())
        return len(text)
