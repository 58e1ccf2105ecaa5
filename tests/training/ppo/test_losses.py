"""GAE, whitening, PPO's losses, explained variance: numbers that a person can check, and slow loops beside the fast ones."""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_masks import LENGTHS, POISON, PROPERTY, draw, mask_of, poisoned
from torch import Tensor

from salsa_peft.training.ppo import losses


class TestGAE:
    def test_by_hand(self) -> None:
        """γ = 0.5, λ = 0.5 (γλ = 0.25), rewards (1, 2, 4), values (2, 4, 8); the value after the last token is 0.

        δ₂ = 4 + 0.5·0 − 8 = −4         A₂ = −4                     R₂ = −4 + 8 = 4
        δ₁ = 2 + 0.5·8 − 4 = 2          A₁ = 2 + 0.25·(−4) = 1      R₁ = 1 + 4 = 5
        δ₀ = 1 + 0.5·4 − 2 = 1          A₀ = 1 + 0.25·1 = 1.25      R₀ = 1.25 + 2 = 3.25
        """
        mask = torch.tensor([[True, True, True, False]])
        rewards, values = torch.tensor([[1.0, 2, 4, 64]]), torch.tensor([[2.0, 4, 8, 16]])
        found = losses.gae(rewards, values, mask, gamma=0.5, lam=0.5)
        assert found.advantages.tolist() == [[1.25, 1.0, -4.0, 0.0]]
        assert found.returns.tolist() == [[3.25, 5.0, 4.0, 0.0]]

    def test_the_papers_setting_by_hand(self) -> None:
        """γ = 1, λ = 0.95, rewards (0, 1), values (0.5, 0.5): A₁ = 1 − 0.5 = 0.5; A₀ = (0.5 − 0.5) + 0.95·0.5 = 0.475."""
        found = losses.gae(
            torch.tensor([[0.0, 1]]), torch.tensor([[0.5, 0.5]]), torch.ones(1, 2).bool(), gamma=1.0, lam=0.95
        )
        torch.testing.assert_close(found.advantages, torch.tensor([[0.475, 0.5]]))
        torch.testing.assert_close(found.returns, torch.tensor([[0.975, 1.0]]))

    @PROPERTY
    @given(LENGTHS, st.integers(0, 999), st.floats(0, 1), st.floats(0, 1), st.sampled_from(POISON))
    def test_equals_the_double_sum(
        self, lengths: list[int], seed: int, gamma: float, lam: float, poison: float
    ) -> None:
        """A_t = Σ_l (γλ)^l δ_{t+l} with δ_t = r_t + γ V_{t+1} − V_t, V = 0 after the last token, whatever stands outside."""
        mask, (rewards, values) = mask_of(lengths), draw(lengths, seed, 2)
        found = losses.gae(poisoned(rewards, mask, poison), poisoned(values, mask, poison), mask, gamma=gamma, lam=lam)
        for b, length in enumerate(lengths):
            r, v = rewards[b].tolist(), [*values[b, :length].tolist(), 0.0]
            delta = [r[t] + gamma * v[t + 1] - v[t] for t in range(length)]
            for t in range(mask.shape[1]):
                expected = sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, length)) if t < length else 0.0
                assert found.advantages[b, t].item() == pytest.approx(expected, abs=1e-5)
                assert found.returns[b, t].item() == pytest.approx(expected + v[t] if t < length else 0.0, abs=1e-5)

    @PROPERTY
    @given(LENGTHS, st.integers(0, 999), st.floats(0, 1), st.floats(0, 1), st.sampled_from(POISON))
    def test_the_critics_lambda_is_decoupled(
        self, lengths: list[int], seed: int, gamma: float, lam_value: float, poison: float
    ) -> None:
        """The advantages with each response's own λ, the returns with the critic's: two double sums over the same δ."""
        mask, (rewards, values) = mask_of(lengths), draw(lengths, seed, 2)
        lams = torch.rand(len(lengths), generator=torch.Generator().manual_seed(seed))
        found = losses.gae(
            poisoned(rewards, mask, poison), poisoned(values, mask, poison), mask, gamma=gamma, lam=lams, lam_value=lam_value
        )  # fmt: skip
        for b, length in enumerate(lengths):
            r, v = rewards[b].tolist(), [*values[b, :length].tolist(), 0.0]
            delta = [r[t] + gamma * v[t + 1] - v[t] for t in range(length)]
            for t in range(length):
                rest = range(t, length)
                advantage = sum((gamma * lams[b].item()) ** (k - t) * delta[k] for k in rest)
                target = sum((gamma * lam_value) ** (k - t) * delta[k] for k in rest) + v[t]
                assert found.advantages[b, t].item() == pytest.approx(advantage, abs=1e-5)
                assert found.returns[b, t].item() == pytest.approx(target, abs=1e-5)
            assert not found.advantages[b, length:].any() and not found.returns[b, length:].any()

    def test_the_critics_lambda_by_hand(self) -> None:
        """γ = 1, rewards (0, 3), values (1, 2): δ = (1, 1). λ = 0: advantages (1, 1). λ = 1: returns (1 + 1 + 1, 1 + 2)."""
        table = torch.ones(1, 2).bool()
        found = losses.gae(torch.tensor([[0.0, 3]]), torch.tensor([[1.0, 2]]), table, gamma=1.0, lam=0.0, lam_value=1.0)
        assert found.advantages.tolist() == [[1.0, 1.0]]
        assert found.returns.tolist() == [[3.0, 3.0]]

    def test_the_length_dependent_lambda_by_hand(self) -> None:
        """α = ½: lengths 1, 2, 4, 10 give 1 − 2 → 0, 1 − 1 = 0, 1 − ½, 1 − 1/5."""
        mask = torch.arange(10) < torch.tensor([1, 2, 4, 10])[:, None]
        torch.testing.assert_close(losses.length_dependent_lam(mask, 0.5), torch.tensor([0.0, 0.0, 0.5, 0.8]))


