"""PPO on transformers.Trainer, with any list of references: PPO, SALSA and MKL are one trainer, for adapters and full weights.

TRL removed its PPOTrainer after 1.12; names of fields and metrics are kept where the thing is the same. Trainer's own loop
does accumulation, clipping, precision, checkpointing, schedules, processes and reporting: one of its steps is one minibatch.
"""

from __future__ import annotations

import copy
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, TrainerCallback

from salsa_peft.config.options.guards import parse
from salsa_peft.models import sharding
from salsa_peft.models.adapters import forward, lora
from salsa_peft.models.base import causal_lm, remove_dropout
from salsa_peft.models.responses import response_logprobs, response_values
from salsa_peft.models.rewards.reward import Reward, adapter_in, as_reward
from salsa_peft.models.value_head import PolicyWithValueHead
from salsa_peft.training import reference_sync
from salsa_peft.training.ppo import losses
from salsa_peft.training.ppo.backends import BACKENDS
from salsa_peft.training.ppo.checks import check_model, check_sharding, check_tokenizer, check_trained
from salsa_peft.training.ppo.config import RolloutBatches, RolloutLoader, SalsaPPOConfig
from salsa_peft.training.ppo.guards import Bounds, Watch
from salsa_peft.training.ppo.metrics import Logs, metrics, show
from salsa_peft.training.ppo.prompts import Encoder
from salsa_peft.training.ppo.resume import ResumableTrainer
from salsa_peft.training.ppo.rollout import Rollout, RolloutMaker
from salsa_peft.training.ppo.saving import VALUE_ADAPTER
from salsa_peft.training.references import Frozen, as_references
from salsa_peft.utils.errors import SalsaError, require
from salsa_peft.utils.oom import MicroBatchLimit

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    pass
    from salsa_peft.training.ppo.resume import ResumableTrainer


class MicroStep(NamedTuple):
    """One forward and backward."""

    rollout: Rollout
    rows: Tensor
    """Of the rollout batch, this process's."""
    tokens: int
    """Of the whole minibatch, over which the losses are means."""
    before: Sequence[Tensor]
    """Rows of the optimizer step's earlier ones."""


