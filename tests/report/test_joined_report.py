"""Several runs on one page: replicates together, models × questions, the paper beside; what is refused."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from synthetic_run import HOSTILE, Page, synthetic, with_judge

from salsa_peft.cli import report
from salsa_peft.evaluation.judge_statistics import over_seeds
from salsa_peft.report.format import estimate, signed
from salsa_peft.report.gather import identity
from salsa_peft.report.joined import Run, pair_counts, replicates, table, write_joined
from salsa_peft.report.judge_tables import judgments_of
from salsa_peft.report.replicates import table as claims_table
from salsa_peft.report.replicates.claims import Claim, Finding
from salsa_peft.utils import manifests as runs_of
from salsa_peft.utils.errors import SalsaError
from salsa_peft.utils.statistics import Estimate, holm, mean_interval, sign_flip_test, t_test

import numpy as np  # isort: skip

PAIR = ("salsa", "ppo")
POLICIES = ("ppo", "salsa", "shrunk")


def made(
    name: str, seed: int, same: str, base: str = "tiny", judge: str = "tiny-judge", folder: str | None = None
) -> Run:
    told = with_judge(synthetic(n=30, policies=POLICIES, gold=False), seed=seed)
    assert told.verdicts is not None
    verdicts = {**told.verdicts, "judge": {"kind": "local", "model": judge, "prompt": "figure7"}}
    return Run(
        replace(
            told,
            name=name,
            base=base,
            replicate_of=same,
            training_seeds=f"sft {seed}",
            fingerprint=base,
            verdicts=verdicts,
        ),
        Path(folder or f"/runs/{name}-{seed}"),
    )


@pytest.fixture(scope="module")
def runs() -> list[Run]:
    return [
        made("llama", 0, "x", "meta-llama/Llama-2-7b-hf"),
        made("llama", 1, "x", "meta-llama/Llama-2-7b-hf"),
        made("gemma", 2, "y"),
    ]


def test_replicates_are_one_recipe_and_base_with_other_seeds(runs: list[Run]) -> None:
    """In the order given; names that are alike get a number; a run twice is refused."""
    other = made("llama", 5, "z")
    found = replicates([runs[0], runs[2], runs[1], other])
    assert [(name, len(of)) for name, of in found] == [("llama", 2), ("gemma", 1), ("llama (2)", 1)]
    elsewhere = Run(replace(runs[1].report, fingerprint="another"), runs[1].folder)
    assert [len(of) for _, of in replicates([runs[0], elsewhere])] == [1, 1]
    with pytest.raises(SalsaError, match="has the same recipe and training seeds as /runs/llama-0"):
        replicates([runs[0], runs[2], Run(runs[0].report, Path("/elsewhere"))])


def test_a_groups_rate_is_over_its_runs_and_questions(runs: list[Run]) -> None:
    """Counts, rate, interval, each run's rate; the p-value by questions, corrected over the column."""
    rows = table(replicates(runs))
    assert [(row["model"], row["dataset"], row["runs"]) for row in rows] == [
        ("llama", "in", 2), ("llama", "out", 2), ("gemma", "in", 1), ("gemma", "out", 1)
    ]  # fmt: skip
    judged = [judgments_of(run.report, "in", *PAIR, "reward") for run in runs[:2]]
    found, cell = over_seeds(judged), rows[0]["cells"][PAIR]
    assert [cell[key] for key in ("adjusted_win_rate", "low", "high", "rates", "spread")] == [
        found.adjusted_win_rate, found.low, found.high, found.rates, found.spread
    ]  # fmt: skip
    kept = [row for of in judged for row in of if row.winner != "missing"]
    assert cell["wins"] == sum(row.winner == "a" for row in kept) and cell["missing"] == 120 - len(kept) > 0
    nets = {row.question: 0 for row in kept}
    for row in kept:
        nets[row.question] += {"a": 1, "b": -1, "tie": 0}[row.winner]
    assert cell["p_value"] == sign_flip_test(np.array(list(nets.values())))
    column = [row["cells"][PAIR] for row in rows]
    assert [one["p_holm"] for one in column] == holm([one["p_value"] for one in column])


