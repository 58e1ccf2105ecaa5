"""`salsa run`: a recipe from its SFT seeds to the report.

    python -m salsa_peft.recipe quickstart --lora
    python -m salsa_peft.recipe my.yaml --lora --set ppo.learning_rate=1e-5 --dry-run

Each stage is a function of its own module, run in a process of its own; one whose result is there is skipped. This module and what it imports
load no torch.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from salsa_peft.config.job import Job, Unit
from salsa_peft.config.judge import check_ready
from salsa_peft.config.load import LoadedRecipe, bundled_names, load_recipe
from salsa_peft.config.options.trl import ALGORITHMS
from salsa_peft.config.paths import is_local
from salsa_peft.config.schema import Recipe
from salsa_peft.config.yaml import dump_yaml
from salsa_peft.data import check
from salsa_peft.models.architectures import checks
from salsa_peft.recipe import cache, disk, hardware, launch, processes, units
from salsa_peft.utils.console import Parser, say
from salsa_peft.utils.errors import SalsaError, require
from salsa_peft.utils.files import disk_full_message, locked, timestamp, write_atomic
from salsa_peft.utils.manifests import MANIFEST, versions
from salsa_peft.utils.messages import did_you_mean, duration, one_line, short
from salsa_peft.utils.oom import largest_proper_divisor


class Stage(NamedTuple):
    """A row of the table: the function that does the work, and the one that says which pieces there are."""

    run: str
    units: Callable[[Recipe, str], list[Unit]]
    resumes: bool = False
    """Whether it goes on from its own checkpoints; what is unfinished in its folder is left to it."""
    trains: bool = False
    """Whether the recipe's num_processes share its work; other stages have one process."""


STAGES = {
    "toy": Stage("salsa_peft.recipe.stages:toy", units.toy_units),
    "sft": Stage("salsa_peft.training.sft:run", units.sft_units, trains=True),
    "reward": Stage("salsa_peft.training.reward_model:run", units.reward_units, trains=True),
    "soup": Stage("salsa_peft.recipe.stages:soup", units.soup_units),
    "ppo": Stage("salsa_peft.training.ppo_stage:run", units.POLICY_UNITS["ppo"], resumes=True, trains=True),
    "dpo": Stage("salsa_peft.training.trl_stages:run", units.POLICY_UNITS["dpo"]),
    "kto": Stage("salsa_peft.training.trl_stages:run", units.POLICY_UNITS["kto"]),
    "rloo": Stage("salsa_peft.training.trl_stages:run", units.POLICY_UNITS["rloo"]),
    "grpo": Stage("salsa_peft.training.trl_stages:run", units.POLICY_UNITS["grpo"]),
    "landscape": Stage("salsa_peft.evaluation.landscape:run", units.landscape_units),
    "evaluate": Stage("salsa_peft.evaluation.evaluate:run", units.evaluate_units, resumes=True),
    "judge": Stage("salsa_peft.evaluation.judges.stage:run", units.judge_units),
    "report": Stage("salsa_peft.recipe.stages:report", units.report_units),
    "hub": Stage("salsa_peft.report.hub:run", units.hub_units),
}
REPORT = "report.html"


