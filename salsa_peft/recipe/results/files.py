"""The report's files in the run's folder, and the lines with which a run ends."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from salsa_peft.config.job import UNLINKED, result_units
from salsa_peft.config.paths import is_local
from salsa_peft.config.schema import Recipe
from salsa_peft.config.sweeps import candidates
from salsa_peft.utils.console import columns, say
from salsa_peft.utils.files import write_atomic
from salsa_peft.utils.manifests import named_results, replicate_folders
from salsa_peft.utils.messages import listed

REPORT = "report.html"
COPIES = (REPORT, "report.md", "summary.json")
"""Files of the report's result that are copied into the run's folder, with its figures/*.png."""
ADAPTER = "adapter_config.json"
TITLES = {
    "toy": "the embedded world: base and data",
    "sft": "SFT seeds",
    "reward": "reward model",
    "soup": "soup of the seeds",
    "soups": "other soups",
    "evaluate": "answers of all models, and their scores",
}
"""Stage → what its results are. The results of all other stages are policies."""
POLICIES = "policies"


def copy_report(report: Path, run: Path) -> None:
    """Copy the report's files into the run's folder, and remove figures of an earlier report from there."""
    for name in COPIES:
        if (report / name).is_file():  # a report of an earlier version may lack some
            write_atomic(run / name, (report / name).read_bytes())
    drawn = {path.name: path.read_bytes() for path in (report / "figures").glob("*.png")}
    for name, content in drawn.items():
        path = run / "figures" / name
        if not path.is_file() or path.read_bytes() != content:
            write_atomic(path, content)
    for path in (run / "figures").glob("*.png"):
        if path.name not in drawn:
            path.unlink()


def show_headline(summary: Mapping[str, Any]) -> None:
    """Print the headline of a report's summary.json, in lines that fit the terminal."""
    lines: list[str] = summary.get("console", [])  # a report of an earlier version has no such lines
    if sys.stderr.isatty() and columns(sys.stderr) < max(map(len, lines), default=0):
        lines = summary.get("narrow_console", lines)
    for line in lines:
        say(line)


def show_results(run: Path, recipe: Recipe) -> None:
    """Print where each result is, and the commands that come next: open the report, load a model, push it.

    Of a run with replicates, the results are those of the replicates.
    """
    replicates = replicate_folders(run) if recipe.replicates > 1 else []
    place = replicates[0] if replicates else run
    found, methods = named_results(place), candidates(recipe)
    hidden = {name for names in methods.values() for name in names if methods.keys() <= found.keys()}  # what was tried
    names = [
        name for name in (*result_units(recipe), *methods) if name in found.keys() - hidden and name not in UNLINKED
    ]
    if not names:
        return
    rows: dict[str, list[str]] = {}
    for name in names:
        rows.setdefault(TITLES.get(found[name][0].partition("/")[0], POLICIES), []).append(name)
    lines = [(listed(of, 5), title) for title, of in rows.items()]
    if (run / REPORT).is_file():
        lines += [("report.html, report.md", "the report"), ("summary.json, figures", "its numbers and figures")]
    wide = max(len(left) for left, _ in lines)
    each = f"; of the other replicates in {replicates[1].name} …" if len(replicates) > 1 else ""
    say(f"\nresults in {shown(place)}{each}")
    for left, title in lines:
        say(f"  {left:<{wide}}  {title}")
    say("next")
    for line in next_commands(run, recipe, place, names):
        say(f"  {line}")


def next_commands(run: Path, recipe: Recipe, place: Path, names: list[str]) -> list[str]:
    """Lines with the commands that open the report, load a model with PEFT or Transformers, and push it to the Hub.

    The model is a policy, if there is one, first of all the one whose reference is the soup. place: the folder with the names.
    """
    found, lines = named_results(place), []
    if (run / REPORT).is_file():
        lines += ["# open the report", f"{'open' if sys.platform == 'darwin' else 'xdg-open'} {shown(run / REPORT)}"]
    policies = [name for name in names if found[name][0].partition("/")[0] not in TITLES]
    tried = {name: next(iter(of)) for name, of in candidates(recipe).items()}
    salsa = [name for name in policies if recipe.policies[tried.get(name, name)].reference == "soup"]
    models = [*salsa, *policies, *(name for name in ("soup", "seed-0") if name in names)]
    if models:
        model, package, loader = models[0], "transformers", "AutoModelForCausalLM"
        if (place / model / ADAPTER).is_file():
            package, loader = "peft", "AutoPeftModelForCausalLM"
        base = recipe.model.base
        more = " --base-model YOU/BASE" if base is None or is_local(base) else ""
        lines += [
            f"# load {model} in Python (from {package} import {loader})",
            f'{loader}.from_pretrained("{shown(place / model)}")',
            "# push it to the Hub",
            f"salsa hub push {shown(place / model)} --to YOU/{model}{more}",
        ]
    return lines


def shown(path: Path) -> str:
    """A path as a user types it: relative to the current folder where it is inside."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
