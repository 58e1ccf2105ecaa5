"""Units that evaluate models, and that report and publish results."""

from dataclasses import asdict
from typing import Any

from salsa_peft.config.job import Unit, unit_of
from salsa_peft.config.options.soup import named
from salsa_peft.config.options.toy import TOY_PROMPTS
from salsa_peft.config.references import parse_reference
from salsa_peft.config.schema import Recipe
from salsa_peft.recipe.units.builder import (
    TEXT,
    UnitBuilder,
    comparison_fields,
    model_ids,
    reference_ids,
    reward_ids,
    seed_id,
)
from salsa_peft.recipe.units.data import (
    data_units,
    reward_quality_units,
    reward_units,
    sft_units,
    synthetic_units,
    toy_units,
)
from salsa_peft.recipe.units.models import POLICY_UNITS, further_soup_units, soup_units


def landscape_units(recipe: Recipe, run: str) -> list[Unit]:
    """The unit that scores points on a line or plane of seeds, if `landscape` sets a line or plane."""
    landscape = recipe.landscape
    if landscape is None or (landscape.line is None and landscape.plane is None):
        return []
    builder = UnitBuilder(recipe, run)
    prompts = landscape.prompts or next(iter(recipe.evaluate.prompts or TOY_PROMPTS))
    unused = () if landscape.norm_controls else ("norm_controls",)
    section = {name: value for name, value in asdict(landscape).items() if name not in unused}
    section |= {
        key: [builder.member(name) for name in named(found)]
        for key, found in (("line", landscape.line), ("plane", landscape.plane))
        if found is not None
    }
    fields = {
        "model": builder.model(),
        "landscape": {**section, "prompts": prompts},
        "temperature": recipe.evaluate.temperature,
        "prompts": builder.source(recipe.evaluate.prompts.get(prompts)),
        "reward": builder.reward(),
        "generation": asdict(recipe.generation),
    }
    if recipe.measures_parts:
        fields["measures_parts"] = True
    return [builder.unit("landscape", fields, *reward_ids(recipe), *model_ids(recipe, landscape.names))]


def evaluate_units(recipe: Recipe, run: str) -> list[Unit]:
    """The unit that evaluates seed-0, the soup, all policies, and evaluate.models: responses and scores."""
    builder, options = UnitBuilder(recipe, run), recipe.evaluate
    trained = {*recipe.policies, *recipe.soups}
    others = [model for model in options.models if model not in trained]
    references = [reference for model in others for reference in parse_reference("evaluate.models", model)]
    controls = {name: parse_reference("evaluate.controls", value)[0] for name, value in options.controls.items()}
    fields = {
        "model": builder.model(),
        "prompts": {name: builder.source(source) for name, source in options.prompts.items()},
        "models": [model if model in trained else None for model in options.models],
        "references": [builder.reference(reference) for reference in references],
        "temperature": options.temperature,
        "reward": builder.reward(),
        "seed": options.seed,
        "generation": asdict(recipe.generation),
    }
    if controls:
        fields["controls"] = {name: builder.reference(reference) for name, reference in controls.items()}
        references += controls.values()
    if recipe.warp is not None and recipe.adapter is not None:
        fields["kl_from_start"] = True
    if recipe.measures_parts:
        fields["measures_parts"] = True
    models = model_ids(recipe, [*recipe.soups, *recipe.policies])
    inputs = [seed_id(0), "soup", *reference_ids(recipe, references), *reward_ids(recipe), *models]
    return [builder.unit("evaluate", fields, *inputs)]


def judge_units(recipe: Recipe, run: str) -> list[Unit]:
    """The judge's unit, if the recipe has a judge. Its key has only the options that affect verdicts."""
    judge = recipe.evaluate.judge
    if judge is None:
        return []
    builder = UnitBuilder(recipe, run)
    builder.libraries |= {*TEXT} if judge.kind == "local" else set()
    unused: dict[str, Any] = dict.fromkeys(("api_key_env", "concurrency", "timeout", "retries"))
    places: dict[str, Any] = {"function": builder.function, "local": builder.path}
    model = places[judge.kind](judge.model) if judge.kind in places else judge.model
    paths = {"prompts": builder.path(judge.prompts), "references": builder.path(judge.references)}
    fields: dict[str, Any] = {
        "judge": {**asdict(judge), **unused, **paths, "model": model},
        **comparison_fields(recipe),
    }
    if recipe.search is not None:
        fields["search"] = asdict(recipe.search)
    inputs = ["evaluate", *(["reward_quality"] if recipe.judges_best_of_n else [])]
    return [builder.unit("judge", fields, *inputs, toy=False)]


def report_units(recipe: Recipe, run: str) -> list[Unit]:
    """The unit of the report, which reads the results of all stages before it."""
    before = [toy_units, synthetic_units, data_units, sft_units, reward_units, reward_quality_units, soup_units]
    stages = [*before, *POLICY_UNITS.values(), further_soup_units, landscape_units, evaluate_units, judge_units]
    search = None if recipe.search is None else asdict(recipe.search)
    fields = {"samples": recipe.evaluate.samples, **comparison_fields(recipe), "search": search}
    inputs = (unit.id for units in stages for unit in units(recipe, ""))
    return [UnitBuilder(recipe, run).unit("report", fields, *inputs, toy=False)]


def hub_units(recipe: Recipe, run: str) -> list[Unit]:
    """The unit that pushes the results named in the `hub` section to the Hub, after the report."""
    if not recipe.hub.push:
        return []
    inputs = (unit_of(recipe, name)[1] for name in recipe.hub.push)
    return [UnitBuilder(recipe, run).unit("hub", {"hub": asdict(recipe.hub)}, "report", *inputs, toy=False)]
