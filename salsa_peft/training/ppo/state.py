"""State of a PPO run and of its current update; minibatches; learning rates that changed on resume."""

from __future__ import annotations

import contextlib
import pickle
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from salsa_peft.models.responses import Sequences
from salsa_peft.training.ppo.rollout import Rollout
from salsa_peft.utils.errors import SalsaError

if TYPE_CHECKING:
    from salsa_peft.training.ppo.config import SalsaPPOConfig


class MicroBatch(NamedTuple):
    """The rows of one of Trainer's training steps."""

    rollout: Rollout
    sequences: Sequences
    """The rollout batch's sequences."""
    rows: list[int]
    """Row indices in the rollout batch."""
    tokens: int
    """Number of response tokens in the whole minibatch, over which the losses are averaged."""
    earlier: Sequence[list[int]]
    """Row indices of the previous micro-batches of this optimizer step."""


@dataclass
class PPOState:
    """PPO's state of the run and of the current update, without weights, optimizer and TrainerState."""

    kl_coef: float
    """Current KL coefficient β."""
    sums: Tensor
    """PPOLoss's fields (7,), summed over this process's micro-steps of the current optimizer step."""
    update: int = 0
    """Number of the current update, from 1; 0 before the first."""
    skipped: int = 0
    """Number of minibatches of the run that were skipped because their mean ratio exceeded max_ratio."""
    stopped_early: bool = False
    """Whether the current update makes no further steps, because it reached target_kl."""
    totals: list[list[float]] = field(default_factory=list)
    """For each optimizer step of this update, PPOLoss's fields summed over micro-steps and processes."""
    reward_metrics: dict[str, float] = field(default_factory=dict)
    """Metrics that the reward reported for the current update."""
    rollout: Rollout | None = None
    """Rollout batch of the current update; None between updates."""
    sequences: Sequences | None = None
    """The rollout batch's sequences; None until they are needed."""
    minibatches: list[list[int]] = field(default_factory=list)
    """Row indices of each minibatch of the current update."""
    micro_step: int = 0
    """Index of the next micro-step in its optimizer step, from 0."""
    started: float = 0.0
    """Start time of the current update, from time.perf_counter(); after a resume, moved back by the time before it."""

    def begin_update(self, rollout: Rollout, reward_metrics: dict[str, float]) -> None:
        """Start an update, which trains on `rollout`."""
        self.update += 1
        self.rollout, self.reward_metrics = rollout, reward_metrics
        self.totals, self.stopped_early = [], False

    def trains_critic_only(self, args: SalsaPPOConfig) -> bool:
        """Whether the current update is one of the first `value_warmup_updates`, in which the policy is frozen."""
        return 0 < self.update <= args.value_warmup_updates

    def next_micro_batch(self, args: SalsaPPOConfig, step: int, process: int, processes: int) -> MicroBatch:
        """The next micro-batch of process number `process`. step: index of the optimizer step in the update."""
        assert self.rollout is not None
        if self.sequences is None:
            self.sequences = Sequences(self.rollout.responses, args.min_new_tokens)
            self.minibatches = minibatches(self.sequences.lengths, args, self.update)
        minibatch, position, size = self.minibatches[step], self.micro_step, args.per_device_train_batch_size
        own = [minibatch[start : start + size] for start in range(0, len(minibatch), size)][process::processes]
        self.micro_step = (position + 1) % args.gradient_accumulation_steps
        tokens = sum(self.sequences.responses[row] for row in minibatch)
        return MicroBatch(self.rollout, self.sequences, own[position], tokens, own[:position])

    def end_update(self) -> None:
        """Discard the rollout batch when the update is finished."""
        self.rollout, self.sequences, self.minibatches, self.totals = None, None, [], []

    def abandon_update(self) -> None:
        """Discard the update that an error or Ctrl-C interrupted in an earlier call of train(), if any.

        Such an update was not logged, and its number is used again.
        """
        if self.rollout is not None:
            self.update -= 1
        self.end_update()
        self.micro_step, self.stopped_early = 0, False
        self.take_sums()

    def take_sums(self) -> Tensor:
        """Return `sums` at the end of an optimizer step, and reset them to 0."""
        sums, self.sums = self.sums, torch.zeros_like(self.sums)
        return sums

    def state_dict(self) -> dict[str, Any]:
        """The state for salsa_state.json, between two optimizer steps. It lacks the rollout batch."""
        seconds = 0.0 if self.rollout is None else time.perf_counter() - self.started
        return {key: vars(self)[name] for key, name in SAVED.items()} | {"seconds": seconds}

    def load_state_dict(self, state: dict[str, Any], rollout: Rollout | None) -> None:
        """Restore what `state_dict` returned, and the rollout batch if it was saved within an update."""
        for key, name in SAVED.items():
            setattr(self, name, state[key])
        # checkpoints of earlier versions have no seconds
        self.rollout, self.started = rollout, time.perf_counter() - state.get("seconds", 0.0)


