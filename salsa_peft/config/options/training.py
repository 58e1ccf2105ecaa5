"""What every training stage takes from a recipe, in TrainingArguments' names."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from salsa_peft.config.fields import STRICT, Count, NonNegative, Positive
from salsa_peft.utils.errors import require


@dataclass(config=STRICT, kw_only=True)
class Training:
    """What every training stage shares, in TrainingArguments' names."""

    learning_rate: Positive = 5e-5
    """Peak."""
    num_train_epochs: Positive = 1.0
    """Passes over the data."""
    max_steps: int = -1
    """Optimizer steps; −1: what the epochs give."""
    batch_size: Count = 8
    """Rows of one optimizer step, global (PPO: responses of one rollout batch)."""
    micro_batch_size: Count | None = None
    """Rows of one forward. None: the whole batch, or a process's share of it."""
    weight_decay: NonNegative = 0.0
    """AdamW's."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the steps in which the rate rises."""
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    """As in Transformers."""
    max_grad_norm: Positive = 1.0
    """Gradients are clipped to this norm."""
    optim: Literal["adamw_torch_fused", "adamw_torch", "paged_adamw_32bit", "paged_adamw_8bit"] = "adamw_torch_fused"
    """As in Transformers. The paged ones (bitsandbytes, CUDA; on a CPU adamw_torch_fused is taken, and said) give way to activations where the
    card is full. `precision: stochastic` brings its own."""
    gradient_checkpointing: bool = False
    """Trade time for memory."""

    def check(self, section: str, processes: int = 1) -> None:
        """Raise SalsaError where the batch does not divide into micro-batches of so many processes."""
        micro = self.micro_batch_size
        parts = (micro or 1) * processes
        factors = [f"micro_batch_size {micro}"] * (micro is not None) + [f"num_processes {processes}"] * (processes > 1)
        require(
            self.batch_size % parts == 0,
            f"{section}.batch_size: found {self.batch_size}, expected a multiple of {' × '.join(factors)};"
            f" set {section}.batch_size={math.ceil(self.batch_size / parts) * parts}"
            f"{' or another micro_batch_size' if micro is not None else ''}",
        )
