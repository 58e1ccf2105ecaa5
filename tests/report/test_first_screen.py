"""The report's first screen: its parts and their order, the numbers of its cards and figures, and runs with few parts."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from synthetic_run import Page, synthetic, with_judge

from salsa_peft.report import findings, headline
from salsa_peft.report import format as words
from salsa_peft.report.gather import ReportInput
from salsa_peft.report.page import context, write_report
from salsa_peft.report.plots import styles_of
from salsa_peft.report.replicates import scored
from salsa_peft.report.sections import first_screen, forest, frontier
from salsa_peft.report.style import Panel

EXPLAINED = {"in": "in distribution: short answers", "out": "out of distribution: long answers"}


@pytest.fixture(scope="module")
def run() -> ReportInput:
    return replace(synthetic(n=40), explained=EXPLAINED)


def gold(run: ReportInput, dataset: str, model: str) -> np.ndarray:
    """The gold rewards of a model's answers."""
    rows = [row for row in run.answers if (row["dataset"], row["model"]) == (dataset, model)]
    return np.array([row["scores"]["gold"] for row in rows])


def difference(run: ReportInput, dataset: str, a: str, b: str) -> tuple[float, float, float]:
    """Mean and 95% t-interval of a − b over 40 prompts."""
    gap = gold(run, dataset, a) - gold(run, dataset, b)
    half = 2.0227 * gap.std(ddof=1) / np.sqrt(40)  # t(0.975, 39)
    return float(gap.mean()), float(gap.mean() - half), float(gap.mean() + half)


def drawn_lines(
    monkeypatch: pytest.MonkeyPatch, module: Any, draw: Callable[[], Any]
) -> list[tuple[list[str], list[list[Any]]]]:
    """For each panel that `draw` draws: its texts, and (x, y) of its lines, in order."""
    found = []

    def panel(name: str, alt: str, draw_on: Callable[[Any], None], height: float, width: float) -> Panel:
        axes = Figure().add_subplot()
        draw_on(axes)
        texts = [text.get_text() for text in axes.texts]
        found.append((texts, [[list(line.get_xdata()), list(line.get_ydata())] for line in axes.lines]))
        return Panel(name, alt, "", b"")

    monkeypatch.setattr(module, "panel", panel)
    draw()
    return found


