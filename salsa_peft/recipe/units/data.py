"""Units that make data, SFT models and reward models, and that measure the reward."""

from dataclasses import asdict
from typing import Any

from salsa_peft.config.job import Unit
from salsa_peft.config.options.trl import PREFERENCE_ALGORITHMS
from salsa_peft.config.schema import Recipe
from salsa_peft.recipe.units.builder import (
    DEMONSTRATIONS,
    PREFERENCES,
    UnitBuilder,
    reward_ids,
    section_fields,
    seed_id,
)


def toy_units(recipe: Recipe, run: str) -> list[Unit]:
    """The unit that builds the toy base, tokenizer and data, if the recipe has `toy`."""
    return [UnitBuilder(recipe, run).unit("toy", {"toy": asdict(recipe.toy)}, toy=False)] if recipe.toy else []


def synthetic_units(recipe: Recipe, run: str) -> list[Unit]:
    """The unit that samples the base's answers and judges them, if the recipe has `synthetic`."""
    section = recipe.synthetic
    if section is None:
        return []
    builder = UnitBuilder(recipe, run)
    fields = {
        "model": builder.model(),
        "synthetic": {**asdict(section), "function": builder.function(section.function)},
        "prompts": builder.source(recipe.data.prompts),
        "generation": {**asdict(recipe.generation), "batch_size": None},
    }
    return [builder.unit("synthetic", fields)]


def data_units(recipe: Recipe, run: str) -> list[Unit]:
    """The units that tokenize the demonstrations and preferences, if the recipe trains on them.

    Their keys have the data, the tokenizer and the chat template, but neither seeds nor settings of training. Prompts are
    not among them: the stages that sample responses tokenize them, which takes three seconds for 10,000 prompts.
    """
    algorithms = {policy.algorithm for policy in recipe.policies.values()}
    used = {
        "demonstrations": any(recipe.sft.existing_seed(place) is None for place in range(len(recipe.sft.seeds))),
        "preferences": recipe.reward.trained or not algorithms.isdisjoint(PREFERENCE_ALGORITHMS),
    }
    units = []
    for kind in [kind for kind, is_used in used.items() if is_used]:
        builder, source = UnitBuilder(recipe, run), getattr(recipe.data, kind)
        fields = {"source": builder.source(source), "tokenizer": builder.tokenizer()}
        made = ["synthetic"] if source is None and recipe.synthetic is not None else []
        units.append(builder.unit("data", fields, *made, name=kind))
    return units


def sft_units(recipe: Recipe, run: str) -> list[Unit]:
    """One SFT unit for each seed."""
    units = []
    for position, seed in enumerate(recipe.sft.seeds):
        builder, existing = UnitBuilder(recipe, run), recipe.sft.existing_seed(position)
        if existing is not None:
            fields: dict[str, Any] = {"model": builder.model(), "from": builder.path(existing)}
            units.append(builder.unit("sft", fields, name=f"seed-{position}"))
            continue
        fields = {
            "model": builder.model(),
            "adapter": asdict(recipe.adapter) if recipe.adapter else None,
            "sft": {**section_fields(recipe.sft, "from_"), "seeds": [seed]},
            **builder.training("sft"),
        }
        units.append(builder.unit("sft", fields, DEMONSTRATIONS, name=f"seed-{position}"))
    return units


def reward_units(recipe: Recipe, run: str) -> list[Unit]:
    """The unit that trains the reward model, starting from seed-0, if the recipe trains a reward model."""
    if not recipe.reward.trained:
        return []
    builder = UnitBuilder(recipe, run)
    fields = {
        "model": builder.model(),
        "reward": section_fields(recipe.reward, "model", "quality_prompts", "quality_responses"),
        **builder.training("reward"),
    }
    return [builder.unit("reward", fields, PREFERENCES, seed_id(0))]


def reward_quality_units(recipe: Recipe, run: str) -> list[Unit]:
    """The unit that measures the reward on seed-0's responses, if policies learn from the reward."""
    if not recipe.measures_reward:
        return []
    builder, section = UnitBuilder(recipe, run), recipe.reward
    fields = {
        "model": builder.model(),
        "quality": {"prompts": section.quality_prompts, "responses": section.quality_responses},
        "ppo": {"seed": recipe.ppo.seed, "max_prompt_length": recipe.ppo.max_prompt_length},
        "prompts": builder.source(recipe.data.prompts),
        "generation": {**asdict(recipe.generation), "batch_size": None},
        "reward": builder.reward(),
    }
    return [builder.unit("reward_quality", fields, seed_id(0), *reward_ids(recipe))]
