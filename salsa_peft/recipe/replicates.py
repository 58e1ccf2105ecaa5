"""Replicates: a whole recipe trained several times, each time with other seeds of everything.

Each replicate is an ordinary run in <run>/replicate-N with a cache of its own, so a stopped command goes on where it
was. The report of the run joins the reports of its finished replicates (report/joined.py). What the recipe takes from
elsewhere (sft.from, data, questions) and the sampling seeds of landscape and evaluation are the same in all replicates.
"""

import dataclasses
import functools
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from salsa_peft.config.load import LoadedRecipe
from salsa_peft.config.options.trl import ALGORITHMS
from salsa_peft.config.schema import Recipe
from salsa_peft.recipe import cache, commits, run
from salsa_peft.recipe.estimates import hours
from salsa_peft.recipe.estimates.hardware import Gpu
from salsa_peft.recipe.estimates.hardware import gpus as gpus_here
from salsa_peft.recipe.parallel import room
from salsa_peft.recipe.parallel.pool import Task, run_together
from salsa_peft.recipe.processes import StageError
from salsa_peft.recipe.results.files import REPORT, show_headline
from salsa_peft.recipe.units import in_order
from salsa_peft.utils.console import say, wrapped
from salsa_peft.utils.errors import SalsaError
from salsa_peft.utils.files import write_atomic
from salsa_peft.utils.hub import Repository, pinned
from salsa_peft.utils.manifests import (
    MANIFEST,
    latest_report,
    read_manifest,
    replicate_folder,
    replicate_folders,
    stages_folder,
)
from salsa_peft.utils.messages import duration, one_line

STRIDE = 1000
"""Difference between the seeds of two replicates; a multiple of it if the recipe's own seeds are larger."""

ONE_SEED = ("toy", "synthetic", "ppo", *ALGORITHMS)
"""Sections with one training seed. `sft` and `reward` have several."""


