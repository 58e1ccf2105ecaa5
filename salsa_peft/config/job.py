"""Unit, Job (the argument of a stage's function), and the names of a run's results. Imports no torch."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from salsa_peft.config.fields import with_overrides
from salsa_peft.config.rewards import reweighted
from salsa_peft.config.schema import Recipe
from salsa_peft.utils.errors import SalsaError, require
from salsa_peft.utils.messages import did_you_mean, short


@dataclass(frozen=True, kw_only=True)
class Unit:
    """A piece of work with its own result, such as the training of one seed or policy, or the soup."""

    stage: str
    """Name of the stage, such as sft or ppo."""
    name: str
    """Name within the stage, such as seed-0 or salsa; the stage's name if the stage can have only one unit."""
    run: str
    """Function that does the work, as "module:name". It takes a Job and returns facts for the manifest."""
    inputs: tuple[str, ...] = ()
    """Ids of the units whose results this unit reads."""
    key_fields: dict[str, Any] = field(default_factory=dict)
    """Settings that the result depends on, as JSON data. They are part of the cache key. Paths are in `files`."""
    files: tuple[str, ...] = ()
    """Local files and folders whose content is part of the cache key."""
    libraries: tuple[str, ...] = ()
    """Packages whose versions are part of the cache key, because the result depends on them."""
    multi_unit: bool = False
    """Whether the stage can have several units, as sft and ppo can."""

    @property
    def id(self) -> str:
        """stage/name, such as sft/seed-0; the stage's name, such as soup, if the stage can have only one unit."""
        return f"{self.stage}/{self.name}" if self.multi_unit else self.stage


@dataclass(frozen=True, kw_only=True)
class Job:
    """Argument of the function that does the work of a unit."""

    recipe: Recipe
    """The resolved recipe, as `recipe_of_unit` returns it."""
    unit: Unit
    """The work to do."""
    folder: Path
    """Output folder. Before the work it holds begun.json and, if the stage resumes, the stage's checkpoints."""
    inputs: dict[str, Path]
    """Id of each input unit → folder with its finished result."""
    recipe_yaml: str
    """The resolved recipe as YAML, for the report and the model cards."""

    @property
    def run_folder(self) -> Path:
        """The run's folder. `folder` is <run>/stages/<unit id>/<key>."""
        return self.folder.parents[1 + len(Path(self.unit.id).parts)]


UNLINKED = ("report",)
"""Names in results.json without a link: the report's files are copied into the run's folder instead."""
OWN_FILES = (
    "stages", "logs", "figures", "report.html", "report.md", "summary.json", "results.json", "recipe.yaml", "commits.json",
    "hub_pending.json", "hub_pushed.json", "hub_pushed.json.old", "judge_cache.sqlite",
)  # fmt: skip
"""Names of the files and folders, besides results, in a run's folder. No policy can have one of them."""


def result_units(recipe: Recipe) -> dict[str, str]:
    """Name of each of a run's results → id of its unit.

    The names are toy (the embedded world: its base and data), seed-N, reward, soup, those of the other soups and of the
    policies, answers (all models' answers to the questions) and report.
    """
    found = {"toy": "toy"} if recipe.toy is not None else {}
    found |= {f"seed-{position}": f"sft/seed-{position}" for position in range(len(recipe.sft.seeds))}
    found |= {"reward": "reward"} if recipe.reward.trained else {}
    found |= {"soup": "soup", **{name: f"soups/{name}" for name in recipe.soups}}
    found |= {name: policy_id(recipe, name) for name in recipe.policies}
    return found | {"answers": "evaluate", "report": "report"}


def policy_id(recipe: Recipe, name: str) -> str:
    """Id of the unit that trains a policy, such as ppo/salsa or dpo/salsa-dpo."""
    return f"{recipe.policies[name].algorithm}/{name}"


def recipe_of_unit(recipe: Recipe, unit: Unit) -> Recipe:
    """The recipe with a unit's own settings in its sections: those of a policy, or in `soup` those of one of `soups`."""
    if unit.stage == "soups":
        return dataclasses.replace(recipe, soup=recipe.soups[unit.name])
    return recipe_of_policy(recipe, unit.name) if unit.multi_unit and unit.name in recipe.policies else recipe


def recipe_of_policy(recipe: Recipe, name: str) -> Recipe:
    """The recipe with the settings of one policy in its sections: kl_coef, reward and overrides.

    Raises SalsaError for an override that is unknown or has the wrong type, and for a reward that reward.model lacks.
    """
    policy, where = recipe.policies[name], f"policies.{name}"
    changed: dict[str, Any] = {}
    section, rest = with_overrides(getattr(recipe, policy.algorithm), policy.overrides, f"{where}.overrides")
    if policy.kl_coef is not None:
        section, _ = with_overrides(section, {"kl_coef": policy.kl_coef}, where)
    changed[policy.algorithm] = section
    if policy.algorithm == "ppo":
        changed["generation"], rest = with_overrides(recipe.generation, rest, f"{where}.overrides")
    known = [field.name for part in changed.values() for field in dataclasses.fields(part)]
    for key in rest:
        raise SalsaError(f"{where}.overrides.{key}: unknown key; {did_you_mean(key, known)}")
    if policy.reward is not None:
        model = reweighted(recipe.reward.parts, policy.reward, f"{where}.reward")
        changed["reward"] = dataclasses.replace(recipe.reward, model=model)
    return dataclasses.replace(recipe, **changed)


def unit_of(recipe: Recipe, name: str) -> tuple[str, str]:
    """Kind of a result (soup, policy, seed, reward) and id of its unit. Raises SalsaError if unknown."""
    if name in recipe.policies:
        return "policy", policy_id(recipe, name)
    if name in recipe.soups:
        return "soup", f"soups/{name}"
    seeds = [f"seed-{position}" for position in range(len(recipe.sft.seeds))]
    known = ["soup", *recipe.soups, *recipe.policies, *seeds, *(["reward"] if recipe.reward.trained else [])]
    require(name in known, f"this recipe has no result {short(name)}; {did_you_mean(name, known, 'results')}")
    return ("seed", f"sft/{name}") if name in seeds else (name, name)
