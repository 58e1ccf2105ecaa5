"""The one function through which every stage with a trainer of TRL's trains its model, and its checkpoints.

A stage that was killed goes on from its newest complete checkpoint. On a CPU it ends as it would have ended without the
kill, to the bit: weights, metrics and log. Trainer restores weights, optimizer, schedule and random numbers;
`Resumable` adds what Trainer and TRL forget. A checkpoint holds the trained weights alone, in their own dtype, so that
names, adapters, score heads and quantised bases need no case of their own.
"""

from __future__ import annotations

import functools
import hashlib
import json
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.data_loader import SeedableRandomSampler
from accelerate.utils import broadcast_object_list
from torch import nn
from torch.utils.data import BatchSampler
from transformers import Trainer, TrainerCallback

from salsa_peft.models import sharding
from salsa_peft.models.adapters import forward
from salsa_peft.models.precision import make_trained_float32, require_float32, rounds_stochastically
from salsa_peft.training import checkpoints, reference_sync
from salsa_peft.training.ppo.state import checkpoint_size, no_pickles
from salsa_peft.training.stopping import GracefulStop
from salsa_peft.utils.console import say
from salsa_peft.utils.errors import require

if TYPE_CHECKING:
    from salsa_peft.training.references import FrozenReference

WEIGHTS, PROGRESS = "trained.pt", "progress-{}.json"
COUNTERS = ("_total_train_tokens", "_step", "_current_train_step_time")
"""Attributes of TRL's trainers that count on from the start of training; not every trainer has each."""


def run_trainer(trainer: Resumable, unit: str, references: Sequence[FrozenReference] = ()) -> float:
    """Train with a TRL trainer and return the mean training loss of all processes.

    All trained weights are made float32 first: LoRA factors, DoRA magnitudes, score heads, modules_to_save, trained
    tokens and full weights. Two kinds are left as they are: full weights whose optimizer rounds stochastically, and the
    weights of DeepSpeed, whose optimizer holds float32 copies. Adapters compute with models/adapters/forward.py. Training
    starts at the newest checkpoint in output_dir, if there is one. unit: name of the stage's unit, for messages.
    references: those of a policy, for their syncing.

    Raises SalsaError if a trained weight is not float32, or if the checkpoint is of other settings. SIGTERM saves a
    checkpoint and raises SystemExit(143). Under DeepSpeed no checkpoints are saved.
    """
    if trainer.is_deepspeed_enabled:
        if trainer.is_world_process_zero():
            say(
                f"{unit}  is trained without checkpoints under DeepSpeed: if it is killed, it starts from the beginning"
            )
        return mean_loss(trainer, trainer.train().training_loss)
    if not rounds_stochastically(trainer.args):
        make_trained_float32(trainer.model)
    require_float32(trainer.model, trainer.args)
    forward.install(trainer.model)
    return mean_loss(trainer, trainer.train_from_newest(unit, references))


def mean_loss(trainer: Trainer, loss: float) -> float:
    """The mean of the processes' training losses. Trainer's own value omits other processes' last steps."""
    if trainer.accelerator.num_processes == 1:
        return loss
    own = torch.tensor(loss, dtype=torch.float64, device=trainer.accelerator.device)
    return trainer.accelerator.reduce(own, "mean").item()


@functools.cache
def resumable(trainer: type[Trainer]) -> Any:
    """The class `trainer`, one of TRL's, with the methods of Resumable."""
    return type(trainer.__name__, (Resumable, trainer), {})


