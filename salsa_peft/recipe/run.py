"""Runs a recipe: its stages in order, each in its own processes. Cached results are not made again.

The command is recipe/__main__.py. torch is not imported.
"""

import dataclasses
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from salsa_peft.config.job import Job, Unit, recipe_of_unit
from salsa_peft.config.judge import check_ready
from salsa_peft.config.load import LoadedRecipe
from salsa_peft.config.paths import is_local
from salsa_peft.config.policies.made import without_made
from salsa_peft.config.schema import Recipe
from salsa_peft.config.yaml import dump_yaml
from salsa_peft.data.check import check_every_row
from salsa_peft.recipe import cache, processes, units
from salsa_peft.recipe.commits import keep_commits, unknown_commits
from salsa_peft.recipe.estimates import disk, hardware, hours
from salsa_peft.recipe.results.files import REPORT, copy_report, show_headline
from salsa_peft.recipe.results.names import check_names, forget_removed, move_old_stages, update_names, withdraw_names
from salsa_peft.utils.console import say
from salsa_peft.utils.errors import SalsaError, require
from salsa_peft.utils.files import locked, read_json, timestamp, write_atomic
from salsa_peft.utils.hub import Repository
from salsa_peft.utils.manifests import MANIFEST, versions
from salsa_peft.utils.messages import did_you_mean, duration, one_line, short


class Stage(NamedTuple):
    """A stage of a recipe: its function, its units, and how it runs."""

    run: str
    """The stage function, "module:name"."""
    units: Callable[[Recipe, str], list[Unit]]
    """Function that returns the stage's units of work for a recipe. Its second argument is `run`."""
    resumes: bool = False
    """Whether the stage can resume its unfinished result. If not, the unfinished result is removed."""
    trains: bool = False
    """Whether the stage runs in the recipe's num_processes processes; if not, it runs in one."""


STAGES = {
    "toy": Stage("salsa_peft.recipe.small_stages:toy", units.toy_units),
    "synthetic": Stage("salsa_peft.evaluation.synthetic:run", units.synthetic_units, resumes=True),
    "data": Stage("salsa_peft.recipe.small_stages:data", units.data_units),
    "sft": Stage("salsa_peft.training.sft:run", units.sft_units, resumes=True, trains=True),
    "reward": Stage("salsa_peft.training.reward_model:run", units.reward_units, resumes=True, trains=True),
    "reward_quality": Stage("salsa_peft.evaluation.reward_quality:run", units.reward_quality_units),
    "soup": Stage("salsa_peft.recipe.small_stages:soup", units.soup_units),
    "soups": Stage("salsa_peft.recipe.small_stages:soup", units.further_soup_units),
    "ppo": Stage("salsa_peft.training.ppo_stage:run", units.POLICY_UNITS["ppo"], resumes=True, trains=True),
    "dpo": Stage("salsa_peft.training.trl_stages:run", units.POLICY_UNITS["dpo"], resumes=True),
    "kto": Stage("salsa_peft.training.trl_stages:run", units.POLICY_UNITS["kto"], resumes=True),
    "rloo": Stage("salsa_peft.training.trl_stages:run", units.POLICY_UNITS["rloo"], resumes=True),
    "grpo": Stage("salsa_peft.training.trl_stages:run", units.POLICY_UNITS["grpo"], resumes=True),
    "landscape": Stage("salsa_peft.evaluation.landscape:run", units.landscape_units, resumes=True),
    "evaluate": Stage("salsa_peft.evaluation.evaluate:run", units.evaluate_units, resumes=True),
    "judge": Stage("salsa_peft.evaluation.judges.stage:run", units.judge_units),
    "report": Stage("salsa_peft.recipe.small_stages:report", units.report_units),
    "hub": Stage("salsa_peft.report.publish.hub:run", units.hub_units),
}


