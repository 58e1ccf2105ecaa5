"""Models made of policies in the report: soups against their members, the front of two rewards, WARP."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from synthetic_run import synthetic

from salsa_peft.config.policies.rewarded_soups import RewardedSoups
from salsa_peft.config.policies.warp import Warp
from salsa_peft.report import joined, page
from salsa_peft.report.gather import PolicyReport, ReportInput, SoupReport, soup_text
from salsa_peft.report.joined import Run
from salsa_peft.report.replicates import group
from salsa_peft.report.sections import first_screen, merging, pareto, policy_soups, warp
from salsa_peft.report.sections.paired import of_replicates, of_run
from salsa_peft.utils.statistics import mean_interval

BASE = synthetic(n=40, policies=("ppo", "salsa"), small=True)
Scores = dict[str, dict[str, np.ndarray]]
"""Model → measure → the scores of the prompts."""


def run_of(scores: Scores, seed: int = 0, **changes: Any) -> ReportInput:
    """A run whose only set of questions, “in”, has these scores beside those of seed-0, base, soup, ppo and salsa."""
    n = len(next(iter(next(iter(scores.values())).values())))
    answers, models = [], {}
    for model, by_measure in scores.items():
        models[model] = {
            "scores": {measure: asdict(mean_interval(of)) for measure, of in by_measure.items()},
            "response_length": asdict(mean_interval([3.0] * n)),
            "empty_share": 0.0,
        }
        answers += [
            {"dataset": "in", "index": at, "turn": 1, "prompt": f"{at}", "model": model, "response": "x", "length": 3,
             "scores": {measure: float(of[at]) for measure, of in by_measure.items()}}
            for at in range(n)
        ]  # fmt: skip
    known = set(models)
    data = BASE.evaluation["datasets"]["in"]
    evaluation = {
        **BASE.evaluation,
        "measures": list(next(iter(scores.values()))),
        "models": list(models),
        "datasets": {"in": {**data, "n": n, "models": models, "pairs": []}},
    }
    policies = {name: one for name, one in BASE.policies.items() if name in known} | changes.pop("policies", {})
    return replace(
        BASE, answers=answers, evaluation=evaluation, policies=policies, landscape=None, replicate_of="x",
        training_seeds=f"sft {seed}", **changes,
    )  # fmt: skip


def gold(**values: list[float]) -> Scores:
    return {
        name.replace("_", "-"): {"reward": np.array(of) * 2, "gold": np.array(of, dtype=float)}
        for name, of in values.items()
    }


SOUPS = {
    "soup": SoupReport(["seed-0", "seed-1"], [0.5, 0.5]),
    "both": SoupReport(["ppo", "salsa"], [0.5, 0.5]),
    "weak": SoupReport(["salsa"], [1.0], start="seed-0", scale=0.5),
}
VALUES = {
    "seed_0": [1.0, 2.0, 3.0, 0.0], "seed_1": [1.0, 0.0, 1.0, 2.0], "soup": [3.0, 2.0, 4.0, 2.0],
    "ppo": [2.0, 2.0, 1.0, 3.0], "salsa": [4.0, 3.0, 4.0, 2.0], "both": [4.0, 3.0, 3.0, 2.0], "weak": [1.0, 1.0, 2.0, 0.0],
}  # fmt: skip


def kinds(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {row["kind"]: row for row in rows}


def test_a_soup_against_its_members() -> None:
    """Differences by hand, with the t-interval of the prompts' differences; the soup of seeds is no soup of policies."""
    run = run_of(gold(**VALUES), soups=SOUPS)
    rows = policy_soups.compare(of_run(run), run.soups, run.policies)
    assert {row["soup"] for row in rows} == {"both"}
    of = {name.replace("_", "-"): np.array(value) for name, value in VALUES.items()}
    gain = of["both"] - (of["ppo"] + of["salsa"]) / 2
    wanted = {
        "mean": gain,
        "best": of["both"] - of["salsa"],
        "control": of["both"] - of["weak"],
        "sft": gain - (of["soup"] - (of["seed-0"] + of["seed-1"]) / 2),
    }
    found = kinds(rows)
    assert found.keys() == wanted.keys() and found["best"]["best"] == "salsa"
    for kind, difference in wanted.items():
        estimate = mean_interval(difference)
        assert [found[kind][key] for key in ("mean", "low", "high", "n")] == pytest.approx(
            [estimate.mean, estimate.low, estimate.high, 4]
        )


