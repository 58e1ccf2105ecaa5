"""YAML in and out, for recipes: plain data only, numbers as people write them (`2e-6` is a number), one-line refusals.

PyYAML parses; building the values is ours, so what a recipe has no use for cannot happen: no aliases (271 bytes of them
expand without bound), tags, timestamps, duplicate keys, keys that aren't text, nesting without end. Scalars follow YAML
1.2's core schema without octal and hexadecimal: `no` and `on` are text, true and false the only booleans.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

import yaml

from salsa_peft.utils.errors import SalsaError, require

MAX_BYTES = 1_000_000
MAX_DEPTH = 20
INTEGER = re.compile(r"[-+]?[0-9]+\Z")
FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?\Z")
WORDS = {
    "": None, "~": None, "null": None, "Null": None, "NULL": None,
    "true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False,
    ".inf": float("inf"), "-.inf": float("-inf"), ".nan": float("nan"),
}  # fmt: skip
PARSER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_yaml(path: str) -> dict[str, Any]:
    """A YAML file → its mapping. Raises SalsaError, one line with the file and the line number."""
    require(os.path.isfile(path), f"{path}: no such file")
    try:
        with open(path, "rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise SalsaError(f"{path}: cannot be read: {error.strerror}") from error
    require(len(raw) <= MAX_BYTES, f"{path}: found more than {MAX_BYTES} bytes, expected a recipe")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise SalsaError(f"{path}: found bytes that are not UTF-8 at {error.start}, expected a YAML file") from error
    data = parse_yaml(text, path)
    found = "nothing" if data is None else f"a {type(data).__name__}"
    require(isinstance(data, dict), f"{path}: found {found}, expected `key: value` lines")
    return data


def parse_yaml(text: str, where: str) -> Any:
    """YAML text → dicts, lists and scalars; `where` starts the message of a SalsaError."""
    try:
        text.encode("utf-8")
        events = yaml.parse(text, Loader=PARSER)
        return _document(iter(events), where)
    except yaml.MarkedYAMLError as error:
        line = f" (line {error.problem_mark.line + 1})" if error.problem_mark else ""
        problem = str(error.problem or error.context)
        if (
            "nesting depth" in problem
        ):  # PyYAML 6.0.4 has a limit of its own, above ours, and meets it while it reads ahead
            problem = f"nested deeper than {MAX_DEPTH} levels"
        raise SalsaError(f"{where}: not YAML{line}: {problem}") from error
    except yaml.YAMLError as error:
        raise SalsaError(f"{where}: not YAML: {' '.join(str(error).split())}") from error
    except UnicodeEncodeError as error:
        raise SalsaError(f"{where}: found characters that are not UTF-8") from error


def _document(events: Iterator[Any], where: str) -> Any:
    found, documents = None, 0
    for event in events:
        if isinstance(event, yaml.DocumentStartEvent):
            documents += 1
            require(documents == 1, f"{where}: found a second document (---), expected one")
            found = _value(events, next(events), where, 0)
    return found


def _value(events: Iterator[Any], event: Any, where: str, depth: int) -> Any:
    at = f"{where}: line {event.start_mark.line + 1}"
    require(depth <= MAX_DEPTH, f"{at}: nested deeper than {MAX_DEPTH} levels")
    require(not isinstance(event, yaml.AliasEvent), f"{at}: aliases (*) are not allowed here, write the value out")
    require(event.anchor is None, f"{at}: anchors (&) are not allowed here, write the value out")
    require(event.tag is None, f"{at}: tags (!) are not allowed here")
    if isinstance(event, yaml.ScalarEvent):
        return _scalar(event.value, at) if event.implicit[0] else event.value
    if isinstance(event, yaml.SequenceStartEvent):
        items = []
        while not isinstance(event := next(events), yaml.SequenceEndEvent):
            items.append(_value(events, event, where, depth + 1))
        return items
    mapping: dict[str, Any] = {}
    while not isinstance(event := next(events), yaml.MappingEndEvent):
        at = f"{where}: line {event.start_mark.line + 1}"
        key = _value(events, event, where, depth + 1)
        require(isinstance(key, str), f"{at}: found the key {_short(key)}, expected text; quote it")
        require(key not in mapping, f"{at}: found the key {_short(key)} twice, expected it once")
        mapping[key] = _value(events, next(events), where, depth + 1)
    return mapping


def _scalar(text: str, at: str) -> Any:
    if text in WORDS:
        return WORDS[text]
    if INTEGER.match(text):
        require(len(text) <= 30, f"{at}: found a number of {len(text)} digits")
        return int(text)
    return float(text) if FLOAT.match(text) else text


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+.0123456789"))
_Dumper.add_implicit_resolver("tag:yaml.org,2002:int", INTEGER, list("-+0123456789"))


def dump_yaml(data: Any) -> str:
    """Plain data → YAML text that parse_yaml reads back to the same data (text that looks like a number is quoted)."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
