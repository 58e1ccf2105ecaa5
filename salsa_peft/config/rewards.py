"""What `reward.model` may say: the adapter that the reward stage trains, a sequence classifier, a Python function, a weighted sum.

A function is looked up by its file alone: nothing of the user's runs, and nothing is imported, when a recipe is read.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

from salsa_peft.config.fields import NAME
from salsa_peft.utils.errors import SalsaError, require
from salsa_peft.utils.messages import one_line, short_path

ADAPTER = "adapter"
WORD = r"[A-Za-z_][A-Za-z0-9_]*"
FUNCTION = re.compile(rf"(?:(?P<folder>[^\0:]*)/)?(?P<module>{WORD}(?:\.{WORD})*):(?P<name>{WORD}(?:\.{WORD})*)\Z")
SEQUENCE_CLASSIFIER = "ForSequenceClassification"
OWN_FUNCTION = (
    "Write a function that loads it and says what a response is worth (reward: module:name), or name a classifier of num_labels 1, such as"
    " TRL's RewardTrainer saves"
)
"""What to do with a model that is no classifier of one label."""
EXPECTED = "expected adapter, module:name (a function), a sequence classifier's folder or Hub id, or a list of these"


GIVEN = ("prompts", "completions", "completion_ids", "finished", "log_metric")
"""What every reward function is given, by keyword, beside the data's columns."""
OWN = ("prompt", "completion", "completion_ids")
"""Columns of the data that are not passed, as in TRL."""


@dataclass(frozen=True, kw_only=True)
class RewardPart:
    """One reward, and what it counts for in the sum."""

    kind: str
    """adapter | function | classifier"""
    value: str
    """adapter, [FOLDER/]module:name, or a folder or Hub id."""
    weight: float = 1.0
    name: str
    """In logs: rewards/<name>/mean."""


def parse_reward(where: str, value: Any) -> list[RewardPart]:
    """What `reward.model` says → its parts; more than one, or one with a weight, are a weighted sum. Raises SalsaError."""
    if not isinstance(value, list):
        return [_part(where, value)]
    require(bool(value), f"{where}: found an empty list, {EXPECTED}")
    parts = [_entry(f"{where}[{index}]", entry) for index, entry in enumerate(value)]
    name, times = Counter(part.name for part in parts).most_common(1)[0]
    require(
        times == 1,
        f"{where}: found {times} parts called {name}, expected a name of its own for each: {{model: …, name: …}}",
    )
    return parts


def _entry(where: str, value: Any) -> RewardPart:
    """A part of a sum: text, or {model, weight, name}."""
    if not isinstance(value, dict):
        return _part(where, value)
    weight, name = value.get("weight", 1.0), value.get("name")
    fits = "model" in value and set(value) <= {"model", "weight", "name"}
    require(
        fits, f"{where}: found the keys {', '.join(map(str, value)) or 'none'!s:.60}, expected model, weight and name"
    )
    require(
        type(weight) in (int, float) and abs(weight) < 1e300,
        f"{where}.weight: found {weight!r:.60}, expected a number (0: logged, not counted)",
    )
    part = _part(f"{where}.model", value["model"])
    fits = name is None or (isinstance(name, str) and NAME.match(name) is not None)
    require(fits, f"{where}.name: found {name!r:.60}, expected letters, digits, dots, - and _, at most 64")
    return RewardPart(kind=part.kind, value=part.value, weight=float(weight), name=name or part.name)


def _part(where: str, value: Any) -> RewardPart:
    require(isinstance(value, str) and bool(value), f"{where}: found {value!r:.60}, {EXPECTED}")
    if value == ADAPTER:
        return RewardPart(kind="adapter", value=value, name=ADAPTER)
    if ":" in value:
        found = FUNCTION.match(value)
        if found is None or found["module"].endswith(".py"):
            hint = ", without .py" if ".py:" in value else ""
            require(
                False,
                f"{where}: found {value!r:.60}, expected a function as module:name, such as my_rewards:score{hint}",
            )
        assert found is not None
        return RewardPart(kind="function", value=value, name=found["name"].rsplit(".", 1)[-1])
    name = re.sub(r"[^A-Za-z0-9._-]", "_", value.rstrip("/").rsplit("/", 1)[-1])[:64]
    return RewardPart(kind="classifier", value=value, name=name if NAME.match(name) else "classifier")


