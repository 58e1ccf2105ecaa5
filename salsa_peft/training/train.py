"""The one function through which every stage with a trainer of TRL's trains its model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from salsa_peft.models.precision import make_trained_float32, require_float32, rounds_stochastically

if TYPE_CHECKING:
    from transformers import Trainer


def run_trainer(trainer: Trainer) -> float:
    """Train with a TRL trainer and return the mean training loss of all processes.

    All trained weights are made float32 first: LoRA factors, DoRA magnitudes, score heads, modules_to_save, trained
    tokens and full weights. Two kinds are left as they are: full weights whose optimizer rounds stochastically, and the
    weights of DeepSpeed, whose optimizer holds float32 copies. Raises SalsaError if a trained weight is not float32.
    """
    model = trainer.model
    if not trainer.is_deepspeed_enabled:
        if not rounds_stochastically(trainer.args):
            make_trained_float32(model)
        require_float32(model, trainer.args)
    return mean_loss(trainer, trainer.train().training_loss)


def mean_loss(trainer: Trainer, loss: float) -> float:
    """The mean of the processes' training losses. Trainer's own value omits other processes' last steps."""
    if trainer.accelerator.num_processes == 1:
        return loss
    own = torch.tensor(loss, dtype=torch.float64, device=trainer.accelerator.device)
    return trainer.accelerator.reduce(own, "mean").item()
