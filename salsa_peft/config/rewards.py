"""Forms of `reward.model`: a reward adapter, a classifier, a Python function, a weighted sum.

Reading a recipe neither imports nor runs user code: a function is only looked up in its source file.
"""

import ast
import importlib.util
import os
import re
import sys
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

from salsa_peft.config.fields import NAME, is_number
from salsa_peft.utils.errors import SalsaError, require
from salsa_peft.utils.files import read_json
from salsa_peft.utils.messages import did_you_mean, one_line, short_path

ADAPTER = "adapter"
WORD = r"[A-Za-z_][A-Za-z0-9_]*"
FUNCTION = re.compile(
    rf"(?:(?P<folder>[^\0:]*)/)?(?P<module>{WORD}(?:\.{WORD})*?)(?:\.py)?:(?P<name>{WORD}(?:\.{WORD})*)\Z"
)
"""[FOLDER/]module:name or [FOLDER/]file.py:name."""
SEQUENCE_CLASSIFIER = "ForSequenceClassification"
WRITE_A_FUNCTION = (
    "Write a Python function that loads the model and returns one score per response (reward: module:name), or use a"
    " classifier with num_labels 1, such as TRL's RewardTrainer saves"
)
"""Advice for a reward model that is not a classifier with one label."""
ACCEPTED_MODELS = (
    "must be adapter, module:name (a function), the folder or Hub id of a sequence classifier, or a list of these"
)
REWARD_ARGUMENTS = ("prompts", "completions", "completion_ids", "finished", "log_metric")
"""Keyword arguments that every reward function gets besides the data's columns."""
HELD_OUT_SCORE = "objective/held_out_score"
"""Metric of the first reward of weight 0, which is scored but not optimized (WeightedReward)."""
COLUMNS_NOT_PASSED = ("prompt", "completion", "completion_ids")
"""Columns of the data that are not passed to reward functions, as in TRL."""


@dataclass(frozen=True, kw_only=True)
class RewardPart:
    """One reward and its weight in the sum."""

    kind: str
    """Kind of reward: adapter, function or classifier."""
    value: str
    """The word adapter, a function as [FOLDER/]module:name, or a classifier's folder or Hub id."""
    weight: float = 1.0
    """Factor in the weighted sum. 0: scored and logged, but not optimized; the first such part is the held-out reward."""
    name: str
    """Name in the logs, as in rewards/<name>/mean."""


def parse_reward(where: str, value: Any) -> list[RewardPart]:
    """Parse `reward.model` into its parts; only a weighted sum has several. Raises SalsaError."""
    if not isinstance(value, list):
        return [_part(where, value)]
    require(bool(value), f"{where}: {ACCEPTED_MODELS}, but this list is empty")
    parts = [_weighted_part(f"{where}[{index}]", entry) for index, entry in enumerate(value)]
    name, times = Counter(part.name for part in parts).most_common(1)[0]
    require(times == 1, f"{where}: {times} parts have the name {name}; give each its own name: {{model: …, name: …}}")
    return parts


def reweighted(parts: Collection[RewardPart], weights: Mapping[str, float], where: str) -> list[dict[str, Any]]:
    """A value of `reward.model` with other weights of its parts, given by name; parts of weight 0 stay as they are.

    Raises SalsaError for a name that no part has.
    """
    names = [part.name for part in parts]
    for name in weights:
        require(
            name in names, f"{where}.{name}: reward.model has no such part; {did_you_mean(name, names, 'its parts')}"
        )
    return [
        {"model": part.value, "weight": weights.get(part.name, part.weight), "name": part.name}
        for part in parts
        if part.name in weights or part.weight == 0
    ]


def _weighted_part(where: str, value: Any) -> RewardPart:
    """A part of a weighted sum, given as text or as {model, weight, name}."""
    if not isinstance(value, dict):
        return _part(where, value)
    weight, name = value.get("weight", 1.0), value.get("name")
    keys = ", ".join(map(str, value)) or "none"
    fits = "model" in value and set(value) <= {"model", "weight", "name"}
    require(fits, f"{where}: must have the key model, and may have weight and name, but it has: {keys:.60}")
    require(
        is_number(weight), f"{where}.weight: must be a number (0: logged, but not part of the sum), not {weight!r:.60}"
    )
    part = _part(f"{where}.model", value["model"])
    fits = name is None or (isinstance(name, str) and NAME.match(name) is not None)
    require(
        fits, f"{where}.name: must consist of letters, digits, dots, - and _, at most 64 characters, not {name!r:.60}"
    )
    return replace(part, weight=float(weight), name=name or part.name)


