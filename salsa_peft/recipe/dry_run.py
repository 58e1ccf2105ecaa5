"""The plan that --dry-run prints: units, batch sizes, memory, hours, disk space, and what --lora changes."""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from salsa_peft.config.job import recipe_of_policy
from salsa_peft.config.load import LoadedRecipe
from salsa_peft.config.options.training import Training
from salsa_peft.config.options.trl import ALGORITHMS
from salsa_peft.config.schema import PPO, Adapter, Recipe
from salsa_peft.data.check import number_of_rows
from salsa_peft.evaluation.judges import costs
from salsa_peft.models.architectures import memory
from salsa_peft.models.architectures.sizes import Architecture, architecture_of_recipe
from salsa_peft.recipe.cache import Plan
from salsa_peft.recipe.commits import unknown_commits
from salsa_peft.recipe.estimates import disk, hours
from salsa_peft.recipe.estimates.hardware import Gpu

TRAINING = ("sft", "reward", "ppo")
MEMORY = ("weights", "gradients", "optimizer", "activations", "kv_cache", "logits")
SHORT = ("weights", "grads", "optim.", "activ.", "KV", "logits")
"""Titles of MEMORY's columns on a terminal."""
PRESET = "--lora"
"""Key of the adapter preset in a dict of settings; all other keys of the dict are recipe keys."""
PRESETS: dict[str, Literal["nf4-double"] | None] = {"lora": None, "qlora": "nf4-double"}
"""Adapter preset → quantisation of the base."""
FULL_WEIGHTS_ONLY = {"offload": "none", "precision": "auto"}
"""Keys that are for full weights only → the value that each must have with adapters."""
NOTHING = "a larger GPU, or a smaller model.max_length"
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
"""Settings and presets that save memory, in the order in which they are tried."""


def show_plan(loaded: LoadedRecipe, run: Path, plan: Plan, asked: set[str], gpu: Gpu | None) -> None:
    """Print the plan on standard output. gpu: the GPU to plan for."""
    console, recipe = Console(highlight=False), loaded.recipe
    console.soft_wrap = not console.is_terminal  # on a terminal, lines are wrapped between words
    console.print(Text(f"results: {run}"))
    console.print(Text(f"recipe:  {loaded.path}" + (f" with --lora {loaded.preset}" if loaded.preset else "")))
    console.print()
    state = {name: "to do" if name in asked else "left out" for name in plan}
    units = [[name, state[name] if planned.why else "cached", planned.why or ""] for name, planned in plan.items()]
    _print(console, ["unit", "state", "why"], units)
    for line in unknown_commits(recipe):
        console.print(Text(f"{line}\n"))
    header = ["training", "batch", "steps", "a kill costs at most"]
    _print(console, header, [[*row, kill_cost(recipe, row[0].split(",")[0])] for row in _training_rows(recipe)])
    points = "landscape one point, " if recipe.landscape is not None else ""
    replies = "" if recipe.evaluate.judge is None else "judge the replies that it waits for, "
    rest = f"{points}evaluate one batch of answers, {replies}every other stage all its work"
    console.print(Text(f"elsewhere a kill costs at most: {rest}\n"))
    _print_memory(console, loaded, gpu)
    header, rows, notes = hours.table(recipe, plan, gpu)
    if rows:
        _print(console, header, rows, narrow=9)
    for note in notes:
        console.print(Text((note.replace("at most:", "≤ (at most):") if console.is_terminal else note) + "\n"))
    console.print(Text(disk.plan_line(recipe, plan, asked, None if gpu is None else float(gpu.bytes)) + "\n"))
    answers = plan["evaluate"]
    judge = costs.plan_line(recipe, answers.folder / "answers.jsonl" if answers.why is None else None)
    if judge is not None:
        console.print(Text(f"{judge}\n"))
    unused = {*ALGORITHMS} - {policy.algorithm for policy in recipe.policies.values()}
    used = [change for change in loaded.changes if change[0].split(".")[0] not in unused]
    rows = [[key, *("–" if value is None else str(value) for value in values)] for key, *values in used]
    if rows:
        _print(console, ["--lora changed", "from", "to"], rows)


