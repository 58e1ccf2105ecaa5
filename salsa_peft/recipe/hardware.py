"""The GPUs that a process here can use, as nvidia-smi names them, and whether a recipe can do without one. Imports no torch."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
from collections.abc import Collection
from typing import NamedTuple

from salsa_peft.config.schema import Recipe
from salsa_peft.models.architectures.memory import CONTEXT, GIB, STAGES, estimate, stages_of
from salsa_peft.models.architectures.sizes import architecture_of_recipe
from salsa_peft.utils.errors import require

LARGE = 2_000_000_000
"""Parameters of a base that no CPU trains in a lifetime."""

SOLD = (16, 24, 40, 48, 80, 141, 192)
"""GiB of cards that there are."""


class Card(NamedTuple):
    """A GPU."""

    name: str
    bytes: int


def cards() -> list[Card]:
    """Those that CUDA_VISIBLE_DEVICES leaves; none where nvidia-smi is missing, fails or takes more than five seconds."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=uuid,name,memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    found: dict[str, Card] = {}
    for line in done.stdout.splitlines() if done.returncode == 0 else ():
        identity, _, rest = line.partition(",")
        name, _, size = rest.rpartition(",")
        if size.strip().isdigit():
            found[identity.strip()] = Card(name.strip(), int(size) * 2**20)
    return _visible(found, os.environ.get("CUDA_VISIBLE_DEVICES"))


def _sold(size: float) -> int:
    """GiB of the smallest card that holds so many bytes."""
    return next((card for card in SOLD if card * GIB >= size), math.ceil(size / GIB))


def _visible(found: dict[str, Card], words: str | None) -> list[Card]:
    """Of cards by UUID those that CUDA_VISIBLE_DEVICES names, by number or by the start of a UUID, in its order. A part of a card (MIG)
    is taken for the first whole one: how large it is nvidia-smi's list does not say."""
    there = list(found.values())
    if words is None or not there:
        return there
    chosen: list[Card] = []
    for word in filter(None, map(str.strip, words.split(","))):
        if word.startswith("MIG"):
            chosen.append(there[0])
        elif word.isdigit():
            chosen += there[int(word) : int(word) + 1]
        else:
            chosen += [card for identity, card in found.items() if identity.startswith(word)][:1]
    return chosen


def planned_mb(recipe: Recipe, stage: str) -> float | None:
    """What models/architectures/memory.py says a stage holds of the GPU that is here, without CUDA's own; None for one that holds no base."""
    size, there = architecture_of_recipe(recipe), cards()
    if size is None or stage not in stages_of(recipe):
        return None
    found = estimate(recipe, stage, size, there[0].bytes if there else None)
    return round((found.total - CONTEXT) / 1e6, 1)


def check_device(recipe: Recipe, there: list[Card], stages: Collection[str] = STAGES) -> list[str]:
    """Raise SalsaError for a large base without a GPU; → warnings of stages that won't fit, a line each. stages: those that will run."""
    size = architecture_of_recipe(recipe)
    asked = [stage for stage in stages_of(recipe) if stage in stages]
    if size is None or not asked:
        return []
    card = (
        float(there[0].bytes) if there else 0.0
    )  # no card: the least is asked for, which is bf16 weights where `auto` may choose
    needs = {stage: estimate(recipe, stage, size, card) for stage in asked}
    most = max(needs.values(), key=lambda one: one.total)
    require(
        bool(there) or size.parameters < LARGE,
        f"model.base: found a model of {size.parameters / 1e9:.1f} B parameters and no CUDA GPU (nvidia-smi names none), expected one of"
        f" at least about {most.total / GIB:.0f} GiB for {most.stage}; --dry-run --gpu {_sold(most.total)} shows what each stage needs",
    )
    return [
        f"{stage} may not fit: about {found.total / GIB:.1f} GiB in {found.phase}, {there[0].name} has {there[0].bytes / GIB:.0f};"
        " --dry-run says what would help"
        for stage, found in needs.items()
        if there and found.total > there[0].bytes
    ]