def test_over_replicates_the_best_member_is_chosen_on_the_others() -> None:
    """ppo is best in two of three replicates; each is compared with the member that is best in the other two."""
    ppo, salsa, both = [5.0, 1.0, 4.0], [1.0, 2.0, 2.0], [3.0, 3.0, 3.5]
    runs = [
        run_of(gold(seed_0=[0.0, 0.0], ppo=[a, a], salsa=[b, b], both=[c, c]), seed, soups=SOUPS)
        for seed, (a, b, c) in enumerate(zip(ppo, salsa, both, strict=True))
    ]
    found = kinds(policy_soups.compare(of_replicates(runs), SOUPS, runs[0].policies))
    assert found["mean"]["mean"] == pytest.approx(np.mean(np.array(both) - (np.array(ppo) + np.array(salsa)) / 2))
    chosen = [ppo[0], ppo[1], ppo[2]]  # in the others: 1 + 4 against 4, 5 + 4 against 3, 5 + 1 against 3
    assert found["best"]["mean"] == pytest.approx(np.mean(np.array(both) - chosen)) and found["best"]["n"] == 3
    worse = kinds(policy_soups.compare(of_replicates(runs[:2]), SOUPS, runs[0].policies))["best"]
    assert worse["mean"] == pytest.approx(((3.0 - 1.0) + (3.0 - 1.0)) / 2)  # salsa for the first, ppo for the second
    assert worse["best"] is None and found["best"]["best"] == "ppo"


def told(**changes: float) -> str:
    """The sentences when the soup is the mean of its members, which equal one another, plus `changes` of some models."""
    noise = np.random.default_rng(0).normal(0, 0.01, (7, 40))
    noise -= noise.mean(axis=1, keepdims=True)
    levels = {name: 1.0 + changes.get(name, 0.0) for name in VALUES}
    values = {name: list(level + noise[at]) for at, (name, level) in enumerate(levels.items())}
    run = run_of(gold(**values), soups=SOUPS)
    return " ".join(policy_soups.sentences(policy_soups.compare(of_run(run), run.soups, run.policies), 1))


def test_what_is_said_of_a_soup() -> None:
    """By the intervals: higher, lower, not distinguishable; and whether policies merge worse than SFT models."""
    up = told(both=0.5)
    assert "both, the soup of ppo and salsa, scored higher than the mean of its members on “in” (+0.5" in up
    assert "scored higher than the shrunk policy weak on “in” (+0.5" in up
    assert (
        "here, by the gain over the mean of the members, both is better than the soup of SFT models on “in” (+0.5" in up
    )
    down = told(both=-0.5, soup=0.1)
    assert "scored lower than the best of its members (chosen by the same scores, which favours it) on “in” (" in down
    assert "both is worse than the soup of SFT models on “in” (−0.6" in down
    same = told()
    assert "both, the soup of ppo and salsa, is not distinguishable from the mean of its members on “in”" in same
    run = run_of(gold(**{name: of for name, of in VALUES.items() if name not in ("weak", "seed_1")}), soups=SOUPS)
    few = " ".join(policy_soups.sentences(policy_soups.compare(of_run(run), run.soups, run.policies), 1))
    assert "this run cannot compare both with the soup of SFT models" in few
    assert (
        "no policy that is only shrunk: add to `soups` one with a single member, such as ppo, and a scale below 1"
        in few
    )