def test_runs_with_questions_of_their_own_are_compared_run_by_run(runs: list[Run]) -> None:
    """Worlds of other seeds share no question: the interval and the test are over the runs' rates."""
    own = [
        Run(
            replace(
                run.report, answers=[{**row, "prompt": f"{number}: {row['prompt']}"} for row in run.report.answers]
            ),
            run.folder,
        )
        for number, run in enumerate(runs[:2])
    ]
    shared, apart = (table(replicates(of))[0]["cells"][PAIR] for of in (runs[:2], own))
    rates = [over_seeds([judgments_of(run.report, "in", *PAIR, "reward")]).adjusted_win_rate for run in own]
    found = mean_interval(rates)
    assert (apart["adjusted_win_rate"], apart["low"], apart["high"]) == (found.mean, found.low, found.high)
    assert apart["rates"] == rates and apart["p_value"] == t_test(rates, 0.5)
    assert (shared["low"], shared["high"]) != (apart["low"], apart["high"]) and shared["wins"] == apart["wins"]


def test_a_base_that_each_run_makes_is_no_other_recipe(runs: list[Run]) -> None:
    made_here = [
        Run(replace(run.report, toy=True, fingerprint=f"base {n}"), run.folder) for n, run in enumerate(runs[:2])
    ]
    assert [len(of) for _, of in replicates(made_here)] == [2]


def test_the_page(runs: list[Run], tmp_path: Path) -> None:
    """Every cell in both texts, what was found in words, seeds warned of, foreign text as text."""
    odd = Run(replace(runs[2].report, name=f"gemma {HOSTILE[:30]}"), runs[2].folder)
    summary = write_joined(tmp_path, [*runs[:2], odd])
    html = (tmp_path / "report.html").read_text("utf-8")
    page, text = Page(html), (tmp_path / "report.md").read_text("utf-8")
    assert len(summary["cells"]) == 4 * 4
    for cell in summary["cells"]:
        rate = f"{100 * cell['adjusted_win_rate']:.1f} [{100 * cell['low']:.1f}, {100 * cell['high']:.1f}]"
        assert rate in page.text and rate in text
    assert not page.open and "<script" not in html and "script" not in page.tags
    assert "default-src 'none'" in html and not re.search(r"https?://", html)
    (screen,) = (group["screen"] for group in summary["replicates"])
    assert summary["finding"] == list(screen["sentences"].values())
    line = f"3 runs of 2 recipes or bases. {screen['line']}"
    assert line in page.text and line in text.replace("\\", "")
    assert screen["line"].startswith(
        "2 replicates of llama: the whole recipe, each time with other random seeds. In each: 3"
    )
    for card in screen["cards"]:
        for row in card["rows"]:
            assert row["value"] in page.text and f"{row['value']} {row['interval']}" in text
    assert (
        next((one["a"], one["b"], one["cells"]) for one in summary["pairs"]) == (*PAIR, 4)
        and len(summary["pairs"]) == 4
    )
    assert any("2 training seeds: too few" in line for line in summary["warnings"])
    assert any("one training seed" in line for line in summary["warnings"])
    figures = (4 + 2 + 1) + 4 + 5 + 5  # win rates, headline, frontier; scores, training, landscape
    assert page.tags.count("figure") == figures and len(list((tmp_path / "figures").iterdir())) == figures
    assert [one["training_seeds"] for one in summary["runs"]] == ["sft 0", "sft 1", "sft 2"]
    (group,) = summary["replicates"]  # the two llamas; gemma is alone, so its scores stand by themselves
    assert (group["name"], group["n"], [one["run"] for one in summary["scores"]].count("llama")) == ("llama", 2, 4)
    assert "llama: 2 replicates" in page.text and "## llama: 2 replicates" in text
    for data in group["datasets"]:
        assert len(data["pairs"]) == 4 and len(data["models"]) == 6
        for shown in (*map(estimate, data["models"]), *map(signed, data["pairs"])):
            assert shown in page.text and shown in text


def test_the_claims_stand_on_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runs: list[Run]) -> None:
    """The rows of the table, whose numbers test_claims.py checks, in both texts."""
    found = Claim("Figure 9", "Soups <taste> better.", [
        Finding("soup − salad", {"in": Estimate(0.5, 0.25, 0.75, 3)}, 1),
        Finding("soup − bread", {"in": Estimate(-0.5, -0.75, -0.25, 3), "training": Estimate(1.0, 0.5, 1.5, 3)}, 1, control=True),
    ])  # fmt: skip
    monkeypatch.setattr(claims_table, "claims", lambda replicates: [found])
    write_joined(tmp_path, runs[:2])
    page, text = Page((tmp_path / "report.html").read_text("utf-8")), (tmp_path / "report.md").read_text("utf-8")
    assert "Soups <taste> better." in page.text and not page.open
    for words in (
        "Figure 9",
        "soup − salad",
        "+0.500 [+0.250, +0.750]",
        "as claimed",
        "the opposite",
        "+1.000 [+0.500, +1.500]",
    ):
        assert words in page.text and words in text
    assert "|  | control: soup − bread | > 0 | −0.500 [−0.750, −0.250] |" in text


