"""`salsa run` for test_launching.py: FSDP2 on CPUs, by tests/support/sharded_worker.py."""

from __future__ import annotations

import sys
from pathlib import Path

from salsa_peft.config.schema import Recipe
from salsa_peft.recipe import launch as launching
from salsa_peft.recipe import run as recipe

launch = launching.command


def command(given: Recipe, folder: Path, threads: str) -> list[str]:
    """With a worker that accelerate takes for a GPU's."""
    words = launch(given, folder, threads)
    return ["sharded_worker" if word == "salsa_peft.recipe.launch" and given.sharded else word for word in words]


if __name__ == "__main__":
    launching.command, launching.check = command, lambda _: None
    sys.exit(recipe.main())
