"""Every number here can be worked by hand, or stands in the paper's tables."""

from __future__ import annotations

import json
import math
from dataclasses import asdict

import numpy as np
import pytest
from paths import SHARED

from salsa_peft.evaluation.judge_statistics import Judgment, over_seeds, pair_result
from salsa_peft.utils.statistics import (
    Estimate,
    compare_scores,
    mean_interval,
    paired_difference,
    tango_interval,
    win_rates,
)

PAPER = SHARED / "data" / "paper_tables.json"


def test_mean_interval_by_hand() -> None:
    # 1…5: mean 3, s = √2.5, s/√5 = √½, t(0.975, 4) = 2.7764
    estimate = mean_interval([1, 2, 3, 4, 5])
    assert estimate.mean == 3
    assert estimate.n == 5
    assert estimate.high == pytest.approx(3 + 2.7764451 * math.sqrt(0.5), abs=1e-6)
    assert estimate.low == pytest.approx(3 - 2.7764451 * math.sqrt(0.5), abs=1e-6)


def test_one_value_is_a_point_and_never_nan() -> None:
    assert mean_interval([0.25]) == Estimate(0.25, 0.25, 0.25, 1)
    json.dumps(asdict(mean_interval([0.25])), allow_nan=False)


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf]])
def test_no_values_and_holes_are_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match=r"must be finite|at least one"):
        mean_interval(values)


def test_paired_difference_cancels_the_questions() -> None:
    # the difference is 1 on every question, however far apart the questions are
    estimate = paired_difference([1, 101, 1001], [0, 100, 1000])
    assert (estimate.mean, estimate.low, estimate.high) == (1, 1, 1)
    # 2, 0 and 1: mean 1, s = 1, t(0.975, 2) = 4.3027
    assert paired_difference([3, 1, 2], [1, 1, 1]).high == pytest.approx(1 + 4.302653 / math.sqrt(3), abs=1e-5)
    assert paired_difference([0, 0], [1, 3]).mean == -2


def test_unequal_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="2 and 3 scores"):
        compare_scores([1, 2], [1, 2, 3])


def test_compare_counts_rates_and_sign_test() -> None:
    verdicts = compare_scores([1, 1, 1, 1, 0, 0.5], [0, 0, 0, 0, 1, 0.5])
    assert (verdicts.wins, verdicts.losses, verdicts.ties, verdicts.n) == (4, 1, 1, 6)
    assert verdicts.win_rate == pytest.approx(4 / 6)
    assert verdicts.adjusted_win_rate == pytest.approx(4.5 / 6)
    # sign test, 4 of 5: 2 · (C(5,4) + C(5,5)) / 2⁵ = 12/32
    assert verdicts.p_value == pytest.approx(12 / 32)


def test_margin_makes_ties_and_is_strict() -> None:
    verdicts = compare_scores([0.5, 0.75, 0.0], [0.25, 0.25, 0.5], margin=0.25)
    assert (verdicts.wins, verdicts.losses, verdicts.ties) == (1, 1, 1)


def test_swapping_the_models_mirrors_everything() -> None:
    there, back = win_rates(29, 21, 110), win_rates(21, 29, 110)
    assert there.adjusted_win_rate + back.adjusted_win_rate == pytest.approx(1)
    assert (there.low, there.high) == (pytest.approx(1 - back.high), pytest.approx(1 - back.low))
    assert there.p_value == back.p_value


def test_interval_at_the_edges() -> None:
    # all ties: δ = ± z²/(n + z²), so half of it either side of ½
    z2 = 1.959964**2
    ties = win_rates(0, 0, 20)
    assert ties.p_value == 1
    assert ties.adjusted_win_rate == 0.5
    assert ties.high == pytest.approx(0.5 + z2 / (20 + z2) / 2, abs=1e-5)
    assert ties.low == pytest.approx(0.5 - z2 / (20 + z2) / 2, abs=1e-5)
    # all wins: an interval, not the point [1, 1]; Tango's lower bound is δ = (n − z²)/(n + z²)
    wins = win_rates(20, 0, 0)
    assert wins.high == 1
    assert wins.low == pytest.approx(20 / (20 + z2), abs=1e-5)
    losses = win_rates(0, 20, 0)
    assert losses.low == 0
    assert losses.high == pytest.approx(1 - wins.low)
    assert 0 <= win_rates(1, 0, 0).low < win_rates(1, 0, 0).high == 1
    with pytest.raises(ValueError, match="0 wins"):
        win_rates(0, 0, 0)


def test_interval_covers_as_it_says() -> None:
    # 400 experiments of 100 verdicts, true adjusted rate 0.5·1 + 0.3·½ = 0.65: about 95% of the intervals hold it
    counts = np.random.default_rng(0).multinomial(100, [0.5, 0.2, 0.3], size=400)
    held = [v.low <= 0.65 <= v.high for v in (win_rates(*map(int, row)) for row in counts)]
    assert 0.92 <= np.mean(held) <= 0.98