class TestBaselines:
    def test_leave_one_out_by_hand(self) -> None:
        """A prompt's three responses of lengths 2, 1, 3; where the second has ended, its last return, 7, counts."""
        returns = torch.tensor([[1.0, 2, 0], [7, 0, 0], [3, 4, 6]])
        mask = torch.tensor([[True, True, False], [True, False, False], [True, True, True]])
        found = losses.leave_one_out_baseline(returns, mask, 3)
        assert found.tolist() == [[5.0, 5.5, 0.0], [2.0, 0.0, 0.0], [4.0, 4.5, 4.5]]

    @PROPERTY
    @given(st.lists(st.integers(1, 6), min_size=6, max_size=6), st.sampled_from([2, 3, 6]), st.integers(0, 999))
    def test_leave_one_out_equals_the_plain_loop(self, lengths: list[int], group: int, seed: int) -> None:
        mask, (returns,) = mask_of(lengths), draw(lengths, seed, 1)
        found = losses.leave_one_out_baseline(returns, mask, group)
        for b, length in enumerate(lengths):
            first = b - b % group
            others = [other for other in range(first, first + group) if other != b]
            for t in range(mask.shape[1]):
                at = [returns[other, min(t, lengths[other] - 1)].item() for other in others]
                assert found[b, t].item() == pytest.approx(statistics.fmean(at) if t < length else 0.0, abs=1e-5)

    def test_the_batchs_mean_by_hand(self) -> None:
        """Over tokens, not responses: (1 + 2 + 6) / 3."""
        mask = torch.tensor([[True, True], [True, False]])
        assert losses.batch_baseline(torch.tensor([[1.0, 2], [6, 0]]), mask).tolist() == [[3.0, 3.0], [3.0, 0.0]]

    def test_sums_by_hand(self) -> None:
        """Decay ½ and 1: 1 + ½·(2 + ½·4) = 3; 1 + 2 + 4 = 7."""
        table = torch.tensor([[1.0, 2, 4], [1, 2, 4]])
        assert losses.discounted_sums(table, torch.tensor([0.5, 1.0])).tolist() == [[3.0, 4, 4], [7, 6, 4]]


