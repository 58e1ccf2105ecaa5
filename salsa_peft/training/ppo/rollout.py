"""The rollout: prompts → responses, log-probs, values, KL, scores, rewards and advantages.

Each process computes its share of the batch, and all processes get the whole batch. Shapes: B responses in the
prompts' order, T response tokens.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from accelerate.utils import gather_object, send_to_device
from safetensors.torch import save_file
from torch import Tensor

from salsa_peft.data.chat.turn_ends import model_stop_token_ids
from salsa_peft.models.adapters import lora
from salsa_peft.models.base import causal_lm, packs_rows
from salsa_peft.models.batches import tokens_per_pass
from salsa_peft.models.generation import Recording, row_seeds
from salsa_peft.models.logprobs import Head, head_of
from salsa_peft.models.precision import autocast_as
from salsa_peft.models.responses import (
    ForwardBatch,
    Responses,
    Sequences,
    concatenate,
    pad_to_width,
    response_logprobs,
    response_states,
)
from salsa_peft.models.rewards.function import decode
from salsa_peft.models.rewards.reward import Reward, RunningScale
from salsa_peft.models.sharding import engine_of, gather_weights, gathered
from salsa_peft.models.value_head import PolicyWithValueHead
from salsa_peft.training.ppo import losses
from salsa_peft.training.ppo.backends import Backend
from salsa_peft.training.ppo.mixture.kl import ReferenceKL
from salsa_peft.training.ppo.mixture.weights import ReferenceWeights, score_gradient
from salsa_peft.training.ppo.prompts import Prompt
from salsa_peft.training.references import FrozenReference, place_frozen_models
from salsa_peft.training.stopping import Interrupted
from salsa_peft.utils.errors import SalsaError
from salsa_peft.utils.oom import MicroBatchLimit

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from salsa_peft.training.ppo.config import SalsaPPOConfig


class Rollout(NamedTuple):
    """A rollout batch, with all tensors that the losses need; (B, T) each unless noted."""

    responses: Responses
    logprobs: Tensor
    values: Tensor
    """Values of the critic or, without one, the baseline that is subtracted from the returns."""
    kl: Tensor
    entropy: Tensor
    scores: Tensor
    """(B,), as returned by the reward, before apply_score_options."""
    advantages: Tensor
    returns: Tensor
    sampling_logprobs: Tensor | None = None
    """Log-probs that the sampler reported; None without importance_sampling_correction."""
    importance_weights: Tensor | None = None
    """Weights of the policy loss; None without importance_sampling_correction."""
    reference_gradient: Tensor | None = None
    """Gradient (K,) of the references' weights; None unless they are learned."""

    def tensors(self) -> dict[str, Tensor]:
        """All tensors of the batch by name, including those of the responses."""
        named = {**self._asdict(), **self.responses._asdict()}
        return {name: tensor for name, tensor in named.items() if isinstance(tensor, Tensor)}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], device: torch.device) -> Rollout:
        """Create a Rollout on `device` from what `tensors` returned."""
        moved = {name: tensor.to(device) for name, tensor in tensors.items()}
        responses = Responses(*(moved[name] for name in Responses._fields))
        return cls(responses, **{name: moved[name] for name in cls._fields if name in moved})


def on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of tensors that safetensors can save: contiguous and on the CPU."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


NAMES = {"scores": "score", "logprobs": "log-prob", "values": "value", "kl": "KL"}
"""Fields of a Rollout that are checked for NaN and infinity → their names in messages."""


class NotFinite(SalsaError):
    """Raised for a NaN or infinite number. The message names the folder in which the batch is saved."""


