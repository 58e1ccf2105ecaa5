"""The trainer's options one by one: each does what it says, in the rollout batch, in an update, in the optimizer's steps."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_ppo import PROMPTS, Keeping, loss_of, plain_logprobs, roll_out
from transformers import TrainerCallback

from salsa_peft.training.ppo.rollout import Rollout
from salsa_peft.training.ppo.state import minibatches
from salsa_peft.training.ppo.trainer import SalsaPPOTrainer
from salsa_peft.utils.errors import SalsaError


def rows_of(trainer: SalsaPPOTrainer) -> list[dict[str, float]]:
    """What metrics.jsonl says of each update."""
    return [
        json.loads(line) for line in (Path(str(trainer.args.output_dir)) / "metrics.jsonl").read_text().splitlines()
    ]


def with_values(trainer: SalsaPPOTrainer) -> SalsaPPOTrainer:
    """A value head, if there is one, that is not zero."""
    if trainer.model.value_head is None:
        return trainer
    trainer.model.value_head.weight.data.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    return trainer


def whitened(table: list[list[float]], shift: bool) -> list[list[float]]:
    """Over all tokens of all rows, in Python floats."""
    flat = [x for row in table for x in row]
    mean, scale = statistics.fmean(flat), (statistics.variance(flat) + 1e-8) ** -0.5
    return [[(x - mean) * scale + (0.0 if shift else mean) for x in row] for row in table]


def plain_advantages(
    trainer: SalsaPPOTrainer, rollout: Rollout, beta: float, scores: list[float]
) -> tuple[list[list[float]], list[list[float]]]:
    """Advantages and returns from the rollout's own KL and values, a token at a time."""
    args, rewards, advantages, returns = trainer.args, [], [], []
    lengths = rollout.responses.lengths.tolist()
    for row, length in enumerate(lengths):
        share = length if args.kl_per == "token" else 1
        rewards.append([-beta * kl / share for kl in rollout.kl[row, :length].tolist()])
        rewards[-1][-1] += scores[row]
    for row, given in enumerate(whitened(rewards, False) if args.whiten_rewards else rewards):
        if not args.has_critic:
            returns.append(
                [sum(args.gamma ** (k - t) * given[k] for k in range(t, lengths[row])) for t in range(lengths[row])]
            )
            continue
        length, values = lengths[row], [*rollout.values[row, : lengths[row]].tolist(), 0.0]
        delta = [given[t] + args.gamma * values[t + 1] - values[t] for t in range(length)]
        lam = args.lam if args.lam_length_alpha is None else max(0.0, 1 - 1 / (args.lam_length_alpha * length))
        sums = [
            [sum((args.gamma * decay) ** (k - t) * delta[k] for k in range(t, length)) for t in range(length)]
            for decay in (lam, lam if args.lam_value is None else args.lam_value)
        ]
        advantages.append(sums[0])
        returns.append([a + v for a, v in zip(sums[1], values, strict=False)])
    if not args.has_critic:
        advantages = without_critic(returns, args.num_generations if args.value == "group" else None)
    return whitened(advantages, True), returns


