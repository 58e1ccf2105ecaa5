"""SalsaPPOTrainer: PPO on transformers.Trainer with a list of references (PPO, SALSA, MKL).

TRL removed its PPOTrainer after 1.12; options and metrics with the same meaning have TRL's names. Trainer's own loop
does gradient accumulation, clipping, mixed precision, schedules, distribution and logging. One of its optimizer steps
is one PPO minibatch.
"""

from __future__ import annotations

import contextlib
import json
import math
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import TrainOutput, speed_metrics

from salsa_peft.config.options.guards import parse_guards
from salsa_peft.models import sharding
from salsa_peft.models.adapters import forward
from salsa_peft.models.base import causal_lm, packs_rows, remove_dropout
from salsa_peft.models.responses import Sequences, response_logprobs
from salsa_peft.models.rewards.function import FunctionReward
from salsa_peft.models.value_head import PolicyWithValueHead, load_policy, save_policy, with_value_head
from salsa_peft.training import checkpoints, reference_sync
from salsa_peft.training.ppo import losses
from salsa_peft.training.ppo.backends import BACKENDS
from salsa_peft.training.ppo.checks import check_sharding, check_trained
from salsa_peft.training.ppo.config import SalsaPPOConfig
from salsa_peft.training.ppo.guards.checks import KLCoefBounds
from salsa_peft.training.ppo.guards.monitor import GuardMonitor
from salsa_peft.training.ppo.interface.arguments import (
    AnyReference,
    AnyReward,
    load_arguments,
    one_reward,
    rows_to_read,
    train_value_function,
)
from salsa_peft.training.ppo.interface.evaluation import check_best_metric, eval_rows, require_metric
from salsa_peft.training.ppo.interface.hub import HubTrainer
from salsa_peft.training.ppo.metrics import LogFiles, bonus_metrics, metrics, sampling_metrics
from salsa_peft.training.ppo.prompts import PromptEncoder, RolloutBatches, RolloutLoader
from salsa_peft.training.ppo.resume import RunCheckpoints
from salsa_peft.training.ppo.rollout import RolloutMaker
from salsa_peft.training.ppo.state import MicroBatch, PPOState, checkpoint_size, no_pickles, update_learning_rates
from salsa_peft.training.ppo.terminal.completions import log_completions, print_samples
from salsa_peft.training.ppo.terminal.updates import close_bars, replace_printers
from salsa_peft.training.stopping import GracefulStop, Interrupted, StopBetweenUpdates
from salsa_peft.utils.console import say
from salsa_peft.utils.errors import SalsaError, require
from salsa_peft.utils.oom import MicroBatchLimit

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedTokenizerBase

MAX_LOG_HISTORY = 500
"""Number of newest rows, besides evaluations, kept in log_history, which every checkpoint contains."""