def test_the_parts_stand_in_order(run: ReportInput, tmp_path: Path) -> None:
    """What was run; cards; what came out, what it means and does not; the figure; the names; only then the tables."""
    summary = write_report(tmp_path, run)
    html = (tmp_path / "report.html").read_text("utf-8")
    screen, parts = summary["screen"], ('class="line"', 'class="cards"', 'class="verdict"', 'class="panels headline"', 'class="names"', 'id="differences"')  # fmt: skip
    places = [html.index(part) for part in parts]
    assert places == sorted(places)
    first = html[: places[-1]]
    assert first.count('<div class="card">') == len(screen["cards"]) == 3
    assert first.count("<svg") >= 2 + 2 * 3 and first.count('aria-label="Against') == 2
    assert "<table" not in first and "[" not in " ".join(screen["sentences"].values())
    page = Page(html).text
    assert screen["line"] in page and page.index(screen["line"]) < page.index("What this run found")
    assert screen["line"] == (
        "4 policies trained by PPO from one SFT model (seed-0), each with its own KL reference; answers to 40 prompts of “in”"
        " (in distribution) and 40 prompts of “out” (out of distribution), scored by gold reward (a program’s score, on"
        " which no policy is trained)."
    )
    text = (tmp_path / "report.md").read_text("utf-8").replace("\\", "")
    for shown in (
        screen["line"],
        *screen["sentences"].values(),
        "figures/headline-start.png",
        "figures/headline-ppo.png",
    ):
        assert shown in text
    assert text.index(screen["sentences"]["What came out"]) < text.index("## Numbers behind the finding")
    for name in ("headline-start", "headline-ppo", "frontier-gold"):
        assert (tmp_path / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_cards_have_the_numbers_of_the_answers(run: ReportInput) -> None:
    """SALSA against PPO first, then against its start and its control; each with its interval, on one scale."""
    cards = context(run)["screen"]["cards"]
    assert [(card["a"], card["b"]) for card in cards] == [("salsa", "ppo"), ("salsa", "seed-0"), ("salsa", "shrunk")]
    assert [card["control"] for card in cards] == [False, False, True]
    reach = max(abs(end) for card in cards for row in card["rows"] for end in (row["low"], row["high"]))
    for card in cards:
        assert [row["dataset"] for row in card["rows"]] == ["in", "out"]
        for row in card["rows"]:
            mean, low, high = difference(run, row["dataset"], card["a"], card["b"])
            assert (row["mean"], row["low"], row["high"]) == pytest.approx((mean, low, high), rel=1e-4)
            assert f"{row['value']} {row['interval']}" == words.signed({"mean": mean, "low": low, "high": high})
            assert row["open"] is (low <= 0 <= high)
            assert row["outcome"] == ("undecided" if row["open"] else "higher" if mean > 0 else "lower")
            assert 2 <= row["at"]["low"] <= row["at"]["mean"] <= row["at"]["high"] <= 98
            scale = (row["at"]["high"] - 50) / row["high"]
            assert row["at"]["low"] == pytest.approx(50 + scale * row["low"]) and scale <= 48 / reach


def test_the_figure_has_the_numbers_of_the_answers(run: ReportInput, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every policy against the start and against PPO: heading, then for each set its bar, its mark and its value."""
    tables = headline.table(findings.scored(run))
    notes = {name: first_screen.note(name, run.policies) for name in styles_of(run)}
    panels = drawn_lines(monkeypatch, forest, lambda: forest.forests(tables, styles_of(run), notes))
    assert len(panels) == 2
    for (texts, lines), other in zip(panels, ("seed-0", "ppo"), strict=True):
        models = [name for name in ("ppo", "salsa", "shrunk", "mkl", "base", "soup") if name != other]
        found, bars = iter(texts), iter(lines[1:])  # the first line is that at 0
        for model in models:
            assert (next(found), next(found)) == (model, notes[model])
            for dataset in ("in", "out"):
                mean, low, high = difference(run, dataset, model, other)
                (ends, _), (mark, _) = next(bars), next(bars)
                assert ends == pytest.approx([low, high], rel=1e-4) and mark == pytest.approx([mean])
                assert next(found) == words.signed({"mean": mean, "low": low, "high": high}).split(" ")[0]
        assert next(found, None) is None and next(bars, None) is None
    only = forest.forests(tables, styles_of(run), notes, hidden=["mkl", "shrunk", "salsa"])
    assert [panel.name for panel in only] == ["headline-start", "headline-ppo"]
    assert forest.forests([], {}, {}) == []


def test_more_sets_have_more_panels(run: ReportInput, monkeypatch: pytest.MonkeyPatch) -> None:
    tables = [{**part, "dataset": f"set {n}"} for n, part in enumerate(2 * headline.table(findings.scored(run)))]
    monkeypatch.setattr(forest, "panel", lambda name, alt, *rest: Panel(name, alt, "", b""))
    panels = forest.forests(tables, styles_of(run), {})
    assert [panel.name for panel in panels] == [
        "headline-start-1",
        "headline-ppo-1",
        "headline-start-2",
        "headline-ppo-2",
    ]
    assert "“set 3”" in panels[-1].alt and "“set 2”" not in panels[-1].alt


@pytest.fixture(scope="module")
def three(run: ReportInput) -> list[ReportInput]:
    """Three replicates: the scores, KLs and training scores of the run, shifted by other amounts for each model."""
    found = []
    for number in range(3):
        shift = {name: 0.01 * number * place for place, name in enumerate(run.evaluation["models"])}

        def moved(name: str, model: dict[str, Any], shift: dict[str, float] = shift) -> dict[str, Any]:
            score = model["scores"]["gold"]
            return {**model, "scores": {**model["scores"], "gold": {**score, "mean": score["mean"] + shift[name]}}}

        datasets = {
            dataset: {**data, "models": {name: moved(name, model) for name, model in data["models"].items()}}
            for dataset, data in run.evaluation["datasets"].items()
        }
        policies = {
            name: replace(
                policy, metrics=[{**row, "objective/kl": row["objective/kl"] + number} for row in policy.metrics]
            )
            for name, policy in run.policies.items()
        }
        found.append(replace(run, evaluation={**run.evaluation, "datasets": datasets}, policies=policies))
    return found


def means(run: ReportInput, dataset: str) -> dict[str, float]:
    return {name: one["scores"]["gold"]["mean"] for name, one in run.evaluation["datasets"][dataset]["models"].items()}


def test_replicates_have_intervals_over_runs(three: list[ReportInput]) -> None:
    """By hand: differences paired by replicate, t(0.975, 2) = 4.3027."""
    tables = headline.table(scored.scored(three))
    assert [part["dataset"] for part in tables] == ["in", "out"]
    for part in tables:
        each = [means(run, part["dataset"]) for run in three]
        assert len(part["rows"]) == 6
        for row in part["rows"]:
            for key, other in (("start", "seed-0"), ("ppo", "ppo")):
                if row["model"] == other:
                    continue
                gaps = np.array([one[row["model"]] - one[other] for one in each])
                half = 4.3027 * gaps.std(ddof=1) / np.sqrt(3)
                assert row[key]["mean"] == pytest.approx(gaps.mean()) and row[key]["n"] == 3
                assert row[key]["high"] - row[key]["mean"] == pytest.approx(half, rel=1e-4, abs=1e-12)
    without = replace(three[2], evaluation={"models": [], "measures": ["gold"], "datasets": {}})
    assert scored.scored([*three[:2], without]) is None


def test_a_searched_policy_has_its_own_name(three: list[ReportInput]) -> None:
    """Whichever candidate each replicate picked; the others are left out."""
    searched = [
        replace(run, evaluation={**run.evaluation, "search": {"methods": {"tuned": {"best": best, "tried": [{"policy": "salsa"}, {"policy": "mkl"}]}}}})
        for run, best in zip(three, ("salsa", "mkl", "salsa"), strict=True)
    ]  # fmt: skip
    found = scored.scored(searched)
    assert found is not None and "tuned" in found.policies and not {"salsa", "mkl"} & {*found.models, *found.policies}
    gaps = [means(run, "in")[best] - means(run, "in")["ppo"] for run, best in zip(three, ("salsa", "mkl", "salsa"), strict=True)]  # fmt: skip
    assert (found.minus("in", "tuned", "ppo") or {})["mean"] == pytest.approx(np.mean(gaps))
    assert found.minus("in", "salsa", "ppo") is None


def test_the_frontier_of_replicates(three: list[ReportInput], monkeypatch: pytest.MonkeyPatch) -> None:
    """From the start to the mean end over runs, with the end of each run and intervals of both axes."""
    found = frontier.frontier(three)
    assert found is not None and found["on"] == "in"
    assert [one["policy"] for one in found["policies"]] == ["ppo", "salsa", "shrunk", "mkl"]
    assert [one["control"] for one in found["policies"]] == [False, False, True, False]
    for one in found["policies"]:
        kl = np.array([[row["objective/kl"] for row in run.policies[one["policy"]].metrics] for run in three])
        score = [means(run, "in")[one["policy"]] for run in three]
        last = kl[:, -5:].mean(1)  # the last tenth of 50 updates
        np.testing.assert_allclose(one["ends"], np.stack([last, score], 1))
        start = [kl[:, 0].mean(), np.mean([means(run, "in")["seed-0"] for run in three])]
        np.testing.assert_allclose(one["path"], [start, [last.mean(), np.mean(score)]])
        assert one["kl"]["mean"] == pytest.approx(last.mean()) and one["kl"]["n"] == 3
        assert one["kl"]["high"] - one["kl"]["mean"] == pytest.approx(
            4.3027 * 1 / np.sqrt(3), rel=1e-4
        )  # shifted by 0, 1, 2
    ((_, lines),) = drawn_lines(monkeypatch, frontier, lambda: frontier.draw(found, styles_of(three[0])))
    assert len(lines) == 4 * 6  # path, start, ends, two bars, mark
    for one, place in zip(found["policies"], range(0, 24, 6), strict=True):
        path, _, ends, across, up, mark = lines[place : place + 6]
        np.testing.assert_allclose(np.array(path).T, one["path"])
        np.testing.assert_allclose(np.array(ends).T, one["ends"])
        assert across[0] == [one["kl"]["low"], one["kl"]["high"]] and up[1] == [
            one["score"]["low"],
            one["score"]["high"],
        ]
        assert mark == [[one["kl"]["mean"]], [one["score"]["mean"]]]


def test_the_frontier_of_one_run(run: ReportInput) -> None:
    """Its end has the interval over prompts, and none of the KL; a policy without KL is left out."""
    (ppo, *_) = (frontier.frontier([run]) or {})["policies"]
    assert ppo["score"] == run.evaluation["datasets"]["in"]["models"]["ppo"]["scores"]["gold"]
    assert ppo["kl"]["low"] is None
    without = {name: replace(policy, metrics=[]) for name, policy in run.policies.items()}
    assert (
        frontier.frontier([replace(run, policies={**run.policies, "ppo": without["ppo"]})])["policies"][0]["policy"]
        == "salsa"
    )  # type: ignore[index]
    assert frontier.frontier([replace(run, policies=without)]) is None
    assert frontier.frontier([replace(run, evaluation={})]) is None


NOTHING = {"evaluation": {}, "answers": [], "policies": {}, "soup": {}, "seeds": {}, "reward": {}, "units": []}


@pytest.mark.parametrize(
    ("given", "line", "means", "means_not", "cards"),
    [
        (synthetic(n=12, policies=("ppo",), gold=False, small=True), "One policy, ppo, trained by PPO", "the score that the policies are trained on", "That the models are equally good: ", [("ppo", "seed-0")]),
        (synthetic(n=12, policies=("salsa",), small=True), "KL to the soup", "RLHF", "That the models are equally good: ", [("salsa", "seed-0")]),
        (synthetic(n=12, policies=(), small=True), "3 SFT models, without RLHF", "no policy was trained", "nor that other random seeds", [("soup", "seed-0"), ("soup", "base")]),
        (with_judge(synthetic(n=12, policies=("ppo", "salsa", "shrunk"), gold=False, small=True)), "compared by local tiny-judge", "RLHF", "nor that other random seeds", [("salsa", "ppo")]),
        (replace(synthetic(n=12, policies=(), gold=False, small=True), **NOTHING), "No model is finished", "", "", []),
    ],
    ids=["reward only", "salsa only", "no policy", "judge", "nothing"],
)  # fmt: skip
def test_runs_with_few_parts(given: ReportInput, line: str, means: str, means_not: str, cards: list[Any]) -> None:
    """What was run, what came out, and what it does not mean, whatever parts the run has."""
    found = context(given)
    screen = found["screen"]
    assert line in screen["line"] and [(card["a"], card["b"]) for card in screen["cards"]][: len(cards)] == cards
    said = screen["sentences"]
    assert said["What came out"] and means in said.get("What it means", "") and means_not in said.get("What it does not mean", "")  # fmt: skip
    assert not re.search(r"None|undefined|\{|\bBy [^,]*, \.|  |;\.", " ".join([screen["line"], *said.values()]))
    panels = forest.forests(found["headline"], styles_of(given), {})
    assert bool(panels) == bool(cards)
    if not cards:
        assert "nothing to conclude" in said["What came out"]


def test_a_training_reward_beside_a_judge_is_no_evidence_of_better_answers(run: ReportInput) -> None:
    """Where the judge compared no policy with its start, the effect is that on the score that was trained."""
    up = {
        "dataset": "in",
        "measure": "reward",
        "a": "ppo",
        "b": "seed-0",
        "n": 40,
        "mean": 0.2,
        "low": 0.1,
        "high": 0.3,
    }
    judged = [{**up, "measure": first_screen.JUDGE, "a": "salsa", "b": "ppo"}]
    said = first_screen.sentences([], [up], judged, run.policies, "the judge (x)")
    assert "raised the score that the policies are trained on" in said["What it means"]
    alone = first_screen.sentences([], [up], [], run.policies)
    assert alone["What it does not mean"].startswith("That the answers are better, since the policies were trained to")
    better = first_screen.sentences([], [up], [*judged, {**judged[0], "b": "seed-0"}], run.policies, "the judge (x)")
    assert "RLHF improved the answers to “in”" in better["What it means"]
