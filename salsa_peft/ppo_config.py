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
    """TrainingArguments and the engine's options (`PPOOptions`, `Sampling`). Batch sizes are responses, of all processes.

    `per_device_train_batch_size` and `gradient_accumulation_steps` follow from the three batch fields and are not read.
    """

    learning_rate: float = PPO.learning_rate
    """Paper A.3."""
    num_train_epochs: float = PPO.num_train_epochs
    """Passes over the prompts."""
    batch_size: int = PPO.batch_size
    """Responses of a rollout batch."""
    micro_batch_size: int | None = None
    """Responses of one forward and backward. None: the whole minibatch."""

    def __post_init__(self) -> None:
        self.check_batches("", self.batch_size, self.micro_batch_size)
        self.per_device_train_batch_size = self.micro_batch_size or self.minibatch_size
        self.gradient_accumulation_steps = self.minibatch_size // self.per_device_train_batch_size
        self.remove_unused_columns = False
        self.logging_nan_inf_filter = False
        super().__post_init__()
        require(
            self.min_new_tokens <= self.max_new_tokens,
            f"min_new_tokens: found {self.min_new_tokens}, expected at most max_new_tokens = {self.max_new_tokens}",
        )
        require(self.n_gpu <= 1, f"SalsaPPOConfig: found {self.n_gpu} GPUs, expected one; set CUDA_VISIBLE_DEVICES=0")
        require(
            self.world_size == 1,
            f"SalsaPPOConfig: found {self.world_size} processes, expected one; unset accelerate launch",
        )

    @property
    def minibatch_size(self) -> int:
        """Responses of one optimizer step."""
        return self.batch_size // self.num_mini_batches

    @property
    def micro_steps(self) -> int:
        """Forwards and backwards that one rollout batch gives."""
        return self.num_ppo_epochs * self.num_mini_batches * self.gradient_accumulation_steps


class RolloutBatches(Sampler[list[int]]):
    """Row indices of a rollout batch, each batch repeated once for every micro-step; a new order each epoch.

    The rows that don't fill the last batch of an epoch are left out of it.
    """

    def __init__(self, rows: int, batch_size: int, repeats: int, seed: int) -> None:
        self.rows, self.batch_size, self.repeats, self.seed, self.epoch = rows, batch_size, repeats, seed, 0

    def __len__(self) -> int:
        return self.rows // self.batch_size * self.repeats

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
        self.batch_sampler.epoch = epoch  # type: ignore[union-attr]