@pytest.mark.parametrize(
    ("soup", "text"),
    [
        (SoupReport(["ppo"], [1.0], scale=0.5), "control: ppo shrunk to 0.5 of its change from the base, averages nothing"),
        (SoupReport(["ppo"], [1.0]), "ppo itself, averages nothing"),
        (SoupReport(["ppo"], [1.0], ranks=[4], error=0.1), "ppo (compressed to rank 4), averages nothing"),
        (SoupReport(["ppo"], [1.0], start="seed-0", scale=1.5), "ppo stretched to 1.5 of its change from seed-0, averages nothing"),
        (SoupReport(["ppo"], [1.0], scale=-1.0), "ppo reversed to -1 of its change from the base, averages nothing"),
        (SoupReport(["ppo"], [1.0], "ties", scale=0.5), "ppo shrunk to 0.5 of its change from the base (ties), averages nothing"),
        (SoupReport(["/home/me/mine", "ppo"], [0.5, 0.5], start="/home/me/old"), "soup of mine, ppo (changes from old)"),
    ],
)  # fmt: skip
def test_a_soup_in_words(soup: SoupReport, text: str) -> None:
    """A soup of one member is the control only if it is shrunk and nothing else; local paths are cut."""
    assert soup_text(soup) == text
    run = run_of(gold(**VALUES), soups={**SOUPS, "weak": replace(soup, members=["salsa"])})
    found = kinds(policy_soups.compare(of_run(run), run.soups, run.policies))
    assert ("control" in found) == text.startswith("control")


def test_the_soup_of_the_section_may_be_of_policies() -> None:
    """Then the run has no soup of SFT models, and no text calls it so."""
    run = run_of(gold(**VALUES), soups={**SOUPS, "soup": SoupReport(["ppo", "seed-0"], [0.5, 0.5])})
    rows = policy_soups.compare(of_run(run), run.soups, run.policies)
    assert "sft" not in kinds(rows)
    found = merging.merging([run])
    assert found is not None
    (last,) = [text for text in found["sentences"] if "cannot compare" in text]
    assert last.endswith(
        "this run cannot compare both with a soup of SFT models, because the recipe’s section `soup` is no average of"
        " several seeds."
    )
    assert first_screen.describe("soup", run.policies, run.described) == "soup of ppo, seed-0"
    assert first_screen.names(["soup"], {}, [], {}, run.described)["soup"] == "soup of ppo, seed-0"
    usual = replace(run, soups=SOUPS)
    assert "SFT models" in first_screen.describe("soup", run.policies, usual.described)


def rewarded(gain: float, seed: int = 0, n: int = 60, **changes: Any) -> ReportInput:
    """A run with the rewards a and b: soups at ¼ and ½, MORL at ½ alone; the soup at ½ is `gain` beyond MORL."""
    noise = np.random.default_rng(seed).normal(0, 0.05, (12, n))
    spots = {"seed-0": (0, 0), "end-a": (1, 0), "end-b": (0, 1), "quarter": (0.8, 0.3), "half": (0.6 + gain, 0.6 + gain), "morl": (0.6, 0.6)}  # fmt: skip
    scores = {
        name: {"reward": noise[at], "a": a + noise[at], "b": b + noise[6 + at]}
        for at, (name, (a, b)) in enumerate(spots.items())
    }
    own = {"end-a": {"a": 1.0}, "end-b": {"b": 2.0}, "morl": {"a": 0.5, "b": 0.5}}
    policies = {name: PolicyReport("seed-0", 0.1, [], [], reward=reward) for name, reward in own.items()}
    soups = {
        "quarter": SoupReport(["end-a", "end-b"], [0.75, 0.25]),
        "half": SoupReport(["end-b", "end-a"], [0.5, 0.5]),
        "other": SoupReport(["end-a", "seed-0"], [0.5, 0.5]),
    }
    return run_of(scores, seed, policies=policies, soups=soups, **changes)


def test_the_hypervolume_of_points() -> None:
    """The union of rectangles: 2·1 + 1·1 with a dominated point, and one below the reference point."""
    spots = np.array([[2.0, 1.0], [1.0, 2.0], [0.5, 0.5], [-1.0, 5.0]])
    assert pareto.hypervolume(spots, np.zeros(2)) == pytest.approx(3.0)
    assert pareto.hypervolume(spots[:1], np.array([1.0, 0.5])) == pytest.approx(0.5)


