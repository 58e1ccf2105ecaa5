"""Descriptions of the recipe's keys, read from the classes of its sections: their fields, types, defaults and docstrings.

A field's docstring may end with `Unit: …`, `Source: …` and `Example: …`. Without `Unit`, the unit is read from the words
"number of" or "fraction of"; without `Example`, the example comes from a bundled recipe, or else is the default.
"""

import ast
import dataclasses
import difflib
import functools
import inspect
import itertools
import re
import types
import typing
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal

import yaml

from salsa_peft.config.fields import field_types
from salsa_peft.config.load import bundled_names
from salsa_peft.config.options.guards import DEFAULTS
from salsa_peft.config.options.rollout import BACKEND_OPTIONS
from salsa_peft.config.paths import bundled_folder
from salsa_peft.config.schema import Recipe, Source
from salsa_peft.config.sweeps import SWEEPS
from salsa_peft.config.yaml import read_yaml

TAG = re.compile(r"(?:^|(?<=[.\s]))(Unit|Source|Example): ")
COUNTED = re.compile(
    r"[Nn]umber of ((?:(?!of\b|in\b|to\b|that\b|which\b|per\b|on\b|between\b|whose\b|with\b|is\b|are\b|for\b|along\b|at\b|into\b|generated\b|before\b|drawn\b)[\w'’-]+ ?)+)"
)
NAME = "NAME"
"""Part of a key that stands for any name, such as that of a policy."""


@dataclasses.dataclass(frozen=True)
class Key:
    """One key of a recipe, described."""

    name: str
    """Parts joined by dots, such as ppo.kl_coef; NAME stands for any name."""
    type: str
    """Accepted values, in words."""
    default: str
    """The default as YAML; "required" without one; empty for a section."""
    text: str
    """What the key sets: the docstring without its tags."""
    numeric: bool
    """Whether a value is a number, which may have a unit."""
    unit: str
    """Unit of the number; empty if it has none."""
    source: str
    """Where name or default come from; empty if they are this project's."""
    example: Any
    """A value that is accepted; None for a section."""
    is_section: bool
    """Whether the key has keys of its own."""

    @property
    def section(self) -> str:
        """The first part of the name."""
        return self.name.split(".")[0]

    @property
    def as_yaml(self) -> str:
        """The example as one line of a recipe, such as `ppo: {kl_coef: 0.2}`."""
        nested: Any = self.example
        for part in reversed(self.name.replace(NAME, "salsa" if self.section == "policies" else "mine").split(".")):
            nested = {part: nested}
        return flow(nested)[1:-1]


def flow(value: Any) -> str:
    """A value as YAML in one line."""
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6, sort_keys=False)
    return text.removesuffix("\n").removesuffix("\n...")


@functools.cache
def all_keys() -> dict[str, Key]:
    """Name → description of every key, in the order of the schema."""
    return {key.name: key for key in _walk(Recipe, ())}


def find_key(name: str) -> Key | None:
    """The key of that name, in which NAME may be any name; also the mapping that it is in, and the only key that ends so."""
    keys = all_keys()
    name = name.strip().strip(".").replace("sft.from_", "sft.from")
    for key in keys.values():
        if re.fullmatch(re.escape(key.name).replace(NAME, "[^ ]+"), name):
            return key
    ending = [key for key in keys.values() if key.name.endswith(f".{name}") and NAME not in key.name]
    if len(ending) == 1:
        return ending[0]
    mappings = [
        key for key in keys.values() if not key.is_section and ("mapping" in key.type or key.type == "see below")
    ]
    for key in mappings:
        if found := re.match(re.escape(key.name).replace(NAME, "[^ .]+") + r"[.\[]([^.\]]*)", name):
            used = EXAMPLES.get(f"{key.name}.{found[1]}") or _used().get(f"{key.name}.{found[1]}")
            return key if used is None else dataclasses.replace(key, example={found[1]: used})
    return None


def near_keys(name: str, most: int = 5) -> list[str]:
    """The names of the keys nearest to a wrong one: those with the same last part, or else the most similar."""
    keys, last = list(all_keys()), name.lower().split(".")[-1]
    same = [key for key in keys if key.split(".")[-1] == last]
    leaves = {
        leaf: [key for key in keys if key.split(".")[-1] == leaf] for leaf in (key.split(".")[-1] for key in keys)
    }
    similar = difflib.get_close_matches(name.lower(), keys, n=most, cutoff=0.7)
    by_leaf = [key for leaf in difflib.get_close_matches(last, leaves, n=2, cutoff=0.7) for key in leaves[leaf]]
    return list(dict.fromkeys([*same, *similar, *by_leaf]))[:most]


def _walk(section: Any, where: tuple[str, ...]) -> Iterator[Key]:
    texts = _field_texts(section)
    for field in dataclasses.fields(section):
        parts = (*where, field.name.rstrip("_"))
        hint = field_types(section)[field.name]
        inner, named = _section_of(hint)
        key = _describe(".".join(parts), field, hint, texts[field.name], inner, named)
        yield key
        if inner is not None:
            yield from _walk(inner, (*parts, NAME) if named else parts)


def _describe(name: str, field: Any, hint: Any, text: str, inner: Any, named: bool) -> Key:
    body, *tags = TAG.split(text)
    given = {tag: value.strip().removesuffix(".") for tag, value in zip(tags[::2], tags[1::2], strict=True)}
    if inner is not None and inner is not Source:
        body = f"{body} {' '.join((inspect.getdoc(inner) or '').split())}"
    body = " ".join(" ".join([body, *DETAILS.get(name, list)()]).split()).replace("None: ", "null: ")
    counted = COUNTED.search(body)
    unit = given.get("Unit") or (counted[1].strip() if counted else "fraction" if "raction of" in body else "")
    default, is_section = _default(field), inner is not None and inner is not Source and not named
    numeric = "number" in type_text(hint) and "mapping" not in type_text(hint)
    example = yaml.safe_load(given["Example"]) if "Example" in given else _example(name, hint, default)
    shown = (
        "" if is_section and default not in (None, "required") else default if default == "required" else flow(default)
    )
    return Key(
        name, type_text(hint), shown, body, numeric, unit if numeric else "", given.get("Source", ""),
        None if is_section else example, is_section,
    )  # fmt: skip


