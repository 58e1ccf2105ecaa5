"""Recipe → units of work: for each stage, which pieces there are, what each reads and which part of the recipe it depends on.

A slice is minimal: what is not in it can change without the work being done again. So `evaluate` is in no policy's slice,
and `name`, `description` and `threads` are in none. Local paths don't count, the content of what is there does.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from salsa_peft.config import sweeps
from salsa_peft.config.job import Unit, policy_id, unit_of
from salsa_peft.config.options.trl import ALGORITHMS, PREFERENCE_ALGORITHMS
from salsa_peft.config.paths import is_local
from salsa_peft.config.references import Reference, parse_reference
from salsa_peft.config.rewards import RewardPart, find_module, split_function
from salsa_peft.config.schema import Evaluate, Landscape, Recipe, Source
from salsa_peft.config.validate import TOY_PROMPTS


class _Files:
    """Collects local paths while a slice is written, which keeps a mark in their place."""

    def __init__(self) -> None:
        self.paths: list[str] = []

    def path(self, value: str | None) -> str | None:
        """The value, or "local" for a path, which is then among `paths`."""
        if value is None or not is_local(value):
            return value
        self.paths.append(value)
        return "local"

    def source(self, source: Source | None) -> dict[str, Any] | None:
        """A dataset's slice."""
        return None if source is None else {**dataclasses.asdict(source), "path": self.path(source.path)}

    def model(self, recipe: Recipe) -> dict[str, Any]:
        """The base's slice."""
        model = recipe.model
        paths = {"base": self.path(model.base), "chat_template": self.path(model.chat_template)}
        return {**dataclasses.asdict(model), **paths}

    def reference(self, reference: Reference) -> dict[str, Any]:
        """A reference's slice; its label is for people, and what moves none says nothing."""
        moving = ("sync_every", "mixup_alpha") if reference.sync_every is None else ()
        found = {name: value for name, value in dataclasses.asdict(reference).items() if name not in moving}
        return {**found, "label": None, "path": self.path(reference.path)}

    def reward(self, recipe: Recipe) -> list[dict[str, Any]]:
        """The reward's slice: its parts. A function counts by its module's file, not by what that imports."""
        return [self._part(part) for part in recipe.reward.parts]

    def function(self, value: str) -> list[str]:
        """A function's slice: its module and name; the module's file counts by its content."""
        folder, *named = split_function(value)
        file = find_module(folder, named[0])
        self.paths += [] if file is None else [str(file)]
        return named

    def _part(self, part: RewardPart) -> dict[str, Any]:
        value = self.function(part.value) if part.kind == "function" else self.path(part.value)
        return {"kind": part.kind, "value": value, "weight": part.weight, "name": part.name}


def _seed(position: int) -> str:
    return f"sft/seed-{position}"


def _inputs(recipe: Recipe, *ids: str) -> tuple[str, ...]:
    """The ids, each once, after the embedded world where there is one."""
    return tuple(dict.fromkeys([*(["toy"] if recipe.toy else []), *ids]))


def _of_references(references: list[Reference]) -> list[str]:
    """The units that references are made of."""
    soup = ["soup"] if any(reference.soup for reference in references) else []
    return [_seed(member) for reference in references for member in reference.members] + soup


def _precision(recipe: Recipe) -> dict[str, Any]:
    """Of a stage that trains full weights; adapters have one precision."""
    return {"precision": recipe.precision} if recipe.adapter is None else {}


def toy_units(recipe: Recipe, run: str) -> list[Unit]:
    """The embedded world: base, tokenizer and data."""
    return (
        [Unit(stage="toy", name="toy", run=run, key_fields={"toy": dataclasses.asdict(recipe.toy)})]
        if recipe.toy
        else []
    )


def sft_units(recipe: Recipe, run: str) -> list[Unit]:
    """One fine-tuning per seed."""
    units = []
    for position, seed in enumerate(recipe.sft.seeds):
        files, taken = _Files(), recipe.sft.existing_seed(position)
        section = {name: value for name, value in dataclasses.asdict(recipe.sft).items() if name != "from_"}
        parts: dict[str, Any] = {
            "model": files.model(recipe),
            "adapter": dataclasses.asdict(recipe.adapter) if recipe.adapter else None,
            "demonstrations": files.source(recipe.data.demonstrations),
            "sft": {**section, "seeds": [seed]},
            **_precision(recipe),
        }
        if taken is not None:
            parts = {"model": parts["model"], "from": files.path(taken)}
        units.append(
            Unit(
                stage="sft",
                name=f"seed-{position}",
                run=run,
                multi_unit=True,
                inputs=_inputs(recipe),
                key_fields=parts,
                files=tuple(files.paths),
            )
        )
    return units


