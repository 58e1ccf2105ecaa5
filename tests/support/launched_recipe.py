"""`salsa run` for test_launching.py: FSDP2 on CPUs, by tests/support/sharded_worker.py."""

from __future__ import annotations

import sys

from salsa_peft.config.schema import Recipe
from salsa_peft.recipe import processes
from salsa_peft.recipe.__main__ import main as salsa_run
from salsa_peft.recipe.estimates import hardware

launch_command = processes.launch_command


def command(given: Recipe, address: str) -> list[str]:
    """With a worker that accelerate takes for a GPU's."""
    words = launch_command(given, address)
    return ["sharded_worker" if word == "salsa_peft.recipe.worker" and given.sharded else word for word in words]


if __name__ == "__main__":
    processes.launch_command, hardware.check_processes = command, lambda _: None
    sys.exit(salsa_run())
