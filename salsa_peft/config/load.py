"""Reading a recipe: settings from several sources, called layers, are merged and validated.

A later layer overrides an earlier one:

    defaults < recipe file < adapters/<preset>.yaml < the recipe's own `lora:` section < --set a.b=value

Each layer is checked for unknown keys separately. All mistakes are reported together, each in one line that names the
layer that set the key, and the key's line in its file. Imports no torch.
"""

import copy
import dataclasses
import functools
import json
import os
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from salsa_peft.config import paths, sweeps, validate
from salsa_peft.config.keys.problems import Layer, Problems
from salsa_peft.config.keys.unknown import split_unknown
from salsa_peft.config.paths import bundled_folder
from salsa_peft.config.policies.made import with_made
from salsa_peft.config.schema import Recipe, Source
from salsa_peft.config.yaml import parse_yaml, read_yaml
from salsa_peft.utils.errors import SalsaError, require, run_checks
from salsa_peft.utils.messages import IS_REQUIRED, did_you_mean, explain_validation_error, short

ATOMIC = {"reference", "controls"}
"""Keys whose value a later layer replaces as a whole: {soup: …} merged with {shrunk: …} would be no valid reference."""
NAMED = (("policies",), ("soups",), ("sweep",), ("evaluate", "prompts"), ("evaluate", "controls"), ("revisions",))
"""Keys of mappings from names to values. A null in a later layer removes the name from the mapping."""
SOURCE_KEYS = {field.name for field in dataclasses.fields(Source)}
RECIPE_TYPE = TypeAdapter(Recipe)


@dataclass(frozen=True)
class LoadedRecipe:
    """A validated recipe, with its file, its merged settings, and what --lora changed."""

    recipe: Recipe
    data: dict[str, Any]
    """Merged settings of all layers, with absolute paths and without defaults. Validating them gives `recipe`."""
    path: Path
    """The recipe file."""
    preset: str | None
    """Name of the adapter preset (--lora). None: no --lora."""
    changes: list[tuple[str, Any, Any]]
    """(key, old value or None, new value) of each setting that the preset or the recipe's `lora:` section changed."""
    reset_by_lora: frozenset[str] = frozenset()
    """Top-level keys that the recipe's `lora:` section sets, except those that `--set` changed afterwards."""


def bundled_names(kind: str) -> list[str]:
    """Names, without .yaml, of the bundled files of a kind: `recipes`, with those in recipes/studies, or `adapters`."""
    folder = bundled_folder(kind)
    found = [*folder.glob("*.yaml"), *folder.glob("studies/*.yaml")]
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in found)


def find_recipe(path_or_name: str) -> Path:
    """Path of a recipe file, from a path or a bundled name (.yaml optional). Raises SalsaError if missing."""
    path = os.path.abspath(os.path.expanduser(path_or_name)) if "\0" not in path_or_name else ""
    if os.path.isfile(path):
        return Path(path)
    stem = path_or_name.removesuffix(".yaml")
    if stem in bundled_names("recipes"):
        return bundled_folder("recipes") / f"{stem}.yaml"
    require(not os.path.isdir(path), f"{path_or_name}: is a folder; give a recipe file")
    raise SalsaError(
        f"{path_or_name}: no such recipe file; {did_you_mean(stem, bundled_names('recipes'), 'bundled recipes')}"
    )


def load_recipe(
    path_or_name: str, *, lora: str | None, overrides: list[str], more: Iterable[Callable[[Recipe], None]] = ()
) -> LoadedRecipe:
    """Read, merge and check a recipe. Raises a SalsaError with a line for each mistake, which names layer and key.

    First come all unknown keys and wrong values; without any, all settings that contradict others or this machine's files.
    lora: name of an adapter preset. overrides: the values of `--set`. more: further checks to run after
    validate.check; each raises a SalsaError that starts with the key.
    """
    path = find_recipe(path_or_name)
    written = read_yaml(str(path))
    section = written.pop("lora", None)
    require(
        section is None or isinstance(section, dict),
        f"{path.name}: lora: must be a mapping of settings, not {short(section)}",
    )
    problems = Problems()
    base = _layer(Layer(path.name, written, path), str(path.parent), problems)
    extra = _layer(Layer(path.name, section or {}, path, "lora"), str(path.parent), problems)
    middle = [_preset(lora, problems), extra] if lora is not None else []
    problems.layers = [base, *middle]
    before = copy.deepcopy(base.data)
    data = functools.reduce(merge, (layer.data for layer in middle), before)
    changes, reset = _changes(before, middle, data), set(section or ())
    for text in overrides:
        with problems.collecting(placed=True):
            data = _with_override(text, data, problems, reset)
    for layer in problems.layers:
        _check_layer(layer, problems)
    data = _with_seed_defaults(_without_nulls(data))
    recipe, data = _checked(data, problems, more)
    require(  # for example, the saved recipe of a QLoRA run with --lora lora
        lora not in ("lora", "qlora") or recipe.mode == lora,
        f"--lora {lora}: model.quantization is {recipe.model.quantization or 'null'}, as in a {recipe.mode} run; use"
        f" --lora {recipe.mode}, or remove model.quantization",
    )
    return LoadedRecipe(recipe, data, path, lora, changes, frozenset(reset))


