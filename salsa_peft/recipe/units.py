"""The units of work of a recipe: for each stage its units, what each reads, and its cache-key fields.

The key fields of a unit are the part of the recipe that its result depends on. What is not among them can change
without running the unit again: `evaluate` is in no policy's key, and `name`, `description` and `threads` are in none.
Of local files and folders the content is part of the key, the path is not.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from salsa_peft.config import sweeps
from salsa_peft.config.job import Unit, policy_id, unit_of
from salsa_peft.config.options.toy import TOY_PROMPTS
from salsa_peft.config.options.trl import ALGORITHMS, PREFERENCE_ALGORITHMS
from salsa_peft.config.paths import is_local
from salsa_peft.config.references import Reference, parse_reference
from salsa_peft.config.rewards import find_module, split_function
from salsa_peft.config.schema import Recipe, Source


class _UnitBuilder:
    """Builds a unit: its methods give key fields without local paths, and collect the paths in `files`."""

    def __init__(self, recipe: Recipe, run: str) -> None:
        self.recipe, self.run = recipe, run
        self.files: list[str] = []

    def unit(self, stage: str, key_fields: dict[str, Any], *inputs: str, name: str = "", toy: bool = True) -> Unit:
        """The unit. name: if the stage has several. toy: whether it reads the embedded world, if there is one."""
        first = ["toy"] if toy and self.recipe.toy else []
        return Unit(
            stage=stage,
            name=name or stage,
            run=self.run,
            multi_unit=bool(name),
            inputs=tuple(dict.fromkeys([*first, *inputs])),
            key_fields=key_fields,
            files=tuple(self.files),
        )

    def path(self, value: str | None) -> str | None:
        """A Hub id as it is; for a local path "local"."""
        if value is None or not is_local(value):
            return value
        self.files.append(value)
        return "local"

    def source(self, source: Source | None) -> dict[str, Any] | None:
        """A dataset."""
        return None if source is None else {**asdict(source), "path": self.path(source.path)}

    def model(self) -> dict[str, Any]:
        """The base model."""
        model = self.recipe.model
        return {**asdict(model), "base": self.path(model.base), "chat_template": self.path(model.chat_template)}

    def reference(self, reference: Reference) -> dict[str, Any]:
        """A reference model, without its label, and without the options of syncing if it is not synced."""
        unused = ("sync_every", "mixup_alpha") if reference.sync_every is None else ()
        fields = {name: value for name, value in asdict(reference).items() if name not in unused}
        return {**fields, "label": None, "path": self.path(reference.path)}

    def reward(self) -> list[dict[str, Any]]:
        """The parts of the reward."""
        value: dict[str, Callable[[str], Any]] = {"function": self.function}
        parts = self.recipe.reward.parts
        return [{**asdict(part), "value": value.get(part.kind, self.path)(part.value)} for part in parts]

    def function(self, value: str) -> list[str]:
        """The module and name of a function. The module's file is in the key; modules that it imports are not."""
        folder, *named = split_function(value)
        file = find_module(folder, named[0])
        self.files += [] if file is None else [str(file)]
        return named

    def precision(self) -> dict[str, Any]:
        """The precision of full weights; adapters always have the same."""
        return {"precision": self.recipe.precision} if self.recipe.adapter is None else {}


def _seed(position: int) -> str:
    return f"sft/seed-{position}"


def _reward(recipe: Recipe) -> list[str]:
    """The reward stage, if the recipe has one."""
    return ["reward"] if recipe.reward.trained else []


def _of_references(references: list[Reference]) -> list[str]:
    """The units that references are made from."""
    soup = ["soup"] if any(reference.soup for reference in references) else []
    return [_seed(member) for reference in references for member in reference.members] + soup


def _comparisons(recipe: Recipe) -> dict[str, Any]:
    return {"pairs": [list(pair) for pair in sweeps.compared_pairs(recipe)]}


def toy_units(recipe: Recipe, run: str) -> list[Unit]:
    """The embedded world: base, tokenizer and data."""
    return [_UnitBuilder(recipe, run).unit("toy", {"toy": asdict(recipe.toy)}, toy=False)] if recipe.toy else []