def run(
    loaded: LoadedRecipe,
    folder: Path,
    *,
    stages: dict[str, Stage] = STAGES,
    only: list[str] | None = None,
    force: Iterable[str] = (),
    prune: bool = False,
    dry_run: bool = False,
    gpu: hardware.Gpu | None = None,
    commits: Mapping[Repository, str] | None = None,
    report_of: str | None = None,
    debug: bool = False,
) -> None:
    """Run a recipe in a folder, or print its plan (`dry_run`).

    Raises SalsaError if a check fails, and StageError if a stage fails.

    only: the stages or units to run; None for all. force: stages or units to run even if their results are cached.
    gpu: the GPU that a dry run plans for; None for this machine's GPU. commits: those that the run keeps until it is
    finished. report_of: the command of the run that `salsa report` reports; its results may be outdated by an upgrade.
    """
    recipe = loaded.recipe
    work = units.in_order(unit for stage in stages.values() for unit in stage.units(recipe, stage.run))
    asked = {unit.id for unit in work} if only is None else selected(work, only, "--stages")
    forced = selected(work, force, "--force")

    # 1. plan and check; for a new run everything is checked before the first file is written
    new = not folder.exists()
    if dry_run or new:
        plan = make_plan(work, folder, forced, asked, report_of)
        if gpu is None:  # else the plan is for another machine
            hardware.check_packages(recipe, stages_to_run(plan, asked))
        check_data(recipe, plan, asked)
    if dry_run:
        check_names(folder, recipe)
        from salsa_peft.recipe.dry_run import show_plan

        show_plan(loaded, folder, plan, asked, gpu or next(iter(hardware.gpus()), None))
        return
    if new:
        check_machine(recipe, plan, asked)
        check_data(recipe, plan, asked, hub=True)
    with locked(folder):
        check_names(folder, recipe)
        move_old_stages(folder)
        # 2. plan again: another process may have changed the folder before it was locked
        plan = make_plan(work, folder, forced, asked, report_of)
        if not new:
            check_data(recipe, plan, asked)
        for warning in (*unknown_commits(recipe), *check_machine(recipe, plan, asked)):
            say(f"warning: {warning}", "yellow")
        if not new:
            check_data(recipe, plan, asked, hub=True)
        # 3. run; until everything is finished, the next commands keep the commits
        keep_commits(folder, commits or {}, finished=False)
        execute(loaded, folder, plan, asked, debug)
        everything = all(name in asked or planned.why is None for name, planned in plan.items())
        keep_commits(folder, commits or {}, finished=everything)
        # 4. remove old results
        for path in cache.prune(folder, stages, plan) if prune else []:
            say(f"pruned {path.relative_to(folder)}")
        if prune:
            forget_removed(folder)


def make_plan(
    work: list[Unit], folder: Path, forced: Iterable[str], asked: Collection[str], report_of: str | None
) -> cache.Plan:
    """The plan, whose units to run have all that they need. Prints a line about outdated results that a report shows."""
    plan, line = cache.plan(work, folder, forced), None
    if report_of is not None:
        plan, line = cache.with_outdated(plan, asked)
    check_inputs(plan, asked, report_of)
    if line is not None:
        say(line)
    return plan


def execute(loaded: LoadedRecipe, folder: Path, plan: cache.Plan, asked: set[str], debug: bool) -> None:
    """Run the units in `asked` in the plan's order. The caller holds the lock of the run's folder."""
    say(f"results: {folder}")
    if "report" in asked:
        say(f"report:  {folder / REPORT}")
    recipe_yaml = resolved_yaml(loaded)
    write_atomic(folder / "recipe.yaml", recipe_yaml)
    if any(planned.why is not None for name, planned in plan.items() if name in asked):
        say("loading libraries …")
    finished = {name: planned.folder for name, planned in plan.items() if planned.why is None}
    update_names(folder, loaded.recipe, finished)
    for name, planned in plan.items():
        if name not in asked:
            continue
        _run_unit(planned, plan, loaded.recipe, recipe_yaml, folder, debug)
        if planned.why is not None:
            finished[name] = planned.folder
            update_names(folder, loaded.recipe, finished)
        if name == "report":
            _show_report(planned.folder, folder)


def _show_report(report: Path, run: Path) -> None:
    """Copy the report's files into the run's folder, and print its headline and the path of report.html."""
    copy_report(report, run)
    show_headline(read_json(report / "summary.json"))
    print(run / REPORT, flush=True)