class SalsaPPOTrainer(HubTrainer):
    """PPO with a list of references, for adapters and full weights.

    The arguments are those of TRL 1.16's GRPOTrainer, with references:

    - model: a folder or Hub id, a PeftModel whose active adapter is the policy, or a PreTrainedModel that is the policy.
    - reward_funcs: one or a list; see `models.rewards.reward.as_reward`. `args.reward_weights` are their weights.
    - args: None for the defaults, with the output folder NAME-PPO.
    - train_dataset, eval_dataset: a Dataset, an IterableDataset (with `max_steps`) or a list of rows with `prompt` (text,
      or messages for the chat template) or `input_ids`; whole rows are passed to reward functions.
    - processing_class: the tokenizer; None for that of the model's name.
    - quantization_config, peft_config: to load the model in 4 bits, and to train a new adapter on it.
    - references: see `references.as_references`; of several, args.reference_mean and reference_weights make one KL. None:
      the policy at its start. ref_model: the same for a single reference.

    Raises SalsaError if arguments do not fit together.
    """

    args: SalsaPPOConfig
    model: PolicyWithValueHead  # type: ignore[assignment]
    processing_class: PreTrainedTokenizerBase  # type: ignore[assignment]

    # setup

    def __init__(
        self,
        model: str | Path | PeftModel | PreTrainedModel,
        reward_funcs: AnyReward | list[AnyReward] | None = None,
        args: SalsaPPOConfig | None = None,
        train_dataset: Dataset | IterableDataset | Sequence[dict[str, Any]] | None = None,
        eval_dataset: Dataset | IterableDataset | Sequence[dict[str, Any]] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward_processing_classes: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase | None] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: PeftConfig | None = None,
        *,
        references: Sequence[AnyReference] | None = None,
        ref_model: AnyReference | None = None,
        reward: AnyReward | list[AnyReward] | None = None,
    ) -> None:
        model, args, processing_class, self.references, self.reward = load_arguments(
            model, one_reward(reward_funcs, reward), args, processing_class, reward_processing_classes,
            quantization_config, peft_config, references, ref_model,
        )  # fmt: skip
        args.check_references("", "", len(self.references))
        self.policy_name = str(model.active_adapter) if isinstance(model, PeftModel) else None
        for part in self.reward.components():
            part.micro_batch_tokens = args.micro_batch_tokens
            if isinstance(part, FunctionReward):
                part.get_trainer_state = lambda: self.state
        check_best_metric(args.metric_for_best_model, self.reward)
        policy = with_value_head(model, self.policy_name, args.value, self.reward)
        remove_dropout(model)  # also of the adapters attached above
        check_trained(model, processing_class, args)
        forward.install(model)
        frozen = [reference.model for reference in self.references if reference.model is not None]
        self.encoder = PromptEncoder.of([causal_lm(model), *frozen], args, processing_class)
        prompts, self.left_out = self.encoder(rows_to_read(train_dataset, args), "train_dataset")
        require(
            len(prompts) >= args.prompts_per_update,
            f"train_dataset: {len(prompts)} prompts ({self.left_out} left out: {self.encoder.limit}) are fewer than"
            f" batch_size{' / num_generations' * (args.value == 'group')} = {args.prompts_per_update}. Lower batch_size,"
            " add prompts, or allow longer prompts",
        )
        args.set_max_steps(len(prompts))
        eval_prompts = None if eval_dataset is None else self.encoder(eval_rows(eval_dataset), "eval_dataset")[0]
        super().__init__(
            model=policy.to(model.device),
            args=args,
            train_dataset=prompts,  # type: ignore[arg-type]
            eval_dataset=eval_prompts,  # type: ignore[arg-type]
            processing_class=processing_class,
            callbacks=[UpdateCallback(self), *(callbacks or [])],
            optimizers=optimizers,
        )
        if self.optimizer is not None:
            train_value_function(self.optimizer, policy, args)
        self.model_accepts_loss_kwargs = False
        self.table = replace_printers(self)
        self.saved_dtype: torch.dtype | None = None  # in which save_model saves full weights; None: as trained
        self.how_to_resume = "train(resume_from_checkpoint=True) continues from it"
        self._set_up_engine(model)

    def _set_up_engine(self, model: PeftModel | PreTrainedModel) -> None:
        """Create the objects for sampling, PPO's state, guards, logs and checkpoints."""
        args, policy = self.args, self.model
        check_sharding(self.accelerator, args)
        self.sharded = bool(self.is_fsdp_enabled or self.is_deepspeed_enabled)
        reference_sync.check(self.references, model, self.policy_name, sharded=self.sharded)
        backend = BACKENDS[args.rollout_backend](model, args, self.processing_class, self.accelerator)
        self.rollout_maker = RolloutMaker(
            policy, self.references, self.reward, backend, args, self.processing_class, self.accelerator
        )
        rows, alone = args.per_device_train_batch_size, self.accelerator.num_processes == 1 and not self.sharded
        self.micro_batch_limit = MicroBatchLimit(rows, "micro_batch_size", single_process=alone)
        adaptive = args.kl_control == "adaptive"
        bounds = KLCoefBounds(args.kl_coef_min, args.kl_coef_max, args.kl_target) if adaptive else None
        self.guards = GuardMonitor(parse_guards(args.guards), bounds)  # type: ignore[arg-type]
        self.logs = LogFiles(Path(str(args.output_dir)))
        self.ppo = PPOState(args.kl_coef, torch.zeros(len(losses.PPOLoss._fields), device=args.device))
        self.stop = GracefulStop(self.accelerator)
        self.checkpoints = RunCheckpoints(
            args, self.accelerator, policy.policy, self.policy_name, self.references, self.reward, self.train_dataset,
            f"by ZeRO-3 over {args.world_size}" if self.is_deepspeed_enabled else self.sharded,
            self.ppo, self.rollout_maker.scale, self.rollout_maker.weights, self.guards, self.logs,
        )  # fmt: skip

    def get_train_dataloader(self) -> DataLoader:
        """DataLoader of rollout batches' prompts, each batch repeated for its micro-steps; for all processes."""
        prompts: Any = self.train_dataset
        args = self.args
        copies = args.responses_per_prompt
        batches = RolloutBatches(len(prompts), args.prompts_per_update, args.micro_steps, args.seed, copies)
        return RolloutLoader(prompts, batch_sampler=batches, collate_fn=list)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Create Trainer's optimizer, with value_head_learning_rate for the value head if the option is set."""
        optimizer = super().create_optimizer(model)
        rate = self.args.value_head_learning_rate
        if rate is not None and len(optimizer.param_groups) <= 2:
            assert self.model.value_head is not None  # or the options would have been refused
            head = list(self.model.value_head.parameters())
            for group in optimizer.param_groups:
                group["params"] = [p for p in group["params"] if all(p is not other for other in head)]
            optimizer.add_param_group({"params": head, "lr": rate, "weight_decay": 0.0})
        return optimizer

    # the training loop

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train as transformers.Trainer does. A resumed run ends as if it had not been interrupted.

        resume_from_checkpoint: True for the newest complete checkpoint in output_dir, or a checkpoint's folder. If that
        folder is in another output_dir, the logs there are copied. Options in `resume.CHANGEABLE` may have changed: the
        changes are printed and take effect (a new `kl_coef` resets β). Raises SalsaError if another option, a
        reference, the prompts or a model differs.

        By default a new run starts. Raises SalsaError if output_dir has checkpoints of another run. Logs of a run
        without checkpoints are renamed to metrics.1.jsonl and so on. A second train() of the same trainer continues the
        run: it appends to the logs, restarts the schedule at step 1, and replaces checkpoints of the same step.

        SIGTERM saves a checkpoint and raises SystemExit(143). A guard's alarm with action stop also saves one,
        and raises SalsaError. If a callback asks to stop during an update, training stops at the end of the update.
        """
        checkpoint = self.checkpoints.find(resume_from_checkpoint)
        self.checkpoints.claim_folder(checkpoint)
        self.ppo.abandon_update()
        self.stop.reset()
        self.checkpoints.settings()
        if checkpoint is not None:
            self.checkpoints.restore(checkpoint)
        elif self.is_world_process_zero() and (line := self.logs.begin()) is not None:
            say(line)
        result = TrainOutput(0, 0.0, {})
        callback = StopBetweenUpdates(lambda: self.ppo.rollout is None or self.stop.terminated)
        self.add_callback(callback)
        try:
            with self.stop.handle_sigterm():
                finished = None if checkpoint is None else self._load_finished(checkpoint)
                result = finished or super().train(str(checkpoint) if checkpoint else None, *args, **kwargs)
        except Interrupted:  # during sampling, so no weights have changed since the last optimizer step
            self.ppo.rollout = None
        finally:
            self.remove_callback(callback)
            close_bars(self)
        self.stop.synchronize()
        if self.stop.requested:
            self._save_and_stop()
        return result

    def _save_and_stop(self) -> None:
        if self.checkpoints.saved_step != self.state.global_step:
            self._save_checkpoint(self.model_wrapped, None)
        saved = f"checkpoint-{self.state.global_step} is saved in {self.args.output_dir}"
        if not self.stop.terminated:
            raise SalsaError(f"{self.stop.alarm}; {saved}")
        if self.is_world_process_zero():
            say(f"stopped: {saved}; {self.how_to_resume}")
        raise SystemExit(128 + signal.SIGTERM)

    # one micro-step

    def _prepare_inputs(self, inputs: Any) -> Any:
        """Return the inputs unchanged: prompts are lists of tokens, and rollouts are on the device already."""
        return inputs

    def _next_micro_batch(self, prompts: Any) -> MicroBatch:
        """The next micro-batch of the rollout batch, which the first micro-step of an update creates."""
        args, ppo, step = self.args, self.ppo, self.state.global_step % self.args.steps_per_update
        if step == 0 and ppo.micro_step == 0:
            ppo.started = time.perf_counter()
            rollout = self.rollout_maker(prompts, ppo.update + 1, ppo.kl_coef, self.stop.check)
            ppo.begin_update(rollout, self.rollout_maker.reward_metrics())
        return ppo.next_micro_batch(args, step, self.accelerator.process_index, self.accelerator.num_processes)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Trainer's training step on one micro-batch. If memory runs out, the micro-batch is split.

        The optimizer step then starts over, because the interrupted backward pass leaves incomplete gradients.
        """
        micro_batch, is_retry = self._next_micro_batch(inputs), False

        def forward_and_backward(rows: list[int]) -> Tensor:
            step: Any = super(SalsaPPOTrainer, self).training_step
            parts, found = self._forward_batches(micro_batch.sequences, rows), []
            for number, part in enumerate(parts, 1):
                # DDP adds up the gradients of all processes in the last backward pass only
                with contextlib.nullcontext() if number == len(parts) else self.accelerator.no_sync(model):
                    found.append(step(model, micro_batch._replace(rows=part)))
            return torch.stack(found).sum()

        def run() -> Tensor:
            nonlocal is_retry
            if is_retry:
                model.zero_grad()
                self.ppo.take_sums()
                for rows in micro_batch.earlier:
                    forward_and_backward(rows)
            is_retry = True
            return forward_and_backward(micro_batch.rows)

        largest = max(map(len, self._forward_batches(micro_batch.sequences, micro_batch.rows)))
        loss = self.micro_batch_limit.run(run, largest)
        if self.ppo.trains_critic_only(self.args):
            # the gradient's norm and the optimizer leave out weights without gradient
            for parameter in self.model.policy_parameters():
                parameter.grad = None
        return loss

    def _forward_batches(self, sequences: Sequences, rows: list[int]) -> list[list[int]]:
        """Split the rows of a micro-batch for forward passes with little padding.

        With sharded weights there is one forward pass, because all processes must make the same number of them.
        """
        if self.sharded:
            return [rows]
        packed, pass_tokens = packs_rows(self.model.policy), self.rollout_maker.pass_tokens
        limit, tokens = self.micro_batch_limit.rows, self.args.micro_batch_tokens
        return sequences.batches(rows, limit, tokens, packed=packed, pass_tokens=pass_tokens)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """Loss of a micro-batch × accumulation steps × processes, by which Trainer and DDP divide it."""
        if self.ppo.stopped_early:  # a loss with gradient 0 for backward; the step is skipped
            return 0.0 * self.micro_batch_loss(model, inputs._replace(rows=inputs.rows[:1])).loss
        result = self.micro_batch_loss(model, inputs)
        self.ppo.sums += torch.stack([field.detach() for field in result])
        return result.loss * self.current_gradient_accumulation_steps * self.accelerator.num_processes

    def micro_batch_loss(self, model: Any, micro_batch: MicroBatch) -> losses.PPOLoss:
        """PPO's losses of a micro-batch, from one forward pass over its rows."""
        rollout, args = micro_batch.rollout, self.args
        batch = micro_batch.sequences.forward_batch(micro_batch.rows, packed=packs_rows(self.model.policy))
        old_logprobs, old_values, advantages, returns = (
            table.flatten()[batch.cells]
            for table in (rollout.logprobs, rollout.values, rollout.advantages, rollout.returns)
        )
        weights, warmup = rollout.importance_weights, self.ppo.trains_critic_only(args)
        with self.accelerator.autocast():  # as in the rollout, so that the first ratio is 1
            states, values = model(batch.input_ids, batch.before, batch.options)
            logprobs = response_logprobs(states, batch, self.rollout_maker.head()).logprobs
        return losses.ppo_loss(
            logprobs, values, old_logprobs, old_values, advantages, returns, tokens=micro_batch.tokens,
            cliprange=args.cliprange, cliprange_value=math.inf if warmup else args.cliprange_value, vf_coef=args.vf_coef,
            policy_coef=float(not warmup), weights=None if weights is None else weights.flatten()[batch.cells],
        )  # fmt: skip

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> float:
        """Trainer's gradient norm, copied from the device together with the losses of the optimizer step.

        Raises NotFinite, before the optimizer's step, if a loss or the norm is NaN or infinite.
        """
        ppo, norm = self.ppo, sharding.whole(torch.as_tensor(super()._get_grad_norm(model, grad_norm=grad_norm)))
        sums = self.accelerator.reduce(ppo.take_sums(), "sum")
        *totals, number = torch.cat([sums, norm.to(sums).view(1)]).tolist()
        assert ppo.rollout is not None
        self.rollout_maker.require_finite({"loss": totals[0], "gradient norm": number}, ppo.rollout.tensors())
        ppo.totals += [] if ppo.stopped_early else [totals]
        return number

    # the end of an optimizer step and of an update

    def skip_minibatch(self) -> bool:
        """Whether to skip this optimizer step.

        True if the step's mean ratio exceeds max_ratio (TRL 0.8's ratio_threshold), or the update reached target_kl.
        """
        args, ppo = self.args, self.ppo
        if ppo.stopped_early:
            return True
        mean = dict(zip(losses.PPOLoss._fields, ppo.totals[-1], strict=True))
        exceeds = mean["ratio"] > args.max_ratio
        ppo.skipped += int(exceeds)
        ppo.stopped_early = args.target_kl is not None and mean["approxkl"] > 1.5 * args.target_kl
        return exceeds or ppo.stopped_early

    def end_update(self) -> None:
        """End an update: sync references, write logs, check the guards, adapt β to the KL, and learn references' weights."""
        args, ppo, rollout = self.args, self.ppo, self.ppo.rollout
        assert rollout is not None
        row = metrics(rollout, ppo, args.batch_size) | sampling_metrics(rollout, args) | bonus_metrics(rollout, args)
        row |= ppo.reward_metrics
        error = reference_sync.sync(self.model.policy, self.policy_name, self.references, ppo.update)
        row |= {} if error is None else {"reference/error": error}
        weights = self.rollout_maker.weights
        row |= weights.metrics(ppo.update, rollout.reference_gradient)
        row["lr"] = self._get_learning_rate()
        if self.is_world_process_zero():
            written = self.logs.write(row, rollout, args, self.processing_class)
            if args.shown_every is not None and (ppo.update - 1) % args.shown_every == 0:
                self.table.header_due = True
                if args.log_completions:
                    log_completions(rollout, args, self.processing_class, ppo.update, self.state.global_step)
                else:
                    print_samples(written[:2], ppo.update)
        for alarm in self.guards.check(row):
            if alarm.action == "stop":
                self.stop.alarm = alarm.message
            if self.is_world_process_zero():
                self.table.header_due = True
                say(alarm.message, "yellow")
        seconds = time.perf_counter() - ppo.started
        tokens = row["objective/response_length"] * args.batch_size
        self.log({**row, "seconds": seconds, "tokens_per_second": tokens / seconds})  # these two differ in every run
        if rollout.reference_gradient is not None and not ppo.trains_critic_only(args):
            weights.learn(rollout.reference_gradient)
        if args.kl_control == "adaptive" and not ppo.trains_critic_only(args):
            ppo.kl_coef = losses.adapt_kl_coef(
                ppo.kl_coef, row["objective/kl"], target=args.kl_target, horizon=args.kl_horizon,
                responses=args.batch_size, least=args.kl_coef_min, most=args.kl_coef_max,
            )  # fmt: skip
        ppo.end_update()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as Trainer does. log_history keeps all evaluations and the newest MAX_LOG_HISTORY rows."""
        super().log(logs, start_time)
        rows = self.state.log_history
        older = [row for row in rows[:-MAX_LOG_HISTORY] if any(key.startswith("eval_") for key in row)]
        self.state.log_history = older + rows[-MAX_LOG_HISTORY:]

    # evaluation

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Sample responses to the prompts of the evaluation set. Returns metrics of the responses.

        The metrics are mean score, mean length, share of empty ones, and the reward's. The seeds are the same in every
        call. args.eval_samples responses are written to eval_completions.jsonl. Raises SalsaError without prompts.
        """
        prompts: Any = (
            self.eval_dataset if eval_dataset is None else self.encoder(eval_rows(eval_dataset), "eval_dataset")[0]
        )
        require(bool(prompts), "eval_dataset: there are no prompts to evaluate on. Pass rows with `prompt`")
        training = self.model.training
        try:
            responses, scores = self.rollout_maker.evaluate(prompts)
        finally:
            self.model.train(training)
        score, length, empty = torch.stack(
            [scores.mean(), responses.lengths.float().mean(), responses.empty.float().mean()]
        ).tolist()
        results = {"score": score, "response_length": length, "empty_share": empty}
        results |= self.rollout_maker.reward_metrics()
        if self.args.metric_for_best_model is not None and metric_key_prefix == "eval":
            require_metric(self.args.metric_for_best_model, results)
        named = {f"{metric_key_prefix}_{name}": value for name, value in results.items()}
        if self.is_world_process_zero():
            samples = self.args.eval_samples
            self.logs.write_evaluation(self.ppo.update, responses, scores, samples, self.processing_class)
        self.log(dict(named))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, named)
        return named

    # saving and loading

    def _get_output_dir(self, trial: Any) -> str:
        """The folder in which Trainer writes; a temporary folder while a checkpoint is being saved."""
        return str(self.checkpoints.partial or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save Trainer's files and PPO's state as one checkpoint, which is complete or absent.

        Raises SalsaError if the disk is full.
        """
        size = None
        if self.optimizer is not None and self.accelerator.num_processes == 1 and not self.sharded:
            size = checkpoint_size(self.model, self.optimizer, self.ppo.rollout)
        with self.checkpoints.write(self.state, size):
            super()._save_checkpoint(model, trial)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Save the policy, its value head and the tokenizer. state_dict: the gathered weights of a sharded model."""
        if self.args.should_save:
            folder = Path(str(output_dir or self.args.output_dir))
            tokenizer = self.processing_class
            save_policy(self.model, self.policy_name, folder, tokenizer, state_dict, self.saved_dtype)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load the policy and its value head from a checkpoint into the model."""
        load_policy(self.model, self.policy_name, Path(resume_from_checkpoint))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Save optimizer and scheduler. With sharded weights, the weights are not saved a second time."""
        if self.sharded:
            sharding.save_optimizer_and_scheduler(self, output_dir)
        else:
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load optimizer and scheduler, then apply learning rates that differ from the checkpoint's."""
        with no_pickles(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            options = json.loads((Path(checkpoint) / checkpoints.STATE).read_bytes())["options"]
            update_learning_rates(self.optimizer, self.lr_scheduler, options, self.args)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Load the random state. Raises SalsaError for a pickle that holds more than tensors and numbers."""
        with no_pickles(checkpoint):
            super()._load_rng_state(checkpoint)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        """Prepare the model, and load DeepSpeed's files, which lack frozen weights, without Trainer's checks."""
        if not self.is_deepspeed_enabled:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        engine = sharding.engine_of(self.accelerator)
        self.accelerator.deepspeed_engine_wrapped = sharding.DeferredStep(engine)
        if resume_from_checkpoint is not None:
            engine.load_checkpoint(resume_from_checkpoint, load_module_strict=False)
            self._load_optimizer_and_scheduler(resume_from_checkpoint)  # for the scheduler
        return prepared

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """Finish without removing checkpoints: with save_total_limit 1 Trainer would remove the newest."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            return super()._finalize_training(*args, **kwargs)
        finally:
            self.args.save_total_limit = limit

    def _load_finished(self, checkpoint: Path) -> TrainOutput | None:
        """Load a checkpoint of finished training and return its result; None if it is not finished.

        Trainer would make one more step if it resumed from such a checkpoint.
        """
        state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        if state.global_step < self.args.max_steps:
            return None
        started = time.time()
        self._load_from_checkpoint(str(checkpoint))
        self.create_optimizer_and_scheduler(self.args.max_steps)
        self._load_optimizer_and_scheduler(str(checkpoint))
        self.is_deepspeed_enabled = False  # the weights are not sharded, so save_model must not gather them
        self.state = state
        speed = speed_metrics("train", started, num_samples=0, num_steps=0)
        totals = {"total_flos": state.total_flos, "train_loss": 0.0, "epoch": state.epoch or 0.0}
        return TrainOutput(state.global_step, 0.0, speed | totals)


class UpdateCallback(TrainerCallback):
    """Skips optimizer steps, ends updates, and stops training after SIGTERM or a guard's alarm."""

    def __init__(self, trainer: SalsaPPOTrainer) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Skip the optimizer's step if skip_minibatch says so. Called after gradient clipping."""
        drop = self.trainer.skip_minibatch()
        sharding.before_step(self.trainer.model, self.trainer.accelerator, drop=drop)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """End the update before Trainer saves, so that a checkpoint includes it."""
        if state.global_step % args.steps_per_update == 0:
            self.trainer.end_update()
        self.trainer.stop.synchronize()
        if self.trainer.stop.requested:
            control.should_save = control.should_training_stop = True
