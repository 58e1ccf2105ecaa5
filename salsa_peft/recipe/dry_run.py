"""--dry-run: where results will be, what is cached and what is to do and why, how batches divide, what --lora changed."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from salsa_peft.config.load import LoadedRecipe
from salsa_peft.config.options.training import Training
from salsa_peft.config.options.trl import ALGORITHMS
from salsa_peft.config.schema import PPO, Adapter, Recipe
from salsa_peft.data.check import count_rows
from salsa_peft.evaluation.judges import costs
from salsa_peft.models.architectures import memory
from salsa_peft.models.architectures.sizes import Architecture, architecture_of_recipe
from salsa_peft.recipe import disk
from salsa_peft.recipe.cache import Step
from salsa_peft.recipe.hardware import Gpu

TRAINING = ("sft", "reward", "ppo")
MEMORY = ("weights", "gradients", "optimizer", "activations", "kv_cache", "logits")
PRESETS: dict[str, Literal["nf4-double"] | None] = {"lora": None, "qlora": "nf4-double"}
"""Preset → quantisation of its base."""
OF_FULL_WEIGHTS = {"offload": "none", "precision": "auto"}
"""Keys that are refused with adapters → what they must be there."""


NOTHING = "a larger card, or a smaller model.max_length"
ORDER = (
    "gradient_checkpointing",
    "micro_batch_size",
    "offload",
    "precision",
    "rollout_batch_size",
    "batch_size",
    "lora",
    "qlora",
)
"""Changes by what they cost, the least first."""


def show_plan(loaded: LoadedRecipe, run: Path, steps: dict[str, Step], asked: set[str], card: Gpu | None) -> None:
    """Print the plan on standard output; writes nothing else. card: what the stages' needs are held against."""
    console = Console(highlight=False, soft_wrap=True)
    console.print(Text(f"results: {run}"))
    console.print(Text(f"recipe:  {loaded.path}" + (f" with --lora {loaded.preset}" if loaded.preset else "")))
    console.print()
    _print(console, ["unit", "state", "why"], [_row(step, asked) for step in steps.values()])
    _print(console, ["training", "batch", "steps"], _arithmetic(loaded.recipe))
    _print_memory(console, loaded, card)
    console.print(Text(disk.told(loaded.recipe, steps, asked, None if card is None else float(card.bytes)) + "\n"))
    answered = steps["evaluate"]
    asked_of_judge = costs.plan_line(loaded.recipe, answered.folder / "answers.jsonl" if answered.why is None else None)
    if asked_of_judge is not None:
        console.print(Text(f"{asked_of_judge}\n"))
    idle = {*ALGORITHMS} - {policy.algorithm for policy in loaded.recipe.policies.values()}
    changed = [
        [key, _plain(before), _plain(after)] for key, before, after in loaded.changes if key.split(".")[0] not in idle
    ]
    if changed:
        _print(console, ["--lora changed", "from", "to"], changed)


