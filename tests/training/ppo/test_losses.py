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
        found = losses.ppo_loss(logprobs, zero, zero, zero, zero + advantage, zero, mask, tokens=1, **OPTIONS)
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
        found = losses.ppo_loss(zero, values, zero, zero, zero, zero + target, mask, tokens=1, **OPTIONS)
        found.loss.backward()
        assert found.value.item() == pytest.approx(loss, abs=1e-6)
        assert found.loss.item() == pytest.approx(0.1 * loss, abs=1e-6)
        assert values.grad is not None
        assert values.grad.item() == pytest.approx(0.1 * gradient, abs=1e-6)
        assert found.value_clipfrac.item() == float(gradient == 0.0)

    @PROPERTY
    @given(LENGTHS, st.integers(0, 999), st.sampled_from(POISON))
    def test_equals_the_plain_loop(self, lengths: list[int], seed: int, poison: float) -> None:
        mask, tensors = mask_of(lengths), batch(lengths, seed)
        hidden = [poisoned(tensor, mask, poison) for tensor in tensors.values()]
        found = losses.ppo_loss(*hidden, mask, tokens=sum(lengths), **OPTIONS)  # type: ignore[arg-type]
        for name, expected in plain(tensors, lengths).items():
            assert getattr(found, name).item() == pytest.approx(expected, rel=1e-4, abs=1e-5), name

    def test_both_sides_of_both_clips_are_reached(self) -> None:
        """Or the comparison above would prove little."""
        shares = plain(batch([40, 40], 0), [40, 40])
        assert 0.1 < shares["clipfrac"] < 0.9
        assert 0.05 < shares["value_clipfrac"] < 0.9

    @pytest.mark.parametrize("poison", POISON)
    def test_nothing_outside_the_mask_has_or_gives_a_gradient(self, poison: float) -> None:
        lengths = [2, 4]
        mask, tensors = mask_of(lengths), batch(lengths, 1)
        grads = []
        for hidden in (0.0, poison):
            inputs = {name: poisoned(tensor, mask, hidden).requires_grad_() for name, tensor in tensors.items()}
            losses.ppo_loss(**inputs, mask=mask, tokens=6, **OPTIONS).loss.backward()  # type: ignore[arg-type]
            grads.append([inputs[name].grad for name in ("logprobs", "values")])
        for clean, other in zip(*grads, strict=True):
            assert clean is not None
            assert other is not None
            assert not other[~mask].any()
            assert other[mask].ne(0).any()
            torch.testing.assert_close(other, clean)

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
            found = losses.ppo_loss(**part, mask=mask[rows], tokens=sum(lengths), **OPTIONS)  # type: ignore[arg-type]
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
        losses.ppo_loss(**inputs, mask=mask, tokens=sum(lengths), **OPTIONS).loss.backward()  # type: ignore[arg-type]
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


def test_explained_variance_by_hand() -> None:
    """Returns 0, 2, 4 (variance 8/3), errors 0, 0, 3 (mean 1, variance 2): 1 − 2 · 3/8 = 0.25."""
    mask = torch.tensor([[True, True, True, False]])
    returns = torch.tensor([[0.0, 2, 4, float("nan")]])
    assert losses.explained_variance(torch.tensor([[0.0, 2, 1, 5]]), returns, mask) == pytest.approx(0.25)
    assert losses.explained_variance(returns + 7, returns, mask) == pytest.approx(1)
    assert losses.explained_variance(torch.full((1, 4), 9.0), returns, mask) == pytest.approx(0)
    assert losses.explained_variance(returns, torch.ones(1, 4), mask) == 0.0


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
