"""Resuming PPO: state besides weights and optimizer, and the checkpoints of a run."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from salsa_peft.models.adapters import lora
from salsa_peft.models.rewards.reward import Reward, RunningScale
from salsa_peft.training import checkpoints, reference_sync
from salsa_peft.training.ppo import saving
from salsa_peft.training.ppo.guards import GuardMonitor
from salsa_peft.training.ppo.metrics import LogFiles
from salsa_peft.training.ppo.rollout import Rollout
from salsa_peft.training.references import FrozenReference
from salsa_peft.utils import files
from salsa_peft.utils.console import say
from salsa_peft.utils.errors import SalsaError, require

if TYPE_CHECKING:
    from accelerate import Accelerator

    from salsa_peft.training.ppo.config import SalsaPPOConfig

ROLLOUT, REFERENCES = "rollout.safetensors", "references.safetensors"


class MicroBatch(NamedTuple):
    """The rows of one forward and backward pass."""

    rollout: Rollout
    rows: Tensor
    """Indices in the rollout batch."""
    tokens: int
    """Response tokens of the whole minibatch, over which the losses are averaged."""
    earlier: Sequence[Tensor]
    """Rows of the earlier micro-batches of the same optimizer step."""


@dataclass
class PPOState:
    """PPO's state, of the run and of the current update.

    Not included: weights and optimizer, and what Trainer keeps in its TrainerState.
    """

    kl_coef: float
    """Current KL coefficient β."""
    sums: Tensor
    """PPOLoss's fields, (7,), summed over the micro-steps of the current optimizer step in this process."""
    update: int = 0
    """Number of the current update, from 1; 0 before the first."""
    skipped: int = 0
    """Minibatches of the run that were skipped because their mean ratio exceeded max_ratio."""
    stopped_early: bool = False
    """Whether the current update has moved the policy by target_kl and takes no further steps."""
    totals: list[list[float]] = field(default_factory=list)
    """PPOLoss's fields of each optimizer step of this update, summed over micro-steps and processes."""
    figures: dict[str, float] = field(default_factory=dict)
    """Metrics that the reward reported for the current update."""
    rollout: Rollout | None = None
    """Rollout batch of the current update; None between updates."""
    minibatches: list[Tensor] = field(default_factory=list)
    """Row indices of each minibatch of the current update."""
    micro_step: int = 0
    """Position of the next micro-step in its optimizer step."""
    started: float = 0.0
    """When the current update started, in seconds of time.perf_counter."""

    def begin_update(self, rollout: Rollout, figures: dict[str, float]) -> None:
        """Start the update that trains on `rollout`."""
        self.update += 1
        self.rollout, self.figures = rollout, figures
        self.totals, self.stopped_early = [], False

    def next_micro_batch(self, args: SalsaPPOConfig, step: int, process: int, processes: int) -> MicroBatch:
        """The next micro-batch of one process in the update's optimizer step number `step`."""
        assert self.rollout is not None
        lengths = self.rollout.responses.lengths
        if not self.minibatches:
            self.minibatches = minibatches(lengths, args, self.update)
        minibatch, position = self.minibatches[step], self.micro_step
        own = minibatch.split(args.per_device_train_batch_size)[process::processes]
        self.micro_step = (position + 1) % args.gradient_accumulation_steps
        return MicroBatch(self.rollout, own[position], int(lengths[minibatch].sum()), own[:position])

    def end_update(self) -> None:
        """Discard the rollout batch, on which training has ended."""
        self.rollout, self.minibatches, self.totals = None, [], []

    def abandon_update(self) -> None:
        """Discard an update that an error or Ctrl-C interrupted in an earlier call of train().

        It was not logged and does not count.
        """
        if self.rollout is not None:
            self.update -= 1
        self.end_update()
        self.micro_step, self.stopped_early = 0, False
        self.take_sums()

    def take_sums(self) -> Tensor:
        """Return the sums of the optimizer step that ends, and reset them."""
        sums, self.sums = self.sums, torch.zeros_like(self.sums)
        return sums

    def state_dict(self) -> dict[str, Any]:
        """The state as JSON, without the rollout batch; checkpoints fall between optimizer steps."""
        return {key: vars(self)[key] for key in ("update", "kl_coef", "skipped", "stopped_early", "totals", "figures")}

    def load_state_dict(self, state: dict[str, Any], rollout: Rollout | None) -> None:
        """Continue from `state_dict` and the rollout batch of the update that was interrupted, if any."""
        for key in self.state_dict():
            setattr(self, key, state[key])
        self.rollout, self.started = rollout, time.perf_counter()


