"""YAML for recipes: a SafeLoader that accepts plain data only, and a dumper.

The loader rejects anchors, aliases, tags, duplicate keys, keys that are not text, and more than 20 levels of nesting.
Scalars follow YAML 1.2's core schema, in decimal only: 2e-6 is a number, 010 is ten, and `no`, `on` and dates are text.
"""

import os
import re
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import Composer

from salsa_peft.utils.errors import SalsaError, require
from salsa_peft.utils.messages import one_line, short

MAX_BYTES = 1_000_000
MAX_DEPTH = 20
TOO_DEEP = f"nested deeper than {MAX_DEPTH} levels"
INTEGER = re.compile(r"[-+]?[0-9]+\Z")
FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?\Z")
SCALARS = (
    ("null", re.compile(r"(~|null|Null|NULL|)\Z"), ["~", "n", "N", ""]),
    ("bool", re.compile(r"(true|True|TRUE|false|False|FALSE)\Z"), list("tTfF")),
    ("int", INTEGER, list("-+0123456789")),
    ("float", FLOAT, list("-+.0123456789")),
    ("float", re.compile(r"(-?\.inf|\.nan)\Z"), list("-.")),
)
"""Tag, pattern and first characters of each kind of scalar that is not text."""
BASES: Any = (Composer, yaml.CSafeLoader) if yaml.__with_libyaml__ else (yaml.SafeLoader,)
"""Base classes of the loader. libyaml parses if PyYAML has it; `compose_node` needs the Python composer."""


class _Rejected(yaml.MarkedYAMLError):
    """Valid YAML that is not allowed in a recipe."""


class RecipeLoader(*BASES):  # type: ignore[misc]
    """A SafeLoader with YAML 1.2's scalars, which rejects everything but plain data."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, text: str) -> None:
        BASES[-1].__init__(self, text)
        Composer.__init__(self)
        self.depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Compose a node. Raises _Rejected for an alias, an anchor, a tag, and too many levels of nesting."""
        event = self.peek_event()
        _reject(isinstance(event, yaml.AliasEvent), event, "aliases (*) are not allowed; write the value out")
        _reject(event.anchor is not None, event, "anchors (&) are not allowed; write the value out")
        _reject(event.tag is not None, event, "tags (!) are not allowed")
        _reject(self.depth > MAX_DEPTH, event, TOO_DEEP)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[str, Any]:
        """Construct a dict. Raises _Rejected for a key that occurs twice or is not text."""
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = self.construct_object(key_node, deep=True)
            _reject(not isinstance(key, str), key_node, f"the key {short(key)} is not text; quote it")
            _reject(key in mapping, key_node, f"the key {short(key)} occurs twice")
            mapping[key] = self.construct_object(value_node, deep=deep)
        return mapping

    def construct_integer(self, node: Any) -> int:
        """Construct a decimal integer, which may have leading zeros."""
        _reject(len(node.value) > 30, node, f"a number of {len(node.value)} digits is too long")
        return int(node.value)


def _reject(when: bool, place: Any, problem: str) -> None:
    if when:
        raise _Rejected(problem=problem, problem_mark=place.start_mark)


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


for tag, pattern, first in SCALARS:
    RecipeLoader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", pattern, first)
RecipeLoader.add_constructor("tag:yaml.org,2002:int", RecipeLoader.construct_integer)
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+.0123456789"))
_Dumper.add_implicit_resolver("tag:yaml.org,2002:int", INTEGER, list("-+0123456789"))


def read_yaml(path: str) -> dict[str, Any]:
    """Read the mapping in a YAML file. Raises a one-line SalsaError with the file and the line number."""
    require(os.path.isfile(path), f"{path}: no such file")
    try:
        with open(path, "rb") as file:
            raw = file.read(MAX_BYTES + 1)
        text = raw.decode("utf-8")
    except OSError as error:
        raise SalsaError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise SalsaError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8") from error
    require(len(raw) <= MAX_BYTES, f"{path}: has more than {MAX_BYTES} bytes, too many for a recipe")
    data = parse_yaml(text, path)
    kind = "empty" if data is None else f"a {type(data).__name__}"
    require(isinstance(data, dict), f"{path}: must contain `key: value` lines, but is {kind}")
    return data


def node_tree(path: Path) -> Any:
    """The node tree of a file that read_yaml accepts, for line_of; None for a file of more than 100 kB."""
    return (
        None
        if path.stat().st_size > MAX_BYTES // 10
        else RecipeLoader(path.read_text(encoding="utf-8")).get_single_node()
    )


def line_of(node: Any, key: str) -> int | None:
    """Line, from 1, of a key such as sft.seeds[0] in a node tree, or of the innermost section of it that is there.

    None if no part of the key is there.
    """
    line = None
    while key:
        if isinstance(node, yaml.SequenceNode) and (item := re.match(r"\[(\d+)\]\.?", key)):
            if int(item[1]) >= len(node.value):
                break
            node, key = node.value[int(item[1])], key[item.end() :]
            line = node.start_mark.line + 1
            continue
        entries = node.value if isinstance(node, yaml.MappingNode) else []
        named = [entry for entry in entries if f"{key}.".startswith((f"{entry[0].value}.", f"{entry[0].value}["))]
        if not named:
            break
        name, node = max(named, key=lambda entry: len(entry[0].value))
        line, key = name.start_mark.line + 1, key[len(name.value) :].removeprefix(".")
    return line


def parse_yaml(text: str, where: str) -> Any:
    """Parse YAML text into dicts, lists and scalars. Raises a SalsaError that starts with `where`."""
    try:
        return RecipeLoader(text).get_single_data()
    except yaml.MarkedYAMLError as error:
        at = f"{where}: line {error.problem_mark.line + 1}" if error.problem_mark else where
        problem = ", ".join(str(part) for part in (error.context, error.problem) if part)
        if "nesting depth" in problem:  # PyYAML 6.0.4 reads ahead and so reaches a limit of its own first
            problem = TOO_DEEP
        valid = "" if isinstance(error, _Rejected) else " is not valid YAML"
        raise SalsaError(f"{at}{valid}: {problem}") from error
    except yaml.YAMLError as error:
        raise SalsaError(f"{where}: is not valid YAML: {one_line(error)}") from error
    except UnicodeEncodeError as error:
        raise SalsaError(f"{where}: has characters that are not valid Unicode (lone surrogates)") from error


def dump_yaml(data: Any) -> str:
    """Plain data as YAML text that parse_yaml reads back unchanged."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
