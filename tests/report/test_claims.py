"""Means over replicates, β by leave-one-out, and the table of the paper's claims on made-up numbers of both outcomes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from salsa_peft.report.replicates import claims as claims_of
from salsa_peft.report.replicates.claims import CLAIMS, Claim, claims, verdict
from salsa_peft.report.replicates.numbers import label_of
from salsa_peft.report.replicates.summary import Replicate, Trained, leave_one_out
from salsa_peft.report.replicates.table import as_markdown, columns, rows
from salsa_peft.utils.statistics import Estimate, mean_interval, t_test

SHRUNK, NORM, STRETCHED = (
    "shrunk 0.6·seed-0",
    label_of({"shrunk": {"seed": 0, "scale": "soup-norm"}}),
    label_of({"stretched": {}}),
)
THREE = label_of({"soup": {"members": [0, 1, 2]}})
QUARTERS = [label_of({"soup": {"weights": [1 - at, at]}}) for at in (0.25, 0.75)]
NOISE = (0.01, -0.01, 0.02, 0.0, -0.02)
"""Difference between replicates in all scores; pairing removes it."""


def world(good: bool, number: int = 0) -> Replicate:
    """A replicate in which every claim holds (`good`), or its opposite."""
    sign, noise = (1 if good else -1), NOISE[number]
    own = sign * (0.001 * number + 0.1)  # what the claim says, a little different in each replicate
    scores: dict[str, float] = {
        "seed-0": 0.5,
        "seed-1": 0.5,
        "soup": 0.5 + own,
        "base": 0.5,
        "shrunk": 0.5,
        "norm": 0.5,
        "wide": 0.5 + own,
    }
    policies: dict[str, Trained] = {}
    gains = {"seed-0": own, "soup": 3 * own, SHRUNK: own, NORM: own, "base": own, STRETCHED: own, "seed-1": 0.0, "seed-0, seed-1": own / 2,
             THREE: 6 * own, QUARTERS[0]: 2 * own, QUARTERS[1]: 2 * own}  # fmt: skip
    lengths, kl, rewards = dict.fromkeys(scores, 6.0), {}, {}
    for label, gain in gains.items():
        for beta in (0.01, 0.3, 10.0):
            name = f"{label} at {beta}"
            policies[name] = Trained(label, beta)
            best = (
                {0.01: -own, 0.3: 0.0, 10.0: -0.5}[beta] if label != "soup" else {0.01: own, 0.3: 0.0, 10.0: -0.5}[beta]
            )
            scores[name] = 0.5 + gain + best
            rewards[name] = 2 * scores[name]
            lengths[name] = 6.0 - (10 * own if label == "soup" else 0.0)
            kl[name] = 3.0 + (10 * own if label == "soup" else 0.0)
    scores = {name: score + noise for name, score in scores.items()}

    def point(weights: list[float], score: float, at: float | None = None) -> dict[str, Any]:
        return {"weights": weights, "scores": {"gold": {"mean": score + noise}}} | ({} if at is None else {"at": at})

    line = [
        point([1 - at, at], 0.5 + own * (1 - abs(at - 0.5) / 0.5), at) for at in (-0.5, 0.0, 0.25, 0.5, 0.75, 1.0, 1.5)
    ]
    shrunk = [point([at], 0.5, at) for at in (0.4, 0.6, 0.7 + number / 100)]
    corners = [(0.0, 0.0, 1.0), (0.5, 0.5, 0.0), (1 / 3, 1 / 3, 1 / 3), (-0.5, 0.5, 1.0)]
    plane = [point(list(weights), 0.5 + own * (1 - max(weights))) for weights in corners]
    outside = {name: score - (3 * own if name.startswith("seed-0 at") else 0.0) for name, score in scores.items()}
    return Replicate(
        measure="gold", scores={"in": scores, "out": outside}, rewards={"in": rewards, "out": rewards},
        lengths={"in": lengths, "out": lengths}, policies=policies, kl=kl,
        controls={"shrunk": SHRUNK, "norm": NORM, "wide": STRETCHED},
        landscape={"questions": "in", "lines": [{"kind": "line", "points": line}, {"kind": "shrunk", "points": shrunk}],
                   "plane": {"points": plane}},
    )  # fmt: skip


def worlds(good: bool, n: int = 5) -> list[Replicate]:
    return [world(good, number) for number in range(n)]


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.__name__)
def test_each_claim_sees_both_outcomes(claim: Callable[[list[Replicate]], Claim | None]) -> None:
    """The claim itself, on every set that it is measured on: as claimed in one world, the opposite in its mirror image."""
    for good, said in ((True, "as claimed"), (False, "the opposite")):
        found = claim(worlds(good))
        assert found is not None
        main = found.findings[0]
        assert not main.control and main.values
        assert {verdict(main.expected, value) for value in main.values.values()} == {said}
        assert {value.n for value in main.values.values()} == {5}


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.__name__)
def test_a_claim_without_its_numbers_is_left_out(claim: Callable[[list[Replicate]], Claim | None]) -> None:
    assert claim([Replicate(measure="gold", scores={"in": {"seed-0": 0.5}})] * 3) is None


def cell(found: Claim | None, what: str, dataset: str = "in") -> Estimate:
    assert found is not None
    (one,) = [finding for finding in found.findings if finding.what == what]
    return one.values[dataset]


def test_the_numbers_of_the_claims() -> None:
    """By hand: own = 0.1 to 0.104, and differences that are multiples of it; the replicates' noise cancels."""
    own, given = mean_interval([0.1 + 0.001 * number for number in range(5)]), worlds(True)

    def times(factor: float) -> Any:
        return pytest.approx((factor * own.mean, factor * own.low, factor * own.high), abs=1e-9)

    def of(estimate: Estimate) -> tuple[float, float, float]:
        return estimate.mean, estimate.low, estimate.high

    peak = claims_of.interior_peak(given)
    assert of(cell(peak, "soup − mean of its two seeds")) == times(1)
    assert of(cell(peak, "α = ½ − mean of α = ¼ and ¾")) == times(0.5)
    assert of(cell(peak, "midpoint − best shrunk seed")) == times(1)
    assert cell(peak, "mean of α = −½ and 1½ − mean of the ends").mean == pytest.approx(-own.mean)
    assert of(cell(claims_of.triangle(given), "centre − mean of the vertices")) == times(2 / 3)
    assert of(cell(claims_of.triangle(given), "centre − mean of the sides’ midpoints")) == times(1 / 6)
    best = claims_of.salsa_over_ppo(given)  # the best β: 0.01 for SALSA (3 + 1), 0.3 for PPO (1)
    assert of(cell(best, "SALSA − PPO")) == times(3) and of(cell(best, "SALSA − PPO", "out")) == times(6)
    assert of(cell(best, "SALSA − PPO, out − in of distribution", "out")) == times(3)
    assert of(cell(best, f"SALSA − PPO with reference {SHRUNK}")) == times(3)
    assert of(cell(claims_of.reward_shift(given), "training reward, SALSA − PPO")) == times(6)
    assert of(cell(claims_of.alpha_as_reference(given), "α = ½ − mean of α = ¼ and ¾")) == times(2)
    assert cell(claims_of.alpha_as_reference(given), "seed-1 as reference − PPO").mean == pytest.approx(-own.mean)
    assert of(cell(claims_of.mean_of_kls(given), "SALSA − MKL")) == times(3.5)
    assert of(cell(claims_of.members(given), "SALSA with three members − with two")) == times(2)
    assert cell(claims_of.mean_of_kls(given), "MKL − PPO").mean == pytest.approx(-own.mean / 2)
    assert of(cell(claims_of.low_beta(given), "SALSA − PPO at β = 0.01")) == times(4)
    assert cell(claims_of.low_beta(given), "PPO at β = 0.01 − at its best larger β").mean == pytest.approx(-own.mean)
    assert of(
        cell(claims_of.kl_deviation(given), "KL to the own reference, SALSA − PPO, mean over β", "training")
    ) == times(10)
    assert cell(claims_of.kl_hack(given), "the same, SALSA − PPO").mean == pytest.approx(-10 * own.mean)