class SalsaPPOTrainer(ResumableTrainer):
    """PPO with a list of references: `SalsaPPOTrainer(model, args, train_dataset, references=[...], reward=...)`.

    model: a PeftModel whose active adapter is the policy, or a PreTrainedModel, whose weights are. references: see
    `references.as_references`; their KLs are averaged (paper eq. 5). reward: see `models.rewards.reward.as_reward`. train_dataset, eval_dataset:
    rows with `prompt` (text, used as it is; or messages, through the chat template) or `input_ids`; other columns go to reward
    functions. Raises SalsaError for what does not fit.
    """

    def __init__(
        self,
        model: PeftModel | PreTrainedModel,
        args: SalsaPPOConfig,
        train_dataset: Dataset | Sequence[dict[str, Any]],
        *,
        references: Sequence[str | Path | Frozen | PreTrainedModel],
        reward: Reward | Callable[..., Sequence[float]] | str | Path | Any,
        processing_class: PreTrainedTokenizerBase,
        eval_dataset: Dataset | Sequence[dict[str, Any]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        args = copy.copy(args)  # max_steps is worked out below: another trainer may be made of the same config
        check_model(model)
        check_tokenizer(processing_class, model)
        self.policy_name = str(model.active_adapter) if isinstance(model, PeftModel) else None
        self.references = as_references(model, references)
        require(
            self.policy_name is None or self.policy_name not in [reference.adapter for reference in self.references],
            f"references: found the policy's own adapter {self.policy_name!r}, expected frozen ones; its KL would be 0 always",
        )
        self.reward: Reward = as_reward(reward, model, processing_class)
        policy = with_value_head(model, args, self.reward)
        remove_dropout(model)  # that of the adapters attached here too
        self._train_only(model, policy)
        check_trained(model, processing_class, args)
        forward.install(model)
        frozen = [reference.model for reference in self.references if reference.model is not None]
        self.encoder = Encoder.of([causal_lm(model), *frozen], args, processing_class)
        prompts, self.left_out = self.encoder(train_dataset, "train_dataset")
        require(
            len(prompts) >= args.batch_size,
            f"train_dataset: found {len(prompts)} prompts ({self.left_out} left out: {self.encoder.limit}), expected at least"
            f" batch_size = {args.batch_size}; lower batch_size or allow longer prompts",
        )
        self._whole_updates(args, len(prompts))
        self._start(args)
        super().__init__(
            model=policy.to(model.device),
            args=args,
            train_dataset=prompts,  # type: ignore[arg-type]
            eval_dataset=None if eval_dataset is None else self.encoder(eval_dataset, "eval_dataset")[0],  # type: ignore[arg-type]
            processing_class=processing_class,
            callbacks=[UpdateCallback(self), *(callbacks or [])],
        )
        self.model_accepts_loss_kwargs = False
        check_sharding(self.accelerator, args)
        cut = bool(self.is_fsdp_enabled or self.is_deepspeed_enabled)
        reference_sync.check(self.references, model, self.policy_name, sharded=cut)
        backend = BACKENDS[args.rollout_backend](model, args, processing_class, self.accelerator)
        self.maker = RolloutMaker(
            policy, self.references, self.reward, backend, args, processing_class, self.accelerator
        )
        alone = self.accelerator.num_processes == 1 and not cut
        self.micro_batch = MicroBatchLimit(args.per_device_train_batch_size, "micro_batch_size", single_process=alone)

    def _start(self, args: SalsaPPOConfig) -> None:
        """The engine's state before the first update."""
        bounds = Bounds(args.kl_coef_min, args.kl_coef_max, args.kl_target) if args.kl_control == "adaptive" else None
        self.kl_coef, self.logs = args.kl_coef, Logs(Path(str(args.output_dir)))
        self.watch = Watch(parse(args.guards), bounds)  # type: ignore[arg-type]
        self.update, self.skipped, self.micro_step = 0, 0, 0
        self.stopped_early, self.halted = False, ""
        self.rollout, self.order, self.totals, self.figures = None, [], [], {}
        self.sums = torch.zeros(len(losses.PPOLoss._fields), device=args.device)

    def _train_only(self, model: Any, policy: PolicyWithValueHead) -> None:
        """The policy, its value head and a value adapter; nothing else, whatever was trainable before."""
        for name in model.peft_config if isinstance(model, PeftModel) else ():
            lora.set_trainable(model, name, name in (self.policy_name, policy.value_adapter))

    def _whole_updates(self, args: SalsaPPOConfig, prompts: int) -> None:
        """Training ends with an update: what a cut one learned would stand in no log. A part of an epoch is rounded up."""
        steps = args.steps_per_update
        require(
            args.max_steps < 1 or args.max_steps % steps == 0,
            f"max_steps: found {args.max_steps}, expected a multiple of {steps}, the optimizer steps of one update"
            " (num_ppo_epochs × num_mini_batches)",
        )
        if args.max_steps < 1:
            args.max_steps = math.ceil(args.num_train_epochs * (prompts // args.batch_size)) * steps

    def get_train_dataloader(self) -> DataLoader:
        """Each item is a whole rollout batch of prompts, in every process; it comes once for every micro-step."""
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

    # one micro-step

    def _prepare_inputs(self, inputs: Any) -> Any:
        """They are on the device."""
        return inputs

    def _micro_step(self, prompts: Any) -> MicroStep:
        """What is next of a rollout batch; the first of an update samples it."""
        args = self.args
        step, place = self.state.global_step % args.steps_per_update, self.micro_step
        if step == 0 and place == 0:
            self.started = time.perf_counter()
            self.rollout = self.maker(prompts, self.update + 1, self.kl_coef, self._check_terminated)
            self.update += 1
            self.totals, self.stopped_early, self.figures = [], False, self.maker.figures()
        assert self.rollout is not None
        if not self.order:
            self.order = self._minibatches(self.rollout.responses.lengths)
        minibatch = self.order[step]
        mine = minibatch.split(args.per_device_train_batch_size)[
            self.accelerator.process_index :: self.accelerator.num_processes
        ]
        self.micro_step = (place + 1) % args.gradient_accumulation_steps
        tokens = int(self.rollout.responses.lengths[minibatch].sum())
        return MicroStep(self.rollout, mine[place], tokens, mine[:place])

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """As Trainer's, in as many pieces as the memory has room for. Where it ran out the optimizer step begins anew: what a backward
        left that was cut off counts for nothing."""
        this, tried = self._micro_step(inputs), False

        def forward_and_backward(rows: Tensor) -> Tensor:
            parts = [this._replace(rows=part) for part in rows.split(self.micro_batch.rows)]
            step: Any = super(SalsaPPOTrainer, self).training_step
            return torch.stack([step(model, part) for part in parts]).sum()

        def work() -> Tensor:
            nonlocal tried
            if tried:
                model.zero_grad()
                self.sums = torch.zeros_like(self.sums)
                for rows in this.before:
                    forward_and_backward(rows)
            tried = True
            return forward_and_backward(this.rows)

        return self.micro_batch.run(work, len(this.rows))

    def _minibatches(self, lengths: Tensor) -> list[Tensor]:
        """Row indices of every minibatch of the rollout batch: reshuffled every PPO epoch, sorted by length inside."""
        order = []
        for epoch in range(self.args.num_ppo_epochs):
            generator = torch.Generator().manual_seed(self.args.seed + 7919 * self.update + epoch)
            shuffled = torch.randperm(len(lengths), generator=generator).to(lengths.device)
            order += [rows[lengths[rows].argsort(stable=True)] for rows in shuffled.split(self.args.minibatch_size)]
        return order

    def micro_batch_loss(self, model: Any, rollout: Rollout, rows: Tensor, tokens: int) -> losses.PPOLoss:
        """PPO's losses of some rows of a rollout batch, their share of the mean over the minibatch's `tokens`."""
        part = rollout.responses.rows(rows)
        width = part.response_ids.shape[1]
        old_logprobs, old_values, advantages, returns = (
            field[rows, :width] for field in (rollout.logprobs, rollout.values, rollout.advantages, rollout.returns)
        )
        with self.accelerator.autocast():  # the head too, as in the rollout: the first ratio is 1
            hidden, values = model(part.input_ids, part.attention_mask)
            logprobs, _ = response_logprobs(hidden, part, self.maker.head(), self.args.min_new_tokens)
        return losses.ppo_loss(
            logprobs, response_values(values, part), old_logprobs, old_values, advantages, returns, part.response_mask,
            tokens=tokens, cliprange=self.args.cliprange, cliprange_value=self.args.cliprange_value, vf_coef=self.args.vf_coef,
        )  # fmt: skip

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """One micro-step's loss and its figures. Trainer divides by the accumulation steps and DDP by the processes: undone here."""
        rollout, rows, tokens, _ = inputs
        if self.stopped_early:  # a loss of nothing, whose gradient is dropped
            return 0.0 * self.micro_batch_loss(model, rollout, rows[:1], tokens).loss
        result = self.micro_batch_loss(model, rollout, rows, tokens)
        self.maker.require_finite(
            "loss", result.loss.detach(), rollout.responses, {**rollout.tensors(), "rows": rows.detach()}
        )
        self.sums += torch.stack([field.detach() for field in result])
        return result.loss * self.current_gradient_accumulation_steps * self.accelerator.num_processes

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """As Trainer's. Raises NotFinite for a norm that is none, before the optimizer's step."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        assert self.rollout is not None
        number = torch.as_tensor(norm, dtype=torch.float32)
        self.maker.require_finite("gradient norm", number, self.rollout.responses, self.rollout.tensors())
        return norm

    # an optimizer step, an update

    def drop_minibatch(self) -> bool:
        """Whether this optimizer step is left out: its mean ratio is wild (TRL 0.8's ratio_threshold), or the update has moved
        far enough (`target_kl`)."""
        if self.stopped_early:
            return True
        self.totals.append(self.accelerator.reduce(self.sums, "sum").tolist())
        self.sums = torch.zeros_like(self.sums)
        mean = dict(zip(losses.PPOLoss._fields, self.totals[-1], strict=True))
        wild = mean["ratio"] > self.args.max_ratio
        self.skipped += int(wild)
        self.stopped_early = self.args.target_kl is not None and mean["approxkl"] > 1.5 * self.args.target_kl
        return wild or self.stopped_early

    def end_update(self) -> None:
        """Log the rollout batch, watch it, then let β follow its KL."""
        assert self.rollout is not None
        args, rollout = self.args, self.rollout
        row = (
            metrics(
                rollout,
                self.totals,
                update=self.update,
                batch_size=self.args.batch_size,
                kl_coef=self.kl_coef,
                skipped=self.skipped,
            )
            | self.figures
        )
        moved = reference_sync.refresh(self.model.policy, self.policy_name, self.references, self.update)
        row |= {} if moved is None else {"reference/error": moved}
        if self.is_world_process_zero():
            written = self.logs.write(row, rollout, args, self.processing_class)
            if args.shown_every is not None and (self.update - 1) % args.shown_every == 0:
                show(written[:2], self.update)
        for alarm in self.watch.look(row):
            self.halted = alarm.message if alarm.action == "stop" else self.halted
            if self.is_world_process_zero():
                print(alarm.message, file=sys.stderr, flush=True)
        seconds = time.perf_counter() - self.started
        self.log({**row, "lr": self._get_learning_rate(), "seconds": seconds})
        if args.kl_control == "adaptive":
            self.kl_coef = losses.adapt_kl_coef(
                self.kl_coef, row["objective/kl"], target=args.kl_target, horizon=args.kl_horizon,
                responses=args.batch_size, least=args.kl_coef_min, most=args.kl_coef_max,
            )  # fmt: skip
        self.rollout, self.order, self.totals = None, [], []

    # evaluation

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Responses to the eval set's prompts, always with the same random numbers: mean score, length and share of empty ones; some
        are kept in eval_completions.jsonl. Raises SalsaError where there is no eval set."""
        prompts: Any = self.eval_dataset if eval_dataset is None else self.encoder(eval_dataset, "eval_dataset")[0]
        require(bool(prompts), "eval_dataset: found none, expected rows with prompts")
        training = self.model.training
        try:
            responses, scores = self.maker.evaluate(prompts)
        finally:
            self.model.train(training)
        figures = {
            "score": scores.mean().item(),
            "response_length": responses.lengths.float().mean().item(),
            "empty_share": responses.empty.float().mean().item(),
            **self.maker.figures(),
        }
        named = {f"{metric_key_prefix}_{name}": value for name, value in figures.items()}
        if self.is_world_process_zero():
            self.logs.write_evaluation(self.update, responses, scores, self.args.eval_samples, self.processing_class)
        self.log(dict(named))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, named)
        return named


def with_value_head(model: PeftModel | PreTrainedModel, args: SalsaPPOConfig, reward: Reward) -> PolicyWithValueHead:
    """The policy and its value head; with `value: adapter` an adapter and a head that start as copies of the reward adapter's.

    Raises SalsaError where there is no reward adapter to start from.
    """
    if args.value == "head":
        return PolicyWithValueHead(model)
    start = adapter_in(reward)
    if not isinstance(model, PeftModel) or start is None:
        raise SalsaError(
            f"value: found adapter with a reward of {type(reward).__name__}, expected a reward adapter to start from; set value: head"
        )
    name = lora.unused_name(model, VALUE_ADAPTER)
    lora.attach(model, start.folder, name, trainable=True)
    return PolicyWithValueHead(model, name, start.head.weight)


class UpdateCallback(TrainerCallback):
    """What happens at an optimizer step besides Trainer's own: wild minibatches dropped, updates ended, SIGTERM answered."""

    def __init__(self, trainer: SalsaPPOTrainer) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Between clipping and the optimizer's step."""
        drop = self.trainer.drop_minibatch()
        sharding.before_step(self.trainer.model, self.trainer.accelerator, drop=drop)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The update's end comes before Trainer saves, so that a checkpoint holds it."""
        if state.global_step % args.steps_per_update == 0:
            self.trainer.end_update()
        self.trainer.agree()
        if self.trainer.terminated or self.trainer.halted:
            control.should_save = control.should_training_stop = True
