"""The report's section on the reward: its numbers and sentences, in both texts, and nothing without measures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from markdown_it import MarkdownIt
from synthetic_run import Page, synthetic

from salsa_peft.models.rewards import quality
from salsa_peft.report import format as words
from salsa_peft.report.page import write_report
from salsa_peft.report.sections import reward
from salsa_peft.training.reward_model import held_out_metrics


def measured(level: float = 0.5, skill: float = 1.0) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metrics of a reward stage and of a reward_quality stage. level: SD between prompts; within a prompt it is 1."""
    rng = np.random.default_rng(0)
    gold = rng.normal(0, 1, (64, 4))
    scores = level * rng.normal(0, 1, (64, 1)) + skill * gold + 0.1 * rng.normal(0, 1, (64, 4))
    pairs = rng.normal((1, 0), 1, (200, 2))
    samples = {"prompts": 64, "responses": 4, **quality.spread(scores), "best_of_n": quality.best_of_n(scores, gold)}
    return {**held_out_metrics(pairs), "loss": 0.5}, samples


def test_numbers_stand_in_both_texts(tmp_path: Path) -> None:
    """Every mean with its interval; the tables' rows stay out of the list of facts."""
    metrics, samples = measured()
    members = [{**metrics, "seed": seed} for seed in (3, 4)]
    run = replace(synthetic(small=True), reward={**metrics, "members": members}, reward_quality=samples)
    summary = write_report(tmp_path, run)
    html, text = ((tmp_path / f"report.{kind}").read_text("utf-8") for kind in ("html", "md"))
    page = Page(html)
    assert not page.open and html.count('id="reward"') == 1 and "#reward" in page.resources
    shares = [samples["between_prompt_share"], metrics["spread"]["held_out"]["between_prompt_share"]]
    shares += [one["observed"] for one in metrics["calibration"]["held_out"]["bins"]]
    for share in shares:
        value = f"{words.percent(share['mean'])} [{words.percent(share['low'])}, {words.percent(share['high'])}]"
        assert value in page.text and value in text
    best = samples["best_of_n"]
    for name in ("one_response", "best_by_reward", "best_by_gold"):
        assert words.estimate(best[name]) in page.text and words.estimate(best[name]) in text
    for name in ("gain", "possible_gain"):
        assert words.signed(best[name]) in page.text and words.signed(best[name]) in text
    assert "calibration.held_out" not in text and "accuracy of members.seed 4" in page.text
    assert len(MarkdownIt("commonmark").enable("table").parse(text.split("## The reward")[1].split("\n## ")[0])) > 100
    assert text.split("## The reward")[1].split("\n## ")[0].count("\n|---") == 3
    assert (summary["reward_quality"], summary["reward"]) == (samples, run.reward)


def test_without_measures_there_is_no_section(tmp_path: Path) -> None:
    """Such as a run with a reward function and no policy that learns from it."""
    write_report(tmp_path, synthetic(small=True))
    html, text = ((tmp_path / f"report.{kind}").read_text("utf-8") for kind in ("html", "md"))
    assert 'id="reward"' not in html and "#reward" not in html and "## The reward" not in text


@pytest.mark.parametrize(("given", "parts"), [("pairs", 1), ("samples", 2)])
def test_half_of_it(given: str, parts: int, tmp_path: Path) -> None:
    """A reward model whose samples were not measured; a reward function, which has no held-out pairs."""
    metrics, samples = measured()
    del samples["best_of_n"]
    pairs, quality_ = (metrics, None) if given == "pairs" else ({}, samples)
    write_report(tmp_path, replace(synthetic(small=True), reward=pairs, reward_quality=quality_))
    text = (tmp_path / "report.md").read_text("utf-8").split("## The reward")[1].split("\n## ")[0]
    assert ("held-out pairs |" in text) is (given == "pairs") and ("responses of seed-0 |" in text) is (
        given != "pairs"
    )
    assert len(reward.sentences(pairs, quality_)) == 1


def test_what_is_said() -> None:
    """Advice only for a large share; no gain is promised where none was shown; a constant reward teaches nothing."""
    metrics, good = measured()
    _, steep = measured(level=3)
    _, blind = measured(skill=0)
    said, of_steep, of_blind = (" ".join(reward.sentences(metrics, one)) for one in (good, steep, blind))
    assert "of 200 held-out pairs as the data does." in said and "center_rewards_coefficient" not in said
    assert "reward.center_rewards_coefficient" in of_steep and "No gain was shown" not in said + of_steep
    assert "No gain was shown, so little can be expected of RL on this reward." in of_blind
    flat = {**good, **quality.spread(np.ones((4, 4)))}
    assert "RL cannot learn from this reward" in " ".join(reward.sentences({}, flat))