def test_the_seed_with_the_soups_norm_is_not_among_the_shrunk_seeds_that_are_searched() -> None:
    """Its scale differs between replicates, and it has a row of its own."""
    given = worlds(True)
    for one in given:
        assert one.landscape is not None
        one.landscape["lines"][1]["points"][-1]["scores"]["gold"]["mean"] = 99.0
    assert cell(claims_of.interior_peak(given), "midpoint − best shrunk seed").mean == pytest.approx(0.102)


def test_leave_one_out() -> None:
    """The setting that is best in the others, although another is best at home; ties go to the smaller one."""
    given = [{0.1: 9.0, 1.0: 1.0}, {0.1: 1.0, 1.0: 2.0}, {0.1: 1.0, 1.0: 2.5}]
    assert leave_one_out(given) == [1.0, 0.1, 0.1]
    assert leave_one_out([{1.0: 1.0, 0.1: 1.0}] * 2) == [0.1, 0.1]
    with pytest.raises(ValueError, match="at least two"):
        leave_one_out(given[:1])


def test_both_methods_choose_from_the_same_values_of_beta() -> None:
    """A β that only one of the two was trained with does not count."""
    given = worlds(True)
    for one in given:
        one.policies["extra"] = Trained("soup", 0.5)
        for data in one.scores.values():
            data["extra"] = 50.0
    assert cell(claims_of.salsa_over_ppo(given), "SALSA − PPO").mean == pytest.approx(3 * 0.102)


