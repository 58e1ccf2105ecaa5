"""The names of a run's current results: <run>/seed-0, <run>/soup, <run>/<policy> and so on.

A name is a relative link to the folder of a finished result, or a copy of this folder where links cannot be made (no
permission, or a file system without them). results.json lists all names. A link changes in one step when its unit is
finished or found cached, and it is removed before its folder is emptied: it never leads to an unfinished result. A name
that the recipe no longer has keeps its last result until `--prune`. The caller of each function holds the run's lock.
"""

import errno
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from salsa_peft.config.job import UNLINKED, result_units
from salsa_peft.config.schema import Recipe
from salsa_peft.config.sweeps import candidates
from salsa_peft.recipe.cache import KEY_FOLDER
from salsa_peft.utils.console import say
from salsa_peft.utils.errors import SalsaError, require
from salsa_peft.utils.files import read_json, sync_folder, write_atomic
from salsa_peft.utils.manifests import REPLICATE, RESULTS, STAGES, named_results, read_manifest, stages_folder

NO_LINKS = (errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
"""Errors of a file system that has no symbolic links, or does not permit them."""
COPIED = ".copied-from"
"""File in a copy with the path of its result, relative to the run's folder."""
MOVING = ".stages.tmp"


def check_names(run: Path, recipe: Recipe) -> None:
    """Raise SalsaError if a name of the recipe's results, or `stages`, is something that the run did not make."""
    units = dict.fromkeys(candidates(recipe), "") | result_units(recipe)
    stages = run / STAGES
    require(
        stages.is_dir() or not os.path.lexists(stages),
        f"{stages}: the run's results go into a folder of this name, but it is a file; move or rename it, or use another"
        " --output-dir",
    )
    moved = _old_stages(run)
    for name, unit in units.items():
        path, copied = run / name, read_manifest(run / name)  # of a run whose folder was copied with its links followed
        ours = path in moved or _target(path) is not None
        ours = ours or (copied is not None and (unit or path.name) in copied.get("unit", ""))
        require(
            ours or name in UNLINKED or not os.path.lexists(path),
            f"{path}: the run's result of this name goes here, but `salsa run` did not make what is there; move or"
            " rename it, or use another --output-dir",
        )


def update_names(run: Path, recipe: Recipe, finished: Mapping[str, Path]) -> None:
    """Let the names lead to these finished results, and list them in results.json.

    finished: unit id → its folder. If the report is among them, the name of a searched policy leads to the candidate that
    the report picked.
    """
    rows: dict[str, dict[str, str]] = {}
    for name, unit in {**result_units(recipe), **_picked(recipe, finished.get("report"))}.items():
        if unit in finished:
            rows[name] = {"unit": unit, "folder": finished[unit].relative_to(run).as_posix()}
    for name, row in rows.items():
        if name not in UNLINKED:
            _place(run, name, row["folder"])
    listed = _listed(run)
    if {**listed, **rows} != listed:
        _write({**listed, **rows}, run)


def _picked(recipe: Recipe, report: Path | None) -> dict[str, str]:
    """Name of each searched policy → id of the unit of the candidate that the report picked."""
    methods = {} if report is None else (read_json(report / "summary.json").get("search") or {}).get("methods", {})
    units = result_units(recipe)
    return {name: units[found["best"]] for name, found in methods.items() if found["best"] in units}


def withdraw_names(run: Path, folder: Path) -> None:
    """Remove the names that lead to a result's folder, which is about to be emptied."""

    def leads_there(target: str | None) -> bool:
        return target is not None and (run / target).is_relative_to(folder)

    for path in run.iterdir():
        if leads_there(_target(path)):
            _remove(path)
    listed = _listed(run)
    kept = {name: row for name, row in listed.items() if not leads_there(row["folder"])}
    if kept != listed:
        _write(kept, run)


def forget_removed(run: Path) -> None:
    """Remove the names whose results were removed."""
    for path in run.iterdir():
        if (target := _target(path)) is not None and not (run / target).exists():
            _remove(path)
    listed = _listed(run)
    kept = {name: row for name, row in listed.items() if (run / row["folder"]).exists()}
    if kept != listed:
        _write(kept, run)


def move_old_stages(run: Path) -> None:
    """Move the stages of a run of an earlier version, which had them beside the report, into `stages`.

    All of them appear in `stages` at once; if this is interrupted, the next run goes on with it.
    """
    moving, old = run / MOVING, _old_stages(run)
    if not old and not moving.exists():
        return
    moving.mkdir(exist_ok=True)
    for path in old:
        os.rename(path, moving / path.name)
    os.rename(moving, run / STAGES)
    say(f"the results of an earlier version of salsa_peft were moved to {run / STAGES}")


def _old_stages(run: Path) -> list[Path]:
    """The folders of stages that a run of an earlier version has beside the report; [] for another run."""
    if stages_folder(run) != run and not (run / MOVING).exists():
        return []
    return [
        path
        for path in run.iterdir()
        if path.is_dir() and path.name != MOVING and not path.is_symlink() and not REPLICATE.fullmatch(path.name)
        if any(KEY_FOLDER.match(one.name) for one in (*path.glob("*"), *path.glob("*/*")))
    ]


def _listed(run: Path) -> dict[str, dict[str, str]]:
    """The rows of results.json; none if it is missing or, with a printed line, damaged: it is then written again."""
    try:
        named_results(run)
    except SalsaError as error:
        say(f"{error} (it is written again now)")
        return {}
    path = run / RESULTS
    found: dict[str, Any] = read_json(path) if path.is_file() else {}
    return found


def _write(rows: Mapping[str, Any], run: Path) -> None:
    write_atomic(run / RESULTS, json.dumps(rows, indent=2, sort_keys=True) + "\n")


def _target(path: Path) -> str | None:
    """Where one of the run's links or copies leads to, relative to the run's folder; None for anything else."""
    if path.is_symlink():
        target = os.readlink(path)
        return target if target.startswith(f"{STAGES}/") else None
    copied = path / COPIED
    return copied.read_text(encoding="utf-8") if copied.is_file() else None


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _place(run: Path, name: str, target: str) -> None:
    """Make <run>/<name> a link to `target`, or a copy of it where links cannot be made."""
    path, new, old = run / name, run / f".{name}.tmp", run / f".{name}.old.tmp"
    for left in (new, old):  # by a run that was killed
        _remove(left)
    if _target(path) == target:
        return
    try:
        os.symlink(target, new)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        say(f"{name}: copied from {target}, because no links can be made in {run} ({error.strerror})")
        shutil.copytree(run / target, new)
        (new / COPIED).write_text(target, encoding="utf-8")
    if path.is_dir() and not path.is_symlink():  # a folder cannot be replaced in one step
        os.rename(path, old)
    os.replace(new, path)
    _remove(old)
    sync_folder(run)
