"""The table of updates: its width, its numbers, its header, the time that is left, and what is printed without a terminal."""

from __future__ import annotations

import io
import json
import math
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from paths import ROOT
from plain_ppo import PROMPTS
from rich.cells import cell_len
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, TrainerControl, TrainerState

from salsa_peft.models.stage_context import ProgressBar
from salsa_peft.training.ppo.terminal import completions, updates
from salsa_peft.training.ppo.terminal.table import (  # fmt: skip
    COLUMNS,
    CORE,
    IMPORTANCE,
    cells,
    columns_for,
    header,
    log_line,
    number,
    time_text,
)
from salsa_peft.training.ppo.terminal.updates import UpdateTable
from salsa_peft.utils.errors import SalsaError

STYLES = re.compile(r"\x1b\[[0-9;]*m")
LOGS = {
    "update": 12, "episode": 1536, "objective/scores": 0.51234, "objective/scores_std": 0.25, "objective/kl": 3.2109,
    "objective/kl_coef": 0.05, "objective/response_length": 24.125, "objective/entropy": 48.2, "objective/rlhf_reward": 0.35,
    "objective/empty_share": 0.0, "policy/clipfrac_avg": 0.0213, "policy/approxkl_avg": 0.00123, "loss/policy_avg": -0.0171,
    "loss/value_avg": 0.521, "val/explained_variance": 0.713, "lr": 2.5e-5, "seconds": 12.5, "tokens_per_second": 1234.5,
}  # fmt: skip
ROW: dict[str, Any] = {**LOGS, "step": 48, "steps": 400, "left": 1830.0}


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        """Yes."""
        return True


class Args:
    """The options that the table reads."""

    steps_per_update, has_critic = 4, True


def state(step: int, steps: int = 400, *, main: bool = True) -> TrainerState:
    """A Trainer's state."""
    return TrainerState(global_step=step, max_steps=steps, is_world_process_zero=main)


def printed(
    table: UpdateTable,
    monkeypatch: pytest.MonkeyPatch,
    *logs: dict[str, Any],
    width: int | None = 80,
    main: bool = True,
) -> list[str]:
    """What the table prints of some logs, four steps apart, as lines without colours. width: None for no terminal."""
    stream = io.StringIO() if width is None else Terminal()
    with monkeypatch.context() as patch:
        patch.setenv("COLUMNS", str(width or 80))
        patch.setenv("LINES", "40")
        patch.setenv("TERM", "xterm")
        patch.setattr(sys, "stdout", stream)
        for number_of, row in enumerate(logs, 1):
            table.on_log(Args, state(4 * number_of, main=main), TrainerControl(), dict(row))
    return STYLES.sub("", stream.getvalue()).splitlines()


def text(row: dict[str, Any], width: int, **options: Any) -> list[str]:
    """The header and the row at a width."""
    layout = columns_for(row, width, **options)
    return [header(*layout), cells(row, *layout)]


# the width


def test_a_row_of_80_columns() -> None:
    assert text(ROW, 80) == [
        "   step   reward ± std     KL      β length entropy  clip exp.var tok/s  left",
        " 48/400  0.512 ±0.250   3.211 0.0500   24.1   48.20 0.021   0.713  1234 30:30",
    ]


def test_a_narrow_row_has_the_most_important_columns() -> None:
    assert text(ROW, 60) == [
        "   step   reward ± std     KL      β length exp.var  left",
        " 48/400  0.512 ±0.250   3.211 0.0500   24.1   0.713 30:30",
    ]
    assert text(ROW, 10)[0].split() == ["step"]


def test_a_wide_row_has_more_columns_and_more_space() -> None:
    titles, values = text(ROW, 140)
    assert re.split(r"  +", titles.strip()) == [
        "step", "reward ± std", "KL", "β", "length", "entropy", "clip", "exp.var", "approx.KL", "pol.loss", "val.loss",
        "lr", "seconds", "tok/s", "left",
    ]  # fmt: skip
    assert re.split(r"  +", values.strip())[8:] == [
        "0.0012", "-0.0171", "0.5210", "2.50e-5", "12.5", "1234", "30:30",
    ]  # fmt: skip


def test_several_rewards_have_columns_in_a_wide_terminal() -> None:
    row = {**ROW, "rewards/helpful/mean": 0.3, "rewards/a_long_name_indeed/mean": 0.7, "rewards/x/truncated": 0.0}
    assert "helpful  a_long_name…" in text(row, 140)[0]
    assert "truncated" not in text(row, 250)[0]
    assert text(row, 80)[0] == text(ROW, 80)[0]
    assert "helpful" not in text({**ROW, "rewards/helpful/mean": 0.3}, 250)[0]