def _run_unit(
    planned: cache.PlannedUnit, plan: cache.Plan, recipe: Recipe, recipe_yaml: str, folder: Path, debug: bool
) -> None:
    """Run one unit and write its manifest, or print that its result is cached."""
    unit = planned.unit
    if planned.why is None:
        cache.remove_temporary_files(planned.folder)  # left if the run was killed just after the manifest was written
        say(f"{unit.id} … cached", "dim")
        return
    earlier = _seconds_so_far(planned, plan) if planned.why == "unfinished" else None
    if planned.why.startswith(("changed", "missing", "unfinished", "outdated")):
        say(f"{unit.id} … {planned.why}: {'starting again' if earlier is None else 'resuming'}")
    started = timestamp()
    inputs = {name: plan[name].folder for name in unit.inputs}
    job = Job(
        recipe=recipe_of_unit(recipe, unit), unit=unit, folder=planned.folder, inputs=inputs, recipe_yaml=recipe_yaml
    )
    withdraw_names(folder, planned.folder)
    log = folder / "logs" / f"{unit.id.replace('/', '-')}.log"
    result, job, halved = _run_job(job, planned, plan, earlier, log, debug)
    on_gpu = result.gpu_peak_mb is not None
    planned_mb = hardware.planned_mb(job.recipe, unit.stage) if on_gpu else None
    seconds = hours.seconds(job.recipe, unit, next(iter(hardware.gpus()), None)) if on_gpu else None
    planned_facts = {"gpu_planned_mb": planned_mb, "planned_seconds": seconds}
    facts = dataclasses.asdict(result) | planned_facts | ({"halved": halved} if halved else {})
    cache.write_manifest(planned, plan, started=started, versions=versions(unit.libraries), **facts)
    cache.remove_temporary_files(planned.folder)
    gpu = "" if result.gpu_peak_mb is None else f", GPU {result.gpu_peak_mb:.0f} MB"
    gpu += "" if planned_mb is None else f" (planned {planned_mb:.0f})"
    took = duration(result.seconds) + ("" if seconds is None else f" (planned {duration(seconds)})")
    together = f" in {count} processes together" if (count := _processes(job)) > 1 else ""
    say(f"{unit.id} … done in {took}, peak {result.peak_mb:.0f} MB{together}{gpu}", "green")


def _seconds_so_far(planned: cache.PlannedUnit, plan: cache.Plan) -> float | None:
    """Seconds of an unfinished result with which its stage goes on; None if the stage starts again."""
    return cache.seconds_so_far(planned, plan) if STAGES[planned.unit.stage].resumes else None


def _run_job(
    job: Job, planned: cache.PlannedUnit, plan: cache.Plan, earlier: float | None, log: Path, debug: bool
) -> tuple[processes.Result, Job, dict[str, int]]:
    """Run a job; after each out-of-memory error, run it again with smaller batches (`halve_batches`).

    Returns the result, the job as it was run last, and the values of the recipe keys that were made smaller. The result's
    seconds include those up to the checkpoint that the job goes on from. earlier: as from _seconds_so_far.
    """
    halved: dict[str, int] = {}
    while True:
        if earlier is None:
            _empty(planned.folder)
        cache.write_begun(planned, plan, earlier or 0.0)
        try:
            result = processes.run_job(job, log, count=_processes(job), debug=debug)
            return dataclasses.replace(result, seconds=round((earlier or 0.0) + result.seconds, 3)), job, halved
        except processes.OutOfMemory as error:
            smaller = hardware.halve_batches(job.recipe, job.unit.stage)
            if smaller is None:
                raise
            earlier = _seconds_so_far(planned, plan)
            say(one_line(error), "yellow")
            changes = ", ".join(f"{key} {after} (was {before})" for key, (before, after) in smaller.changed.items())
            again = "starting again" if earlier is None else "resuming"
            say(f"{job.unit.id} … {again} with {changes}; the global batch stays the same")
            job = dataclasses.replace(job, recipe=smaller.recipe)
            halved |= {key: after for key, (_, after) in smaller.changed.items()}


def _processes(job: Job) -> int:
    """Number of processes that share a job's work."""
    return job.recipe.num_processes if STAGES[job.unit.stage].trains else 1


def _empty(folder: Path) -> None:
    """Empty a result's folder, manifest first: if this is interrupted, the result counts as unfinished."""
    if folder.is_dir() and not folder.is_symlink():
        manifest = folder / MANIFEST
        if not manifest.is_dir():
            manifest.unlink(missing_ok=True)
        shutil.rmtree(folder)
    else:
        folder.unlink(missing_ok=True)
    folder.mkdir(parents=True)


def selected(work: list[Unit], words: Iterable[str], option: str) -> set[str]:
    """The ids of the units that `words` name, by stage or by unit id.

    Raises SalsaError, with the nearest known name, for an unknown word.
    """
    found: set[str] = set()
    for word in words:
        ids = {unit.id for unit in work if word in (unit.id, unit.stage)}
        known = list(dict.fromkeys([unit.stage for unit in work] + [unit.id for unit in work]))
        require(bool(ids), f"{option} {word}: this recipe has no such stage; {did_you_mean(word, known, 'stages')}")
        found |= ids
    return found


