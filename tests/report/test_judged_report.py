"""What a judge's verdicts come to in the report: tables, bounds, trust, ablations, a search, answers by turn with their filter."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from synthetic_run import HOSTILE, Page, synthetic, with_judge

from salsa_peft.evaluation.judge_statistics import pair_result
from salsa_peft.report import findings, paper
from salsa_peft.report import format as words
from salsa_peft.report import judge_tables as report_judge
from salsa_peft.report import page as report_answers
from salsa_peft.report.gather import ReportInput
from salsa_peft.report.page import write_report
from salsa_peft.report.sections import first_screen

SALSA_PPO = ("salsa", "ppo")


@pytest.fixture(scope="module")
def run() -> ReportInput:
    return with_judge(synthetic(n=40), words=HOSTILE)


@pytest.fixture(scope="module")
def written(run: ReportInput, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("judged")
    return folder, write_report(folder, run)


def test_every_rate_stands_in_both_texts(run: ReportInput, written: tuple[Path, dict[str, Any]]) -> None:
    """With its interval, the bounds of what is missing, Holm's p, the rate at equal length."""
    page, text = Page((written[0] / "report.html").read_text("utf-8")), (written[0] / "report.md").read_text("utf-8")
    assert run.verdicts is not None
    for data in run.verdicts["datasets"].values():
        assert len(data["pairs"]) == 4
        for pair in data["pairs"]:
            share = words.percent
            rate = f"{share(pair['adjusted_win_rate'])} [{share(pair['low'])}, {share(pair['high'])}]"
            bounds = f"{share(pair['worst_low'])} – {share(pair['worst_high'])}"
            equal = pair["length_controlled"]
            even = f"{share(equal['rate'])} [{share(equal['low'])}, {share(equal['high'])}]"
            for shown in (rate, bounds, even, words.p_value(pair["p_holm"])):
                assert shown in page.text and shown in text
    assert written[1]["verdicts"] == run.verdicts
    assert not page.open and page.text.count("Turn by turn") == 1
    assert "local tiny-judge" in page.text and "/home/somebody" not in page.text + text  # a path is nobody's business


def test_a_runs_own_text_is_text(written: tuple[Path, dict[str, Any]]) -> None:
    """<script> and </script> in what the judge said; nothing is fetched, whatever a reader's browser would do."""
    html = (written[0] / "report.html").read_text("utf-8")
    assert "<script" not in html and html.count("&lt;script&gt;alert(1)&lt;/script&gt;") > 100
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', html)
    assert policy and policy[1].startswith("default-src 'none'; style-src 'unsafe-inline'")


def test_the_first_screen_has_the_judge_first(run: ReportInput, written: tuple[Path, dict[str, Any]]) -> None:
    """A card for each pair with its rates, in both texts; the sentence on SALSA and PPO is the judge's."""
    screen = written[1]["screen"]
    page, text = (
        Page((written[0] / "report.html").read_text("utf-8")).text,
        (written[0] / "report.md").read_text("utf-8"),
    )
    cards = [card for card in screen["cards"] if card["judge"]]
    assert screen["cards"][: len(cards)] == cards and next((card["a"], card["b"]) for card in cards) == SALSA_PPO
    assert run.verdicts is not None and len(cards) == 4
    for card in cards:
        for row in card["rows"]:
            pairs = run.verdicts["datasets"][row["dataset"]]["pairs"]
            pair = next(one for one in pairs if (one["a"], one["b"]) == (card["a"], card["b"]))
            rate = (
                f"{words.percent(pair['adjusted_win_rate'])}%",
                f"[{words.percent(pair['low'])}, {words.percent(pair['high'])}]",
            )
            assert (row["value"], row["interval"]) == rate
            assert "".join(rate) in page and f"{rate[0]} {rate[1]}" in text
    assert screen["sentences"]["What came out"].startswith("By the judge (local tiny-judge), salsa")
    assert "compared by local tiny-judge" in screen["line"]