def _print(console: Console, header: list[str], rows: list[list[str]], narrow: int = 28) -> None:
    """Print a table as wide as the terminal; without a terminal, print it as plain lines of any width.

    narrow: minimum width of a column in the plain lines.
    """
    if not console.is_terminal:
        widths = [max(narrow, *map(len, column)) for column in zip(header, *rows, strict=True)]
        for row in [header, *rows]:
            console.print(Text("  ".join(map(str.ljust, row, widths)).rstrip()))
    else:
        rows = [[cell.replace("at most ", "≤ ").replace("about ", "≈ ") for cell in row] for row in rows]
        words = [max(map(len, " ".join(column).split()), default=0) for column in zip(header, *rows, strict=True)]
        columns = [Column(title, overflow="fold", min_width=word) for title, word in zip(header, words, strict=True)]
        columns[0].no_wrap = True
        table = Table(*columns, box=None, padding=(0, 2 if len(header) < 8 else 1, 0, 0), header_style="bold")
        for row in rows:
            table.add_row(*map(Text, row))
        console.print(table)
    console.print()


def _print_memory(console: Console, loaded: LoadedRecipe, gpu: Gpu | None) -> None:
    """Print each stage's peak GPU memory, and options with which a stage, or all stages, fit the GPU."""
    recipe = loaded.recipe
    size = architecture_of_recipe(recipe)
    if size is None:
        console.print(Text(f"memory: not known before the config.json of {recipe.model.base} is downloaded\n"))
        return
    rows, sizes, limit = [], [], None if gpu is None else float(gpu.bytes)
    needs: dict[str, list[str]] = {}
    for stage in memory.stages_of(recipe):
        found = memory.estimate(recipe, stage, size, limit)
        helps = None if limit is None else advice(recipe, [stage], size, limit, loaded.reset_by_lora)
        full = recipe.mode == "full" and stage in TRAINING
        weights = memory.choose_precision(recipe, stage, limit, size) if full else recipe.mode
        fits = "" if limit is None else "fits" if helps is None else f"too large; use {helps}"
        rows.append([stage, f"{found.phase} ({weights})", fits])
        sizes.append([*(getattr(found, part) for part in MEMORY), found.total])
        if helps is not None:
            needs.setdefault(helps, []).append(stage)
    against = "no GPU" if gpu is None else f"{gpu.name}, {gpu.bytes / memory.GIB:.0f} GiB"
    if console.is_terminal:
        _print_narrow_memory(console, rows, sizes, against)
        for helps, stages in needs.items():
            console.print(Text(f"{', '.join(stages)}: too large; use {helps}\n"))
    else:
        header = ["GPU memory", "peak in", *(part.replace("_", " ") for part in MEMORY), "total", against]
        cells = [[*map(_bytes, parts)] for parts in sizes]
        _print(console, header, [[*row[:2], *parts, row[2]] for row, parts in zip(rows, cells, strict=True)], narrow=9)
    together = None if limit is None else advice(recipe, memory.stages_of(recipe), size, limit, loaded.reset_by_lora)
    if together is not None:
        start = "no option makes all stages fit; use" if together == NOTHING else "all stages fit with:"
        console.print(Text(f"{start} {together}\n"))
    for one in memory.uncounted(recipe):
        console.print(Text(f"GPU memory does not include {one}\n"))


def _bytes(number: float) -> str:
    if number == 0:
        return "–"
    unit, name = (memory.GIB, "GiB") if number >= memory.GIB / 10 else (2**20, "MiB")
    return f"{number / unit:.1f} {name}"


def _print_narrow_memory(console: Console, rows: list[list[str]], sizes: list[list[float]], against: str) -> None:
    """Print the table of GPU memory in 80 columns: in one unit, with short titles, and only whether a stage fits."""
    unit, name = (memory.GIB, "GiB") if max(map(max, sizes)) >= memory.GIB else (2**20, "MiB")
    console.print(Text(f"GPU memory in {name}: {against}", style="bold"))
    found = []
    for (stage, phase, fits), parts in zip(rows, sizes, strict=True):
        texts = ["–" if size == 0 else f"{size / unit:.1f}" if size >= unit / 20 else "<0.1" for size in parts]
        phase = re.sub(r" \((full|lora|qlora)\)", "", phase)  # a precision stays
        found.append([stage, phase, *texts, *(["yes" if fits == "fits" else "no"] if fits else [])])
    header = ["stage", "peak in", *SHORT, "total", "fits"]
    _print(console, header[: len(found[0])], found)