def main(argv: Sequence[str] | None = None, *, stages: dict[str, Stage] = STAGES, prog: str = "salsa run") -> int:
    """The command. Returns 0; 2 for what the user can mend before anything ran; 1 where a stage failed; 130, 143 on signals."""
    args = parse_args(list(sys.argv[1:] if argv is None else argv), prog)
    run = Path()
    try:
        with processes.signals():
            loaded = load(args.recipe, lora=args.lora, overrides=args.set)
            run = run_folder(loaded, args.output_dir)
            work = [unit for stage in stages.values() for unit in stage.units(loaded.recipe, stage.run)]
            asked = selected(work, args.stages, "--stages") if args.stages is not None else {unit.id for unit in work}
            forced = selected(work, args.force, "--force")
            new = not run.exists()
            if args.dry_run or new:  # a refusal comes before anything is written
                steps = cache.plan(work, run, forced)
                check_inputs(steps, asked)
                check_data(loaded.recipe, steps, asked)
                check_machine(loaded.recipe, {} if args.dry_run else steps, asked)
                if not args.dry_run:
                    check_data(loaded.recipe, steps, asked, hub=True)
            if args.dry_run:
                from salsa_peft.recipe.dry_run import show_plan

                show_plan(loaded, run, steps, asked, args.gpu or next(iter(hardware.cards()), None))
                return 0
            with locked(run):
                steps = cache.plan(work, run, forced)
                check_inputs(steps, asked)
                if not new:
                    check_data(loaded.recipe, steps, asked)
                for line in check_machine(loaded.recipe, steps, asked):
                    say(f"warning: {line}")
                if not new:
                    check_data(loaded.recipe, steps, asked, hub=True)
                execute(loaded, run, steps, asked, args.debug)
                for path in cache.prune(run, stages, steps) if args.prune else []:
                    say(f"pruned {path.relative_to(run)}")
            return 0
    except SalsaError as error:
        return _say_and(2, one_line(error), args.debug)
    except processes.StageError as error:
        return _say_and(1, one_line(error), args.debug)
    except OSError as error:
        line = f"{error.filename or run}: found it can't be read or written ({error.strerror or error}), expected that; what is done stays"
        return _say_and(1, one_line(disk_full_message(error, run) or line), args.debug)
    except KeyboardInterrupt:
        return _say_and(130, "stopped; the same command goes on where it was", False)
    except processes.Terminated:
        return _say_and(143, "terminated; the same command goes on where it was", False)


def load(path_or_name: str, *, lora: str | None, overrides: list[str]) -> LoadedRecipe:
    """load_recipe, and what the local data and the base's config.json show. Raises SalsaError."""
    return load_recipe(path_or_name, lora=lora, overrides=overrides, more=(check.check_local, checks.check))


def execute(loaded: LoadedRecipe, run: Path, steps: dict[str, cache.Step], asked: set[str], debug: bool) -> None:
    """Do what the plan says, in order; the run folder is locked."""
    report = [step.folder for step in steps.values() if step.unit.stage == "report" and step.unit.id in asked]
    say(f"results: {run}")
    if report:
        say(f"report:  {run / REPORT}")
    recipe_yaml = resolved_yaml(loaded)
    write_atomic(run / "recipe.yaml", recipe_yaml)
    if any(step.why is not None for name, step in steps.items() if name in asked):
        say("loading libraries …")
    for name, step in steps.items():
        if name in asked:
            _do(step, steps, loaded.recipe, recipe_yaml, run, debug)
        if (
            step.folder in report
        ):  # a copy under a name that stays; its folder has report.md, summary.json and the figures too
            write_atomic(run / REPORT, (step.folder / REPORT).read_bytes())
            print(run / REPORT, flush=True)


def _do(
    step: cache.Step, steps: dict[str, cache.Step], recipe: Recipe, recipe_yaml: str, run: Path, debug: bool
) -> None:
    """Make one unit, or say that it is there."""
    unit = step.unit
    if step.why is None:
        cache.tidy(step.folder)  # a kill can have come just before
        say(f"{unit.id} … cached")
        return
    goes_on = STAGES[unit.stage].resumes and step.why == "unfinished" and cache.begun(step, steps)
    if step.why.startswith(("changed", "missing", "unfinished")):
        say(f"{unit.id} … {step.why}: {'goes on' if goes_on else 'made again'}")
    started = timestamp()
    inputs = {name: steps[name].folder for name in unit.inputs}
    job = Job(recipe=recipe, unit=unit, folder=step.folder, inputs=inputs, recipe_yaml=recipe_yaml)
    log = run / "logs" / f"{unit.id.replace('/', '-')}.log"
    result, job, halved = _made(job, step, steps, goes_on, log, debug)
    planned = None if result.gpu_peak_mb is None else hardware.planned_mb(job.recipe, unit.stage)
    facts = dataclasses.asdict(result) | {"gpu_planned_mb": planned} | ({"halved": halved} if halved else {})
    cache.write_manifest(step, steps, started=started, versions=versions(), **facts)
    cache.tidy(step.folder)
    gpu = "" if result.gpu_peak_mb is None else f", GPU {result.gpu_peak_mb:.0f} MB"
    gpu += "" if planned is None else f" (planned {planned:.0f})"
    together = f" in {recipe.num_processes} processes together" if _several(job) else ""
    say(f"{unit.id} … done in {duration(result.seconds)}, peak {result.peak_mb:.0f} MB{together}{gpu}")


