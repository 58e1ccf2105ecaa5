"""Progress bars on a terminal, and lines of progress where there is none."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from typing import Any

import pytest
from paths import ROOT
from transformers import TrainerState

from salsa_peft.utils import console
from salsa_peft.utils.console import progress_bar, say


class Terminal(io.StringIO):
    """A stream that says it is one."""

    def isatty(self) -> bool:
        """Yes."""
        return True


def test_lines_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    """One for each update here, with the description, the count and the figures."""
    with progress_bar(4, "sft/seed-0", interval=0.0) as bar:
        bar.set_postfix(loss=1.23456, refresh=False)
        bar.update()
        bar.total = 6
        bar.set_description("sft/seed-0 saving", refresh=False)
        bar.update(2)
    start, first, second, end = capsys.readouterr().err.splitlines()
    assert start.startswith("sft/seed-0:   0%|") and "| 0/4 [" in start
    assert first.startswith("sft/seed-0:  25%|") and "| 1/4 [00:00<" in first and first.endswith("loss=1.23]")
    assert second.startswith("sft/seed-0 saving:  50%|") and "| 3/6 [" in second and "| 3/6 [" in end


def test_a_short_loop_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """Where there is no terminal and the interval is never over."""
    with progress_bar(4, "x") as bar:
        bar.update(4)
    assert capsys.readouterr().err == ""


def test_lines_of_nested_bars(capsys: pytest.CaptureFixture[str]) -> None:
    """None moves the cursor."""
    with progress_bar(2, "outer", interval=0.0) as outer, progress_bar(3, "inner", interval=0.0) as inner:
        inner.update()
        outer.update()
    lines = capsys.readouterr().err.splitlines()
    assert {line.split(":")[0] for line in lines} == {"outer", "inner"} and "\x1b" not in "".join(lines)


def test_bars_inside_one_another_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are shown; the outer one stays, with standard error as it was."""
    stream: Any = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    with progress_bar(2, "outer") as outer:
        with progress_bar(3, "inner") as inner:
            inner.set_postfix(loss=0.5)
            inner.update(3)
        outer.set_description("renamed")
        outer.update(2)
    assert sys.stderr is stream
    text = stream.getvalue()
    assert "inner" in text and "loss=0.5" in text and "renamed" in text and "2/2" in text


def test_what_is_printed_stands_above_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bar's line is cleared, the message printed, and the bar drawn again below it."""
    stream: Any = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    with progress_bar(4, "sft"):
        before = len(stream.getvalue())
        say("a warning")
        cleared, _, below = stream.getvalue()[before:].partition("a warning\n")
    assert cleared.startswith("\r") and cleared.strip() == "" and below.startswith("\rsft:")


def test_a_terminal_without_a_size_has_a_bar() -> None:
    """A new pseudo-terminal is 0 × 0, as under `docker exec -t` and some CI systems."""
    script = (
        "from salsa_peft.utils.console import progress_bar\nwith progress_bar(2, 'outer') as bar:\n    bar.update(2)"
    )
    main, terminal = os.openpty()
    subprocess.run([sys.executable, "-c", script], stderr=terminal, check=True, cwd=ROOT)
    os.close(terminal)
    assert b"2/2" in os.read(main, 10_000)
    os.close(main)


@pytest.mark.parametrize(
    ("width", "shown"),
    [
        (80, "loss=1.23, accuracy=0.877, lr=2e-05"),
        (140, "loss=1.23, accuracy=0.877, lr=2e-05, tokens=1.23M"),
        (None, "loss=1.23, accuracy=0.877, lr=2e-05, tokens=1.23M"),
    ],
)
def test_the_metrics_beside_a_trainers_bar(width: int | None, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL's names; those for which a terminal has no room are left out."""
    from salsa_peft.models.stage_context import ProgressBar

    stream: Any = io.StringIO() if width is None else Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(console, "_width", lambda: {"ncols": width})
    callback, state = ProgressBar("reward"), TrainerState(global_step=0, max_steps=640, is_world_process_zero=True)
    logs = {"num_tokens": 1_234_000.0, "learning_rate": 2e-5, "accuracy": 0.5, "loss": 1.2345, "grad_norm": 3.0}
    callback.on_train_begin(None, state, None)
    callback.on_log(None, state, None, logs)
    callback.on_log(None, state, None, {"accuracy": 0.8768, "train_runtime": 3.0})  # TRL's at the end, without the loss
    assert callback.bar.postfix == shown
    line = str(callback.bar)
    assert shown in line and len(line) <= (width or len(line))
    callback.on_train_end(None, state, None)