class RolloutMaker:
    """Samples responses to prompts with the policy's current weights and scores them: returns a Rollout."""

    def __init__(self, model: PolicyWithValueHead, references: Sequence[FrozenReference], reward: Reward,
                 backend: Backend, args: SalsaPPOConfig, tokenizer: PreTrainedTokenizerBase,
                 accelerator: Accelerator) -> None:  # fmt: skip
        self.model, self.references, self.reward, self.backend = model, list(references), reward, backend
        self.args, self.tokenizer, self.accelerator = args, tokenizer, accelerator
        self.ends = model_stop_token_ids(tokenizer, causal_lm(model.policy))
        self.device_contexts = place_frozen_models(references, reward, args)
        self.weights = ReferenceWeights(args, [reference.label for reference in self.references])
        world = accelerator.num_processes
        rows = args.rollout_batch_size or -(-args.batch_size // world)
        # two, because an out-of-memory error in scoring, whose batches have few rows, does not limit sampling
        self.micro_batch_limit, self.scoring_limit = (
            MicroBatchLimit(rows, "rollout_batch_size", single_process=world == 1) for _ in range(2)
        )
        self.pass_tokens = tokens_per_pass(model.policy)
        self.scale = RunningScale()

    def head(self, model: PreTrainedModel | None = None) -> Head:
        """The output head of `model`, by default the policy's. Not stored, because sharding replaces it."""
        lm = causal_lm(self.model.policy) if model is None else model
        gather_weights(lm.get_output_embeddings(), self.accelerator)
        return head_of(lm, self.args.temperature, self.ends)

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Prompt], update: int, kl_coef: float, check: Callable[[], None]) -> Rollout:
        """Sample and score responses. update: number of the update, from 1. kl_coef: β.

        check: called during sampling; may raise Interrupted. Raises NotFinite for a NaN or infinite score, log-prob,
        value or KL.
        """
        args = self.args
        self.model.eval()
        # not under DeepSpeed, whose optimizer holds its own copy of the weights
        starts_bias = update == 1 and self.model.starts_at_zero and engine_of(self.accelerator) is None
        if starts_bias:  # an interrupted first update has set it already
            self.model.set_value_bias(torch.zeros((), device=self.accelerator.device))
        with gathered(self.model, self.accelerator):
            # 1. sample responses from the policy, prompts of similar length together
            responses, recorded = self.micro_batch_limit.run(lambda: self._sample(prompts, update, check), len(prompts))
            # 2. log-probs, values and KL, sequences of similar length together; then scores
            sequences = Sequences(responses, args.min_new_tokens)
            given = recorded if args.old_logprobs == "rollout" else None
            largest = max(map(len, self._score_batches(sequences)))
            tables = self.scoring_limit.run(lambda: self._score(sequences, given, self.weights.at(update)), largest)
            scores = self._reward_scores(responses, sequences, [prompt.row for prompt in prompts])
        logprobs, entropy, kl, values, reference_logprobs = tables
        made = {"scores": scores, "logprobs": logprobs, **({} if values is None else {"values": values}), "kl": kl}
        numbers = torch.stack([first_not_finite(tensor) for tensor in made.values()]).tolist()
        named = {NAMES[name]: number for name, number in zip(made, numbers, strict=True)}
        self.require_finite(named, responses._asdict() | made)
        # 3. per-token rewards, whitened if whiten_rewards is set; then advantages, always whitened
        mask = responses.response_mask
        shaped = apply_score_options(scores, responses, args, self.scale)
        rewards = losses.token_rewards(kl, shaped, mask, kl_coef, per=args.kl_per)
        if args.entropy_floor is not None:
            rewards += losses.entropy_bonus(logprobs, entropy, mask, args.entropy_floor, args.entropy_coef)
        if args.whiten_rewards:
            rewards = losses.whiten(rewards, mask, shift_mean=False)
        if values is not None and starts_bias:
            values = self._start_value_bias(values, rewards, mask)
        credit = assign_credit(rewards, values, mask, args)
        self.model.train()
        advantages = losses.whiten(credit.advantages, mask)
        rollout = Rollout(responses, logprobs, credit.values, kl, entropy, scores, advantages, credit.returns)
        if reference_logprobs is not None:
            gradient = score_gradient(shaped, reference_logprobs, mask, args.responses_per_prompt)
            rollout = rollout._replace(reference_gradient=gradient)
        return with_importance_weights(rollout, recorded[0], args) if args.corrects_sampling and recorded else rollout

    def _start_value_bias(self, values: Tensor, rewards: Tensor, mask: Tensor) -> Tensor:
        """Set the value head's bias so that the mean value of a batch is its mean return. Returns the values (B, T)."""
        errors = losses.discounted_sums(rewards, self.args.gamma) - values
        bias = torch.where(mask, errors, 0.0).sum() / mask.sum()
        self.model.set_value_bias(bias)
        return torch.where(mask, values + bias, 0.0)

    def evaluate(self, prompts: Sequence[Prompt]) -> tuple[Responses, Tensor]:
        """Sample responses to prompts, with the same seeds in every call. Returns responses and scores (B,)."""
        self.model.eval()
        with gathered(self.model, self.accelerator):
            responses, _ = self.micro_batch_limit.run(lambda: self._sample(prompts, 0, lambda: None), len(prompts))
            scores = self._reward_scores(responses, Sequences(responses), [prompt.row for prompt in prompts])
        self.model.train()
        return responses, scores

    def _sample(
        self, prompts: Sequence[Prompt], update: int, check: Callable[[], None]
    ) -> tuple[Responses, tuple[Tensor, ...] | None]:
        """Sample responses in all processes. Returns them, and the tensors recorded while sampling, (B, T) each.

        With `old_logprobs: rollout` these are log-probs, entropies and the critic's values; with
        importance_sampling_correction log-probs; otherwise None. If one process raises Interrupted, all raise it.
        """
        self.backend.sync_weights()
        shares = self._shares([len(prompt.tokens) for prompt in prompts])
        try:
            mine = tuple(
                self._sample_part(prompts, rows, row_seeds(rows, self.args.seed, update), check) for rows in shares
            )
        except Interrupted:
            mine = None
        finally:
            self.backend.rest()
        everyones = self._gathered([mine])
        if None in everyones:
            raise Interrupted
        parts = [part for found in everyones for part in found]
        order = torch.tensor([row for rows, _, _ in parts for row in rows], device=self.accelerator.device).argsort()
        whole = concatenate([found for _, found, _ in parts], int(self.tokenizer.pad_token_id))
        width = whole.response_ids.shape[1]
        recorded = zip(*([pad_to_width(tensor, width) for tensor in columns] for _, _, columns in parts), strict=True)
        return Responses(*(t[order] for t in whole)), tuple(torch.cat(column)[order] for column in recorded) or None

    def _sample_part(
        self, prompts: Sequence[Prompt], rows: list[int], seeds: list[int], check: Callable[[], None]
    ) -> tuple[list[int], Responses, tuple[Tensor, ...]]:
        """Sample a micro-batch. Returns `rows`, the responses, and the recorded tensors if any."""
        recording = None
        if self.args.old_logprobs == "rollout" or self.args.corrects_sampling:
            whole = self.args.old_logprobs == "rollout"  # and not the log-probs alone, for the importance weights
            recording = Recording(self.model.value_head if whole else None, with_entropy=whole)
        # the outermost autocast caches the cast weights, so that they are cast once for all tokens
        with self.accelerator.autocast():
            found = self.backend([prompts[row].tokens for row in rows], seeds, recording=recording, check=check)
        return rows, found, recording.stacked(found.response_mask) if recording else ()

    def _score(
        self, sequences: Sequences, recorded: tuple[Tensor, ...] | None, weights: Sequence[float]
    ) -> ScoredTables:
        """Score responses with policy, critic and references. recorded: what _score_part is given."""
        packed, parts = packs_rows(self.model.policy), self._score_batches(sequences)
        head, states, columns, cells = self.head(), [], [], []
        for rows in parts:
            batch = sequences.forward_batch(rows, packed=packed)
            given = [tensor.flatten()[batch.cells] for tensor in recorded] if recorded else None
            with self.accelerator.autocast():
                kept, own = self._score_part(batch, head, given)
            states.append(kept)
            columns.append(own)
            cells.append(batch.cells)
        kls = self._kl(sequences, parts, states, [logprobs for logprobs, *_ in columns], weights)
        mine = [(cell, torch.stack([*own, *kl])) for cell, own, kl in zip(cells, columns, kls, strict=True)]
        found = self._gathered(mine)
        cell, table = torch.cat([cell for cell, _ in found]), torch.cat([columns for _, columns in found], dim=1)
        logprobs, entropy, *rest = (sequences.table(cell, column) for column in table)
        values = rest.pop(0) if self.args.has_critic else None
        kl, *references = rest
        return ScoredTables(logprobs, entropy, kl, values, torch.stack(references) if references else None)

    def _score_batches(self, sequences: Sequences) -> list[list[int]]:
        """Row indices of each forward pass in which this process scores."""
        limit, packed = min(self.scoring_limit.rows, self.micro_batch_limit.rows), packs_rows(self.model.policy)
        rows, tokens = self._own_rows(sequences.lengths), self.args.micro_batch_tokens
        return sequences.batches(rows, limit, tokens, packed=packed, pass_tokens=self.pass_tokens)

    def _reward_scores(self, responses: Responses, sequences: Sequences, rows: Sequence[Mapping[str, Any]]) -> Tensor:
        """The reward's scores (B,). Each process calls the reward once, with all rows of its share."""
        mine = sorted(self._own_rows(sequences.lengths))
        index = torch.tensor(mine, device=self.accelerator.device)
        own = Responses(*(field[index] for field in responses))
        with self.accelerator.autocast():
            found = self.reward(own, [rows[row] for row in mine]).float() if mine else index.float()
        scores = torch.empty(len(rows), device=self.accelerator.device)
        for taken, part in self._gathered([(mine, found)]):
            scores[torch.tensor(taken, device=scores.device)] = part
        return scores

    def _score_part(
        self, batch: ForwardBatch, head: Head, given: list[Tensor] | None
    ) -> tuple[Tensor | None, list[Tensor]]:
        """Hidden states (n, H), and log-probs, entropies and the critic's values, (n,) each.

        The states are None unless the KL estimator is `full`. given: log-probs, entropies and values if they were
        recorded in generation.
        """
        inputs = (batch.input_ids, batch.before, batch.options)
        if given is not None:
            own_trunk = self.model.value_adapter is not None  # whose values are not those of the policy's states
            return None, [*given[:2], self.model.values(None, *inputs)] if own_trunk else given
        states, values = self.model(*inputs)
        logprobs, entropy = response_logprobs(states, batch, head, with_entropy=True)
        kept = states if self.args.kl_estimator == "full" else None
        return kept, [logprobs, entropy] if values is None else [logprobs, entropy, values]

    def _kl(
        self, sequences: Sequences, parts: Sequence[list[int]], states: Sequence[Tensor | None],
        logprobs: Sequence[Tensor], weights: Sequence[float],
    ) -> list[list[Tensor]]:  # fmt: skip
        """KL to the references (mixture/kl.py), (n,) for each batch of rows in `parts`.

        With learned weights, the references' log-probs (n,) follow it. Each reference scores all batches before the next
        one does, so that at most one offloaded reference is on the device.
        """
        args, head, learned = self.args, self.head(), self.args.reference_weights_step is not None
        kls = [
            ReferenceKL(args, weights, head, own, policy, keeps_logprobs=learned)
            for own, policy in zip(logprobs, states, strict=True)
        ]
        for reference, on_device in zip(self.references, self.device_contexts, strict=True):
            model, reference_head = self.model.policy, head
            precision = partial(autocast_as, self.model.policy, reference.model)
            with (
                on_device(),
                self.accelerator.autocast(),
                precision(),
                lora.active(self.model.policy, reference.adapter),
            ):
                if reference.model is not None:
                    model, reference_head = reference.model, self.head(reference.model)
                packed = packs_rows(model)
                for kl, rows in zip(kls, parts, strict=True):
                    batch = sequences.forward_batch(rows, packed=packed)
                    kl.add(response_states(model, batch), batch, reference_head, precision)
        with self.accelerator.autocast():
            return [[kl.kl(), *(kl.logprobs_of if learned else [])] for kl in kls]

    def reward_metrics(self) -> dict[str, float]:
        """Metrics other than scores that the reward recorded for the last batch, averaged over all processes."""
        sums: dict[str, list[float]] = {}
        for name, (total, count) in self._gathered(list(self.reward.take_metrics().items())):
            entry = sums.setdefault(name, [0.0, 0])
            entry[0], entry[1] = entry[0] + total, entry[1] + count
        return {name: total / count for name, (total, count) in sorted(sums.items()) if count}

    def _own_rows(self, lengths: Sequence[int]) -> list[int]:
        """Indices of the rows that this process scores, from the shortest to the longest."""
        by_length = sorted(range(len(lengths)), key=lambda row: lengths[row])
        return by_length[self.accelerator.process_index :: self.accelerator.num_processes]

    def _shares(self, lengths: list[int]) -> list[list[int]]:
        """Row indices of this process's batches for sampling, sorted by `lengths`."""
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        size = min(self.micro_batch_limit.rows, -(-min(len(lengths), self.args.batch_size) // world))
        by_length = sorted(range(len(lengths)), key=lambda row: lengths[row])
        return [by_length[start : start + size] for start in range(0, len(lengths), size)][rank::world]

    def _gathered(self, parts: list[Any]) -> list[Any]:
        """Gather the parts of all processes on this process's device."""
        if self.accelerator.num_processes == 1:
            return parts
        return send_to_device(gather_object(send_to_device(parts, "cpu")), self.accelerator.device)

    def require_finite(self, numbers: Mapping[str, float], batch: Mapping[str, Tensor]) -> None:
        """Raise NotFinite for the first number that is NaN or infinite. numbers: by name, for the message.

        batch: responses and other tensors, the same in all processes. They are saved in <output_dir>/not-finite: texts
        in batch.jsonl, all tensors in batch.safetensors.
        """
        what = next((name for name, number in numbers.items() if not math.isfinite(number)), None)
        if what is None:
            return
        folder = Path(str(self.args.output_dir)) / "not-finite"
        if self.accelerator.is_main_process:
            self._save_batch(folder, batch)
        raise NotFinite(f"{what}: PPO computed {numbers[what]}. No checkpoint was saved; the batch is in {folder}")

    def _save_batch(self, folder: Path, batch: Mapping[str, Tensor]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        prompts, answers = (
            decode(self.tokenizer, batch[f"{part}_ids"], batch[f"{part}_mask"], special_tokens=True)
            for part in ("prompt", "response")
        )
        rows = [{"prompt": prompt, "response": answer} for prompt, answer in zip(prompts, answers, strict=True)]
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / "batch.jsonl").write_text(lines, encoding="utf-8")
        save_file(on_cpu(batch), folder / "batch.safetensors")


class ScoredTables(NamedTuple):
    """What policy, critic and references say of the responses, (B, T) each and 0 outside the mask."""

    logprobs: Tensor
    entropy: Tensor
    kl: Tensor
    values: Tensor | None
    """The critic's values; None without a critic."""
    reference_logprobs: Tensor | None
    """Log-probs of the K references, (K, B, T); None unless their weights are learned."""


def first_not_finite(tensor: Tensor) -> Tensor:
    """The first number of a tensor that is NaN or infinite, as a tensor (); its first number if all are finite."""
    return tensor.take((~tensor.isfinite()).flatten().int().argmax())


class Credit(NamedTuple):
    """What the tokens of a rollout batch are credited with, (B, T) each and 0 outside the mask."""

    values: Tensor
    """The critic's values, or the baseline in their place."""
    advantages: Tensor
    returns: Tensor


def assign_credit(rewards: Tensor, values: Tensor | None, mask: Tensor, args: SalsaPPOConfig) -> Credit:
    """Advantages (not whitened) and returns of the tokens' rewards (B, T). values: the critic's, or None without one.

    With a critic: GAE. Without one, returns with λ = 1, minus the batch's mean or, with `value: group`, minus the mean
    of the other responses to the prompt.
    """
    if values is None:
        returns = losses.discounted_sums(rewards, args.gamma)
        if args.value == "group":
            baseline = losses.leave_one_out_baseline(returns, mask, args.num_generations)
        else:
            baseline = losses.batch_baseline(returns, mask)
        return Credit(baseline, returns - baseline, returns)
    lam = args.lam if args.lam_length_alpha is None else losses.length_dependent_lam(mask, args.lam_length_alpha)
    return Credit(values, *losses.gae(rewards, values, mask, gamma=args.gamma, lam=lam, lam_value=args.lam_value))


def with_importance_weights(rollout: Rollout, sampling_logprobs: Tensor, args: SalsaPPOConfig) -> Rollout:
    """The rollout with importance weights for a sampler with these log-probs (B, T)."""
    mode, mask = args.importance_sampling_mode, rollout.responses.response_mask
    ratios = losses.importance_ratios(rollout.logprobs, sampling_logprobs, mask, mode)
    weights = losses.importance_weights(
        ratios, mode, args.importance_sampling_clip_min, args.importance_sampling_clip_max
    )
    return rollout._replace(sampling_logprobs=sampling_logprobs, importance_weights=weights)


def apply_score_options(scores: Tensor, responses: Responses, args: SalsaPPOConfig, scale: RunningScale) -> Tensor:
    """Apply normalize_scores, score_clip, score_length_exponent, missing_eos_penalty to scores (B,), in this order."""
    if args.normalize_scores:
        scores = scale(scores)
    if args.score_clip is not None:
        scores = scores.clamp(-args.score_clip, args.score_clip)
    if args.score_length_exponent:
        lengths = responses.lengths.float()
        scores = scores * (lengths / lengths.mean()) ** args.score_length_exponent
    if args.missing_eos_penalty is not None:
        scores = scores - args.missing_eos_penalty * (~responses.finished).float()
    return scores