def _made(
    job: Job, step: cache.Step, steps: dict[str, cache.Step], goes_on: bool, log: Path, debug: bool
) -> tuple[processes.Result, Job, dict[str, int]]:
    """Run a unit's job; where its memory ran out, again with less at a time → its result, the job as it ended, what was halved."""
    halved: dict[str, int] = {}
    while True:
        if not goes_on:
            _empty(step.folder)
            cache.write_begun(step, steps)
        try:
            return (launch.run if _several(job) else processes.run_in_process)(job, log, debug=debug), job, halved
        except processes.OutOfMemory as error:
            if (less := smaller(job.recipe, job.unit.stage)) is None:
                raise
            goes_on = STAGES[job.unit.stage].resumes
            say(one_line(error))
            say(
                f"{job.unit.id} … {'goes on' if goes_on else 'again'} with {less.told()}; the global batch stays as it is"
            )
            job = dataclasses.replace(job, recipe=less.recipe)
            halved |= {key: timestamp for key, (_, timestamp) in less.changed.items()}


def _several(job: Job) -> bool:
    """Whether its stage's work is shared among processes."""
    return job.recipe.num_processes > 1 and STAGES[job.unit.stage].trains


def _empty(folder: Path) -> None:
    """The manifest goes first: killed in between, the folder is unfinished, not damaged."""
    if folder.is_dir() and not folder.is_symlink():
        manifest = folder / MANIFEST
        if not manifest.is_dir():
            manifest.unlink(missing_ok=True)
        shutil.rmtree(folder)
    else:
        folder.unlink(missing_ok=True)
    folder.mkdir(parents=True)


def selected(work: list[Unit], words: list[str], option: str) -> set[str]:
    """Ids of the units that words name, by stage or by unit. Raises SalsaError with the nearest name."""
    found: set[str] = set()
    for word in words:
        ids = {unit.id for unit in work if word in (unit.id, unit.stage)}
        known = list(dict.fromkeys([unit.stage for unit in work] + [unit.id for unit in work]))
        require(
            bool(ids), f"{option} {word}: found no such stage in this recipe; {did_you_mean(word, known, 'stages')}"
        )
        found |= ids
    return found


def check_inputs(steps: dict[str, cache.Step], asked: set[str]) -> None:
    """Raise SalsaError where a unit that will be made reads one that is neither finished nor asked for."""
    for name in asked:
        for needed in steps[name].unit.inputs if steps[name].why is not None else ():
            why = steps[needed].why
            there = why is None or needed in asked
            require(
                there, f"--stages: {name} needs {needed}, which is not finished ({why}); add {steps[needed].unit.stage}"
            )


def check_data(recipe: Recipe, steps: dict[str, cache.Step], asked: set[str], hub: bool = False) -> None:
    """Raise SalsaError for a row that a unit which will be made can't use, and for a seed, reference or reward: of local files, or with `hub`
    of what the Hub holds, which is fetched for that."""
    made = {steps[name].unit.stage for name in asked if steps[name].why is not None}
    if made:
        from salsa_peft.training import taken_results

        if hub:
            taken_results.check_base_available(recipe)
        taken_results.check(recipe, made, hub)
    own = recipe.data
    given = [own.demonstrations, own.held_out, own.preferences, own.prompts, *recipe.evaluate.prompts.values()]
    local = [is_local(source.path) for source in given if source is not None]
    if made and (not all(local) if hub else any(local)):
        if hub:
            say("looking at the Hub's data sets …")
        check.check_every_row(recipe, made, hub)


