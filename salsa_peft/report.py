"""`salsa report`: a finished run's report again, several runs' in one, or the paper's tables.

    salsa report RUN                        a run's folder, or a recipe with `salsa run`'s own options
    salsa report RUN RUN … [--output-dir FOLDER]
    salsa report --paper                    Tables 1 to 5 from their counts, and what does not agree

The pages themselves: report_page.py and joined_report.py.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from salsa_peft import recipe, runs
from salsa_peft.errors import SalsaError, require
from salsa_peft.messages import one_line
from salsa_peft.parsing import saved_recipe

JOINED = "joined"
"""Folder of several runs' report, beside the first of them."""
NARROWEST = 165
"""Columns of the paper's tables."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns 0; 2 for what the user can mend, else `salsa run`'s code."""
    words = list(sys.argv[1:] if argv is None else argv)
    folders = [word for word in words if _is_run(word)]
    several = len(folders) > 1 or (
        len(folders) == 1 and sum(not word.startswith("-") for word in words) > 1 and not _options(words)
    )
    try:
        if "--paper" in words:
            require(words == ["--paper"], f"--paper: found {' '.join(words)}, expected it alone")
            return _paper()
        if several:
            return _joined(words)
    except SalsaError as error:
        recipe.say(one_line(error))
        return 2
    if folders and "--output-dir" not in words:
        at = words.index(folders[0])
        words = [*words[:at], os.path.join(folders[0], "recipe.yaml"), *words[at + 1 :], "--output-dir", folders[0]]
    return recipe.main([*words, "--stages", "report", "--force", "report"], prog="salsa report")


def _is_run(word: str) -> bool:
    return os.path.isdir(word) and os.path.isfile(os.path.join(word, "recipe.yaml"))


def _options(words: Sequence[str]) -> bool:
    """Whether `salsa run`'s options are among them, whose values are no runs."""
    return any(word.startswith("--") for word in words)


def _paper() -> int:
    from rich.console import Console

    from salsa_peft.paper import show

    console = Console(highlight=False)
    show(console if console.width >= NARROWEST else Console(highlight=False, width=NARROWEST))
    return 0


def _joined(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="salsa report", description="Several finished runs in one report.", allow_abbrev=False
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of finished runs")
    parser.add_argument("--output-dir", help=f"where it goes (default: {JOINED} beside the first run)")
    args = parser.parse_args(words)
    from salsa_peft.joined_report import Run, write_joined
    from salsa_peft.report_input import gather

    for name in args.runs:
        require(_is_run(name), f"{name}: found no recipe.yaml in it, expected the folder of a finished run")
    found = []
    for name in args.runs:
        folder = Path(os.path.abspath(name))
        saved = folder / "recipe.yaml"
        try:
            told = gather(saved_recipe(saved), runs.finished(folder), saved.read_text(encoding="utf-8"))
        except KeyError as error:
            raise SalsaError(f"{name}: found results without {error}, of an earlier salsa_peft, expected this one's; salsa run {name}/recipe.yaml --output-dir {name}") from error  # fmt: skip
        found.append(Run(told, folder))
    out = Path(os.path.abspath(args.output_dir or found[0].folder.parent / JOINED))
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