class TestWhiten:
    def test_by_hand(self) -> None:
        """1, 2, 3: mean 2, unbiased variance 1 → −1, 0, 1; without the shift 1, 2, 3 again; (0, 4): variance 8, so ±√½."""
        mask = torch.tensor([[True, True, False], [True, False, False]])
        values = torch.tensor([[1.0, 2, float("nan")], [3, float("inf"), 7]])
        torch.testing.assert_close(losses.whiten(values, mask), torch.tensor([[-1.0, 0, 0], [1, 0, 0]]))
        torch.testing.assert_close(
            losses.whiten(values, mask, shift_mean=False), torch.tensor([[1.0, 2, 0], [3, 0, 0]])
        )
        half = math.sqrt(0.5)
        torch.testing.assert_close(
            losses.whiten(torch.tensor([[0.0, 4]]), torch.ones(1, 2).bool()), torch.tensor([[-half, half]])
        )

    def test_one_token_only_loses_its_mean(self) -> None:
        mask = torch.tensor([[True, False]])
        assert losses.whiten(torch.tensor([[5.0, 1]]), mask).tolist() == [[0.0, 0.0]]
        assert losses.whiten(torch.tensor([[5.0, 1]]), mask, shift_mean=False).tolist() == [[5.0, 0.0]]

    @PROPERTY
    @given(
        st.lists(st.integers(2, 6), min_size=2, max_size=4),
        st.integers(0, 999),
        st.floats(-5, 5),
        st.sampled_from(POISON),
    )
    def test_mean_and_variance(self, lengths: list[int], seed: int, shift: float, poison: float) -> None:
        mask, (values,) = mask_of(lengths), draw(lengths, seed, 1)
        values = poisoned(3 * values + shift, mask, poison)
        shifted, kept = losses.whiten(values, mask), losses.whiten(values, mask, shift_mean=False)
        assert shifted[mask].mean().item() == pytest.approx(0, abs=1e-5)
        assert kept[mask].mean().item() == pytest.approx(values[mask].mean().item(), abs=1e-4)
        for whitened in (shifted, kept):
            assert whitened[mask].var().item() == pytest.approx(1, abs=1e-3)
            assert not whitened[~mask].any()

    @PROPERTY
    @given(LENGTHS.filter(lambda lengths: sum(lengths) > 1), st.integers(0, 999), st.booleans())
    def test_equals_the_plain_loop(self, lengths: list[int], seed: int, shift_mean: bool) -> None:
        """(x − mean) / √(unbiased variance + 1e-8), over all rows' tokens together, in Python floats."""
        mask, (values,) = mask_of(lengths), draw(lengths, seed, 1)
        counted = [values[b, t].item() for b, length in enumerate(lengths) for t in range(length)]
        mean, scale = statistics.fmean(counted), (statistics.variance(counted) + 1e-8) ** -0.5
        found = losses.whiten(values, mask, shift_mean=shift_mean)
        for b, length in enumerate(lengths):
            for t in range(length):
                expected = (values[b, t].item() - mean) * scale + (0.0 if shift_mean else mean)
                assert found[b, t].item() == pytest.approx(expected, rel=1e-4, abs=1e-4)

    def test_equal_values_stay_finite(self) -> None:
        """A variance of 0: nothing but the mean is taken off, no division by 0."""
        mask = torch.tensor([[True, True, False]])
        assert losses.whiten(torch.full((1, 3), 2.0), mask).tolist() == [[0.0, 0.0, 0.0]]
        assert losses.whiten(torch.full((1, 3), 2.0), mask, shift_mean=False).tolist() == [[2.0, 2.0, 0.0]]


def batch(lengths: list[int], seed: int) -> dict[str, Tensor]:
    """ppo_loss's tensors, far enough from the old policy that both sides of both clips are reached."""
    new, value, old, old_value, advantages, returns = draw(lengths, seed, 6)
    return {"logprobs": old + 0.3 * new, "values": old_value + 0.4 * value, "old_logprobs": old, "old_values": old_value,
            "advantages": advantages, "returns": returns}  # fmt: skip


OPTIONS: dict[str, float] = {"cliprange": 0.2, "cliprange_value": 0.3, "vf_coef": 0.1}


