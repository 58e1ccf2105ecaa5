"""What is published of a result: its files, and a model card that says how to load it, where it comes from and what was measured."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData, metadata_load, model_info, try_to_load_from_cache
from huggingface_hub.errors import HTTPError
from jinja2 import Environment, PackageLoader, StrictUndefined
from yaml import YAMLError

from salsa_peft.config.job import unit_of
from salsa_peft.config.load import saved_recipe
from salsa_peft.config.options.trl import PREFERENCE_ALGORITHMS
from salsa_peft.config.schema import Recipe, Source
from salsa_peft.config.yaml import dump_yaml
from salsa_peft.report import format as text
from salsa_peft.report.gather import last_part, soup_rows
from salsa_peft.soup.lora.read import CONFIG, SUMMARY, TOKENIZER, WEIGHTS
from salsa_peft.utils import manifests
from salsa_peft.utils.errors import SalsaError, require
from salsa_peft.utils.fingerprints import FINGERPRINT, read_fingerprint
from salsa_peft.utils.messages import one_line

TITLES = {
    "soup": "a model soup",
    "policy": "a policy",
    "seed": "an SFT seed",
    "reward": "a reward model",
}
CLASSES = {True: "AutoModelForSequenceClassification", False: "AutoModelForCausalLM"}
"""Whether it is a reward model → Transformers' class; PEFT's has Peft after Auto."""


def card(item: Item, repo: str, *, online: bool = False) -> str:
    """README.md of a result. online: the base's licence may be asked of the Hub where it is not at hand."""
    environment = Environment(
        loader=PackageLoader("salsa_peft.report"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= text.FILTERS
    data = metadata(item, repo, licence_of(item, online))
    page = environment.get_template("card.md.jinja").render(
        item=item, repo=repo, title=TITLES[item.kind], load=loading(item, repo), lineage=lineage(item), members=members(item),
        scores=scores(item), compared=compared(item), measured=measured(item), figure=FIGURE if item.figure else None,
        recipe=recipe_yaml(item.recipe), versions=manifests.versions(),
    )  # fmt: skip
    return f"---\n{data.to_yaml().rstrip()}\n---\n\n{page.rstrip()}\n"


def metadata(item: Item, repo: str, licence: str | None) -> ModelCardData:
    """What the Hub's search goes by."""
    kind = item.kind
    relation = "adapter" if item.adapter else "merge" if kind == "soup" else "finetune"
    method = (
        item.recipe.policies[item.name].algorithm
        if kind == "policy"
        else {"seed": "sft", "reward": "reward-model"}.get(kind, "model-soup")
    )
    results = [
        EvalResult(
            task_type="text-generation", dataset_type=row["dataset"], dataset_name=row["dataset"], metric_type=row["measure"],
            metric_name=f"mean {row['measure']}", metric_value=round(row["mean"], 4),
        )
        for row in scores(item)
    ]  # fmt: skip
    return ModelCardData(
        base_model=item.base,
        base_model_relation=relation,
        library_name="peft" if item.adapter else "transformers",
        pipeline_tag="text-classification" if kind == "reward" else "text-generation",
        license=licence,
        datasets=[source.path for source in used(item).values() if not os.path.isabs(source.path)] or None,
        tags=list(
            dict.fromkeys(["salsa", "salsa_peft", method, "rlhf", "trl", *(["peft", "lora"] if item.adapter else [])])
        ),
        model_name=repo.rsplit("/", 1)[-1] if results else None,
        eval_results=results or None,
    )


def licence_of(item: Item, online: bool) -> str | None:
    """The base's, by its own card: in its folder, in the Hub's cache, or asked of the Hub; None where it can't be known."""
    base = item.recipe.model.base
    own = Path(base) / "README.md" if base is not None and os.path.isabs(base) else None
    cached = try_to_load_from_cache(item.base, "README.md")
    found: Any = None
    path = next((path for path in (own, cached) if isinstance(path, str | Path) and Path(path).is_file()), None)
    try:
        if path is not None:
            found = metadata_load(path)
        elif online:
            found = model_info(item.base).card_data
    except (HTTPError, OSError, ValueError, YAMLError):  # somebody else's page is no condition for a push
        return None
    licence = None if found is None else found.get("license")
    return licence if isinstance(licence, str) else None


def loading(item: Item, repo: str) -> str:
    """Three lines of plain PEFT, or of plain Transformers."""
    name, package = CLASSES[item.kind == "reward"], "peft" if item.adapter else "transformers"
    name = name.replace("Auto", "AutoPeft", 1) if item.adapter else name
    more = ", num_labels=1" if item.kind == "reward" and item.adapter else ""
    return (
        f"from {package} import {name}\n"
        "from transformers import AutoTokenizer\n"
        f'model, tokenizer = {name}.from_pretrained("{repo}"{more}), AutoTokenizer.from_pretrained("{repo}")'
    )


def used(item: Item) -> dict[str, Source]:
    """The data that a result was made from, seeds' included."""
    data, algorithm = item.recipe.data, item.recipe.policies[item.name].algorithm if item.kind == "policy" else ""
    names = ["demonstrations"]
    names += ["preferences"] * (
        item.kind == "reward" or algorithm in PREFERENCE_ALGORITHMS or (bool(algorithm) and item.recipe.reward.trained)
    )
    names += ["prompts"] * (bool(algorithm) and algorithm not in PREFERENCE_ALGORITHMS)
    return {name: source for name in names if (source := getattr(data, name)) is not None}


def lineage(item: Item) -> list[tuple[str, str]]:
    """Where it comes from: (what, which), base first."""
    recipe, kind = item.recipe, item.kind
    rows = [("base", f"{item.base}, revision {recipe.model.revision or 'main'}")]
    fingerprint = read_fingerprint(item.folder)
    if fingerprint is not None:
        rows.append(("base's fingerprint", f"{fingerprint[:16]}… (SHA-256, in fingerprint.json)"))
    for name, source in used(item).items():
        limit = "" if source.limit is None else f", {source.limit} rows"
        rows.append((f"data: {name}", f"{last_part(source.path)}, split {source.split}{limit}"))
    if recipe.toy is not None:
        rows.append(("data", "salsa_peft's embedded world"))
    members = (
        recipe.soup.members
        if kind == "soup"
        else [int(item.name.removeprefix("seed-"))]
        if kind == "seed"
        else range(len(recipe.sft.seeds))
    )
    rows += [(f"seed-{member}", seed(recipe, member)) for member in members]
    if kind == "soup":
        found = own_figures(item)
        weights = ", ".join(f"{member['weight']:g}·{member['name']}" for member in found["members"])
        rows.append(("soup", f"{found['strategy']}: {weights}"))
    if kind == "policy":
        policy = own_figures(item)
        section = getattr(recipe, recipe.policies[item.name].algorithm)
        rows += [
            ("algorithm", recipe.policies[item.name].algorithm.upper() + ", from seed-0"),
            ("reference", str(policy.get("reference", ""))),
            (
                "KL coefficient β",
                " → ".join(f"{policy['kl_coef'][end]:g}" for end in ("start", "end") if "kl_coef" in policy),
            ),
            ("training", hyperparameters(section)),
        ]
    if kind in ("reward", "policy") and recipe.reward.trained:
        rows.append(("reward model", f"from seed-0, {hyperparameters(recipe.reward)}"))
    return rows


def members(item: Item) -> list[dict[str, str]]:
    """A soup's members, by the provenance in its soup.json: {name, version of salsa_peft, weight, source, weights, base}, hashes cut."""
    found: dict[str, Any] = own_figures(item).get("provenance", {}) if item.kind == "soup" else {}
    rows = []
    for member in found.get("members", []):
        hashes = [
            f"{name} {file['sha256'][:16]}…"
            for name, file in member["files"].items()
            if name.endswith(".safetensors") and file["sha256"] is not None
        ]
        own = member["fingerprint"]
        rows.append(
            {
                "name": member["name"],
                "version": found["salsa_peft"],
                "weight": f"{member['weight']:g}",
                "source": last_part(member["source"])
                + (f", revision {member['revision']}" if member["revision"] else ""),
                "weights": ", ".join(hashes) or ("" if own is None else f"fingerprint {own[:16]}…"),
                "base": f"{member['base_fingerprint'][:16]}…" if member["base_fingerprint"] else "not known",
            }
        )
    return rows


def seed(recipe: Recipe, position: int) -> str:
    """One SFT run in words, or where it was taken from."""
    if (taken := recipe.sft.existing_seed(position)) is not None:
        return f"taken from {last_part(taken)}"
    return f"SFT, random seed {recipe.sft.seeds[position]}, {hyperparameters(recipe.sft)}"


def hyperparameters(section: Any) -> str:
    """Of a training section."""
    length = f"{section.max_steps} steps" if section.max_steps > 0 else f"{section.num_train_epochs:g} epochs"
    return f"learning rate {section.learning_rate:g}, batch {section.batch_size}, {length}, {section.lr_scheduler_type} schedule"


def own_figures(item: Item) -> dict[str, Any]:
    """What the stage itself measured."""
    name = {"soup": "soup.json", "policy": "policy.json"}.get(item.kind, "metrics.json")
    path = item.folder / name
    return read_mapping(path) if path.is_file() else {}


def measured(item: Item) -> list[tuple[str, str]]:
    """The same as rows."""
    found = own_figures(item)
    return text.flatten(soup_rows(found) if item.kind == "soup" else found)


def scores(item: Item) -> list[dict[str, Any]]:
    """Of this model's answers, in the run's evaluation: {dataset, measure, mean, low, high, n}."""
    rows = []
    for dataset, found in item.summary.get("evaluation", {}).get("datasets", {}).items():
        for measure, value in found["models"].get(item.name, {}).get("scores", {}).items():
            rows.append({"dataset": dataset, "measure": measure, **value})
    return rows


def compared(item: Item) -> list[dict[str, Any]]:
    """Pairs of the report that this model is one of: {dataset, measure, a, b, mean, low, high, n, rate}."""
    return [one for one in item.summary.get("comparisons", []) if item.name in (one["a"], one["b"])]


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
    report = manifests.latest_report(run)
    if report is not None:
        return {**manifests.finished_results(run), "report": report}
    there = [*run.glob(f"*/*/{manifests.MANIFEST}"), *run.glob(f"*/*/*/{manifests.MANIFEST}")]
    made: dict[str, Path] = {}
    for path in sorted(there, key=lambda path: path.stat().st_mtime_ns):
        manifest = manifests.read_manifest(path.parent)
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
    why = manifests.changed_file(folder, manifests.read_manifest(folder) or {"files": {}})
    require(
        why is None,
        f"{folder}: found it not as it was made ({why}), expected it as {manifests.MANIFEST} says; make it again",
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
