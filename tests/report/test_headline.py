"""The report's headline: every policy against its start and against PPO, in numbers and in words."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from synthetic_run import Page, synthetic

from salsa_peft.report import findings, headline
from salsa_peft.report import format as words
from salsa_peft.report.gather import ReportInput
from salsa_peft.report.page import write_report

EXPLAINED = {"gold": "a program's grade", "in": "short answers", "out": "long answers", "other": "unused"}


def part(**starts: tuple[float, float, float]) -> dict[str, Any]:
    """A table of one set whose policies differ from the start by (mean, low, high)."""
    rows = [
        {"model": name, "policy": True, "start": dict(zip(("mean", "low", "high"), values, strict=True)) | {"n": 50}}
        for name, values in starts.items()
    ]
    return {"dataset": "in", "n": 50, "measure": "gold", "rows": rows}


UP, SAME, DOWN = (0.1, 0.02, 0.18), (0.01, -0.07, 0.09), (-0.1, -0.18, -0.02)


@pytest.fixture(scope="module")
def run() -> ReportInput:
    return replace(synthetic(n=40), explained=EXPLAINED)


def test_each_policy_against_its_start_and_against_ppo(run: ReportInput) -> None:
    """By hand from the answers: the mean over prompts of the policy's score minus the other's, and its t-interval."""
    tables = headline.table(run.evaluation, run.answers, run.policies)
    assert [part["dataset"] for part in tables] == ["in", "out"]
    for part in tables:
        assert [row["model"] for row in part["rows"]] == ["base", "soup", "ppo", "salsa", "shrunk", "mkl"]
        assert [row["control"] for row in part["rows"]] == [True, False, False, False, True, False]
        assert [row["policy"] for row in part["rows"]] == [False, False, True, True, True, True]
        gold = {
            name: np.array([r["scores"]["gold"] for r in run.answers if (r["dataset"], r["model"]) == (part["dataset"], name)])
            for name in ("seed-0", "base", "soup", "ppo", "salsa", "shrunk", "mkl")
        }  # fmt: skip
        assert part["start"]["mean"] == pytest.approx(gold["seed-0"].mean())
        for row in part["rows"]:
            assert row["score"]["mean"] == pytest.approx(gold[row["model"]].mean())
            for key, other in (("start", "seed-0"), ("ppo", "ppo")):
                if row["model"] == other:
                    assert row[key] is None
                    continue
                gap = gold[row["model"]] - gold[other]
                half = 2.0227 * gap.std(ddof=1) / np.sqrt(40)  # t(0.975, 39)
                assert row[key]["mean"] == pytest.approx(gap.mean())
                assert row[key]["high"] - row[key]["mean"] == pytest.approx(half, rel=1e-4)


def test_a_policy_is_compared_with_the_plain_one_of_its_algorithm(run: ReportInput) -> None:
    """Also where the plain policy has another name, is one of those that a search tried, or does not exist."""
    ppo, salsa = run.policies["ppo"], run.policies["salsa"]
    dpo = {name: replace(policy, algorithm="dpo") for name, policy in (("shrunk", salsa), ("mkl", ppo))}
    tables = headline.table(run.evaluation, run.answers, {"ppo": ppo, "salsa": salsa, **dpo})
    assert tables[0]["against"] == ["ppo", "mkl"]
    against_mkl = findings.difference(run.evaluation, run.answers, "in", "gold", "shrunk", "mkl")
    assert next(row for row in tables[0]["rows"] if row["model"] == "shrunk")["ppo"] == against_mkl
    rows = headline.table(run.evaluation, run.answers, {"salsa": salsa})[0]["rows"]
    assert all(row["ppo"] is None and row["start"] is not None for row in rows)
    candidates = {"mkl": ppo, "shrunk": ppo, "salsa": salsa}
    search = {"methods": {"ppo": {"best": "shrunk"}}}
    assert headline.table(run.evaluation, run.answers, candidates)[0]["against"] == ["mkl"]
    assert headline.table({**run.evaluation, "search": search}, run.answers, candidates)[0]["against"] == ["shrunk"]
    assert headline.table(run.evaluation, run.answers, {}) == headline.table({}, [], {}) == []


@pytest.mark.parametrize(
    ("given", "gain", "means"),
    [
        ({"a": UP, "b": UP}, "2 of 2 policies scored higher than seed-0, where training started.", "RLHF improved"),
        ({"a": UP, "b": SAME}, "1 of 2 policies scored higher than seed-0, where training started; not distinguishable from it: b.", "RLHF improved"),
        ({"a": SAME, "b": SAME}, "0 of 2 policies scored higher than seed-0, where training started; not distinguishable from it: a and b.", "shows no effect"),
        ({"a": DOWN, "b": SAME, "c": DOWN}, "0 of 3 policies scored higher than seed-0, where training started; not distinguishable from it: b; lower: a and c.", "RLHF made the answers to “in” worse"),
        ({"a": UP, "b": DOWN}, "1 of 2 policies scored higher than seed-0, where training started; lower: b.", "RLHF improved some policies' answers to “in” and made others worse"),
    ],
)  # fmt: skip
def test_the_sentences_follow_the_intervals(given: dict[str, Any], gain: str, means: str) -> None:
    assert headline.gains([part(**given)]) == [f"By gold reward, on 50 prompts of “in”, {gain}"]
    (text,) = headline.meaning([part(**given)])
    assert means in text
    (trained,) = headline.meaning([{**part(**given), "measure": "reward"}])
    assert "not that the answers are better" in trained and "RLHF" not in trained
    assert headline.gains([]) == headline.meaning([]) == []


def test_the_meaning_is_one_sentence_for_all_sets() -> None:
    other = {**part(a=SAME), "dataset": "out"}
    (both,) = headline.meaning([part(a=UP), {**part(a=UP), "dataset": "out"}])
    assert "RLHF improved the answers to “in” and “out”, by" in both
    (mixed,) = headline.meaning([part(a=UP), other])
    assert "RLHF improved the answers to “in”, and shows no effect on the answers to “out”, by" in mixed


def test_html_markdown_summary_and_terminal_say_the_same(run: ReportInput, tmp_path: Path) -> None:
    """Every number of the tables, every sentence, and the explanation of each name once."""
    summary = write_report(tmp_path, run)
    page, text = Page((tmp_path / "report.html").read_text("utf-8")).text, (tmp_path / "report.md").read_text("utf-8")
    lines = summary["console"]
    narrow = summary["narrow_console"]
    assert max(map(len, narrow)) <= headline.NARROW == 80 < max(map(len, lines))
    terminal = " ".join(" ".join(lines).split())
    assert max(map(len, lines)) <= headline.WIDTH
    plain = text.replace("\\", "")
    for part in summary["headline"]:
        for row in part["rows"]:
            for one in filter(None, (row["start"], row["ppo"])):
                assert all(words.signed(one) in where for where in (page, plain, terminal))
            assert all(words.estimate(row["score"]) in where for where in (page, plain, terminal))
    found = headline.gains(summary["headline"]) + headline.meaning(summary["headline"]) + [findings.REPLICATE]
    assert len(found) == 4
    for sentence in [
        *found,
        *(f"{name}: {EXPLAINED[name]}" for name in ("in", "out")),
        "gold reward: a program's grade",
    ]:
        assert all(sentence in where for where in (page, plain.replace("**", ""), terminal)), sentence
    assert "unused" not in page + text + terminal
    salsa = next(row for row in summary["headline"][0]["rows"] if row["model"] == "salsa")
    line = next(line for line in lines if line.startswith("salsa "))
    assert " ".join(line.split()).endswith(f"{words.signed(salsa['start'])} {words.signed(salsa['ppo'])}")


def test_a_narrow_terminal_gets_half_of_each_interval() -> None:
    """The columns end under their titles, and a long name does not push them beyond 80 characters."""
    table = {**part(salsa=(0.1, 0.02, 0.18), mkl=(-0.1, -0.175, -0.025)), "against": ["ppo"]}
    table["start"] = {"mean": 0.644, "low": 0.618, "high": 0.67}
    for row in table["rows"]:
        row |= {"control": row["model"] == "mkl", "score": {"mean": 0.75, "low": 0.7, "high": 0.8}, "ppo": None}
    lines = headline.console([table], {}, ["word " * 40], headline.NARROW)
    assert lines[lines.index("") + 1 :][:4] == [
        "in, 50 prompts    gold reward  − seed-0, the start           − ppo",
        "seed-0          0.644 ± 0.026",
        "salsa           0.750 ± 0.050       +0.100 ± 0.080               –",
        "mkl (control)   0.750 ± 0.050       −0.100 ± 0.075               –",
    ]
    assert max(map(len, lines)) <= 80
