"""PPO written out plainly, to hold the engine against: one sequence at a time, full logits, no masks, no batches."""

from __future__ import annotations

import contextlib
import random
from typing import Any

import torch
from torch import Tensor

from salsa_peft.data import toy_language as toy
from salsa_peft.models.adapters import lora as adapters
from salsa_peft.models.base import causal_lm
from salsa_peft.models.responses import Sequences
from salsa_peft.training.ppo.losses import PPOLoss
from salsa_peft.training.ppo.rollout import Rollout
from salsa_peft.training.ppo.state import MicroBatch
from salsa_peft.training.ppo.trainer import SalsaPPOTrainer

PROMPTS = [
    {"prompt": [{"role": "user", "content": prompt}]}
    for prompt in toy.draw_prompts(random.Random(0), 16, toy.LENGTHS_IN, 0)
]


def length_reward(prompts: list[str], completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Longer is better: a score that differs between responses."""
    return [len(ids) / 4 for ids in completion_ids]


def roll_out(trainer: SalsaPPOTrainer, rows: int = 8, update: int = 1) -> Rollout:
    """A rollout batch of the first prompts."""
    return trainer.rollout_maker(
        [trainer.train_dataset[i] for i in range(rows)], update, trainer.ppo.kl_coef, lambda: None
    )


class Keeping:
    """A RolloutMaker that keeps what it makes."""

    def __init__(self, maker: Any, kept: list[Rollout]) -> None:
        self._maker, self._kept = maker, kept

    def __call__(self, *args: Any) -> Rollout:
        self._kept.append(self._maker(*args))
        return self._kept[-1]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._maker, name)


def loss_of(trainer: SalsaPPOTrainer, rollout: Rollout, rows: Tensor, tokens: int) -> PPOLoss:
    """The engine's losses of these rows of a rollout batch, in one forward pass; tokens: those of the whole minibatch."""
    sequences = Sequences(rollout.responses, trainer.args.min_new_tokens)
    return trainer.micro_batch_loss(trainer.model, MicroBatch(rollout, sequences, rows.tolist(), tokens, []))


def plain_logprobs(trainer: SalsaPPOTrainer, which: Any, rollout: Rollout, temperature: float = 1.0) -> Tensor:
    """log π of every response token, (B, T), from one sequence's full logits at a time, without padding.

    `which`: an adapter's name, None (the base), or a model of its own.
    """
    r, policy = rollout.responses, trainer.model.policy
    own = isinstance(which, torch.nn.Module)
    lm = which if own else causal_lm(policy)
    table = torch.zeros(r.response_mask.shape)
    with contextlib.nullcontext() if own else adapters.active(policy, which):
        for row in range(len(r.finished)):
            prompt, response = r.prompt_ids[row][r.prompt_mask[row]], r.response_ids[row][r.response_mask[row]]
            logits = lm(torch.cat([prompt, response])[None]).logits[0].float() / temperature
            logp = logits.log_softmax(-1)
            for t, token in enumerate(response):
                table[row, t] = logp[len(prompt) - 1 + t, token]
    return table


def plain_loss(trainer: SalsaPPOTrainer, rollout: Rollout, rows: Tensor) -> Tensor:
    """PPO's loss as its formula reads: one sum over tokens, no masks, no batches, full logits."""
    args, r, lm = trainer.args, rollout.responses, causal_lm(trainer.model.policy)
    value_adapter = trainer.model.value_adapter
    policy_terms, value_terms = [], []
    for row in rows.tolist():
        prompt, response = r.prompt_ids[row][r.prompt_mask[row]], r.response_ids[row][r.response_mask[row]]
        tokens = torch.cat([prompt, response])[None]
        out = lm(tokens, output_hidden_states=True)
        logp, states = out.logits[0].float().log_softmax(-1), out.hidden_states[-1][0]
        if value_adapter is not None:
            with adapters.active(trainer.model.policy, value_adapter):
                states = lm(tokens, output_hidden_states=True).hidden_states[-1][0]
        head = trainer.model.value_head
        values = torch.zeros(len(states)) if head is None else head(states).squeeze(-1)
        for t, token in enumerate(response):
            place = len(prompt) - 1 + t
            ratio = (logp[place, token] - rollout.logprobs[row, t]).exp()
            a = rollout.advantages[row, t]
            policy_terms.append(torch.maximum(-a * ratio, -a * ratio.clamp(1 - args.cliprange, 1 + args.cliprange)))
            v, old, target = values[place], rollout.values[row, t], rollout.returns[row, t]
            near = torch.clamp(v, old - args.cliprange_value, old + args.cliprange_value)
            value_terms.append(torch.maximum((v - target) ** 2, (near - target) ** 2) * (head is not None))
    return torch.stack(policy_terms).mean() + args.vf_coef * 0.5 * torch.stack(value_terms).mean()


def gradients(trainer: SalsaPPOTrainer) -> dict[str, Tensor]:
    """Of everything that trains."""
    return {
        name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.requires_grad and p.grad is not None
    }


def move(trainer: SalsaPPOTrainer) -> None:
    """Change what trains, so that ratios are not 1 and values are not the old ones."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator)


def check_gradients(trainer: SalsaPPOTrainer, micro: int) -> None:
    """Of a rollout batch of 8 in micro-batches, after the policy has moved, in training mode as in a run."""
    rollout = roll_out(trainer)
    lengths = rollout.responses.lengths
    assert len(set(lengths.tolist())) > 1 and len(set(rollout.responses.prompt_mask.sum(-1).tolist())) > 1
    move(trainer)
    trainer.model.train()
    for rows in torch.arange(8).split(micro):
        loss_of(trainer, rollout, rows, int(lengths.sum())).loss.backward()
    found = gradients(trainer)
    trainer.model.zero_grad()
    trainer.model.eval()
    plain_loss(trainer, rollout, torch.arange(8)).backward()
    expected = gradients(trainer)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(
            found[name], gradient, rtol=1e-4, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}"
        )
