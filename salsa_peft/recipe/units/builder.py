"""What makes a unit: its key fields, the files and libraries of its key, and the ids of its inputs."""

from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

from salsa_peft.config import sweeps
from salsa_peft.config.fields import SEED
from salsa_peft.config.job import Unit, unit_of
from salsa_peft.config.options.trl import ALGORITHMS
from salsa_peft.config.paths import is_local
from salsa_peft.config.references import Reference
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


class UnitBuilder:
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


def section_fields(section: Any, *left_out: str) -> dict[str, Any]:
    """The key field of a training section, without `save_steps`, on which no result depends, and `left_out`."""
    return {name: value for name, value in asdict(section).items() if name not in ("save_steps", *left_out)}


def seed_id(position: int) -> str:
    return f"sft/seed-{position}"


def reward_ids(recipe: Recipe) -> list[str]:
    """List with the reward unit's id; empty if the recipe trains no reward model."""
    return ["reward"] if recipe.reward.trained else []


def model_ids(recipe: Recipe, names: Iterable[str]) -> list[str]:
    """Ids of the units that make the models called `names`; folders and Hub ids have none."""
    return [unit_of(recipe, name)[1] for name in names if "/" not in name]


def reference_ids(recipe: Recipe, references: list[Reference]) -> list[str]:
    """Ids of the units whose results the references use."""
    return model_ids(recipe, (name for reference in references for name in reference.reads))


def comparison_fields(recipe: Recipe) -> dict[str, Any]:
    return {"pairs": [list(pair) for pair in sweeps.compared_pairs(recipe)]}
