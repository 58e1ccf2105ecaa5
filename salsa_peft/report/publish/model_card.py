"""Published files of a result or a soup, and its model card with loading code, lineage and metrics."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from salsa_peft.config.fields import SEED
from salsa_peft.config.job import recipe_of_policy
from salsa_peft.config.options.trl import PREFERENCE_ALGORITHMS
from salsa_peft.config.policies.policy import Policy
from salsa_peft.config.rewards import ADAPTER
from salsa_peft.config.schema import Recipe, Source
from salsa_peft.config.yaml import dump_yaml
from salsa_peft.report.format import Row, flatten, render
from salsa_peft.report.gather import SOUP, last_part, soup_report, soup_rows, soup_text
from salsa_peft.report.publish.items import RECIPE, Item
from salsa_peft.report.sections import reward
from salsa_peft.report.style import MEASURES
from salsa_peft.utils import manifests
from salsa_peft.utils.fingerprints import read_fingerprint
from salsa_peft.utils.hub import check_secrets, licence, model_files, without_paths

TITLES = {"policy": "a policy", "seed": "an SFT seed", "reward": "a reward model"}
CARD, FIGURE = "README.md", "figure.png"


def published_files(item: Item, card: str) -> dict[str, Path | bytes]:
    """Name in the repository → a file's path, or its bytes (JSON without local paths, recipe, card).

    Raises SalsaError if the result has no weights in safetensors, or a text file contains a token of the Hub.
    """
    files = model_files(item.folder, item.base)
    if item.recipe is not None:
        files[RECIPE] = recipe_yaml(item.recipe).encode()
    files[CARD] = card.encode()
    if item.figure is not None:
        files[FIGURE] = item.figure
    check_secrets(files)
    return dict(sorted(files.items()))


def recipe_yaml(recipe: Recipe) -> str:
    """The resolved recipe as YAML, in which only the last part of local paths is kept."""
    return dump_yaml(without_paths(recipe.as_data()))


def render_card(item: Item, repo: str, *, online: bool = False) -> str:
    """Render README.md of a result. online: whether to ask the Hub for the base's licence."""
    base = item.recipe.model.base if item.recipe is not None else None
    own = Path(base) / CARD if base is not None and os.path.isabs(base) else None
    data = metadata(item, repo, licence(item.base, own, online=online))
    shown: dict[str, Callable[[dict[str, Any]], Row]] = {"soup": soup_rows, "reward": reward.facts}
    screen = item.summary.get("screen", {})
    page = render(
        "card.md.jinja",
        item=item, repo=repo, title=title(item), load=loading_code(item, repo), lineage=lineage(item), members=members(item),
        scores=scores(item), compared=compared(item), measured=flatten(shown.get(item.kind, dict)(item.metrics)),
        said=screen.get("sentences", {}), explained=screen.get("names", {}), measures=MEASURES,
        figure=FIGURE if item.figure else None, recipe=item.recipe and recipe_yaml(item.recipe),
        versions=manifests.versions(),
    )  # fmt: skip
    return f"---\n{data.to_yaml().rstrip()}\n---\n\n{page}\n"


def title(item: Item) -> str:
    """What the result is, as the card's first words."""
    if item.kind != "soup":
        return TITLES[item.kind]
    if item.recipe is None:
        return f"a model soup: {_made_without_recipe(item.metrics)}"
    soup = soup_report(item.recipe.soups.get(item.name, item.recipe.soup), item.folder)
    if item.name != SOUP or not soup.of_seeds:
        return f"a model soup: {soup_text(soup)}"
    what = "the weight average of SFT seeds" if soup.strategy == "linear" and soup.scale == 1 else soup_text(soup)
    return f"a model soup: {what}, which SALSA takes as the reference of RLHF's KL term"


def _made_without_recipe(summary: dict[str, Any]) -> str:
    """What a soup of `salsa soup` is, from its soup.json."""
    count = sum(member["name"] != "start" for member in summary["members"])
    of = f"{count} {'checkpoints' if summary.get('kind') == 'checkpoints' else 'LoRA adapters'}"
    how = _options(summary)
    if summary["strategy"] == "linear" and not how:
        return f"the weight average of {of}"
    return ", ".join([f"{summary['strategy']} of {of}", *how])


def _options(summary: dict[str, Any]) -> list[str]:
    """A soup's start and scale as text, from its soup.json, where they are not the base and 1."""
    start, scale = summary.get("start"), summary.get("scale", 1)
    return [
        *([] if start is None else [f"changes from {last_part(start)}"]),
        *([] if scale == 1 else [f"η {scale:g}"]),
    ]


