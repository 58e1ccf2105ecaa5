"""Curves, landscape, scores, reward and ablations of a joined report: means over replicates, paired where they can be."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from synthetic_run import synthetic

from salsa_peft.report import plots
from salsa_peft.report.gather import ReportInput
from salsa_peft.report.replicates import curves, landscape, measures
from salsa_peft.report.sections.frontier import rolling_mean
from salsa_peft.utils.statistics import mean_interval

LEVELS = (0.0, 5.0, -3.0)
"""What each replicate adds to all its scores, and what pairing takes away."""


def shifted(run: ReportInput, level: float, gain: float) -> ReportInput:
    """The run with all scores moved by `level`, those of salsa and of the soup (α = ½) also by `gain`."""
    policies = {
        name: replace(
            policy,
            metrics=[{**row, "objective/scores": row["objective/scores"] + level + gain * (name == "salsa")} for row in policy.metrics],
        )
        for name, policy in run.policies.items()
    }  # fmt: skip
    moved, evaluation = copy.deepcopy(run.landscape), copy.deepcopy(run.evaluation)
    assert moved is not None
    for line in (*moved["lines"], moved["plane"]):
        for point in line["points"]:
            for score in point["scores"].values():
                score["mean"] += level + gain * (line.get("kind") == "line" and point["at"] == 0.5)
    for data in evaluation["datasets"].values():
        for name, model in data["models"].items():
            for score in model["scores"].values():
                score["mean"] += level + gain * (name == "salsa")
    reward = {**run.reward, "accuracy": {"held_out": {"mean": 0.8 + level / 100, "low": 0.7, "high": 0.9, "n": 100}}}
    return replace(run, policies=policies, landscape=moved, evaluation=evaluation, reward=reward)


@pytest.fixture(scope="module")
def runs() -> list[ReportInput]:
    one = synthetic(n=8, policies=("ppo", "salsa"))
    return [shifted(one, level, gain) for level, gain in zip(LEVELS, (0.1, 0.2, 0.3), strict=True)]


def test_curves(runs: list[ReportInput]) -> None:
    """Each update's mean and t-interval of the smoothed values; the difference from ppo without the replicates' levels."""
    found = {one["key"]: one for one in curves.curves(runs)}
    assert found.keys() == {f"objective/{name}" for name in ("scores", "kl", "response_length", "kl_coef")}
    score = found["objective/scores"]
    each = [
        [rolling_mean(np.array([row["objective/scores"] for row in run.policies[name].metrics])) for run in runs]
        for name in ("salsa", "ppo")
    ]
    for at in (0, 20, 49):
        wanted = mean_interval([one[at] for one in each[0]])
        band = score["policies"]["salsa"]
        assert [band[key][at] for key in ("mean", "low", "high")] == pytest.approx(
            [wanted.mean, wanted.low, wanted.high]
        )
        paired = mean_interval([a[at] - b[at] for a, b in zip(*each, strict=True)])
        band = score["differences"]["salsa"]
        assert [band[key][at] for key in ("mean", "low", "high")] == pytest.approx(
            [paired.mean, paired.low, paired.high]
        )
        assert band["high"][at] - band["low"][at] < 1 < score["policies"]["salsa"]["high"][at]
    assert score["against"] == "ppo" and score["differences"].keys() == {"salsa"}
    assert found["objective/kl"]["differences"] == {} and found["objective/kl"]["against"] == ""


def test_only_episodes_that_all_replicates_logged_are_drawn(runs: list[ReportInput]) -> None:
    short = replace(
        runs[1], policies={name: replace(one, metrics=one.metrics[:-10]) for name, one in runs[1].policies.items()}
    )
    (band,) = [one["policies"]["ppo"] for one in curves.curves([runs[0], short]) if one["key"] == "objective/kl"]
    assert band["episode"] == [128 * (at + 1) for at in range(40)]
    (ends,) = [row for row in curves.ends([runs[0], short]) if row["policy"] == "ppo"]
    assert ends["updates"] == 40


def test_start_and_end(runs: list[ReportInput]) -> None:
    """The change is paired: the replicates' levels are not in its interval."""
    (row,) = [row for row in curves.ends(runs) if row["policy"] == "ppo"]
    values = [one["objective/scores"] for one in runs[0].policies["ppo"].metrics]
    assert row["score"]["change"]["mean"] == pytest.approx(np.mean(values[-5:]) - np.mean(values[:5]))
    assert row["score"]["change"]["high"] - row["score"]["change"]["low"] == pytest.approx(0, abs=1e-9)
    assert row["score"]["end"]["high"] - row["score"]["end"]["low"] > 5