def minibatches(lengths: Tensor, args: SalsaPPOConfig, update: int) -> list[Tensor]:
    """Shuffle a rollout batch in every PPO epoch → row indices of each minibatch, sorted by length."""
    order = []
    for epoch in range(args.num_ppo_epochs):
        generator = torch.Generator().manual_seed(args.seed + 7919 * update + epoch)
        shuffled = torch.randperm(len(lengths), generator=generator).to(lengths.device)
        order += [rows[lengths[rows].argsort(stable=True)] for rows in shuffled.split(args.minibatch_size)]
    return order


@dataclass
class RunCheckpoints:
    """The checkpoints of one run, each complete or absent.

    A checkpoint holds Trainer's files and PPO's: salsa_state.json, the rollout batch, and the weights of references
    that are synced. A run is resumed only if required options, data and models match.
    """

    args: SalsaPPOConfig
    accelerator: Accelerator
    policy: Any
    """The policy's model, without the value head."""
    policy_name: str | None
    references: list[FrozenReference]
    reward: Reward
    prompts: Any
    sharding: bool | str
    """How weights are sharded: a checkpoint of other sharding has other optimizer files."""
    state: PPOState
    scale: RunningScale
    guards: GuardMonitor
    logs: LogFiles
    partial: Path | None = None
    """Folder in which a checkpoint is being written."""
    saved_step: int | None = None
    """Step of this run's newest checkpoint in output_dir."""
    owns_folder: bool = False
    """Whether the checkpoints in output_dir are those of this run."""
    identity: dict[str, Any] | None = None

    @property
    def folder(self) -> Path:
        """Where checkpoints and logs are written: output_dir."""
        return Path(str(self.args.output_dir))

    def find(self, resume: str | bool | None) -> Path | None:
        """Find the checkpoint that `resume_from_checkpoint` names; True is the newest complete one.

        Raises SalsaError if there is none.
        """
        if not resume:
            return None
        if resume is not True:
            damage = checkpoints.fault(Path(str(resume)))
            require(
                damage is None,
                f"resume_from_checkpoint: {resume} is not a complete checkpoint ({damage}). Resume from another one",
            )
            return Path(str(resume))
        newest, skipped = checkpoints.last_complete(self.folder)
        for line in skipped:
            self._say(line)
        require(
            newest is not None,
            f"resume_from_checkpoint: there is no complete checkpoint in {self.folder}"
            + ". Remove the incomplete ones, or choose another output_dir" * bool(skipped),
        )
        return newest

    def claim_folder(self, checkpoint: Path | None) -> None:
        """Raise SalsaError if output_dir has checkpoints of another run, which this run's would replace."""
        existing = checkpoints.checkpoints(self.folder)
        require(
            self.owns_folder or self._is_here(checkpoint) or not existing,
            f"output_dir: {self.folder} already has {existing[0].name if existing else ''} of an earlier run."
            " Call train(resume_from_checkpoint=True) to continue that run, or choose another output_dir for a new one",
        )
        self.owns_folder, self.saved_step = True, None

    def settings(self) -> dict[str, Any]:
        """What must match on resume. Called first before training, because weights may be sharded afterwards."""
        if self.identity is None:
            self.identity = saving.identity(self.policy, self.policy_name, self.references, self.reward, self.prompts)
        return {**saving.required_options(self.args), **self.identity, "sharded": self.sharding}

    def state_dict(self) -> dict[str, Any]:
        """The content of salsa_state.json. Flushes the logs, whose sizes are part of it, to the disk."""
        return {
            "setting": self.settings(),
            "options": saving.changeable_options(self.args, self.reward),
            **self.state.state_dict(),
            "scale": [self.scale.count, self.scale.mean, self.scale.squares],
            "watch": self.guards.state_dict(),
            "logs": self.logs.sync(),
        }

    @contextlib.contextmanager
    def write(self, trainer_state: TrainerState, size: int | None) -> Iterator[None]:
        """Context that writes a checkpoint: the block saves Trainer's files into `partial`.

        Then PPO's files are added and the folder is renamed. size: bytes that the block will write, if known. Raises
        SalsaError if the disk is full.
        """
        partial, main = self.folder / checkpoints.PARTIAL, self.accelerator.is_main_process
        if main:
            shutil.rmtree(partial, ignore_errors=True)  # left by a killed process
        if size is not None:
            files.require_disk_space(self.folder, size, f"{checkpoints.PREFIX}{trainer_state.global_step}")
        self.partial = partial
        try:
            self.accelerator.wait_for_everyone()
            yield
            self.accelerator.wait_for_everyone()
            self._complete(trainer_state, partial)
        except Exception as error:
            if main:
                shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, SalsaError) or (line := files.disk_full_message(error, self.folder)) is None:
                raise
            raise SalsaError(line) from error
        finally:
            self.partial = None
        self.saved_step = trainer_state.global_step
        self.accelerator.wait_for_everyone()

    def _complete(self, trainer_state: TrainerState, partial: Path) -> None:
        name, best = f"{checkpoints.PREFIX}{trainer_state.global_step}", trainer_state.best_global_step
        made, target = partial / name, self.folder / name
        is_best = best == trainer_state.global_step
        if is_best:  # Trainer recorded the partial folder
            trainer_state.best_model_checkpoint = str(target)
        if not self.accelerator.is_main_process:
            return
        if is_best:
            trainer_state.save_to_json(str(made / TRAINER_STATE_NAME))
        if self.state.rollout is not None:
            save_file(self.state.rollout.tensors(), made / ROLLOUT)
        if synced := reference_sync.state_dict(self.policy, self.references):
            save_file(synced, made / REFERENCES)
        content = {"saved": checkpoints.next_number(self.folder), **self.state_dict()}
        (made / checkpoints.STATE).write_text(json.dumps(content, indent=2), encoding="utf-8")
        checkpoints.commit(made, target)
        kept = self.folder / f"{checkpoints.PREFIX}{best}" if best else None
        checkpoints.rotate(self.folder, self.args.save_total_limit, kept)

    def restore(self, checkpoint: Path) -> None:
        """Restore PPO's state and the logs; Trainer loads weights and optimizer.

        Raises SalsaError for a checkpoint of other settings, data or models.
        """
        saved = checkpoints.read_state(checkpoint, self.settings())
        has_rollout = (checkpoint / ROLLOUT).is_file()
        device = self.accelerator.device
        rollout = Rollout.of(lora.read_tensors(checkpoint / ROLLOUT), device) if has_rollout else None
        self.state.load_state_dict(saved, rollout)
        changes = list(saving.changes(saved["options"], saving.changeable_options(self.args, self.reward)))
        if changes:
            self._say(f"{checkpoint.name}: resuming with changed options: {', '.join(changes)}")
        if saved["options"]["kl_coef"] != self.args.kl_coef:
            self.state.kl_coef = self.args.kl_coef
        if (checkpoint / REFERENCES).is_file():
            reference_sync.load_state_dict(self.policy, self.references, lora.read_tensors(checkpoint / REFERENCES))
        self.scale.count, self.scale.mean, self.scale.squares = saved["scale"]
        self.guards.load_state_dict(saved["watch"])
        if self.accelerator.is_main_process:
            self._restore_logs(checkpoint, saved["logs"])
        if self._is_here(checkpoint):
            self.saved_step = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME)).global_step

    def _restore_logs(self, checkpoint: Path, sizes: dict[str, int]) -> None:
        """Cut the logs back to the checkpoint. What is cut off and will not be made again is kept in a copy."""
        lines = []
        if not self._is_here(checkpoint):
            lines.append(self.logs.take(checkpoint.parent))
        elif any(checkpoints.fault(newer) is None for newer in checkpoints.saved_after(checkpoint)):
            lines.append(self.logs.keep())
        for line in [*lines, *self.logs.cut(sizes)]:
            if line is not None:
                self._say(line)

    def _is_here(self, checkpoint: Path | None) -> bool:
        return checkpoint is not None and checkpoint.resolve().parent == self.folder.resolve()

    def _say(self, line: str) -> None:
        if self.accelerator.is_main_process:
            say(line)
