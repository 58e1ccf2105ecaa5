"""`salsa report`: the report of a finished run, of several runs, or the paper's tables.

The pages are made in report/page.py and report/joined.py.
"""

import math
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from salsa_peft.config.load import bundled_names
from salsa_peft.recipe.__main__ import main as run_recipe
from salsa_peft.recipe.results.files import show_headline
from salsa_peft.utils.console import complain
from salsa_peft.utils.errors import SalsaError, require
from salsa_peft.utils.manifests import replicate_folders
from salsa_peft.utils.messages import one_line

if TYPE_CHECKING:
    from salsa_peft.report.replicates.runs import Run

HELP = """usage: salsa report RUN [RUN …] [--claims | --difference D] | --paper

  salsa report RUN                             write the report of a finished run again, given its folder
  salsa report RUN RUN … [--output-dir DIR]    write one report of several runs (default: joined/ beside the first run)
  salsa report RUN [RUN …] --claims            print the paper's claims over the runs' replicates, as a Markdown table
  salsa report RUN [RUN …] --difference D      print how many replicates a difference D of two models needs
  salsa report RECIPE --lora …                 write the report of a finished run again, given `salsa run`'s arguments
  salsa report --paper                         show the paper's Tables 1 to 5, with intervals and contradictions"""
NO_RUN = "not the folder of a run, since it has no recipe.yaml; check the path"
JOINED = "joined"
"""Name of the default folder for the report of several runs, beside the folder of the first run."""
NARROWEST = 165
"""Number of columns that the paper's whole tables need; a narrower terminal shows fewer columns."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `salsa report`. Returns 0, 2 for an error of the user, or the exit code of `salsa run`."""
    words = list(sys.argv[1:] if argv is None else argv)
    if set(words) & {"-h", "--help"}:
        print(HELP)
        return 0
    try:
        if "--paper" in words:
            require(words == ["--paper"], "--paper: takes no other arguments")
            return _paper()
        if "--difference" in words:
            return _difference(words)
        if "--claims" in words:
            return _claims([word for word in words if word != "--claims"])
        names = _names(words)
        if names is not None and (len(names) > 1 or [*map(_is_replicated, names)] == [True]):
            return _joined(names, words)
        recipes = bundled_names("recipes")
        if names and not os.path.isfile(names[0]) and names[0].removesuffix(".yaml") not in recipes:
            require(_is_run(names[0]), f"{names[0]}: {NO_RUN}")
            require(
                "--output-dir" not in words,
                "--output-dir: works only with several runs; leave it out, and the report goes into the run's folder",
            )
    except SalsaError as error:
        for problem in error.problems:
            complain(one_line(problem))
        return 2
    at = next((place for place, word in enumerate(words) if _is_run(word)), None)
    if at is not None and "--output-dir" not in words:
        words = [*words[:at], os.path.join(words[at], "recipe.yaml"), *words[at + 1 :], "--output-dir", words[at]]
    command = f"salsa run {shlex.join(words)}"
    return run_recipe([*words, "--stages", "report", "--force", "report"], prog="salsa report", report_of=command)


def _names(words: Sequence[str]) -> list[str] | None:
    """The names of runs or recipes; None if there is an option of `salsa run` besides --output-dir."""
    names, rest = [], iter(words)
    for word in rest:
        if word == "--output-dir":
            next(rest, None)
        elif word.startswith("-"):
            return None
        else:
            names.append(word)
    return names


def _is_run(word: str) -> bool:
    return os.path.isdir(word) and os.path.isfile(os.path.join(word, "recipe.yaml"))


def _paper() -> int:
    from rich.console import Console

    from salsa_peft.report.paper import show

    console = Console(highlight=False)
    if console.width >= NARROWEST or console.is_terminal:
        show(console, narrow=console.width < NARROWEST)
    else:
        show(Console(highlight=False, width=NARROWEST))
    return 0


def _joined(names: Sequence[str], words: Sequence[str]) -> int:
    out_dir = words[words.index("--output-dir") + 1] if "--output-dir" in words[:-1] else None
    require(out_dir != "" and words[-1] != "--output-dir", "--output-dir: needs a folder's name")
    from salsa_peft.report.joined import write_joined

    found, first = _read(names), os.path.abspath(names[0])
    beside = first if len(names) == 1 else os.path.join(os.path.dirname(first), JOINED)
    out = Path(os.path.abspath(out_dir or beside))
    require(
        not _is_run(str(out)) or (len(names) == 1 and out == Path(beside)),
        f"--output-dir: {out} is the folder of a run; choose a folder that is not one",
    )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SalsaError(f"--output-dir: {out} cannot be created ({error.strerror}); choose another folder") from error
    show_headline(write_joined(out, found))
    print(out / "report.html", flush=True)
    return 0


def _claims(names: Sequence[str]) -> int:
    """Print a table of the paper's claims for each recipe among the runs."""
    wrong = next((name for name in names if name.startswith("-")), None)
    require(wrong is None, f"--claims: does not work with {wrong}; give the folders of runs only")
    require(bool(names), "--claims: give the folder of a run with replicates, or of several runs of one recipe")
    from salsa_peft.report.joined import replicates
    from salsa_peft.report.replicates.claims import claims
    from salsa_peft.report.replicates.summary import Replicate
    from salsa_peft.report.replicates.table import as_markdown, rows

    for name, runs in replicates(_read(names)):
        table = rows(claims([Replicate.of(run.report) for run in runs]))
        print(f"## {name}: {len(runs)} replicate{'s' * (len(runs) > 1)}\n\n{as_markdown(table)}\n", flush=True)
    return 0


def _difference(words: Sequence[str]) -> int:
    """Print how many replicates a given difference of the headline's comparisons needs."""
    at = words.index("--difference")
    names, value = [*words[:at], *words[at + 2 :]], next(iter(words[at + 1 : at + 2]), "")
    wrong = next((name for name in names if name.startswith("-")), None)
    require(wrong is None, f"--difference: does not work with {wrong}; give a number and the folders of runs only")
    try:
        difference = float(value)
    except ValueError:
        difference = math.nan
    require(
        0 < difference < math.inf, f"--difference: {value or 'nothing'} is no positive number; give one such as 0.02"
    )
    require(bool(names), "--difference: give the folder of a run with replicates, or of several runs of one recipe")
    from salsa_peft.report import findings
    from salsa_peft.report.joined import replicates
    from salsa_peft.report.replicates import power
    from salsa_peft.report.replicates.scored import scored

    for name, runs in replicates(_read(names)):
        require(len(runs) > 1, f"{name}: a spread over replicates needs at least 2 finished ones, and there is 1")
        rows = power.table(findings.comparisons(scored([run.report for run in runs])))
        print("\n".join([f"{name}: {len(runs)} replicates", *power.given_difference(rows, difference)]), flush=True)
    return 0


def _read(names: Sequence[str]) -> list["Run"]:
    """The finished runs in some folders, replicates one by one."""
    from salsa_peft.report.replicates.runs import read_runs

    for name in names:
        require(_is_run(name) or _is_replicated(name), f"{name}: {NO_RUN}")
    return read_runs([Path(os.path.abspath(name)) for name in names])


def _is_replicated(word: str) -> bool:
    return os.path.isdir(word) and bool(replicate_folders(Path(word)))


if __name__ == "__main__":
    raise SystemExit(main())
