"""Training and scoring compute hardly more tokens than there are, and lose nothing by it."""

from __future__ import annotations

from typing import Any

import flash_kernel
import pytest
import torch
from mixed_lengths import Lengths, computed, lognormal, made, ultrafeedback
from plain_ppo import loss_of, plain_logprobs, plain_loss

from salsa_peft.models.responses import Responses
from salsa_peft.training.ppo.backends import Backend


class Written(Backend):
    """A backend whose responses are given: those of the asked prompts."""

    def __init__(self, responses: Responses, prompts: list[list[int]]) -> None:
        self.responses, self.rows = responses, {tuple(prompt): row for row, prompt in enumerate(prompts)}

    def __call__(self, prompts: Any, seeds: Any, *, recording: Any = None, check: Any = None) -> Responses:
        rows = torch.tensor([self.rows[tuple(prompt)] for prompt in prompts])
        return Responses(*(field[rows] for field in self.responses))


@pytest.fixture
def written(make_trainer: Any) -> Any:
    """A trainer whose responses have these lengths: written(lengths, …)."""

    def make(lengths: Lengths, **options: Any) -> Any:
        responses = made(lengths)
        prompts = [ids[mask].tolist() for ids, mask in zip(responses.prompt_ids, responses.prompt_mask, strict=True)]
        longest = max(map(sum, lengths)) + 1
        settings = {
            "prompts": [{"input_ids": prompt} for prompt in prompts], "batch_size": len(prompts), "micro_batch_size": 8,
            "max_new_tokens": max(answer for _, answer in lengths), "max_steps": 1,
            "base": {"max_position_embeddings": 2 * longest, "num_hidden_layers": 1},
        }  # fmt: skip
        trainer = make_trainer(**(settings | options))
        trainer.rollout_maker.backend = Written(responses, prompts)
        return trainer

    return make


@pytest.mark.usefixtures("of_usual_size")
@pytest.mark.parametrize("source", ["lognormal", "ultrafeedback"])
@pytest.mark.parametrize("steps", [1, 4])
def test_hardly_a_token_of_padding(written: Any, source: str, steps: int, request: pytest.FixtureRequest) -> None:
    """At 8 rows a micro-batch, in the policy's and the reference's scoring and in training, at most 5%."""
    lengths = lognormal(64) if source == "lognormal" else ultrafeedback(request.getfixturevalue("shared"), 64)
    trainer = written(lengths, num_mini_batches=steps, max_steps=steps, rollout_batch_size=8)
    with computed(trainer.model.policy.get_base_model().model) as shapes:
        trainer.train()
    needed = 3 * sum(map(sum, lengths))
    assert needed <= sum(rows * longest for rows, longest in shapes) <= 1.05 * needed
    assert max(rows for rows, _ in shapes) <= 8


def test_a_step_trains_its_rows_from_the_shortest_to_the_longest(written: Any) -> None:
    """Of prompt and response together, so that few forward passes are needed; each row once."""
    lengths = lognormal(32)
    trainer, trained = written(lengths, num_mini_batches=2, max_steps=2), [[], []]
    loss = trainer.micro_batch_loss

    def watched(model: Any, batch: Any) -> Any:
        trained[trainer.state.global_step] += [batch.sequences.lengths[row] for row in batch.rows]
        return loss(model, batch)

    trainer.micro_batch_loss = watched
    trainer.train()
    assert trained == [sorted(step) for step in trained]
    assert sorted(trained[0] + trained[1]) == sorted(map(sum, lengths))


@pytest.mark.usefixtures("of_usual_size")
def test_tokens_limit_a_forward_pass(written: Any) -> None:
    """Of micro-batches and of scoring; a longer row stands alone."""
    lengths = lognormal(32)
    trainer = written(lengths, micro_batch_tokens=200, micro_batch_size=None)
    with computed(trainer.model.policy.get_base_model().model) as shapes:
        trainer.train()
    assert all(rows * longest <= 200 or rows == 1 for rows, longest in shapes)
    assert max(longest for _, longest in shapes) > 200 and max(rows for rows, _ in shapes) > 2
    needed = 3 * sum(map(sum, lengths))
    assert needed <= sum(rows * longest for rows, longest in shapes) <= 1.05 * needed


