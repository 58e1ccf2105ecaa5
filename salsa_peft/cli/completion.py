"""Tab completion of `salsa` in bash, zsh and fish, by the package argcomplete (extra `completion`).

    eval "$(register-python-argcomplete salsa)"      # in .bashrc or .zshrc

The shell starts `salsa` with the line typed so far in its environment. Every command builds its own parser, so the
command's `main` is called with parsers that complete the line instead of parsing it.
"""

import argparse
import importlib
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from salsa_peft.config.keys.describe import NAME, all_keys, find_key
from salsa_peft.config.load import bundled_names, find_recipe
from salsa_peft.config.yaml import read_yaml
from salsa_peft.recipe.estimates.hardware import GPUS
from salsa_peft.recipe.run import STAGES
from salsa_peft.utils.console import Parser
from salsa_peft.utils.errors import SalsaError

VARIABLE = "_ARGCOMPLETE"
"""Environment variable that the shell sets: the position of the program in the line, from 1."""


def complete(commands: Mapping[str, str]) -> NoReturn:
    """Print the completions of the line in the environment, and end the process. commands: command → its module."""
    from argcomplete.lexers import split_line

    line, point = os.environ["COMP_LINE"], int(os.environ["COMP_POINT"])
    place = int(os.environ[VARIABLE])
    words = split_line(line, point)[3][place - 1 :]
    for parse in ("parse_args", "parse_intermixed_args"):  # in this process, which only completes
        setattr(argparse.ArgumentParser, parse, lambda parser, *_, **__: _complete(parser))
    if len(words) > 1 and words[1] in commands:
        os.environ[VARIABLE] = str(place + 1)
        if words[1] != "report":  # which reads its words without a parser
            importlib.import_module(commands[words[1]]).main([])
        report = Parser(prog="salsa report")
        report.add_argument("runs", nargs="*", metavar="RUN")
        for option in ("--paper", "--claims"):
            report.add_argument(option, action="store_true")
        _complete(report)
    parser = Parser(prog="salsa")
    parser.add_argument("command", choices=[*commands, "help"])
    parser.add_argument("--version", action="store_true")
    _complete(parser)


def _complete(parser: argparse.ArgumentParser) -> NoReturn:
    import argcomplete

    todo = [parser]
    while todo:
        for action in todo.pop()._actions:
            if isinstance(action, argparse._SubParsersAction):
                todo += action.choices.values()
            elif isinstance(action.metavar, str) and action.metavar in COMPLETERS:
                action.completer = _completer(COMPLETERS[action.metavar])  # type: ignore[attr-defined]
    argcomplete.autocomplete(parser, always_complete_options="long")
    raise SystemExit(1)  # only without the variables of argcomplete's shell function


def _completer(found: Callable[[str, Any], Iterable[str]]) -> Callable[..., list[str]]:
    def completions(prefix: str, parsed_args: Any, **_: Any) -> list[str]:
        try:
            return list(found(prefix, parsed_args))
        except (SalsaError, OSError):  # a half-typed recipe has no keys of its own yet
            return []

    return completions


def _recipes(prefix: str, _: Any) -> Iterable[str]:
    return [*bundled_names("recipes"), *_paths(prefix, "*.yaml"), *_paths(prefix, "*/")]


def _paths(prefix: str, pattern: str) -> list[str]:
    """Files or, with a pattern that ends with /, folders that begin with the prefix, as the user writes them."""
    folder, _, start = prefix.rpartition("/")
    root = Path(folder or ("/" if prefix.startswith("/") else "."))
    found = sorted(
        path for path in root.glob(pattern) if path.name.startswith(start) and (start or path.name[0] != ".")
    )
    before = f"{folder}/" if "/" in prefix else ""
    return [f"{before}{path.name}" + ("/" if path.is_dir() else "") for path in found]


def _runs(prefix: str, _: Any) -> Iterable[str]:
    """Folders with a recipe.yaml, in runs/ and in the folder that is typed, and the folders on the way to one."""
    typed = _paths(prefix, "*/")
    found = [path.rstrip("/") for path in typed if (Path(path) / "recipe.yaml").is_file()]
    found += [str(path.parent) for path in sorted(Path("runs").glob("*/recipe.yaml"))]
    return dict.fromkeys([*found, *(path for path in typed if path.rstrip("/") not in found and path != "runs/")])


def _settings(prefix: str, args: Any) -> Iterable[str]:
    """KEY= for each key, with the names in the recipe for NAME; after the =, the values of a choice."""
    key, equals, _ = prefix.partition("=")
    if equals:
        described = find_key(key)
        words = [] if described is None else described.type.removesuffix(", or null").split(" | ")
        return [f"{key}={word}" for word in words] if len(words) > 1 else []
    return [f"{name}=" for name in _names_in(args)]


def _keys(prefix: str, _: Any) -> Iterable[str]:
    return list(all_keys())


def _names_in(args: Any) -> Iterable[str]:
    """The keys that a value can be set for, those with NAME for each name in the recipe."""
    recipe: dict[str, Any] = {}
    if words := getattr(args, "recipe", None):
        recipe = read_yaml(str(find_recipe(words[0])))
    for key in all_keys().values():
        head, _, rest = key.name.partition(f".{NAME}")
        if key.is_section:
            continue
        if not rest:
            yield key.name
            continue
        names: Any = recipe
        for part in head.split("."):
            names = names.get(part, {}) if isinstance(names, dict) else {}
        yield from (f"{head}.{name}{rest}" for name in names)


def _stages(prefix: str, args: Any) -> Iterable[str]:
    """Stages, after those in a list with commas; with the policies of the recipe as units of ppo."""
    before, comma, _ = prefix.rpartition(",")
    recipe = read_yaml(str(find_recipe(args.recipe[0]))) if getattr(args, "recipe", None) else {}
    units = [f"ppo/{name}" for name in recipe.get("policies", ())]
    return [f"{before}{comma}{name}" for name in [*STAGES, *units]]


def _results(prefix: str, args: Any) -> Iterable[str]:
    """Results of the run that can be pushed: soup, reward, seeds and policies."""
    recipe = read_yaml(str(Path(str(getattr(args, "run", None) or ".")) / "recipe.yaml"))
    seeds = [f"seed-{place}" for place in range(len(recipe.get("sft", {}).get("seeds", [0, 1])))]
    return ["soup", "reward", *seeds, *recipe.get("policies", {})]


COMPLETERS: dict[str, Callable[[str, Any], Iterable[str]]] = {
    "RECIPE": _recipes,
    "KEY=VALUE": _settings,
    "KEY": _keys,
    "RUN": _runs,
    "PRESET": lambda *_: bundled_names("adapters"),
    "STAGE": _stages,
    "A,B": _stages,
    "GPU": lambda *_: list(GPUS),
    "ITEM": _results,
}
"""Name of an argument in the help → function of the typed prefix and the arguments so far. Others complete files."""
