"""Units that make soups and policies."""

import functools
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from salsa_peft.config.job import Unit, recipe_of_policy
from salsa_peft.config.options.ppo import LATER_OPTIONS
from salsa_peft.config.options.soup import SoupSection
from salsa_peft.config.options.trl import ALGORITHMS, PREFERENCE_ALGORITHMS
from salsa_peft.config.policies.search import SEED_0
from salsa_peft.config.schema import Recipe
from salsa_peft.recipe.units.builder import (
    PREFERENCES,
    TEXT,
    UnitBuilder,
    model_ids,
    reference_ids,
    reward_ids,
    section_fields,
)


def soup_units(recipe: Recipe, run: str) -> list[Unit]:
    """The unit of the recipe's section `soup`."""
    return [_soup(recipe, run, "soup", recipe.soup)]


def further_soup_units(recipe: Recipe, run: str) -> list[Unit]:
    """The units of the recipe's section `soups`."""
    return [_soup(recipe, run, "soups", section, name) for name, section in recipe.soups.items()]


def _soup(recipe: Recipe, run: str, stage: str, section: SoupSection, name: str = "") -> Unit:
    builder = UnitBuilder(recipe, run)
    members = model_ids(recipe, section.names)
    paths = [builder.path(name) for name in section.names if "/" in name]
    fields: dict[str, Any] = {"members": members + paths, "weights": section.resolved_weights}
    if members and paths:  # the weights are in the members' order
        fields["order"] = [int("/" in name) for name in section.names]
    if section.strategy != "linear" or section.rank is not None:
        fields |= {"strategy": section.strategy, "rank": section.rank}
    defaults = {"per": "model", "start": "base", "scale": 1.0, "density": None, "drop_seed": None}
    given = {option: getattr(section, option) for option in defaults} | {"start": builder.path(section.start)}
    fields |= given if given != defaults else {}
    inputs = model_ids(recipe, section.reads)
    if not section.uses_measure:
        full = recipe.adapter is None  # a soup of checkpoints reads the base, to measure the members' distance from it
        return builder.unit(stage, fields | ({"model": builder.model()} if full else {}), *inputs, name=name, toy=full)
    fields |= {
        "measure": builder.function(section.measure) if ":" in section.measure else section.measure,
        "settings": [section.limit, section.steps, section.step_size],
        "model": builder.model(),
        "data": builder.source(getattr(recipe.data, section.measure_source)) if section.measure_source else None,
    }
    builder.libraries |= {*TEXT}
    if section.measure == "reward":
        fields |= {"reward": builder.reward(), "generation": asdict(recipe.generation)}
    reward = reward_ids(recipe) if section.measure == "reward" else []
    return builder.unit(stage, fields, *reward, *inputs, name=name)


def policy_units(recipe: Recipe, run: str, *, algorithm: str) -> list[Unit]:
    """The units of the policies that an algorithm trains."""
    return [_policy(recipe, run, name) for name, policy in recipe.policies.items() if policy.algorithm == algorithm]


def _policy(recipe: Recipe, run: str, name: str) -> Unit:
    recipe, policy = recipe_of_policy(recipe, name), recipe.policies[name]
    builder = UnitBuilder(recipe, run)
    algorithm, references = policy.algorithm, policy.references(f"policies.{name}")
    fields: dict[str, Any] = {
        "model": builder.model(),
        algorithm: section_fields(getattr(recipe, algorithm)),
        "references": [builder.reference(reference) for reference in references],
        "export": list(recipe.export),
        **builder.training(algorithm),
    }
    if policy.start != SEED_0:
        fields["start"] = builder.member(policy.start)
    inputs = [PREFERENCES] if algorithm in PREFERENCE_ALGORITHMS else reward_ids(recipe)
    if algorithm not in PREFERENCE_ALGORITHMS:
        fields |= {
            "prompts": builder.source(recipe.data.prompts),
            "generation": {**asdict(recipe.generation), "batch_size": None},
            "reward": builder.reward(),
        }
    if algorithm == "ppo":
        builder.libraries |= {"vllm"} if recipe.ppo.rollout_backend == "vllm" else set()
        # the result does not depend on them: a guard that stops leaves an unfinished unit, which other guards may resume
        fields["ppo"] |= {"save_steps": None, "shown_every": None, "guards": None}
        del fields["ppo"]["log_completions"], fields["ppo"]["num_completions_to_print"]
        for option, default in LATER_OPTIONS.items():
            if fields["ppo"][option] == default:
                del fields["ppo"][option]
        inputs += ["reward_quality"] if recipe.measures_reward else []  # for a warning
        fields["eval_prompts"] = builder.source(recipe.evaluate.prompts.get(recipe.ppo.eval_prompts or ""))
    start = model_ids(recipe, [policy.start])
    return builder.unit(algorithm, fields, *start, *inputs, *reference_ids(recipe, references), name=name)


POLICY_UNITS: dict[str, Callable[[Recipe, str], list[Unit]]] = {
    algorithm: functools.partial(policy_units, algorithm=algorithm) for algorithm in ("ppo", *ALGORITHMS)
}
"""Algorithm, which is also the name of its stage → function that returns the units of its policies."""