@pytest.mark.parametrize(("gain", "where"), [(0.2, "beyond"), (-0.2, "inside"), (0.0, "on")])
def test_where_the_front_lies(gain: float, where: str) -> None:
    """Of one run by the prompts, of replicates by the replicates; only soups at the weights of MORL policies count."""
    runs = [rewarded(gain, seed) for seed in range(4)]
    for scores in (of_run(runs[0]), of_replicates(runs)):
        found = pareto.front(scores, runs[0])
        assert found is not None and found["rewards"] == ["a", "b"]
        one = found["sets"]["in"]
        assert [(point["model"], point["kind"], point["weight"]) for point in one["points"]] == [
            ("end-a", "end", 0.0), ("quarter", "soup", 0.25), ("half", "soup", 0.5), ("end-b", "end", 1.0),
            ("morl", "control", 0.5), ("seed-0", "start", None),
        ]  # fmt: skip
        half = next(point for point in one["points"] if point["model"] == "half")
        assert half["change"]["a"]["mean"] == pytest.approx(half["a"]["mean"] - one["points"][-1]["a"]["mean"])
        (matched,) = one["matched"]
        assert matched["mean"] == pytest.approx(gain, abs=0.03)
        area = (0.6 + gain) ** 2 - 0.6**2  # both fronts have the two policies, which add nothing
        assert one["hypervolume"]["mean"] == pytest.approx(area, abs=0.05)
        (sentence,) = pareto.sentences(found)
        assert (
            f"the front of the soups of a and b lies {where} that of the policies trained on both rewards" in sentence
        )
    without = replace(runs[0], policies={name: one for name, one in runs[0].policies.items() if name != "morl"})
    (sentence,) = pareto.sentences(pareto.front(of_run(without), without) or {})
    assert "has no control" in sentence
    one_reward = replace(runs[0], policies={"end-a": runs[0].policies["end-a"]})
    assert pareto.front(of_run(one_reward), one_reward) is None


def policies(**rewards: dict[str, float]) -> dict[str, PolicyReport]:
    return {
        name.replace("_", "-"): PolicyReport("seed-0", 0.1, [], [], reward=reward) for name, reward in rewards.items()
    }


def test_the_front_of_the_section_has_the_section_s_own_models() -> None:
    """Other policies of the same rewards, and soups of them, before or after, are no part of it."""
    made = {"rewarded-a": {"a": 1.0}, "rewarded-b": {"b": 1.0}, "morl-0.5": {"a": 0.5, "b": 0.5}}
    run = replace(
        BASE,
        policies=policies(mine={"a": 1.0}, both={"a": 0.2, "b": 0.8}, **made),
        soups={
            "own": SoupReport(["mine", "rewarded-b"], [0.5, 0.5]),
            "again": SoupReport(["rewarded-a", "rewarded-b"], [0.1, 0.9]),
            **{
                f"rewarded-soup-{weight:g}": SoupReport(["rewarded-a", "rewarded-b"], [1 - weight, weight])
                for weight in (0.25, 0.5, 0.75)
            },
        },
        rewarded=RewardedSoups(rewards=["a", "b"]),
    )
    found = pareto.models(run)
    assert found is not None and (found.ends, found.start) == (("rewarded-a", "rewarded-b"), "seed-0")
    assert list(found.soups.items()) == [(f"rewarded-soup-{weight:g}", weight) for weight in (0.25, 0.5, 0.75)]
    assert found.controls == {"morl-0.5": 0.5}
    assert pareto.models(replace(run, policies=policies(mine={"a": 1.0}, rewarded_b={"b": 1.0}))) is None