def test_pairs_are_counted() -> None:
    cells = [{"low": 0.51, "high": 0.6, "adjusted_win_rate": 0.55, "p_holm": 0.04, "runs": 1}, {"low": 0.51, "high": 0.6, "adjusted_win_rate": 0.55, "p_holm": 0.06, "runs": 1},
             {"low": 0.4, "high": 0.6, "adjusted_win_rate": 0.5, "p_holm": 1.0, "runs": 1}, {"low": 0.3, "high": 0.4, "adjusted_win_rate": 0.35, "p_holm": 0.01, "runs": 1}]  # fmt: skip
    (row,) = pair_counts([{"cells": {PAIR: cell}} for cell in cells], [PAIR])
    assert row == {"a": "salsa", "b": "ppo", "cells": 4, "above": 2, "below": 1, "significant": 1}


def test_other_judges_have_other_rows(runs: list[Run], tmp_path: Path) -> None:
    """And are not to be compared; a run without a judge stands by its measure."""
    plain = replace(runs[1].report, verdicts=None, judgments=[], training_seeds="sft 7")
    summary = write_joined(
        tmp_path,
        [runs[0], made("llama", 3, "x", "meta-llama/Llama-2-7b-hf", judge="other"), Run(plain, Path("/runs/plain"))],
    )
    by = {cell["by"] for cell in summary["cells"]}
    assert by == {"local tiny-judge", "local other", "training reward"}
    assert any("3 judges" in line for line in summary["warnings"])
    cell = next(
        cell
        for cell in summary["cells"]
        if cell["by"] == "training reward" and (cell["a"], cell["b"], cell["dataset"]) == (*PAIR, "out")
    )
    want = next(pair for pair in plain.evaluation["datasets"]["out"]["pairs"] if (pair["a"], pair["b"]) == PAIR)
    scores: dict[str, list[float]] = {
        name: [row["scores"]["reward"] for row in plain.answers if (row["dataset"], row["model"]) == ("out", name)]
        for name in PAIR
    }
    wins = sum(x > y for x, y in zip(*scores.values(), strict=True))
    assert cell["wins"] == wins and cell["wins"] + cell["losses"] + cell["ties"] == sum(
        want[key] for key in ("wins", "losses", "ties")
    )


def silent(run: Run, seeds: str) -> Run:
    """The same run, its judge without a verdict."""
    mute = {"first": "missing", "second": "missing", "winner": "missing", "tie_kind": None}
    return Run(
        replace(run.report, judgments=[{**row, **mute} for row in run.report.judgments], training_seeds=seeds),
        Path(f"/runs/{seeds}"),
    )


def test_runs_without_a_verdict_are_told(runs: list[Run], tmp_path: Path) -> None:
    """Beside others they are in no rate and counted as missing; alone they have a row without one."""
    alone, beside = table(replicates([silent(runs[2], "s")])), table(replicates([runs[0], silent(runs[1], "t")]))
    for row in alone:
        cell = row["cells"][PAIR]
        assert (cell["runs"], cell["adjusted_win_rate"], cell["missing"]) == (
            0,
            None,
            60 if row["dataset"] == "in" else 30,
        )
    before = table(replicates([runs[0]]))[0]["cells"][PAIR]
    cell = beside[0]["cells"][PAIR]
    assert (cell["runs"], cell["rates"]) == (1, before["rates"]) and cell["missing"] == 60 + before["missing"]
    summary = write_joined(tmp_path, [runs[0], silent(runs[1], "t"), silent(runs[2], "s")])
    assert any("llama, in, by local tiny-judge: 1 of 2 runs have no verdict" in line for line in summary["warnings"])
    assert summary["pairs"][0]["cells"] == 2
    for name in ("report.html", "report.md"):
        assert "60 without a verdict" in Page((tmp_path / name).read_text("utf-8")).text


