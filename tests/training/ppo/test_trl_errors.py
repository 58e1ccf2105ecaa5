"""The errors that are ascribed to TRL's PPO (the last was 1.12's, in trl/experimental/ppo), each under its name: none can happen here."""

from __future__ import annotations

import json
import math
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_ppo import PROMPTS, length_reward, loss_of, plain_logprobs, roll_out
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from salsa_peft.models import logprobs
from salsa_peft.models.adapters import lora as adapters
from salsa_peft.training import checkpoints
from salsa_peft.training.ppo import losses
from salsa_peft.training.ppo.state import MicroBatch
from salsa_peft.training.ppo.trainer import SalsaPPOTrainer

PAD, EOS = 0, 2


def trained(trainer: SalsaPPOTrainer) -> list[Tensor]:
    """Copies of everything that trains."""
    return [p.detach().clone() for p in trainer.model.parameters() if p.requires_grad]


def distance(before: list[Tensor], after: list[Tensor]) -> float:
    """Euclidean, over all weights together."""
    return math.sqrt(sum((b - a).double().square().sum().item() for a, b in zip(before, after, strict=True)))


@pytest.mark.parametrize("micro", [4, 2, 1])
def test_minibatches_that_are_no_optimizer_steps_under_accumulation(make_trainer: Any, micro: int) -> None:
    """Its accumulation counted micro-batches across minibatches, so that several minibatches made one step.

    Here: 2 PPO epochs × 2 minibatches of 4 = 4 steps. Weights stand still inside a minibatch and move after it; each of its rows is
    seen once, and each row of the rollout batch once in an epoch.
    """
    trainer = make_trainer(num_mini_batches=2, micro_batch_size=micro, num_ppo_epochs=2, max_steps=4)
    seen: list[tuple[list[int], float]] = []
    loss = trainer.micro_batch_loss

    def watched(model: Any, batch: MicroBatch) -> losses.PPOLoss:
        counted = int(batch.rollout.responses.lengths[batch.rows].sum())
        assert batch.tokens > counted or micro == 4  # the minibatch's, not the micro-batch's
        seen.append((batch.rows, sum(p.double().sum().item() for p in model.parameters() if p.requires_grad)))
        return loss(model, batch)

    trainer.micro_batch_loss = watched
    trainer.train()
    assert trainer.state.global_step == 4 and len(seen) == 16 // micro
    minibatches = [seen[start : start + 4 // micro] for start in range(0, len(seen), 4 // micro)]
    weights = [{total for _, total in minibatch} for minibatch in minibatches]
    assert all(len(standing) == 1 for standing in weights) and len(set.union(*weights)) == 4
    rows = [sorted(row for part, _ in minibatch for row in part) for minibatch in minibatches]
    assert all(len(set(minibatch)) == 4 for minibatch in rows)
    assert sorted(rows[0] + rows[1]) == sorted(rows[2] + rows[3]) == list(range(8))


@pytest.mark.parametrize("bf16", [True, False])
def test_bf16_ignored(make_trainer: Any, bf16: bool) -> None:
    """Its Accelerator was made without a precision. Here: in generation, scoring and training the trunk computes as asked."""
    trainer, seen = make_trainer(bf16=bf16, max_steps=1), set()
    layer = trainer.model.policy.get_base_model().model.layers[0].mlp.down_proj
    layer.register_forward_hook(
        lambda _, inputs, output: seen.add((inputs[0].shape[1] == 1, torch.is_grad_enabled(), output.dtype))
    )
    trainer.train()
    asked = torch.bfloat16 if bf16 else torch.float32
    assert seen == {(True, False, asked), (False, False, asked), (False, True, asked)}


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_gradient_checkpointing_ignored(make_trainer: Any, checkpointing: bool, full: bool) -> None:
    """Its wrapper was never told. Here: every layer runs again in the backward."""
    trainer, forwards = make_trainer(gradient_checkpointing=checkpointing, full=full, max_steps=1), []
    lm = trainer.model.policy if full else trainer.model.policy.get_base_model()
    lm.model.layers[1].mlp.register_forward_pre_hook(lambda *_: forwards.append(torch.is_grad_enabled()))
    trainer.train()
    assert sum(forwards) == (2 if checkpointing else 1)


@pytest.mark.parametrize("norm", [1e-3, 1e-2])
@pytest.mark.parametrize("micro", [8, 2])
def test_max_grad_norm_ignored(make_trainer: Any, norm: float, micro: int) -> None:
    """It never clipped. Here: a step of plain gradient descent at rate 1 is as long as the clip, accumulated or not."""
    trainer = make_trainer(
        max_grad_norm=norm,
        micro_batch_size=micro,
        optim="sgd",
        learning_rate=1.0,
        lr_scheduler_type="constant",
        max_steps=1,
        value="none",  # the first rollout batch sets a value head's bias
    )
    before = trained(trainer)
    trainer.train()
    assert distance(before, trained(trainer)) == pytest.approx(norm, rel=1e-3)


def test_a_score_one_past_the_last_token(make_trainer: Any) -> None:
    """Its score stood at sequence_length + 1. Here: with β = 0, values 0, γ = ½ and λ = 1 the return of a token is score · ½^(tokens
    after it): whole at the EOS, or at the limit's token, and 0 after it."""
    trainer = make_trainer(
        kl_coef=0.0,
        kl_control="fixed",
        gamma=0.5,
        lam=1.0,
        reward=lambda completion_ids, **_: [3.0] * len(completion_ids),
    )
    rollout = roll_out(trainer, 16)
    r = rollout.responses
    assert r.finished.any() and not r.finished.all() and len(set(r.lengths.tolist())) > 2
    for row, length in enumerate(r.lengths.tolist()):
        expected = [3.0 * 0.5 ** (length - 1 - t) if t < length else 0.0 for t in range(r.response_ids.shape[1])]
        assert rollout.returns[row].tolist() == pytest.approx(expected, rel=1e-6)
    ends = r.response_ids[torch.arange(16), r.lengths - 1]
    assert (ends == EOS).tolist() == r.finished.tolist()


def test_pad_is_eos_and_the_prompts_eos_masked(make_trainer: Any) -> None:
    """It took attention_mask = ids != pad. Here: a conversation whose earlier turns end with EOS is read whole, the EOS attended to."""
    rows = [{"input_ids": [1, 5, EOS, 7, EOS, 9, 4][: 7 - row % 3]} for row in range(16)]
    trainer = make_trainer(prompts=rows, pad_is_eos=True)
    rollout = roll_out(trainer)
    r = rollout.responses
    for row in range(8):
        assert r.prompt_ids[row][r.prompt_mask[row]].tolist() == rows[row]["input_ids"]
    torch.testing.assert_close(rollout.logprobs, plain_logprobs(trainer, "policy", rollout), rtol=1e-4, atol=1e-4)
    layer, seen = trainer.model.policy.get_base_model().model.layers[0], []
    layer.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True)
    loss_of(trainer, rollout, torch.tensor([0]), 1)
    assert seen[0].tolist() == [list(range(7 + int(r.lengths[0])))]  # each EOS has a place of its own


@pytest.mark.parametrize("pad_is_eos", [True, False])
def test_the_responses_eos_never_scored_or_trained(make_trainer: Any, pad_is_eos: bool) -> None:
    """Where pad = eos it ended a response before its EOS. Here: the reward sees it, KL and log-prob are its own, a gradient reaches it."""
    given: list[list[int]] = []

    def reward(completion_ids: list[list[int]], **options: Any) -> list[float]:
        given.extend(completion_ids)
        return length_reward(completion_ids=completion_ids, **options)

    trainer = make_trainer(pad_is_eos=pad_is_eos, reward=reward, num_mini_batches=1)
    rollout = roll_out(trainer)
    r = rollout.responses
    ended = [row for row in range(8) if r.finished[row]]
    assert len(ended) > 2
    assert [ids[-1] == EOS for ids in given] == r.finished.tolist() and [
        len(ids) for ids in given
    ] == r.lengths.tolist()
    policy, soup = (plain_logprobs(trainer, name, rollout) for name in ("policy", "soup"))
    at = torch.tensor(ended), r.lengths[ended] - 1
    assert r.response_mask[at].all() and (r.response_ids[at] == EOS).all()
    torch.testing.assert_close(rollout.logprobs[at], policy[at], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(rollout.kl[at], (policy - soup)[at].detach(), rtol=1e-4, atol=1e-4)
    alone = torch.zeros_like(rollout.advantages)
    alone[at] = 1.0  # nothing but the EOS has an advantage
    loss_of(trainer, rollout._replace(advantages=alone), torch.arange(8), 8).loss.backward()
    gradient = [p.grad for n, p in trainer.model.named_parameters() if ".policy.weight" in n]
    assert all(g is not None and g.abs().max() > 0 for g in gradient)


@pytest.mark.parametrize("temperature", [0.5, 1.6])
def test_sampled_at_one_temperature_and_scored_at_another(make_trainer: Any, temperature: float) -> None:
    """The mean of k1 over samples of another distribution is no KL and can fall below 0. Here: 1500 first tokens' k1 is the exact KL at
    the temperature, worked out from both models' logits, within 4 standard errors; what scoring at 1 would give is not."""
    count = 1500
    trainer = make_trainer(temperature=temperature, max_new_tokens=1, prompts=PROMPTS[:1] * count, batch_size=count)
    rollout = roll_out(trainer, count)
    r, tables = rollout.responses, {}
    for name in ("policy", "soup"):
        with torch.no_grad(), adapters.active(trainer.model.policy, name):
            tables[name] = trainer.model.policy.get_base_model()(r.prompt_ids[:1]).logits[0, -1]
    policy, soup = ((table / temperature).log_softmax(-1) for table in tables.values())
    exact = (policy.exp() * (policy - soup)).sum().item()
    at_one = (tables["policy"].log_softmax(-1) - tables["soup"].log_softmax(-1))[r.response_ids[:, 0]]

    def errors(k1: Tensor) -> float:
        return abs(k1.mean().item() - exact) / (k1.std().item() / math.sqrt(count))

    assert exact > 0.05 and errors(rollout.kl[:, 0]) < 4 < errors(at_one)


class Wide(TorchDispatchMode):
    """Numbers that are alive in tensors whose last side is the vocabulary, weights aside: now, and at most."""

    def __init__(self, vocabulary: int, aside: Iterator[Tensor]) -> None:
        super().__init__()
        self.vocabulary, self.now, self.most = vocabulary, 0, 0
        self.known = {tensor.untyped_storage().data_ptr() for tensor in aside}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.dim() > 1 and leaf.shape[-1] == self.vocabulary:
                self._count(leaf.untyped_storage(), leaf.element_size())
        return result

    def _count(self, storage: Any, size: int) -> None:
        place, numbers = storage.data_ptr(), storage.nbytes() // size
        if place in self.known:
            return
        self.known.add(place)
        self.now += numbers
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._gone, place, numbers)

    def _gone(self, place: int, numbers: int) -> None:
        self.known.discard(place)
        self.now -= numbers


@pytest.mark.parametrize("old_logprobs", ["recompute", "rollout"])
def test_generation_scores_kept(make_trainer: Any, monkeypatch: pytest.MonkeyPatch, old_logprobs: str) -> None:
    """It held [B, R, V] of them. Here: over a rollout and an update of 8 responses of 30 tokens no more than a few steps' (B, V) are ever
    alive at once (a step's own copies: logits, scaled, log, exp, sums), and none afterwards."""
    vocabulary, batch, length = 2048, 8, 30
    monkeypatch.setattr(logprobs, "CHUNK", batch)
    trainer = make_trainer(
        base={"vocab_size": vocabulary},
        max_new_tokens=length,
        min_new_tokens=length,
        old_logprobs=old_logprobs,
        logged_completions=0,
    )
    with Wide(vocabulary, trainer.model.parameters()) as wide:
        rollout = roll_out(trainer)
        assert wide.now == 0
        loss_of(trainer, rollout, torch.arange(8), 240).loss.backward()
    assert rollout.responses.response_ids.shape == (batch, length)
    assert wide.now == 0
    assert batch * vocabulary <= wide.most <= 10 * batch * vocabulary  # a third of [B, R, V]
    assert all(tensor.numel() <= batch * (length + 10) for tensor in rollout.tensors().values())


def test_a_passed_reference_silently_ignored_with_peft(make_trainer: Any, make_base: Any, tmp_path: Path) -> None:
    """Here: whatever is passed is what the KL is to, and what can be none is refused."""
    adapters.save(make_trainer().model.policy, "seed-0", tmp_path / "seed")
    other = make_base(5)
    for given, label in (
        ("seed-0", "seed-0"),
        (str(tmp_path / "seed"), "seed-0"),
        (other, other),
        ("base", None),
        ("soup", "soup"),
    ):
        trainer = make_trainer([given], max_new_tokens=3)
        rollout = roll_out(trainer)
        expected = plain_logprobs(trainer, "policy", rollout) - plain_logprobs(trainer, label, rollout)
        torch.testing.assert_close(rollout.kl, expected.detach(), rtol=1e-4, atol=1e-4)
        assert rollout.kl.abs().max() > 0.05
    with pytest.raises(ValueError, match="references: the list is empty"):
        SalsaPPOTrainer(
            trainer.model.policy,
            args=trainer.args,
            train_dataset=PROMPTS,
            references=[],
            reward_funcs=length_reward,
            processing_class=trainer.processing_class,
        )


@pytest.mark.parametrize("step", [1, 2, 3, 5])
def test_no_resume(make_trainer: Any, tmp_path: Path, step: int) -> None:
    """Here: from any step to the same weights and the same log, to the bit; also after `target_kl` has ended the first update's learning
    and with rewards that log figures of their own."""
    options: dict[str, Any] = {
        "num_ppo_epochs": 4, "save_strategy": "steps", "save_steps": 1, "target_kl": 1e-5, "normalize_scores": True, "learning_rate": 1e-2,
        "reward": [(length_reward, 1.0, "length"), (lambda completion_ids, **_: [-1.0] * len(completion_ids), 0.5, "flat")],
    }  # fmt: skip
    whole = make_trainer(folder=tmp_path / "run", **options)
    whole.train()
    log = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    states = [json.loads((tmp_path / "run" / f"checkpoint-{n}" / checkpoints.STATE).read_text()) for n in (1, 3, 4)]
    assert [state["stopped_early"] for state in states] == [False, True, True]
    again = make_trainer(folder=tmp_path / "run", **options)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{step}"))
    assert again.state.global_step == whole.state.global_step == 8 and again.ppo.update == 2
    assert all(torch.equal(a, b) for a, b in zip(trained(whole), trained(again), strict=True))
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == log and b"rewards/flat/mean" in log
    assert again.ppo.kl_coef == whole.ppo.kl_coef != 0.1


def test_no_text_prompts(make_trainer: Any, tokenizer: Any) -> None:
    """It took token ids alone. Here: text, messages and token ids, the same prompt in three ways, are answered alike."""
    messages = PROMPTS[0]["prompt"]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    found = []
    for row in ({"prompt": text}, {"prompt": messages}, {"input_ids": ids}):
        trainer = make_trainer(prompts=[row] * 8, max_steps=1)
        r = roll_out(trainer).responses
        assert r.prompt_ids[0][r.prompt_mask[0]].tolist() == ids
        found.append(r.response_ids)
        trainer.train()
        assert trainer.ppo.update == 1
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_no_reward_functions(make_trainer: Any) -> None:
    """It took a reward model alone. Here: any function of TRL's own signature, which sees texts, tokens and the data's columns."""
    rows = [{**row, "worth": float(number)} for number, row in enumerate(PROMPTS)]

    def reward(prompts: Any, completions: Any, completion_ids: Any, worth: Any, **_: Any) -> list[float]:
        assert len(prompts) == len(completions) == len(completion_ids) == len(worth)
        return [number + len(ids) / 100 for number, ids in zip(worth, completion_ids, strict=True)]

    rollout = roll_out(make_trainer(prompts=rows, reward=reward))
    expected = [row + length / 100 for row, length in enumerate(rollout.responses.lengths.tolist())]
    assert rollout.scores.tolist() == pytest.approx(expected)


def test_no_saved_value_head(make_trainer: Any, tmp_path: Path) -> None:
    """It saved the policy alone. Here: the value head stands beside it, as it was at the end."""
    trainer = make_trainer(learning_rate=0.1)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    saved = load_file(tmp_path / "saved" / "value_head.safetensors")
    head = trainer.model.value_head.state_dict()
    assert saved.keys() == head.keys() and saved["weight"].abs().max() > 0
    assert all(torch.equal(saved[name], head[name]) for name in head)


def test_the_kl_need_not_start_at_zero(make_trainer: Any) -> None:
    """ "KL starts at 0" held for a copy of the policy alone. Here: 0 to a copy of it, not to a soup, at the very first rollout."""
    trainer = make_trainer(["seed-0", "soup"])
    model = trainer.model.policy
    for own, copied in zip(adapters.parameters(model, "policy"), adapters.parameters(model, "seed-0"), strict=True):
        copied.data.copy_(own.data)
    to = {}
    for name in ("seed-0", "soup"):
        other = SalsaPPOTrainer(
            model,
            args=trainer.args,
            train_dataset=PROMPTS,
            references=[name],
            reward_funcs=length_reward,
            processing_class=trainer.processing_class,
        )
        to[name] = roll_out(other).kl
    assert to["seed-0"].abs().max() < 1e-5
    assert to["soup"].sum(-1).mean() > 0.1
    both = roll_out(trainer).kl
    torch.testing.assert_close(both, (to["seed-0"] + to["soup"]) / 2, rtol=1e-4, atol=1e-5)
