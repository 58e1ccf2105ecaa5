"""SalsaPPOConfig: TrainingArguments and the engine's options. And the order in which prompts come."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader, Sampler
from transformers import TrainingArguments

from .config import PPO, PPOOptions, Sampling, require


@dataclass
class SalsaPPOConfig(PPOOptions, Sampling, TrainingArguments):
    """TrainingArguments and the engine's options (`PPOOptions`, `Sampling`). Batch sizes are responses, of all processes together;
    micro_batch_size and rollout_batch_size those of one process.

    `per_device_train_batch_size` and `gradient_accumulation_steps` follow from the three batch fields and are not read.
    """

    learning_rate: float = PPO.learning_rate
    """Paper A.3."""
    num_train_epochs: float = PPO.num_train_epochs
    """Passes over the prompts."""
    batch_size: int = PPO.batch_size
    """Responses of a rollout batch."""
    micro_batch_size: int | None = None
    """Responses of one forward and backward. None: a process's whole share of the minibatch."""
    eval_samples: int = 4
    """Responses of each evaluation that eval_completions.jsonl keeps."""

    def __post_init__(self) -> None:
        self.check_batches("", self.batch_size, self.micro_batch_size)
        self.check_options("")
        self.remove_unused_columns = False
        self.logging_nan_inf_filter = False
        self.per_device_train_batch_size = self.gradient_accumulation_steps = 1  # until the processes are counted
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False
        super().__post_init__()
        require(
            self.n_gpu <= 1,
            f"SalsaPPOConfig: found {self.n_gpu} GPUs in one process, expected one; use accelerate launch",
        )
        self._share_out()
        require(
            self.min_new_tokens <= self.max_new_tokens,
            f"min_new_tokens: found {self.min_new_tokens}, expected at most max_new_tokens = {self.max_new_tokens}",
        )
        require(
            not self.save_only_model,
            "save_only_model: found true, expected false: PPO can't go on from weights alone; save_model() saves them",
        )
        require(
            not self.load_best_model_at_end,
            "load_best_model_at_end: found true, expected false: PPO keeps its last policy; the checkpoints have the others",
        )

    def _share_out(self) -> None:
        """The micro-batch of one process and the accumulation steps, from the global batches and the number of processes."""
        world = self.world_size
        share, rest = divmod(self.minibatch_size, world)
        require(
            rest == 0,
            f"batch_size / num_mini_batches: found minibatches of {self.minibatch_size} responses for {world} processes,"
            " expected a multiple of them",
        )
        micro = self.micro_batch_size or share
        require(
            share % micro == 0,
            f"micro_batch_size: found {micro}, expected a divisor of {share}, the responses of a minibatch that each of"
            f" {world} processes has",
        )
        self.per_device_train_batch_size = micro
        self.gradient_accumulation_steps = share // micro
        local = self.batch_size // world
        rollout = self.rollout_batch_size or local
        require(
            world == 1 or local % rollout == 0,
            f"rollout_batch_size: found {rollout}, expected a divisor of {local}, the responses that each of {world} processes has",
        )

    @property
    def minibatch_size(self) -> int:
        """Responses of one optimizer step."""
        return self.batch_size // self.num_mini_batches

    @property
    def steps_per_update(self) -> int:
        """Optimizer steps that one rollout batch gives."""
        return self.num_ppo_epochs * self.num_mini_batches

    @property
    def micro_steps(self) -> int:
        """Forwards and backwards that one rollout batch gives."""
        return self.steps_per_update * self.gradient_accumulation_steps


class RolloutBatches(Sampler[list[int]]):
    """Row indices of a rollout batch, each batch repeated once for every micro-step; a new order each epoch.

    The rows that don't fill the last batch of an epoch are left out of it.
    """

    def __init__(self, rows: int, batch_size: int, repeats: int, seed: int) -> None:
        self.rows, self.batch_size, self.repeats, self.seed, self.epoch = rows, batch_size, repeats, seed, 0

    def __len__(self) -> int:
        return self.rows // self.batch_size * self.repeats

    def set_epoch(self, epoch: int) -> None:
        """Called by transformers.Trainer, also where it resumes in the middle of an epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(
            self.rows, generator=torch.Generator().manual_seed(self.seed + 1_000_003 * self.epoch)
        ).tolist()
        for start in range(0, self.rows // self.batch_size * self.batch_size, self.batch_size):
            for _ in range(self.repeats):
                yield order[start : start + self.batch_size]


class RolloutLoader(DataLoader):
    """A DataLoader whose epoch reaches its batches."""

    def set_epoch(self, epoch: int) -> None:
        """Called by transformers.Trainer."""
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]