def split_function(value: str) -> tuple[str | None, str, str]:
    """[FOLDER/]module:name → folder, module, name. Raises SalsaError for another form."""
    found = FUNCTION.match(value)
    require(
        found is not None, f"reward: found {value!r:.80}, expected a function as module:name, such as my_rewards:score"
    )
    assert found is not None
    return found["folder"], found["module"], found["name"]


def find_module(folder: str | None, module: str) -> Path | None:
    """The file of a module in a folder, or (None) on Python's path; None where there is none. Imports nothing, packages neither."""
    importlib.invalidate_caches()
    finders: list[Any] = [PathFinder] if folder is not None else sys.meta_path
    search, spec = None if folder is None else [folder], None
    parts = module.split(".")
    for depth in range(1, len(parts) + 1):
        found: list[ModuleSpec | None] = [finder.find_spec(".".join(parts[:depth]), search) for finder in finders]
        spec = next((one for one in found if one is not None), None)
        if spec is None or (depth < len(parts) and spec.submodule_search_locations is None):
            return None
        search = list(spec.submodule_search_locations or [])
    return Path(spec.origin) if spec is not None and spec.origin is not None and os.path.isfile(spec.origin) else None


def check_function(where: str, value: str) -> None:
    """Raise SalsaError where a function's module is not there, can't be parsed, imports what is not installed, or has nothing of its name."""
    folder, module, name = split_function(value)
    place = f"in {short_path(folder)}" if folder else "in the recipe's folder or on Python's path"
    file = find_module(folder, module)
    require(file is not None, f"{where}: found no module {module} {place}, expected one")
    assert file is not None
    if file.suffix != ".py":
        return  # compiled: importing it will say what is wrong
    tree = _parsed(where, file)
    require(
        defines(tree, name) or "setattr" in file.read_text(errors="ignore"),
        f"{where}: found no {name} in {module} {place}, expected a function of that name",
    )
    for missing in _not_installed(tree, file):
        raise SalsaError(f"{where}: {short_path(str(file))} imports {missing}, which is not installed")


def check_signature(where: str, value: str) -> None:
    """Raise SalsaError for a reward function that takes arguments by position only: it is called by keyword, as TRL calls it."""
    arguments = _arguments(value)
    names = [] if arguments is None else [one.arg for one in arguments.posonlyargs]
    require(
        not names,
        f"{where}: {value.rpartition(':')[2]} takes {', '.join(names)} by position only, and rewards are called by keyword; take the / out of"
        " its signature",
    )


def check_columns(where: str, value: str, columns: Collection[str], data: str) -> None:
    """Raise SalsaError for a reward function that takes what is neither given to every one nor among the data's columns."""
    arguments = _arguments(value)
    if arguments is None:
        return
    optional = len(arguments.args) - len(arguments.defaults)
    needs = [one.arg for one in arguments.args[:optional]]
    needs += [
        one.arg for one, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True) if default is None
    ]
    passed = set(columns) - set(OWN)
    absent = [name for name in needs if name not in GIVEN and name not in passed]
    require(
        not absent,
        f"{where}: {value.rpartition(':')[2]} takes {', '.join(absent)}, which is no column of {data} (other columns than the prompt:"
        f" {', '.join(sorted(passed)) or 'none'}) and not one of {', '.join(GIVEN)}. Add the column, or give the argument a default",
    )


def _parsed(where: str, file: Path) -> ast.Module:
    """A module's file, read and not run."""
    try:
        return ast.parse(file.read_bytes())
    except (SyntaxError, ValueError, RecursionError) as error:
        what = f"{error.msg}, line {error.lineno}" if isinstance(error, SyntaxError) else error
        raise SalsaError(f"{where}: {short_path(str(file))} is no Python ({one_line(what)})") from error