def without_critic(returns: list[list[float]], group: int | None) -> list[list[float]]:
    """The returns minus their mean over all tokens, or minus the mean of the prompt's other responses at that place."""
    if group is None:
        mean = statistics.fmean(x for row in returns for x in row)
        return [[x - mean for x in row] for row in returns]
    found = []
    for b, row in enumerate(returns):
        others = [returns[o] for o in range(b - b % group, b - b % group + group) if o != b]
        found.append([x - statistics.fmean(o[min(t, len(o) - 1)] for o in others) for t, x in enumerate(row)])
    return found


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gamma": 0.7, "lam": 0.4},
        {"lam": 0.4, "lam_value": 1.0},
        {"lam_length_alpha": 0.3, "lam_value": 0.8},
        {"lam_length_alpha": 0.3},
        {"value": "none"},
        {"value": "none", "gamma": 0.8, "whiten_rewards": True},
        {"value": "group"},
        {"value": "group", "num_generations": 2, "gamma": 0.8, "kl_per": "token", "normalize_scores": True},
        {"whiten_rewards": True},
        {"kl_per": "token"},
        {"score_clip": 1.0},
        {"missing_eos_penalty": 3.0},
        {"normalize_scores": True},
        {"kl_estimator": "k3", "kl_per": "token", "gamma": 0.9, "whiten_rewards": True, "missing_eos_penalty": 1.0},
    ],
    ids=lambda options: ",".join(options) or "defaults",
)
def test_advantages_and_returns_are_the_plain_formulas(make_trainer: Any, options: dict[str, Any]) -> None:
    """From KL, values and scores of the rollout, with the β that is given rather than the one at the start; the scores that are kept are
    the reward's own."""
    trainer = with_values(make_trainer(**options))
    trainer.ppo.kl_coef = 0.37
    rollout = roll_out(trainer)
    r, args = rollout.responses, trainer.args
    raw = [length / 4 for length in r.lengths.tolist()]
    assert rollout.scores.tolist() == raw and len(set(raw)) > 2
    scores = [score / statistics.stdev(raw) for score in raw] if args.normalize_scores else raw
    scores = [min(max(score, -args.score_clip), args.score_clip) for score in scores] if args.score_clip else scores
    penalty = args.missing_eos_penalty or 0.0
    scores = [score - penalty * (not done) for score, done in zip(scores, r.finished.tolist(), strict=True)]
    advantages, returns = plain_advantages(trainer, rollout, 0.37, scores)
    for row, length in enumerate(r.lengths.tolist()):
        assert rollout.advantages[row, :length].tolist() == pytest.approx(advantages[row], rel=1e-3, abs=1e-3)
        assert rollout.returns[row, :length].tolist() == pytest.approx(returns[row], rel=1e-3, abs=1e-3)
    for tensor in (rollout.advantages, rollout.returns, rollout.kl, rollout.values, rollout.logprobs, rollout.entropy):
        assert not tensor[~r.response_mask].any()
    assert rollout.values[r.response_mask].abs().min() > 0


def test_the_value_head_starts_at_the_first_batchs_mean_return(make_trainer: Any) -> None:
    """Its weights at zero and its bias there, so that all first values are the mean of the tokens' returns; later batches
    leave it alone."""
    trainer = make_trainer(lam=1.0)
    rollout = roll_out(trainer)
    mask = rollout.responses.response_mask
    mean = rollout.returns[mask].mean()  # with λ = 1 they do not depend on the values
    torch.testing.assert_close(rollout.values, torch.where(mask, mean, 0.0))
    torch.testing.assert_close(trainer.model.value_head.bias.detach(), mean.view(1))
    assert not trainer.model.value_head.weight.any() and mean.abs() > 0.1
    trainer = with_values(make_trainer(lam=1.0))
    rollout = roll_out(trainer)
    mask = rollout.responses.response_mask
    torch.testing.assert_close(rollout.values[mask].mean(), rollout.returns[mask].mean())
    assert rollout.values[mask].std() > 0.1
    bias = trainer.model.value_head.bias.clone()
    roll_out(trainer, update=2)
    assert torch.equal(trainer.model.value_head.bias, bias)


def weights_after_each_step(trainer: SalsaPPOTrainer) -> list[dict[str, torch.Tensor]]:
    """Copies of what trains: at the start of training, and after each optimizer step."""

    def copies() -> dict[str, torch.Tensor]:
        return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}

    found = [copies()]

    class Keep(TrainerCallback):
        def on_optimizer_step(self, *_: Any, **__: Any) -> None:
            found.append(copies())

    trainer.add_callback(Keep())
    trainer.train()
    return found