def sft_units(recipe: Recipe, run: str) -> list[Unit]:
    """One SFT for each seed."""
    units = []
    for position, seed in enumerate(recipe.sft.seeds):
        builder, existing = _UnitBuilder(recipe, run), recipe.sft.existing_seed(position)
        section = {name: value for name, value in asdict(recipe.sft).items() if name != "from_"}
        fields: dict[str, Any] = {
            "model": builder.model(),
            "adapter": asdict(recipe.adapter) if recipe.adapter else None,
            "demonstrations": builder.source(recipe.data.demonstrations),
            "sft": {**section, "seeds": [seed]},
            **builder.precision(),
        }
        if existing is not None:
            fields = {"model": fields["model"], "from": builder.path(existing)}
        units.append(builder.unit("sft", fields, name=f"seed-{position}"))
    return units


def reward_units(recipe: Recipe, run: str) -> list[Unit]:
    """The reward model, if the recipe trains one; training starts at seed-0."""
    if not recipe.reward.trained:
        return []
    builder = _UnitBuilder(recipe, run)
    fields = {
        "model": builder.model(),
        "preferences": builder.source(recipe.data.preferences),
        "reward": {name: value for name, value in asdict(recipe.reward).items() if name != "model"},
        **builder.precision(),
    }
    return [builder.unit("reward", fields, _seed(0))]


def soup_units(recipe: Recipe, run: str) -> list[Unit]:
    """The recipe's soup of seeds."""
    section, builder = recipe.soup, _UnitBuilder(recipe, run)
    members = [_seed(member) for member in section.members]
    fields: dict[str, Any] = {"members": members, "weights": section.resolved_weights}
    if section.strategy != "linear" or section.rank is not None:
        fields |= {"strategy": section.strategy, "rank": section.rank}
    if not section.uses_measure:
        full = recipe.adapter is None  # a soup of checkpoints reads the base, to measure the members' distance from it
        return [builder.unit("soup", fields | ({"model": builder.model()} if full else {}), *members, toy=full)]
    fields |= {
        "measure": builder.function(section.measure) if ":" in section.measure else section.measure,
        "settings": [section.limit, section.steps, section.step_size],
        "model": builder.model(),
        "data": builder.source(getattr(recipe.data, section.measure_source)) if section.measure_source else None,
    }
    if section.measure == "reward":
        fields |= {"reward": builder.reward(), "generation": asdict(recipe.generation)}
    return [builder.unit("soup", fields, *(_reward(recipe) if section.measure == "reward" else []), *members)]


def policy_units(recipe: Recipe, run: str, *, algorithm: str) -> list[Unit]:
    """The policies that an algorithm trains; training starts at seed-0."""
    return [_policy(recipe, run, name) for name, policy in recipe.policies.items() if policy.algorithm == algorithm]


def _policy(recipe: Recipe, run: str, name: str) -> Unit:
    builder, policy = _UnitBuilder(recipe, run), recipe.policies[name]
    algorithm, references = policy.algorithm, policy.references(f"policies.{name}")
    section = getattr(recipe, algorithm)
    beta = section.kl_coef if policy.kl_coef is None else policy.kl_coef
    fields: dict[str, Any] = {
        "model": builder.model(),
        algorithm: {**asdict(section), "kl_coef": beta},
        "references": [builder.reference(reference) for reference in references],
        "export": list(recipe.export),
        **builder.precision(),
    }
    if algorithm in PREFERENCE_ALGORITHMS:
        fields["preferences"] = builder.source(recipe.data.preferences)
    else:
        fields |= {
            "prompts": builder.source(recipe.data.prompts),
            "generation": {**asdict(recipe.generation), "batch_size": None},
            "reward": builder.reward(),
        }
    if algorithm == "ppo":
        fields["ppo"] |= {"save_steps": None, "shown_every": None}  # the result does not depend on them
        fields["eval_prompts"] = builder.source(recipe.evaluate.prompts.get(recipe.ppo.eval_prompts or ""))
    rewards = [] if algorithm in PREFERENCE_ALGORITHMS else _reward(recipe)
    return builder.unit(algorithm, fields, _seed(0), *rewards, *_of_references(references), name=name)