def _part(where: str, value: Any) -> RewardPart:
    require(isinstance(value, str) and bool(value), f"{where}: {ACCEPTED_MODELS}, not {value!r:.60}")
    if value == ADAPTER:
        return RewardPart(kind="adapter", value=value, name=ADAPTER)
    if ":" in value:
        return RewardPart(kind="function", value=value, name=split_function(value, where)[2].rsplit(".", 1)[-1])
    name = re.sub(r"[^A-Za-z0-9._-]", "_", value.rstrip("/").rsplit("/", 1)[-1])[:64]
    return RewardPart(kind="classifier", value=value, name=name if NAME.match(name) else "classifier")


def split_function(value: str, where: str = "reward") -> tuple[str | None, str, str]:
    """Folder, module and name of [FOLDER/]module:name or [FOLDER/]file.py:name. Raises a SalsaError that starts with `where`."""
    found = FUNCTION.match(value)
    if found is None:
        raise SalsaError(f"{where}: {value!r:.60} is not a function; write module:name, such as my_rewards:score")
    return found["folder"], found["module"], found["name"]


def find_module(folder: str | None, module: str) -> Path | None:
    """Path of a module's file, or None if missing. folder=None: search Python's path. Imports nothing."""
    importlib.invalidate_caches()
    finders: list[Any] = [PathFinder] if folder is not None else sys.meta_path
    search, spec = None if folder is None else [folder], None
    parts = module.split(".")
    for depth in range(1, len(parts) + 1):
        found: list[ModuleSpec | None] = [finder.find_spec(".".join(parts[:depth]), search) for finder in finders]
        spec = next((candidate for candidate in found if candidate is not None), None)
        if spec is None or (depth < len(parts) and spec.submodule_search_locations is None):
            return None
        search = list(spec.submodule_search_locations or [])
    return Path(spec.origin) if spec is not None and spec.origin is not None and os.path.isfile(spec.origin) else None


def check_function(where: str, value: str) -> None:
    """Raise SalsaError for a function whose module or name is missing, or whose imports are not installed."""
    folder, module, name = split_function(value, where)
    place = f"in {short_path(folder)}" if folder else "in the recipe's folder or on Python's path"
    file = find_module(folder, module)
    if file is None:
        raise SalsaError(f"{where}: there is no module {module} {place}")
    if file.suffix != ".py":
        return  # a compiled module: an error shows when it is imported
    tree = _parsed(where, file)
    require(
        defines_name(tree, name) or "setattr" in file.read_text(errors="ignore"),
        f"{where}: the module {module} {place} has no {name}",
    )
    for missing in _not_installed(tree, file):
        raise SalsaError(
            f"{where}: {short_path(str(file))} imports {missing}, which is not installed; install its package (often"
            f" `pip install {missing}`)"
        )


def check_signature(where: str, value: str) -> None:
    """Raise SalsaError for positional-only arguments or none, because rewards are called by keyword, as in TRL."""
    arguments = _arguments(value)
    require(
        arguments is None or bool(arguments.posonlyargs or arguments.args or arguments.kwonlyargs or arguments.kwarg),
        f"{where}: {value.rpartition(':')[2]} takes no arguments, but rewards are called with completions=…; add them",
    )
    names = [] if arguments is None else [argument.arg for argument in arguments.posonlyargs]
    require(
        not names,
        f"{where}: {value.rpartition(':')[2]} has the positional-only arguments {', '.join(names)}, but rewards are"
        " called by keyword; remove the / from its signature",
    )


def check_columns(where: str, value: str, columns: Collection[str], data: str) -> None:
    """Raise SalsaError if a function requires an argument outside `columns` and REWARD_ARGUMENTS."""
    arguments = _arguments(value)
    if arguments is None:
        return
    needs = [argument.arg for argument in arguments.args[: len(arguments.args) - len(arguments.defaults)]]
    defaults = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    needs += [argument.arg for argument, default in defaults if default is None]
    passed = set(columns) - set(COLUMNS_NOT_PASSED)
    absent = [name for name in needs if name not in REWARD_ARGUMENTS and name not in passed]
    require(
        not absent,
        f"{where}: {value.rpartition(':')[2]} requires {', '.join(absent)}, which is neither a column of {data}"
        f" (columns besides the prompt: {', '.join(sorted(passed)) or 'none'}) nor one of"
        f" {', '.join(REWARD_ARGUMENTS)}. Add the column, or give the argument a default",
    )