def _training_rows(recipe: Recipe) -> list[list[str]]:
    """The plan's rows about training stages: name, batch of an optimizer step, number of steps."""
    kinds = ("demonstrations", "preferences", "prompts")
    demonstrations, pairs, prompts = (number_of_rows(recipe, kind) for kind in kinds)
    sft, reward = recipe.sft, recipe.reward
    steps = _steps(sft, None if demonstrations is None else demonstrations * sft.subset)
    rows = [[f"sft, each of {len(sft.seeds)} seeds", _batch(sft), steps]]
    if reward.trained:
        steps = _steps(reward, None if pairs is None else pairs - reward.held_out_rows(pairs))
        rows.append(["reward", _batch(reward), steps])
    policies: Counter[str] = Counter(policy.algorithm for policy in recipe.policies.values())
    trained: dict[tuple[str, str], list[str]] = {}  # by batch and steps, which a policy's overrides may change
    for name in [name for name, policy in recipe.policies.items() if policy.algorithm == "ppo"]:
        trained.setdefault(_ppo_row(recipe_of_policy(recipe, name).ppo, prompts), []).append(name)
    for place, ((batch, steps), names) in enumerate(trained.items()):
        which = f"each of {len(names)} policies" if place == 0 or len(names) > 2 else " and ".join(names)
        rows.append([f"ppo, {which}", batch, steps])
    for algorithm in [name for name in ALGORITHMS if policies[name]]:
        section = getattr(recipe, algorithm)
        steps = _steps(section, section.rows_per_epoch(pairs, prompts))
        rows.append([f"{algorithm}, each of {policies[algorithm]} policies", _batch(section), steps])
    return rows


def _ppo_row(ppo: PPO, prompts: int | None) -> tuple[str, str]:
    """Batch of an update and number of updates, as texts. prompts: their number if it is known."""
    minibatch = ppo.batch_size // ppo.num_mini_batches
    micro = ppo.micro_batch_size or minibatch
    parts = f"{_count(ppo.num_mini_batches, 'minibatch')} × {_count(minibatch // micro, 'micro-batch')} of {micro}"
    groups = f" to {ppo.prompts_per_update} prompts" if ppo.value == "group" else ""
    steps = f"{_updates(ppo, prompts)}, {ppo.num_ppo_epochs} × {ppo.num_mini_batches} optimizer steps per update"
    return f"{ppo.batch_size} responses{groups} = {parts}", steps


def kill_cost(recipe: Recipe, stage: str) -> str:
    """The most optimizer steps that a killed unit of a training stage repeats, as text."""
    every, steps = getattr(recipe, stage).save_steps, disk.steps_of(recipe, stage)
    if recipe.sharded and recipe.accelerate == "zero3" and stage in ("sft", "reward"):
        return "all steps (no checkpoints under DeepSpeed)"
    return f"{every} steps" if steps is None or steps > every else f"all {steps} steps (save_steps = {every})"


def _batch(training: Training) -> str:
    micro = training.micro_batch_size or training.batch_size
    return f"{training.batch_size} rows = {_count(training.batch_size // micro, 'micro-batch')} of {micro}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("es" if number > 1 else "")


def _steps(training: Training, rows: float | None) -> str:
    if training.max_steps > 0:
        return f"{training.max_steps} steps (max_steps)"
    if rows is None:
        return "steps not known before the data is downloaded"
    steps = math.ceil(math.ceil(rows / training.batch_size) * training.num_train_epochs)
    return f"about {steps} steps ({rows:.0f} rows × {training.num_train_epochs:g} epochs)"