def _print(console: Console, header: list[str], rows: list[list[str]], narrow: int = 28) -> None:
    if not console.is_terminal:  # plain lines, whatever the width
        widths = [max(narrow, *map(len, column)) for column in zip(header, *rows, strict=True)]
        for row in [header, *rows]:
            console.print(Text("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()))
    else:
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
        for title in header:
            table.add_column(title, overflow="fold")
        for row in rows:
            table.add_row(*map(Text, row))
        console.print(table)
    console.print()


def _print_memory(console: Console, loaded: LoadedRecipe, card: Gpu | None) -> None:
    """What each stage needs of a GPU at its peak, what would make it fit, and what all of them."""
    recipe = loaded.recipe
    size = architecture_of_recipe(recipe)
    if size is None:
        console.print(Text(f"memory: known when the config.json of {recipe.model.base} is at hand\n"))
        return
    rows = []
    room = None if card is None else float(card.bytes)
    for stage in memory.stages_of(recipe):
        found = memory.estimate(recipe, stage, size, room)
        helps = None if room is None else advice(recipe, [stage], size, room, loaded.reset_by_lora)
        held = (
            memory.choose_precision(recipe, stage, room, size)
            if recipe.mode == "full" and stage in TRAINING
            else recipe.mode
        )
        fits = "" if room is None else "fits" if helps is None else f"too large; {helps}"
        parts = [_bytes(getattr(found, part)) for part in MEMORY]
        rows.append([stage, f"{found.phase} ({held})", *parts, _bytes(found.total), fits])
    against = "no card" if card is None else f"{card.name}, {card.bytes / memory.GIB:.0f} GiB"
    header = ["GPU memory", "peak in", *(part.replace("_", " ") for part in MEMORY), "in all", against]
    _print(console, header, rows, narrow=9)
    together = None if room is None else advice(recipe, memory.stages_of(recipe), size, room, loaded.reset_by_lora)
    if together is not None:
        console.print(
            Text(
                f"all stages fit with: {together}\n"
                if together != NOTHING
                else f"no change makes all stages fit: {NOTHING}\n"
            )
        )
    for one in memory.uncounted(recipe):
        console.print(Text(f"not counted: {one}\n"))


def _bytes(number: float) -> str:
    if number == 0:
        return "–"
    unit, name = (memory.GIB, "GiB") if number >= memory.GIB / 10 else (2**20, "MiB")
    return f"{number / unit:.1f} {name}"


def _row(step: Step, asked: set[str]) -> list[str]:
    state = "cached" if step.why is None else "to do" if step.unit.id in asked else "left out"
    return [step.unit.id, state, step.why or ""]


def _plain(value: object) -> str:
    return "–" if value is None else str(value)


def _arithmetic(recipe: Recipe) -> list[list[str]]:
    """What one optimizer step sees in each training stage, and how many steps there are where the rows are known."""
    demonstrations, pairs, prompts = (
        getattr(recipe.toy, kind) if recipe.toy and source is None else count_rows(source)
        for kind, source in (
            (kind, getattr(recipe.data, kind)) for kind in ("demonstrations", "preferences", "prompts")
        )
    )
    sft, reward, ppo = recipe.sft, recipe.reward, recipe.ppo
    shares = (
        None if demonstrations is None else demonstrations * sft.subset,
        None if pairs is None else pairs - reward.held_out_rows(pairs),
    )
    rows = [
        [f"sft, each of {len(sft.seeds)} seeds", _batch(sft), _steps(sft, shares[0])],
    ]
    if reward.trained:
        rows.append(["reward", _batch(reward), _steps(reward, shares[1])])
    by: Counter[str] = Counter(policy.algorithm for policy in recipe.policies.values())
    if by["ppo"]:
        minibatch = ppo.batch_size // ppo.num_mini_batches
        micro = ppo.micro_batch_size or minibatch
        parts = f"{_count(ppo.num_mini_batches, 'minibatch')} × {_count(minibatch // micro, 'micro-batch')} of {micro}"
        batch = f"{ppo.batch_size} responses = {parts}"
        per_update = f"{ppo.num_ppo_epochs} × {ppo.num_mini_batches} optimizer steps an update"
        rows.append([f"ppo, each of {by['ppo']} policies", batch, f"{_updates(ppo, prompts)}, {per_update}"])
    for algorithm in [one for one in ALGORITHMS if by[one]]:
        section = getattr(recipe, algorithm)
        rows.append(
            [
                f"{algorithm}, each of {by[algorithm]} policies",
                _batch(section),
                _steps(section, section.rows_per_epoch(pairs, prompts)),
            ]
        )
    return rows


def _batch(training: Training) -> str:
    micro = training.micro_batch_size or training.batch_size
    return f"{training.batch_size} rows = {_count(training.batch_size // micro, 'micro-batch')} of {micro}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("es" if number > 1 else "")


def _steps(training: Training, rows: float | None) -> str:
    if training.max_steps > 0:
        return f"{training.max_steps} steps (max_steps)"
    if rows is None:
        return "steps known when the data is there"
    steps = math.ceil(math.ceil(rows / training.batch_size) * training.num_train_epochs)
    return f"about {steps} steps ({rows:.0f} rows × {training.num_train_epochs:g} epochs)"


def _updates(ppo: PPO, rows: int | None) -> str:
    """Rollout batches; a pass over the prompts leaves out those that don't fill one."""
    if ppo.max_steps > 0:
        return f"{ppo.max_steps // ppo.steps_per_update} updates (max_steps = {ppo.max_steps} optimizer steps)"
    if rows is None:
        return "updates known when the data is there"
    updates = math.ceil(rows // ppo.batch_size * ppo.num_train_epochs)
    return f"about {updates} updates ({rows} rows × {ppo.num_train_epochs:g} epochs)"


def advice(
    recipe: Recipe, stages: Sequence[str], size: Architecture, card: float, reset_by_lora: Collection[str] = ()
) -> str | None:
    """What would make stages fit a card (bytes), all of them: the first single change that does, else several, each as small as will do;
    None where they fit, NOTHING where nothing does. reset_by_lora: keys that adding an adapter sets by itself."""

    def fits(preset: str, settings: dict[str, str]) -> bool:
        other = changed(recipe, preset, settings)
        return all(memory.estimate(other, stage, size, card).total <= card for stage in stages)

    if fits("", {}):
        return None
    offered = sorted(
        (one for stage in stages for one in _changes(recipe, stage)), key=lambda one: ORDER.index(_kind(*one))
    )
    for preset, setting in offered:
        if fits(preset, setting):
            return _words(recipe, preset, setting, reset_by_lora)
    taken, settings = "", dict[str, str]()
    for preset, setting in offered:
        taken = preset or taken
        settings = {
            key: value for key, value in (settings | setting).items() if not taken or key not in OF_FULL_WEIGHTS
        }
        if fits(taken, settings):
            return _words(recipe, taken, _least(settings, offered, partial(fits, taken)), reset_by_lora)
    return NOTHING


def _least(
    settings: dict[str, str], offered: list[tuple[str, dict[str, str]]], fits: Callable[[dict[str, str]], bool]
) -> dict[str, str]:
    """Without the settings that are not needed, the others at the first value offered that will do."""
    for key in list(settings):
        without = {name: value for name, value in settings.items() if name != key}
        values = [setting[key] for _, setting in offered if key in setting]
        tries = [without, *({**settings, key: value} for value in values)]
        settings = next((one for one in tries if fits(one)), settings)
    return settings


def _kind(preset: str, setting: dict[str, str]) -> str:
    return preset or next(iter(setting)).rpartition(".")[2]


def changed(recipe: Recipe, preset: str, settings: dict[str, str]) -> Recipe:
    """The recipe with a preset's adapter ("": as it is; r 16 on all linears where it has none) and some of its settings."""
    if preset:
        model = dataclasses.replace(recipe.model, quantization=PRESETS[preset])
        recipe = dataclasses.replace(
            recipe, adapter=recipe.adapter or Adapter(), model=model, offload="none", precision="auto"
        )
    for key, text in settings.items():
        section, _, name = key.rpartition(".")
        value: Any = int(text) if text.isdigit() else True if text == "true" else text
        if section:
            value = dataclasses.replace(getattr(recipe, section), **{name: value})
        recipe = dataclasses.replace(recipe, **{section or name: value})
    return recipe


def _changes(recipe: Recipe, stage: str) -> list[tuple[str, dict[str, str]]]:
    """(preset, setting), one of the two, from what costs least to what costs most; sizes that divide what they are parts of."""
    found: list[tuple[str, dict[str, str]]] = []
    if stage in TRAINING:
        section: Training = getattr(recipe, stage)
        if not section.gradient_checkpointing:
            found.append(("", {f"{stage}.gradient_checkpointing": "true"}))
        micro = memory.micro_batch(section, recipe.num_processes, recipe.ppo.num_mini_batches if stage == "ppo" else 1)
        found += [("", {f"{stage}.micro_batch_size": str(smaller)}) for smaller in _divisors(micro)]
    if recipe.mode == "full" and stage == "ppo" and recipe.offload == "none":
        found.append(("", {"offload": "frozen"}))
    if recipe.mode == "full" and stage in TRAINING and recipe.precision == "master" and not recipe.sharded:
        found.append(("", {"precision": "stochastic"}))
    key = "ppo.rollout_batch_size" if stage == "ppo" else "generation.batch_size"
    rows = memory.rollout_batch(recipe) if stage == "ppo" else recipe.generation.batch_size
    found += [("", {key: str(smaller)}) for smaller in _divisors(rows) if stage not in ("sft", "reward")]
    found += [("lora", {})] * (recipe.mode == "full") + [("qlora", {})] * (
        recipe.mode != "qlora" and not recipe.sharded
    )
    return found


def _divisors(number: int) -> list[int]:
    """Those that are smaller, the largest first."""
    return [part for part in range(number - 1, 0, -1) if number % part == 0]


def _words(recipe: Recipe, preset: str, settings: dict[str, str], reset_by_lora: Collection[str] = ()) -> str:
    """What to add to the command."""
    mode = [f"--lora{'' if preset == 'lora' else ' ' + preset}"] * bool(preset)
    found = {"offload": recipe.offload, "precision": recipe.precision} if preset else {}
    idle = {
        key: OF_FULL_WEIGHTS[key] for key in found if found[key] != OF_FULL_WEIGHTS[key] and key not in reset_by_lora
    }
    return " ".join([*mode, *(f"--set {key}={value}" for key, value in {**idle, **settings}.items())])
