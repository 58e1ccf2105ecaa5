"""GAE, KL estimators, PPO's losses, the KL controller: numbers that a person can check, and slow loops beside the fast ones."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from salsa_peft import losses

PROPERTY = settings(max_examples=40, deadline=None, derandomize=True, database=None)
LENGTHS = st.lists(st.integers(1, 6), min_size=1, max_size=4)
POISON = (float("nan"), float("inf"), -float("inf"), 1e30)


def mask_of(lengths: list[int]) -> Tensor:
    """(B, T) True at the first `lengths[b]` tokens, one column wider than the longest."""
    return torch.arange(max(lengths) + 1) < torch.tensor(lengths)[:, None]


def random(lengths: list[int], seed: int, count: int) -> list[Tensor]:
    """`count` tensors (B, T), standard normal."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(mask_of(lengths).shape, generator=generator) for _ in range(count)]


def poisoned(values: Tensor, mask: Tensor, poison: float) -> Tensor:
    """What stands outside the mask replaced."""
    return values.masked_fill(~mask, poison)


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
        mask, (rewards, values) = mask_of(lengths), random(lengths, seed, 2)
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
        mask, (values,) = mask_of(lengths), random(lengths, seed, 1)
        values = poisoned(3 * values + shift, mask, poison)
        shifted, kept = losses.whiten(values, mask), losses.whiten(values, mask, shift_mean=False)
        assert shifted[mask].mean().item() == pytest.approx(0, abs=1e-5)
        assert kept[mask].mean().item() == pytest.approx(values[mask].mean().item(), abs=1e-4)
        for whitened in (shifted, kept):
            assert whitened[mask].var().item() == pytest.approx(1, abs=1e-3)
            assert not whitened[~mask].any()


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

    @pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "abs"])
    def test_several_references_are_averaged(self, estimator: str) -> None:
        policy, a, b = random([3, 5], 0, 3)
        k = losses.KL_ESTIMATORS[estimator]
        torch.testing.assert_close(
            losses.reference_kl(policy, torch.stack([a, b]), estimator), (k(policy, a) + k(policy, b)) / 2
        )
        torch.testing.assert_close(losses.reference_kl(policy, a[None], estimator), k(policy, a))

    def test_rewards_by_hand(self) -> None:
        """−0.5·kl at every token that counts, plus the score at the last of them: −0.5·4 + 10 = 8; −0.5·1 − 3 = −3.5."""
        mask = torch.tensor([[True, True, False], [True, False, False], [True, True, True]])
        kl = torch.tensor([[2.0, 4, float("nan")], [1, float("inf"), 9], [0, 0, 6]])
        found = losses.token_rewards(kl, torch.tensor([10.0, -3, 1]), mask, 0.5)
        assert found.tolist() == [[-1.0, 8.0, 0.0], [-3.5, 0.0, 0.0], [0.0, 0.0, -2.0]]

    @PROPERTY
    @given(LENGTHS, st.integers(0, 999), st.floats(0, 2))
    def test_a_row_sums_to_score_less_kl(self, lengths: list[int], seed: int, kl_coef: float) -> None:
        mask, (kl, scores) = mask_of(lengths), random(lengths, seed, 2)
        found = losses.token_rewards(kl, scores[:, 0], mask, kl_coef)
        assert not found[~mask].any()
        torch.testing.assert_close(found.sum(-1), scores[:, 0] - kl_coef * (kl * mask).sum(-1), rtol=1e-4, atol=1e-5)
        changed = (found != torch.where(mask, -kl_coef * kl, 0.0)).nonzero().tolist()
        assert changed == [[b, length - 1] for b, length in enumerate(lengths)]


def batch(lengths: list[int], seed: int) -> dict[str, Tensor]:
    """ppo_loss's tensors, far enough from the old policy that both sides of both clips are reached."""
    new, value, old, old_value, advantages, returns = random(lengths, seed, 6)
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

    def test_micro_batches_add_up_to_the_minibatch(self) -> None:
        """Of other lengths too: every micro-batch divides by the minibatch's tokens, and so do the gradients."""
        lengths = [1, 6, 3, 2]
        mask, tensors = mask_of(lengths), batch(lengths, 2)

        def run(rows: list[int]) -> tuple[losses.PPOLoss, Tensor, Tensor]:
            part: dict[str, Any] = {name: tensor[rows].clone().requires_grad_() for name, tensor in tensors.items()}
            found = losses.ppo_loss(**part, mask=mask[rows], tokens=12, **OPTIONS)  # type: ignore[arg-type]
            found.loss.backward()
            return found, part["logprobs"].grad, part["values"].grad

        whole, first, rest = run([0, 1, 2, 3]), run([0, 1]), run([2, 3])
        for name in losses.PPOLoss._fields:
            torch.testing.assert_close(getattr(first[0], name) + getattr(rest[0], name), getattr(whole[0], name))
        for index in (1, 2):
            torch.testing.assert_close(torch.cat([first[index], rest[index]]), whole[index])


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


def test_explained_variance_by_hand() -> None:
    """Returns 0, 2, 4 (variance 8/3), errors 0, 0, 3 (mean 1, variance 2): 1 − 2 · 3/8 = 0.25."""
    mask = torch.tensor([[True, True, True, False]])
    returns = torch.tensor([[0.0, 2, 4, float("nan")]])
    assert losses.explained_variance(torch.tensor([[0.0, 2, 1, 5]]), returns, mask) == pytest.approx(0.25)
    assert losses.explained_variance(returns + 7, returns, mask) == pytest.approx(1)
    assert losses.explained_variance(torch.full((1, 4), 9.0), returns, mask) == pytest.approx(0)
    assert losses.explained_variance(returns, torch.ones(1, 4), mask) == 0.0