def test_a_forward_pass_of_few_rows_that_does_not_fit_is_split(written: Any) -> None:
    """The limit is halved from the rows of the largest forward pass, not from micro_batch_size, in scoring and training."""
    trainer = written([(4, 4)] * 4 + [(300, 100)] * 4)
    refused: dict[bool, list[int]] = {False: [], True: []}

    def small_card(_: Any, args: Any, options: Any) -> None:
        rows = len(options["input_ids"] if "input_ids" in options else args[0])
        if rows > 2:
            refused[torch.is_grad_enabled()].append(rows)
            raise torch.OutOfMemoryError("CUDA out of memory")

    trainer.model.policy.get_base_model().model.register_forward_pre_hook(small_card, with_kwargs=True)
    trainer.train()
    assert refused == {False: [4], True: [4]}
    maker = trainer.rollout_maker
    assert trainer.micro_batch_limit.rows == maker.scoring_limit.rows == 2
    assert maker.micro_batch_limit.rows == 8  # sampling goes on as before


ROWS = [(3, 1), (30, 7), (1, 1), (5, 1), (33, 2), (2, 30), (17, 9), (8, 30)]
"""Prompts and responses of very different lengths; some are cut at the limit of 30, some are an end token alone."""


@pytest.mark.parametrize("double", [False, True], ids=["float32", "float64"])
@pytest.mark.parametrize("options", [{}, {"full": True}, {"micro_batch_tokens": 50}], ids=str)
def test_losses_are_those_of_each_row_alone(written: Any, options: dict[str, Any], double: bool) -> None:
    """Log-probs and losses of PPO against plain forward passes over one sequence at a time, without padding."""
    trainer = written(ROWS, **options)
    if double:
        trainer.model.double()
        for reference in trainer.references:
            if reference.model is not None:
                reference.model.double()
    rollout = trainer.rollout_maker([trainer.train_dataset[row] for row in range(8)], 1, 0.1, lambda: None)
    assert rollout.responses.empty.sum() == 1 and not rollout.responses.finished.all()
    expected = plain_logprobs(trainer, None if options.get("full") else "policy", rollout)
    torch.testing.assert_close(rollout.logprobs, expected.float(), rtol=1e-5, atol=1e-5)
    torch.nn.init.constant_(trainer.model.value_head.weight, 0.05)
    tokens = sum(answer for _, answer in ROWS)
    whole = loss_of(trainer, rollout, torch.arange(8), tokens).loss
    parts = sum(loss_of(trainer, rollout, torch.tensor(rows), tokens).loss for rows in ([1, 5, 0], [7], [2, 3, 6, 4]))
    with torch.no_grad():
        plain = plain_loss(trainer, rollout, torch.arange(8))
    for found in (whole, parts):
        torch.testing.assert_close(found.detach(), plain.to(found), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"full": True}, {"kl_estimator": "full", "micro_batch_size": 4}], ids=str)
def test_flash_attention_computes_no_padding(
    written: Any, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row for all sequences of a forward pass, in scoring and training; log-probs, KL and losses stay."""
    tokens, found = sum(answer for _, answer in ROWS), []
    for flash in (False, True):
        trainer = written(ROWS, **options)
        torch.nn.init.constant_(trainer.model.value_head.weight, 0.05)
        models = [trainer.model.policy, *(one.model for one in trainer.references if one.model is not None)]
        if flash:
            flash_kernel.install(monkeypatch)
            for model in models:
                flash_kernel.use_flash(model)
        inner = trainer.model.policy if options.get("full") else trainer.model.policy.get_base_model()
        rollout = trainer.rollout_maker([trainer.train_dataset[row] for row in range(8)], 1, 0.1, lambda: None)
        found.append(
            [rollout.logprobs, rollout.kl, rollout.values, *loss_of(trainer, rollout, torch.arange(8), tokens)]
        )
        with computed(inner.model) as shapes:
            trainer.train()
    needed = sum(map(sum, ROWS)) * (2 if options.get("full") else 3)  # the reference's are computed by its own model
    assert sum(length for _, length in shapes) == needed and {rows for rows, _ in shapes} == {1}
    assert len(shapes) == {"full": 2, "kl_estimator": 4}.get(next(iter(options), ""), 3)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