def stages_to_run(plan: cache.Plan, asked: Collection[str]) -> set[str]:
    """The stages of the units in `asked` whose results are not cached."""
    return {plan[name].unit.stage for name in asked if plan[name].why is not None}


def check_inputs(plan: cache.Plan, asked: Collection[str], report_of: str | None = None) -> None:
    """Raise SalsaError if units to run need results that are neither finished nor made in this run; name them all.

    report_of: as in `run`.
    """
    needed: set[str] = set()
    for name, planned in reversed(plan.items()):  # inputs come before the units that need them
        if planned.why is not None and (name in asked or name in needed):
            needed |= {one for one in planned.unit.inputs if plan[one].why is not None and one not in asked}
    missing: dict[str, str] = {}
    for name in [name for name in plan if name in needed]:  # of each stage the first unit
        missing.setdefault(plan[name].unit.stage, f"{name} ({plan[name].why})")
    first = next((name for name in plan if name in asked and needed.intersection(plan[name].unit.inputs)), "")
    remedy = f"add {','.join(missing)}" if report_of is None else f"run the recipe first: {report_of}"
    start = f"--stages: {first}" if report_of is None else first
    require(not missing, f"{start} needs results that are not finished: {', '.join(missing.values())}; {remedy}")


def check_data(recipe: Recipe, plan: cache.Plan, asked: set[str], hub: bool = False) -> None:
    """Raise SalsaError for a row, seed, reference or reward model that the units to run cannot use.

    Checks local files, or with `hub` files on the Hub, which are downloaded first.
    """
    to_run = [plan[name].unit for name in asked if plan[name].why is not None]
    stages = {unit.stage for unit in to_run}
    if stages:
        from salsa_peft.training import external_models

        if hub:
            external_models.check_base_available(recipe)
        external_models.check(recipe, stages, hub)
    data = recipe.data
    sources = [data.demonstrations, data.held_out, data.preferences, data.prompts, *recipe.evaluate.prompts.values()]
    local = [is_local(source.path) for source in sources if source is not None]
    if stages and (not all(local) if hub else any(local)):
        if hub:
            say("checking the datasets from the Hub …")
        check_every_row(recipe, stages | {unit.id for unit in to_run}, hub)


def check_machine(recipe: Recipe, plan: cache.Plan, asked: set[str]) -> list[str]:
    """Raise SalsaError if the units to run need more than this machine has; return warnings.

    Checks the GPU's memory, the number of GPUs, the disk space, the judge's API key, and the login at the Hub.
    """
    from huggingface_hub import get_token

    stages = stages_to_run(plan, asked)
    hardware.check_packages(recipe, stages)
    hardware.check_rollout(recipe, stages)
    if recipe.num_processes > 1 and any(STAGES[stage].trains for stage in stages):
        hardware.check_processes(recipe)
    warnings = hardware.check_gpu(recipe, hardware.gpus(), stages) if stages else []
    if "judge" in stages and recipe.evaluate.judge is not None:
        check_ready(recipe.evaluate.judge, "evaluate.judge")
    disk.check(recipe, plan, asked)
    if "hub" in asked and get_token() is None:
        pending = "you are not logged in, so the push will stay pending"
        warnings.append(f"hub.push: {pending}; run `hf auth login`, or set HF_TOKEN")
    return warnings


def run_folder(loaded: LoadedRecipe, output_dir: str | None) -> Path:
    """Absolute path of --output-dir; by default runs/<name>, or with adapters runs/<name>-<preset>."""
    mode = loaded.recipe.mode
    name = loaded.recipe.name if mode == "full" else f"{loaded.recipe.name}-{loaded.preset or mode}"
    folder = Path(os.path.abspath(output_dir or os.path.join("runs", name)))
    try:
        above = next(path for path in (folder, *folder.parents) if path.exists())
    except OSError as error:
        raise SalsaError(
            f"--output-dir: {short(str(folder))} cannot be a folder ({error.strerror}); choose another name"
        ) from error
    require(above.is_dir(), f"--output-dir: {above} is a file; choose a folder")
    require(os.access(above, os.W_OK), f"--output-dir: {above} cannot be written to; choose another folder")
    return folder


def resolved_yaml(loaded: LoadedRecipe) -> str:
    """The recipe as YAML with all its values, defaults included, to be run without --lora."""
    lora = f" --lora {loaded.preset}" if loaded.preset else ""
    return f"# {loaded.path.name}{lora}, with every default; runs as it is.\n" + dump_yaml(
        without_made(loaded.recipe.as_data())
    )