def defines(tree: ast.Module, name: str) -> bool:
    """Whether a module seems to have `name` (of a dotted one the first part); what a star import may bring counts as there."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return bool({name.split(".")[0], "*"} & found)


def _not_installed(tree: ast.Module, file: Path) -> list[str]:
    """Packages that a module imports as its first thing, in no `try`, and that are not there; none where it changes Python's path itself."""
    if "sys.path" in file.read_text(errors="ignore"):
        return []
    names: list[str] = []
    for node in tree.body:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None and node.level == 0:
            names.append(node.module)
    tops = dict.fromkeys(name.partition(".")[0] for name in names)
    beside = {path.stem for path in file.parent.iterdir()} | {folder.name for folder in file.parents}
    known = {*sys.modules, *sys.stdlib_module_names, *beside}
    return [top for top in tops if top not in known and importlib.util.find_spec(top) is None]


def _arguments(value: str) -> ast.arguments | None:
    """A function's parameters as its file writes them; None for what is no plain `def` or lambda there, such as a decorated one or a class."""
    folder, module, name = split_function(value)
    file = find_module(folder, module)
    if file is None or file.suffix != ".py":
        return None
    found: list[ast.arguments | None] = []
    for node in ast.walk(_parsed(value, file)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.name == name:
            plain = not isinstance(node, ast.ClassDef) and not node.decorator_list
            found.append(node.args if plain else None)  # type: ignore[union-attr]
        elif isinstance(node, ast.Assign) and any(isinstance(one, ast.Name) and one.id == name for one in node.targets):
            found.append(node.value.args if isinstance(node.value, ast.Lambda) else None)
        elif isinstance(node, ast.ImportFrom) and any((alias.asname or alias.name) == name for alias in node.names):
            found.append(None)
    return found[0] if len(found) == 1 else None


def placed(value: str, folder: str) -> str:
    """A function's name with the folder that its module lies in, where that is the recipe's or one that it names; else as it is."""
    found = FUNCTION.match(value)
    if found is None:
        return value
    if found["folder"] is not None:
        place = os.path.abspath(os.path.join(folder, os.path.expanduser(found["folder"] + "/")))
        return f"{place.rstrip('/')}/{found['module']}:{found['name']}"
    return f"{folder.rstrip('/')}/{value}" if find_module(folder, found["module"]) is not None else value


def check_classifier_folder(where: str, folder: str) -> None:
    """Raise SalsaError where a folder's configuration is of no sequence classifier or has more labels than one, or its tokenizer has no
    chat template."""
    config = _json_file(where, Path(folder) / "config.json")
    names = config.get("architectures") or [SEQUENCE_CLASSIFIER]
    require(
        str(names[0]).endswith(SEQUENCE_CLASSIFIER),
        f"{where}: {short_path(folder)} is a {names[0]}, which Transformers does not load as a sequence classifier: it has no score head of one"
        f" label. {OWN_FUNCTION}",
    )
    labels = config.get("num_labels", len(config.get("id2label", {"0": "", "1": ""})))
    require(
        labels == 1,
        f"{where}: {short_path(folder)} is a classifier of {labels} labels, and a reward is one number (num_labels 1). {OWN_FUNCTION}",
    )
    require(
        has_template(where, folder),
        f"{where}: found {short_path(folder)}, whose tokenizer has no chat template, expected one: prompts of a recipe are messages."
        " Put the template that it was trained with beside it as chat_template.jinja, or write a function (reward: module:name)",
    )


def has_template(where: str, folder: str) -> bool:
    """Whether a folder's tokenizer has a chat template. Raises SalsaError for a tokenizer_config.json that can't be read."""
    if (Path(folder) / "chat_template.jinja").is_file():
        return True
    return _json_file(where, Path(folder) / "tokenizer_config.json").get("chat_template") is not None


def _json_file(where: str, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise SalsaError(f"{where}: {short_path(str(path))} can't be read as JSON, expected a JSON object") from error
    require(isinstance(value, dict), f"{where}: found no JSON object in {short_path(str(path))}, expected one")
    return value