def test_landscape(runs: list[ReportInput]) -> None:
    """Lines minus the mean of their ends, the control minus the soup, the plane minus the mean of the seeds, all paired."""
    found = landscape.landscape(runs)
    assert found is not None and runs[0].landscape is not None
    first, _, control = found["lines"]
    means = {point["at"]: point["scores"]["gold"]["mean"] for point in runs[0].landscape["lines"][0]["points"]}
    soup = next(point for point in first["points"] if point["at"] == 0.5)
    wanted = mean_interval([means[0.5] - (means[0.0] + means[1.0]) / 2 + extra for extra in (0.0, 0.1, 0.2)])
    assert [soup["differences"]["gold"][key] for key in ("mean", "low", "high", "n")] == pytest.approx(
        [wanted.mean, wanted.low, wanted.high, 3]
    )
    assert soup["scores"]["gold"]["mean"] == pytest.approx(means[0.5] + 0.1 + np.mean(LEVELS))
    shrunk = runs[0].landscape["lines"][2]["points"][3]["scores"]["gold"]["mean"]
    assert control["points"][3]["differences"]["gold"]["mean"] == pytest.approx(shrunk - means[0.5] - 0.1)
    corner = {tuple(point["weights"]): point for point in found["plane"]["points"]}
    seeds = [
        corner[weights]["scores"]["gold"]["mean"] for weights in ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
    ]
    middle = corner[0.5, 0.25, 0.25]
    assert middle["differences"]["gold"]["mean"] == pytest.approx(middle["scores"]["gold"]["mean"] - np.mean(seeds))
    assert middle["open"]["gold"] is False, "it differs by the same amount in all replicates"
    assert landscape.landscape([runs[0], replace(runs[1], landscape=None)]) is None


def test_points_that_a_replicate_lacks_are_left_out(runs: list[ReportInput]) -> None:
    """Such as the seed with the soup's norm, whose place on the control line is another in each replicate."""
    fewer = copy.deepcopy(runs[1].landscape)
    assert fewer is not None
    fewer["lines"][2]["points"][1]["at"] = 0.23
    found = landscape.landscape([runs[0], replace(runs[1], landscape=fewer)])
    assert found is not None and [point["at"] for point in found["lines"][2]["points"]] == [
        0.0,
        *(i / 5 for i in range(2, 8)),
    ]


def test_the_panels_have_names_of_their_own(runs: list[ReportInput]) -> None:
    """Each metric and its difference, the landscape and its differences; with the prefix of a second group."""
    styles: Any = plots.styles_of(runs[0])
    drawn = [one.name for one in curves.draw(curves.curves(runs)[:2], styles, "second-")]
    assert drawn == ["second-training-scores", "second-training-scores-minus", "second-training-kl"]
    found = landscape.landscape(runs)
    assert found is not None
    names = [one.name for one in landscape.draw({**found, "measures": ["gold"], "plane": None}, styles, "second-")]
    assert names == ["second-line-gold", "second-shrunk-gold", "second-paired-line-gold", "second-paired-shrunk-gold"]


def test_scores_and_the_reward(runs: list[ReportInput]) -> None:
    """Every measure of the models that all replicates have; the reward's measures that all replicates measured."""
    found = measures.scores(runs)["out"]
    assert found.keys() == {"reward", "gold", "response_length"}
    means = [run.evaluation["datasets"]["out"]["models"]["salsa"]["scores"]["reward"]["mean"] for run in runs]
    assert found["reward"]["salsa"]["high"] == pytest.approx(mean_interval(means).high)
    rows = measures.reward(runs)
    assert [row["what"] for row in rows] == ["accuracy on held-out pairs"]
    assert rows[0]["mean"] == pytest.approx(0.8 + np.mean(LEVELS) / 100) and rows[0]["n"] == 3
    assert measures.reward([runs[0], replace(runs[1], reward={})]) == []


def test_ablations(runs: list[ReportInput], monkeypatch: pytest.MonkeyPatch) -> None:
    """The win rate at each value over replicates; a value that a replicate lacks is left out."""
    rates = {id(run): rate for run, rate in zip(runs, (0.5, 0.6, 0.7), strict=True)}

    def of(run: ReportInput, measure: str) -> list[dict[str, Any]]:
        points = [
            {"x": x, "name": "", "adjusted_win_rate": rates[id(run)] + x, "low": 0, "high": 1} for x in (0.0, 0.1)
        ]
        fewer = points[: 1 if run is runs[2] else 2]
        return [{"kind": "alpha", "dataset": "in", "against": "ppo", "xlabel": "α", "points": fewer, "log": False}]

    monkeypatch.setattr(measures.judge_tables, "ablations", of)
    (found,) = measures.ablations(runs)
    wanted = mean_interval([0.5, 0.6, 0.7])
    (point,) = found["points"]
    assert [point[key] for key in ("x", "adjusted_win_rate", "low", "high")] == pytest.approx([0.0, wanted.mean, wanted.low, wanted.high])  # fmt: skip
