"""An estimate of the disk space that a run needs, from the base's config.json.

    peak = finished results + max(checkpoints of the unit in training, its last checkpoints + the finished unit)

The estimate leaves out tokenized training data (8 bytes a token), small files (logs, answers, reports, tokenizers) and the
Hub's cache. It ignores disk quotas, which cannot be queried. The estimates are compared with real runs in
tests/recipe/test_disk.py. torch is not imported.
"""

import contextlib
import dataclasses
import math
import os
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

from salsa_peft.config.job import recipe_of_unit
from salsa_peft.config.options.trl import ALGORITHMS
from salsa_peft.config.schema import Adapter, Recipe
from salsa_peft.data.check import number_of_rows
from salsa_peft.models.architectures import memory
from salsa_peft.models.architectures.sizes import Architecture, architecture_of_recipe
from salsa_peft.recipe.cache import Plan
from salsa_peft.recipe.estimates import hardware
from salsa_peft.utils.errors import SalsaError
from salsa_peft.utils.files import existing_parent, size_text

AT_ONCE = 3
"""Largest number of PPO's checkpoints at a time: two, and a third until the oldest is removed."""
AT_ONCE_TRL = 2
"""Largest number of checkpoints of the other stages at a time: one, and the next one until the first is removed."""
MANY = 100_000
"""Assumed number of a policy's steps if the number of prompts is not known (61,000 in the paper)."""
ZERO3 = 6
"""Bytes per weight of DeepSpeed's own float32 and bf16 weights in a ZeRO-3 checkpoint."""


class Need(NamedTuple):
    """The disk space that a run needs, in bytes."""

    final: float
    """Number of bytes by which the results will have grown when the run is finished."""
    peak: float
    """Largest number of bytes by which the results will have grown at any time during the run."""
    free: int
    """Number of free bytes on the disk."""
    place: Path
    """The run's folder, or the nearest folder above it that exists."""


def need(recipe: Recipe, plan: Plan, asked: Collection[str], gpu: float | None) -> Need | None:
    """The disk space for the units that will run; None if the base's size is not known.

    gpu: the GPU's memory in bytes, on which `precision: auto` depends. Files of results that will be replaced count as
    free.
    """
    size = architecture_of_recipe(recipe)
    if size is None:
        return None
    final = peak = 0.0
    for planned in [planned for name, planned in plan.items() if name in asked and planned.why is not None]:
        there = bytes_in(planned.folder)
        kept, peak_of_unit = unit_bytes(recipe_of_unit(recipe, planned.unit), planned.unit.stage, size, gpu)
        peak = max(peak, final - there + peak_of_unit)
        final += kept - there
    place = existing_parent(next(iter(plan.values())).folder)
    return Need(final, max(peak, final), shutil.disk_usage(place).free, place)


def bytes_in(folder: Path) -> int:
    """Size of a folder's files in bytes, without files that another process removes meanwhile."""
    found = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                found += os.stat(os.path.join(place, name)).st_size
    return found


def unit_bytes(recipe: Recipe, stage: str, size: Architecture, gpu: float | None) -> tuple[float, float]:
    """Bytes that a unit of a stage takes on the disk: when it is finished, and at most while it runs."""
    width, one, count = _width(recipe, size, gpu), 4.0, size.parameters
    if stage == "ppo":
        return _policy(recipe, size, gpu, width)
    if recipe.adapter is None:
        one = width
    else:
        count = size.adapter(recipe.adapter.r, recipe.adapter.target_modules)
    kept = {"toy": 4.0 * size.parameters}.get(stage, one * count if stage in ("sft", "soup", "soups") else 0.0)
    if stage in ALGORITHMS:
        kept = one * count + (width * size.parameters if recipe.adapter and "merged" in recipe.export else 0.0)
    if stage in ("soup", "soups") and recipe.adapter is not None:
        rank = recipe.soup.rank or recipe.adapter.r * len(recipe.soup.members)
        kept = one * size.adapter(rank, recipe.adapter.target_modules)
    before = 0.0  # members of a reward soup, before the last one is trained
    if stage == "reward":  # a score head instead of output embeddings; several seeds are also averaged
        seeds = len(recipe.reward.seeds)
        count += size.hidden - (size.head if recipe.adapter is None else 0)
        before, kept = one * count * (seeds - 1), one * count * (seeds + (seeds > 1))
    zero3 = recipe.sharded and recipe.accelerate == "zero3"  # under which sft and reward save no checkpoints
    if stage not in ("sft", "reward", *ALGORITHMS) or (zero3 and stage not in ALGORITHMS):
        return kept, kept
    checkpoint = _bytes_per_weight(recipe, stage, size, gpu) * count
    every = getattr(recipe, stage).save_steps
    evaluated = stage in ("reward", "dpo")  # after the last step, which is then saved
    saved = math.ceil(_steps(recipe, stage) / every) if evaluated else (_steps(recipe, stage) - 1) // every
    beside = before + one * count if before else kept  # what is written before the last checkpoint is removed
    return kept, max(before + min(saved, AT_ONCE_TRL) * checkpoint, beside + min(saved, 1) * checkpoint, kept)


def _bytes_per_weight(recipe: Recipe, stage: str, size: Architecture, gpu: float | None) -> float:
    """Bytes of a trained weight and of its optimizer states in a checkpoint."""
    precision = memory.choose_precision(recipe, stage, gpu, size) if recipe.adapter is None else "master"
    weight, _, states = memory.TRAINED[precision]
    if precision == "master":
        states = memory.STATES.get(getattr(recipe, stage).optim, states)
    return weight + states