def plain(tensors: dict[str, Tensor], lengths: list[int]) -> dict[str, float]:
    """The losses and what the logs show, one token after another in Python floats."""
    sums = dict.fromkeys(("policy", "value", "approxkl", "clipfrac", "value_clipfrac", "ratio"), 0.0)
    for b, length in enumerate(lengths):
        for t in range(length):
            lp, v, old, old_v, a, target = (tensor[b, t].item() for tensor in tensors.values())
            ratio = math.exp(lp - old)
            free, clipped = -a * ratio, -a * min(max(ratio, 0.8), 1.2)
            near = min(max(v, old_v - 0.3), old_v + 0.3)
            sums["policy"] += max(free, clipped)
            sums["value"] += 0.5 * max((v - target) ** 2, (near - target) ** 2)
            sums["approxkl"] += 0.5 * (lp - old) ** 2
            sums["clipfrac"] += clipped > free
            sums["value_clipfrac"] += (near - target) ** 2 > (v - target) ** 2
            sums["ratio"] += ratio
    means = {name: value / sum(lengths) for name, value in sums.items()}
    return {"loss": means["policy"] + 0.1 * means["value"], **means}


def ppo_loss(
    logprobs: Tensor, values: Tensor, old_logprobs: Tensor, old_values: Tensor, advantages: Tensor, returns: Tensor,
    mask: Tensor, *, weights: Tensor | None = None, **options: Any,
) -> losses.PPOLoss:  # fmt: skip
    """losses.ppo_loss of the tokens in the mask, from tables (B, T)."""
    tables = (logprobs, values, old_logprobs, old_values, advantages, returns)
    return losses.ppo_loss(
        *(table[mask] for table in tables), weights=None if weights is None else weights[mask], **options
    )


