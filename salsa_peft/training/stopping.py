"""Stopping training: after SIGTERM; in PPO also after a guard's alarm or, between updates, at a callback's request."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

if TYPE_CHECKING:
    from accelerate import Accelerator


class Interrupted(Exception):
    """Raised to end the sampling of responses after SIGTERM."""


class GracefulStop:
    """Records that training has to stop, because of SIGTERM or a guard's alarm with action stop.

    The signal handler only sets a flag, which is read before each sampled token and after each optimizer step.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.terminated, self.alarm = False, ""

    @property
    def requested(self) -> bool:
        """Whether training has to stop."""
        return self.terminated or bool(self.alarm)

    def reset(self) -> None:
        """Clear what an earlier call of train() recorded."""
        self.terminated, self.alarm = False, ""

    def check(self) -> None:
        """Raise Interrupted if SIGTERM has arrived."""
        if self.terminated:
            raise Interrupted

    def synchronize(self) -> None:
        """Record SIGTERM in all processes if one of them has received it."""
        if self.accelerator.num_processes > 1:
            flag = torch.tensor(float(self.terminated), device=self.accelerator.device)
            self.terminated = bool(self.accelerator.reduce(flag, "sum").item())

    @contextlib.contextmanager
    def handle_sigterm(self) -> Iterator[None]:
        """Context in which SIGTERM sets the flag. It has no effect outside Python's main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def set_flag(*_: Any) -> None:
            self.terminated = True

        previous = signal.signal(signal.SIGTERM, set_flag)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, previous)


class StopBetweenUpdates(TrainerCallback):
    """Delays another callback's request to stop training, or to stop an epoch, to the end of the update.

    Metrics are logged at the end of an update, so an incomplete update would not be logged. This must be the last
    callback. may_stop: returns whether training may stop at once (no update is running, or SIGTERM has arrived).
    """

    def __init__(self, may_stop: Callable[[], bool]) -> None:
        self.may_stop, self.training, self.epoch = may_stop, False, False

    def _delay(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.training |= control.should_training_stop
        self.epoch |= control.should_epoch_stop
        now = self.may_stop()
        control.should_training_stop, control.should_epoch_stop = self.training and now, self.epoch and now

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Clear the request to stop the previous epoch, which has ended."""
        self.epoch = False

    on_substep_end = on_step_end = on_log = on_evaluate = on_save = _delay
