"""What can be published on the Hub: a result of a run, or a soup that `salsa soup` made."""

import dataclasses
import os
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from salsa_peft.config.job import Job, result_units, unit_of
from salsa_peft.config.load import saved_recipe
from salsa_peft.config.schema import Recipe
from salsa_peft.soup.lora.read import CONFIG, SUMMARY
from salsa_peft.soup.lora.read import WEIGHTS as ADAPTER_WEIGHTS
from salsa_peft.utils import manifests
from salsa_peft.utils.errors import SalsaError, require
from salsa_peft.utils.files import read_json
from salsa_peft.utils.hub import HUB_ID
from salsa_peft.utils.safetensors_io import SafetensorsFile

RECIPE = "recipe.yaml"
FIGURES = {
    "soup": ("line-*", "scores-*"),
    "policy": ("headline-start*", "scores-*", "training-score*"),
    "seed": ("scores-*",),
    "reward": ("distribution-*",),
}
"""Kind of result → patterns of the report's figures; the card shows the first figure that exists."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Item:
    """A result of a run, or a soup that no run made, that can be published."""

    name: str
    """Name of the result: soup, reward, seed-0 …, the name of a policy, or of a soup's folder."""
    kind: str
    """Kind of the result: soup, policy, seed or reward."""
    folder: Path
    recipe: Recipe | None
    """The recipe of the run; None for a soup that no run made."""
    base: str
    """The base's id on the Hub."""
    summary: dict[str, Any]
    """The report's summary.json; {} if the result is not in a report."""
    figure: Path | None

    @property
    def adapter(self) -> bool:
        """Whether the result is a PEFT adapter; otherwise it is a full checkpoint."""
        return (self.folder / CONFIG).is_file()

    @property
    def algorithm(self) -> str:
        """Algorithm of a policy, such as ppo or dpo; "" for other kinds of results."""
        return self.recipe.policies[self.name].algorithm if self.recipe is not None and self.kind == "policy" else ""

    @property
    def metrics(self) -> dict[str, Any]:
        """The metrics that the result's own stage wrote."""
        path = self.folder / {"soup": SUMMARY, "policy": "policy.json"}.get(self.kind, "metrics.json")
        return read_object(path) if path.is_file() else {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Results:
    """The finished results of a run."""

    run: Path
    folders: dict[str, Path]
    """Unit id → its folder."""
    recipe: Recipe
    """The recipe of the report, since the run's recipe.yaml may be newer; without a report, the run's."""
    picked: dict[str, str] = dataclasses.field(default_factory=dict)
    """Name of each seed and policy → itself, and of each searched policy → the policy that the search picked."""

    @classmethod
    def of_job(cls, job: Job) -> "Results":
        """The results that the hub stage reads."""
        return cls(run=job.run_folder, folders=dict(job.inputs), recipe=job.recipe)

    @classmethod
    def of_run(cls, run: Path) -> "Results":
        """The current results of a run (results.json).

        Of a run of an earlier version, the results of its latest report, or without a report the latest of each unit.
        """
        named, report = manifests.named_results(run), manifests.latest_report(run)
        folders = {unit: folder for name, (unit, folder) in named.items() if name != "report"}
        if not named and report is not None:
            folders = manifests.finished_results(run)
        elif not named:
            stages = manifests.stages_folder(run)
            there = [*stages.glob(f"*/*/{manifests.MANIFEST}"), *stages.glob(f"*/*/*/{manifests.MANIFEST}")]
            there.sort(key=lambda path: path.stat().st_mtime_ns)
            found = [(manifests.read_manifest(path.parent), path.parent) for path in there]
            folders = {str(manifest.get("unit")): folder for manifest, folder in found if manifest is not None}
        folders |= {} if report is None else {"report": report}
        own = run / RECIPE if report is None or not (report / RECIPE).is_file() else report / RECIPE
        picked = {name: unit.partition("/")[2] for name, (unit, _) in named.items() if "/" in unit}
        return cls(run=run, folders=folders, recipe=saved_recipe(own), picked=picked)

    def reported(self, unit: str) -> Path | None:
        """The folder of the report, if it was made from the unit's current result."""
        report, folder = self.folders.get("report"), self.folders.get(unit)
        if report is None or folder is None:
            return None
        inputs = (manifests.read_manifest(report) or {"inputs": {}})["inputs"]
        own = manifests.content_digest(manifests.read_manifest(folder) or {"files": {}})
        return report if inputs.get(unit) == own else None


def find_item(results: Results, name: str, base_model: str | None) -> Item:
    """Find a result of a run by its name, with the report's numbers if the report was made from it.

    Raises SalsaError if the name is unknown, the result is missing or was changed, or the base has no id on the Hub.
    """
    run, recipe, name = results.run, results.recipe, results.picked.get(name, name)
    report = results.reported(unit_of(recipe, name)[1]) if name in result_units(recipe) else None
    if report is None and "report" in results.folders:  # the run has gone on since the report
        recipe = saved_recipe(run / RECIPE)
    base = base_model or base_on_hub(recipe.model.base or "the toy base", ", or hub.base_model in the recipe")
    kind, unit = unit_of(recipe, name)
    folder = results.folders.get(unit)
    if folder is None:
        raise SalsaError(
            f"{name}: {run} has no finished {unit}; finish the run with salsa run {run}/recipe.yaml --output-dir {run}"
        )
    summary, figures = {}, list[Path]()
    check_unchanged(folder)
    if report is not None:
        check_unchanged(report)
        summary = read_object(report / "summary.json")
        figures = [path for pattern in FIGURES[kind] for path in sorted((report / "figures").glob(f"{pattern}.png"))]
    figure = next(iter(figures), None)
    return Item(name=name, kind=kind, folder=folder, recipe=recipe, base=base, summary=summary, figure=figure)


def find_soup(folder: Path, base_model: str | None) -> Item:
    """The item of a soup that `salsa soup` made, or `salsa_peft.soup.soup`.

    Raises SalsaError if the weights are damaged, or the base has no id on the Hub.
    """
    summary = read_object(folder / SUMMARY)
    if (folder / CONFIG).is_file():
        named = read_object(folder / CONFIG).get("base_model_name_or_path")
        weights = [folder / ADAPTER_WEIGHTS]
    else:
        origin = summary.get("provenance", {}).get("base") or {}
        named = origin.get("repository") or origin.get("source")
        weights = sorted(path for path in folder.glob("*.safetensors") if fnmatch(path.name, "model*"))
    for path in weights:
        SafetensorsFile(path)  # raises SalsaError for a file that is damaged
    base = base_model or base_on_hub(str(named or "the soup's base"))
    return Item(name=folder.name, kind="soup", folder=folder, recipe=None, base=base, summary={}, figure=None)


def base_on_hub(base: str, otherwise: str = "") -> str:
    """The base's id on the Hub. Raises SalsaError for a local path. otherwise: the message's end, another place for the id."""
    require(
        HUB_ID.match(base) is not None and not os.path.isdir(base),
        f"base: {Path(base).name} exists only on this machine; give the base's id on the Hub: --base-model"
        f" namespace/name{otherwise}",
    )
    return base


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises SalsaError if the file contains anything else."""
    content = read_json(path)
    require(
        isinstance(content, dict), f"{path}: must be a JSON object, as the run wrote it; delete the file and run again"
    )
    return dict(content)


def check_unchanged(folder: Path) -> None:
    """Raise SalsaError if a result differs from its manifest, so that nothing damaged is published."""
    why = manifests.changed_file(folder, manifests.read_manifest(folder) or {"files": {}})
    require(
        why is None,
        f"{folder}: differs from its {manifests.MANIFEST} ({why}), so it is not published; delete the folder and run"
        " again",
    )
