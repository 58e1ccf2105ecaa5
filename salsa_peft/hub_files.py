"""A run's result → what of it is published: weights in safetensors, configuration, tokenizer, figures of its own; no log, no data, no path of
this machine, no pickle."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from salsa_peft.config.job import unit_of
from salsa_peft.config.load import saved_recipe
from salsa_peft.config.schema import Recipe
from salsa_peft.config.yaml import dump_yaml
from salsa_peft.soup.lora.read import CONFIG, SUMMARY, TOKENIZER, WEIGHTS
from salsa_peft.utils import manifests as runs
from salsa_peft.utils.errors import SalsaError, require
from salsa_peft.utils.fingerprints import FINGERPRINT
from salsa_peft.utils.messages import one_line

PUBLISHED = (
    CONFIG, WEIGHTS, "config.json", "generation_config.json", "model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json",
    FINGERPRINT, SUMMARY, "metrics.json", "policy.json", "value_head.safetensors", *TOKENIZER, "tokenizer.model", "vocab.json", "merges.txt",
)  # fmt: skip
"""Names of files that belong to a result; nothing else leaves the machine."""
RECIPE, CARD, FIGURE = "recipe.yaml", "README.md", "figure.png"
FIGURES = {
    "soup": ("line-*", "scores-*"),
    "policy": ("scores-*", "training-score*"),
    "seed": ("scores-*",),
    "reward": ("distribution-*",),
}
"""Kind → the report's figure that stands on its card, the first that is there."""
TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{24,}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Item:
    """A result of a run, to be published."""

    name: str
    """As the command or the recipe calls it: soup, salsa, seed-0, reward."""
    kind: str
    """soup | policy | seed | reward"""
    folder: Path
    recipe: Recipe
    base: str
    """The base's id on the Hub."""
    summary: dict[str, Any]
    """The report's summary.json; {} where the run has none."""
    figure: Path | None

    @property
    def adapter(self) -> bool:
        """Whether it is a PEFT adapter; else a checkpoint."""
        return (self.folder / CONFIG).is_file()


def item(run: Path, recipe: Recipe, name: str, base_model: str | None, folders: dict[str, Path]) -> Item:
    """A result by its name. folders: unit id → its finished folder. Raises SalsaError for a name that is none, for a result that is not there
    or changed since it was made, and for a base that nobody else could load."""
    base = base_model or recipe.model.base
    if base is None or os.path.isabs(base):
        raise SalsaError(
            f"base: found {'the embedded world' if base is None else Path(base).name}, which is on this machine alone, expected the base's id"
            " on the Hub: --base-model namespace/name, or hub.base_model in the recipe"
        )
    kind, unit = unit_of(recipe, name)
    folder, report = folders.get(unit), folders.get("report")
    if folder is None:
        raise SalsaError(
            f"{name}: found no finished {unit} in {run}, expected one; salsa run {run}/recipe.yaml --output-dir {run}"
        )
    summary, figures = {}, list[Path]()
    check_whole(folder)
    if report is not None:
        check_whole(report)
        summary = read_mapping(report / "summary.json")
        figures = [path for pattern in FIGURES[kind] for path in sorted((report / "figures").glob(f"{pattern}.png"))]
    figure = figures[0] if figures else None
    return Item(name=name, kind=kind, folder=folder, recipe=recipe, base=base, summary=summary, figure=figure)


def folders_of(run: Path) -> dict[str, Path]:
    """Unit id → its folder: what the newest report was made from, and the report; without one the newest finished folder of each unit."""
    report = runs.newest_report(run)
    if report is not None:
        return {**runs.finished(run), "report": report}
    there = [*run.glob(f"*/*/{runs.MANIFEST}"), *run.glob(f"*/*/*/{runs.MANIFEST}")]
    made: dict[str, Path] = {}
    for path in sorted(there, key=lambda path: path.stat().st_mtime_ns):
        manifest = runs.read_manifest(path.parent)
        if manifest is not None:
            made[str(manifest.get("unit"))] = path.parent
    return made


def recipe_of(run: Path, folders: dict[str, Path]) -> Recipe:
    """The recipe that the report was made with: another one may have written the run's recipe.yaml since."""
    own = folders["report"] / RECIPE if "report" in folders else run / RECIPE
    return saved_recipe(own if own.is_file() else run / RECIPE)


def read_mapping(path: Path) -> dict[str, Any]:
    """A JSON object. Raises SalsaError for anything else."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise SalsaError(
            f"{path}: can't be read as JSON ({one_line(error)}), expected what the run wrote; make it again"
        ) from error
    require(isinstance(content, dict), f"{path}: found no JSON object, expected what the run wrote; make it again")
    return dict(content)


def check_whole(folder: Path) -> None:
    """Raise SalsaError where a result is not as it was made: nothing broken is published."""
    why = runs.changed(folder, runs.read_manifest(folder) or {"files": {}})
    require(
        why is None,
        f"{folder}: found it not as it was made ({why}), expected it as {runs.MANIFEST} says; make it again",
    )


def published(item: Item, card: str) -> dict[str, Path | bytes]:
    """Name in the repository → a file as it is, or bytes: what had a path of this machine, the recipe, the card.

    Raises SalsaError for a result without safetensors, and where a token of the Hub stands in any text.
    """
    there = sorted(path for path in item.folder.iterdir() if any(fnmatch(path.name, pattern) for pattern in PUBLISHED))
    files: dict[str, Path | bytes] = {path.name: path for path in there}
    require(
        any(name.endswith(".safetensors") and name != "value_head.safetensors" for name in files),
        f"{item.folder}: found no weights in safetensors, expected them; others are not published",
    )
    for path in there:
        if path.suffix == ".json" and path.name not in ("tokenizer.json", "vocab.json"):
            content = read_mapping(path)
            clean = without_paths(content | ({"base_model_name_or_path": item.base} if path.name == CONFIG else {}))
            if clean != content:
                files[path.name] = (json.dumps(clean, indent=2, ensure_ascii=False) + "\n").encode()
    files[RECIPE] = recipe_yaml(item.recipe).encode()
    files[CARD] = card.encode()
    if item.figure is not None:
        files[FIGURE] = item.figure
    check_secrets(files)
    return dict(sorted(files.items()))


def recipe_yaml(recipe: Recipe) -> str:
    """The resolved recipe, paths of this machine by their last part."""
    return dump_yaml(without_paths(recipe.as_data()))


def without_paths(value: Any) -> Any:
    """JSON-able data whose absolute paths are their last parts."""
    if isinstance(value, dict):
        return {key: without_paths(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [without_paths(entry) for entry in value]
    return Path(value).name if isinstance(value, str) and value.startswith(("/", "~")) else value


def check_secrets(files: dict[str, Path | bytes]) -> None:
    """Raise SalsaError where a text that would be published holds the token that is in use, or looks as if it held one."""
    from huggingface_hub import get_token

    token = (get_token() or "").encode()
    for name, content in files.items():
        if name.endswith((".safetensors", ".png")):
            continue
        raw = content if isinstance(content, bytes) else content.read_bytes()
        found = (token and token in raw) or (TOKEN.search(raw) and name != "tokenizer.json")
        require(
            not found,
            f"{name}: found a token of the Hub in it, expected none; take it out where it comes from, and revoke it",
        )
