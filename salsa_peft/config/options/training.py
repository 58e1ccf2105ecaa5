"""Settings that all training stages share, under the names of Transformers' TrainingArguments."""

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from salsa_peft.config.fields import STRICT, Count, NonNegative, Positive, require_multiple


@dataclass(config=STRICT, kw_only=True)
class Training:
    """Settings that all training stages share, under the names of Transformers' TrainingArguments."""

    learning_rate: Positive = 5e-5
    """Peak learning rate."""
    num_train_epochs: Positive = 1.0
    """Number of passes over the data."""
    max_steps: int = -1
    """Number of optimizer steps. −1: as many as num_train_epochs takes."""
    batch_size: Count = 8
    """Number of rows in an optimizer step over all processes."""
    micro_batch_size: Count | None = None
    """Number of rows in a forward pass. None: a process's whole share of the batch. Example: 4."""
    weight_decay: NonNegative = 0.0
    """AdamW's weight decay."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Fraction of the steps, at the start, in which the learning rate rises."""
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    """Learning rate schedule. Source: Transformers."""
    max_grad_norm: Positive = 1.0
    """Maximum norm of the gradient; larger gradients are scaled down to it."""
    optim: Literal["adamw_torch_fused", "adamw_torch", "paged_adamw_32bit", "paged_adamw_8bit"] = "adamw_torch_fused"
    """Optimizer, as in Transformers. The paged ones (bitsandbytes, CUDA) move their state to CPU memory when the GPU is
    full; on a CPU adamw_torch_fused replaces them, with a warning. `precision: stochastic` uses its own optimizer."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    save_steps: Count = 500
    """Number of optimizer steps between two checkpoints. A run that was killed repeats at most that many steps. The
    newest checkpoint is kept, and removed when the stage is finished. Source: Transformers' default."""

    def check(self, section: str, processes: int = 1) -> None:
        """Raise SalsaError if the batch is not divisible into micro-batches on that many processes."""
        micro = self.micro_batch_size
        parts = (micro or 1) * processes
        factors = [f"micro_batch_size {micro}"] * (micro is not None) + [f"num_processes {processes}"] * (processes > 1)
        more = " or change micro_batch_size" if micro is not None else ""
        require_multiple(f"{section}.batch_size", self.batch_size, parts, " × ".join(factors), more)
