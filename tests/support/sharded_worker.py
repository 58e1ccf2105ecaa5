"""salsa_peft.recipe.worker on CPUs that accelerate is made to take for an accelerator, as distributed_run.py does: FSDP2 and ZeRO-3 without GPUs."""

from __future__ import annotations

import os
import sys
from functools import partial
from typing import Any
from unittest.mock import patch

if __name__ == "__main__":
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    from accelerate.state import DistributedType, PartialState
    from transformers import training_args

    from salsa_peft.models import stage_context
    from salsa_peft.recipe import worker
    from salsa_peft.training.ppo.terminal import updates

    arguments = stage_context.training_arguments

    def on_what_is_there(*given: Any) -> dict[str, Any]:
        """Trainer's arguments without use_cpu, of which accelerate would make DDP."""
        return {**arguments(*given), "use_cpu": False}

    def cut_small_ones_too(prepare: Any, trainer: Any) -> Any:
        """Called for a trainer before it trains; or ZeRO-3 would leave small weights whole, which all are here."""
        made = prepare(trainer)
        if trainer.accelerator.state.deepspeed_plugin is not None:
            found = trainer.accelerator.state.deepspeed_plugin.deepspeed_config
            found["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return made

    with (
        patch.object(stage_context, "remove_printer", partial(cut_small_ones_too, stage_context.remove_printer)),
        patch.object(updates, "replace_printers", partial(cut_small_ones_too, updates.replace_printers)),
        patch.object(PartialState, "_prepare_backend", lambda *_: ("gloo", DistributedType.MULTI_GPU)),
        patch.object(stage_context, "training_arguments", on_what_is_there),
        patch.object(training_args, "is_torch_bf16_gpu_available", lambda: True),  # FSDP2's bf16 needs no GPU
    ):
        worker.main(sys.argv[1], launched=True)
