"""KL estimators, rewards per token, β, the options on scores: numbers that a person can check, and slow loops beside the fast ones."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_masks import LENGTHS, POISON, PROPERTY, draw, mask_of, poisoned

from salsa_peft.models.responses import Responses
from salsa_peft.models.rewards.reward import RunningScale
from salsa_peft.training.ppo import losses
from salsa_peft.training.ppo.config import SalsaPPOConfig
from salsa_peft.training.ppo.rollout import apply_score_options


class TestKL:
    def test_estimators_by_hand(self) -> None:
        """log π − log ref = ln 2: k1 = ln 2, k2 = ½ ln² 2, k3 = ½ − 1 + ln 2; the other way round k3 = 2 − 1 − ln 2."""
        two = math.log(2)
        more, less = (torch.tensor([0.0]), torch.tensor([-two])), (torch.tensor([-two]), torch.tensor([0.0]))
        expected = {
            "k1": (two, -two),
            "k2": (two**2 / 2, two**2 / 2),
            "k3": (0.5 - 1 + two, 2 - 1 - two),
            "abs": (two, two),
        }
        assert expected.keys() == losses.KL_ESTIMATORS.keys()
        for name, (up, down) in expected.items():
            assert losses.KL_ESTIMATORS[name](*more).item() == pytest.approx(up, abs=1e-6), name
            assert losses.KL_ESTIMATORS[name](*less).item() == pytest.approx(down, abs=1e-6), name

    def test_k1_and_k3_are_unbiased_and_the_others_are_not(self) -> None:
        """Σ_x p(x) k(x) = Σ p ln(p/q) for p = (½, ¼, ¼), q = (¼, ¼, ½): ½ ln 2 + 0 − ¼ ln 2 = ¼ ln 2."""
        p, q = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.25, 0.25, 0.5])
        means = {name: (p * k(p.log(), q.log())).sum().item() for name, k in losses.KL_ESTIMATORS.items()}
        exact = 0.25 * math.log(2)
        assert means["k1"] == pytest.approx(exact, abs=1e-6)
        assert means["k3"] == pytest.approx(exact, abs=1e-6)
        assert means["k2"] == pytest.approx(0.75 * math.log(2) ** 2 / 2, abs=1e-6)
        assert means["abs"] == pytest.approx(0.75 * math.log(2), abs=1e-6)
        assert (losses.KL_ESTIMATORS["k3"](p.log(), q.log()) >= 0).all()

    def test_k3_keeps_its_digits_near_zero(self) -> None:
        """k3 ≈ ½ d² where d is small; e^d − 1 − d in float32 would be noise of 1e-7."""
        k3 = losses.KL_ESTIMATORS["k3"](torch.tensor([0.0]), torch.tensor([-1e-3])).item()
        assert k3 == pytest.approx(math.expm1(-1e-3) + 1e-3, abs=1e-9)

    def test_rewards_by_hand(self) -> None:
        """−0.5·kl at every token that counts, plus the score at the last of them: −0.5·4 + 10 = 8; −0.5·1 − 3 = −3.5."""
        mask = torch.tensor([[True, True, False], [True, False, False], [True, True, True]])
        kl = torch.tensor([[2.0, 4, float("nan")], [1, float("inf"), 9], [0, 0, 6]])
        found = losses.token_rewards(kl, torch.tensor([10.0, -3, 1]), mask, 0.5)
        assert found.tolist() == [[-1.0, 8.0, 0.0], [-3.5, 0.0, 0.0], [0.0, 0.0, -2.0]]

    @PROPERTY
    @given(LENGTHS, st.integers(0, 999), st.floats(0, 2))
    def test_a_row_sums_to_score_less_kl(self, lengths: list[int], seed: int, kl_coef: float) -> None:
        mask, (kl, scores) = mask_of(lengths), draw(lengths, seed, 2)
        found = losses.token_rewards(kl, scores[:, 0], mask, kl_coef)
        assert not found[~mask].any()
        torch.testing.assert_close(found.sum(-1), scores[:, 0] - kl_coef * (kl * mask).sum(-1), rtol=1e-4, atol=1e-5)
        changed = (found != torch.where(mask, -kl_coef * kl, 0.0)).nonzero().tolist()
        assert changed == [[b, length - 1] for b, length in enumerate(lengths)]

    def test_rewards_per_token_by_hand(self) -> None:
        """β/|y| times the KL: of two tokens −0.5/2·(2, 4), of one −0.5·1, of three −0.5/3·6; the score is whole."""
        mask = torch.tensor([[True, True, False], [True, False, False], [True, True, True]])
        kl = torch.tensor([[2.0, 4, float("nan")], [1, float("inf"), 9], [0, 0, 6]])
        found = losses.token_rewards(kl, torch.tensor([10.0, -3, 1]), mask, 0.5, per="token")
        assert found.tolist() == [[-0.5, 9.0, 0.0], [-3.5, 0.0, 0.0], [0.0, 0.0, 0.0]]

    @PROPERTY
    @given(
        LENGTHS, st.integers(0, 999), st.floats(0, 2), st.sampled_from(["response", "token"]), st.sampled_from(POISON)
    )
    def test_rewards_equal_the_plain_loop(
        self, lengths: list[int], seed: int, kl_coef: float, per: Any, poison: float
    ) -> None:
        """Token by token, whatever stands outside; the tensors given stay as they are."""
        mask, (kl, scores) = mask_of(lengths), draw(lengths, seed, 2)
        given_kl = poisoned(kl, mask, poison)
        kept = given_kl.clone()
        found = losses.token_rewards(given_kl, scores[:, 0], mask, kl_coef, per=per)
        torch.testing.assert_close(given_kl, kept, equal_nan=True)
        for b, length in enumerate(lengths):
            share = length if per == "token" else 1
            for t in range(mask.shape[1]):
                expected = -kl_coef * kl[b, t].item() / share if t < length else 0.0
                expected += scores[b, 0].item() if t == length - 1 else 0.0
                assert found[b, t].item() == pytest.approx(expected, rel=1e-5, abs=1e-6)

    @PROPERTY
    @given(LENGTHS, st.integers(0, 999))
    def test_estimates_equal_the_plain_loop(self, lengths: list[int], seed: int) -> None:
        """Each estimator equals its formula in Python floats."""
        policy, other = draw(lengths, seed, 2)
        formulas = {"k1": lambda d: d, "k2": lambda d: d * d / 2, "k3": lambda d: math.exp(-d) - 1 + d, "abs": abs}
        for name, formula in formulas.items():
            found = losses.KL_ESTIMATORS[name](policy, other)
            for b in range(policy.shape[0]):
                for t in range(policy.shape[1]):
                    expected = formula(policy[b, t].item() - other[b, t].item())
                    assert found[b, t].item() == pytest.approx(expected, rel=1e-4, abs=1e-5), name


class TestEntropyBonus:
    MASK = torch.tensor([[True, True], [True, False]])
    LOGPROBS = torch.tensor([[-1.0, -2.0], [-4.0, math.nan]])
    ENTROPY = torch.tensor([[0.1, 0.2], [0.6, math.nan]])  # mean 0.3

    @pytest.mark.parametrize(
        ("floor", "expected"), [(0.31, [[0.5, 1.0], [2.0, 0.0]]), (0.29, [[0.0, 0.0], [0.0, 0.0]])]
    )
    def test_by_hand(self, floor: float, expected: list[list[float]]) -> None:
        """½ · −log π at every token of the batch if its mean entropy is below the floor, not below by token."""
        assert losses.entropy_bonus(self.LOGPROBS, self.ENTROPY, self.MASK, floor, 0.5).tolist() == expected

    def test_its_mean_is_the_entropy(self) -> None:
        """Σ_x p(x) · −log p(x) is the entropy of (½, ¼, ¼): 1.5 ln 2."""
        p = torch.tensor([[0.5, 0.25, 0.25]])
        bonus = losses.entropy_bonus(p.log(), torch.zeros(1, 3), torch.ones(1, 3, dtype=torch.bool), 1.0, 1.0)
        assert (p * bonus).sum().item() == pytest.approx(1.5 * math.log(2))


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (6.0, 0.2),
        (6.6, 0.2 * (1 + 0.1 * 0.01)),
        (60.0, 0.2 * 1.002),
        (5.4, 0.2 * (1 - 0.1 * 0.01)),
        (0.0, 0.2 * 0.998),
        (-9.0, 0.2 * 0.998),
    ],
)
def test_the_kl_coefficient_by_hand(kl: float, expected: float) -> None:
    """Target 6, 100 responses of a horizon of 10,000 (0.01): 10% over the target is +0.1%; beyond ±20% the clip holds."""
    assert losses.adapt_kl_coef(0.2, kl, target=6, horizon=10_000, responses=100) == pytest.approx(expected, rel=1e-9)


def test_the_kl_coefficient_grows_elevenfold_in_120_000_episodes() -> None:
    """design.md: (1 + 0.2·8/10,000)^15,000 = e^2.4 = 11.0."""
    beta = 0.01
    for _ in range(15_000):
        beta = losses.adapt_kl_coef(beta, 1e3, target=6, horizon=10_000, responses=8)
    assert beta / 0.01 == pytest.approx(11.0, abs=0.1)


@pytest.mark.parametrize(
    ("kl", "least", "most", "expected"),
    [
        (60.0, 0.0, 0.2001, 0.2001),
        (60.0, 0.0, 0.3, 0.2 * 1.002),
        (0.0, 0.1999, None, 0.1999),
        (0.0, 0.1, None, 0.2 * 0.998),
        (6.0, 0.25, 0.3, 0.25),
        (6.0, 0.1, 0.15, 0.15),
    ],
)
def test_the_bounds_of_the_kl_coefficient(kl: float, least: float, most: float | None, expected: float) -> None:
    """At the bound it stops, inside them nothing changes, from outside it comes back."""
    found = losses.adapt_kl_coef(0.2, kl, target=6, horizon=10_000, responses=100, least=least, most=most)
    assert found == pytest.approx(expected, rel=1e-9)


@PROPERTY
@given(st.floats(1e-4, 1), st.floats(-50, 50), st.floats(0.1, 20), st.integers(1, 512), st.floats(512, 1e5))
def test_the_kl_coefficient_is_the_plain_formula(
    beta: float, kl: float, target: float, responses: int, horizon: float
) -> None:
    """It rises where the KL is above the target, falls below it, by no more than a fifth of n / horizon."""
    found = losses.adapt_kl_coef(beta, kl, target=target, horizon=horizon, responses=responses)
    error = kl / target - 1
    clipped = 0.2 if error > 0.2 else -0.2 if error < -0.2 else error
    assert found == pytest.approx(beta * (1 + clipped * responses / horizon), rel=1e-9)
    assert abs(found / beta - 1) <= 0.2 * responses / horizon + 1e-9
    assert found >= beta if kl >= target else found <= beta


def answers(finished: list[bool]) -> Responses:
    """Of 1, 2 and 3 tokens."""
    mask = torch.ones(len(finished), len(finished), dtype=torch.bool).tril()
    ids = mask.long()
    return Responses(ids, mask, ids, mask, torch.tensor(finished))


class TestScores:
    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            ({}, [-3.0, 1.0, 5.0]),
            ({"score_clip": 2.0}, [-2.0, 1.0, 2.0]),
            ({"missing_eos_penalty": 4.0}, [-3.0, -3.0, 5.0]),
            ({"score_clip": 2.0, "missing_eos_penalty": 4.0}, [-2.0, -3.0, 2.0]),
            ({"normalize_scores": True}, [-0.75, 0.25, 1.25]),
            ({"normalize_scores": True, "score_clip": 1.0, "missing_eos_penalty": 1.0}, [-0.75, -0.75, 1.0]),
            ({"score_length_exponent": 1.0}, [-1.5, 1.0, 7.5]),
            ({"score_length_exponent": -1.0}, [-6.0, 1.0, 10 / 3]),
            ({"score_clip": 2.0, "score_length_exponent": 1.0, "missing_eos_penalty": 4.0}, [-1.0, -3.0, 3.0]),
        ],
    )
    def test_the_options_by_hand(self, options: dict[str, Any], expected: list[float]) -> None:
        """Scores −3, 1, 5 (deviation 4) of 1, 2, 3 tokens (mean 2), the second without EOS.

        Scaled, then clipped, then multiplied by a power of ½, 1, 1½, then the penalty, which no clip takes back.
        """
        args = SalsaPPOConfig(output_dir="unused", use_cpu=True, bf16=False, report_to="none", **options)
        scores = torch.tensor([-3.0, 1, 5])
        found = apply_score_options(scores, answers([True, False, True]), args, RunningScale())
        assert found.tolist() == pytest.approx(expected)
        assert scores.tolist() == [-3.0, 1.0, 5.0]

    @PROPERTY
    @given(
        st.lists(st.integers(1, 5), min_size=1, max_size=6),
        st.integers(0, 999),
        st.floats(-100, 100),
        st.floats(0.1, 50),
    )
    def test_the_running_scale_is_torchs_deviation(
        self, sizes: list[int], seed: int, mean: float, spread: float
    ) -> None:
        """Of all scores so far, whatever the batches they came in; the mean is not taken off."""
        scale, generator = RunningScale(), torch.Generator().manual_seed(seed)
        seen = torch.empty(0)
        for size in sizes:
            scores = mean + spread * torch.randn(size, generator=generator)
            seen = torch.cat([seen, scores])
            expected = scores if len(seen) == 1 else scores / seen.double().std().float()
            torch.testing.assert_close(scale(scores), expected, rtol=1e-4, atol=1e-5)
        assert (scale.count, scale.mean) == (len(seen), pytest.approx(seen.double().mean().item(), rel=1e-6, abs=1e-6))

    def test_equal_scores_are_left_as_they_are(self) -> None:
        """A deviation of 0 divides nothing."""
        assert RunningScale()(torch.tensor([2.0, 2.0])).tolist() == [2.0, 2.0]