@pytest.mark.parametrize("options", [{}, {"full": True}, {"value": "adapter"}], ids=str)
def test_the_critic_is_trained_before_the_policy_moves(make_trainer: Any, options: dict[str, Any]) -> None:
    """In the first update the policy is the same to the bit, whatever its weight decay, and so is β. The policy's first
    step is then as long as Adam's first: the learning rate, and not three times it."""
    trainer = make_trainer(
        value_warmup_updates=1, num_mini_batches=2, micro_batch_size=2, weight_decay=0.1, kl_control="adaptive", kl_target=1.0,
        kl_horizon=50.0, lr_scheduler_type="constant", learning_rate=1e-3, max_grad_norm=1e9, **options
    )  # fmt: skip
    policy = {id(parameter) for parameter in trainer.model.policy_parameters()}
    own = {name for name, parameter in trainer.model.named_parameters() if id(parameter) in policy}
    start, *steps = weights_after_each_step(trainer)
    assert len(steps) == 4 and 0 < len(own) < len(start)
    for step in steps[:2]:
        assert all(torch.equal(step[name], start[name]) for name in own)
    critic = set(start) - own
    assert all(not torch.equal(steps[0][name], start[name]) for name in critic if "value_head" in name)
    assert all(not torch.equal(steps[1][name], start[name]) for name in critic)
    moved = {name: (steps[2][name] - (1 - 1e-4) * start[name]).abs().max().item() for name in own}
    assert max(moved.values()) == pytest.approx(1e-3, rel=0.15), moved
    first, second = rows_of(trainer)
    assert first["val/ratio"] == pytest.approx(1, abs=1e-5) and first["policy/approxkl_avg"] == pytest.approx(
        0, abs=1e-9
    )
    assert (first["objective/kl_coef"], second["objective/kl_coef"]) == (0.1, 0.1) != (0.1, trainer.ppo.kl_coef)


def test_the_loss_while_the_critic_alone_trains(make_trainer: Any) -> None:
    """½ · vf_coef · the mean of (V − R)², without the values' clip, and no policy term."""
    trainer = with_values(make_trainer(value_warmup_updates=1, cliprange_value=0.01))
    rollout = roll_out(trainer)
    rollout = rollout._replace(values=rollout.values + 0.5 * torch.randn_like(rollout.values))
    mask = rollout.responses.response_mask
    trainer.ppo.update = 1
    loss = loss_of(trainer, rollout, torch.arange(8), int(mask.sum()))
    trainer.ppo.update = 2
    clipped = loss_of(trainer, rollout, torch.arange(8), int(mask.sum()))
    assert loss.loss.item() == pytest.approx(0.1 * loss.value.item(), rel=1e-5)
    assert loss.value_clipfrac == 0 < clipped.value_clipfrac and loss.value < clipped.value
    assert clipped.loss.item() == pytest.approx((clipped.policy + 0.1 * clipped.value).item(), rel=1e-5)


def test_a_run_must_be_longer_than_its_warmup(make_trainer: Any) -> None:
    with pytest.raises(
        SalsaError, match="value_warmup_updates: 2 must be less than 2, the number of updates of the run"
    ):
        make_trainer(value_warmup_updates=2)


