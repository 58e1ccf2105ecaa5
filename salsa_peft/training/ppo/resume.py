"""Checkpoints, resuming and SIGTERM of the PPO trainer."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import TrainOutput, speed_metrics

from salsa_peft.models.adapters import lora
from salsa_peft.models.rewards.reward import Reward
from salsa_peft.training import checkpoints, reference_sync
from salsa_peft.training.ppo import saving
from salsa_peft.training.ppo.guards import Watch
from salsa_peft.training.ppo.metrics import Logs
from salsa_peft.training.ppo.rollout import Interrupted, Rollout, RolloutMaker
from salsa_peft.training.ppo.saving import SavingTrainer, stored
from salsa_peft.training.references import Frozen
from salsa_peft.utils import files
from salsa_peft.utils.errors import SalsaError, require

ROLLOUT, MOVED = "rollout.safetensors", "references.safetensors"
HISTORY = 500
"""Rows of Trainer's log_history, which is in memory and, whole, in every checkpoint; metrics.jsonl has an update's figures for good."""


class ResumableTrainer(SavingTrainer):
    """A Trainer whose run can be broken off at any moment; SalsaPPOTrainer has the rest."""

    maker: RolloutMaker
    logs: Logs
    watch: Watch
    update: int
    kl_coef: float
    skipped: int
    stopped_early: bool
    totals: list[list[float]]
    """Of each optimizer step of the update so far."""
    sums: Tensor
    """Of the micro-steps of the next one."""
    figures: dict[str, float]
    rollout: Rollout | None
    order: list[Tensor]
    micro_step: int
    """Of the optimizer step that is being made."""
    started: float
    halted: str
    references: list[Frozen]
    reward: Reward
    terminated = False
    _aside: Path | None = None
    _owns_folder = False
    _saved: int | None = None
    """The step of the last checkpoint in output_dir that is of this run."""
    _identity: dict[str, Any] | None = None

    def _get_output_dir(self, trial: Any) -> str:
        """Where Trainer writes: a folder aside while a checkpoint is being made."""
        return str(self._aside) if self._aside is not None else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Trainer's checkpoint, the engine's state and the rollout batch that is being trained on; whole, or not there. Raises SalsaError
        where the disk has no room, if that can be known before anything of it is written."""
        folder = Path(str(self.args.output_dir))
        if self.is_world_process_zero():
            shutil.rmtree(folder / checkpoints.PARTIAL, ignore_errors=True)  # of a kill before: what it takes is free
        self._require_room(folder)
        try:
            self._write_checkpoint(model, trial, folder)
        except Exception as error:
            if self.is_world_process_zero():
                shutil.rmtree(folder / checkpoints.PARTIAL, ignore_errors=True)
            if isinstance(error, SalsaError) or (line := files.disk_full_message(error, folder)) is None:
                raise
            raise SalsaError(line) from error

    def _require_room(self, folder: Path) -> None:
        """Counted where this process holds all of it: what trains, the optimizer's states, the rollout batch."""
        if (
            self.accelerator.num_processes > 1
            or self.is_fsdp_enabled
            or self.is_deepspeed_enabled
            or self.optimizer is None
        ):
            return
        tensors: list[Tensor] = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        tensors += [
            entry for state in self.optimizer.state.values() for entry in state.values() if isinstance(entry, Tensor)
        ]
        if self.rollout is not None:
            tensors += [*self.rollout.responses, *(field for field in self.rollout if isinstance(field, Tensor))]
        size = sum(map(stored, tensors))
        files.require_disk_space(folder, size, f"{checkpoints.PREFIX}{self.state.global_step}")

    def _write_checkpoint(self, model: Any, trial: Any, folder: Path) -> None:
        name = f"{checkpoints.PREFIX}{self.state.global_step}"
        self._aside = folder / checkpoints.PARTIAL
        self.accelerator.wait_for_everyone()
        made = self._aside / name
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._aside = None
        self.accelerator.wait_for_everyone()
        best = self.state.best_global_step
        if best == self.state.global_step:  # Trainer found it in the folder aside
            self.state.best_model_checkpoint = str(folder / name)
        if self.is_world_process_zero():
            if self.rollout is not None:
                save_file(self.rollout.tensors(), made / ROLLOUT)
            if moved := reference_sync.state(self.model.policy, self.references):
                save_file(moved, made / MOVED)
            if best == self.state.global_step:
                self.state.save_to_json(str(made / TRAINER_STATE_NAME))
            state = {"saved": checkpoints.next_number(folder), **self._engine_state()}
            (made / checkpoints.STATE).write_text(json.dumps(state, indent=2), encoding="utf-8")
            checkpoints.commit(made, folder / name)
            spared = folder / f"{checkpoints.PREFIX}{best}" if best else None
            checkpoints.rotate(folder, self.args.save_total_limit, spared)
        self._saved = self.state.global_step
        self.accelerator.wait_for_everyone()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As Trainer's; of its log_history the newest HISTORY rows stay, and those of evaluations, which are few and nowhere else."""
        super().log(logs, start_time)
        rows = self.state.log_history
        older = [row for row in rows[:-HISTORY] if any(key.startswith("eval_") for key in row)]
        self.state.log_history = older + rows[-HISTORY:]

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's, which with save_total_limit 1 would remove the newest checkpoint where another was the best."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            return super()._finalize_training(*args, **kwargs)
        finally:
            self.args.save_total_limit = limit

    def _setting(self) -> dict[str, Any]:
        """What a run must have kept to go on from a checkpoint; the micro-batch may be another."""
        if self._identity is None:  # before training: afterwards the weights may be sharded
            prompts: Any = self.train_dataset
            model, name = self.model.policy, self.policy_name
            self._identity = saving.identity(model, name, self.references, self.reward, prompts)
        zero3 = f"by ZeRO-3 over {self.args.world_size}"
        sharded = zero3 if self.is_deepspeed_enabled else bool(self.is_fsdp_enabled)  # its optimizer's files are others
        return {**saving.kept_options(self.args), **self._identity, "sharded": sharded}

    def _engine_state(self) -> dict[str, Any]:
        scale = self.maker.scale
        return {
            "setting": self._setting(),
            "options": saving.changeable_options(self.args, self.reward),
            "update": self.update,
            "kl_coef": self.kl_coef,
            "skipped": self.skipped,
            "stopped_early": self.stopped_early,
            "totals": self.totals,
            "figures": self.figures,
            "scale": [scale.count, scale.mean, scale.squares],
            "watch": self.watch.state_dict(),
            "logs": self.logs.sync(),
        }

    def _restore(self, checkpoint: Path) -> None:
        """The engine's state; weights and optimizer are Trainer's to load."""
        state = checkpoints.read_state(checkpoint, self._setting())
        for key in ("update", "kl_coef", "skipped", "stopped_early", "totals", "figures"):
            setattr(self, key, state[key])
        changes = list(saving.changes(state["options"], saving.changeable_options(self.args, self.reward)))
        if changes:
            self._say(f"{checkpoint.name}: goes on with other options: {', '.join(changes)}")
        if state["options"]["kl_coef"] != self.args.kl_coef:
            self.kl_coef = self.args.kl_coef
        if (checkpoint / MOVED).is_file():
            reference_sync.load_state(self.model.policy, self.references, lora.read_tensors(checkpoint / MOVED))
        scale = self.maker.scale
        scale.count, scale.mean, scale.squares = state["scale"]
        self.watch.load_state_dict(state["watch"])
        if self.is_world_process_zero():
            self._restore_logs(checkpoint, state["logs"])
        self.started = time.perf_counter()
        there = (checkpoint / ROLLOUT).is_file()
        self.rollout = Rollout.of(lora.read_tensors(checkpoint / ROLLOUT), self.accelerator.device) if there else None

    def _restore_logs(self, checkpoint: Path, sizes: dict[str, int]) -> None:
        """As they were at the checkpoint; what is cut off, and is not made again, is kept."""
        folder, lines = Path(str(self.args.output_dir)), []
        if checkpoint.resolve().parent != folder.resolve():
            lines.append(self.logs.take(checkpoint.parent))
        elif any(checkpoints.fault(newer) is None for newer in checkpoints.after(checkpoint)):
            lines.append(self.logs.keep())
        for line in [*lines, *self.logs.cut(sizes)]:
            if line is not None:
                self._say(line)

    def _say(self, line: str) -> None:
        if self.is_world_process_zero():
            print(line, file=sys.stderr, flush=True)

    def _checkpoint(self, resume: str | bool | None) -> Path | None:
        """The checkpoint that `resume_from_checkpoint` means: True, the newest whole one. Raises SalsaError where there is none."""
        if not resume:
            return None
        if resume is not True:
            why = checkpoints.fault(Path(str(resume)))
            require(
                why is None, f"resume_from_checkpoint: found {resume}, which is not whole ({why}), expected another one"
            )
            return Path(str(resume))
        folder, passed = checkpoints.last_whole(Path(str(self.args.output_dir)))
        for line in passed:
            self._say(line)
        require(
            folder is not None,
            f"resume_from_checkpoint: found no whole checkpoint in {self.args.output_dir}, expected one"
            + "; remove those that are there, or choose another output_dir" * bool(passed),
        )
        return folder

    def _claim_folder(self, checkpoint: Path | None) -> None:
        """Raise SalsaError where output_dir has checkpoints of another run: this one's would take their place."""
        folder = Path(str(self.args.output_dir))
        there = checkpoints.checkpoints(folder)
        continued = checkpoint is not None and checkpoint.resolve().parent == folder.resolve()
        require(
            self._owns_folder or continued or not there,
            f"output_dir: found {there[0].name if there else ''} of an earlier run in {folder}, expected no checkpoint;"
            " train(resume_from_checkpoint=True) goes on with that run, another output_dir starts a new one",
        )
        self._owns_folder = True

    def _forget_broken_off(self) -> None:
        """What an earlier train() of this trainer, broken off in an update by an error or Ctrl-C, was in the middle of."""
        if self.rollout is not None:
            self.update -= 1  # it stands in no log
        self.rollout, self.order, self.micro_step, self.halted, self.terminated = None, [], 0, "", False
        self.totals, self.stopped_early, self.sums = [], False, torch.zeros_like(self.sums)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """As transformers.Trainer's; a run that goes on from a checkpoint ends as if it had not been broken off (on a CPU to the bit).

        resume_from_checkpoint: True, the newest whole checkpoint in output_dir; or a checkpoint's folder, also of another output_dir,
        whose logs are taken along. Options that may be others than at the checkpoint hold from there on and are said (`kl_coef`
        sets β anew); of the others, of references, prompts, reward models and the policy's shape SalsaError names the one that differs.

        Without it a new run starts, and SalsaError is raised where output_dir has checkpoints of another one; the logs of one that
        left no checkpoint are kept as metrics.1.jsonl and so on. A second train() of the same trainer is one run with the first: it
        trains the policy further, on a schedule that starts anew at step 1, adds to the logs, and its checkpoints take the place of
        those of the same step.

        SIGTERM saves a checkpoint and raises SystemExit(143). A guard whose action is stop saves one too and raises SalsaError. A
        callback that asks to stop in the middle of an update is heard at the update's end.
        """
        checkpoint = self._checkpoint(resume_from_checkpoint)
        self._claim_folder(checkpoint)
        self._forget_broken_off()
        self._saved = None
        self._setting()
        if checkpoint is not None:
            self._restore(checkpoint)
        elif self.is_world_process_zero() and (line := self.logs.begin()) is not None:
            self._say(line)
        result = TrainOutput(0, 0.0, {})
        with self._answering_sigterm(), self._stopping_between_updates():
            try:
                done = None if checkpoint is None else self._finished(checkpoint)
                result = done or super().train(str(checkpoint) if checkpoint else None, *args, **kwargs)
            except Interrupted:  # nothing has changed since the last optimizer step
                self.rollout = None
        self.agree()
        if (self.terminated or self.halted) and self._saved != self.state.global_step:
            self._save_checkpoint(self.model_wrapped, None)
        if self.terminated:
            self._say(
                f"SIGTERM: checkpoint-{self.state.global_step} is saved in {self.args.output_dir}; train(resume_from_checkpoint=True)"
                " goes on from it"
            )
            raise SystemExit(128 + signal.SIGTERM)
        if self.halted:
            raise SalsaError(f"{self.halted}; checkpoint-{self.state.global_step} is saved in {self.args.output_dir}")
        return result

    def _finished(self, checkpoint: Path) -> TrainOutput | None:
        """Where the checkpoint is the end of training, everything is loaded and nothing is left to do. (Trainer itself would make one
        step more.) None where it is not."""
        state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        if checkpoint.resolve().parent == Path(str(self.args.output_dir)).resolve():
            self._saved = state.global_step
        if state.global_step < self.args.max_steps:
            return None
        begun = time.time()
        self._load_from_checkpoint(str(checkpoint))
        self.create_optimizer_and_scheduler(self.args.max_steps)
        self._load_optimizer_and_scheduler(str(checkpoint))
        self.is_deepspeed_enabled = False  # save_model finds the weights whole
        self.state = state
        spent = speed_metrics("train", begun, num_samples=0, num_steps=0)
        more = {"total_flos": state.total_flos, "train_loss": 0.0, "epoch": state.epoch or 0.0}
        return TrainOutput(state.global_step, 0.0, spent | more)

    @contextlib.contextmanager
    def _stopping_between_updates(self) -> Iterator[None]:
        """Within the context the last callback is the one that makes the others wait for an update's end."""
        last = StopBetweenUpdates(self)
        self.add_callback(last)
        try:
            yield
        finally:
            self.remove_callback(last)

    @contextlib.contextmanager
    def _answering_sigterm(self) -> Iterator[None]:
        """Within the context SIGTERM is noted, and answered at the next token or optimizer step."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def note(*_: Any) -> None:
            self.terminated = True

        before = signal.signal(signal.SIGTERM, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def _check_terminated(self) -> None:
        """Between two tokens. Raises Interrupted, which the rollout's maker passes on to the other processes."""
        if self.terminated:
            raise Interrupted

    def agree(self) -> None:
        """SIGTERM in one process is one in all."""
        if self.accelerator.num_processes > 1:
            flag = torch.tensor(float(self.terminated), device=self.accelerator.device)
            self.terminated = bool(self.accelerator.reduce(flag, "sum").item())


class StopBetweenUpdates(TrainerCallback):
    """A callback that wants training, or an epoch, to stop in the middle of an update has its way at the update's end: what a cut
    update learned would stand in no log. The last of all callbacks; SIGTERM does not wait."""

    def __init__(self, trainer: ResumableTrainer) -> None:
        self.trainer, self.training, self.epoch = trainer, False, False

    def _hold(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.training |= control.should_training_stop
        self.epoch |= control.should_epoch_stop
        ended = self.trainer.rollout is None or self.trainer.terminated
        control.should_training_stop, control.should_epoch_stop = self.training and ended, self.epoch and ended

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The epoch that was to end has ended."""
        self.epoch = False

    on_substep_end = on_step_end = on_log = on_evaluate = on_save = _hold
