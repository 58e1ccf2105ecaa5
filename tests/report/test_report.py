"""The report on a made-up run whose shape is the quickstart's: what it says, that it stands alone, and that model
output cannot break it.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from markdown_it import MarkdownIt
from paths import ROOT
from synthetic_run import HOSTILE, Page, synthetic

from salsa_peft.report import findings
from salsa_peft.report import format as words
from salsa_peft.report.gather import ReportInput
from salsa_peft.report.joined import write_joined
from salsa_peft.report.page import write_report
from salsa_peft.report.replicates.runs import Run
from salsa_peft.utils import files as runs


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[ReportInput, Path, dict[str, Any]]:
    run, folder = synthetic(), tmp_path_factory.mktemp("report")
    for row in run.answers:
        if row["index"] == 1 and row["model"] == "salsa":
            row["response"] = HOSTILE
        if row["index"] == 2:
            row["prompt"] = HOSTILE
    return run, folder, write_report(folder, run)


def test_numbers_stand_in_both_texts(written: tuple[ReportInput, Path, dict[str, Any]]) -> None:
    run, folder, _ = written
    page, text = Page((folder / "report.html").read_text("utf-8")).text, (folder / "report.md").read_text("utf-8")
    for data in run.evaluation["datasets"].values():
        for model in data["models"].values():
            for score in model["scores"].values():
                assert words.estimate(score) in page
                assert words.estimate(score) in text
        for pair in data["pairs"]:
            rate = f"{100 * pair['adjusted_win_rate']:.1f} [{100 * pair['low']:.1f}, {100 * pair['high']:.1f}]"
            assert rate in page
            assert (
                f"| {pair['wins']} | {pair['losses']} | {pair['ties']} | {100 * pair['win_rate']:.1f} | {rate}" in text
            )
    for unit in run.units:
        assert unit["key"] in page
        assert words.number(unit["seconds"]) in page
    assert "update 1score 0.510 · KL 0.700" in page
    assert "update 50score 1.000" in page
    assert "0.812 [0.790, 0.835], n = 1,000" in page
    for name in ("ppo", "salsa"):  # β at the start and at the end
        start, end = run.policies[name].kl_coef, run.policies[name].metrics[-1]["objective/kl_coef"]
        assert f"| {words.number(start)} | {words.number(end)} |" in text


def test_html_is_one_file_that_fetches_nothing(written: tuple[ReportInput, Path, dict[str, Any]]) -> None:
    html = (written[1] / "report.html").read_text("utf-8")
    page = Page(html)
    assert not page.open, f"left open: {page.open}"
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert all(where.startswith(("#", "data:")) for where in page.resources), page.resources
    assert not re.search(r"https?://|@import|url\((?!#)", html)
    count = {"headline": 2, "scores": 4, "pairs": 4, "landscape": 6, "training": 4, "frontier": 1, "distributions": 4}
    assert page.tags.count("figure") == sum(count.values())
    ids = re.findall(r' id="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    assert {link[1:] for link in page.resources if link.startswith("#")} <= set(ids)


def test_model_output_cannot_break_the_page(written: tuple[ReportInput, Path, dict[str, Any]]) -> None:
    page = Page((written[1] / "report.html").read_text("utf-8"))
    shown = words.tidy(HOSTILE)
    assert page.text.count(shown) == 4  # an answer and a prompt, in each of two datasets
    assert "{{ 7 * 7 }}" in page.text
    assert "\x00" not in page.text


def test_model_output_cannot_break_markdown(written: tuple[ReportInput, Path, dict[str, Any]]) -> None:
    text = (written[1] / "report.md").read_text("utf-8")
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    blocks = [token.content.rstrip("\n") for token in tokens if token.type == "fence"]
    assert blocks.count(words.tidy(HOSTILE)) == 4
    html = [token.content for token in tokens if token.type == "html_block"]
    assert html
    assert all(set(re.findall(r"<(\w+)", one)) <= {"p", "img"} and "figures/" in one for one in html)
    for name in re.findall(r'src="([^"]+)"', text.replace(HOSTILE[:20], "")):
        assert (written[1] / name).read_bytes().startswith(b"\x89PNG")
    assert (
        MarkdownIt("commonmark").renderInline(words.markdown("a|b `c` <i> *d* [e](f) {{g}}"))
        == "a|b `c` &lt;i&gt; *d* [e](f) {{g}}"
    )


def test_summary_has_every_number_and_no_nan(written: tuple[ReportInput, Path, dict[str, Any]]) -> None:
    run, folder, summary = written
    refuse: Any = lambda constant: pytest.fail(f"{constant} in summary.json")  # noqa: E731
    assert json.loads((folder / "summary.json").read_text("utf-8"), parse_constant=refuse) == summary
    assert summary["evaluation"] == run.evaluation
    assert summary["landscape"] == run.landscape
    assert summary["units"] == run.units
    assert summary["reward"] == run.reward
    assert summary["seeds"] == run.seeds
    assert summary["policies"]["salsa"]["training"]["kl_coef"] == {
        "start": 0.01,
        "end": run.policies["salsa"].metrics[-1]["objective/kl_coef"],
    }
    assert summary["policies"]["ppo"]["curves"]["kl"] == [row["objective/kl"] for row in run.policies["ppo"].metrics]
    assert np.mean(summary["scores"]["out"]["gold"]["soup"]) == pytest.approx(
        run.evaluation["datasets"]["out"]["models"]["soup"]["scores"]["gold"]["mean"]
    )
    shown = {f"{one['mean']:.3f}".replace("-", "−") for one in summary["comparisons"]}
    assert all(one in (folder / "report.html").read_text("utf-8") for one in shown)
    pairs = {(one["a"], one["b"]) for one in summary["comparisons"]}
    assert pairs == {("salsa", other) for other in ("ppo", "seed-0", "shrunk")} | {("soup", "seed-0"), ("soup", "base")}
    assert len(summary["comparisons"]) == 2 * len(pairs)


def conclusions(mean: float, low: float, high: float, n: int = 96, b: str = "ppo") -> list[str]:
    """Conclusions on SALSA − b, given the difference on the first set; on the second it is +0.2 [+0.1, +0.3]."""
    run = synthetic(n=4)
    for dataset, data in run.evaluation["datasets"].items():
        for pair in data["pairs"]:
            if (pair["a"], pair["b"], pair["measure"]) == ("salsa", b, "gold"):
                given = {"mean": mean, "low": low, "high": high, "n": n}
                pair["difference"] = given if dataset == "in" else {"mean": 0.2, "low": 0.1, "high": 0.3, "n": 96}
    rows = findings.comparisons(findings.scored(run))
    return [findings.means_for_averaging(one, run.policies) for one in rows if (one["a"], one["b"]) == ("salsa", b)]


def test_every_key_of_the_summary_is_documented(
    written: tuple[ReportInput, Path, dict[str, Any]], tmp_path: Path
) -> None:
    """In docs/run-folder.md, and no others; of a run, then of joined runs."""
    run, _, summary = written
    text = (ROOT / "docs" / "run-folder.md").read_text("utf-8").split("## summary.json")[1]
    tables = [
        [key for row in re.findall(r"^\| (`.*?) \|", part, re.MULTILINE) for key in re.findall(r"`(\w+)`", row)]
        for part in text.split("The joined report")
    ]
    assert sorted(tables[0]) == sorted(summary)
    assert sorted(tables[1]) == sorted(write_joined(tmp_path, [Run(run, tmp_path)]))


def test_the_words_follow_the_interval() -> None:
    assert conclusions(0.031, -0.010, 0.072) == ["not distinguishable from 0", "salsa is higher"]
    assert conclusions(0.031, 0.010, 0.052)[0] == "salsa is higher"
    assert conclusions(-0.031, -0.052, -0.010)[0] == "ppo is higher"
    assert "nothing to conclude" in conclusions(0.5, 0.5, 0.5, n=1)[0]


def test_the_control_is_spoken_of_however_it_comes_out() -> None:
    for given in ((-0.004, -0.02, 0.012), (0.004, -0.012, 0.02), (-0.04, -0.06, -0.02)):
        on_first, on_second = conclusions(*given, b="shrunk")
        assert on_first.endswith("; no evidence that averaging helps")
        assert on_second == "salsa is higher"
    assert conclusions(0.04, 0.02, 0.06, b="shrunk")[0] == "salsa is higher"


def test_differences_come_from_pairs_either_way_round_or_from_answers() -> None:
    run = synthetic(n=40)
    there, back = (
        findings.difference(run.evaluation, run.answers, "in", "gold", *ends)
        for ends in (("salsa", "ppo"), ("ppo", "salsa"))
    )
    assert there
    assert back
    assert back["mean"] == -there["mean"]
    assert back["low"] == -there["high"]
    assert back["rate"]["low"] == pytest.approx(1 - there["rate"]["high"])
    soup = findings.difference(
        run.evaluation, run.answers, "in", "gold", "soup", "seed-0"
    )  # no such pair was evaluated
    means = [
        run.evaluation["datasets"]["in"]["models"][model]["scores"]["gold"]["mean"] for model in ("soup", "seed-0")
    ]
    assert soup
    assert soup["mean"] == pytest.approx(means[0] - means[1])
    assert soup["n"] == 40
    assert findings.difference(run.evaluation, [], "in", "gold", "soup", "seed-0") is None


def test_few_prompts_and_open_intervals_are_warned_of() -> None:
    chance = {"accuracy": {"held_out": {"mean": 0.6, "low": 0.45, "high": 0.75, "n": 40}}}
    assert "ranks 60.0% [45.0, 75.0] of 40 held-out pairs" in findings.warnings({}, None, chance)[0]
    chance["accuracy"]["held_out"]["low"] = 0.51
    assert findings.warnings({}, None, chance) == []
    few = findings.warnings(synthetic(n=12).evaluation, {"n": 8})
    assert any("Only 12 prompts in “out”" in one for one in few)
    assert any("landscape has 8 prompts" in one for one in few)
    assert any("the interval of the difference includes 0" in one for one in few)
    assert not [one for one in findings.warnings(synthetic(n=60).evaluation, {"n": 30}) if "rough" in one]


def test_missing_pieces_leave_their_sections_out(tmp_path: Path) -> None:
    run = synthetic(n=12, policies=("salsa",), gold=False, small=True)
    summary = write_report(tmp_path / "one", run)
    page = Page((tmp_path / "one" / "report.html").read_text("utf-8"))
    assert not page.open
    assert "Landscape" not in page.text
    assert "gold" not in page.text
    assert summary["landscape"] is None
    assert "soup − seed-0" in page.text
    assert (
        page.tags.count("figure") == 1 + 1 + 1 + 4 + 1 + 1
    )  # headline, scores, pairs, training, frontier, distribution
    assert "Only 12 prompts in “in”" in page.text
    assert "Only 12 prompts in “in”" in (tmp_path / "one" / "report.md").read_text("utf-8")
    nothing = replace(run, evaluation={}, answers=[], policies={}, soup={}, seeds={}, reward={}, units=[])
    write_report(tmp_path / "none", nothing)
    page = Page((tmp_path / "none" / "report.html").read_text("utf-8"))
    assert not page.open
    assert "nothing to conclude" in page.text
    assert "figure" not in page.tags
    assert "The resolved recipe" in page.text
    assert not list((tmp_path / "none" / "figures").iterdir())
    assert "None" not in page.text
    assert "Undefined" not in page.text


def test_planned_seconds_stand_beside_the_measured_ones(tmp_path: Path) -> None:
    """In the table of stages, for units that ran on a GPU of known speed."""
    run = synthetic(n=12, policies=(), gold=False, small=True)
    first = {
        **run.units[0],
        "seconds": 120.0,
        "planned_seconds": 100.0,
        "gpu_peak_mb": 8_000.0,
        "gpu_planned_mb": 7_000.0,
    }
    write_report(tmp_path, replace(run, units=[first, *run.units[1:]]))
    text, page = (tmp_path / "report.md").read_text("utf-8"), (tmp_path / "report.html").read_text("utf-8")
    assert "| unit | key | seconds | planned | peak, MB | GPU, MB | planned | inputs |" in text
    assert "| 120.0 | 100.0 |" in text
    assert "<td>120.0</td><td>100.0</td>" in page


def test_nan_and_none_are_a_dash_not_a_crash(tmp_path: Path) -> None:
    run = replace(synthetic(n=31, policies=("ppo",), small=True), evaluation={}, answers=[])
    run.policies["ppo"].metrics[3]["objective/kl"] = math.nan
    run.units[0]["seconds"] = run.units[1]["peak_mb"] = None
    summary = write_report(tmp_path, run)
    assert summary["policies"]["ppo"]["curves"]["kl"][3] is None
    assert "nan" not in Page((tmp_path / "report.html").read_text("utf-8")).text.lower()


def test_same_input_same_bytes(tmp_path: Path) -> None:
    run = synthetic(n=31, policies=(), gold=False, small=True)
    for name in ("a", "b"):
        write_report(tmp_path / name, run)
    files = [sorted(p.relative_to(tmp_path / name) for p in (tmp_path / name).rglob("*.*")) for name in ("a", "b")]
    assert files[0] == files[1]
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files[0])


def test_a_line_separator_in_an_answer_is_no_new_line(tmp_path: Path) -> None:
    """U+2028, U+2029 and U+0085 stand unescaped in JSON lines; the report stage reads them back."""

    rows = [{"response": "a\u2028b\u2029c\u0085d"}, {"response": "e"}]
    (tmp_path / "answers.jsonl").write_text(
        "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8"
    )
    assert runs.read_json_lines(tmp_path / "answers.jsonl") == rows
