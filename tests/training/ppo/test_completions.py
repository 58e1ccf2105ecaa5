"""Completions on a terminal, beside a bar, and in a log; text that would rather be commands."""

from __future__ import annotations

import io
import re
import sys
import unicodedata

import pytest
from rich.cells import cell_len

from salsa_peft.training.ppo.terminal.completions import PIPE_WIDTH, print_samples, printable
from salsa_peft.utils.console import progress_bar

STYLES = re.compile(r"\x1b\[[0-9;]*m")  # colours, the only escape sequences of a table
HOSTILE = "\x1b[2J\x1b]0;title\x07\x1b]8;;http://x\x1b\\link\x9b31m\r\b\x7f\t\x00\x85\u2028\u2029\u202edcba\u2066\u200f\ue000\ud800\ufeff"


class Terminal(io.StringIO):
    """A stream that says it is one."""

    def isatty(self) -> bool:
        """Yes."""
        return True


@pytest.fixture(autouse=True)
def width(monkeypatch: pytest.MonkeyPatch) -> int:
    """Columns of the terminal."""
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "xterm-256color")
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    return 100


def row(prompt: str = "Why?", response: str = "Because.", score: float = 0.8125, kl: float = 4.104) -> dict:
    """One of completions.jsonl."""
    return {"update": 3, "prompt": prompt, "response": response, "score": score, "kl": kl}


def shown(*rows: dict, terminal: bool = True) -> str:
    """What `print_samples` writes, without colours."""
    stream = Terminal() if terminal else io.StringIO()
    print_samples(rows, 3, stream)
    return STYLES.sub("", stream.getvalue())


def test_a_table_on_a_terminal():
    lines = [line.split() for line in shown(row(), row("Who?", "Me.", -1.0, -0.5)).splitlines()]
    assert lines[0] == ["update", "3"]
    assert ["score", "KL", "prompt", "response"] in lines
    assert ["0.812", "4.10", "Why?", "Because."] in lines
    assert ["-1.000", "-0.50", "Who?", "Me."] in lines


def test_one_line_each_without_a_terminal():
    text = shown(row(), row("Who\nare you?", "Me,\r\nand you.", -1.0, -0.5), terminal=False)
    assert text == (
        "update 3  score 0.812  KL 4.10  Why? → Because.\n"
        "update 3  score -1.000  KL -0.50  Who⏎are you? → Me,⏎and you.\n"
    )
    assert r" Why \x1b[2J? → " in shown(row("Why \x1b[2J?"), terminal=False)


def test_a_line_break_in_a_text_is_shown_as_a_sign():
    text = shown(row("Who\nare you?", "Me,\r\nand you."))
    assert "Who⏎are you?" in text and "Me,⏎and you." in text


def test_nothing_of_nothing():
    assert shown() == ""
    assert shown(terminal=False) == ""


def test_standard_error_unless_another_stream_is_given(capsys: pytest.CaptureFixture[str]):
    print_samples([row()], 3)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Because." in captured.err


@pytest.mark.parametrize("terminal", [True, False])
def test_what_a_model_writes_is_no_command(terminal: bool):
    """Colours, titles, links, carriage returns, changes of direction: all of it is seen, none obeyed, none an encoding error."""
    text = shown(row(HOSTILE, HOSTILE), terminal=terminal)
    assert {char for char in text if unicodedata.category(char)[0] == "C"} == {"\n"}
    assert not set(text) & set("\u2028\u2029")
    assert r"\x1b[2J" in text
    text.encode("utf-8")


def test_every_hostile_character_is_its_escape():
    """A backslash is itself; it does nothing."""
    assert printable(HOSTILE) == HOSTILE.encode("unicode_escape").decode().replace("\\\\", "\\")
    assert printable("a\r\nb\nc") == "a⏎b⏎c"


def test_other_peoples_letters_stay_as_they_are():
    """Joiners too: Persian and emoji are written with them."""
    text = "naïve e\u0301 日本　語 می\u200cخواهم \U0001f468\u200d\U0001f469\ufe0f "
    assert printable(text) == text


@pytest.mark.parametrize("terminal", [True, False])
def test_markup_and_emoji_codes_are_text(terminal: bool):
    text = shown(row("[bold]x[/bold]", "[red]a[/red] [/] :smile: [link=http://x]y[/link]"), terminal=terminal)
    assert "[bold]x[/bold]" in text
    assert "[red]a[/red] [/] :smile: [link=http://x]y" in text


def test_the_end_of_a_prompt_and_the_start_of_a_response():
    """For the question stands at the end, after system prompt and examples."""
    long = row("first " + "system " * 200 + "question", "answer " + "more " * 300 + "last")
    for terminal in (True, False):
        text = shown(long, terminal=terminal)
        assert "question" in text
        assert "answer" in text
        assert "first" not in text
        assert "last" not in text
        assert text.count("…") == 2


@pytest.mark.parametrize("columns", ["20", "60", "100", "200"])
@pytest.mark.parametrize(
    "text", ["word " * 400, "x" * 2000, "日本の首都は" * 300, "سلام " * 300, "e" + "\u0301" * 4000, ""]
)
def test_nothing_is_wider_than_the_terminal(columns: str, text: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", columns)
    lines = shown(row(text, text, -12345.678, 1234.5)).splitlines()
    assert max(map(cell_len, lines)) <= int(columns)
    assert len(lines) <= 14
    assert sum(map(len, lines)) < 5000  # though marks above letters take no column
    (line,) = shown(row(text, text), terminal=False).splitlines()
    assert cell_len(line) <= PIPE_WIDTH
    assert len(line) < 2000


def test_above_a_progress_bar(monkeypatch: pytest.MonkeyPatch):
    """The bar's line is cleared, the table printed, the bar drawn again below it."""
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    with progress_bar(10, "ppo/salsa") as bar:
        bar.update(3)
        before = len(stream.getvalue())
        print_samples([row()], 3)
        cleared, table, below = stream.getvalue()[before:].partition("update 3")
    assert table
    assert re.fullmatch(r"\r *\r+", cleared)
    assert "ppo/salsa" in below[below.index("Because.") :]
    assert "ppo/salsa" not in below[: below.index("Because.")]


def test_beside_a_bar_of_tqdms(monkeypatch: pytest.MonkeyPatch):
    """transformers.Trainer's own, where the trainer is used as a library."""
    from tqdm import tqdm

    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    with tqdm(total=10, file=stream, desc="tqdm's") as progress:
        progress.update(3)
        before = len(stream.getvalue())
        print_samples([row()], 3)
        during = stream.getvalue()[before:]
    wiped, table, below = during.partition("update 3")
    assert table
    assert re.fullmatch(r"\r *\r", wiped)
    assert "tqdm's" in below[below.index("Because.") :]


def test_beside_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]):
    with progress_bar(2, "ppo", interval=0.0) as bar:
        bar.update()
        print_samples([row()], 3)
        bar.update()
    lines = capsys.readouterr().err.splitlines()
    starts = [re.split(r"  |:", line)[0] for line in lines]
    assert [start for start in starts if start in ("ppo", "update 3")][1:4] == ["ppo", "update 3", "ppo"]
