"""Finished runs, read from their folders; of a run with replicates, its finished replicates."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from salsa_peft.config.load import saved_recipe
from salsa_peft.report.gather import ReportInput, gather
from salsa_peft.utils.console import say
from salsa_peft.utils.errors import SalsaError, require
from salsa_peft.utils.manifests import finished_results, latest_report, replicate_folders


class Run(NamedTuple):
    """A finished run and its folder."""

    report: ReportInput
    folder: Path


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """The finished runs in some folders; of a run with replicates, its finished replicates.

    Replicates that are not finished are left out, with a printed line. Raises SalsaError for a folder without a finished
    run, or with results of an earlier version of salsa_peft.
    """
    found = []
    for given in folders:
        begun = replicate_folders(given)
        finished = [folder for folder in begun if latest_report(folder) is not None]
        require(
            bool(finished) or not begun,
            f"{given}: no replicate is finished yet; run the recipe again to continue: salsa run {given}/recipe.yaml"
            f" --output-dir {given}",
        )
        if len(finished) < len(begun):
            left_out = [folder.name for folder in begun if folder not in finished]
            say(f"{given}: left out, because it is not finished: {', '.join(left_out)}")
        found += [_read(folder) for folder in finished or [given]]
    return found


def _read(folder: Path) -> Run:
    saved = folder / "recipe.yaml"
    try:
        recipe, results = saved_recipe(saved), finished_results(folder)
        return Run(gather(recipe, results, saved.read_text(encoding="utf-8")), folder)
    except KeyError as error:
        raise SalsaError(
            f"{folder}: its results have no {error}, since an earlier version of salsa_peft made them; run the recipe"
            f" again: salsa run {folder}/recipe.yaml --output-dir {folder}"
        ) from error
