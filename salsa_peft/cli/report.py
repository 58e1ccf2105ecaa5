"""`salsa report`: a finished run's report again, several runs' in one, or the paper's tables.

    salsa report RUN                        a run's folder, or a recipe with `salsa run`'s own options
    salsa report RUN RUN … [--output-dir FOLDER]
    salsa report --paper                    Tables 1 to 5 from their counts, and what does not agree

The pages themselves: report/page.py and report/joined.py.
"""

from __future__ import annotations

import os
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

  salsa report RUN                             the report of a finished run's folder again
  salsa report RUN RUN … [--output-dir DIR]    several runs in one: models × questions; into `joined` beside the first, or DIR
  salsa report RECIPE --lora …                 the same by a recipe, with `salsa run`'s options
  salsa report --paper                         the paper's Tables 1 to 5 from their counts, and what does not agree"""
NO_RUN = "found no recipe.yaml in it, expected the folder of a finished run"
JOINED = "joined"
"""Folder of several runs' report, beside the first of them."""
NARROWEST = 165
"""Columns of the paper's tables."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns 0; 2 for what the user can mend, else `salsa run`'s code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and set(words) & {"-h", "--help"}:
        print(HELP)
        return 0
    try:
        if "--paper" in words:
            require(words == ["--paper"], f"--paper: found {' '.join(words)}, expected it alone")
            return _paper()
        names = _names(words)
        if names is not None and len(names) > 1:
            return _joined(names, words)
        if names is not None and names and not _is_recipe(names[0]):
            require(_is_run(names[0]), f"{names[0]}: {NO_RUN}")
            require("--output-dir" not in words, f"--output-dir: found it with one run, expected none: its report goes into {names[0]}; it is for several")  # fmt: skip
    except SalsaError as error:
        say(one_line(error))
        return 2
    at = next((place for place, word in enumerate(words) if _is_run(word)), None)
    if at is not None and "--output-dir" not in words:
        words = [*words[:at], os.path.join(words[at], "recipe.yaml"), *words[at + 1 :], "--output-dir", words[at]]
    return run_recipe([*words, "--stages", "report", "--force", "report"], prog="salsa report")


def _names(words: Sequence[str]) -> list[str] | None:
    """The runs, where nothing else but --output-dir is said; None: a recipe with `salsa run`'s options."""
    names, rest = [], iter(words)
    for word in rest:
        if word == "--output-dir":
            next(rest, None)
        elif word.startswith("-"):
            return None
        else:
            names.append(word)
    return names


def _is_recipe(word: str) -> bool:
    """A recipe's file, or a bundled one's name."""
    return os.path.isfile(word) or word.removesuffix(".yaml") in bundled_names("recipes")


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
    require(out_dir != "" and words[-1] != "--output-dir", "--output-dir: found nothing, expected a folder")
    from salsa_peft.report.gather import gather
    from salsa_peft.report.joined import Run, write_joined

    for name in names:
        require(_is_run(name), f"{name}: {NO_RUN}")
    found = []
    for name in names:
        folder = Path(os.path.abspath(name))
        saved = folder / "recipe.yaml"
        try:
            told = gather(saved_recipe(saved), manifests.finished_results(folder), saved.read_text(encoding="utf-8"))
        except KeyError as error:
            raise SalsaError(f"{name}: found results without {error}, of an earlier salsa_peft, expected this one's; salsa run {name}/recipe.yaml --output-dir {name}") from error  # fmt: skip
        found.append(Run(told, folder))
    out = Path(os.path.abspath(out_dir or found[0].folder.parent / JOINED))
    require(not _is_run(str(out)), f"--output-dir: {out} is a run's folder, expected another one")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SalsaError(f"--output-dir: {out} can't be made ({error.strerror}); choose another folder") from error
    write_joined(out, found)
    print(out / "report.html", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