def _reward(recipe: Recipe) -> list[str]:
    """The reward stage, where there is one."""
    return ["reward"] if recipe.reward.trained else []


def reward_units(recipe: Recipe, run: str) -> list[Unit]:
    """The reward model, where the recipe's reward has an adapter; it starts from seed-0."""
    if not recipe.reward.trained:
        return []
    files = _Files()
    parts = {
        "model": files.model(recipe),
        "preferences": files.source(recipe.data.preferences),
        "reward": {name: value for name, value in dataclasses.asdict(recipe.reward).items() if name != "model"},
        **_precision(recipe),
    }
    inputs = _inputs(recipe, _seed(0))
    return [Unit(stage="reward", name="reward", run=run, inputs=inputs, key_fields=parts, files=tuple(files.paths))]


def soup_units(recipe: Recipe, run: str) -> list[Unit]:
    """The recipe's soup; the members are inputs."""
    section, files = recipe.soup, _Files()
    members = tuple(_seed(member) for member in section.members)
    parts: dict[str, Any] = {"members": list(members), "weights": section.resolved_weights}
    if section.strategy != "linear" or section.rank is not None:
        parts |= {"strategy": section.strategy, "rank": section.rank}
    if not section.uses_measure:
        base = (
            {} if recipe.adapter is not None else {"model": files.model(recipe)}
        )  # of checkpoints: where deltas begin
        inputs = members if recipe.adapter is not None else _inputs(recipe, *members)
        return [
            Unit(stage="soup", name="soup", run=run, inputs=inputs, key_fields=parts | base, files=tuple(files.paths))
        ]
    parts |= {
        "measure": files.function(section.measure) if ":" in section.measure else section.measure,
        "settings": [section.limit, section.steps, section.step_size],
        "model": files.model(recipe),
        "data": files.source(getattr(recipe.data, section.measure_source)) if section.measure_source else None,
    }
    if section.measure == "reward":
        parts |= {"reward": files.reward(recipe), "generation": dataclasses.asdict(recipe.generation)}
    inputs = _inputs(recipe, *(_reward(recipe) if section.measure == "reward" else []), *members)
    return [Unit(stage="soup", name="soup", run=run, inputs=inputs, key_fields=parts, files=tuple(files.paths))]


def policy_units(recipe: Recipe, run: str, *, algorithm: str) -> list[Unit]:
    """One training per policy of an algorithm; it starts at seed-0."""
    return [_policy(recipe, run, name) for name, policy in recipe.policies.items() if policy.algorithm == algorithm]


def _policy(recipe: Recipe, run: str, name: str) -> Unit:
    files, policy = _Files(), recipe.policies[name]
    algorithm, references = policy.algorithm, policy.references(f"policies.{name}")
    section = getattr(recipe, algorithm)
    beta = section.kl_coef if policy.kl_coef is None else policy.kl_coef
    parts: dict[str, Any] = {
        "model": files.model(recipe),
        algorithm: {**dataclasses.asdict(section), "kl_coef": beta},
        "references": [files.reference(reference) for reference in references],
        "export": list(recipe.export),
        **_precision(recipe),
    }
    if algorithm in PREFERENCE_ALGORITHMS:
        parts["preferences"] = files.source(recipe.data.preferences)
    else:
        parts |= {
            "prompts": files.source(recipe.data.prompts),
            "generation": {**dataclasses.asdict(recipe.generation), "batch_size": None},
            "reward": files.reward(recipe),
        }
    if algorithm == "ppo":
        parts["ppo"] |= {"save_steps": None, "shown_every": None}  # what the result does not depend on
        parts["eval_prompts"] = files.source(recipe.evaluate.prompts.get(recipe.ppo.eval_prompts or ""))
    rewards = [] if algorithm in PREFERENCE_ALGORITHMS else _reward(recipe)
    inputs = _inputs(recipe, _seed(0), *rewards, *_of_references(references))
    return Unit(
        stage=algorithm, name=name, run=run, multi_unit=True, inputs=inputs, key_fields=parts, files=tuple(files.paths)
    )


