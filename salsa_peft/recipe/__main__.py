"""`salsa run`: runs a recipe, from its SFT seeds to the report.

    python -m salsa_peft.recipe quickstart --lora
    python -m salsa_peft.recipe my.yaml --lora --set ppo.learning_rate=1e-5 --dry-run

This module has the command line and the exit codes of errors; recipe/run.py runs the recipe.
"""

import argparse
import math
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from salsa_peft.config.load import bundled_names, load_recipe
from salsa_peft.data.check import check_local
from salsa_peft.models.architectures.checks import check
from salsa_peft.recipe.commits import check_revisions, found_commits, with_commits
from salsa_peft.recipe.estimates.hardware import GPUS, Gpu
from salsa_peft.recipe.parallel.outcome import EXPECTED, outcome
from salsa_peft.recipe.processes import Terminated, raise_on_sigterm
from salsa_peft.recipe.replicates import kept_commits, run_replicates
from salsa_peft.recipe.results.files import show_results
from salsa_peft.recipe.run import STAGES, Stage, run, run_folder
from salsa_peft.utils.console import Parser, complain, no_echo_of_control_characters
from salsa_peft.utils.errors import require
from salsa_peft.utils.hub import pinned
from salsa_peft.utils.messages import one_line


def main(
    argv: Sequence[str] | None = None,
    *,
    stages: dict[str, Stage] = STAGES,
    prog: str = "salsa run",
    report_of: str | None = None,
) -> int:
    """Run the command `salsa run`.

    Returns 0; 2 if the recipe, an option or this machine does not pass a check; 1 if a stage fails or a file cannot be
    read or written; 130 after SIGINT; 143 after SIGTERM. report_of: as in recipe/run.py.
    """
    args = parse_args(sys.argv[1:] if argv is None else argv, prog)
    folder = Path()
    try:
        with raise_on_sigterm(), no_echo_of_control_characters():
            sets = [*args.set, *([] if args.replicates is None else [f"replicates={args.replicates}"])]
            checks = (check_local, check, check_revisions)
            loaded = load_recipe(args.recipe, lora=args.lora, overrides=sets, more=checks)
            folder = run_folder(loaded, args.output_dir)
            check_jobs(args.jobs, loaded.recipe.replicates)
            kept = kept_commits(folder, loaded.recipe, report_of is not None)
            recipe = with_commits(loaded.recipe, record=not args.dry_run, kept=kept)
            commits = found_commits(loaded.recipe, recipe)
            run_all: Callable[..., None] = (
                run if loaded.recipe.replicates == 1 else partial(run_replicates, jobs=args.jobs)
            )
            with pinned(recipe.model_revisions):
                run_all(
                    replace(loaded, recipe=recipe), folder, stages=stages, only=args.stages, force=args.force,
                    prune=args.prune, dry_run=args.dry_run, gpu=args.gpu, commits=commits, report_of=report_of,
                    debug=args.debug,
                )  # fmt: skip
            if not args.dry_run and report_of is None:
                show_results(folder, recipe)
            return 0
    except EXPECTED as error:
        code, lines = outcome(error, folder)
        args.debug &= not isinstance(error, KeyboardInterrupt | Terminated)
    if args.debug:
        traceback.print_exc()
    for line in lines:
        complain(one_line(line))
    return code


def check_jobs(jobs: int, replicates: int) -> None:
    """Raise SalsaError for a number of jobs that is not positive, or that would have no effect."""
    require(jobs >= 1, f"--jobs: must be at least 1, not {jobs}")
    require(
        jobs == 1 or replicates > 1,
        f"--jobs {jobs}: runs replicates at the same time, and this recipe has none; add --replicates N, or leave out --jobs",
    )


def parse_args(argv: Sequence[str], prog: str = "salsa run") -> argparse.Namespace:
    """Parse the command line.

    `--lora` may be followed by a preset's name. If a different word follows and no recipe is given, it is the recipe; so is
    a word without = after the settings of `--set`.
    """
    presets = bundled_names("adapters")
    parser = Parser(
        prog=prog,
        description="Run a recipe: SFT seeds, reward model, soup, PPO, landscape, evaluation, report.",
        epilog=f"Bundled recipes: {', '.join(bundled_names('recipes'))}.",
    )
    add = parser.add_argument
    add("recipe", nargs="*", metavar="RECIPE", help="a YAML file, or the name of a bundled recipe")
    names = ", ".join(presets)
    add("--lora", nargs="?", const="lora", metavar="PRESET", help=f"train adapters; presets: {names} (default: lora)")
    add(
        "--set",
        action="append",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="set keys: ppo.learning_rate=1e-6 sft.seeds=[0,1]",
    )
    add("--replicates", type=int, metavar="N", help="train everything N times with other seeds, and join the reports")
    add("--jobs", type=int, default=1, metavar="N", help="run N replicates at the same time (default: 1)")
    add("--dry-run", action="store_true", help="print the plan and write nothing")
    gpus = ", ".join(GPUS)
    add("--gpu", type=_gpu, metavar="GPU", help=f"with --dry-run: {gpus}, or GiB of memory (default: this machine's)")
    add("--stages", type=_words, metavar="A,B", help="run only these stages or units, such as sft,ppo/salsa")
    add("--force", action="append", default=[], metavar="STAGE", help="run a stage or unit and its dependents again")
    add("--output-dir", metavar="DIR", help="folder of the results (default: runs/<name>-<preset>)")
    add("--prune", action="store_true", help="at the end, remove results that this recipe does not use")
    add("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_intermixed_args(argv)
    if not args.recipe and args.lora is not None and args.lora not in presets:
        args.recipe, args.lora = [args.lora], "lora"
    others = [word for words in args.set for word in words[1:] if "=" not in word]  # `--set a=1 my.yaml`
    if not args.recipe and len(others) == 1:
        args.recipe = others
        args.set = [[word for word in words if word not in others] for words in args.set]
    args.set = [word for words in args.set for word in words]
    if len(args.recipe) != 1:
        words = " ".join(args.recipe) or "none"
        parser.error(f"RECIPE: give exactly one YAML file or name of a bundled recipe (given: {words})")
    if args.gpu is not None and not args.dry_run:
        parser.error("--gpu needs --dry-run: --gpu is the GPU to plan for, and does not choose the GPU of a run")
    args.recipe = args.recipe[0]
    return args


def _gpu(text: str) -> Gpu:
    """A GPU by its name in GPUS, or of that many GiB, whose speed is not known."""
    named = next((gpu for name, (_, gpu) in GPUS.items() if name.lower() == text.lower()), None)
    if named is not None:
        return named
    try:
        size = float(text)
    except ValueError:
        size = math.nan
    if not 0 < size < 1_000:  # 5090 is the name of a GPU and no size
        raise argparse.ArgumentTypeError(
            f"{text} is neither a known GPU ({', '.join(GPUS)}) nor a memory size in GiB such as 24"
        )
    return Gpu("--gpu", int(size * 2**30))


def _words(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


if __name__ == "__main__":
    sys.exit(main())
