"""Checks of the models that a recipe names: names, soups, references, starts, and what is made from what.

Each check raises a SalsaError that starts with the key. Imports no torch.
"""

import difflib
from collections.abc import Iterable
from pathlib import Path

from salsa_peft.config.fields import NAME, SEED, require_seed
from salsa_peft.config.job import OWN_FILES
from salsa_peft.config.paths import check_path, is_local
from salsa_peft.config.references import ACCEPTED_REFERENCES, START, Reference
from salsa_peft.config.schema import Recipe
from salsa_peft.utils.errors import SalsaError, require
from salsa_peft.utils.manifests import REPLICATE
from salsa_peft.utils.messages import short


def check_soups(recipe: Recipe) -> None:
    """Raise SalsaError for names of soups that are taken, for unknown members, and for circles."""
    first: dict[str, str] = {}
    for name in (*recipe.policies, *recipe.soups, *recipe.evaluate.controls):
        other = first.setdefault(name.lower(), name)
        require(other == name, f"policies, soups: {short(other)} and {short(name)} differ only in case; rename one")
    for name in recipe.soups:
        check_name("soups", name)
        check_result_name(f"soups.{name}", name)
        require(name not in recipe.policies, f"soups.{name}: is the name of a policy too; rename one of them")
    sections = {"soup": recipe.soup, **{f"soups.{name}": section for name, section in recipe.soups.items()}}
    for where, section in sections.items():
        section.check(where, len(recipe.sft.seeds))
        for name in section.names:
            check_model(f"{where}.members", name, recipe)
        if section.start != "base":
            check_model(f"{where}.start", section.start, recipe)
    _check_circles(recipe)


def _check_circles(recipe: Recipe) -> None:
    """Raise SalsaError if a soup or policy is made from itself, directly or through others."""
    made_from = {"soup": recipe.soup.reads, **{name: section.reads for name, section in recipe.soups.items()}}
    for name, policy in recipe.policies.items():
        references = [read for one in policy.references(f"policies.{name}") for read in one.reads]
        made_from[name] = [policy.start, *references]
    finished: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        if name in above:
            key = f"policies.{name}" if name in recipe.policies else "soup" if name == "soup" else f"soups.{name}"
            circle = " ← ".join([*above[above.index(name) :], name])
            raise SalsaError(f"{key}: is made from itself ({circle}); take one of these models out of the circle")
        if name not in finished:
            for other in made_from.get(name, []):
                visit(other, (*above, name))
            finished.add(name)

    for name in made_from:
        visit(name, ())


def check_reference(where: str, reference: Reference, recipe: Recipe) -> None:
    models = ["soup", *recipe.soups, *recipe.policies]
    what = "a LoRA adapter" if recipe.adapter is not None else "a checkpoint"
    require(
        START not in reference.reads,
        f"{where}: only a policy's reference can be an EMA of the policy; name another model",
    )
    for name in reference.reads:
        if seed := SEED.match(name):
            require_seed(where, int(seed[1]), len(recipe.sft.seeds))
            continue
        require(
            name in models,
            f"{where}: must be {ACCEPTED_REFERENCES}, or the folder or Hub id (namespace/name) of {what}, not"
            f" {short(name)}{suggestion(name, ['base', *models, *_seed_names(recipe)])}",
        )
    for path in reference.paths:
        check_weights(where, path, recipe)


def check_model(where: str, name: str, recipe: Recipe) -> None:
    """Raise SalsaError unless `name` is a model that this run makes, or the folder or Hub id of one."""
    if "/" in name:
        check_weights(where, name, recipe)
        return
    if seed := SEED.match(name):
        require_seed(where, int(seed[1]), len(recipe.sft.seeds))
        return
    models = ["soup", *recipe.soups, *recipe.policies]
    what = "a LoRA adapter" if recipe.adapter is not None else "a checkpoint"
    require(
        name in models,
        f"{where}: must be seed-N, soup, a soup of `soups`, a policy, or the folder or Hub id (namespace/name) of {what},"
        f" not {short(name)}{suggestion(name, [*models, *_seed_names(recipe)])}",
    )


def check_weights(where: str, path: str, recipe: Recipe) -> None:
    """Raise SalsaError unless `path` can be an adapter or, in a run with full weights, a checkpoint."""
    adapters = recipe.adapter is not None
    what = "a LoRA adapter" if adapters else "a checkpoint"
    require(
        "/" in path,
        f"{where}: {short(path)} is no folder or Hub id (namespace/name); give the folder or Hub id of {what}",
    )
    folder = Path(path)
    if is_local(path) and folder.is_dir():
        has_adapter, has_model = (folder / "adapter_config.json").is_file(), (folder / "config.json").is_file()
        require(
            (folder / "adapter_model.safetensors").is_file() or not (folder / "adapter_model.bin").is_file(),
            f"{where}: {folder} holds adapter_model.bin, a pickle, which is never loaded. Load the adapter with PEFT and"
            " save it again (save_pretrained writes adapter_model.safetensors)",
        )
        require(  # axolotl saves the base's config.json beside an adapter
            has_adapter or not has_model or not adapters,
            f"{where}: {folder} is a full checkpoint, but this run uses LoRA adapters. Run without --lora (every"
            " seed and reference is then a checkpoint), or give an adapter",
        )
        require(
            not has_adapter or adapters,
            f"{where}: {folder} is a LoRA adapter, but this run uses full weights. Add --lora, or merge the adapter first:"
            f" `salsa soup MERGED {folder.name} --merge --base BASE`",
        )
    for file in ("adapter_config.json", "adapter_model.safetensors") if adapters else ("config.json",):
        check_path(where, path, what, file)


def _seed_names(recipe: Recipe) -> list[str]:
    return [f"seed-{position}" for position in range(len(recipe.sft.seeds))]


def suggestion(name: str, known: Iterable[str]) -> str:
    """End of a message, which suggests the nearest known name; "" if no name is near."""
    near = difflib.get_close_matches(name, list(known), 1)
    return f"; did you mean {near[0]}?" if near else ""


def check_name(where: str, name: str) -> None:
    require(
        NAME.match(name) is not None,
        f"{where}: the name {short(name)} must consist of letters, digits, dots, - and _, start with a letter or"
        " digit, and have at most 64 characters",
    )


def check_result_name(where: str, name: str) -> None:
    """Raise SalsaError if another result or file in the run's folder has the name of a policy, in any case of letters."""
    model = name.lower() in ("base", "soup", "soups", "reward") or SEED.match(name.lower())
    require(not model, f"{where}: is the name of another model of the run; rename the policy")
    own = name.lower() in (*OWN_FILES, "toy", "answers", "report") or REPLICATE.fullmatch(name.lower())
    require(not own, f"{where}: is the name of a file or folder of the run; rename the policy")
