"""A recipe's units of work by stage: the inputs of each unit, and the fields of its cache key.

The key fields of a unit are the settings that its result depends on. All other settings can change without running the
unit again: `evaluate` is in no policy's key (except the prompts that ppo.eval_prompts names); `name`, `description` and
`threads` are in no key at all. For local files and folders, the key has the content and not the path. It also has the
versions of the libraries that the unit uses, and of no others.
"""

import functools
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

from salsa_peft.config import sweeps
from salsa_peft.config.fields import SEED
from salsa_peft.config.job import Unit, recipe_of_policy, unit_of
from salsa_peft.config.options.ppo import LATER_OPTIONS
from salsa_peft.config.options.soup import SoupSection
from salsa_peft.config.options.toy import TOY_PROMPTS
from salsa_peft.config.options.trl import ALGORITHMS, PREFERENCE_ALGORITHMS
from salsa_peft.config.paths import is_local
from salsa_peft.config.policies.search import SEED_0
from salsa_peft.config.references import Reference, parse_reference
from salsa_peft.config.rewards import find_module, split_function
from salsa_peft.config.schema import Recipe, Source
from salsa_peft.data.files import is_single_file
from salsa_peft.utils.fingerprints import tokenizer_files
from salsa_peft.utils.manifests import LIBRARIES

TEXT = ("tokenizers", "jinja2")
"""The libraries that tokenize texts and render chat templates."""
STAGE_LIBRARIES = {
    "toy": (*LIBRARIES, "tokenizers"),
    "synthetic": (*LIBRARIES, *TEXT),
    "data": ("transformers", "trl", "datasets", *TEXT),
    "ppo": (*LIBRARIES, *TEXT),
    **dict.fromkeys(ALGORITHMS, (*LIBRARIES, *TEXT, "datasets")),
    "reward_quality": (*LIBRARIES, *TEXT),
    "landscape": (*LIBRARIES, *TEXT),
    "evaluate": (*LIBRARIES, *TEXT),
}
"""Stage → libraries whose versions are in the keys of all its units; for other stages LIBRARIES."""
DEMONSTRATIONS, PREFERENCES = "data/demonstrations", "data/preferences"
"""Ids of the units that tokenize training data."""


class _UnitBuilder:
    """Builds a unit. The methods return key fields without local paths, which they collect in `files`."""

    def __init__(self, recipe: Recipe, run: str) -> None:
        self.recipe, self.run = recipe, run
        self.files: list[str] = []
        self.libraries: set[str] = set()

    def unit(self, stage: str, key_fields: dict[str, Any], *inputs: str, name: str = "", toy: bool = True) -> Unit:
        """Make the unit.

        name: given in stages with several units. toy: whether the unit reads the toy stage's result.
        """
        first = ["toy"] if toy and self.recipe.toy else []
        return Unit(
            stage=stage,
            name=name or stage,
            run=self.run,
            multi_unit=bool(name),
            inputs=tuple(dict.fromkeys([*first, *inputs])),
            key_fields=key_fields,
            files=tuple(self.files),
            libraries=tuple(sorted(self.libraries.union(STAGE_LIBRARIES.get(stage, LIBRARIES)))),
        )

    def path(self, value: str | None) -> str | None:
        """The key field of a path or Hub id: a Hub id with its revision in `revisions`, or "local" for a local path.

        A local path is added to `files`.
        """
        if value is None or not is_local(value):
            return value if value not in self.recipe.revisions else f"{value}@{self.recipe.revisions[value]}"
        self.files.append(value)
        return "local"

    def source(self, source: Source | None) -> dict[str, Any] | None:
        """The key field of a dataset."""
        if source is None:
            return None
        self.libraries |= set() if is_single_file(source) else {"datasets"}
        return {**asdict(source), "path": self.path(source.path)}

    def model(self) -> dict[str, Any]:
        """The key field of the base model."""
        model = self.recipe.model
        self.libraries |= {"bitsandbytes"} if model.quantization is not None else set()
        return {**asdict(model), "base": self.path(model.base), "chat_template": self.path(model.chat_template)}

    def tokenizer(self) -> dict[str, Any]:
        """The key field of the tokenizer and the chat template, without the base's weights."""
        model = self.recipe.model
        files = tokenizer_files(model.base) if model.base is not None and is_local(model.base) else None
        self.files += [] if files is None else map(str, files)
        return {
            "base": model.base if files is None else [file.name for file in files],
            "revision": model.revision,
            "chat_template": self.path(model.chat_template),
        }

    def reference(self, reference: Reference) -> dict[str, Any]:
        """The key field of a reference, without its label and the options that it does not use."""
        unused = {"sync_every", "mixup_alpha"} if reference.sync_every is None else set()
        unused |= {"norm_of"} if reference.norm_of is None else set()
        fields = {name: value for name, value in asdict(reference).items() if name not in unused}
        members = [self.member(member) for member in reference.members]
        return {**fields, "label": None, "members": members, "path": self.path(reference.path)}

    def member(self, name: str) -> int | str | None:
        """The key field of a model in a sum: a seed's position, the name of another model of the run, or a path."""
        seed = SEED.match(name)
        return int(seed[1]) if seed else self.path(name)

    def reward(self) -> list[dict[str, Any]]:
        """The key field of the reward: a list of the reward's parts."""
        value: dict[str, Callable[[str], Any]] = {"function": self.function}
        parts = self.recipe.reward.parts
        return [{**asdict(part), "value": value.get(part.kind, self.path)(part.value)} for part in parts]

    def function(self, value: str) -> list[str]:
        """The key field of a function: module and name. `files` gets the module, not modules that it imports."""
        folder, *named = split_function(value)
        file = find_module(folder, named[0])
        self.files += [] if file is None else [str(file)]
        return named

    def training(self, stage: str) -> dict[str, Any]:
        """The key field of the precision of full weights; empty for adapters, whose precision is fixed.

        Notes the libraries that training needs. `precision: auto` may need torchao, which depends on the GPU.
        """
        full, precision = self.recipe.adapter is None, self.recipe.precision
        paged = getattr(self.recipe, stage).optim.startswith("paged")
        used = {"bitsandbytes": paged, "torchao": full and precision != "master"}
        self.libraries |= {"accelerate", *(name for name, is_used in used.items() if is_used)}
        return {"precision": precision} if full else {}