def check_machine(recipe: Recipe, steps: dict[str, cache.Step], asked: set[str]) -> list[str]:
    """Raise SalsaError where a unit that will be made wants a GPU that is not there, more processes than this machine can run, more room
    than the disk has, or a key that is not set; → warnings, a line each."""
    made = {step.unit.stage for name, step in steps.items() if name in asked and step.why is not None}
    if recipe.num_processes > 1 and any(STAGES[stage].trains for stage in made):
        launch.check(recipe)
    warnings = hardware.check_device(recipe, hardware.cards(), made) if made else []
    if "judge" in made and recipe.evaluate.judge is not None:
        check_ready(recipe.evaluate.judge, "evaluate.judge")
    disk.check(recipe, steps, asked)
    if "hub" in asked and steps and not logged_in():
        warnings.append("hub.push: found no login; what is pushed will be pending: `hf auth login`, or set HF_TOKEN")
    return warnings


def logged_in() -> bool:
    """Whether there is a token for the Hub."""
    from huggingface_hub import get_token

    return get_token() is not None


def run_folder(loaded: LoadedRecipe, output_dir: str | None) -> Path:
    """runs/<name>, with adapters runs/<name>-<preset>, or --output-dir; absolute."""
    mode = loaded.recipe.mode
    name = loaded.recipe.name if mode == "full" else f"{loaded.recipe.name}-{loaded.preset or mode}"
    folder = Path(os.path.abspath(output_dir or os.path.join("runs", name)))
    try:
        above = next(path for path in (folder, *folder.parents) if path.exists())
    except OSError as error:
        raise SalsaError(
            f"--output-dir: found {short(str(folder))} ({error.strerror}), expected a folder's name"
        ) from error
    require(above.is_dir(), f"--output-dir: found {above}, which is a file, expected a folder")
    require(os.access(above, os.W_OK), f"--output-dir: {above} cannot be written to; choose another folder")
    return folder


def resolved_yaml(loaded: LoadedRecipe) -> str:
    """Every value of the recipe as it ran, defaults included; itself a recipe that runs without --lora."""
    how = f" --lora {loaded.preset}" if loaded.preset else ""
    return f"# {loaded.path.name}{how}, with every default; runs as it is.\n" + dump_yaml(loaded.recipe.as_data())


