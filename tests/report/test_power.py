"""Which difference replicates could have shown, and how many replicates a difference needs."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_joined_report import made

from salsa_peft.cli import report
from salsa_peft.report.joined import write_joined
from salsa_peft.report.replicates import power
from salsa_peft.utils.statistics import mean_interval


def test_known_sample_sizes() -> None:
    """Of the paired t-test at 5% with 80% power, as G*Power 3.1 gives them: 199, 34 and 15 pairs for small to large."""
    assert [power.needed(effect, 1.0) for effect in (0.2, 0.5, 0.8)] == [199, 34, 15]
    assert [power.needed(effect * 3, 3.0) for effect in (-0.5, 0.05, 0.0)] == [34, None, None]
    assert power.needed(0.1, 0.0) == 2 and power.needed(0.0, 0.0) is None
    assert power.power(0.0, 8) == pytest.approx(0.05)
    for n in (2, 6, 30):
        assert power.power(power.detectable_effect(n), n) == pytest.approx(0.8)


def test_power_is_the_share_of_runs_that_show_a_difference() -> None:
    """20,000 simulated runs of 6 replicates whose true difference is the detectable one."""
    runs = np.random.default_rng(0).normal(power.detectable_effect(6), 1.0, (20_000, 6))
    statistic = runs.mean(axis=1) / runs.std(axis=1, ddof=1) * np.sqrt(6)
    assert (np.abs(statistic) > 2.5705818).mean() == pytest.approx(0.8, abs=0.01)


def found(values: list[float], dataset: str = "in") -> dict[str, Any]:
    return {"a": "salsa", "b": "ppo", "dataset": dataset, **asdict(mean_interval(values))}


def test_what_is_said() -> None:
    """The spread is that of the values, whatever their mean; a sentence for each pair, with all its sets."""
    rows = power.table([found([1.0, 2.0, 3.0, 4.0, 5.0]), found([-1.0, 1.0, 0.5, -0.5, 0.1], "out")])
    assert rows[0]["spread"] == pytest.approx(2.5**0.5) and power.detectable(found([1.0])) is None
    assert rows[0]["detectable"] == pytest.approx(2.5**0.5 * power.detectable_effect(5))
    assert power.sentences(rows) == [
        "salsa − ppo: with 5 replicates of this spread, a true difference of 2.659 on “in” and of 1.332 on “out” is shown in"
        " 80% of cases; one as large as the differences seen (+3.000, +0.020) needs 5 and more than 1,000 replicates."
    ]
    assert power.given_difference(rows[:1], 1.0) == [
        f"salsa − ppo: a true difference of 1 takes {power.needed(1.0, 2.5**0.5)} replicates on “in” to be shown in 80% of"
        " cases."
    ]


def test_the_report_and_the_terminal_say_it(tmp_path: Path) -> None:
    """One sentence for each comparison of the headline, in both texts and among the lines for a terminal."""
    summary = write_joined(tmp_path, [made("llama", seed, "x") for seed in range(2)])
    (group,) = summary["replicates"]
    assert len(group["power"]["sentences"]) == len({(one["a"], one["b"]) for one in group["power"]["rows"]}) >= 3
    html, text = ((tmp_path / name).read_text("utf-8") for name in ("report.html", "report.md"))
    lines = " ".join(summary["narrow_console"])
    for sentence in group["power"]["sentences"]:
        assert sentence in html and sentence in text and f"Power: {sentence}" in lines
    assert max(map(len, summary["narrow_console"])) <= 80 < max(map(len, summary["console"])) <= 120


def test_what_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, said in (
        (["--difference"], "--difference: nothing is no positive number"),
        ([str(tmp_path), "--difference", "-1"], "--difference: -1 is no positive number; give one such as 0.02"),
        (["--difference", "0.1"], "--difference: give the folder of a run with replicates"),
        ([str(tmp_path), "--difference", "0.1"], "not the folder of a run"),
        (["x", "--difference", "0.1", "--claims"], "--difference: does not work with --claims"),
    ):
        assert report.main(words) == 2
        assert said in capsys.readouterr().err