def _section(section: Any, *left_out: str) -> dict[str, Any]:
    """The key field of a training section, without `save_steps`, on which no result depends, and `left_out`."""
    return {name: value for name, value in asdict(section).items() if name not in ("save_steps", *left_out)}


def _seed(position: int) -> str:
    return f"sft/seed-{position}"


def _reward(recipe: Recipe) -> list[str]:
    """List with the reward unit's id; empty if the recipe trains no reward model."""
    return ["reward"] if recipe.reward.trained else []


def _models(recipe: Recipe, names: Iterable[str]) -> list[str]:
    """Ids of the units that make the models called `names`; folders and Hub ids have none."""
    return [unit_of(recipe, name)[1] for name in names if "/" not in name]


def _of_references(recipe: Recipe, references: list[Reference]) -> list[str]:
    """Ids of the units whose results the references use."""
    return _models(recipe, (name for reference in references for name in reference.reads))


def _comparisons(recipe: Recipe) -> dict[str, Any]:
    return {"pairs": [list(pair) for pair in sweeps.compared_pairs(recipe)]}


def toy_units(recipe: Recipe, run: str) -> list[Unit]:
    """The unit that builds the toy base, tokenizer and data, if the recipe has `toy`."""
    return [_UnitBuilder(recipe, run).unit("toy", {"toy": asdict(recipe.toy)}, toy=False)] if recipe.toy else []


def synthetic_units(recipe: Recipe, run: str) -> list[Unit]:
    """The unit that samples the base's answers and judges them, if the recipe has `synthetic`."""
    section = recipe.synthetic
    if section is None:
        return []
    builder = _UnitBuilder(recipe, run)
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
        builder, source = _UnitBuilder(recipe, run), getattr(recipe.data, kind)
        fields = {"source": builder.source(source), "tokenizer": builder.tokenizer()}
        made = ["synthetic"] if source is None and recipe.synthetic is not None else []
        units.append(builder.unit("data", fields, *made, name=kind))
    return units