def _parsed(where: str, file: Path) -> ast.Module:
    """The syntax tree of a module's file. Raises SalsaError if the file is not valid Python."""
    try:
        return ast.parse(file.read_bytes())
    except (SyntaxError, ValueError, RecursionError) as error:
        what = f"{error.msg}, line {error.lineno}" if isinstance(error, SyntaxError) else error
        raise SalsaError(f"{where}: {short_path(str(file))} is not valid Python: {one_line(what)}") from error


def defines_name(tree: ast.Module, name: str) -> bool:
    """Whether a module may define or import the first part of the dotted `name`, also by a star import."""
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
    """Missing packages that a module imports at its top level; [] if the module uses sys.path."""
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
    """Parameters of a function from its source; None unless one undecorated `def` or lambda defines it."""
    folder, module, name = split_function(value)
    file = find_module(folder, module)
    if file is None or file.suffix != ".py":
        return None
    found: list[ast.arguments | None] = []
    for node in ast.walk(_parsed(value, file)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.name == name:
            plain = not isinstance(node, ast.ClassDef) and not node.decorator_list
            found.append(node.args if plain else None)  # type: ignore[union-attr]
        elif isinstance(node, ast.Assign) and any(
            isinstance(target, ast.Name) and target.id == name for target in node.targets
        ):
            found.append(node.value.args if isinstance(node.value, ast.Lambda) else None)
        elif isinstance(node, ast.ImportFrom) and any((alias.asname or alias.name) == name for alias in node.names):
            found.append(None)
    return found[0] if len(found) == 1 else None


def function_with_folder(value: Any, folder: str) -> Any:
    """Make the folder of [FOLDER/]module:name absolute, or add `folder` if the module is in `folder`.

    Other values are returned unchanged.
    """
    found = FUNCTION.match(value) if isinstance(value, str) else None
    if found is None:
        return value
    if found["folder"] is not None:
        place = os.path.abspath(os.path.join(folder, os.path.expanduser(found["folder"] + "/")))
        return f"{place.rstrip('/')}/{found['module']}:{found['name']}"
    return f"{folder.rstrip('/')}/{value}" if find_module(folder, found["module"]) is not None else value


def check_classifier_folder(where: str, folder: str) -> None:
    """Raise SalsaError unless a folder holds a classifier with one label and a chat template."""
    config = _json_file(where, Path(folder) / "config.json")
    names = config.get("architectures") or [SEQUENCE_CLASSIFIER]
    require(
        str(names[0]).endswith(SEQUENCE_CLASSIFIER),
        f"{where}: {short_path(folder)} is a {names[0]}, which Transformers does not load as a sequence classifier: it"
        f" has no score head with one label. {WRITE_A_FUNCTION}",
    )
    labels = config.get("num_labels", len(config.get("id2label", {"0": "", "1": ""})))
    require(
        labels == 1,
        f"{where}: {short_path(folder)} is a classifier with {labels} labels, but a reward is one number (num_labels"
        f" 1). {WRITE_A_FUNCTION}",
    )
    require(
        has_template(where, folder),
        f"{where}: the tokenizer of {short_path(folder)} has no chat template, but a recipe's prompts are messages."
        " Save the template that the"
        " classifier was trained with as chat_template.jinja in that folder, or write a function (reward: module:name)",
    )


def has_template(where: str, folder: str) -> bool:
    """Whether the tokenizer in a folder has a chat template. Raises SalsaError for an unreadable file."""
    if (Path(folder) / "chat_template.jinja").is_file():
        return True
    return _json_file(where, Path(folder) / "tokenizer_config.json").get("chat_template") is not None


def _json_file(where: str, path: Path) -> dict[str, Any]:
    try:
        value = read_json(path)
    except SalsaError as error:
        raise SalsaError(f"{where}: {error}") from error
    require(isinstance(value, dict), f"{where}: {short_path(str(path))} does not hold a JSON object")
    return value