class Resumable(Trainer):
    """Checkpoints of a TRL trainer, each complete or absent, from which training ends as if it had not stopped.

    A checkpoint can lie between any two optimizer steps, because TRL's RLOO and GRPO, with the options of a recipe,
    sample new responses in every step.
    """

    model: Any
    optimizer: Any
    _metrics: dict[str, dict[str, list[float]]]
    """TRL's metrics since the last row of the log, of training and of evaluation."""
    references: Sequence[FrozenReference] = ()
    setting: dict[str, Any]
    """What must match on resume."""
    partial: Path | None = None
    """Folder in which a checkpoint is being written; None between checkpoints."""
    resumed: dict[str, Any] | None = None
    """What `_save_progress` wrote into the checkpoint from which this training goes on; None from the start."""

    began, earlier = 0.0, 0.0
    """When this training began, from time.time(), and the seconds that it took before it was stopped."""

    @property
    def folder(self) -> Path:
        """The folder output_dir, which holds the checkpoints."""
        return Path(str(self.args.output_dir))

    def train_from_newest(self, unit: str, references: Sequence[FrozenReference]) -> float:
        """Train from the newest checkpoint in output_dir, or from the start; return the mean loss of all steps."""
        self.references, self.setting = references, self._setting()
        main = self.is_world_process_zero()
        (checkpoint,) = broadcast_object_list([checkpoints.newest_of(self.folder, unit) if main else None])
        if checkpoint is not None:
            checkpoints.read_state(checkpoint, self.setting, checkpoints.start_again(unit))
            self.resumed = json.loads((checkpoint / PROGRESS.format(self.args.process_index)).read_bytes())
        stop = GracefulStop(self.accelerator)
        self.add_callback(SaveOrStop(self, stop))
        with stop.handle_sigterm():
            loss = self.train(None if checkpoint is None else str(checkpoint)).training_loss
        stop.synchronize()
        if stop.terminated:
            saved = [path.name for path in checkpoints.checkpoints(self.folder)[:1]]
            if main:
                say(f"{unit}  stopped: the same command goes on from {saved[0] if saved else 'the beginning'}")
            raise SystemExit(128 + signal.SIGTERM)
        return loss

    def trained(self) -> dict[str, nn.Parameter]:
        """The trained weights by name."""
        return {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}

    def _setting(self) -> dict[str, Any]:
        """What must match on resume and is not in a unit's cache key, or decides what a checkpoint's files hold.

        Called before training, which may shard the weights.
        """
        args, weights = self.args, hashlib.sha256()
        for name, weight in self.trained().items():
            weights.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        return {
            "trainer": type(self).__name__,
            "rows": len(self.train_dataset),  # type: ignore[arg-type]
            "seed": args.seed,
            "batch_size": args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size,
            "num_processes": args.world_size,
            "sharded": self.is_fsdp_enabled,
            "optim": str(args.optim),
            "trained weights": weights.hexdigest()[:12],
        }

    # saving

    def _get_output_dir(self, trial: Any) -> str:
        """The folder in which Trainer writes; a temporary folder while a checkpoint is being saved."""
        return str(self.partial or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save a checkpoint, which replaces the one before once it is complete.

        Raises SalsaError if the disk is full.
        """
        name = f"{checkpoints.PREFIX}{self.state.global_step}"
        alone = self.accelerator.num_processes == 1  # with several, one that lacks space would leave the others waiting
        size = checkpoint_size(self.model, self.optimizer, None) if alone else None
        try:
            with checkpoints.writing(self.folder, name, size, self.accelerator) as self.partial:
                super()._save_checkpoint(model, trial)
                made = self.partial / name
                self._save_progress(made)
                self.accelerator.wait_for_everyone()
                if self.is_world_process_zero():
                    state = {"saved": checkpoints.next_number(self.folder), "setting": self.setting}
                    (made / checkpoints.STATE).write_text(json.dumps(state, indent=2), encoding="utf-8")
                    checkpoints.commit(made, self.folder / name)
                    checkpoints.rotate(self.folder, keep=1)
        finally:
            self.partial = None

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Save the trained weights, and references that are synced, in the dtypes that they have in memory.

        state_dict: the gathered weights of a sharded model.
        """
        if self.args.should_save:
            folder = Path(str(output_dir))
            folder.mkdir(parents=True, exist_ok=True)
            held = {name: weight.detach() for name, weight in self.trained().items()}
            trained = held if state_dict is None else {name: state_dict[name] for name in held}
            synced = reference_sync.state_dict(self.model, self.references)
            torch.save({"trained": trained, "references": synced}, folder / WEIGHTS)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Save optimizer and scheduler. With sharded weights, the weights are not saved a second time."""
        if self.is_fsdp_enabled:
            sharding.save_optimizer_and_scheduler(self, output_dir)
        else:
            super()._save_optimizer_and_scheduler(output_dir)

    def _save_progress(self, folder: Path) -> None:
        """Save this process's sums of losses, metrics that are not logged yet, and TRL's counters."""
        progress = {
            "seconds": self.earlier + time.time() - self.began,
            "loss": self._tr_loss.item(),
            "total_loss": self._total_loss_scalar,
            "logged_step": self._globalstep_last_logged,
            "metrics": self._metrics["train"],
            "counters": {name: vars(self)[name] for name in COUNTERS if name in vars(self)},
        }
        (folder / PROGRESS.format(self.args.process_index)).write_text(json.dumps(progress), encoding="utf-8")

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Write no model card, which TRL writes with every checkpoint; `salsa run` writes its own on a push."""

    # loading

    def restore_progress(self) -> None:
        """Restore what `_save_progress` saved, after Trainer has set its own sums to 0."""
        self.began = time.time()
        if self.resumed is None:
            return
        self.earlier = self.resumed["seconds"]
        self._tr_loss = torch.tensor(self.resumed["loss"], device=self.args.device)
        self._total_loss_scalar, self._globalstep_last_logged = (
            self.resumed[key] for key in ("total_loss", "logged_step")
        )
        self._initial_global_step = 0  # the mean loss is that of all steps
        self._metrics["train"].update(self.resumed["metrics"])
        vars(self).update(self.resumed["counters"])
        self.model.train()  # or TRL would not log these metrics if no step is left

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load the trained weights and the synced references."""
        file, held = Path(resume_from_checkpoint) / WEIGHTS, self.trained()
        with no_pickles(resume_from_checkpoint):
            saved = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        require(saved["trained"].keys() == held.keys(), f"{file}: its weights are not those of this model")
        with torch.no_grad():
            for name, weight in held.items():
                weight.copy_(sharding.sharded_like(saved["trained"][name], weight))
        reference_sync.load_state_dict(self.model, self.references, saved["references"])

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load optimizer and scheduler. Raises SalsaError for a pickle that holds more than tensors and numbers."""
        with no_pickles(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Load the random state. Raises SalsaError for a pickle that holds more than tensors and numbers."""
        with no_pickles(checkpoint):
            super()._load_rng_state(checkpoint)

    def _finalize_training(self, trial: Any, num_train_samples: Any, start_time: Any) -> Any:
        """Log speeds of the whole training, as Trainer would without an interruption."""
        return super()._finalize_training(trial, num_train_samples, start_time - self.earlier)

    def _run_epoch(self, **given: Any) -> None:  # type: ignore[override]
        """Train for an epoch; the first one after a resume starts at the checkpoint's place in the order of the rows.

        After the last step nothing is left to do: Trainer would take one more.
        """
        if self.state.global_step >= self.state.max_steps:
            return
        if self.resumed is not None and given["epoch"] == given["epochs_trained"]:
            start_epoch(given["train_dataloader"], given["epoch"])
        super()._run_epoch(**given)


def start_epoch(loader: Any, epoch: int) -> None:
    """Bring a data loader's sampler to the order of the rows in an epoch.

    accelerate does not reach the sampler of a loader that skips rows in several processes, and TRL's RepeatSampler
    draws the orders of all epochs from one generator.
    """
    sampler = loader.batch_sampler
    while isinstance(sampler, BatchSampler):
        sampler = vars(sampler).get("batch_sampler") or sampler.sampler
    if isinstance(sampler, SeedableRandomSampler):
        sampler.set_epoch(epoch)
        return
    for _ in range(epoch):
        next(iter(sampler))


class SaveOrStop(TrainerCallback):
    """Saves a checkpoint every args.save_steps steps; after SIGTERM saves one and stops.

    The last step is saved only if held-out rows are evaluated next, which may be interrupted too; else the stage saves its
    result next.
    """

    def __init__(self, trainer: Resumable, stop: GracefulStop) -> None:
        self.trainer, self.stop = trainer, stop

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Restore what Trainer has just set to 0."""
        self.trainer.restore_progress()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Ask Trainer to save, and to stop, once it has logged this step."""
        self.stop.synchronize()
        last = state.global_step >= state.max_steps
        due = self.trainer.eval_dataset is not None if last else state.global_step % args.save_steps == 0
        control.should_save = due or self.stop.terminated
        control.should_training_stop |= self.stop.terminated