def _checked(
    data: dict[str, Any], problems: Problems, more: Iterable[Callable[[Recipe], None]]
) -> tuple[Recipe, dict[str, Any]]:
    """The Recipe of merged settings, and the settings with sweeps and searches expanded.

    Raises SalsaError for the mistakes in `problems` and those found here.
    """
    with problems.collecting():
        data = sweeps.expand_search(with_made(sweeps.expand_sweeps(data)))
    recipe = _typed({key: value for key, value in data.items() if key != "sweep"}, problems)
    problems.report()
    assert recipe is not None
    with problems.collecting():
        run_checks(functools.partial(check, recipe) for check in (validate.check, *more))
    problems.report()
    return recipe, data


def _preset(name: str, problems: Problems) -> Layer:
    if name not in bundled_names("adapters"):
        raise SalsaError(f"--lora {name}: unknown preset; {did_you_mean(name, bundled_names('adapters'), 'presets')}")
    path = bundled_folder("adapters") / f"{name}.yaml"
    return _layer(Layer(f"adapters/{path.name}", read_yaml(str(path)), path), str(path.parent), problems)


def python_names(data: dict[str, Any]) -> dict[str, Any]:
    """Rename `sft.from` to the field's name `from_`: `from` is a keyword in Python."""
    sft = data.get("sft")
    if not isinstance(sft, dict) or "from" not in sft:
        return data
    return {**data, "sft": {("from_" if key == "from" else key): value for key, value in sft.items()}}


def _layer(layer: Layer, folder: str, problems: Problems) -> Layer:
    """The layer with absolute paths and without unknown keys, which are added to `problems`."""
    data, unknown = split_unknown(python_names(layer.data), Recipe)
    for key, advice in unknown.items():
        problems.add(key, f"unknown key; {advice}", layer)
        problems.misspelt.add(key.rpartition(".")[0])
    return replace(layer, data=paths.absolute_paths(data, folder))


def _with_override(text: str, data: dict[str, Any], problems: Problems, reset: set[str]) -> dict[str, Any]:
    """Settings with the value of one `--set`, whose layer is added. Unknown keys are added to `problems` and left out."""
    label = f"--set {text if len(text) <= 80 else text[:77] + '…'}"
    key, equals, value = text.partition("=")
    require(bool(equals), f"{label}: must be key=value, such as ppo.learning_rate=1e-6")
    keys = _split(key.strip(), data)
    keys = ["sft", "from_", *keys[2:]] if keys[:2] == ["sft", "from"] else keys
    require(len(keys) <= 8, f"{label}: a key has at most 8 parts, not {len(keys)}")
    require(all(keys), f"{label}: must be key=value with a key such as ppo.learning_rate")
    nested: Any = parse_yaml(value, label)
    if keys == ["reward"] and not isinstance(nested, dict):
        keys = ["reward", "model"]
    for name in reversed(keys):
        nested = {name: nested}
    known = len(problems)
    layer = _layer(Layer("--set", nested), os.getcwd(), problems)
    if len(problems) > known:
        return data
    reset.discard(keys[0])
    require(
        keys[0] != "adapter" or data.get("adapter") is not None,
        f"--set {text}: this run uses full weights, without an adapter; add --lora",
    )
    problems.layers.append(layer)
    return _place(data, keys, layer.data, text)


def _split(key: str, data: Any) -> list[str]:
    """The parts of a key. Names in `data` may contain dots (evaluate.prompts.arena_hard_v0.1.limit)."""
    parts, found = key.split("."), []
    while parts:
        known = [n for n in range(len(parts), 1, -1) if isinstance(data, dict) and ".".join(parts[:n]) in data]
        size = known[0] if known else 1
        found.append(".".join(parts[:size]))
        data = data.get(found[-1]) if isinstance(data, dict) else None
        parts = parts[size:]
    return found


