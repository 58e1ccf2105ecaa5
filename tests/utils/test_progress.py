"""Progress where there is no terminal, and on one."""

from __future__ import annotations

import io

from salsa_peft.utils.console import bar, clock


def test_lines_now_and_then():
    stream = io.StringIO()
    with bar(4, "sft/seed-0", stream=stream, every=0.0) as update:
        update(loss=1.23456)
        update(done=3, what="sft/seed-0 saving", total=6)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "sft/seed-0  1/4  25%  0:00 left  loss 1.235"
    assert lines[1] == "sft/seed-0 saving  3/6  50%  0:00 left  loss 1.235"


def test_a_short_loop_says_nothing():
    stream = io.StringIO()
    with bar(4, "x", stream=stream) as update:
        update(4)
    assert stream.getvalue() == ""


class Terminal(io.StringIO):
    """A stream that says it is one."""

    def isatty(self) -> bool:
        """Yes."""
        return True


def test_bars_inside_one_another_on_a_terminal():
    stream = Terminal()
    with bar(2, "outer", stream=stream) as outer:
        with bar(3, "inner", stream=stream) as inner:
            inner(3, loss=0.5)
        outer(done=2, what="renamed")
    assert "inner" in stream.getvalue()
    assert "renamed" in stream.getvalue()
    assert "2/2" in stream.getvalue()


def test_clock():
    assert [clock(5), clock(65), clock(7265)] == ["0:05", "1:05", "2:01:05"]