def test_the_front_without_the_section_is_that_of_a_soup() -> None:
    """Its members are policies that raise one reward each; MORL has their start and reference, and lowers no reward."""
    given = policies(
        against={"a": -1.0}, other={"a": 1.0}, end_a={"a": 1.0}, end_b={"b": 1.0, "c": 0.0}, morl={"a": 1.0, "b": 3.0},
        minus={"a": 1.0, "b": -1.0}, third={"a": 1.0, "b": 1.0, "c": -1.0},
    )  # fmt: skip
    far = {"reference": replace(given["morl"], reference="soup"), "start": replace(given["morl"], start="seed-1")}
    soups = {
        "lower": SoupReport(["against", "end-b"], [0.5, 0.5]),
        "alike": SoupReport(["end-a", "other"], [0.5, 0.5]),
        "half": SoupReport(["end-b", "end-a"], [0.25, 0.75]),
    }
    found = pareto.models(replace(BASE, policies=given | far, soups=soups))
    assert found == pareto.Models(("a", "b"), ("end-a", "end-b"), {"half": 0.25}, {"morl": 0.75}, "seed-0")
    apart = given | {"end-b": replace(given["end-b"], start="seed-1")}
    unlike = pareto.models(replace(BASE, policies=apart, soups=soups))
    assert unlike is not None and unlike.controls == {}
    assert pareto.models(replace(BASE, policies=given, soups={"lower": soups["lower"]})) is None
    assert pareto.models(replace(BASE, policies=given, soups={})) is None


def warped(seed: int = 0) -> ReportInput:
    """Two iterations of two policies with η = 0.3, then a sweep with one value."""
    noise = np.random.default_rng(seed).normal(0, 0.05, (9, 30))
    levels = {"seed-0": 0.0, "warp-1-1": 1.0, "warp-1-2": 2.0, "warp-1": 1.2, "warp-2-1": 3.0, "warp-2-2": 3.0, "warp": 4.0, "warp-eta-0.5": 2.5}  # fmt: skip
    scores = gold(
        **{name.replace("-", "_"): list(level + noise[at]) for at, (name, level) in enumerate(levels.items())}
    )
    policies = {
        name: PolicyReport("ema 0.99", 0.1, [{"update": 1, "episode": 8, "objective/kl": 2.0 * int(name[-1])}], [], start=start)
        for name, start in (("warp-1-1", "seed-0"), ("warp-1-2", "seed-0"), ("warp-2-1", "warp-1"), ("warp-2-2", "warp-1"))
    }  # fmt: skip
    soups = {
        "warp-1": SoupReport(["warp-1-1", "warp-1-2"], [0.5, 0.5], "slerp", "seed-0", 0.3, [8], 0.02),
        "warp": SoupReport(["warp-2-1", "warp-2-2"], [0.5, 0.5], "slerp", "warp-1", 1.0, [8], 0.04),
        "warp-eta-0.5": SoupReport(["seed-0", "warp"], [0.5, 0.5]),
    }
    return run_of(scores, seed, policies=policies, soups=soups, warp=Warp(iterations=2, policies=2, sweep=[0.5]))


def test_warp_by_iteration() -> None:
    """Policies, merge and gain of each iteration, KL, η, rank and error; the sweep from start to merge."""
    run = warped()
    found = warp.table(of_run(run), [run])
    assert found is not None
    first, second = found["iterations"]
    assert (first["start"], second["start"], first["merge"], second["merge"]) == ("seed-0", "warp-1", "warp-1", "warp")
    assert (first["scale"], first["ranks"], first["error"], second["error"]) == (0.3, [8], 0.02, 0.04)
    assert first["kl"]["mean"] == 3.0  # of 2 and 4
    one = first["sets"]["in"]["gold"]
    assert [one[key]["mean"] for key in ("policies", "merge", "gain")] == pytest.approx([1.5, 1.2, -0.3], abs=0.05)
    assert second["sets"]["in"]["reward"]["gain"]["mean"] == pytest.approx(2.0, abs=0.05)
    assert [point["eta"] for point in found["sweep"]] == [0.0, 0.5, 1.0]
    assert [point["sets"]["in"]["score"]["mean"] for point in found["sweep"]] == pytest.approx(
        [0.0, 2.5, 4.0], abs=0.05
    )
    assert all(point["sets"]["in"]["kl"] is None for point in found["sweep"])
    assert [point["sets"]["in"]["gain"]["mean"] for point in found["sweep"]] == pytest.approx([0.0, 2.5, 4.0], abs=0.05)
    for row in run.answers:
        row["scores"]["kl"] = 0.0 if row["model"] == "seed-0" else 3.0
    measured = warp.table(of_run(run), [run])
    assert measured is not None and measured["iterations"][0]["sets"]["in"]["kl"]["merge"]["mean"] == 3.0
    assert [point["sets"]["in"]["kl"]["mean"] for point in measured["sweep"]] == [0.0, 3.0, 3.0]
    assert [one.name for one in warp.draw(found, "")] == ["warp-eta"]
    assert [one.name for one in warp.draw(measured, "")] == ["warp-eta", "warp-kl-in"]
    assert merging.merging([replace(run, warp=None, soups={}, policies={})]) is None