@pytest.mark.parametrize("width", [12, 60, 80, 100, 140, 250])
@pytest.mark.parametrize(
    "value", [0.0, 0.123456, -123456.789, 1e-9, -1e-9, 3e300, -3e300, 1e-300, math.nan, -math.inf, None]
)
@pytest.mark.parametrize("steps", [40, 1_000_000])
def test_no_row_is_wider_than_the_terminal(width: int, value: float | None, steps: int) -> None:
    row: dict[str, Any] = dict.fromkeys(LOGS, value) | {"step": steps, "steps": steps}
    positive = ("objective/scores_std", "policy/clipfrac_avg", "objective/empty_share", "tokens_per_second")
    row |= dict.fromkeys(positive, value and abs(value))
    row["left"] = None if value is None or not math.isfinite(value) else min(abs(value), 1e9)
    titles, values = text(row, width)
    assert cell_len(titles) == cell_len(values) <= max(width, 2 * len(str(steps)) + 1)


def test_every_column_has_a_rank_and_a_metric() -> None:
    assert sorted(IMPORTANCE) == sorted(column.key for column in COLUMNS)
    assert {column.key for column in COLUMNS} - {"step", "left"} <= LOGS.keys()
    assert set(CORE) <= {column.key for column in COLUMNS}


# numbers


@pytest.mark.parametrize(
    ("value", "decimals", "expected"),
    [
        (0.0, 3, "0.000"), (0.51234, 3, "0.512"), (-12.3456, 3, "-12.35"), (-0.0171, 3, "-0.017"), (12345.6, 3, "12346"),
        (1e7, 3, "1.00e7"), (0.000123, 3, "1.2e-4"), (-0.000123, 4, "-1e-4"), (2.5e-5, 4, "2.5e-5"), (2.5e-5, None, "2.5e-5"),
        (0.0, None, "0"), (math.nan, 3, "nan"), (math.inf, 3, "inf"), (7, 0, "7"),
    ],
)  # fmt: skip
def test_numbers_in_six_characters(value: float, decimals: int | None, expected: str) -> None:
    assert number(value, 6, decimals) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0.4, "0:00"), (65, "1:05"), (3599.4, "59:59"), (3600, "1h00m"), (35_999, "9h59m"), (36_000, "10 h"), (86_400 * 12, "12 d"), (1e9, "31 y")],
)  # fmt: skip
def test_times(seconds: float, expected: str) -> None:
    assert time_text(seconds) == expected


def test_a_missing_metric_is_a_dash_and_nan_is_shown() -> None:
    row = {key: value for key, value in ROW.items() if key != "objective/entropy"}
    row |= {"val/explained_variance": math.nan, "left": None, "objective/scores_std": None}
    assert text(row, 80)[1].split() == [
        "48/400", "0.512", "3.211", "0.0500", "24.1", "–", "0.021", "nan", "1234", "–",
    ]  # fmt: skip


def test_no_explained_variance_without_a_critic() -> None:
    assert "exp.var" not in text(ROW, 80, critic=False)[0]
    assert "val.loss" not in text(ROW, 250, critic=False)[0]
    assert "explained" not in log_line(ROW, critic=False)


# the terminal


def test_the_header_comes_again_when_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once a screen, after other output, and after a change of the width."""
    table = UpdateTable()
    lines = printed(table, monkeypatch, *[LOGS] * 80)
    assert [index for index, line in enumerate(lines) if "reward ± std" in line] == [0, 38, 76]
    assert ["reward" in line for line in printed(table, monkeypatch, LOGS)] == [False]
    table.header_due = True
    assert ["reward" in line for line in printed(table, monkeypatch, LOGS)] == [True, False]
    assert ["reward" in line for line in printed(table, monkeypatch, LOGS, width=60)] == [True, False]


def test_evaluations_are_lines_of_names_and_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not torn apart at the terminal's edge; Trainer's own loss and speeds are not printed."""
    table = UpdateTable()
    evaluation = {"eval_score": 0.5, "eval_response_length": 24.25, "eval_rewards/helpful/mean": None, "epoch": 1.0}
    lines = printed(
        table, monkeypatch, LOGS, {"loss": 0.3, "learning_rate": 0.1}, evaluation, {"train_runtime": 3.0}, LOGS
    )
    assert lines[2] == "step 12  eval_score 0.5000  eval_response_length 24.2500"
    assert lines[3] == "  eval_rewards/helpful/mean –"
    assert "reward ± std" in lines[4] and len(lines) == 6


