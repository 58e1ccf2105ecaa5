"""The report's headline: every model against the start and against PPO, in numbers and in words."""

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

EXPLAINED = {
    "gold": "a program's grade",
    "in": "in distribution: short answers",
    "out": "long answers",
    "other": "unused",
}
UP, SAME, DOWN = (0.1, 0.02, 0.18), (0.01, -0.07, 0.09), (-0.1, -0.18, -0.02)


def one(a: str, b: str, values: tuple[float, float, float], dataset: str = "in") -> dict[str, Any]:
    """A difference a − b of (mean, low, high)."""
    found = {"dataset": dataset, "measure": "gold", "a": a, "b": b, "n": 50}
    return found | dict(zip(("mean", "low", "high"), values, strict=True))


def part(dataset: str = "in", **starts: tuple[float, float, float]) -> dict[str, Any]:
    """A table of one set whose policies differ from the start by (mean, low, high)."""
    rows = [{"model": name, "policy": True, "start": one(name, "seed-0", values)} for name, values in starts.items()]
    return {"dataset": dataset, "n": 50, "measure": "gold", "rows": rows}


def tables_of(run: ReportInput, **changes: Any) -> list[dict[str, Any]]:
    return headline.table(findings.scored(replace(run, **changes)))


@pytest.fixture(scope="module")
def run() -> ReportInput:
    found = synthetic(n=40)
    policies = {**found.policies, "mkl": replace(found.policies["mkl"], references=2)}
    return replace(found, explained=EXPLAINED, policies=policies)


def test_each_model_against_its_start_and_against_ppo(run: ReportInput) -> None:
    """By hand from the answers: the mean over prompts of the model's score minus the other's, and its t-interval."""
    tables = tables_of(run)
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
    tables = tables_of(run, policies={"ppo": ppo, "salsa": salsa, **dpo})
    assert tables[0]["against"] == ["ppo", "mkl"]
    against_mkl = findings.difference(run.evaluation, run.answers, "in", "gold", "shrunk", "mkl")
    assert next(row for row in tables[0]["rows"] if row["model"] == "shrunk")["ppo"] == against_mkl
    rows = tables_of(run, policies={"salsa": salsa})[0]["rows"]
    assert all(row["ppo"] is None and row["start"] is not None for row in rows)
    candidates = {"mkl": ppo, "shrunk": ppo, "salsa": salsa}
    search = {"methods": {"ppo": {"best": "shrunk"}}}
    assert tables_of(run, policies=candidates)[0]["against"] == ["mkl"]
    assert tables_of(run, policies=candidates, evaluation={**run.evaluation, "search": search})[0]["against"] == [
        "shrunk"
    ]
    assert tables_of(run, policies={})[0]["against"] == [] and tables_of(run, evaluation={}) == []


@pytest.mark.parametrize(
    ("given", "gain"),
    [
        ({"a": UP, "b": UP}, "all 2 policies scored higher than seed-0 on “in”"),
        ({"a": UP}, "a scored higher than seed-0 on “in”"),
        ({"a": UP, "b": SAME}, "1 of 2 policies scored higher than seed-0 (not distinguishable from it: b) on “in”"),
        ({"a": SAME, "b": SAME}, "no policy is distinguishable from seed-0 on “in”"),
        ({"a": SAME}, "a is not distinguishable from seed-0 on “in”"),
        ({"a": DOWN, "b": SAME, "c": DOWN}, "0 of 3 policies scored higher than seed-0 (not distinguishable from it: b) (lower: a and c) on “in”"),
    ],
)  # fmt: skip
def test_gains_follow_the_intervals(given: dict[str, Any], gain: str) -> None:
    assert headline.gains([part(**given)]) == gain
    assert headline.gains([part(**given), part("out", **given)]) == gain + " and “out”"
    assert headline.gains([]) == ""


def test_two_models_are_compared_in_words() -> None:
    found = [one("salsa", "ppo", UP), one("salsa", "ppo", SAME, "out"), one("salsa", "ppo", DOWN, "far")]
    said = headline.versus(found, "salsa", "ppo")
    assert said == (
        "salsa scored higher than ppo on “in”; salsa is not distinguishable from ppo on “out”; salsa scored lower than ppo"
        " on “far”"
    )
    assert headline.versus(found, "ppo", "salsa") == ""