@pytest.fixture
def few_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports without the figures that other tests look at, which take most of the time."""
    sections = ("judged", "ablations", "scores", "pairs", "landscape", "training", "distributions")
    monkeypatch.setattr(page, "draw", lambda run: {section: [] for section in sections})
    for module, name in (
        (page, "forests"),
        (group, "forests"),
        (group, "_scores"),
        (group.curves, "draw"),
        (joined, "_draw"),
    ):
        monkeypatch.setattr(module, name, lambda *_, **__: [])


def test_the_page_of_a_run_and_of_replicates(tmp_path: Path, few_figures: None) -> None:
    """Sentences on the first screen, in the section, in the terminal and in summary.json; figures; descriptions."""
    single, several = tmp_path / "one", tmp_path / "both"
    several.mkdir()
    summary = page.write_report(single, warped_and_rewarded(0))
    together = joined.write_joined(several, [Run(warped_and_rewarded(seed), tmp_path / f"{seed}") for seed in (0, 1)])
    for folder, found, lines in (
        (single, summary["merging"], summary["console"]),
        (several, together["replicates"][0]["merging"], together["console"]),
    ):
        html, text = ((folder / file).read_text("utf-8") for file in ("report.html", "report.md"))
        assert "Models made of policies" in html and "Models made of policies" in text
        assert len(found["sentences"]) == 2 * 4 + 2 and len(found["front_sentences"]) == 1
        assert sum("only shrunk" in text or "cannot compare" in text for text in found["sentences"]) == 2
        for sentence in (*found["sentences"], *found["front_sentences"]):
            assert sentence in html
        for title in ("Rewarded soups:", "Soups of policies:"):
            assert any(line.startswith(title) for line in lines)
        for figure in ("front-in", "warp-eta", "soups-in"):
            assert (folder / "figures" / f"{figure}.png").exists()
        for described in ("soup of end-a, end-b with weights 0.75, 0.25", "(slerp, changes from warp-1)"):
            assert described in html and described in text
        assert "PPO from warp-1, KL to ema 0.99" in html and "reward 2 b" in html
        assert "7 policies trained by PPO from 2 different starts" in html


def warped_and_rewarded(seed: int) -> ReportInput:
    """The models of both runs in one, with a pair that is compared."""
    one, other = warped(seed), rewarded(0.2, seed, 30)
    pair = {"a": "warp", "b": "seed-0", "measure": "reward", "wins": 1, "losses": 0, "ties": 0, "adjusted_win_rate": 0.5,
            "win_rate": 0.5, "low": 0.4, "high": 0.6, "p_value": 1.0, "difference": asdict(mean_interval([0.0, 1.0]))}  # fmt: skip
    seeds, data, more = other.answers, one.evaluation["datasets"]["in"], other.evaluation["datasets"]["in"]
    answers = [*one.answers, *(row for row in seeds if row["model"] != "seed-0")]
    for row in answers:
        row["scores"] = {"gold": row["scores"]["reward"], **row["scores"]}
    models = {**more["models"], **data["models"]}
    for of in models.values():
        of["scores"] = {"gold": of["scores"]["reward"], **of["scores"]}
    for row in (row for row in answers if row["model"] == "seed-0"):
        row["scores"] |= {"a": 0.0, "b": 0.0}
    evaluation = {
        **one.evaluation, "models": list(models), "datasets": {"in": {**data, "models": models, "pairs": [pair]}},
    }  # fmt: skip
    return replace(
        one,
        evaluation=evaluation,
        answers=answers,
        policies=one.policies | other.policies,
        soups=one.soups | other.soups,
    )