def _policy(recipe: Recipe, size: Architecture, gpu: float | None, width: float) -> tuple[float, float]:
    """Bytes of a policy when it is finished, and at most while it trains and saves checkpoints."""
    ppo, lora = recipe.ppo, recipe.adapter
    bytes_each = _bytes_per_weight(recipe, "ppo", size, gpu)
    if recipe.sharded and recipe.accelerate == "zero3":
        bytes_each += ZERO3
    count, kept = size.parameters, width * size.parameters
    if lora is not None:
        count = size.adapter(lora.r, lora.target_modules) * (2 if ppo.value == "adapter" else 1)
        kept = 4.0 * count + (width * size.parameters if "merged" in recipe.export else 0.0)
    checkpoint = bytes_each * count
    saved = math.ceil(_steps(recipe, "ppo") / ppo.save_steps)  # the last step is always saved
    return kept, max(min(saved, AT_ONCE) * checkpoint, min(saved, AT_ONCE - 1) * checkpoint + kept)


def _steps(recipe: Recipe, stage: str) -> int:
    """Number of optimizer steps of a unit of a stage; MANY if the number of rows is not known."""
    steps = steps_of(recipe, stage)
    return MANY if steps is None else steps


def steps_of(recipe: Recipe, stage: str) -> int | None:
    """Number of optimizer steps of a unit of a training stage; None if the number of rows is not known."""
    section = getattr(recipe, stage)
    if section.max_steps > 0:
        return int(section.max_steps)
    demonstrations, pairs, prompts = (
        number_of_rows(recipe, kind) for kind in ("demonstrations", "preferences", "prompts")
    )
    epochs: float = section.num_train_epochs
    if stage == "ppo":  # an epoch leaves out prompts that do not fill its last batch
        ppo = recipe.ppo
        return None if prompts is None else math.ceil(prompts // ppo.prompts_per_update * epochs) * ppo.steps_per_update
    rows: float | None
    if stage == "sft":
        rows = None if demonstrations is None else demonstrations * recipe.sft.subset
    elif stage == "reward":
        rows = None if pairs is None else pairs - recipe.reward.held_out_rows(pairs)
    else:
        rows = section.rows_per_epoch(pairs, prompts)
    return None if rows is None else math.ceil(math.ceil(rows / section.batch_size) * epochs)


def _width(recipe: Recipe, size: Architecture, gpu: float | None) -> int:
    """Bytes per weight of the base. The dtype `auto` is float32 for a small base without a GPU, else bf16."""
    on_cpu = recipe.model.dtype == "auto" and gpu is None and size.parameters < hardware.LARGE
    return 4 if recipe.model.dtype == "float32" or on_cpu else 2


def plan_line(recipe: Recipe, plan: Plan, asked: Collection[str], gpu: float | None) -> str:
    """The plan's line about disk space."""
    found = need(recipe, plan, asked, gpu)
    if found is None:
        return f"disk: not known before the config.json of {recipe.model.base} is downloaded"
    advice = "" if found.peak <= found.free else f": too little; {remedy(recipe, plan, asked, gpu)}"
    return (
        f"disk: {size_text(found.final)} more when the run is finished, at most {size_text(found.peak)} during the run;"
        f" {size_text(found.free)} free on the disk of {found.place}{advice}"
    )


def check(recipe: Recipe, plan: Plan, asked: Collection[str]) -> None:
    """Raise SalsaError if the results will not fit on the disk."""
    gpu = next((float(one.bytes) for one in hardware.gpus()), None)
    found = need(recipe, plan, asked, gpu)
    if found is not None and found.peak > found.free and shutil.disk_usage(found.place).total > 0:
        raise SalsaError(
            f"results: need {size_text(found.peak)} during the run ({size_text(found.final)} when it is finished), but"
            f" only {size_text(found.free)} are free on the disk of {found.place}; {remedy(recipe, plan, asked, gpu)}"
        )


def remedy(recipe: Recipe, plan: Plan, asked: Collection[str], gpu: float | None) -> str:
    """Advice as text: use a larger disk, or an option with which the results fit on this one."""
    adapters = dataclasses.replace(recipe, adapter=recipe.adapter or Adapter(), offload="none", precision="auto")
    stages = [stage for stage in ("sft", "reward", "ppo", *ALGORITHMS) if _saves(recipe, stage)]
    ppo = [stage for stage in stages if stage == "ppo"]
    rare = [_with_rare_checkpoints(recipe, chosen) for chosen in (ppo, stages) if chosen]
    fits = [words for words, other in rare if _fits(other, plan, asked, gpu)][:1]
    fits += ["--lora"] if _fits(adapters, plan, asked, gpu) else []
    return ", or ".join(["use --output-dir on a larger disk", *fits])


def _with_rare_checkpoints(recipe: Recipe, stages: list[str]) -> tuple[str, Recipe]:
    """Settings with which units of these stages save no checkpoints before their end, as text, and the recipe."""
    rare = {stage: max(_steps(recipe, stage), getattr(recipe, stage).save_steps) for stage in stages}
    changed: dict[str, Any] = {
        stage: dataclasses.replace(getattr(recipe, stage), save_steps=number) for stage, number in rare.items()
    }
    words = " ".join(f"--set {stage}.save_steps={number}" for stage, number in rare.items())
    effect = (
        "one checkpoint per policy, at its end" if "ppo" in stages else "at most one checkpoint per unit, at its end"
    )
    return f"{words} ({effect})", dataclasses.replace(recipe, **changed)


def _fits(recipe: Recipe, plan: Plan, asked: Collection[str], gpu: float | None) -> bool:
    found = need(recipe, plan, asked, gpu)
    return found is not None and found.peak <= found.free


def _saves(recipe: Recipe, stage: str) -> bool:
    """Whether the recipe has units of a stage that save checkpoints."""
    if stage == "reward":
        return recipe.reward.trained
    return stage == "sft" or stage in {policy.algorithm for policy in recipe.policies.values()}