def ancestors(recipe: Recipe, name: str) -> list[str]:
    """Names of a model and of all models that its weights come from: starts of policies, members and starts of soups."""
    found, todo = list[str](), [name]
    while todo:
        if (one := todo.pop(0)) in found:
            continue
        found.append(one)
        if one in recipe.policies:
            todo.append(recipe.policies[one].start)
        elif one == SOUP or one in recipe.soups:
            todo += recipe.soups.get(one, recipe.soup).reads
    return found


def policies_of(item: Item) -> dict[str, Policy]:
    """Name → policy of the policies that a result's weights come from, the result included."""
    recipe = item.recipe
    names = [] if recipe is None else ancestors(recipe, item.name)
    return {name: recipe.policies[name] for name in names if recipe is not None and name in recipe.policies}


def learns_from_adapter(recipe: Recipe, name: str) -> bool:
    """Whether a policy is trained on the score of the run's own reward model."""
    if recipe.policies[name].algorithm in PREFERENCE_ALGORITHMS:
        return False
    return any(part.kind == ADAPTER and part.weight for part in recipe_of_policy(recipe, name).reward.parts)


def metadata(item: Item, repo: str, licensed: str | None) -> ModelCardData:
    """The card's front matter, which the Hub's search uses."""
    relation = "adapter" if item.adapter else "merge" if item.kind == "soup" else "finetune"
    method = item.algorithm or {"seed": "sft", "reward": "reward-model"}.get(item.kind, "model-soup")
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
        pipeline_tag="text-classification" if item.kind == "reward" else "text-generation",
        license=licensed,
        datasets=[source.path for source in data_sources(item).values() if not os.path.isabs(source.path)] or None,
        tags=[
            *("salsa", "salsa_peft", method),
            *(["rlhf", "trl"] if item.recipe is not None else []),
            *(["peft", "lora"] if item.adapter else []),
        ],
        model_name=repo.rsplit("/", 1)[-1] if results else None,
        eval_results=results or None,
    )


def loading_code(item: Item, repo: str) -> str:
    """Three lines of Python that load the result with PEFT or Transformers."""
    name = "ModelForSequenceClassification" if item.kind == "reward" else "ModelForCausalLM"
    name, package = (f"AutoPeft{name}", "peft") if item.adapter else (f"Auto{name}", "transformers")
    more = ", num_labels=1" if item.kind == "reward" and item.adapter else ""
    return (
        f"from {package} import {name}\nfrom transformers import AutoTokenizer\n"
        f'model, tokenizer = {name}.from_pretrained("{repo}"{more}), AutoTokenizer.from_pretrained("{repo}")'
    )


def data_sources(item: Item) -> dict[str, Source]:
    """Key of `data` → source, for the data that a result, its seeds and its reward were trained on."""
    if item.recipe is None:
        return {}
    names, policies = ["demonstrations"], policies_of(item)
    from_pairs = [name for name, policy in policies.items() if policy.algorithm in PREFERENCE_ALGORITHMS]
    pairs = item.kind == "reward" or bool(from_pairs) or any(learns_from_adapter(item.recipe, one) for one in policies)
    names += ["preferences"] * pairs
    names += ["prompts"] * (len(policies) > len(from_pairs))
    return {name: source for name in names if (source := getattr(item.recipe.data, name)) is not None}


def lineage(item: Item) -> list[tuple[str, str]]:
    """Rows (name, value) on the origin of a result, the base first."""
    recipe = item.recipe
    rows = [("base", item.base + (f", revision {recipe.model.revision or 'main'}" if recipe is not None else ""))]
    fingerprint = read_fingerprint(item.folder)
    if fingerprint is not None:
        rows.append(("base's fingerprint", f"{fingerprint[:16]}… (SHA-256, in fingerprint.json)"))
    rows += [] if recipe is None else _training(item, recipe)
    if item.kind == "soup":
        weights = ", ".join(f"{member['weight']:g}·{member['name']}" for member in item.metrics["members"])
        rows.append(("soup", ", ".join([f"{item.metrics['strategy']}: {weights}", *_options(item.metrics)])))
    return rows


