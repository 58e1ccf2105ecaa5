"""The quickstart, cut small, and what lies in its run folder."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from salsa_peft.config.load import LoadedRecipe, load_recipe
from salsa_peft.data.check import check_local
from salsa_peft.models.architectures.checks import check

SMALL = {
    "toy.pretrain_steps": 60, "toy.pretrain_examples": 1000, "toy.demonstrations": 64, "toy.preferences": 128, "toy.prompts": 32,
    "toy.eval_prompts": 16, "toy.hidden_size": 32, "sft.num_train_epochs": 2, "reward.num_train_epochs": 1, "reward.batch_size": 16,
    "sft.seeds": [0, 1, 2], "ppo.batch_size": 16, "ppo.num_mini_batches": 2, "ppo.num_ppo_epochs": 1, "landscape.resolution": 1,
    "landscape.alphas": [0.0, 0.5, 1.0], "landscape.scales": [0.6], "export": ["merged"], "evaluate.models": ["seed-1", "base"],
    "policies": {"ppo": {"reference": "seed-0"}, "salsa": {"reference": "soup"},
                 "mkl": {"reference": ["seed-0", {"soup": {"members": [1, 2]}}, {"shrunk": {"seed": 0, "scale": 0.6}}, "base"]}},
}  # fmt: skip


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def unit(run: Path, name: str) -> Path:
    """The one finished folder of a unit."""
    (found,) = [path.parent for path in (run / "stages" / name).glob("*/manifest.json")]
    return found


def read(path: Path) -> Any:
    """A JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def load_checked(path_or_name: str, *, lora: str | None, overrides: list[str]) -> LoadedRecipe:
    """load_recipe with the checks of `salsa run`: the local data, and the base's config.json."""
    return load_recipe(path_or_name, lora=lora, overrides=overrides, more=(check_local, check))
