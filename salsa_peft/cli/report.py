"""`salsa report`: the report of a finished run, of several runs, or the paper's tables.

The pages are made in report/page.py and report/joined.py.
"""

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from salsa_peft.config.load import bundled_names, saved_recipe
from salsa_peft.recipe.__main__ import main as run_recipe
from salsa_peft.utils import manifests
from salsa_peft.utils.console import say
from salsa_peft.utils.errors import SalsaError, require
from salsa_peft.utils.messages import one_line

HELP = """usage: salsa report RUN [RUN …] | --paper

  salsa report RUN                             write the report of a finished run again, given its folder
  salsa report RUN RUN … [--output-dir DIR]    write one report of several runs (default: joined/ beside the first run)
  salsa report RECIPE --lora …                 write the report of a finished run again, given `salsa run`'s arguments
  salsa report --paper                         show the paper's Tables 1 to 5, with intervals and contradictions"""
NO_RUN = "not the folder of a run, since it has no recipe.yaml; check the path"
JOINED = "joined"
"""Name of the default folder for the report of several runs, beside the folder of the first run."""
NARROWEST = 165
"""Number of terminal columns that the paper's tables need."""


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
        names = _names(words)
        if names is not None and len(names) > 1:
            return _joined(names, words)
        recipes = bundled_names("recipes")
        if names and not os.path.isfile(names[0]) and names[0].removesuffix(".yaml") not in recipes:
            require(_is_run(names[0]), f"{names[0]}: {NO_RUN}")
            require(
                "--output-dir" not in words,
                "--output-dir: works only with several runs; leave it out, and the report goes into the run's folder",
            )
    except SalsaError as error:
        say(one_line(error))
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
    show(console if console.width >= NARROWEST else Console(highlight=False, width=NARROWEST))
    return 0


def _joined(names: Sequence[str], words: Sequence[str]) -> int:
    out_dir = words[words.index("--output-dir") + 1] if "--output-dir" in words[:-1] else None
    require(out_dir != "" and words[-1] != "--output-dir", "--output-dir: needs a folder's name")
    from salsa_peft.report.gather import gather
    from salsa_peft.report.joined import Run, write_joined

    for name in names:
        require(_is_run(name), f"{name}: {NO_RUN}")
    found = []
    for name in names:
        folder = Path(os.path.abspath(name))
        saved = folder / "recipe.yaml"
        try:
            recipe, results = saved_recipe(saved), manifests.finished_results(folder)
            gathered = gather(recipe, results, saved.read_text(encoding="utf-8"))
        except KeyError as error:
            raise SalsaError(
                f"{name}: its results have no {error}, since an earlier version of salsa_peft made them; run the recipe"
                f" again: salsa run {name}/recipe.yaml --output-dir {name}"
            ) from error
        found.append(Run(gathered, folder))
    out = Path(os.path.abspath(out_dir or found[0].folder.parent / JOINED))
    require(not _is_run(str(out)), f"--output-dir: {out} is the folder of a run; choose a folder that is not one")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SalsaError(f"--output-dir: {out} cannot be created ({error.strerror}); choose another folder") from error
    write_joined(out, found)
    print(out / "report.html", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