class TestRandomNumbers:
    def test_of_a_row_by_its_place_the_update_and_the_seed(self, make_trainer: Any) -> None:
        """The same prompt 8 times is answered in several ways, in other ways in the next update, and by another seed."""
        trainer = make_trainer(prompts=PROMPTS[:1] * 8)
        other = make_trainer(prompts=PROMPTS[:1] * 8, seed=7)
        found = [
            roll_out(t, update=update).responses for t, update in ((trainer, 1), (trainer, 2), (trainer, 1), (other, 1))
        ]
        tokens = [
            [tuple(ids[mask].tolist()) for ids, mask in zip(r.response_ids, r.response_mask, strict=True)]
            for r in found
        ]
        assert len(set(tokens[0])) > 4
        assert tokens[0] == tokens[2] and tokens[0] != tokens[1] and tokens[0] != tokens[3]
        assert sum(a == b for a, b in zip(tokens[0], tokens[1], strict=True)) < 4

    @pytest.mark.parametrize("old_logprobs", ["recompute", "rollout"])
    @pytest.mark.parametrize("size", [1, 3])
    def test_the_size_of_a_call_changes_nothing(self, make_trainer: Any, size: int, old_logprobs: str) -> None:
        """Rows come in the prompts' order, each with its own tokens and figures, whatever was generated and scored together."""
        rollouts = []
        for batch in (None, size):
            trainer = with_values(make_trainer(rollout_batch_size=batch, old_logprobs=old_logprobs))
            calls: list[int] = []
            backend = trainer.rollout_maker.backend
            trainer.rollout_maker.backend = Counting(backend, calls)
            rollouts.append(roll_out(trainer))
            assert calls == ([8] if batch is None else [batch] * (8 // batch) + [8 % batch] * (8 % batch > 0))
        whole, cut = rollouts
        for row in range(8):
            assert (
                whole.responses.prompt_ids[row][whole.responses.prompt_mask[row]].tolist()
                == trainer.train_dataset[row].tokens
            )
        assert torch.equal(whole.responses.response_ids, cut.responses.response_ids)
        for name in ("logprobs", "values", "kl", "entropy", "scores", "advantages", "returns"):
            torch.testing.assert_close(getattr(whole, name), getattr(cut, name), rtol=1e-3, atol=1e-3)
        expected = plain_logprobs(trainer, "policy", cut)
        torch.testing.assert_close(cut.logprobs, expected.detach(), rtol=1e-4, atol=1e-4)

    def test_an_evaluation_is_cut_into_rollout_batches(self, make_trainer: Any) -> None:
        """320 prompts in one call of generate are 40 times the memory that training needs."""
        trainer = make_trainer(eval_dataset=PROMPTS + PROMPTS[:3])
        calls: list[int] = []
        trainer.rollout_maker.backend = Counting(trainer.rollout_maker.backend, calls)
        trainer.evaluate()
        assert calls == [8, 8, 3]

    def test_an_evaluation_is_always_the_same_and_disturbs_nothing(self, make_trainer: Any) -> None:
        """While the weights are: the same answers twice; the next rollout is what it would have been."""
        trainer = make_trainer(eval_dataset=PROMPTS[:5])
        expected = roll_out(trainer).responses
        first, again = (trainer.rollout_maker.evaluate(trainer.eval_dataset) for _ in range(2))
        assert torch.equal(first[0].response_ids, again[0].response_ids) and torch.equal(first[1], again[1])
        assert torch.equal(roll_out(trainer).responses.response_ids, expected.response_ids)
        with pytest.raises(SalsaError, match="eval_dataset: there are no prompts to evaluate on"):
            make_trainer().evaluate()


class Counting:
    """A backend that notes how many rows each call had."""

    def __init__(self, backend: Any, calls: list[int]) -> None:
        self.backend, self.calls, self.updates, self.rests = backend, calls, 0, 0

    def __call__(self, prompts: Any, seeds: Any, **options: Any) -> Any:
        self.calls.append(len(prompts))
        return self.backend(prompts, seeds, **options)

    def sync_weights(self) -> None:
        self.updates += 1
        self.backend.sync_weights()

    def rest(self) -> None:
        self.rests += 1
        self.backend.rest()


def test_the_backend_is_told_of_every_update(make_trainer: Any) -> None:
    """Before it samples and after, for each rollout batch and each evaluation; after an error too."""
    trainer = make_trainer(eval_dataset=PROMPTS[:2])
    backend = trainer.rollout_maker.backend = Counting(trainer.rollout_maker.backend, [])
    trainer.train()
    assert backend.updates == trainer.ppo.update == 2
    trainer.evaluate()
    assert backend.updates == backend.rests == 3
    backend.calls = None  # type: ignore[assignment]
    with pytest.raises(AttributeError):
        trainer.evaluate()
    assert backend.rests == 4


def pretend(trainer: SalsaPPOTrainer, name: str, shares: list[float]) -> None:
    """Let the losses' figure `name` be these, one after another."""
    loss, left = trainer.micro_batch_loss, iter(shares)
    trainer.micro_batch_loss = lambda *args: loss(*args)._replace(**{name: torch.tensor(next(left))})  # type: ignore[method-assign]


class TestSteps:
    def test_minibatches_are_shuffled_by_epoch_update_and_seed(self, make_trainer: Any) -> None:
        """And sorted by length inside, rows of one length in a fixed order; every row once in an epoch."""
        trainer = make_trainer(num_mini_batches=2, num_ppo_epochs=3)
        lengths = [5, 3, 3, 7, 1, 7, 3, 5]

        def of(update: int, seed: int = 42) -> list[list[int]]:
            trainer.args.seed = seed
            return minibatches(lengths, trainer.args, update)

        first = of(1)
        assert len(first) == 6 and all(len(rows) == 4 for rows in first)
        for epoch in range(3):
            assert sorted(first[2 * epoch] + first[2 * epoch + 1]) == list(range(8))
        assert all([lengths[row] for row in rows] == sorted(lengths[row] for row in rows) for rows in first)
        assert len({frozenset(rows) for rows in first}) > 2 and frozenset(first[0]) not in ({0, 1, 2, 3}, {4, 5, 6, 7})
        assert of(1) == first and of(2) != first and of(1, seed=43) != first

    @pytest.mark.parametrize(("limit", "dropped"), [(11.0, 1), (13.0, 0)])
    def test_the_limit_of_the_ratio_is_of_the_whole_minibatch(
        self, make_trainer: Any, limit: float, dropped: int
    ) -> None:
        """Four micro-batches whose shares of the mean are 1, 1, 1 and 9: dropped above a limit of 11, kept below one of 13."""
        trainer = make_trainer(micro_batch_size=2, max_ratio=limit, max_steps=1)
        pretend(trainer, "ratio", [1.0, 1.0, 1.0, 9.0])
        trainer.train()
        assert trainer.ppo.skipped == dropped == rows_of(trainer)[0]["policy/skipped_minibatches"]
        assert rows_of(trainer)[0]["val/ratio"] == pytest.approx(12)

    @pytest.mark.parametrize(("kl", "stops"), [(0.14, False), (0.16, True)])
    def test_target_kl_is_passed_at_one_and_a_half(self, make_trainer: Any, kl: float, stops: bool) -> None:
        """By the mean over the whole minibatch, of two micro-batches; none of them is wild."""
        trainer = make_trainer(micro_batch_size=4, target_kl=0.1, max_steps=1)
        pretend(trainer, "approxkl", [kl / 4, kl * 3 / 4])
        trainer.train()
        assert trainer.ppo.stopped_early is stops and trainer.ppo.skipped == 0

    def test_target_kl_ends_an_updates_learning(self, make_trainer: Any) -> None:
        """The step that passed it is left out and all later ones of the update, none of the next."""
        trainer = make_trainer(target_kl=1e-6, num_ppo_epochs=4, learning_rate=1e-2)
        weights: list[float] = []
        step = trainer.skip_minibatch

        def watched() -> bool:
            weights.append(sum(p.double().abs().sum().item() for p in trainer.model.parameters() if p.requires_grad))
            return step()

        trainer.skip_minibatch = watched
        trainer.train()
        weights.append(sum(p.double().abs().sum().item() for p in trainer.model.parameters() if p.requires_grad))
        moved = [a != b for a, b in itertools.pairwise(weights)]
        assert moved == [
            True,
            False,
            False,
            False,
            True,
            False,
            False,
            False,
        ]  # the last rate of all is 0, but nothing reaches it
        assert [row["policy/approxkl_avg"] > 0 for row in rows_of(trainer)] == [True, True]

    def test_the_tokens_of_a_micro_batch_weigh_what_they_weigh_in_the_minibatch(self, make_trainer: Any) -> None:
        """The losses that are logged do not depend on the micro-batch."""
        rows = []
        for micro in (8, 1):
            trainer = make_trainer(micro_batch_size=micro, max_steps=2, num_ppo_epochs=2, learning_rate=1e-2)
            trainer.train()
            rows.append(rows_of(trainer)[0])
        assert rows[0] == pytest.approx(rows[1], rel=1e-3, abs=1e-4)
        assert rows[0]["val/ratio"] == pytest.approx(1, abs=0.5) and rows[0]["policy/approxkl_avg"] > 1e-3


class TestBeta:
    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            ({"kl_control": "fixed"}, 0.1),
            ({"kl_control": "adaptive", "kl_target": 1e-3}, 0.1 * (1 + 0.2 * 8 / 100)),
            ({"kl_control": "adaptive", "kl_target": 1e3}, 0.1 * (1 - 0.2 * 8 / 100)),
            ({"kl_control": "adaptive", "kl_target": 1e-3, "kl_coef_max": 0.1005}, 0.1005),
            ({"kl_control": "adaptive", "kl_target": 1e3, "kl_coef_min": 0.0995}, 0.0995),
        ],
        ids=["fixed", "up", "down", "most", "least"],
    )
    def test_it_follows_the_kl_of_the_update(self, make_trainer: Any, options: dict[str, Any], expected: float) -> None:
        """By n / horizon = 8/100 of a fifth; the log of an update says the β that it was made with."""
        trainer = make_trainer(kl_horizon=100.0, max_steps=2, **options)
        trainer.train()
        first, second = rows_of(trainer)
        assert first["objective/kl_coef"] == 0.1 and second["objective/kl_coef"] == pytest.approx(expected, rel=1e-9)

    def test_its_target_is_of_whole_responses(self, make_trainer: Any) -> None:
        """The KL summed over a response, also where rewards go by its mean."""
        trainer = make_trainer(kl_per="token", max_steps=1)
        rollout = roll_out(trainer)
        trainer.train()
        assert rows_of(trainer)[0]["objective/kl"] != rollout.kl.mean().item()
        assert rollout.kl.sum(-1).mean() > 2 * rollout.kl.sum() / rollout.responses.response_mask.sum()