@pytest.mark.parametrize(
    ("rate", "p", "said"),
    [
        ((0.52, 0.48, 0.56), 0.3, "undecided"),
        ((0.60, 0.52, 0.68), 0.01, "preferred"),
        ((0.40, 0.32, 0.48), 0.01, "not preferred"),
        ((0.60, 0.52, 0.68), 0.08, "preferred (p 0.080, Holm)"),
    ],
)
def test_the_words_follow_the_interval(rate: tuple[float, float, float], p: float, said: str) -> None:
    pair = {
        "a": "salsa",
        "b": "ppo",
        "n": 80,
        "adjusted_win_rate": rate[0],
        "low": rate[1],
        "high": rate[2],
        "p_holm": p,
    }
    judged = {"datasets": {"in": {"questions": 80, "pairs": [pair, {**pair, "b": "seed-0", "n": 0}]}}}
    (card,) = first_screen.cards(first_screen.by_judge(judged), synthetic(n=2, small=True).policies, "a judge")
    assert card["rows"][0]["outcome"] == said and card["by"] == "a judge"


def test_what_to_know_of_the_judge(run: ReportInput) -> None:
    """Missing verdicts always; flips, position bias and a reward that judges its own where they are."""
    told = report_judge.warnings(run)
    assert [line[:6] for line in told] == ["“in”: ", "“out”:"] and "judgments have no verdict" in told[0]
    assert run.verdicts is not None
    worse = [
        {**pair, "flip_rate": 0.6, "first_position_rate": 0.8, "missing": 0}
        for pair in run.verdicts["datasets"]["in"]["pairs"]
    ]
    other = {
        **run.verdicts,
        "judge": {"kind": "reward", "model": None, "prompt": "figure7"},
        "datasets": {"in": {"pairs": worse}},
    }
    told = report_judge.warnings(replace(run, verdicts=other))
    assert (
        "so it favours the policies" in told[0]
        and "60% of judgments" in told[1]
        and "80% of the verdicts" in told[2]
        and len(told) == 3
    )


def test_answers_that_are_the_same_are_said(run: ReportInput) -> None:
    """From a fifth of them on."""
    said = {
        row["index"]: row["response"]
        for row in run.answers
        if row["model"] == "ppo" and row["turn"] == 1 and row["dataset"] == "in"
    }
    twins = [
        {**row, "response": said[row["index"]]} if row["model"] == "salsa" and row["dataset"] == "in" else row
        for row in run.answers
    ]
    (line,) = [
        line
        for line in report_judge.warnings(replace(run, answers=twins))
        if "are identical" in line and "salsa and ppo" in line
    ]
    assert line.startswith("“in”: 80 of 80 answers of salsa and ppo are identical")


def test_no_verdict_is_no_rate(run: ReportInput, tmp_path: Path) -> None:
    """A dash in the tables, nothing in the figure."""
    assert run.verdicts is not None
    none = {
        "n": 0,
        "wins": 0,
        "losses": 0,
        "ties": 0,
        "missing": 40,
        "win_rate": 0.0,
        "adjusted_win_rate": 0.5,
        "low": 0.0,
        "high": 1.0,
    }
    pair = {**run.verdicts["datasets"]["in"]["pairs"][0], **none, "length_controlled": None}
    verdicts = {**run.verdicts, "datasets": {"in": {**run.verdicts["datasets"]["in"], "pairs": [pair]}}}
    write_report(tmp_path, replace(run, verdicts=verdicts, landscape=None, policies={}))
    page = Page((tmp_path / "report.html").read_text("utf-8")).text
    assert "50.0 [0.0, 100.0]" not in page + (tmp_path / "report.md").read_text("utf-8")
    assert "The judge (local tiny-judge) gave no verdict." in page and not list((tmp_path / "figures").glob("judged-*"))


def test_without_verdicts_there_is_no_such_section(tmp_path: Path) -> None:
    """Scores and their pairs stand as ever."""
    write_report(tmp_path, synthetic(n=31, policies=("ppo",), gold=False, small=True))
    page = Page((tmp_path / "report.html").read_text("utf-8"))
    assert "judge" not in page.text.lower() and "ablations" not in page.text.lower()