def sft_units(recipe: Recipe, run: str) -> list[Unit]:
    """One SFT unit for each seed."""
    units = []
    for position, seed in enumerate(recipe.sft.seeds):
        builder, existing = _UnitBuilder(recipe, run), recipe.sft.existing_seed(position)
        if existing is not None:
            fields: dict[str, Any] = {"model": builder.model(), "from": builder.path(existing)}
            units.append(builder.unit("sft", fields, name=f"seed-{position}"))
            continue
        fields = {
            "model": builder.model(),
            "adapter": asdict(recipe.adapter) if recipe.adapter else None,
            "sft": {**_section(recipe.sft, "from_"), "seeds": [seed]},
            **builder.training("sft"),
        }
        units.append(builder.unit("sft", fields, DEMONSTRATIONS, name=f"seed-{position}"))
    return units


def reward_units(recipe: Recipe, run: str) -> list[Unit]:
    """The unit that trains the reward model, starting from seed-0, if the recipe trains a reward model."""
    if not recipe.reward.trained:
        return []
    builder = _UnitBuilder(recipe, run)
    fields = {
        "model": builder.model(),
        "reward": _section(recipe.reward, "model", "quality_prompts", "quality_responses"),
        **builder.training("reward"),
    }
    return [builder.unit("reward", fields, PREFERENCES, _seed(0))]


def reward_quality_units(recipe: Recipe, run: str) -> list[Unit]:
    """The unit that measures the reward on seed-0's responses, if policies learn from the reward."""
    if not recipe.measures_reward:
        return []
    builder, section = _UnitBuilder(recipe, run), recipe.reward
    fields = {
        "model": builder.model(),
        "quality": {"prompts": section.quality_prompts, "responses": section.quality_responses},
        "ppo": {"seed": recipe.ppo.seed, "max_prompt_length": recipe.ppo.max_prompt_length},
        "prompts": builder.source(recipe.data.prompts),
        "generation": {**asdict(recipe.generation), "batch_size": None},
        "reward": builder.reward(),
    }
    return [builder.unit("reward_quality", fields, _seed(0), *_reward(recipe))]


def soup_units(recipe: Recipe, run: str) -> list[Unit]:
    """The unit of the recipe's section `soup`."""
    return [_soup(recipe, run, "soup", recipe.soup)]


def further_soup_units(recipe: Recipe, run: str) -> list[Unit]:
    """The units of the recipe's section `soups`."""
    return [_soup(recipe, run, "soups", section, name) for name, section in recipe.soups.items()]


def _soup(recipe: Recipe, run: str, stage: str, section: SoupSection, name: str = "") -> Unit:
    builder = _UnitBuilder(recipe, run)
    members = _models(recipe, section.names)
    paths = [builder.path(name) for name in section.names if "/" in name]
    fields: dict[str, Any] = {"members": members + paths, "weights": section.resolved_weights}
    if members and paths:  # the weights are in the members' order
        fields["order"] = [int("/" in name) for name in section.names]
    if section.strategy != "linear" or section.rank is not None:
        fields |= {"strategy": section.strategy, "rank": section.rank}
    defaults = {"per": "model", "start": "base", "scale": 1.0, "density": None, "drop_seed": None}
    given = {option: getattr(section, option) for option in defaults} | {"start": builder.path(section.start)}
    fields |= given if given != defaults else {}
    inputs = _models(recipe, section.reads)
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
    reward = _reward(recipe) if section.measure == "reward" else []
    return builder.unit(stage, fields, *reward, *inputs, name=name)


def policy_units(recipe: Recipe, run: str, *, algorithm: str) -> list[Unit]:
    """The units of the policies that an algorithm trains."""
    return [_policy(recipe, run, name) for name, policy in recipe.policies.items() if policy.algorithm == algorithm]


def _policy(recipe: Recipe, run: str, name: str) -> Unit:
    recipe, policy = recipe_of_policy(recipe, name), recipe.policies[name]
    builder = _UnitBuilder(recipe, run)
    algorithm, references = policy.algorithm, policy.references(f"policies.{name}")
    fields: dict[str, Any] = {
        "model": builder.model(),
        algorithm: _section(getattr(recipe, algorithm)),
        "references": [builder.reference(reference) for reference in references],
        "export": list(recipe.export),
        **builder.training(algorithm),
    }
    if policy.start != SEED_0:
        fields["start"] = builder.member(policy.start)
    inputs = [PREFERENCES] if algorithm in PREFERENCE_ALGORITHMS else _reward(recipe)
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
    start = _models(recipe, [policy.start])
    return builder.unit(algorithm, fields, *start, *inputs, *_of_references(recipe, references), name=name)