class TestPPOLoss:
    @pytest.mark.parametrize(
        ("ratio", "advantage", "loss", "gradient"),
        [
            (1.5, 1.0, -1.2, 0.0),
            (0.5, 1.0, -0.5, -0.5),
            (1.5, -1.0, 1.5, 1.5),
            (0.5, -1.0, 0.8, 0.0),
            (1.1, 2.0, -2.2, -2.2),
        ],
    )
    def test_the_policys_clip_by_hand(self, ratio: float, advantage: float, loss: float, gradient: float) -> None:
        """ε = 0.2. A gain beyond the clip pays nothing and has no gradient; a loss beyond it counts in full."""
        logprobs = torch.tensor([[math.log(ratio)]], requires_grad=True)
        zero, mask = torch.zeros(1, 1), torch.ones(1, 1).bool()
        found = ppo_loss(logprobs, zero, zero, zero, zero + advantage, zero, mask, tokens=1, **OPTIONS)
        found.loss.backward()
        assert found.loss.item() == found.policy.item() == pytest.approx(loss, abs=1e-6)
        assert logprobs.grad is not None
        assert logprobs.grad.item() == pytest.approx(gradient, abs=1e-6)
        assert found.clipfrac.item() == float(gradient == 0.0)

    @pytest.mark.parametrize(
        ("value", "target", "loss", "gradient"),
        [
            (1.0, 2.0, 0.5 * 1.7**2, 0.0),
            (1.0, -1.0, 0.5 * 2.0**2, 2.0),
            (-1.0, -2.0, 0.5 * 1.7**2, 0.0),
            (0.1, 1.0, 0.405, -0.9),
        ],
    )
    def test_the_values_clip_by_hand(self, value: float, target: float, loss: float, gradient: float) -> None:
        """V_old = 0, ε_v = 0.3: V = 1 towards R = 2 counts as 0.3, ½·1.7²; away from it, towards −1, as it is, ½·2²."""
        values = torch.tensor([[value]], requires_grad=True)
        zero, mask = torch.zeros(1, 1), torch.ones(1, 1).bool()
        found = ppo_loss(zero, values, zero, zero, zero, zero + target, mask, tokens=1, **OPTIONS)
        found.loss.backward()
        assert found.value.item() == pytest.approx(loss, abs=1e-6)
        assert found.loss.item() == pytest.approx(0.1 * loss, abs=1e-6)
        assert values.grad is not None
        assert values.grad.item() == pytest.approx(0.1 * gradient, abs=1e-6)
        assert found.value_clipfrac.item() == float(gradient == 0.0)

    @PROPERTY
    @given(LENGTHS, st.integers(0, 999))
    def test_equals_the_plain_loop(self, lengths: list[int], seed: int) -> None:
        mask, tensors = mask_of(lengths), batch(lengths, seed)
        found = ppo_loss(*tensors.values(), mask, tokens=sum(lengths), **OPTIONS)  # type: ignore[arg-type]
        for name, expected in plain(tensors, lengths).items():
            assert getattr(found, name).item() == pytest.approx(expected, rel=1e-4, abs=1e-5), name

    def test_without_a_critic_there_is_no_value_loss(self) -> None:
        """The policy's terms are the same to the bit, and the loss is theirs, whatever old values and returns are."""
        mask, tensors = mask_of([3, 5]), batch([3, 5], 1)
        whole = ppo_loss(*tensors.values(), mask, tokens=8, **OPTIONS)  # type: ignore[arg-type]
        values = {name: table[mask] for name, table in tensors.items()} | {"values": None}
        found = losses.ppo_loss(**values, tokens=8, **OPTIONS)  # type: ignore[arg-type]
        assert torch.equal(found.policy, whole.policy) and torch.equal(found.loss, whole.policy)
        assert (found.value.item(), found.value_clipfrac.item()) == (0.0, 0.0) and whole.value.item() > 0

    def test_both_sides_of_both_clips_are_reached(self) -> None:
        """Or the comparison above would prove little."""
        shares = plain(batch([40, 40], 0), [40, 40])
        assert 0.1 < shares["clipfrac"] < 0.9
        assert 0.05 < shares["value_clipfrac"] < 0.9

    @PROPERTY
    @given(
        st.permutations(range(5)),
        st.lists(st.integers(1, 6), min_size=5, max_size=5),
        st.integers(1, 5),
        st.integers(0, 999),
    )
    def test_micro_batches_add_up_to_the_minibatch(
        self, order: list[int], lengths: list[int], size: int, seed: int
    ) -> None:
        """Of other lengths and sizes too: every micro-batch divides by the minibatch's tokens, and so do the gradients."""
        mask, tensors = mask_of(lengths), batch(lengths, seed)

        def run(rows: list[int]) -> tuple[losses.PPOLoss, Tensor, Tensor]:
            part: dict[str, Any] = {name: tensor[rows].clone().requires_grad_() for name, tensor in tensors.items()}
            found = ppo_loss(**part, mask=mask[rows], tokens=sum(lengths), **OPTIONS)  # type: ignore[arg-type]
            found.loss.backward()
            return found, part["logprobs"].grad, part["values"].grad

        whole = run(order)
        parts = [run(order[start : start + size]) for start in range(0, 5, size)]
        for name in losses.PPOLoss._fields:
            total = sum(getattr(part[0], name) for part in parts)
            torch.testing.assert_close(total, getattr(whole[0], name), rtol=1e-5, atol=1e-6)
        for index in (1, 2):
            torch.testing.assert_close(torch.cat([part[index] for part in parts]), whole[index])

    @PROPERTY
    @given(LENGTHS, st.integers(0, 999))
    def test_the_gradient_is_that_of_the_plain_formula(self, lengths: list[int], seed: int) -> None:
        """By the rules of max and clip, one token after another: what a clip holds back has none."""
        mask, tensors = mask_of(lengths), batch(lengths, seed)
        inputs: dict[str, Any] = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
        ppo_loss(**inputs, mask=mask, tokens=sum(lengths), **OPTIONS).loss.backward()  # type: ignore[arg-type]
        for b, length in enumerate(lengths):
            for t in range(length):
                lp, v, old, old_v, a, target = (tensor[b, t].item() for tensor in tensors.values())
                ratio = math.exp(lp - old)
                held = (ratio > 1.2 and a > 0) or (ratio < 0.8 and a < 0)
                assert inputs["logprobs"].grad[b, t].item() * sum(lengths) == pytest.approx(
                    0.0 if held else -a * ratio, rel=1e-4, abs=1e-4
                )
                near = min(max(v, old_v - 0.3), old_v + 0.3)
                stuck = (near - target) ** 2 > (v - target) ** 2
                assert inputs["values"].grad[b, t].item() * sum(lengths) == pytest.approx(
                    0.0 if stuck else 0.1 * (v - target), rel=1e-4, abs=1e-4
                )


MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


def as_trl(new: Tensor, sampled: Tensor, mask: Tensor, mode: str, least: float | None, most: float | None) -> Tensor:
    """The weights as TRL 1.16's GRPO computes them, (B, T) or (B, 1)."""
    difference = torch.nan_to_num((new - sampled) * mask, nan=0.0)
    if mode.startswith("sequence"):
        difference = difference.sum(dim=-1, keepdim=True)
    ratio = torch.exp(difference)
    if mode.endswith("truncate"):
        return torch.clamp(ratio, min=least, max=most)
    low, high = -math.inf if least is None else least, math.inf if most is None else most
    return ratio.masked_fill((ratio < low) | (ratio > high), value=0.0)


def weights_of(logprobs: Tensor, sampled: Tensor, mask: Tensor, mode: str, most: float | None = None) -> Tensor:
    """importance_weights of importance_ratios, without a lower bound."""
    return losses.importance_weights(losses.importance_ratios(logprobs, sampled, mask, mode), mode, None, most)


class TestImportanceSampling:
    @pytest.mark.parametrize(
        ("mode", "expected"),
        [
            ("token_truncate", [2.0, 1.5, 0.5, 1.0]),
            ("token_mask", [2.0, 1.5, 0.0, 1.0]),
            ("sequence_truncate", [1.5, 1.5, 1.5, 1.0]),
            ("sequence_mask", [1.5, 1.5, 1.5, 1.0]),
        ],
    )
    def test_by_hand(self, mode: str, expected: list[float]) -> None:
        """Ratios 2, 1.5 and 0.5, whose product is 1.5, and padding; bounds 0.6 (masks only) and 2.5."""
        mask = torch.tensor([[True, True, True, False]])
        new, sampled = torch.tensor([[2.0, 1.5, 0.5, 9.0]]).log(), torch.zeros(1, 4)
        ratios = losses.importance_ratios(new, sampled, mask, mode)
        found = losses.importance_weights(ratios, mode, 0.6 if mode.endswith("mask") else None, 2.5)
        torch.testing.assert_close(found, torch.tensor([expected]))

    def test_the_cap_by_hand(self) -> None:
        """Ratios 8 and 1/4, whose product is 2: above a bound of 1.75, below one of 4."""
        mask, zero = torch.tensor([[True, True]]), torch.zeros(1, 2)
        new = torch.tensor([[8.0, 0.25]]).log()
        for mode, expected in zip(MODES, ([1.75, 0.25], [0.0, 0.25], [1.75, 1.75], [0.0, 0.0]), strict=True):
            torch.testing.assert_close(weights_of(new, zero, mask, mode, 1.75), torch.tensor([expected]))
        torch.testing.assert_close(weights_of(new, zero, mask, "sequence_mask", 4.0), torch.tensor([[2.0, 2.0]]))

    @PROPERTY
    @given(
        LENGTHS,
        st.integers(0, 999),
        st.sampled_from(MODES),
        st.sampled_from([None, 0.5, 0.9]),
        st.sampled_from([None, 1.1, 3.0]),
    )
    def test_equals_trls(
        self, lengths: list[int], seed: int, mode: str, least: float | None, most: float | None
    ) -> None:
        """Inside the mask, with one NaN among the sampler's log-probs; with an upper or a lower bound, both, or none."""
        mask, (new, sampled) = mask_of(lengths), draw(lengths, seed, 2)
        sampled[0, 0] = float("nan")
        if mode.endswith("truncate") and most is least is None:
            return  # TRL refuses this
        found = losses.importance_weights(losses.importance_ratios(new, sampled, mask, mode), mode, least, most)
        expected = as_trl(new, sampled, mask, mode, least, most).expand_as(mask)
        torch.testing.assert_close(found[mask], expected[mask])

    @PROPERTY
    @given(LENGTHS, st.integers(0, 999), st.sampled_from(MODES), st.sampled_from(POISON))
    def test_a_sampler_equal_to_the_policy_changes_nothing(
        self, lengths: list[int], seed: int, mode: str, poison: float
    ) -> None:
        """The weights are 1, and losses and gradients the same to the bit as without correction, whatever pads."""
        mask, tensors = mask_of(lengths), batch(lengths, seed)
        old = tensors["old_logprobs"]
        weights = weights_of(old, poisoned(old, mask, poison), mask, mode, 3.0)
        assert weights.tolist() == torch.ones_like(weights).tolist()
        found = []
        for given_weights in (None, weights):
            inputs: dict[str, Any] = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
            loss = ppo_loss(**inputs, mask=mask, tokens=sum(lengths), weights=given_weights, **OPTIONS)  # type: ignore[arg-type]
            loss.loss.backward()
            found.append([*loss, inputs["logprobs"].grad, inputs["values"].grad])
        assert all(torch.equal(*pair) for pair in zip(*found, strict=True))

    @PROPERTY
    @given(LENGTHS, st.integers(0, 999))
    def test_only_the_policys_term_is_weighted(self, lengths: list[int], seed: int) -> None:
        """Token by token in Python floats; value loss and the figures in the logs stay, and weights get no gradient."""
        mask, tensors = mask_of(lengths), batch(lengths, seed)
        weights = (draw(lengths, seed + 1, 1)[0].abs() + 0.1).requires_grad_()
        found = ppo_loss(**tensors, mask=mask, tokens=sum(lengths), weights=weights, **OPTIONS)  # type: ignore[arg-type]
        expected, policy = plain(tensors, lengths), 0.0
        for b, length in enumerate(lengths):
            for t in range(length):
                lp, _, old, _, a, _ = (tensor[b, t].item() for tensor in tensors.values())
                ratio = math.exp(lp - old)
                policy += weights[b, t].item() * max(-a * ratio, -a * min(max(ratio, 0.8), 1.2))
        expected |= {"policy": policy / sum(lengths), "loss": policy / sum(lengths) + 0.1 * expected["value"]}
        for name, value in expected.items():
            assert getattr(found, name).item() == pytest.approx(value, rel=1e-4, abs=1e-5), name
        assert not found.loss.requires_grad

    @pytest.mark.parametrize(
        ("mode", "length"), [("token_truncate", 1), ("sequence_truncate", 1), ("sequence_truncate", 2)]
    )
    def test_the_samplers_bias_is_gone(self, mode: str, length: int) -> None:
        """Every response over 3 tokens, of 1 or 2 tokens, with its probability under a sampler q unlike the policy π.

        The expected gradient with weights π/q is the gradient with samples of π. Without weights it is another.
        """
        generator = torch.Generator().manual_seed(3)
        first, second = torch.randn(3, generator=generator), torch.randn(3, 3, generator=generator)
        shift = [torch.randn(3, generator=generator), torch.randn(3, 3, generator=generator)]
        responses = torch.cartesian_prod(*[torch.arange(3)] * length).reshape(-1, length)
        rewards = torch.randn(len(responses), generator=generator)
        mask, zero = torch.ones(responses.shape).bool(), torch.zeros(responses.shape)

        def logprobs(start: Tensor, after: Tensor) -> Tensor:
            steps = [start.log_softmax(-1)[responses[:, 0]]]
            if length == 2:
                steps.append(after.log_softmax(-1)[responses[:, 0], responses[:, 1]])
            return torch.stack(steps, dim=1)

        sampler = logprobs(first + shift[0], second + shift[1])

        def expected_gradient(drawn: Tensor, weights: Tensor | None) -> Tensor:
            """Σ_y drawn(y) ∇ loss(y): the advantage of each token is reward(y) times the probability of drawing y."""
            start, after = first.clone().requires_grad_(), second.clone().requires_grad_()
            new = logprobs(start, after)
            advantages = (rewards * drawn.sum(-1).exp())[:, None].expand_as(mask)
            found = ppo_loss(
                new, zero, new.detach(), zero, advantages, zero, mask, tokens=1, weights=weights, **OPTIONS
            )  # type: ignore[arg-type]
            gradients = torch.autograd.grad(found.loss, [start, after], allow_unused=True)
            return torch.cat([part.flatten() for part in gradients if part is not None])

        policy = logprobs(first, second)
        right = expected_gradient(policy, None)
        corrected = expected_gradient(sampler, weights_of(policy, sampler, mask, mode))
        uncorrected = expected_gradient(sampler, None)
        torch.testing.assert_close(corrected, right, rtol=1e-4, atol=1e-6)
        assert (uncorrected - right).norm() > 0.3 * right.norm()
        truncated = expected_gradient(sampler, weights_of(policy, sampler, mask, mode, 1.5))
        assert (truncated - right).norm() < (uncorrected - right).norm()

    def test_samples_of_another_distribution_give_the_policys_gradient(self) -> None:
        """200,000 tokens drawn from q over 4 tokens: the weighted gradient is the policy's to 2%."""
        generator = torch.Generator().manual_seed(0)
        logits, rewards = torch.tensor([0.5, 0.0, -0.5, 1.0]), torch.tensor([1.0, -1.0, 0.5, 2.0])
        policy, sampler = logits.log_softmax(-1), (logits + torch.tensor([1.0, -0.5, 0.5, -1.0])).log_softmax(-1)
        drawn = torch.multinomial(sampler.exp(), 200_000, replacement=True, generator=generator)[None]
        mask, zero = torch.ones(drawn.shape).bool(), torch.zeros(drawn.shape)
        probabilities = policy.exp()
        right = -probabilities * (rewards - (probabilities * rewards).sum())
        errors = []
        for weights in (weights_of(policy[drawn], sampler[drawn], mask, "token_truncate"), None):
            trained = logits.clone().requires_grad_()
            new = trained.log_softmax(-1)[drawn]
            loss = ppo_loss(new, zero, new.detach(), zero, rewards[drawn], zero, mask, tokens=drawn.numel(),
                                   weights=weights, **OPTIONS)  # type: ignore[arg-type]  # fmt: skip
            (gradient,) = torch.autograd.grad(loss.loss, trained)
            errors.append(((gradient - right).norm() / right.norm()).item())
        assert errors[0] < 0.02
        assert errors[1] > 0.3