@pytest.mark.parametrize("name", ["", "ppo/salsa"])
def test_without_a_terminal_each_update_is_a_line_that_explains_itself(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    table = UpdateTable()
    table.name = name
    other = {**LOGS, "objective/scores": -123.456, "objective/kl": None, "policy/clipfrac_avg": 1e-9}
    lines = printed(table, monkeypatch, LOGS, other, {"eval_score": 0.5}, width=None)
    start = f"{name}  " * bool(name)
    assert lines[0] == (
        f"{start}step   4/400  reward  0.512 ±0.250   KL  3.211  β 0.0500  length   24.1  entropy   48.20"
        "  clip fraction 0.021  explained variance   0.713  tokens/s  1234  left 20:38"
    )
    assert len(lines[1]) == len(lines[0])
    assert lines[2] == f"{start}step 12  eval_score 0.5000"


def test_only_the_first_process_prints(monkeypatch: pytest.MonkeyPatch) -> None:
    for width in (80, None):
        assert printed(UpdateTable(), monkeypatch, LOGS, {"eval_score": 0.5}, main=False, width=width) == []
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    bar = ProgressBar("PPO", beside_table=True)
    for main in (False, True):
        given = (Args, state(0, main=main), TrainerControl())
        for call in (bar.on_train_begin, bar.on_step_end, bar.on_log, bar.on_train_end):
            call(*given)
        assert bool(stream.getvalue()) is main


def test_the_time_left_is_that_of_the_newest_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the clock between two rows, evaluations included; for the first row by the update's own time, also on resume."""
    clock = iter([100.0, 130.0])
    monkeypatch.setattr(updates.time, "perf_counter", lambda: next(clock))
    table = UpdateTable()
    table.on_train_begin()
    lines = printed(table, monkeypatch, {**LOGS, "seconds": 10.0}, {**LOGS, "seconds": 10.0}, width=None)
    # 99 and 98 updates are left, of 10 seconds, and of (10 + 30) / 2
    assert [line.split()[-1] for line in lines] == ["16:30", "32:40"]


# the trainer


class Times(TrainerCallback):
    """Keeps what the trainer logs."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Keep a copy."""
        self.rows.append(dict(logs))


def test_the_trainer_prints_rows_and_no_dicts(
    make_trainer: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """With and without Transformers' progress bar; metrics.jsonl has the metrics of the trackers but the times."""
    for number_of, disable in enumerate((True, False)):
        kept = Times()
        folder = tmp_path / str(number_of)
        trainer = make_trainer(folder=folder, disable_tqdm=disable, callbacks=[kept], logging_steps=1, num_ppo_epochs=2,
                               eval_dataset=PROMPTS[:2], eval_strategy="steps", eval_steps=4)  # fmt: skip
        capsys.readouterr()
        trainer.train()
        printed = capsys.readouterr()
        assert "{" not in printed.out + printed.err
        steps = [line.split("  reward")[0] for line in printed.out.splitlines()]
        assert steps[:2] == ["step  2/4", "step  4/4"] and steps[2].startswith("step 4  eval_score ")
        assert "left  0:00" in printed.out.splitlines()[1]
        rows = [row for row in kept.rows if "update" in row]
        written = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [row.keys() - {"epoch"} for row in rows] == [
            row.keys() | {"seconds", "tokens_per_second"} for row in written
        ]
        tokens = rows[0]["objective/response_length"] * 8
        assert rows[0]["tokens_per_second"] == pytest.approx(tokens / rows[0]["seconds"])
        assert rows[0]["lr"] == written[0]["lr"] > 0
        assert written[0]["objective/scores_std"] > 0
        bars = [type(callback) for callback in trainer.callback_handler.callbacks]
        assert (ProgressBar in bars) is not disable and ProgressCallback not in bars
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        assert capsys.readouterr().out == ""


def test_an_interruption_closes_the_bar(
    make_trainer: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """So that the traceback of a script starts on a line of its own."""

    class Interrupt(TrainerCallback):
        """Ctrl-C."""

        def on_step_end(self, *_: Any, **__: Any) -> None:
            """After the first optimizer step."""
            raise KeyboardInterrupt

    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    trainer = make_trainer(folder=tmp_path, disable_tqdm=False, callbacks=[Interrupt()], shown_every=None)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert stream.getvalue().endswith("\n") and "PPO:   0%" in stream.getvalue()
    assert sys.stderr is stream


@pytest.mark.slow
def test_a_start_from_a_name_warns_of_nothing(tmp_path: Path, tokenizer: Any) -> None:
    """Neither PEFT's deprecated names nor the libraries that it tries; in a new process, where all is imported first."""
    import tiny

    tiny.make_base(tokenizer).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    script = f"""
import logging
from salsa_peft import SalsaPPOConfig, SalsaPPOTrainer
from peft import LoraConfig
levels = [logging.getLogger(name).level for name in ("torchao", "bitsandbytes")]
assert levels == [logging.NOTSET, logging.NOTSET] or 30 in levels, levels
args = SalsaPPOConfig(output_dir={str(tmp_path)!r} + "/out", batch_size=4, max_new_tokens=3, use_cpu=True, report_to="none")
rows = [{{"prompt": "a b"}}] * 4
reward = lambda completions, **_: [1.0] * len(completions)
SalsaPPOTrainer({str(tmp_path / "base")!r}, reward, args, rows, peft_config=LoraConfig(task_type="CAUSAL_LM"))
"""
    found = subprocess.run([sys.executable, "-W", "default::FutureWarning", "-W", "default::UserWarning", "-c", script],
                           capture_output=True, text=True, cwd=ROOT, timeout=280)  # fmt: skip
    assert found.returncode == 0, found.stderr
    assert [
        line for line in found.stderr.splitlines() if "Warning" in line or "Failed to load" in line or "W1" in line
    ] == []


def test_the_seconds_of_an_update_go_on_after_a_resume(
    make_trainer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A checkpoint within an update keeps the time since it began, so that the time left is right at once."""

    class Slow(TrainerCallback):
        """Lets the first update have begun 1000 seconds earlier."""

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            """After the first optimizer step, before the checkpoint is saved."""
            if state.global_step == 1:
                trainer.ppo.started -= 1000.0

    options = {"num_ppo_epochs": 2, "save_strategy": "steps", "save_steps": 1}
    trainer = make_trainer(folder=tmp_path / "run", callbacks=[Slow()], **options)
    trainer.train()
    for step, expected in ((1, 1000.0), (2, 0.0)):
        kept = Times()
        resumed = make_trainer(folder=tmp_path / f"on-{step}", callbacks=[kept], **options)
        capsys.readouterr()
        resumed.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{step}"))
        (first, *_) = [row for row in kept.rows if "update" in row]
        assert expected < first["seconds"] < expected + 100
        left = re.findall(r"left +(\S+)", capsys.readouterr().out)
        assert (left[0].startswith("16:4") and left[1] == "0:00") if step == 1 else left == ["0:00"]


# TRL's table of completions


def test_trls_table_of_completions_on_request(
    make_trainer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many rows as asked for; the trackers of report_to get all of them; the training is the same."""
    sent: list[Any] = []

    class Tracker:
        """What the table needs of trackio."""

        log = staticmethod(sent.append)

        @staticmethod
        def Table(dataframe: Any) -> Any:
            """The table itself."""
            return dataframe

    monkeypatch.setitem(sys.modules, "trackio", Tracker)
    monkeypatch.setenv("COLUMNS", "100")
    trainer = make_trainer(folder=tmp_path / "a", log_completions=True, num_completions_to_print=3, shown_every=2)
    trainer.args.report_to = ["trackio"]
    trainer.train()
    out = capsys.readouterr().out
    assert out.count("Step 1 ") == 1 and "Step 2 " not in out
    assert len(re.findall(r"│ │ .* │ +-?[0-9.]+ │ +-?[0-9.]+ +│ │", out)) == 3
    (table,) = sent
    assert list(table["completions"]) == ["step", "prompt", "completion", "score", "kl"]
    assert len(table["completions"]) == 8
    make_trainer(folder=tmp_path / "b").train()
    assert (tmp_path / "a" / "metrics.jsonl").read_bytes() == (tmp_path / "b" / "metrics.jsonl").read_bytes()


def test_control_characters_in_trls_table_are_escapes(
    make_trainer: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def hostile(*_: Any, **__: Any) -> Any:
        yield from [{"prompt": "a\nb\x1b[2J", "response": "\x07[red]c", "score": 0.5, "kl": 1.0}] * 8

    monkeypatch.setattr(completions, "completion_rows", hostile)
    make_trainer(folder=tmp_path, log_completions=True, shown_every=2).train()
    out = capsys.readouterr().out
    assert r"b\x1b[2J" in out and r"\x07[red]c" in out and "\x1b[2J" not in out and "⏎" not in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"log_completions": True, "shown_every": None}, "log_completions: has no effect with shown_every null"),
        ({"num_completions_to_print": 3}, "num_completions_to_print: 3 has no effect without log_completions"),
        ({"log_completions": True, "num_completions_to_print": 0}, "num_completions_to_print: must be at least 1, not 0"),
    ],
)  # fmt: skip
def test_options_without_an_effect_are_rejected(make_trainer: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SalsaError, match=message):
        make_trainer(**options)


def test_the_clock_is_real() -> None:
    """The tests above replace it only where they say so."""
    assert updates.time is time
