"""A recipe file, an adapter preset and `--set` → one validated Recipe, in layers; every refusal is one line.

    defaults < recipe file < adapters/<preset>.yaml < the recipe's own `lora:` section < --set a.b=value

Each layer is checked for unknown keys by itself, so a message names the layer that said it. Imports no torch.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import difflib
import functools
import json
import os
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from salsa_peft.config import paths, sweeps, validate
from salsa_peft.config import sweeps as search
from salsa_peft.config.paths import bundled
from salsa_peft.config.schema import Recipe, Source
from salsa_peft.config.yaml import parse_yaml, read_yaml
from salsa_peft.utils.errors import SalsaError, require
from salsa_peft.utils.messages import did_you_mean, explain_validation_error, short

PEFTS = (
    "alora_invocation_tokens", "alpha_pattern", "arrow_config", "bias", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out",
    "init_lora_weights", "kasa_config", "layer_replication", "layers_pattern", "layers_to_transform", "loftq_config", "lora_bias", "lora_ga_config",
    "megatron_config", "megatron_core", "modules_to_save", "monteclora_config", "qalora_group_size", "rank_pattern", "runtime_config", "target_parameters", "task_type",
    "trainable_token_indices", "use_bdlora", "use_dora", "use_qalora", "velora_config",
)  # fmt: skip
"""Fields of PEFT's LoraConfig that a recipe does not take; tests hold them against PEFT's."""
ATOMIC = {"reference"}  # replaced whole by a later layer: {soup: …} and {shrunk: …} don't merge
NAMED = (("policies",), ("sweep",), ("evaluate", "prompts"))  # of names: a later layer's null takes an entry out


@dataclass(frozen=True)
class Layer:
    """Departures, and where they come from: the start of an error message."""

    label: str
    data: dict[str, Any]


@dataclass(frozen=True)
class Loaded:
    """A recipe as it will run, and how it came about."""

    recipe: Recipe
    data: dict[str, Any]
    """The departures of all layers merged, paths made absolute; validating it gives `recipe`."""
    path: Path
    preset: str | None
    changes: list[tuple[str, Any, Any]]
    """(key, before, after) of what the preset and the recipe's `lora:` section changed; before is None where nothing was."""
    taken_back: frozenset[str] = frozenset()
    """Keys that the recipe's `lora:` section sets, and no `--set` after it."""

    @property
    def folder(self) -> Path:
        """The recipe file's."""
        return self.path.parent


def names(kind: str) -> list[str]:
    """What bundled(kind) offers, without .yaml."""
    return sorted(path.stem for path in bundled(kind).glob("*.yaml"))


def find_recipe(path_or_name: str) -> Path:
    """A file's path, or a bundled recipe's name with or without .yaml → the file. Raises SalsaError with the nearest name."""
    path = os.path.abspath(os.path.expanduser(path_or_name)) if "\0" not in path_or_name else ""
    if os.path.isfile(path):
        return Path(path)
    stem = path_or_name.removesuffix(".yaml")
    if stem in names("recipes"):
        return bundled("recipes") / f"{stem}.yaml"
    require(not os.path.isdir(path), f"{path_or_name}: found a folder, expected a recipe file")
    raise SalsaError(f"{path_or_name}: no such recipe file; {did_you_mean(stem, names('recipes'), 'bundled recipes')}")