def test_verdicts() -> None:
    def estimate(low: float, high: float, n: int = 5) -> Estimate:
        return Estimate((low + high) / 2, low, high, n)

    above, below, around = estimate(0.1, 0.2), estimate(-0.2, -0.1), estimate(-0.1, 0.2)
    assert [verdict(1, one) for one in (above, below, around)] == ["as claimed", "the opposite", "not shown"]
    assert [verdict(-1, one) for one in (above, below, around)] == ["the opposite", "as claimed", "not shown"]
    assert [verdict(0, one) for one in (above, below, around)] == ["the opposite", "as claimed", "not contradicted"]
    assert verdict(1, estimate(0.3, 0.3, 1)) == "one replicate"


def test_the_table() -> None:
    """One row a finding; the claim once; columns are the sets of questions, then training."""
    found = claims(worlds(True))
    assert len(found) == len(CLAIMS)
    table = rows(found)
    assert columns(table) == ["in", "out", "training"]
    assert len(table) == sum(len(one.findings) for one in found)
    assert [row["source"] for row in table if row["source"]] == [one.source for one in found]
    text = as_markdown(table).splitlines()
    assert text[0] == "| paper | difference | expected | in | out | training | n | found |"
    assert {line.count(" | ") for line in text[2:]} == {7}
    assert len(text) == 2 + len(table) + len(found)
    first = next(line for line in text if "soup − mean of its two seeds" in line)
    assert "+0.102 [+0.100, +0.104]" in first and first.endswith("| 5 | as claimed |")
    assert as_markdown([]) == "| paper | difference | expected |  | n | found |\n|---|---|---|---:|---|"


def test_one_replicate_claims_nothing() -> None:
    """Differences before PPO are shown without an interval; what needs leave-one-out is left out."""
    found = claims(worlds(True, 1))
    assert {
        verdict(one.expected, value) for claim in found for one in claim.findings for value in one.values.values()
    } == {"one replicate"}
    assert claims_of.salsa_over_ppo(worlds(True, 1)) is None


def test_t_test() -> None:
    """t = 3/√½ with 4 degrees of freedom: p 0.0132; equal values are 0 or 1."""
    assert t_test([1, 2, 3, 4, 5], 0) == pytest.approx(0.0132, abs=1e-4)
    assert t_test([1, 2, 3, 4, 5], 3) == pytest.approx(1)
    assert (t_test([0.5, 0.5], 0.5), t_test([0.6, 0.6], 0.5), t_test([0.9], 0.5)) == (1, 0, 1)
