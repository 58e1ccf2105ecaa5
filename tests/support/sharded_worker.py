"""salsa_peft.recipe.worker on CPUs that accelerate is made to take for an accelerator, as distributed_run.py does: FSDP2 and ZeRO-3 without GPUs."""

from __future__ import annotations

import os
import sys
from typing import Any
from unittest.mock import patch

if __name__ == "__main__":
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    from accelerate.state import DistributedType, PartialState
    from transformers import training_args

    from salsa_peft.models import stage_context
    from salsa_peft.recipe import worker

    arguments = stage_context.training_arguments

    def on_what_is_there(*given: Any) -> dict[str, Any]:
        """Trainer's arguments without use_cpu, of which accelerate would make DDP."""
        return {**arguments(*given), "use_cpu": False}

    remove_printer = stage_context.remove_printer

    def cut_small_ones_too(trainer: Any) -> None:
        """Called by the stages before they train; or ZeRO-3 would leave small weights whole, which all are here."""
        remove_printer(trainer)
        if trainer.accelerator.state.deepspeed_plugin is not None:
            found = trainer.accelerator.state.deepspeed_plugin.deepspeed_config
            found["zero_optimization"]["stage3_param_persistence_threshold"] = 0

    with (
        patch.object(stage_context, "remove_printer", cut_small_ones_too),
        patch.object(PartialState, "_prepare_backend", lambda *_: ("gloo", DistributedType.MULTI_GPU)),
        patch.object(stage_context, "training_arguments", on_what_is_there),
        patch.object(training_args, "is_torch_bf16_gpu_available", lambda: True),  # FSDP2's bf16 needs no GPU
    ):
        worker.main(sys.argv[1], launched=True)