def _place(data: dict[str, Any], keys: list[str], nested: Any, text: str) -> dict[str, Any]:
    data = copy.deepcopy(data)
    inner: Any = data
    for position, key in enumerate(keys[:-1]):
        nested = nested[key]
        current = inner.get(key)
        if isinstance(current, str) and paths.is_source(keys[: position + 1]):
            current = {"path": current}
        where = ".".join(keys[: position + 1])
        fits = current is None or isinstance(current, dict)
        require(fits, f"--set {text}: {where} is {short(current)}, which has no settings inside; set {where} itself")
        inner[key] = current if current is not None else {}
        inner = inner[key]
    inner[keys[-1]] = nested[keys[-1]]
    return data


def merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Merge `over` into a copy of `under`. Nested mappings are merged, and other values are replaced.

    If `under` has a value in place of a section (`sft: 3`), the value stays, so that the schema reports it.
    """
    result = dict(under)
    for key, value in over.items():
        current = result.get(key)
        if isinstance(value, dict) and isinstance(current, str) and set(value) <= SOURCE_KEYS:
            current = {"path": current}
        section = isinstance(value, dict) and key not in ATOMIC
        if section and not (current is None or isinstance(current, dict) or key == "judge"):  # a judge may be text
            continue
        merges = section and isinstance(current, dict)
        result[key] = merge(typing.cast(dict, current), value) if merges else copy.deepcopy(value)
    return result


def _without_nulls(data: dict[str, Any]) -> dict[str, Any]:
    data = copy.deepcopy(data)
    for keys in NAMED:
        named = _value(data, keys)
        for name in [name for name, value in named.items() if value is None] if isinstance(named, dict) else []:
            del named[name]
    return data


def _with_seed_defaults(data: dict[str, Any]) -> dict[str, Any]:
    """Add the defaults that depend on the seeds.

    With sft.from but without sft.seeds, the seeds are the positions in sft.from. With one seed, the soup has one member
    and the landscape has no line.
    """
    sft, soup, landscape = (data.get(key) for key in ("sft", "soup", "landscape"))
    if not isinstance(sft, dict):
        return data
    if isinstance(sft.get("from_"), list):
        sft = {"seeds": list(range(len(sft["from_"]))), **sft}
    data, seeds = {**data, "sft": sft}, sft.get("seeds")
    if isinstance(seeds, list) and len(seeds) == 1:
        if soup is None or isinstance(soup, dict):
            data["soup"] = {"members": [0], **(soup or {})}
        if "landscape" not in data or isinstance(landscape, dict):
            data["landscape"] = {"line": None, **(landscape or {})}
    return data


def saved_recipe(path: Path) -> Recipe:
    """The Recipe in a run's recipe.yaml. Files that the recipe names need not exist. Raises SalsaError."""
    problems = Problems()
    problems.layers = [Layer(str(path), {})]
    recipe = _typed(with_made(_without_nulls(python_names(read_yaml(str(path))))), problems)
    problems.report()
    assert recipe is not None
    return recipe


def _typed(data: dict[str, Any], problems: Problems) -> Recipe | None:
    """The Recipe of merged settings; None if a value has the wrong type, which is added to `problems`."""
    try:
        return RECIPE_TYPE.validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        for key, message in _type_errors(error).items():
            if message != IS_REQUIRED or key.rpartition(".")[0] not in problems.misspelt:
                problems.add(key, message)
        return None


def _check_layer(layer: Layer, problems: Problems) -> None:
    """Add the values of a layer that have the wrong type, also those that a later layer replaces."""
    data = {"name": "", **{key: value for key, value in _without_nulls(layer.data).items() if key != "sweep"}}
    try:
        RECIPE_TYPE.validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        for key, message in _type_errors(error).items():
            if message != IS_REQUIRED:  # another layer may have it
                problems.add(key, message, layer)


def _type_errors(error: ValidationError) -> dict[str, str]:
    """Key → what is wrong with its value, the first error of each key."""
    found: dict[str, str] = {}
    for problem in error.errors(include_url=False):
        key, message = explain_validation_error(dict(problem))
        found.setdefault(key.replace("sft.from_", "sft.from"), message)
    return found


def _changes(before: dict[str, Any], middle: list[Layer], after: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    defaults = dataclasses.asdict(Recipe(name=""))
    old, new = merge(defaults, before), merge(defaults, after)
    keys = dict.fromkeys(key for layer in middle for key in _leaves(layer.data, ()))
    pairs = [(".".join(key), _value(old, key), _value(new, key)) for key in keys]
    return [(key, was, now) for key, was, now in pairs if was != now]


def _leaves(value: Any, where: tuple[str, ...]) -> list[tuple[str, ...]]:
    if not isinstance(value, dict) or (where and not value) or where[-1:] == ("reference",):
        return [where]
    return [leaf for key, entry in value.items() for leaf in _leaves(entry, (*where, key))]


def _value(data: Any, key: tuple[str, ...]) -> Any:
    for part in key:
        data = data.get(part) if isinstance(data, dict) else None
    return data