def load_recipe(
    path_or_name: str, *, lora: str | None, overrides: list[str], more: Iterable[Callable[[Recipe], None]] = ()
) -> Loaded:
    """Read, merge and check a recipe.

    lora: a preset's name. more: further checks, each of which raises SalsaError `key: …`, as validate.check does; they run after it, and the
    layer that set the key is named in front. Raises SalsaError, one line, before anything is written.
    """
    path = find_recipe(path_or_name)
    written = read_yaml(str(path))
    section = written.pop("lora", None)
    require(section is None or isinstance(section, dict), f"{path.name}: lora: found {section!r}, expected departures")
    base = _layer(path.name, written, str(path.parent))
    extra = _layer(f"{path.name}: lora", section or {}, str(path.parent))
    middle = [_preset(lora), extra] if lora is not None else []
    layers = [base, *middle]
    before = copy.deepcopy(base.data)
    data = before
    for layer in middle:
        data = merge(data, layer.data)
    changes, back = _changes(before, middle, data), set(section or ())
    for text in overrides:
        layer, keys = _override(text, data)
        back.discard(keys[0])
        require(
            keys[0] != "adapter" or data.get("adapter") is not None,
            f"--set {text}: found full weights, which have no adapter, expected a recipe with adapters; add --lora",
        )
        layers.append(layer)
        data = _place(data, keys, layer.data, text)
    data = _of_one_seed(_numbered(_without_nulls(data)))
    with _placed(layers, path.name):
        data = search.expand_search(sweeps.expand(data))
    recipe = _validated(data, layers, path.name, more)
    require(  # such as a QLoRA run's saved recipe under --lora lora
        lora not in ("lora", "qlora") or recipe.mode == lora,
        f"--lora {lora}: found model.quantization {recipe.model.quantization or 'none'}, expected"
        f" {'none' if lora == 'lora' else '4 bits'}; take --lora {recipe.mode}, or leave the key to the preset",
    )
    return Loaded(recipe, data, path, lora, changes, frozenset(back))


def _preset(name: str) -> Layer:
    if name not in names("adapters"):
        raise SalsaError(f"--lora {name}: unknown preset; {did_you_mean(name, names('adapters'), 'presets')}")
    path = bundled("adapters") / f"{name}.yaml"
    return _layer(f"adapters/{path.name}", read_yaml(str(path)), str(path.parent))


def python_names(data: dict[str, Any]) -> dict[str, Any]:
    """`sft.from` under the name that its field has, since Python keeps the word for itself."""
    sft = data.get("sft")
    if not isinstance(sft, dict) or "from" not in sft:
        return data
    return {**data, "sft": {("from_" if key == "from" else key): value for key, value in sft.items()}}


def _layer(label: str, data: dict[str, Any], folder: str) -> Layer:
    data = python_names(data)
    check_keys(label, "", data, Recipe)
    return Layer(label, _absolute(data, folder))


def _absolute(data: dict[str, Any], folder: str) -> dict[str, Any]:
    """Local paths made absolute, in a sweep's `reference:` as in a policy's."""
    data = paths.absolute(data, folder)
    if "sweep" in data:
        data["sweep"] = paths.absolute({"policies": data["sweep"]}, folder)["policies"]
    return data


def _override(text: str, data: dict[str, Any]) -> tuple[Layer, list[str]]:
    label = f"--set {text if len(text) <= 80 else text[:77] + '…'}"
    key, equals, value = text.partition("=")
    require(bool(equals), f"{label}: expected key=value, such as ppo.learning_rate=1e-6")
    keys = _split(key.strip(), data)
    keys = ["sft", "from_", *keys[2:]] if keys[:2] == ["sft", "from"] else keys
    require(len(keys) <= 8, f"{label}: found a key of {len(keys)} parts, expected fewer")
    require(all(keys), f"{label}: expected key=value with a key such as ppo.learning_rate")
    nested: Any = parse_yaml(value, label)
    if keys == ["reward"] and not isinstance(nested, dict):
        keys = ["reward", "model"]
    for name in reversed(keys):
        nested = {name: nested}
    nested = python_names(nested)
    check_keys("--set", "", nested, Recipe)
    return Layer("--set", _absolute(nested, os.getcwd())), keys


def _split(key: str, data: Any) -> list[str]:
    """The key's names; one that is there already may hold dots (evaluate.prompts.arena_hard_v0.1.limit)."""
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
        there = inner.get(key)
        if isinstance(there, str) and paths.is_source(keys[: position + 1]):
            there = {"path": there}
        where = ".".join(keys[: position + 1])
        fits = there is None or isinstance(there, dict)
        require(fits, f"--set {text}: {where} is {short(there)}, nothing can be set inside it; set {where} whole")
        inner[key] = there if there is not None else {}
        inner = inner[key]
    inner[keys[-1]] = nested[keys[-1]]
    return data


def merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` laid on `under`: mappings merge, everything else is replaced; neither is changed. What stands where a section should
    (`sft: 3`) stays, for the schema to refuse."""
    result = dict(under)
    for key, value in over.items():
        there = result.get(key)
        if (
            isinstance(value, dict)
            and isinstance(there, str)
            and set(value) <= {f.name for f in dataclasses.fields(Source)}
        ):
            there = {"path": there}
        section = isinstance(value, dict) and key not in ATOMIC
        if section and there is not None and not isinstance(there, dict) and key != "judge":  # whose text is its kind
            continue
        merges = section and isinstance(there, dict)
        result[key] = merge(typing.cast(dict, there), value) if merges else copy.deepcopy(value)
    return result


def _without_nulls(data: dict[str, Any]) -> dict[str, Any]:
    data = copy.deepcopy(data)
    for keys in NAMED:
        inner: Any = data
        for key in keys:
            inner = inner.get(key) if isinstance(inner, dict) else None
        for name in [name for name, value in (inner or {}).items() if value is None] if isinstance(inner, dict) else []:
            del inner[name]
    return data


def _numbered(data: dict[str, Any]) -> dict[str, Any]:
    """Seeds that are taken from somewhere, and have no numbers of their own, numbered by position."""
    sft = data.get("sft")
    if not isinstance(sft, dict) or not isinstance(sft.get("from_"), list) or "seeds" in sft:
        return data
    return {**data, "sft": {**sft, "seeds": list(range(len(sft["from_"])))}}


def _of_one_seed(data: dict[str, Any]) -> dict[str, Any]:
    """With one seed the soup has one member and there is no line between two, unless the recipe says something else."""
    sft, soup, landscape = (data.get(key) for key in ("sft", "soup", "landscape"))
    seeds = sft.get("seeds") if isinstance(sft, dict) else None
    if not isinstance(seeds, list) or len(seeds) != 1:
        return data
    data = {**data}
    if soup is None or isinstance(soup, dict):
        data["soup"] = {"members": [0], **(soup or {})}
    if "landscape" not in data or isinstance(landscape, dict):
        data["landscape"] = {"line": None, **(landscape or {})}
    return data


def check_keys(label: str, where: str, value: Any, hint: Any) -> None:
    """Raise SalsaError for the first key of `value` that the dataclasses of `hint` don't have, naming the nearest."""
    while typing.get_origin(hint) is typing.Annotated:
        hint = typing.get_args(hint)[0]
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        for option in typing.get_args(hint):
            check_keys(label, where, value, option)
    elif isinstance(value, dict) and typing.get_origin(hint) is dict:
        for key, entry in value.items():
            check_keys(label, _join(where, key), entry, typing.get_args(hint)[1])
    elif isinstance(value, dict) and dataclasses.is_dataclass(hint):
        hints = _hints(typing.cast(Any, hint))
        known = [field.name for field in dataclasses.fields(hint)]
        for key, entry in value.items():
            if key not in known:
                raise SalsaError(f"{label}: {_join(where, key)}: unknown key; {_hint(where, key, known)}")
            check_keys(label, _join(where, key), entry, hints[key])


def _hint(where: str, key: str, known: list[str]) -> str:
    """What to do about an unknown key: the nearest; the section that has it; of `adapter` that PEFT has more keys than a recipe."""
    if where == "adapter" and key in (*PEFTS, "lora"):
        inside = " itself, not under `lora`" if key == "lora" else ""
        return f"of PEFT's LoraConfig a recipe takes {', '.join(known)}, in `adapter`{inside}"
    names = [name.rstrip("_") for name in known]
    sections = [] if where else [n for n, hint in _hints(Recipe).items() if key in _fields_of(hint)]
    if key in PEFTS or not sections or difflib.get_close_matches(key, names, n=1, cutoff=0.6):
        return did_you_mean(key, names)
    return f"did you mean {' or '.join(f'{name}.{key}' for name in sections)}?"


def _fields_of(hint: Any) -> list[str]:
    """The fields of a section's dataclass, of Section | None too."""
    options = [hint, *typing.get_args(hint)]
    return [field.name for one in options if dataclasses.is_dataclass(one) for field in dataclasses.fields(one)]


@functools.cache
def _hints(section: Any) -> dict[str, Any]:
    """A dataclass's field → its type; Python compiles them anew each time it is asked, which a recipe of thousands of policies can't wait for."""
    return typing.get_type_hints(section, include_extras=True)


def _join(where: str, key: str) -> str:
    key = key if key.isprintable() and len(key) <= 80 else short(key)
    return f"{where}.{key}" if where else key


def saved_recipe(path: Path) -> Recipe:
    """A run's recipe.yaml as it ran: what it names need not be there any more. Raises SalsaError."""
    return _typed(_without_nulls(python_names(read_yaml(str(path)))), [], str(path))


def _validated(
    data: dict[str, Any], layers: list[Layer], file: str, more: Iterable[Callable[[Recipe], None]]
) -> Recipe:
    recipe = _typed(data, layers, file)
    with _placed(layers, file):
        for check in (validate.check, *more):
            check(recipe)
    return recipe


def _typed(data: dict[str, Any], layers: list[Layer], file: str) -> Recipe:
    try:
        recipe: Recipe = ADAPTER.validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key, message = explain_validation_error(dict(first))
        key = key.replace("sft.from_", "sft.from")
        more = len({explain_validation_error(dict(entry))[0] for entry in error.errors(include_url=False)}) - 1
        rest = f" (and {more} more)" if more else ""
        raise SalsaError(f"{_origin(key, layers, file)}: {key}: {message}{rest}") from error
    return recipe


@contextlib.contextmanager
def _placed(layers: list[Layer], file: str) -> Iterator[None]:
    """An error `key: …` gets the layer that said the key in front."""
    try:
        yield
    except SalsaError as error:
        key = str(error).partition(":")[0]
        raise SalsaError(f"{_origin(key, layers, file)}: {error}") from error


def _origin(key: str, layers: list[Layer], file: str) -> str:
    """The label of the last layer that says most of `key`."""
    label, depth = file, 0
    for layer in layers:
        inner: Any = layer.data
        said = 0
        for part in key.replace("sft.from", "sft.from_").split("[")[0].split("."):
            if not isinstance(inner, dict) or part not in inner:
                break
            inner, said = inner[part], said + 1
        if said and said >= depth:
            label, depth = layer.label, said
    return label


def _changes(before: dict[str, Any], middle: list[Layer], after: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    keys = dict.fromkeys(key for layer in middle for key in _leaves(layer.data, ()))
    pairs = [(".".join(key), _lookup(key, before), _lookup(key, after)) for key in keys]
    return [(key, old, new) for key, old, new in pairs if old != new]


def _leaves(value: Any, where: tuple[str, ...]) -> list[tuple[str, ...]]:
    if not isinstance(value, dict) or (where and not value) or where[-1:] == ("reference",):
        return [where]
    return [leaf for key, entry in value.items() for leaf in _leaves(entry, (*where, key))]


def _lookup(key: tuple[str, ...], data: Any) -> Any:
    """The value at a key of the departures, or the schema's default, or None."""
    hint: Any = Recipe
    for part in key:
        fields = {field.name: field for field in dataclasses.fields(hint)} if dataclasses.is_dataclass(hint) else {}
        default = None
        if part in fields:
            factory = fields[part].default_factory
            default = fields[part].default if factory is dataclasses.MISSING else factory()
        hint = _hints(hint).get(part) if fields else None
        data = data.get(part, default) if isinstance(data, dict) else getattr(data, part, default)
        data = None if data is dataclasses.MISSING else data
    return data


ADAPTER = TypeAdapter(Recipe)
