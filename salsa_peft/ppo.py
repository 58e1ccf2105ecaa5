"""PPO on transformers.Trainer, with any list of adapters as the KL reference: PPO, SALSA and MKL are one trainer.

TRL removed its PPOTrainer after 1.12; names of fields and metrics are kept where the thing is the same. Trainer's own loop
does accumulation, clipping, precision, checkpointing, schedules and reporting: one of its steps is one minibatch.
Left out so far: resuming, an evaluation set, several processes, full weights.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments

from . import adapters, losses
from .config import SalsaError, require
from .data import prompt_tokens
from .logprobs import head_of
from .models import PolicyWithValueHead, causal_lm, check_head, hidden_states
from .ppo_config import RolloutBatches, RolloutLoader, SalsaPPOConfig
from .references import Frozen, as_references
from .rewards import Reward, RunningScale, as_reward, decode
from .rollout import Responses, concatenate, generate, reference_kls, response_logprobs, response_values

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

VALUE_HEAD = "value_head.safetensors"


class Rollout(NamedTuple):
    """A rollout batch, scored: everything the losses need, (B, T) unless said otherwise."""

    responses: Responses
    logprobs: Tensor
    values: Tensor
    kl: Tensor
    entropy: Tensor
    scores: Tensor
    """(B,), as the reward gave them."""
    advantages: Tensor
    returns: Tensor


class SkipWildMinibatches(TrainerCallback):
    """Drop a minibatch's gradient when its mean probability ratio passed max_ratio (TRL 0.8's ratio_threshold)."""

    def __init__(self, trainer: SalsaPPOTrainer) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(self, args: TrainingArguments, *_: Any, **__: Any) -> None:
        """Called between clipping and the optimizer's step."""
        ratio, self.trainer.minibatch_ratio = self.trainer.minibatch_ratio, 0.0
        if ratio > self.trainer.args.max_ratio:
            self.trainer.skipped += 1
            self.trainer.model.zero_grad(set_to_none=True)