def test_judges_of_one_name_who_are_not_one(runs: list[Run]) -> None:
    """Another folder or another prompt: another row."""
    verdicts = runs[1].report.verdicts
    assert verdicts is not None
    for judge in ({"model": "/elsewhere/tiny-judge"}, {"prompt": "fastchat"}):
        other = replace(runs[1].report, verdicts={**verdicts, "judge": {**verdicts["judge"], **judge}})
        found = table(replicates([runs[0], Run(other, runs[1].folder)]))
        assert [row["by"] for row in found] == ["local tiny-judge"] * 2 + ["local tiny-judge (2)"] * 2


def test_a_searched_policy_by_its_own_name(runs: list[Run]) -> None:
    """Whichever β was picked in each run."""

    def searched(run: Run, best: str) -> Run:
        def renamed(rows: Any) -> Any:
            return [{key: best if value == "salsa" else value for key, value in row.items()} for row in rows]

        verdicts = run.report.verdicts
        assert verdicts is not None
        tried = [{"policy": best, "kl_coef": 0.1, "adjusted_win_rate": 0.6, "low": 0.5, "high": 0.7}]
        tried.append({**tried[0], "policy": "salsa-kl-9"})
        search = {
            "by": "judge",
            "datasets": ["in"],
            "against": "seed-0",
            "methods": {"salsa": {"best": best, "tried": tried}},
        }
        datasets = {
            name: {**data, "pairs": [{**data["pairs"][0], "a": "salsa-kl-9"}, *renamed(data["pairs"])]}
            for name, data in verdicts["datasets"].items()
        }
        told = replace(
            run.report,
            verdicts={**verdicts, "datasets": datasets, "search": search},
            judgments=[
                *renamed(run.report.judgments),
                *({**row, "a": "salsa-kl-9"} for row in run.report.judgments if row["a"] == "salsa"),
            ],
        )
        return Run(told, run.folder)

    plain, found = (
        table(replicates(runs[:2])),
        table(replicates([searched(runs[0], "salsa-kl-0.01"), searched(runs[1], "salsa-kl-0.2")])),
    )
    assert [row["cells"] for row in found] == [row["cells"] for row in plain]


def test_identity(tmp_path: Path) -> None:
    """Training seeds, names and threads make no other recipe; everything that changes a policy does."""
    from salsa_peft.config.load import load_recipe

    (tmp_path / "r.yaml").write_text(
        "name: r\ntoy: {}\npolicies: {ppo: {reference: seed-0}, salsa: {reference: soup}}\n"
    )

    def of(*words: str) -> tuple[str, str]:
        return identity(load_recipe(str(tmp_path / "r.yaml"), lora="lora", overrides=list(words)).recipe)

    plain, seeds = of()
    assert seeds == "sft 0, 1; reward 0; ppo 0; toy 0"
    words = (
        "sft.seeds=[2, 3]",
        "ppo.seed=4",
        "toy.seed=1",
        "dpo.seed=7",
        "name=other",
        "threads=1",
        "evaluate.samples=3",
        "replicates=2",
    )
    assert of(*words) == (plain, "sft 2, 3; reward 0; ppo 4; toy 1")
    for word in (
        "sft.seeds=[0, 1, 2]",
        "ppo.learning_rate=1e-5",
        "evaluate.seed=1",
        "policies.salsa.kl_coef=0.5",
        "toy.demonstrations=100",
    ):
        assert of(word)[0] != plain


