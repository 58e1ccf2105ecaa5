"""What a run writes, counted from config.json before anything is written, against what is free where its results go.

    need at one time = what is done by then + max(checkpoints of the policy that trains, its last ones and the policy itself)

Left out: logs, answers, reports and tokenizers, which are megabytes; what the Hub's cache takes; quotas, which a disk does not tell of.
Held against runs on a CPU: tests/recipe/test_disk.py. Imports no torch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from salsa_peft.config.options.trl import ALGORITHMS
from salsa_peft.config.schema import Adapter, Recipe
from salsa_peft.data.check import count_rows
from salsa_peft.models.architectures import memory
from salsa_peft.models.architectures.sizes import Architecture, architecture_of_recipe
from salsa_peft.recipe import hardware
from salsa_peft.recipe.cache import Step
from salsa_peft.utils.errors import SalsaError
from salsa_peft.utils.files import existing_parent, size_text

AT_ONCE = 3
"""Checkpoints of a policy: two are kept, the next is whole before the oldest goes."""
MANY = 100_000
"""Optimizer steps of a policy whose prompts are not at hand (the paper's: 61,000)."""
ZERO3 = 6
"""Bytes a weight that DeepSpeed's part of a checkpoint has beside the states: float32 and bf16 weights."""


class Need(NamedTuple):
    """Bytes."""

    stays: float
    """When all is done."""
    most: float
    """At one time on the way."""
    free: int
    place: Path
    """The folder, or the nearest that is there, on whose disk they must fit."""


def need(recipe: Recipe, steps: dict[str, Step], asked: Collection[str], card: float | None) -> Need | None:
    """What the units that will be made add to the disk; None where the base's size is not known. card: bytes, for `precision: auto`.

    What lies in an unfinished unit's folder is made anew or gone on with, so it counts as free.
    """
    size, made = (
        architecture_of_recipe(recipe),
        [step for name, step in steps.items() if name in asked and step.why is not None],
    )
    if size is None or not steps:
        return None
    stays = most = 0.0
    for step in made:
        there = bytes_in(step.folder)
        kept, way = written(recipe, step.unit.stage, size, card)
        most = max(most, stays - there + way)
        stays += kept - there
    folder = next(iter(steps.values())).folder
    place = existing_parent(folder)
    return Need(stays, max(most, stays), shutil.disk_usage(place).free, place)


def bytes_in(folder: Path) -> int:
    """Of all its files; a plan may look while another process writes and removes them."""
    found = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                found += os.stat(os.path.join(place, name)).st_size
    return found


def written(recipe: Recipe, stage: str, size: Architecture, card: float | None) -> tuple[float, float]:
    """Bytes of one unit of a stage: what stays, and the most on the way."""
    width, one, count = _width(recipe, size, card), 4.0, size.parameters
    if recipe.adapter is None:
        one = width
    else:
        count = size.adapter(recipe.adapter.r, recipe.adapter.target_modules)
    if stage == "ppo":
        return _policy(recipe, size, card, width)
    kept = {"toy": 4.0 * size.parameters, "sft": one * count, "soup": one * count}.get(stage, 0.0)
    if stage in ALGORITHMS:  # TRL's: no checkpoints
        kept = one * count + (width * size.parameters if recipe.adapter and "merged" in recipe.export else 0.0)
    if stage == "soup" and recipe.adapter is not None:
        rank = recipe.soup.rank or recipe.adapter.r * len(recipe.soup.members)
        kept = one * size.adapter(rank, recipe.adapter.target_modules)
    if stage == "reward":  # with a head for its output embeddings; of several seeds each, and their soup
        seeds = len(recipe.reward.seeds)
        body = count - size.head if recipe.adapter is None else count
        kept = one * (body + size.hidden) * (seeds + (seeds > 1))
    return kept, kept


def _policy(recipe: Recipe, size: Architecture, card: float | None, width: float) -> tuple[float, float]:
    """A policy, and its checkpoints: weights as they train, the optimizer's states (training/ppo/saving.py)."""
    ppo, lora = recipe.ppo, recipe.adapter
    precision = memory.choose_precision(recipe, "ppo", card, size) if lora is None else "master"
    weight, _, states = memory.TRAINED[precision]
    if precision == "master":
        states = memory.STATES.get(ppo.optim, states)
    if recipe.sharded and recipe.accelerate == "zero3":
        states += ZERO3
    count, kept = size.parameters, width * size.parameters
    if lora is not None:
        count = size.adapter(lora.r, lora.target_modules) * (2 if ppo.value == "adapter" else 1)
        kept = 4.0 * count + (width * size.parameters if "merged" in recipe.export else 0.0)
    checkpoint = (weight + states) * count
    saved = math.ceil(_steps(recipe) / ppo.save_steps)  # one at the end in any case
    return kept, max(min(saved, AT_ONCE) * checkpoint, min(saved, AT_ONCE - 1) * checkpoint + kept)


def _steps(recipe: Recipe) -> int:
    """Optimizer steps of a policy, MANY where they are not known."""
    ppo = recipe.ppo
    if ppo.max_steps > 0:
        return ppo.max_steps
    source, toy = recipe.data.prompts, recipe.toy
    rows = toy.prompts if source is None and toy is not None else None if source is None else count_rows(source)
    return MANY if rows is None else math.ceil(rows // ppo.batch_size * ppo.num_train_epochs) * ppo.steps_per_update


def _width(recipe: Recipe, size: Architecture, card: float | None) -> int:
    """Bytes of a weight of the base's dtype, by `auto` float32 where there is no card and it is small enough to do without."""
    on_cpu = recipe.model.dtype == "auto" and card is None and size.parameters < hardware.LARGE
    return 4 if recipe.model.dtype == "float32" or on_cpu else 2


def told(recipe: Recipe, steps: dict[str, Step], asked: Collection[str], card: float | None) -> str:
    """A line for the plan."""
    found = need(recipe, steps, asked, card)
    if found is None:
        return f"disk: known when the config.json of {recipe.model.base} is at hand"
    short = "" if found.most <= found.free else f": too little; {remedy(recipe, steps, asked, card)}"
    return (
        f"disk: {size_text(found.stays)} more when all is done, at most {size_text(found.most)} at one time; {size_text(found.free)} free on"
        f" the disk of {found.place}{short}"
    )


def check(recipe: Recipe, steps: dict[str, Step], asked: Collection[str]) -> None:
    """Raise SalsaError where what will be written can't fit. steps: the plan; an empty one writes nothing."""
    card = next((float(one.bytes) for one in hardware.gpus()), None)
    found = need(recipe, steps, asked, card)
    if found is not None and found.most > found.free and shutil.disk_usage(found.place).total > 0:
        raise SalsaError(
            f"results: found {size_text(found.free)} free on the disk of {found.place}, expected {size_text(found.most)}, of which"
            f" {size_text(found.stays)} stay; {remedy(recipe, steps, asked, card)}"
        )


def remedy(recipe: Recipe, steps: dict[str, Step], asked: Collection[str], card: float | None) -> str:
    """What to do: another disk, and what would make it fit on this one."""
    adapters = dataclasses.replace(recipe, adapter=recipe.adapter or Adapter(), offload="none", precision="auto")
    rare = max(_steps(recipe), recipe.ppo.save_steps)
    seldom = dataclasses.replace(recipe, ppo=dataclasses.replace(recipe.ppo, save_steps=rare))
    offered = {f"--set ppo.save_steps={rare} (one checkpoint a policy, at its end)": seldom, "--lora": adapters}
    found = [words for words, other in offered.items() if _fits(other, steps, asked, card)]
    return ", or ".join(["take --output-dir on a larger disk", *found])


def _fits(recipe: Recipe, steps: dict[str, Step], asked: Collection[str], card: float | None) -> bool:
    found = need(recipe, steps, asked, card)
    return found is not None and found.most <= found.free