class TestPaper:
    """The paper's numbers beside a run's."""

    def test_where_base_questions_and_models_are_its(self, run: ReportInput, tmp_path: Path) -> None:
        assert run.verdicts is not None
        data = run.verdicts["datasets"]["in"]
        named = replace(
            run,
            base="meta-llama/Llama-2-7b-hf",
            verdicts={**run.verdicts, "datasets": {"mt_bench": data, "mine": data}},
        )
        told = report_judge.judged(named)
        assert told is not None and told["paper"]
        cell = paper.beside("Llama-2-7b-hf", "mt_bench", *SALSA_PPO)
        assert cell is not None
        found = {(pair["a"], pair["b"]): pair["paper"] for pair in told["datasets"]["mt_bench"]["pairs"]}
        assert found[SALSA_PPO] == {
            "adjusted_win_rate": 0.525,
            "low": cell.rates.low,
            "high": cell.rates.high,
            "table": 2,
        }
        assert found["salsa", "shrunk"] is None
        assert not any(pair["paper"] for pair in told["datasets"]["mine"]["pairs"])
        summary = write_report(tmp_path, replace(named, landscape=None, policies={}, answers=[]))
        assert {(one["a"], one["b"]) for one in summary["paper"]["mt_bench"]} == {
            SALSA_PPO,
            ("salsa", "seed-0"),
            ("ppo", "seed-0"),
        }
        for name in ("report.html", "report.md"):
            assert "paper 52.5 [48.1, 56.9]" in Page((tmp_path / name).read_text("utf-8")).text
        assert not report_judge.judged(run)["paper"]  # type: ignore[index]


class TestAnswers:
    """Side by side."""

    def test_all_turns_with_their_rulings(self, run: ReportInput) -> None:
        found = report_answers.sample_answers(replace(run, samples=3))
        assert found["pair"] == SALSA_PPO and [len(of) for of in found["datasets"].values()] == [3, 3]
        question = found["datasets"]["in"][1]
        assert len(question["turns"]) == 2 and question["turns"][1]["prompt"] == "and why?"
        assert list(question["turns"][0]["answers"]) == findings.order(run.evaluation, run.policies)
        mine = [row for row in run.judgments if (row["dataset"], row["index"]) == ("in", 1)]
        assert [row for turn in question["turns"] for row in turn["judgments"]] == mine
        first = [row["winner"] for row in mine if (row["a"], row["b"]) == SALSA_PPO]
        assert [turn["outcome"] for turn in question["turns"]] == [
            {"a": "win", "b": "loss"}.get(who, who) for who in first
        ]

    def test_the_filter_needs_no_script(self, written: tuple[Path, dict[str, Any]]) -> None:
        """A rule of the style sheet for each outcome, and the questions carry theirs."""
        html = (written[0] / "report.html").read_text("utf-8")
        for outcome in report_answers.OUTCOMES:
            assert f"#answers:has(#show-{outcome}:checked) .question:not(.o-{outcome})" in html
            assert f'id="show-{outcome}"' in html
        shown = re.findall(r'<details class="question([^"]*)"', html)
        assert len(shown) == 40 and all(re.fullmatch(r"( o-(win|loss|tie|missing))+", one) for one in shown)

    def test_by_scores_without_a_judge(self) -> None:
        one = synthetic(n=5, small=True)
        scores = {(row["index"], row["model"]): row["scores"]["gold"] for row in one.answers}
        for index, question in enumerate(report_answers.sample_answers(one)["datasets"]["in"]):
            x, y = scores[index, "salsa"], scores[index, "ppo"]
            assert question["outcomes"] == ["win" if x > y else "loss" if x < y else "tie"]

    def test_answers_that_were_cut_are_counted(self, run: ReportInput) -> None:
        """Those as long as they could be: 4 tokens, of 2, 3, 4."""
        assert report_answers.truncated(run) == {name: pytest.approx(13 / 40) for name in ("in", "out")}
        assert (
            report_answers.truncated(replace(run, limit=None)) == report_answers.truncated(replace(run, limit=9)) == {}
        )


