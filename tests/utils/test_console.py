"""Messages in colour on terminals, errors on a line of their own, and Ctrl-C in a command and its processes."""

from __future__ import annotations

import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from typing import Any

import pytest
from paths import ROOT

from salsa_peft.cli import main as commands
from salsa_peft.utils.console import complain, say


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        """Yes."""
        return True


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """Ctrl-C is not ignored, here and in processes that a test starts. A shell ignores it in what it runs in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """A terminal of 40 columns with colours."""
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "40")
    return Terminal()


def test_colours_on_a_terminal_only(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    """Markup is text; lines are wrapped between words on a terminal only."""
    monkeypatch.setattr(sys, "stderr", terminal)
    line = "warning: [red]x[/red] " + 10 * "word "
    say("warning: [red]x[/red]", "yellow")
    assert terminal.getvalue() == "\x1b[33mwarning: [red]x[/red]\x1b[0m\n"
    say(line)
    assert terminal.getvalue().splitlines()[1:] == [
        "warning: [red]x[/red] word word word",
        "  word word word word word word word",
    ]
    plain: Any = io.StringIO()
    monkeypatch.setattr(sys, "stderr", plain)
    say(line, "yellow")
    complain("wrong")
    assert plain.getvalue() == f"{line}\nwrong\n"


def test_a_word_that_is_longer_than_a_line_stays_whole(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a path can be copied."""
    monkeypatch.setattr(sys, "stderr", terminal)
    path = "/a/long-path" * 5
    say(f"the file {path} is missing")
    assert terminal.getvalue().splitlines() == ["the file", f"  {path}", "  is missing"]


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_no_colours_where_they_are_not_wanted(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv(name, value)
    say("warning", "yellow")
    assert "\x1b" not in terminal.getvalue().replace("\x1b[0m", "")


def test_an_error_erases_the_rest_of_a_bar(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", terminal)
    sys.stderr.write("sft:  21%|███")
    complain("stopped")
    assert terminal.getvalue() == "sft:  21%|███\r\x1b[J\x1b[31mstopped\x1b[0m\n"


def test_ctrl_c_in_any_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Also while its modules are imported."""

    def interrupted(name: str) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(commands.importlib, "import_module", interrupted)
    assert commands.main(["hub", "push"]) == 130
    assert capsys.readouterr().err == "salsa hub: interrupted\n"


INTERRUPTED = """
import sys, time
from pathlib import Path
from salsa_peft.recipe import __main__ as recipe, run
def work(*args, **options):
    from multiprocessing import get_context
    from salsa_peft.recipe import worker
    context = get_context("forkserver")
    process = context.Process(target=bar)
    process.start()
    try:
        process.join()
    finally:
        process.terminate()
        process.join()
def bar():
    import signal
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    from salsa_peft.utils.console import progress_bar
    with progress_bar(10, "toy"):
        time.sleep(60)
if __name__ == "__main__":
    recipe.run = work
    sys.exit(recipe.main(["quickstart", "--lora", "--output-dir", sys.argv[1]]))
"""


def test_ctrl_c_leaves_a_clean_line(tmp_path: Any) -> None:
    """The process with the bar is killed; nothing is said of semaphores, ^C is not printed, and the terminal is as before."""
    script = tmp_path / "script.py"
    script.write_text(INTERRUPTED)
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(ROOT)
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "PYTHONWARNINGS": "default"}
        # a shell that outlives the command, as the user's does: with it the terminal's processes would end too
        shell = ["sh", "-c", 'trap : INT; "$@"; echo "code $?"; sleep 1', "sh"]
        os.execvpe("sh", [*shell, sys.executable, str(script), str(tmp_path / "run")], environment)
    before, text, sent, end = termios.tcgetattr(terminal)[3], b"", False, time.monotonic() + 120
    while time.monotonic() < end:
        if not select.select([terminal], [], [], 1)[0]:
            continue
        try:
            text += os.read(terminal, 10_000)
        except OSError:  # the terminal is closed
            break
        if b"0/10" in text and not sent:
            quiet = termios.tcgetattr(terminal)[3]
            os.write(terminal, b"\x03")
            sent = True
    os.waitpid(pid, 0)
    os.close(terminal)
    shown = re.sub(r"\x1b\[[0-9;]*m", "", text.decode())
    assert before & termios.ECHOCTL
    assert not quiet & termios.ECHOCTL
    assert shown.endswith("\r\x1b[Jstopped; run the same command again to continue\r\ncode 130\r\n")
    assert "^C" not in shown and time.monotonic() < end - 60
    assert "leaked" not in shown


def test_a_command_in_the_background_does_not_touch_the_terminal() -> None:
    """The kernel would stop it."""
    script = (
        "from salsa_peft.utils.console import no_echo_of_control_characters as quiet\nwith quiet():\n    print('done')"
    )
    main, terminal = os.openpty()
    found = subprocess.run(
        [sys.executable, "-c", script], stdin=terminal, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT,
        start_new_session=True, timeout=60,
    )  # fmt: skip
    os.close(terminal)
    os.close(main)
    assert found.stdout == "done\n"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