def test_explained_variance_by_hand() -> None:
    """Returns 0, 2, 4 (variance 8/3), errors 0, 0, 3 (mean 1, variance 2): 1 − 2 · 3/8 = 0.25."""
    mask = torch.tensor([[True, True, True, False]])
    returns = torch.tensor([[0.0, 2, 4, float("nan")]])
    assert losses.explained_variance(torch.tensor([[0.0, 2, 1, 5]]), returns, mask) == pytest.approx(0.25)
    assert losses.explained_variance(returns + 7, returns, mask) == pytest.approx(1)
    assert losses.explained_variance(torch.full((1, 4), 9.0), returns, mask) == pytest.approx(0)
    assert losses.explained_variance(returns, torch.ones(1, 4), mask) == 0.0
    for count in range(2, 12):  # the mean of some of them is rounded
        constant, whole = torch.full((1, count), 0.1), torch.ones(1, count, dtype=torch.bool)
        assert losses.explained_variance(torch.arange(float(count))[None], constant, whole) == 0.0


@PROPERTY
@given(LENGTHS, st.integers(0, 999), st.sampled_from(POISON))
def test_explained_variance_equals_the_plain_loop(lengths: list[int], seed: int, poison: float) -> None:
    """1 − Var(R − V) / Var(R) of the tokens that count, whatever stands outside."""
    mask, (values, returns) = mask_of(lengths), draw(lengths, seed, 2)
    found = losses.explained_variance(poisoned(values, mask, poison), poisoned(returns, mask, poison), mask)
    pairs = [(values[b, t].item(), returns[b, t].item()) for b, length in enumerate(lengths) for t in range(length)]
    spread = statistics.pvariance([target for _, target in pairs])
    expected = 1 - statistics.pvariance([target - value for value, target in pairs]) / spread if spread else 0.0
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-3)
