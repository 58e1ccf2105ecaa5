"""A judge's settings from words of a command line, in the spelling of a recipe's `evaluate.judge`. Imports no torch."""

import difflib
import json
import os
import typing
from collections.abc import Sequence
from typing import Any

from pydantic import TypeAdapter, ValidationError

from salsa_peft.config.judge import Judge, check_ready
from salsa_peft.config.keys.unknown import split_unknown
from salsa_peft.config.paths import absolute_paths
from salsa_peft.config.rewards import FUNCTION
from salsa_peft.config.yaml import parse_yaml
from salsa_peft.utils.errors import SalsaError, require
from salsa_peft.utils.messages import explain_validation_error, short

KINDS = typing.get_args(typing.get_type_hints(Judge)["kind"])
SPELLINGS = f"{', '.join(KINDS)}, module:name, file.py:name, or a mapping {{kind: …, model: …}}"


def judge_section(words: Sequence[str] | None) -> Judge:
    """The judge's settings from the words of --judge. Raises SalsaError for an unknown kind, key or value."""
    if not words:
        raise SalsaError(f"--judge: is required; give {SPELLINGS}")
    first, data = words[0], dict[str, Any]()
    rest = list(words)
    if first.lstrip().startswith("{"):
        data, rest = parse_yaml(first, "--judge"), rest[1:]
    elif "=" not in first:
        data, rest = _kind(first), rest[1:]
    for word in rest:
        key, equals, value = word.partition("=")
        require(bool(equals), f"--judge: {short(word)} is not KEY=VALUE; put the models before the options")
        data[key] = parse_yaml(value, f"--judge {word}")
    data, unknown = split_unknown(data, Judge)
    require(not unknown, "--judge: " + "; ".join(f"{key}: unknown key, {advice}" for key, advice in unknown.items()))
    data = absolute_paths({"evaluate": {"judge": data}}, os.getcwd())["evaluate"]["judge"]
    try:
        section = TypeAdapter(Judge).validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        key, message = explain_validation_error(dict(error.errors(include_url=False)[0]))
        raise SalsaError(f"--judge: {key} {message}") from error
    section.check("--judge")
    check_ready(section, "--judge")
    return section


def _kind(word: str) -> dict[str, Any]:
    """The settings for a kind of judge, or for a function as module:name or file.py:name."""
    if word in KINDS:
        return {"kind": word}
    if FUNCTION.match(word) is None:
        close = difflib.get_close_matches(word, KINDS, n=1)
        raise SalsaError(
            f"--judge: there is no judge {short(word)}; "
            + (f"did you mean {close[0]}?" if close else f"give {SPELLINGS}")
        )
    file = word.rpartition(":")[0]
    require(not file.endswith(".py") or os.path.isfile(file), f"--judge: there is no file {file}; check its path")
    return {"kind": "function", "model": word}