def landscape_units(recipe: Recipe, run: str) -> list[Unit]:
    """The unit that scores points on a line or plane of seeds, if `landscape` sets a line or plane."""
    landscape = recipe.landscape
    if landscape is None or (landscape.line is None and landscape.plane is None):
        return []
    builder = _UnitBuilder(recipe, run)
    prompts = landscape.prompts or next(iter(recipe.evaluate.prompts or TOY_PROMPTS))
    unused = () if landscape.norm_controls else ("norm_controls",)
    section = {name: value for name, value in asdict(landscape).items() if name not in unused}
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
    return [builder.unit("landscape", fields, *_reward(recipe), *_models(recipe, landscape.names))]


def evaluate_units(recipe: Recipe, run: str) -> list[Unit]:
    """The unit that evaluates seed-0, the soup, all policies, and evaluate.models: responses and scores."""
    builder, options = _UnitBuilder(recipe, run), recipe.evaluate
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
    models = _models(recipe, [*recipe.soups, *recipe.policies])
    inputs = [_seed(0), "soup", *_of_references(recipe, references), *_reward(recipe), *models]
    return [builder.unit("evaluate", fields, *inputs)]


def judge_units(recipe: Recipe, run: str) -> list[Unit]:
    """The judge's unit, if the recipe has a judge. Its key has only the options that affect verdicts."""
    judge = recipe.evaluate.judge
    if judge is None:
        return []
    builder = _UnitBuilder(recipe, run)
    builder.libraries |= {*TEXT} if judge.kind == "local" else set()
    unused: dict[str, Any] = dict.fromkeys(("api_key_env", "concurrency", "timeout", "retries"))
    places: dict[str, Any] = {"function": builder.function, "local": builder.path}
    model = places[judge.kind](judge.model) if judge.kind in places else judge.model
    paths = {"prompts": builder.path(judge.prompts), "references": builder.path(judge.references)}
    fields: dict[str, Any] = {"judge": {**asdict(judge), **unused, **paths, "model": model}, **_comparisons(recipe)}
    if recipe.search is not None:
        fields["search"] = asdict(recipe.search)
    inputs = ["evaluate", *(["reward_quality"] if recipe.judges_best_of_n else [])]
    return [builder.unit("judge", fields, *inputs, toy=False)]


POLICY_UNITS: dict[str, Callable[[Recipe, str], list[Unit]]] = {
    algorithm: functools.partial(policy_units, algorithm=algorithm) for algorithm in ("ppo", *ALGORITHMS)
}
"""Algorithm, which is also the name of its stage → function that returns the units of its policies."""


def report_units(recipe: Recipe, run: str) -> list[Unit]:
    """The unit of the report, which reads the results of all stages before it."""
    before = [toy_units, synthetic_units, data_units, sft_units, reward_units, reward_quality_units, soup_units]
    stages = [*before, *POLICY_UNITS.values(), further_soup_units, landscape_units, evaluate_units, judge_units]
    search = None if recipe.search is None else asdict(recipe.search)
    fields = {"samples": recipe.evaluate.samples, **_comparisons(recipe), "search": search}
    inputs = (unit.id for units in stages for unit in units(recipe, ""))
    return [_UnitBuilder(recipe, run).unit("report", fields, *inputs, toy=False)]


def hub_units(recipe: Recipe, run: str) -> list[Unit]:
    """The unit that pushes the results named in the `hub` section to the Hub, after the report."""
    if not recipe.hub.push:
        return []
    inputs = (unit_of(recipe, name)[1] for name in recipe.hub.push)
    return [_UnitBuilder(recipe, run).unit("hub", {"hub": asdict(recipe.hub)}, "report", *inputs, toy=False)]


def in_order(units: Iterable[Unit]) -> list[Unit]:
    """The units sorted so that each comes after its inputs; otherwise their order stays."""
    of = {unit.id: unit for unit in units}
    found: dict[str, Unit] = {}

    def add(unit: Unit) -> None:
        for name in unit.inputs:
            if name in of and name not in found:
                add(of[name])
        found[unit.id] = unit

    for unit in of.values():
        if unit.id not in found:
            add(unit)
    return list(found.values())