def _default(field: Any) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    if field.default_factory is dataclasses.MISSING:
        return "required"
    made = field.default_factory()
    return {} if dataclasses.is_dataclass(made) else made


def _example(name: str, hint: Any, default: Any) -> Any:
    """A value of the key in a bundled recipe or preset; else the default, or another choice or truth value."""
    used = _used().get(name)
    if used is not None:
        return used
    choices = (
        [yaml.safe_load(word) for word in re.findall(r"[^ |,]+", type_text(hint))] if "|" in type_text(hint) else []
    )
    if default is None or default == "required":
        return choices[0] if choices else None
    if isinstance(default, bool):
        return not default
    return next((choice for choice in reversed(choices) if choice not in (default, None, "or")), default)


@functools.cache
def _used() -> dict[str, Any]:
    """Key → a value of it in a bundled recipe, those of smollm2 and quickstart first, or in an adapter preset."""
    found: dict[str, Any] = {}
    order = sorted(bundled_names("recipes"), key=lambda name: (name != "smollm2", name != "quickstart", name))
    files = [bundled_folder("recipes") / f"{name}.yaml" for name in order]
    files += [bundled_folder("adapters") / f"{name}.yaml" for name in bundled_names("adapters")]

    def collect(value: Any, parts: tuple[str, ...]) -> None:
        if parts and parts[0] == "lora":
            parts = parts[1:]
        if parts and value not in (None, {}, []):
            found.setdefault(".".join(parts), value)
        for key, entry in value.items() if isinstance(value, dict) else ():
            named = parts in (("policies",), ("evaluate", "prompts"))
            collect(entry, (*parts, NAME if named else key))

    for file in files:
        collect(read_yaml(str(file)), ())
    return found


def _section_of(hint: Any) -> tuple[Any, bool]:
    """The dataclass of a type, or None, and whether the type is a mapping from names to it."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return hint, False
    mapping = typing.get_origin(hint) is dict
    for part in typing.get_args(hint)[1 if mapping else 0 :]:
        if (found := _section_of(part)[0]) is not None:
            return found, mapping
    return None, False


def _field_texts(section: Any) -> dict[str, str]:
    """Field → its docstring in one line, those of the section's base classes included."""
    texts: dict[str, str] = {}
    for one in reversed(section.__mro__):
        if not dataclasses.is_dataclass(one):
            continue
        body = typing.cast(ast.ClassDef, ast.parse(inspect.getsource(typing.cast(type, one))).body[0]).body
        for field, text in itertools.pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                texts[ast.unparse(field.target)] = " ".join(str(text.value.value).split())
    return texts


BOUNDS = (("ge", "at least"), ("gt", "above"), ("le", "at most"), ("lt", "below"))
PLURAL = re.compile(r"\b(list|text|number)\b")
WORDS = {str: "text", int: "whole number", float: "number", bool: "true | false", type(None): "null", Any: "see below"}


def type_text(hint: Any) -> str:
    """A type of the schema in words: `whole number, at least 1`, `k1 | k2`, `list of text, or null`."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        limits = [m for info in args[1:] for m in getattr(info, "metadata", ())]
        words = [
            f"{word} {_number(vars_[name])}" for vars_ in map(_bounds, limits) for name, word in BOUNDS if name in vars_
        ]
        text = ", ".join([type_text(args[0]), *words])
        return text.replace("number, above", "number above").replace(", below", " and below")
    if origin is Literal:
        return " | ".join(map(str, args))
    if origin in (types.UnionType, typing.Union):
        return ", or ".join(type_text(part) for part in args)
    if origin is list:
        one = type_text(args[0])
        several = PLURAL.sub(lambda found: f"{found[0]}s", one, count=1)
        return f"list of ({one})" if " | " in one or ", or " in one else f"list of {several}"
    if origin is dict:
        return f"mapping from names to {'values' if args[1] is Any else type_text(args[1])}"
    if hint is Source:
        return "path, or section"
    return "section" if dataclasses.is_dataclass(hint) else WORDS[hint]


def _bounds(limit: Any) -> dict[str, float]:
    return {field.name: getattr(limit, field.name) for field in dataclasses.fields(limit)}


def _number(value: float) -> str:
    return "2³²" if value == 2**32 else f"{value:g}"


def _guards() -> list[str]:
    limits = (f"{name} ({guard.limit:g}, {guard.action})" for name, guard in DEFAULTS.items())
    return [f"Guards, with their limits and actions: {', '.join(limits)}."]


def _sweeps() -> list[str]:
    return [f"{kind}: {(inspect.getdoc(make) or '').splitlines()[0]}" for kind, (make, _) in SWEEPS.items()]


def _backends() -> list[str]:
    return [f"Options of {name}: {', '.join(options)}." for name, options in BACKEND_OPTIONS.items() if options]


DETAILS: dict[str, Callable[[], list[str]]] = {
    "ppo.guards": _guards,
    "sweep": _sweeps,
    "ppo.rollout_options": _backends,
}
"""Key whose values are checked by a table → the table in words."""
EXAMPLES: dict[str, Any] = {"sweep.scale": {"values": [0.5, 1.0], "seed": 0}}
"""Key within a mapping → its example, if no bundled recipe has one."""