class TestCommand:
    """salsa report."""

    def test_the_papers_tables(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert report.main(["--paper"]) == 0
        out = capsys.readouterr().out
        assert "Table 5, Mistral-7B" in out and max(map(len, out.splitlines())) > 120
        assert report.main(["--paper", "x"]) == 2
        assert "--paper: takes no other arguments" in capsys.readouterr().err

    def test_what_is_no_finished_run_is_refused(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """Before anything is written; a run is what its newest report was made from, whatever keys would be now."""
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "recipe.yaml").write_text("name: r\ntoy: {}\npolicies: {ppo: {reference: seed-0}}\n")
        assert report.main([str(tmp_path / "a"), str(tmp_path / "b")]) == 2
        assert "a: this run has no finished report; run the recipe again: salsa run " in capsys.readouterr().err
        assert report.main([str(tmp_path / "a"), str(tmp_path / "none")]) == 2
        assert "none: not the folder of a run, since it has no recipe.yaml" in capsys.readouterr().err
        (tmp_path / "a" / "recipe.yaml").write_text("name: r\nbeta: 1\n")
        assert report.main([str(tmp_path / "a"), str(tmp_path / "b")]) == 2
        assert "recipe.yaml: beta: 1 is not valid: Unexpected keyword argument" in capsys.readouterr().err
        assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}

    def test_what_can_not_be_meant(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """One line each; a run's folder stands for its recipe, with whatever options."""
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "recipe.yaml").write_text("name: r\n")
        run, seen = str(tmp_path / "a"), []
        for words, said in (
            ([run, "--output-dir", "x"], "--output-dir: works only with several runs; leave it out"),
            ([run, run, "--output-dir"], "--output-dir: needs a folder's name"),
            (["/nope"], "/nope: not the folder of a run, since it has no recipe.yaml"),
            ([str(tmp_path)], "not the folder of a run"),
        ):
            assert report.main(words) == 2
            err = capsys.readouterr().err
            assert said in err and err.count("\n") == 1
        assert report.main(["--help"]) == 0 and "--paper" in capsys.readouterr().out
        monkeypatch.setattr(report, "run_recipe", lambda words, prog, report_of: seen.append(words) or 0)
        redo = ["--stages", "report", "--force", "report"]
        for words, meant in (
            ([run], [f"{run}/recipe.yaml", "--output-dir", run]),
            ([run, "--debug"], [f"{run}/recipe.yaml", "--debug", "--output-dir", run]),
            (["quickstart", "--lora", "--set", "a=b"], ["quickstart", "--lora", "--set", "a=b"]),
        ):
            assert report.main(words) == 0 and seen.pop() == [*meant, *redo]

    def test_the_newest_report_says_what_belongs_to_it(self, tmp_path: Path) -> None:
        """By what files hold; one that is gone is named."""

        def unit(name: str, key: str, inputs: dict[str, str], at: int, files: Any) -> dict[str, Any]:
            folder = tmp_path / name / key
            folder.mkdir(parents=True)
            manifest = {"unit": name, "key": key, "inputs": inputs, "files": files}
            (folder / "manifest.json").write_text(json.dumps(manifest))
            for file, entry in files.items():
                (folder / file).write_bytes(b"." * entry["size"])
            os.utime(folder / "manifest.json", (at, at))
            return manifest

        old, new = (
            unit("sft/seed-0", key, {}, 1, {"x": {"size": size, "sha256": "0" * 64}})
            for key, size in (("1", 1), ("2", 2))
        )
        unit("report", "8", {"sft/seed-0": runs_of.content_digest(new)}, 20, {})
        unit("report", "9", {"sft/seed-0": runs_of.content_digest(old)}, 10, {})
        assert runs_of.finished_results(tmp_path) == {"sft/seed-0": tmp_path / "sft" / "seed-0" / "2"}
        os.utime(tmp_path / "report" / "9" / "manifest.json", (30, 30))
        assert runs_of.finished_results(tmp_path) == {"sft/seed-0": tmp_path / "sft" / "seed-0" / "1"}
        (tmp_path / "sft" / "seed-0" / "1" / "x").write_text("longer")
        with pytest.raises(SalsaError, match="sft/seed-0/1/x is missing or has changed; run the recipe again"):
            runs_of.finished_results(tmp_path)
        shutil.rmtree(tmp_path / "sft" / "seed-0" / "1")
        with pytest.raises(SalsaError, match="the result of sft/seed-0 that the report was made from is missing"):
            runs_of.finished_results(tmp_path)


def test_what_a_page_says_of_the_temperature(tmp_path: Path) -> None:
    """A number, or FastChat's by category where a question has one."""
    from salsa_peft.config.load import load_recipe
    from salsa_peft.report.gather import _temperature

    (tmp_path / "r.yaml").write_text(
        "name: r\ntoy: {}\ngeneration: {temperature: 0.9}\npolicies: {ppo: {reference: seed-0}}\n"
    )

    def told(category: str | None, *words: str) -> str:
        recipe = load_recipe(str(tmp_path / "r.yaml"), lora="lora", overrides=list(words)).recipe
        return _temperature(recipe, [{"category": category}])

    assert told(None) == told("arena-hard-v0.1") == "0.9"
    assert told("math") == "0.9, and at FastChat’s temperatures for MT-Bench’s categories"
    assert told("math", "evaluate.temperature=0.3") == "0.3"
