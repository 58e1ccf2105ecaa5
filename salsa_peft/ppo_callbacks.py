"""PPO at the points where transformers.Trainer calls back: wild minibatches, an update's end, being told to stop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from salsa_peft.models import sharding

if TYPE_CHECKING:
    from salsa_peft.ppo import SalsaPPOTrainer
    from salsa_peft.ppo_resume import ResumableTrainer


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
