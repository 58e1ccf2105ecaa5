"""What test_distributed.py runs in its own process and launches in two: small PPO runs, one after the other.

    accelerate launch --config_file recipes/accelerate/fsdp2.yaml --num_processes 2 tests/support/distributed_run.py OUT lora full fsdp2/lora …

For CPUs accelerate knows DDP only, and makes that of an FSDP configuration in silence. In a run named fsdp2/… or zero3/… it is made to
take the CPU processes for those of an accelerator.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate.state import DistributedType, PartialState
from accelerate.utils import gather_object
from plain_ppo import PROMPTS
from safetensors.torch import save_file
from tiny import make_base, make_trainer
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from salsa_peft.data.toy import make_tokenizer
from salsa_peft.training import checkpoints
from salsa_peft.training.ppo.trainer import SalsaPPOTrainer

COMMON: dict[str, Any] = {
    "num_mini_batches": 2, "num_ppo_epochs": 2, "learning_rate": 1e-2, "micro_batch_size": 1, "save_strategy": "steps", "save_steps": 3,
}  # fmt: skip
RUNS: dict[str, dict[str, Any]] = {
    "lora": {"normalize_scores": True, "whiten_rewards": True, "value_head_learning_rate": 3e-2, "gradient_checkpointing": True,
             "eval_strategy": "steps", "eval_steps": 4, "kl_estimator": "full"},
    "full": {"full": True, "old_logprobs": "rollout", "target_kl": 2e-3, "rollout_batch_size": 2, "num_ppo_epochs": 4},
    "tied": {"full": True, "base": {"tie_word_embeddings": True}, "micro_batch_size": None},
    "split": {"importance_sampling_correction": True, "micro_batch_size": None, "micro_batch_tokens": 24, "rollout_batch_size": 4},
    "value": {"value": "adapter", "reward": "reward", "gradient_checkpointing": True, "references": ["seed-0", "base"]},
    "group": {"value": "group", "num_generations": 4, "old_logprobs": "rollout", "num_train_epochs": 0.25},
    "warmup": {"value_warmup_updates": 1, "lam_value": 1.0, "value_head_learning_rate": 3e-2},
    "long": {"num_train_epochs": 1000, "save_strategy": "no", "num_mini_batches": 1, "num_ppo_epochs": 1, "micro_batch_size": None,
             "max_new_tokens": 40, "min_new_tokens": 40},
}  # fmt: skip
FSDP2, ZERO3, RESUMED = "fsdp2/", "zero3/", "+resumed"


def write_reference(out: Path) -> None:
    """What runs of full weights load; written before they start."""
    make_base(make_tokenizer(), 1).save_pretrained(out / "reference")


def make(name: str, out: Path) -> SalsaPPOTrainer:
    """A trainer of run `name`, in the folder of that name."""
    options = COMMON | RUNS[name.removeprefix(FSDP2).removeprefix(ZERO3).removesuffix(RESUMED)]
    if "full" in options:
        options["references"] = [str(out / "reference")]
    if "reward" in options:
        options["reward"] = str(out / "reward")
    if "eval_steps" in options:
        options["eval_dataset"] = PROMPTS[:5]
    return make_trainer(make_tokenizer(), out / name, use_cpu=not name.startswith((FSDP2, ZERO3)), **options)


def run(name: str, out: Path) -> None:
    """Train; a run of the name `…+resumed` from the oldest checkpoint of the run before the plus, in the middle of an update, and once
    more from its end."""
    trainer = make(name, out)
    state, first = trainer.accelerator.state, name.removesuffix(RESUMED)
    if name.startswith(ZERO3):  # or it would leave the small ones whole, which all are here
        state.deepspeed_plugin.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    if name != first and trainer.is_world_process_zero():
        shutil.copytree(out / first, out / name, dirs_exist_ok=True)
        for folder in checkpoints.checkpoints(out / name)[:-1]:
            shutil.rmtree(folder)
    trainer.accelerator.wait_for_everyone()
    (out / name / f"pid-{trainer.args.process_index}").write_text(str(os.getpid()))
    forwards: list[None] = []
    trainer.model.register_forward_hook(lambda *_: forwards.append(None) if torch.is_grad_enabled() else None)
    trainer.train(resume_from_checkpoint=name != first)
    trainer.save_model(str(out / name / "saved"))
    held = sum(local(p).numel() for p in trainer.model.parameters())
    pieces = sum(isinstance(module, FSDPModule) for module in trainer.model.modules())
    world = {"kind": state.distributed_type.value, "held": gather_object([held]), "pieces": pieces,
             "forwards": gather_object([len(forwards)])}  # fmt: skip
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if trainer.is_world_process_zero():
        (out / name / "world.json").write_text(json.dumps(world))
        save_file({key: tensor.clone() for key, tensor in weights.items()}, out / name / "weights.safetensors")
    if name != first:
        ended = make(name, out)
        ended.train(resume_from_checkpoint=True)
        ended.save_model(str(out / name / "ended"))


def local(parameter: Any) -> Any:
    """This process's piece of it."""
    if isinstance(parameter, DTensor):
        return parameter.to_local()
    return parameter.ds_tensor if "ds_tensor" in vars(parameter) else parameter


def main(out: Path, names: list[str]) -> None:
    """Losses and figures are in OUT/RUN/metrics.jsonl, weights in OUT/RUN/weights.safetensors, the world in OUT/RUN/world.json."""
    torch.set_num_threads(1)
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    for name in names:
        as_gpus = patch.object(PartialState, "_prepare_backend", lambda *_: ("gloo", DistributedType.MULTI_GPU))
        with as_gpus if name.startswith((FSDP2, ZERO3)) else nullcontext():
            run(name, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