def _training(item: Item, recipe: Recipe) -> list[tuple[str, str]]:
    """Rows on the data, seeds, reward model and training that a run's result comes from."""
    kind, rows = item.kind, list[tuple[str, str]]()
    for name, source in data_sources(item).items():
        limit = "" if source.limit is None else f", {source.limit} rows"
        rows.append((f"data: {name}", f"{last_part(source.path)}, split {source.split}{limit}"))
    if recipe.toy is not None:
        rows.append(("data", "salsa_peft's generated toy language"))
    names = [f"seed-{position}" for position in range(len(recipe.sft.seeds))]
    names = ancestors(recipe, item.name) if kind in ("seed", "soup") else names
    rows += [(name, seed_text(recipe, int(seed[1]))) for name in names if (seed := SEED.match(name))]
    policies = policies_of(item)
    rows += [(name, policy_text(recipe, name)) for name in policies if name != item.name]
    if kind == "policy":
        policy = item.metrics
        beta = " → ".join(f"{policy['kl_coef'][end]:g}" for end in ("start", "end") if "kl_coef" in policy)
        rows += [
            ("algorithm", f"{item.algorithm.upper()}, from {last_part(recipe.policies[item.name].start)}"),
            ("reference", str(policy.get("reference", ""))),
            ("KL coefficient β", beta),
            ("training", hyperparameters(getattr(recipe_of_policy(recipe, item.name), item.algorithm))),
        ]
        rows += [] if recipe.policies[item.name].reward is None else [("reward", reward_text(recipe, item.name))]
    if kind == "reward" or any(learns_from_adapter(recipe, name) for name in policies):
        rows.append(("reward model", f"from seed-0, {hyperparameters(recipe.reward)}"))
    return rows


def members(item: Item) -> list[dict[str, str]]:
    """Rows on a soup's members: {name, version of salsa_peft, weight, source, weights, base} each."""
    found: dict[str, Any] = item.metrics.get("provenance", {}) if item.kind == "soup" else {}
    rows = []
    for member in found.get("members", []):
        hashes = [
            f"{name} {file['sha256'][:16]}…"
            for name, file in member["files"].items()
            if name.endswith(".safetensors") and file["sha256"] is not None
        ]
        own, revision = member["fingerprint"], f", revision {member['revision']}" if member["revision"] else ""
        rows.append(
            {
                "name": member["name"],
                "version": found["salsa_peft"],
                "weight": f"{member['weight']:g}",
                "source": last_part(member["source"]) + revision,
                "weights": ", ".join(hashes) or ("" if own is None else f"fingerprint {own[:16]}…"),
                "base": f"{member['base_fingerprint'][:16]}…" if member["base_fingerprint"] else "not known",
            }
        )
    return rows


def seed_text(recipe: Recipe, position: int) -> str:
    """One SFT run as text, or the origin of a seed that the run did not train."""
    if (existing := recipe.sft.existing_seed(position)) is not None:
        return f"taken from {last_part(existing)}"
    return f"SFT, random seed {recipe.sft.seeds[position]}, {hyperparameters(recipe.sft)}"


def policy_text(recipe: Recipe, name: str) -> str:
    """The training of one policy as text."""
    policy = recipe.policies[name]
    own = "" if policy.reward is None else f", reward {reward_text(recipe, name)}"
    references = ", ".join(one.label for one in policy.references(name))
    return f"{policy.algorithm.upper()} from {last_part(policy.start)}, reference {last_part(references)}{own}"


def reward_text(recipe: Recipe, name: str) -> str:
    """The weighted sum of rewards that a policy is trained on, as text."""
    parts = recipe_of_policy(recipe, name).reward.parts
    return " + ".join(f"{part.weight:g}·{part.name}" for part in parts if part.weight)


def hyperparameters(section: Any) -> str:
    """The main hyperparameters of a training section, as text."""
    length = f"{section.max_steps} steps" if section.max_steps > 0 else f"{section.num_train_epochs:g} epochs"
    return f"learning rate {section.learning_rate:g}, batch {section.batch_size}, {length}, {section.lr_scheduler_type} schedule"


def scores(item: Item) -> list[dict[str, Any]]:
    """The result's scores in the run's evaluation: {dataset, measure, mean, low, high, n} each."""
    return [
        {"dataset": dataset, "measure": measure, **value}
        for dataset, found in item.summary.get("evaluation", {}).get("datasets", {}).items()
        for measure, value in found["models"].get(item.name, {}).get("scores", {}).items()
    ]


def compared(item: Item) -> list[dict[str, Any]]:
    """The report's comparisons of the result: {dataset, measure, a, b, mean, low, high, n, rate, conclusion} each."""
    return [one for one in item.summary.get("comparisons", []) if item.name in (one["a"], one["b"])]