@pytest.mark.parametrize(
    ("values", "said", "of_trained"),
    [
        ((UP, UP), "RLHF improved the answers to “in”", "RLHF raised the score that the policies are trained on, on “in”"),
        ((DOWN, SAME), "RLHF made the answers to “in” worse", "RLHF lowered the score that the policies are trained on, on “in”"),
        ((SAME, SAME), "RLHF shows no effect on the answers to “in”", "RLHF shows no effect on the score that the policies are trained on, on “in”"),
        ((UP, DOWN), "RLHF improved some policies’ answers to “in” and made others worse", "RLHF raised the score of some policies on “in” and lowered that of others"),
    ],
)  # fmt: skip
def test_the_effect_of_rlhf(run: ReportInput, values: Any, said: str, of_trained: str) -> None:
    """A score on which the policies were trained says nothing about the answers."""
    found = [one("ppo", "seed-0", values[0]), one("salsa", "seed-0", values[1]), one("soup", "seed-0", UP)]
    assert headline.effect(found, run.policies, trained=False) == said
    assert headline.effect(found, run.policies, trained=True) == of_trained
    assert headline.effect(found[2:], run.policies, trained=False) == ""


@pytest.mark.parametrize(
    ("ppo", "shrunk", "said"),
    [
        ((UP, UP), (UP, UP), "averaging may be the reason why salsa beats ppo, because salsa also beats every control"),
        ((UP, UP), (SAME, DOWN), "that salsa beats ppo is no evidence for averaging, because salsa does not beat shrunk, which averages nothing"),
        ((UP, UP), (UP, SAME), "averaging may be the reason why salsa beats ppo on “in”, where it also beats every control, but not on “out”, where it does not beat shrunk, which averages nothing"),
        ((SAME, DOWN), (UP, UP), "it shows no advantage of the soup as KL reference, because salsa did not beat ppo"),
        ((UP, UP), None, "whether averaging is the reason why salsa beats ppo is not tested, because the run has no control"),
    ],
)  # fmt: skip
def test_what_salsa_says_about_averaging(run: ReportInput, ppo: Any, shrunk: Any, said: str) -> None:
    found = [one("salsa", name, value, dataset) for name, values in (("ppo", ppo), ("shrunk", shrunk)) if values for dataset, value in zip(("in", "out"), values, strict=True)]  # fmt: skip
    assert headline.averaging(found, run.policies) == said
    assert headline.averaging(found, {"ppo": run.policies["ppo"]}) == ""


def test_html_markdown_summary_and_terminal_say_the_same(run: ReportInput, tmp_path: Path) -> None:
    """Every number of the tables, every sentence, and the explanation of each name."""
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
    screen = summary["screen"]
    assert list(screen["sentences"]) == ["What came out", "What it means", "What it does not mean"]
    for sentence in screen["sentences"].values():
        assert all(sentence in where for where in (page, plain, terminal)), sentence
    for name in ("in", "out", "seed-0", "soup", "KL reference", "control", "gold reward", "mkl"):
        explanation = screen["names"][name]
        assert explanation in terminal and explanation in plain and f"{name}{explanation}." in page
    assert screen["names"]["out"] == EXPLAINED["out"] and "unused" not in page + text + terminal
    salsa = next(row for row in summary["headline"][0]["rows"] if row["model"] == "salsa")
    line = next(line for line in lines if line.startswith("salsa "))
    assert " ".join(line.split()).endswith(f"{words.signed(salsa['start'])} {words.signed(salsa['ppo'])}")


def test_a_narrow_terminal_gets_half_of_each_interval() -> None:
    """The columns end under their titles, and a long name does not push them beyond 80 characters."""
    table = {**part(salsa=(0.1, 0.02, 0.18), mkl=(-0.1, -0.175, -0.025)), "against": ["ppo"]}
    table["start"] = {"mean": 0.644, "low": 0.618, "high": 0.67}
    for row in table["rows"]:
        row |= {"control": row["model"] == "mkl", "score": {"mean": 0.75, "low": 0.7, "high": 0.8}, "ppo": None}
    lines = headline.console([table], {}, {"What it means": "word " * 40}, headline.NARROW)
    assert lines[lines.index("") + 1 :][:4] == [
        "in, 50 prompts    gold reward  minus seed-0, the start       minus ppo",
        "seed-0          0.644 ± 0.026",
        "salsa           0.750 ± 0.050           +0.100 ± 0.080               –",
        "mkl (control)   0.750 ± 0.050           −0.100 ± 0.075               –",
    ]
    assert max(map(len, lines)) <= 80
