"""Field types of the recipe's sections, and small checks that they share."""

import dataclasses
import functools
import json
import math
import re
import typing
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from salsa_peft.utils.errors import SalsaError, require
from salsa_peft.utils.messages import describe, explain_validation_error, short

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")
SEED = re.compile(r"seed-(\d+)\Z")
MAX_POLICIES = 1000
"""Maximum number of policies after sweeps and searches are expanded. A sweep of a few lines could ask for millions."""
STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]

UNSUPPORTED_LORA_FIELDS = (
    "alora_invocation_tokens", "alpha_pattern", "arrow_config", "bias", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out",
    "init_lora_weights", "kasa_config", "layer_replication", "layers_pattern", "layers_to_transform", "loftq_config", "lora_bias", "lora_ga_config",
    "megatron_config", "megatron_core", "modules_to_save", "monteclora_config", "qalora_group_size", "rank_pattern", "runtime_config", "target_parameters", "task_type",
    "trainable_token_indices", "use_bdlora", "use_dora", "use_qalora", "velora_config",
)  # fmt: skip
"""Fields of PEFT's LoraConfig that a recipe does not support. A test checks the list against PEFT."""


def is_number(value: Any) -> bool:
    """Whether a value from YAML is an int or a float below 1e300 in magnitude. A bool does not count."""
    return type(value) in (int, float) and abs(value) < 1e300


def question_id(value: Any, where: str) -> int | str:
    """The id of a question in a data file. A whole number may be written as 81.0, as pandas does beside missing values.

    Raises SalsaError, which starts with `where`, for null, and for what is neither text nor a whole number.
    """
    identity = int(value) if isinstance(value, float) and value.is_integer() else value
    if isinstance(identity, bool) or not isinstance(identity, int | str):
        raise SalsaError(
            f"{where}: an id must be text or a whole number, not {describe(value)}; give every row its id, or remove the"
            " ids of all rows"
        )
    return identity


def require_unique(key: str, values: Sequence[Any]) -> None:
    """Raise SalsaError if a list has a repeated entry."""
    require(len(set(values)) == len(values), f"{key}: {short(values)} has a repeated entry; give each entry only once")


def require_multiple(key: str, value: int, factor: int, of: str, more: str = "") -> None:
    """Raise SalsaError unless `factor` divides `value`. of: names the factor. more: end of the message."""
    whole = math.ceil(value / factor) * factor
    require(value % factor == 0, f"{key}: {value} is not a multiple of {of}; set {key}={whole}{more}")


@functools.cache
def field_types(section: Any) -> dict[str, Any]:
    """Name of each field of a dataclass → its type. Cached, because evaluating annotations is slow."""
    return typing.get_type_hints(section, include_extras=True)


def join_keys(where: str, key: str) -> str:
    """`where.key`, or `key` alone if `where` is empty. An unprintable or long key is shown by its repr."""
    key = key if key.isprintable() and len(key) <= 80 else short(key)
    return f"{where}.{key}" if where else key


def require_seed(key: str, position: int, seeds: int) -> None:
    """Raise SalsaError unless `position` is a position in sft.seeds. seeds: length of sft.seeds."""
    require(position < seeds, f"{key}: there is no seed-{position}; sft.seeds has seed-0 to seed-{seeds - 1}")


def with_overrides(section: Any, overrides: Mapping[str, Any], where: str) -> tuple[Any, dict[str, Any]]:
    """A section with those of its settings that `overrides` names changed, and the overrides of other names.

    Raises SalsaError, with the key in `where`, for a value of the wrong type.
    """
    names = {field.name for field in dataclasses.fields(section)}
    own = {name: value for name, value in overrides.items() if name in names}
    content = {**dataclasses.asdict(section), **own}
    try:
        changed = TypeAdapter(type(section)).validate_json(json.dumps(content), strict=True) if own else section
    except ValidationError as error:
        key, message = explain_validation_error(dict(error.errors(include_url=False)[0]))
        raise SalsaError(f"{where}.{key}: {message}") from None
    return changed, {name: value for name, value in overrides.items() if name not in names}