def landscape_units(recipe: Recipe, run: str) -> list[Unit]:
    """Scores along the line and on the plane of seeds, if the recipe asks for them."""
    landscape = recipe.landscape
    if landscape is None or (landscape.line is None and landscape.plane is None):
        return []
    builder = _UnitBuilder(recipe, run)
    prompts = landscape.prompts or next(iter(recipe.evaluate.prompts or TOY_PROMPTS))
    fields = {
        "model": builder.model(),
        "landscape": {**asdict(landscape), "prompts": prompts},
        "temperature": recipe.evaluate.temperature,
        "prompts": builder.source(recipe.evaluate.prompts.get(prompts)),
        "reward": builder.reward(),
        "generation": asdict(recipe.generation),
    }
    positions = sorted({*(landscape.line or []), *(landscape.plane or [])})
    return [builder.unit("landscape", fields, *_reward(recipe), *map(_seed, positions))]


def evaluate_units(recipe: Recipe, run: str) -> list[Unit]:
    """Responses and scores of seed-0, the soup, every policy, and the other models of evaluate.models."""
    builder, options = _UnitBuilder(recipe, run), recipe.evaluate
    others = [model for model in options.models if model not in recipe.policies]
    references = [reference for model in others for reference in parse_reference("evaluate.models", model)]
    fields = {
        "model": builder.model(),
        "prompts": {name: builder.source(source) for name, source in options.prompts.items()},
        "models": [model if model in recipe.policies else None for model in options.models],
        "references": [builder.reference(reference) for reference in references],
        "temperature": options.temperature,
        "reward": builder.reward(),
        "seed": options.seed,
        "generation": asdict(recipe.generation),
    }
    policies = [policy_id(recipe, name) for name in recipe.policies]
    inputs = [_seed(0), "soup", *_of_references(references), *_reward(recipe), *policies]
    return [builder.unit("evaluate", fields, *inputs)]


def judge_units(recipe: Recipe, run: str) -> list[Unit]:
    """The judge's verdicts, if the recipe has a judge. Options that change only the speed are not in the key."""
    judge = recipe.evaluate.judge
    if judge is None:
        return []
    builder = _UnitBuilder(recipe, run)
    unused: dict[str, Any] = dict.fromkeys(("api_key_env", "concurrency", "timeout", "retries"))
    places: dict[str, Any] = {"function": builder.function, "local": builder.path}
    model = places[judge.kind](judge.model) if judge.kind in places else judge.model
    paths = {"prompts": builder.path(judge.prompts), "references": builder.path(judge.references)}
    fields: dict[str, Any] = {"judge": {**asdict(judge), **unused, **paths, "model": model}, **_comparisons(recipe)}
    if recipe.search is not None:
        fields["search"] = asdict(recipe.search)
    return [builder.unit("judge", fields, "evaluate", toy=False)]


POLICY_UNITS: dict[str, Callable[[Recipe, str], list[Unit]]] = {
    algorithm: functools.partial(policy_units, algorithm=algorithm) for algorithm in ("ppo", *ALGORITHMS)
}
"""Algorithm (and stage) → the units of its policies."""


def report_units(recipe: Recipe, run: str) -> list[Unit]:
    """The report, which reads the results of all stages before it."""
    before = [toy_units, sft_units, reward_units, soup_units]
    stages = [*before, *POLICY_UNITS.values(), landscape_units, evaluate_units, judge_units]
    search = None if recipe.search is None else asdict(recipe.search)
    fields = {"samples": recipe.evaluate.samples, **_comparisons(recipe), "search": search}
    inputs = (unit.id for units in stages for unit in units(recipe, ""))
    return [_UnitBuilder(recipe, run).unit("report", fields, *inputs, toy=False)]


def hub_units(recipe: Recipe, run: str) -> list[Unit]:
    """The push of the results that the `hub` section names, after the report."""
    if not recipe.hub.push:
        return []
    inputs = (unit_of(recipe, name)[1] for name in recipe.hub.push)
    return [_UnitBuilder(recipe, run).unit("hub", {"hub": asdict(recipe.hub)}, "report", *inputs, toy=False)]