def test_the_log_of_an_update(make_trainer: Any) -> None:
    """Each figure worked out from the rollout batch and its losses."""
    trainer = with_values(make_trainer(max_steps=2, num_ppo_epochs=2, learning_rate=1e-2, logged_completions=3))
    kept: list[Rollout] = []
    maker = trainer.rollout_maker
    trainer.rollout_maker = Keeping(maker, kept)
    trainer.train()
    (row,), (rollout,) = rows_of(trainer), kept
    r = rollout.responses
    kl, score = rollout.kl.sum(-1), rollout.scores
    expected = {
        "update": 1, "episode": 8, "objective/scores": score.mean().item(), "objective/kl": kl.mean().item(), "objective/kl_coef": 0.1,
        "objective/non_score_reward": -0.1 * kl.mean().item(), "objective/rlhf_reward": (score - 0.1 * kl).mean().item(),
        "objective/entropy": rollout.entropy.sum(-1).mean().item(), "objective/response_length": statistics.fmean(r.lengths.tolist()),
        "objective/empty_share": statistics.fmean(map(float, r.empty.tolist())), "val/num_eos_tokens": int(r.finished.sum()),
        "objective/kl_per_token": (kl.sum() / r.lengths.sum()).item(),
    }  # fmt: skip
    texts = [tuple(ids[mask].tolist()) for ids, mask in zip(r.response_ids, r.response_mask, strict=True)]
    expected["objective/distinct_share"] = len(set(texts)) / 8
    expected["objective/commonest_share"] = max(map(texts.count, texts)) / 8
    assert "objective/between_prompt_share" not in row and "objective/held_out_score" not in row
    assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    errors = (rollout.returns - rollout.values)[r.response_mask]
    spread = rollout.returns[r.response_mask].var(unbiased=False)
    assert row["val/explained_variance"] == pytest.approx(
        (1 - errors.var(unbiased=False) / spread).item(), rel=1e-4, abs=1e-5
    )
    lines = (Path(str(trainer.args.output_dir)) / "completions.jsonl").read_text().splitlines()
    assert [json.loads(line)["kl"] for line in lines] == pytest.approx(kl[:3].tolist())
    assert [json.loads(line)["score"] for line in lines] == pytest.approx(score[:3].tolist())