def replicate(recipe: Recipe, number: int) -> Recipe:
    """The recipe of one replicate. Replicate 0 has the recipe's own seeds; the others have larger ones."""
    sections = {name: section for name in ONE_SEED if (section := getattr(recipe, name)) is not None}
    own = [policy.overrides["seed"] for policy in recipe.policies.values() if "seed" in policy.overrides]
    largest = max([*recipe.sft.seeds, *recipe.reward.seeds, *own, *(section.seed for section in sections.values())])
    shift = number * STRIDE * (1 + largest // STRIDE)

    def moved(seed: int) -> int:
        return (seed + shift) % 2**32

    changed: dict[str, Any] = {
        name: dataclasses.replace(section, seed=moved(section.seed)) for name, section in sections.items()
    }
    for name in ("sft", "reward"):
        section = getattr(recipe, name)
        changed[name] = dataclasses.replace(section, seeds=[moved(seed) for seed in section.seeds])

    def with_moved(part: Any) -> Any:
        """A policy or the section `warp`, whose overrides may have a seed."""
        own = part.overrides
        return dataclasses.replace(part, overrides={**own, "seed": moved(own["seed"])}) if "seed" in own else part

    changed["policies"] = {name: with_moved(policy) for name, policy in recipe.policies.items()}
    changed["warp"] = None if recipe.warp is None else with_moved(recipe.warp)
    return dataclasses.replace(recipe, replicates=1, **changed)


def kept_commits(folder: Path, recipe: Recipe, report: bool) -> dict[Repository, str]:
    """The commits that a run keeps, as in recipe/commits.py; replicates keep those of the first until all are finished."""
    if recipe.replicates == 1:
        return commits.kept_commits(folder, recipe, report)
    finished = sum(latest_report(one) is not None for one in replicate_folders(folder))
    return commits.kept_commits(replicate_folder(folder, 0), recipe, report or finished < recipe.replicates)


def run_replicates(
    loaded: LoadedRecipe,
    folder: Path,
    *,
    only: list[str] | None,
    dry_run: bool,
    gpu: Gpu | None,
    jobs: int = 1,
    **options: Any,
) -> None:
    """Run the replicates of a recipe, and join their reports; or print their plan (`dry_run`).

    jobs: number of replicates that run at the same time. The other arguments are those of `run.run`. Raises its errors; the
    replicates that are finished are kept.
    """
    count = loaded.recipe.replicates
    of = [dataclasses.replace(loaded, recipe=replicate(loaded.recipe, number)) for number in range(count)]
    if dry_run:
        run.run(of[0], replicate_folder(folder, 0), only=only, dry_run=True, gpu=gpu, **options)
        line = cost_line(loaded.recipe, folder, options.get("stages", run.STAGES), gpu)
        print(wrapped(line, sys.stdout, 0), flush=True)
        return
    if jobs > 1:
        _run_together(loaded, of, folder, min(jobs, count), only=only, **options)
    else:
        for number, one in enumerate(of):
            say(f"replicate {number + 1} of {count}")
            run.run(one, replicate_folder(folder, number), only=only, **options)
            write_atomic(folder / "recipe.yaml", run.resolved_yaml(loaded))
    if only is None or "report" in only:
        join(folder)


def _run_together(loaded: LoadedRecipe, of: Sequence[LoadedRecipe], folder: Path, jobs: int, **options: Any) -> None:
    """Run replicates, `jobs` of them at a time. Raises SalsaError or StageError at the end if some of them failed."""
    gpus, folders = gpus_here(), [replicate_folder(folder, number) for number in range(len(of))]
    tasks = [
        Task(path.name, functools.partial(_run_one, one, path, options), path, options.get("debug", False))
        for one, path in zip(of, folders, strict=True)
    ]
    places = room.slots(loaded.recipe, jobs, gpus)
    threads = places[0].get(room.THREADS)
    say(f"{len(of)} replicates, {jobs} at the same time" + (f", with {threads} CPU threads each" if threads else ""))
    said = _say_memory(folders, jobs, gpus)

    def finished(task: Task) -> None:
        nonlocal said
        say(f"{task.name} … finished", "green")
        write_atomic(folder / "recipe.yaml", run.resolved_yaml(loaded))
        said = said or _say_memory([task.folder], jobs, gpus)

    failed = run_together(tasks, places, finished)
    if failed:
        names = [f"{name} ({one_line(one.lines[0])})" for name, one in failed.items()]
        line = (
            f"{len(failed)} of {len(of)} replicates failed: {'; '.join(names)}. The others are finished and kept; run the"
            " same command again to continue"
        )
        raise SalsaError(line) if all(one.code == 2 for one in failed.values()) else StageError(line)


def _run_one(loaded: LoadedRecipe, folder: Path, options: Mapping[str, Any]) -> None:
    with pinned(loaded.recipe.model_revisions):
        run.run(loaded, folder, **options)


def _say_memory(folders: Sequence[Path], jobs: int, gpus: Sequence[Gpu]) -> bool:
    """Print how much memory the replicates need together, if a unit of these folders is finished; returns whether it is."""
    peak = room.peak(folders)
    if peak is None:
        return False
    line, short = room.memory_line(peak, jobs, gpus, room.ram_mb())
    say(f"warning: {line}" if short else line, "yellow" if short else "dim")
    return True


def join(folder: Path) -> None:
    """Write the joined report of a run's finished replicates into its folder, and print its headline and its path."""
    from salsa_peft.report.joined import write_joined
    from salsa_peft.report.replicates.runs import read_runs

    show_headline(write_joined(folder, read_runs([folder])))
    print(folder / REPORT, flush=True)


class Cost(NamedTuple):
    """Seconds of the replicates of a run."""

    each: float
    """Seconds of one replicate: measured, and for units that were never run the mean of their stage."""
    left: float
    """Seconds of all units that are not finished."""
    unknown: tuple[str, ...]
    """Stages of which no unit is finished and whose seconds are not planned: they are counted as 0."""


def cost(recipe: Recipe, folder: Path, stages: dict[str, run.Stage], gpu: Gpu | None) -> Cost:
    """Seconds of a run's replicates from the manifests of finished units, or as planned by the GPU's speed."""
    found = replicate_folders(folder)
    measured: dict[str, list[float]] = {}
    for stage in stages:
        for manifest in (path for one in found for path in stages_folder(one).glob(f"{stage}/**/{MANIFEST}")):
            took = (read_manifest(manifest.parent) or {}).get("seconds")
            measured.setdefault(stage, []).extend([] if took is None else [took])
    each = left = 0.0
    unknown: dict[str, None] = {}
    for number in range(recipe.replicates):
        one = replicate(recipe, number)
        units = in_order(unit for stage in stages.values() for unit in stage.units(one, stage.run))
        for planned in cache.plan(units, replicate_folder(folder, number)).values():
            known = measured.get(planned.unit.stage)
            seconds = sum(known) / len(known) if known else hours.seconds(one, planned.unit, gpu)
            if seconds is None:
                unknown[planned.unit.stage] = None
                continue
            each += seconds / recipe.replicates
            left += 0.0 if planned.why is None else seconds
    return Cost(each, left, tuple(unknown))


def cost_line(recipe: Recipe, folder: Path, stages: dict[str, run.Stage], gpu: Gpu | None) -> str:
    """The plan's line about the cost of all replicates."""
    count, found = recipe.replicates, cost(recipe, folder, stages, gpu)
    finished = sum(latest_report(one) is not None for one in replicate_folders(folder))
    start = f"replicates: {count} runs like this one, of which {finished} are finished"
    if found.each == 0.0:
        return (
            f"{start}; their cost is known when the first units are finished, since no hours are planned without a"
            " GPU: run --dry-run again then"
        )
    on = "GPU" if gpu is not None and gpu.speed is not None else "core"
    cores = recipe.num_processes if on == "GPU" else (recipe.threads or os.cpu_count() or 1) * recipe.num_processes
    total, left = (seconds * cores / 3600 for seconds in (found.each * count, found.left))
    unknown = f" (without {', '.join(found.unknown)}, which no run has measured yet)" if found.unknown else ""
    return (
        f"{start}; {duration(found.each)} each on {cores} {on}{'s' * (cores > 1)}: {total:.2g} {on} hours in all,"
        f" {left:.2g} of them left{unknown}"
    )