class SalsaPPOTrainer(Trainer):
    """PPO with a list of references: `SalsaPPOTrainer(model, args, train_dataset, references=[...], reward=...)`.

    model: a PeftModel; its active adapter is the policy. references: "base", names of adapters on the model, adapter folders
    or Hub ids; their KLs are averaged (paper eq. 5). reward: a reward adapter's folder, or a function with TRL's
    reward-function signature. train_dataset: rows with `prompt` (text, used as it is; or messages, through the chat template)
    or `input_ids`. Raises SalsaError for what does not fit.
    """

    args: SalsaPPOConfig
    model: PolicyWithValueHead  # type: ignore[assignment]
    processing_class: PreTrainedTokenizerBase  # type: ignore[assignment]

    def __init__(
        self,
        model: PeftModel,
        args: SalsaPPOConfig,
        train_dataset: Dataset | Sequence[dict[str, Any]],
        *,
        references: Sequence[str | Path | Frozen],
        reward: Reward | Callable[..., Sequence[float]] | str | Path,
        processing_class: PreTrainedTokenizerBase,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        require(
            isinstance(model, PeftModel),
            f"model: found {type(model).__name__}, expected a PeftModel with the policy active",
        )
        adapters.remove_dropout(model)
        check_head(model)
        self.policy_name = str(model.active_adapter)
        self.references = as_references(model, references)
        require(
            self.policy_name not in [reference.adapter for reference in self.references],
            f"references: found the policy's own adapter {self.policy_name!r}, expected frozen ones; its KL would be 0 always",
        )
        self.reward: Reward = as_reward(reward, model, processing_class)
        for name in model.peft_config:
            adapters.set_trainable(model, name, name == self.policy_name)
        self.toggle = adapters.Toggle(model)
        self.head = head_of(causal_lm(model), args.temperature, int(processing_class.eos_token_id))
        prompts = self._tokenize(train_dataset, args, processing_class, causal_lm(model).config.max_position_embeddings)
        self._whole_updates(args, len(prompts))
        self.kl_coef, self.score_scale = args.kl_coef, RunningScale()
        self.update, self.skipped, self.minibatch_ratio, self.micro_step = 0, 0, 0.0, 0
        self.rollout: Rollout | None = None
        self.order: list[Tensor] = []
        self.totals: list[losses.PPOLoss] = []
        super().__init__(
            model=PolicyWithValueHead(model).to(model.device),
            args=args,
            train_dataset=prompts,  # type: ignore[arg-type]
            processing_class=processing_class,
            callbacks=[SkipWildMinibatches(self), *(callbacks or [])],
        )
        self.model_accepts_loss_kwargs = False

    def _whole_updates(self, args: SalsaPPOConfig, prompts: int) -> None:
        """Training ends with an update: what a cut one learned would stand in no log. A part of an epoch is rounded up."""
        steps = args.num_ppo_epochs * args.num_mini_batches
        require(
            args.max_steps < 1 or args.max_steps % steps == 0,
            f"max_steps: found {args.max_steps}, expected a multiple of {steps}, the optimizer steps of one update"
            " (num_ppo_epochs × num_mini_batches)",
        )
        if args.max_steps < 1:
            args.max_steps = math.ceil(args.num_train_epochs * (prompts // args.batch_size)) * steps

    def _tokenize(
        self, rows: Any, args: SalsaPPOConfig, tokenizer: PreTrainedTokenizerBase, positions: int
    ) -> list[list[int]]:
        longest = args.max_prompt_length or positions - args.max_new_tokens
        tokens = [prompt_tokens(row, tokenizer, number) for number, row in enumerate(rows, 1)]
        kept = [row for row in tokens if 0 < len(row) <= longest]
        self.left_out = len(tokens) - len(kept)
        require(
            len(kept) >= args.batch_size,
            f"train_dataset: found {len(kept)} prompts of at most {longest} tokens ({self.left_out} left out), expected at least"
            f" batch_size = {args.batch_size}; lower batch_size or allow longer prompts",
        )
        return kept

    def get_train_dataloader(self) -> DataLoader:
        """Each item is a whole rollout batch of prompts; it comes once for every micro-step."""
        prompts: Any = self.train_dataset
        batches = RolloutBatches(len(prompts), self.args.batch_size, self.args.micro_steps, self.args.seed)
        return RolloutLoader(prompts, batch_sampler=batches, collate_fn=list)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """As transformers.Trainer's, with the value head at a rate of its own where one is given."""
        optimizer = super().create_optimizer(model)
        rate = self.args.value_head_learning_rate
        if rate is not None and len(optimizer.param_groups) <= 2:
            head = list(self.model.value_head.parameters())
            for group in optimizer.param_groups:
                group["params"] = [p for p in group["params"] if all(p is not other for other in head)]
            optimizer.add_param_group({"params": head, "lr": rate, "weight_decay": 0.0})
        return optimizer

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As transformers.Trainer's. Raises SalsaError for resume_from_checkpoint: a PPO run can't be resumed yet."""
        require(not resume_from_checkpoint, "resume_from_checkpoint: PPO can't be resumed yet; start it anew")
        return super().train(None, *args, **kwargs)

    def _prepare_inputs(self, inputs: Any) -> Any:
        """A rollout batch's prompts → (rollout, the rows of this micro-step, tokens in its minibatch)."""
        place = self.micro_step % self.args.micro_steps
        if place == 0:
            self.update += 1
            self.started = time.perf_counter()
            self.rollout = self.roll_out(inputs)
            self.order = self._minibatches(self.rollout.responses.lengths)
        assert self.rollout is not None
        self.micro_step += 1
        steps = self.args.gradient_accumulation_steps
        minibatch = self.order[place // steps]
        tokens = int(self.rollout.responses.lengths[minibatch].sum())
        return self.rollout, minibatch.split(self.args.per_device_train_batch_size)[place % steps], tokens

    def _minibatches(self, lengths: Tensor) -> list[Tensor]:
        """Row indices of every minibatch of the rollout batch: reshuffled every PPO epoch, sorted by length inside."""
        order = []
        for epoch in range(self.args.num_ppo_epochs):
            generator = torch.Generator().manual_seed(self.args.seed + 7919 * self.update + epoch)
            shuffled = torch.randperm(len(lengths), generator=generator).to(lengths.device)
            order += [rows[lengths[rows].argsort()] for rows in shuffled.split(self.args.minibatch_size)]
        return order

    @torch.no_grad()
    def roll_out(self, prompts: Sequence[Sequence[int]]) -> Rollout:
        """Sample, score, take log-probs of policy and references, and work out the advantages of one rollout batch."""
        args, size = self.args, self.args.rollout_batch_size or self.args.batch_size
        self.model.eval()
        # 1. sample responses from the policy, prompts of like length together
        by_length = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
        parts = []
        for start in range(0, len(prompts), size):
            rows = [prompts[row] for row in by_length[start : start + size]]
            seed = args.seed + 104_729 * self.update + start
            parts.append(generate(self.model.policy, rows, args, self.processing_class, seed))
        # 2. values, log-probs and KL of each part on the shared base, then its scores
        scored = [self._score(part) for part in parts]
        responses, logprobs, entropy, values, kl, scores = concatenate(
            parts, scored, int(self.processing_class.pad_token_id)
        )
        require_finite("score", scores)
        # 3. rewards, whitened where asked for; advantages, whitened over the whole batch
        rewards = losses.token_rewards(kl, self._shape(scores, responses), responses.response_mask, self.kl_coef)
        if args.whiten_rewards:
            rewards = losses.whiten(rewards, responses.response_mask, shift_mean=False)
        advantages, returns = losses.gae(rewards, values, responses.response_mask, gamma=args.gamma, lam=args.lam)
        advantages = losses.whiten(advantages, responses.response_mask)
        self.model.train()
        return Rollout(responses, logprobs, values, kl, entropy, scores, advantages, returns)

    def _score(self, responses: Responses) -> tuple[Tensor, ...]:
        """Log-probs, entropy, values, KL (B, T) and scores (B,) of generated responses."""
        mask, minimum = responses.response_mask, self.args.min_new_tokens
        hidden, values = self.model(responses.input_ids, responses.attention_mask)
        logprobs, entropy = response_logprobs(hidden, responses, self.head, minimum)
        states = (self._reference_states(reference, responses) for reference in self.references)
        kl = reference_kls(hidden, logprobs, states, responses, self.head, minimum, self.args.kl_estimator)
        return logprobs, entropy, response_values(values, responses) * mask, kl, self.reward(responses).float()

    def _reference_states(self, reference: Frozen, responses: Responses) -> Tensor:
        with self.toggle(reference.adapter):
            return hidden_states(self.model.policy, responses.input_ids, responses.attention_mask)

    def _shape(self, scores: Tensor, responses: Responses) -> Tensor:
        """The options on scores, in TRL 0.8's order: scale, clip, then the penalty for a missing EOS."""
        if self.args.normalize_scores:
            scores = self.score_scale(scores)
        if self.args.score_clip is not None:
            scores = scores.clamp(-self.args.score_clip, self.args.score_clip)
        if self.args.missing_eos_penalty is not None:
            scores = scores - self.args.missing_eos_penalty * (~responses.finished).float()
        return scores

    def micro_batch_loss(self, model: Any, rollout: Rollout, rows: Tensor, tokens: int) -> losses.PPOLoss:
        """PPO's losses of some rows of a rollout batch, their share of the mean over the minibatch's `tokens`."""
        part = rollout.responses.rows(rows)
        width = part.response_ids.shape[1]
        old_logprobs, old_values, advantages, returns = (
            field[rows, :width] for field in (rollout.logprobs, rollout.values, rollout.advantages, rollout.returns)
        )
        hidden, values = model(part.input_ids, part.attention_mask)
        logprobs, _ = response_logprobs(hidden, part, self.head, self.args.min_new_tokens)
        return losses.ppo_loss(
            logprobs, response_values(values, part), old_logprobs, old_values, advantages, returns, part.response_mask,
            tokens=tokens, cliprange=self.args.cliprange, cliprange_value=self.args.cliprange_value, vf_coef=self.args.vf_coef,
        )  # fmt: skip

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """One micro-step's loss and its figures; Trainer divides by the accumulation steps, which is undone here."""
        rollout, rows, tokens = inputs
        result = self.micro_batch_loss(model, rollout, rows, tokens)
        require_finite("loss", result.loss.detach())
        self.minibatch_ratio += result.ratio.item()
        self.totals.append(losses.PPOLoss(*(field.detach() for field in result)))
        if self.micro_step % self.args.micro_steps == 0:
            self._end_update(rollout)
        return result.loss * self.current_gradient_accumulation_steps

    def _end_update(self, rollout: Rollout) -> None:
        """Log the rollout batch, then let β follow its KL."""
        row = self.metrics(rollout)
        folder = Path(str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self._write_completions(rollout, folder / "completions.jsonl")
        self.log({**row, "lr": self._get_learning_rate()})
        if self.args.kl_control == "adaptive":
            self.kl_coef = losses.adapt_kl_coef(
                self.kl_coef, row["objective/kl"], target=self.args.kl_target, horizon=self.args.kl_horizon,
                responses=self.args.batch_size,
            )  # fmt: skip
        self.rollout, self.totals = None, []

    def metrics(self, rollout: Rollout) -> dict[str, float]:
        """What the logs say of a rollout batch, in TRL's names; KL and entropy in nats, KL summed over a response."""
        responses, mask = rollout.responses, rollout.responses.response_mask
        kl = rollout.kl.sum(-1).mean().item()
        steps = self.args.num_ppo_epochs * self.args.num_mini_batches
        mean = {field: sum(getattr(t, field).item() for t in self.totals) / steps for field in losses.PPOLoss._fields}
        ratios = torch.stack([total.ratio for total in self.totals]).view(steps, -1).sum(-1)
        return {
            "update": self.update,
            "episode": self.update * self.args.batch_size,
            "objective/scores": rollout.scores.mean().item(),
            "objective/kl": kl,
            "objective/kl_coef": self.kl_coef,
            "objective/entropy": rollout.entropy.sum(-1).mean().item(),
            "objective/non_score_reward": -self.kl_coef * kl,
            "objective/rlhf_reward": rollout.scores.mean().item() - self.kl_coef * kl,
            "objective/response_length": responses.lengths.float().mean().item(),
            "objective/empty_share": responses.empty.float().mean().item(),
            "policy/approxkl_avg": mean["approxkl"],
            "policy/clipfrac_avg": mean["clipfrac"],
            "policy/skipped_minibatches": self.skipped,
            "loss/policy_avg": mean["policy"],
            "loss/value_avg": mean["value"],
            "val/clipfrac_avg": mean["value_clipfrac"],
            "val/ratio": mean["ratio"],
            "val/ratio_var": ratios.var(unbiased=False).item(),
            "val/num_eos_tokens": int(responses.finished.sum()),
            "val/explained_variance": losses.explained_variance(rollout.values, rollout.returns, mask),
            "seconds": time.perf_counter() - self.started,
        }

    def _write_completions(self, rollout: Rollout, path: Path) -> None:
        part = rollout.responses.rows(torch.arange(min(self.args.logged_completions, self.args.batch_size)))
        texts = decode(self.processing_class, part.prompt_ids, part.prompt_mask)
        answers = decode(self.processing_class, part.response_ids, part.response_mask)
        with path.open("a", encoding="utf-8") as file:
            for row, (prompt, response) in enumerate(zip(texts, answers, strict=True)):
                kl, score = rollout.kl[row].sum().item(), rollout.scores[row].item()
                entry = {"update": self.update, "prompt": prompt, "response": response, "score": score, "kl": kl}
                file.write(json.dumps(entry, ensure_ascii=False) + "\n")

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """The policy as an ordinary PEFT adapter with the tokenizer, and the value head beside it; no pickles."""
        folder = Path(str(output_dir or self.args.output_dir))
        adapters.save(self.model.policy, self.policy_name, folder, self.processing_class)
        head = {name: tensor.detach().cpu() for name, tensor in self.model.value_head.state_dict().items()}
        save_file(head, folder / VALUE_HEAD, metadata={"format": "pt"})


def require_finite(what: str, values: Tensor) -> None:
    """Raise SalsaError where a number is NaN or infinite."""
    if not bool(torch.isfinite(values).all()):
        raise SalsaError(
            f"{what}: found {values[~torch.isfinite(values)][0].item()} in PPO, expected a finite number; nothing saved"
        )