class TestModels:
    def test_a_reference_is_in_eval_mode(self, make_trainer: Any, make_base: Any) -> None:
        """With dropout in its attention, whatever mode it came in; also while the policy trains."""
        trainer = make_trainer([make_base(1, attention_dropout=0.5)], full=True)
        trainer.model.train()
        rollout = roll_out(trainer)
        expected = plain_logprobs(trainer, trainer.model.policy.eval(), rollout) - plain_logprobs(
            trainer, make_base(1), rollout
        )
        torch.testing.assert_close(rollout.kl, expected.detach(), rtol=1e-4, atol=1e-4)

    def test_a_reference_that_comes_in_training_mode(self, make_trainer: Any, make_base: Any) -> None:
        """As a model is that was just trained; with dropout two forwards differ."""
        trainer = make_trainer([make_base(1, attention_dropout=0.5).train()], full=True)
        assert trainer.references[0].model.training is False

    @pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
    def test_attention_dropout_is_off(self, make_trainer: Any, full: bool) -> None:
        """design.md: dropout is off in PPO. In training mode the first ratio is 1."""
        trainer = make_trainer(base={"attention_dropout": 0.5}, full=full)
        rollout = roll_out(trainer)
        trainer.model.train()
        loss = loss_of(trainer, rollout, torch.arange(8), int(rollout.responses.lengths.sum()))
        assert loss.approxkl.item() == pytest.approx(0, abs=1e-6)

    def test_a_rollout_is_made_in_eval_mode(self, make_trainer: Any) -> None:
        """Though training mode was on before it; and on it is after it."""
        trainer = make_trainer(base={"attention_dropout": 0.5})
        trainer.model.train()
        rollout = roll_out(trainer)
        assert trainer.model.training and trainer.model.policy.training
        trainer.model.eval()
        torch.testing.assert_close(
            rollout.logprobs, plain_logprobs(trainer, "policy", rollout).detach(), rtol=1e-4, atol=1e-4
        )

    def test_reentrant_checkpointing_is_refused_with_adapters(self, make_trainer: Any) -> None:
        """Its recomputation would run under another adapter; full weights have none."""
        options = {
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": True},
            "max_steps": 1,
        }
        with pytest.raises(SalsaError, match="activation_checkpointing_kwargs: use_reentrant must be false"):
            make_trainer(**options).train()
        trainer = make_trainer(full=True, **options)
        trainer.train()
        assert trainer.ppo.update == 1