SAVED = {name: name for name in ("update", "kl_coef", "skipped", "stopped_early", "totals")}
SAVED["figures"] = "reward_metrics"
"""Keys in salsa_state.json → attributes of PPOState."""


def minibatches(lengths: Sequence[int], args: SalsaPPOConfig, update: int) -> list[list[int]]:
    """Row indices of each minibatch, sorted by `lengths`. The rollout batch is shuffled in every PPO epoch."""
    found = []
    for epoch in range(args.num_ppo_epochs):
        generator = torch.Generator().manual_seed(args.seed + 7919 * update + epoch)
        shuffled = torch.randperm(len(lengths), generator=generator).tolist()
        parts = [shuffled[start : start + args.minibatch_size] for start in range(0, len(lengths), args.minibatch_size)]
        found += [sorted(part, key=lambda row: lengths[row]) for part in parts]
    return found


def update_learning_rates(optimizer: Any, scheduler: Any, saved: Mapping[str, Any], args: SalsaPPOConfig) -> None:
    """Apply changed learning rates to an optimizer and a schedule that were loaded from a checkpoint.

    saved: the checkpoint's options. The position in the schedule stays: the new learning rate is multiplied by the
    schedule's current factor.
    """
    if all(saved[key] == vars(args)[key] for key in ("learning_rate", "value_head_learning_rate")):
        return
    state = scheduler.state_dict()
    head = None if args.value_head_learning_rate is None else len(optimizer.param_groups) - 1
    rates = list(state.get("base_lrs", ()))
    for index, group in enumerate(optimizer.param_groups):
        key = "value_head_learning_rate" if index == head else "learning_rate"
        before, now = saved[key], vars(args)[key]
        if before != now:
            rate = now * (float(group["lr"]) / before if before else 1.0)
            is_tensor = isinstance(group["lr"], Tensor)  # torchao's optimizers require one
            group.update(lr=torch.full_like(group["lr"], rate) if is_tensor else rate, initial_lr=now)
            rates[index : index + 1] = [now] * bool(rates)
    if rates:
        scheduler.load_state_dict(
            {**state, "base_lrs": rates, "_last_lr": [group["lr"] for group in optimizer.param_groups]}
        )


@contextlib.contextmanager
def no_pickles(checkpoint: str | None) -> Iterator[None]:
    """Context that raises SalsaError if torch.load refuses a pickle that holds more than tensors."""
    try:
        yield
    except pickle.UnpicklingError as error:
        raise SalsaError(
            f"{checkpoint}: one of its .pt or .pth files holds more than tensors and numbers, which"
            " training does not write, so the file was not loaded. Resume from another checkpoint"
        ) from error


def checkpoint_size(model: nn.Module, optimizer: torch.optim.Optimizer, rollout: Rollout | None) -> int:
    """Size in bytes of a checkpoint's trained weights, optimizer states and rollout batch."""
    tensors: list[Tensor] = [parameter for parameter in model.parameters() if parameter.requires_grad]
    tensors += [entry for state in optimizer.state.values() for entry in state.values() if isinstance(entry, Tensor)]
    if rollout is not None:
        tensors += [*rollout.responses, *(field for field in rollout if isinstance(field, Tensor))]
    return sum(map(stored_size, tensors))


def stored_size(tensor: Tensor) -> int:
    """Size in bytes of a tensor in a file.

    For a tensor subclass (torchao's 8-bit states) it is the size of the tensors inside.
    """
    if is_traceable_wrapper_subclass(tensor):
        return sum(stored_size(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.nbytes