def landscape_units(recipe: Recipe, run: str) -> list[Unit]:
    """Scores along the line and on the plane of seeds, where the recipe asks for one."""
    landscape = recipe.landscape
    if landscape is None or (landscape.line is None and landscape.plane is None):
        return []
    files = _Files()
    chosen = landscape_prompts(recipe, landscape)
    source = recipe.evaluate.prompts.get(chosen)
    parts = {
        "model": files.model(recipe),
        "landscape": {**dataclasses.asdict(landscape), "prompts": chosen},
        "temperature": recipe.evaluate.temperature,
        "prompts": files.source(source),
        "reward": files.reward(recipe),
        "generation": dataclasses.asdict(recipe.generation),
    }
    positions = sorted({*(landscape.line or []), *(landscape.plane or [])})
    inputs = _inputs(recipe, *_reward(recipe), *map(_seed, positions))
    return [
        Unit(stage="landscape", name="landscape", run=run, inputs=inputs, key_fields=parts, files=tuple(files.paths))
    ]


def landscape_prompts(recipe: Recipe, landscape: Landscape) -> str:
    """Which of the evaluation's prompts the landscape uses: the one it names, or the first."""
    return landscape.prompts or next(iter(recipe.evaluate.prompts), TOY_PROMPTS[0])


def evaluate_units(recipe: Recipe, run: str) -> list[Unit]:
    """Responses and scores of seed-0, soup, every policy and what evaluate.models adds."""
    files = _Files()
    options: Evaluate = recipe.evaluate
    others = [model for model in options.models if model not in recipe.policies]
    references = [reference for model in others for reference in parse_reference("evaluate.models", model)]
    parts = {
        "model": files.model(recipe),
        "prompts": {name: files.source(source) for name, source in options.prompts.items()},
        "models": [model if model in recipe.policies else None for model in options.models],
        "references": [files.reference(reference) for reference in references],
        "temperature": options.temperature,
        "reward": files.reward(recipe),
        "seed": options.seed,
        "generation": dataclasses.asdict(recipe.generation),
    }
    policies = [policy_id(recipe, name) for name in recipe.policies]
    inputs = _inputs(recipe, _seed(0), "soup", *_of_references(references), *_reward(recipe), *policies)
    return [Unit(stage="evaluate", name="evaluate", run=run, inputs=inputs, key_fields=parts, files=tuple(files.paths))]


def judge_units(recipe: Recipe, run: str) -> list[Unit]:
    """The judge's verdicts on the answers, where the recipe has a judge; how fast it is asked counts for nothing."""
    judge = recipe.evaluate.judge
    if judge is None:
        return []
    files = _Files()
    idle: dict[str, Any] = dict.fromkeys(("api_key_env", "concurrency", "timeout", "retries"))
    place: dict[str, Any] = {"function": files.function, "local": files.path}
    model = place[judge.kind](judge.model) if judge.kind in place else judge.model
    told: dict[str, Any] = {
        "prompts": files.path(judge.prompts),
        "references": files.path(judge.references),
        "model": model,
    }
    parts: dict[str, Any] = {
        "judge": {**dataclasses.asdict(judge), **idle, **told},
        "pairs": [list(pair) for pair in sweeps.compared_pairs(recipe)],
        **({} if recipe.search is None else {"search": dataclasses.asdict(recipe.search)}),
    }
    return [
        Unit(stage="judge", name="judge", run=run, inputs=("evaluate",), key_fields=parts, files=tuple(files.paths))
    ]


def hub_units(recipe: Recipe, run: str) -> list[Unit]:
    """Pushing what the `hub` section names, after the report; what it is called and where it goes counts."""
    if not recipe.hub.push:
        return []
    inputs = tuple(unit_of(recipe, name)[1] for name in recipe.hub.push)
    return [
        Unit(
            stage="hub",
            name="hub",
            run=run,
            inputs=("report", *inputs),
            key_fields={"hub": dataclasses.asdict(recipe.hub)},
        )
    ]


POLICY_UNITS: dict[str, Callable[[Recipe, str], list[Unit]]] = {
    algorithm: functools.partial(policy_units, algorithm=algorithm) for algorithm in ("ppo", *ALGORITHMS)
}
"""Algorithm, which is a stage's name too → its policies."""


def report_units(recipe: Recipe, run: str) -> list[Unit]:
    """The report of everything."""
    units = [
        toy_units,
        sft_units,
        reward_units,
        soup_units,
        *POLICY_UNITS.values(),
        landscape_units,
        evaluate_units,
        judge_units,
    ]
    inputs = tuple(unit.id for make in units for unit in make(recipe, ""))
    search_section = None if recipe.search is None else dataclasses.asdict(recipe.search)
    parts = {
        "samples": recipe.evaluate.samples,
        "pairs": [list(pair) for pair in sweeps.compared_pairs(recipe)],
        "search": search_section,
    }
    return [Unit(stage="report", name="report", run=run, inputs=inputs, key_fields=parts)]