def test_the_logs_of_an_earlier_run_in_the_folder_go(make_trainer: Any) -> None:
    """Two trainings in one folder: the second's logs are its own."""
    for _ in range(2):
        trainer = make_trainer(max_steps=1)
        trainer.train()
    assert [row["update"] for row in rows_of(trainer)] == [1]
    assert math.isfinite(rows_of(trainer)[0]["val/ratio_var"])


def test_the_entropy_floor_acts_below_it_alone_and_is_logged(make_trainer: Any) -> None:
    """The returns gain −c · log π of each token to come; above the floor nothing changes."""
    plain = roll_out(make_trainer(value="none"))
    mask = plain.responses.response_mask
    entropy = (plain.entropy[mask].sum() / mask.sum()).item()
    low = roll_out(make_trainer(value="none", entropy_floor=entropy * 0.9, entropy_coef=0.5))
    assert torch.equal(low.returns, plain.returns)
    trainer = make_trainer(value="none", entropy_floor=entropy * 1.1, entropy_coef=0.5, max_steps=1)
    high = roll_out(trainer)
    to_come = (-0.5 * plain.logprobs * mask).flip(-1).cumsum(-1).flip(-1)
    torch.testing.assert_close((high.returns - plain.returns)[mask], to_come[mask], rtol=1e-4, atol=1e-4)
    kept: list[Rollout] = []
    trainer.rollout_maker = Keeping(trainer.rollout_maker, kept)
    trainer.train()
    (row,), mask = rows_of(trainer), kept[0].responses.response_mask
    assert row["objective/entropy_per_token"] == pytest.approx((kept[0].entropy[mask].mean()).item(), rel=1e-4)
    assert row["objective/entropy_bonus"] == pytest.approx((-0.5 * kept[0].logprobs[mask].sum() / 8).item(), rel=1e-4)