class TestAblations:
    """Figures 4a, 5 and A.4."""

    def pair(self, a: str, rate: float, b: str = "ppo") -> dict[str, Any]:
        return {"a": a, "b": b, "measure": "gold", "adjusted_win_rate": rate, "low": rate - 0.05, "high": rate + 0.05}

    def test_by_the_names_of_a_sweep(self, tmp_path: Path) -> None:
        """Against each opponent; several β at one α are several points; PPO is the soup of one."""
        one = synthetic(n=31, policies=("ppo", "salsa"), small=True)
        pairs = [
            self.pair("alpha-0.25", 0.5),
            self.pair("alpha-0.5-kl-0.01", 0.6),
            self.pair("alpha-0.5-kl-0.05", 0.55),
            self.pair("alpha-1", 0.43),
        ]
        pairs += [
            self.pair("members-2", 0.6, "seed-0"),
            self.pair("members-3", 0.65, "seed-0"),
            self.pair("ppo", 0.52, "seed-0"),
        ]
        swept = {name: replace(one.policies["salsa"], metrics=[]) for name in ("alpha-0.25", "members-2")}
        data = {**one.evaluation["datasets"]["in"], "pairs": pairs}
        told = replace(
            one, evaluation={**one.evaluation, "datasets": {"in": data}}, policies={"ppo": one.policies["ppo"], **swept}
        )
        found = report_judge.ablations(told, "gold")
        assert [(figure["kind"], figure["against"], [(point["x"], point["adjusted_win_rate"]) for point in figure["points"]]) for figure in found] == [
            ("alpha", "ppo", [(0.25, 0.5), (0.5, 0.6), (0.5, 0.55), (1.0, 0.43)]),
            ("members", "seed-0", [(2.0, 0.6), (3.0, 0.65), (1.0, 0.52)]),
        ]  # fmt: skip
        assert report_judge.ablations(told, "reward") == []

    def test_a_search(self, run: ReportInput, tmp_path: Path) -> None:
        """What was tried and picked; the paper's cell is the method's."""
        tried = [{"policy": f"salsa-kl-{beta:g}", "kl_coef": beta, "adjusted_win_rate": rate, "low": rate - 0.1, "high": rate + 0.1}
                 for beta, rate in ((0.01, 0.61), (0.05, 0.55))]  # fmt: skip
        assert run.verdicts is not None
        search = {
            "by": "judge",
            "datasets": ["in"],
            "against": "seed-0",
            "methods": {"salsa": {"best": "salsa-kl-0.01", "tried": tried}},
        }
        told = replace(run, verdicts={**run.verdicts, "search": search})
        (figure,) = report_judge.ablations(told, "gold")
        assert (figure["kind"], figure["log"], [point["x"] for point in figure["points"]]) == ("kl", True, [0.01, 0.05])
        assert (
            report_judge.method(told, "salsa-kl-0.01") == "salsa"
            and report_judge.method(told, "salsa-kl-0.05") == "salsa-kl-0.05"
        )
        assert any("favours the picked value" in line for line in report_judge.warnings(told))
        assert not any(
            "picked" in line
            for line in report_judge.warnings(
                replace(told, verdicts={**told.verdicts, "search": {**search, "datasets": ["other"]}})
            )
        )
        data = run.verdicts["datasets"]["in"]
        extra = [{**data["pairs"][0], "a": name, "b": "seed-0"} for name in ("salsa-kl-0.01", "salsa-kl-0.05")]
        more = replace(told, verdicts={**told.verdicts, "datasets": {"in": {**data, "pairs": extra}}})
        assert report_judge.judged(more)["pairs"] == [("salsa-kl-0.01", "seed-0")]  # type: ignore[index]
        methods = {**search["methods"], "ppo": {"best": "ppo-kl-0.2", "tried": []}}
        llama = replace(
            told, base="Llama-2-7b-hf", verdicts={**told.verdicts, "search": {**search, "methods": methods}}
        )
        found = report_judge._paper_cell(llama, "mt_bench", {"a": "salsa-kl-0.01", "b": "ppo-kl-0.2"})
        assert found and found["adjusted_win_rate"] == 0.525
        summary = write_report(tmp_path, replace(told, landscape=None, policies={}))
        page = Page((tmp_path / "report.html").read_text("utf-8")).text
        assert summary["search"] == search and "61.0 [51.0, 71.0]" in page and page.count("picked") >= 2


def test_a_pairs_rows_either_way_round(run: ReportInput) -> None:
    """b over a has a's losses as wins, lengths and games the other way round."""
    rows = report_judge.judgments_of(run, "in", *SALSA_PPO, "gold")
    back = report_judge.judgments_of(run, "in", *SALSA_PPO[::-1], "gold")
    assert run.verdicts is not None
    first, turned = pair_result(rows), pair_result(back)
    assert first.wins == run.verdicts["datasets"]["in"]["pairs"][0]["wins"] and first.n == 76
    assert (first.wins, first.losses, first.ties, first.missing) == (
        turned.losses,
        turned.wins,
        turned.ties,
        turned.missing,
    )
    assert [row.length_a for row in rows] == [row.length_b for row in back] != [row.length_a for row in back]
    assert first.mean_length_a == turned.mean_length_b and first.first_position_rate == pytest.approx(
        turned.first_position_rate
    )
    assert first.low == pytest.approx(1 - turned.high)