def _say_and(code: int, line: str, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    say(line)
    return code


def parse_args(argv: list[str], prog: str = "salsa run") -> argparse.Namespace:
    """The command line; `--lora` takes a preset's name after it and leaves the recipe alone, wherever it stands."""
    parser = Parser(prog=prog, description="Run a recipe: seeds, reward model, soup, PPO, landscape, evaluation, report.",
                    epilog=f"Bundled recipes: {', '.join(bundled_names('recipes')) or 'none'}.")  # fmt: skip
    parser.add_argument("words", nargs="*", metavar="RECIPE", help="a YAML file, or a bundled recipe's name")
    parser.add_argument(
        "--lora",
        metavar="PRESET",
        help=f"train adapters: one of {', '.join(bundled_names('adapters'))} (no value: lora)",
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override, such as ppo.learning_rate=1e-6"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan and write nothing")
    parser.add_argument(
        "--gpu",
        type=_card,
        metavar="GIB",
        help="with --dry-run: the memory of a GPU to plan for (default: the one that is there)",
    )
    parser.add_argument("--stages", type=_comma, metavar="A,B", help="only these stages or units: sft,ppo/salsa")
    parser.add_argument(
        "--force", action="append", default=[], metavar="STAGE", help="do a stage or unit again, and what hangs on it"
    )
    parser.add_argument("--output-dir", metavar="DIR", help="instead of runs/<name>-<preset>")
    parser.add_argument("--prune", action="store_true", help="at the end remove results that this recipe no longer has")
    parser.add_argument("--debug", action="store_true", help="show traces")
    after = None
    for index, word in enumerate(argv):
        if word == "--":
            break
        if word == "--lora":
            after = argv[index + 1] if index + 1 < len(argv) and not argv[index + 1].startswith("-") else None
            argv = [
                *argv[:index],
                f"--lora={after}" if after in bundled_names("adapters") else "--lora=lora",
                *argv[index + 1 :],
            ]
            if after in bundled_names("adapters"):
                del argv[index + 1]
                after = None
            break
    args = parser.parse_intermixed_args(argv)
    if after is not None and len(args.words) == 2 and after in args.words:
        args.lora = after  # no preset of that name: load_recipe says which there are
        args.words.remove(after)
    if len(args.words) != 1:
        parser.error(
            f"found {len(args.words)} recipes ({' '.join(args.words) or 'none'}), expected one: a YAML file or a bundled name"
        )
    if args.gpu is not None and not args.dry_run:
        parser.error("found --gpu without --dry-run, expected both: it plans for a card, it chooses none")
    args.recipe = args.words[0]
    return args


def _card(text: str) -> hardware.Card:
    try:
        size = float(text)
    except ValueError:
        size = math.nan
    if not 0 < size < 10_000:
        raise argparse.ArgumentTypeError(f"found {text}, expected GiB such as 24")
    return hardware.Card("--gpu", int(size * 2**30))


def _comma(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


class Smaller(NamedTuple):
    """What to go on with."""

    recipe: Recipe
    changed: dict[str, tuple[int, int]]
    """Key of the recipe → what it was, what it is."""

    def told(self) -> str:
        """For people."""
        return ", ".join(f"{key} {now} (was {was})" for key, (was, now) in self.changed.items())


def smaller(recipe: Recipe, stage: str) -> Smaller | None:
    """The recipe with half as much at a time in that stage, or None where there is nothing to halve."""
    if stage in ("sft", "reward", "ppo", *ALGORITHMS):
        return _training(recipe, stage)
    if stage in ("landscape", "evaluate") and (timestamp := largest_proper_divisor(recipe.generation.batch_size)):
        changed = {"generation.batch_size": (recipe.generation.batch_size, timestamp)}
        return Smaller(replace(recipe, generation=replace(recipe.generation, batch_size=timestamp)), changed)
    judge: Any = recipe.evaluate.judge
    if (
        stage == "judge"
        and judge is not None
        and judge.kind == "local"
        and (timestamp := largest_proper_divisor(judge.concurrency))
    ):
        evaluate = replace(recipe.evaluate, judge=replace(judge, concurrency=timestamp))
        return Smaller(replace(recipe, evaluate=evaluate), {"evaluate.judge.concurrency": (judge.concurrency, timestamp)})  # fmt: skip
    return None


def _training(recipe: Recipe, stage: str) -> Smaller | None:
    section: Any = getattr(recipe, stage)
    processes = 1 if stage in ALGORITHMS else recipe.num_processes
    share = section.batch_size // processes
    was = {"micro_batch_size": section.micro_batch_size or share}
    if stage == "ppo":
        ppo = recipe.ppo
        was["micro_batch_size"] = ppo.micro_batch_size or share // ppo.num_mini_batches
        was["rollout_batch_size"] = min(ppo.rollout_batch_size or share, share)
    timestamp = {key: largest_proper_divisor(rows) or rows for key, rows in was.items()}
    other = replace(section, **timestamp)
    try:
        other.check(stage, processes)
    except SalsaError:  # KTO's two
        return None
    changed = {f"{stage}.{key}": (was[key], timestamp[key]) for key in was if timestamp[key] != was[key]}
    sections: dict[str, Any] = {stage: other}
    return Smaller(replace(recipe, **sections), changed) if changed else None
