"""Measures of a reward, by hand and by simulation: spread of the scores, calibration, best of n."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from salsa_peft.models.rewards import quality


class TestSpread:
    def test_by_hand(self) -> None:
        """Means 1 and 5; MS within (1 + 1 + 1 + 1) / 2 = 2, between 2 · 8 = 16; variance between (16 − 2) / 2 = 7 of 9."""
        found = quality.spread(np.array([[0.0, 2.0], [4.0, 6.0]]))
        share = found["between_prompt_share"]
        assert (found["score_mean"], share["n"]) == (3.0, 2)
        assert (found["score_sd"], found["score_sd_within"]) == pytest.approx((3.0, 2**0.5))
        assert share["mean"] == pytest.approx(7 / 9)
        assert share["low"] < share["mean"] < share["high"]

    @pytest.mark.parametrize("share", [0.0, 0.5, 0.9])
    def test_the_interval_holds_the_true_share(self, share: float) -> None:
        """In about 95% of 400 draws of 20 prompts; the mean of the estimates is near the truth."""
        rng = np.random.default_rng(0)
        found = []
        for _ in range(400):
            level = rng.normal(0, share**0.5, (20, 1))
            scores = level + rng.normal(0, (1 - share) ** 0.5, (20, 4))
            found.append(quality.spread(scores)["between_prompt_share"])
        held = np.mean([one["low"] <= share <= one["high"] for one in found])
        assert 0.92 <= held <= 0.98
        assert np.mean([one["mean"] for one in found]) == pytest.approx(share, abs=0.05)

    def test_levels_of_prompts_alone(self) -> None:
        """What a prompt adds to all of its scores changes the spread in all, and no spread within."""
        rng = np.random.default_rng(1)
        scores = rng.normal(0, 1, (50, 4))
        flat, steep = quality.spread(scores), quality.spread(scores + rng.normal(0, 3, (50, 1)))
        assert flat["score_sd_within"] == pytest.approx(steep["score_sd_within"])
        assert flat["between_prompt_share"]["mean"] < 0.2 and steep["between_prompt_share"]["mean"] > 0.8

    def test_what_cannot_be_divided(self) -> None:
        """Equal scores and a single prompt have no share; scores that are equal within each prompt have all of it."""
        assert quality.spread(np.ones((3, 4)))["between_prompt_share"] is None
        alone = quality.spread(np.array([[0.0, 2.0]]))
        assert alone["between_prompt_share"] is None and alone["score_sd"] == pytest.approx(2**0.5)
        levels = quality.spread(np.repeat([[1.0], [2.0], [4.0]], 4, axis=1))
        assert levels["between_prompt_share"] == {"mean": 1.0, "low": 1.0, "high": 1.0, "n": 3}
        json.dumps([alone, levels], allow_nan=False)


class TestCalibration:
    def test_by_hand(self) -> None:
        """σ(log 3) = 3/4, and three of four pairs are right: no error. With all signs turned: 1/4 against 3/4."""
        margins = np.log(3) * np.array([1, 1, -1, 1])
        found = quality.calibration(margins)
        (only,) = found["bins"]
        assert (only["predicted"], only["observed"]["mean"], only["observed"]["n"]) == (pytest.approx(0.75), 0.75, 4)
        assert (only["from"], only["to"]) == pytest.approx((np.log(3), np.log(3)))
        assert found["ece"] == pytest.approx(0, abs=1e-12)
        assert quality.calibration(-margins)["ece"] == pytest.approx(0.5)

    def test_bins_are_quantiles_of_the_margins_size(self) -> None:
        """100 pairs: 20 in each of five bins, whatever their order and signs."""
        rng = np.random.default_rng(0)
        margins = rng.permutation(np.arange(1, 101) * rng.choice([-1.0, 1.0], 100))
        found = quality.calibration(margins)["bins"]
        assert [(one["from"], one["to"]) for one in found] == [(1, 20), (21, 40), (41, 60), (61, 80), (81, 100)]
        for one in found:
            own = margins[(np.abs(margins) >= one["from"]) & (np.abs(margins) <= one["to"])]
            assert one["observed"]["n"] == 20 and one["observed"]["mean"] == (own > 0).mean()
        assert len(quality.calibration(margins[:39])["bins"]) == 1

    @pytest.mark.parametrize(("factor", "error"), [(1.0, 0.0), (3.0, 0.14), (0.2, 0.16)])
    def test_scores_that_are_too_large_are_overconfident(self, factor: float, error: float) -> None:
        """Labels drawn with probability σ(Δ) are calibrated; after scores × 3 the model predicts more than it reaches."""
        rng = np.random.default_rng(2)
        size = np.abs(rng.normal(0, 1.5, 20_000))
        margins = np.where(rng.random(20_000) < 1 / (1 + np.exp(-size)), size, -size)
        found = quality.calibration(factor * margins)
        assert found["ece"] == pytest.approx(error, abs=0.02)
        signs = {np.sign(round(one["predicted"] - one["observed"]["mean"], 2)) for one in found["bins"]}
        assert factor == 1.0 or signs == {np.sign(factor - 1)}


class TestBestOfN:
    SCORES, GOLD = np.array([[1.0, 2.0], [2.0, 1.0]]), np.array([[0.0, 1.0], [0.5, 0.0]])

    def test_by_hand(self) -> None:
        """The reward picks the better of both; turned around it picks the worse."""
        found = quality.best_of_n(self.SCORES, self.GOLD)
        names = ("one_response", "best_by_reward", "best_by_gold", "gain", "possible_gain")
        assert [found[name]["mean"] for name in names] == [0.375, 0.75, 0.75, 0.375, 0.375]
        assert {found[name]["n"] for name in names} == {2} and found["n"] == 2
        worse = quality.best_of_n(-self.SCORES, self.GOLD)
        assert [worse[name]["mean"] for name in names] == [0.375, 0.0, 0.75, -0.375, 0.375]

    def test_levels_of_prompts_change_nothing(self) -> None:
        """An uncentred reward ranks the responses to a prompt as before."""
        found = quality.best_of_n(self.SCORES + np.array([[100.0], [-100.0]]), self.GOLD)
        assert found == quality.best_of_n(self.SCORES, self.GOLD)


def test_the_share_that_the_guard_reads(tmp_path: Path) -> None:
    """None where nothing was measured or all scores were equal."""
    inputs = {"reward_quality": tmp_path, "reward": tmp_path}
    assert quality.between_prompt_share({"reward": tmp_path}) is None
    for share, expected in ((None, None), ({"mean": 0.875, "low": 0.8, "high": 0.9, "n": 64}, 0.875)):
        (tmp_path / quality.METRICS).write_text(json.dumps({"between_prompt_share": share}))
        assert quality.between_prompt_share(inputs) == expected