@pytest.mark.skipif(not PAPER.is_file(), reason="../shared/data/paper_tables.json is not beside this checkout")
def test_rates_of_the_papers_tables() -> None:
    rows = json.loads(PAPER.read_text(encoding="utf-8"))["rows"]
    assert len(rows) >= 50
    for row in rows:
        verdicts = win_rates(row["wins"], row["losses"], row["ties"])
        assert 100 * verdicts.win_rate == pytest.approx(row["recomputed_win_rate"], abs=1e-3), row
        assert 100 * verdicts.adjusted_win_rate == pytest.approx(row["recomputed_adjusted"], abs=1e-3), row
        assert [100 * verdicts.low, 100 * verdicts.high] == pytest.approx(row["adjusted_ci95_tango"], abs=0.0051), row
        assert verdicts.p_value == pytest.approx(row["sign_test_p"], rel=1e-6), row
        if row["adjusted_check"] == "round":
            assert f"{100 * verdicts.adjusted_win_rate:.2f}" == f"{float(row['printed_adjusted']):.2f}" or (
                100 * verdicts.adjusted_win_rate == pytest.approx(float(row["printed_adjusted"]), abs=0.0051)
            )


def test_mean_over_clusters_by_hand() -> None:
    # (1, 3), (5, 7), (6): mean 4.4, sums of the deviations −4.8, 3.2 and 1.6: √(3/2 · 35.84) / 5 and t(0.975, 2) = 4.3027
    estimate = mean_interval([1, 3, 5, 7, 6], clusters=["x", "x", "y", "y", "z"])
    assert (estimate.mean, estimate.n) == (4.4, 3)
    assert estimate.high - 4.4 == pytest.approx(4.302653 * math.sqrt(1.5 * 35.84) / 5, abs=1e-5)
    # a cluster of equal values is one value; one cluster is a point
    twice = mean_interval([1, 1, 2, 2, 4, 4], clusters=[0, 0, 1, 1, 2, 2])
    assert asdict(twice) == pytest.approx(asdict(mean_interval([1, 2, 4])))
    assert mean_interval([1, 2], clusters=["q", "q"]) == Estimate(1.5, 1.5, 1.5, 1)
    assert paired_difference([3, 3, 2], [1, 1, 1], clusters=[7, 7, 8]).n == 2


def test_clusters_of_one_change_nothing() -> None:
    values, other = np.random.default_rng(0).normal(size=(2, 50)).tolist()
    for of in (lambda **k: mean_interval(values, **k), lambda **k: paired_difference(values, other, **k)):
        assert asdict(of(clusters=[("set", i) for i in range(50)])) == pytest.approx(asdict(of()))
    assert compare_scores(values, other, 0.1, clusters=range(50)) == compare_scores(values, other, 0.1)
    with pytest.raises(ValueError, match="2 clusters for 50 values"):
        mean_interval(values, clusters=[0, 1])


def test_turns_of_a_question_are_one_draw() -> None:
    # every question wins or loses both its turns: 2 · 40 judgments know no more than 40
    once = [1.0] * 24 + [0.0] * 16
    twice = compare_scores(np.repeat(once, 2), np.full(80, 0.5), clusters=np.repeat(np.arange(40), 2).tolist())
    alone = compare_scores(once, [0.5] * 40)
    assert (twice.wins, twice.losses, twice.n) == (48, 32, 80)
    assert twice.p_value == pytest.approx(alone.p_value)
    assert (twice.low, twice.high) == pytest.approx((alone.low, alone.high), abs=0.02)
    assert twice.high - twice.low > 1.3 * (win_rates(48, 32, 0).high - win_rates(48, 32, 0).low)
    # where all questions agree a bootstrap has no width: Tango's of as many judgments as questions
    agreed = compare_scores([1.0] * 20, [0.0] * 20, clusters=np.repeat(np.arange(10), 2).tolist())
    assert (agreed.low, agreed.high) == (win_rates(10, 0, 0).low, 1)


def test_few_decided_questions_have_no_narrow_interval() -> None:
    """One loss of 80 turns: out to Tango's of 80, as wide to the other side; two replicates likewise; no rate at equal length of 9 decided."""

    def rows(losses: int, turns: int = 2, run: int = 0) -> list[Judgment]:
        lost = {(at, 1) for at in range(losses)}
        return [
            Judgment(at, turn, *["b" if (at, turn) in lost else "tie"] * 2, 5 + (at + run) % 3, 5 + at % 2)
            for at in range(40)
            for turn in range(1, turns + 1)
        ]

    found = pair_result(rows(1))
    low, high = (0.5 + bound / 2 for bound in tango_interval(0, 1, 80))
    assert found.interval == "bootstrap" and (found.low, found.high) == pytest.approx((low, high)) and high > 0.51
    none, ten = pair_result(rows(0)), pair_result(rows(10))
    assert none.low < 0.47 and none.high > 0.53 and ten.high < 0.5  # enough of them is enough
    assert pair_result(rows(9)).length_controlled is None is not ten.length_controlled
    two = over_seeds([rows(1, 1), rows(1, 1, 1)])
    assert (two.low, two.high) == pytest.approx(tuple(0.5 + bound / 2 for bound in tango_interval(0, 2, 80)), abs=0.005)
    assert two.high > 0.51