def _updates(ppo: PPO, rows: int | None) -> str:
    """The number of PPO updates, as text. An epoch leaves out prompts that do not fill its last batch."""
    if ppo.max_steps > 0:
        return f"{ppo.max_steps // ppo.steps_per_update} updates (max_steps = {ppo.max_steps} optimizer steps)"
    if rows is None:
        return "updates not known before the data is downloaded"
    updates = math.ceil(rows // ppo.prompts_per_update * ppo.num_train_epochs)
    return f"about {updates} updates ({rows} rows × {ppo.num_train_epochs:g} epochs)"


def advice(
    recipe: Recipe, stages: Sequence[str], size: Architecture, gpu: float, reset_by_lora: Collection[str] = ()
) -> str | None:
    """Options with which all these stages fit a GPU: a single change, or else as few as possible.

    Returns None if the stages fit as they are, and NOTHING if no options help. gpu: the GPU's memory in bytes.
    reset_by_lora: recipe keys that --lora resets.
    """

    def fits(settings: dict[str, str]) -> bool:
        other = with_settings(recipe, settings)
        return all(memory.estimate(other, stage, size, gpu).total <= gpu for stage in stages)

    if fits({}):
        return None
    changes = [change for stage in stages for change in _changes(recipe, stage)]
    changes.sort(key=lambda change: ORDER.index(change.get(PRESET) or next(iter(change)).rpartition(".")[2]))
    for change in changes:
        if fits(change):
            return _options(recipe, change, reset_by_lora)
    settings: dict[str, str] = {}
    for change in changes:
        settings |= change
        if PRESET in settings:
            settings = {key: value for key, value in settings.items() if key not in FULL_WEIGHTS_ONLY}
        if fits(settings):
            return _options(recipe, _fewest(settings, changes, fits), reset_by_lora)
    return NOTHING


def _fewest(
    settings: dict[str, str], changes: list[dict[str, str]], fits: Callable[[dict[str, str]], bool]
) -> dict[str, str]:
    """Drop settings that are not needed; give each remaining one the first value that fits."""
    for key in [key for key in settings if key != PRESET]:
        without = {name: value for name, value in settings.items() if name != key}
        tries = [without, *({**settings, key: change[key]} for change in changes if key in change)]
        settings = next((one for one in tries if fits(one)), settings)
    return settings


def with_settings(recipe: Recipe, settings: dict[str, str]) -> Recipe:
    """The recipe with some of its keys changed.

    The key PRESET adds an adapter with the default rank, 16, if the recipe has no adapter.
    """
    for key, text in settings.items():
        if key == PRESET:
            model = dataclasses.replace(recipe.model, quantization=PRESETS[text])
            adapter = recipe.adapter or Adapter()
            recipe = dataclasses.replace(recipe, adapter=adapter, model=model, offload="none", precision="auto")
            continue
        section, _, name = key.rpartition(".")
        value: Any = int(text) if text.isdigit() else True if text == "true" else text
        if section:
            value = dataclasses.replace(getattr(recipe, section), **{name: value})
        recipe = dataclasses.replace(recipe, **{section or name: value})
    return recipe


def _changes(recipe: Recipe, stage: str) -> list[dict[str, str]]:
    """Changes of a single setting that save memory in a stage. New batch sizes divide the old ones."""
    found: list[dict[str, str]] = []
    if stage in TRAINING:
        section: Training = getattr(recipe, stage)
        if not section.gradient_checkpointing:
            found.append({f"{stage}.gradient_checkpointing": "true"})
        micro = memory.micro_batch(recipe, stage)
        found += [{f"{stage}.micro_batch_size": str(smaller)} for smaller in _divisors(micro)]
    if recipe.mode == "full" and stage == "ppo" and recipe.offload == "none":
        found.append({"offload": "frozen"})
    if recipe.mode == "full" and stage in TRAINING and recipe.precision == "master" and not recipe.sharded:
        found.append({"precision": "stochastic"})
    key = "ppo.rollout_batch_size" if stage == "ppo" else "generation.batch_size"
    rows = memory.generation_batch(recipe, stage)
    found += [{key: str(smaller)} for smaller in _divisors(rows) if stage not in ("sft", "reward")]
    found += [{PRESET: "lora"}] if recipe.mode == "full" else []
    found += [{PRESET: "qlora"}] if recipe.mode != "qlora" and not recipe.sharded else []
    return found


def _divisors(number: int) -> list[int]:
    """The divisors of a number that are smaller than the number, the largest first."""
    return [part for part in range(number - 1, 0, -1) if number % part == 0]


def _options(recipe: Recipe, settings: dict[str, str], reset_by_lora: Collection[str] = ()) -> str:
    """Settings as command-line options of `salsa run`."""
    options, settings = [], dict(settings)
    if preset := settings.pop(PRESET, None):
        options.append("--lora" if preset == "lora" else f"--lora {preset}")
        kept = {key: value for key, value in FULL_WEIGHTS_ONLY.items() if key not in reset_by_lora}
        settings = {key: value for key, value in kept.items() if getattr(recipe, key) != value} | settings
    return " ".join([*options, *(f"--set {key}={value}" for key, value in settings.items())])
