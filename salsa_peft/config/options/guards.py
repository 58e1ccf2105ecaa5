"""The recipe's `ppo.guards`: default limits and actions of the guards in training/ppo/guards/.

Imports no torch.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

from salsa_peft.utils.errors import SalsaError, require
from salsa_peft.utils.messages import did_you_mean, short

Action = Literal["off", "warn", "stop"]


class GuardDefault(NamedTuple):
    """Default limit and action of a guard."""

    limit: float
    action: Action = "warn"
    largest: float = math.inf
    """Largest limit that a recipe may set."""


DEFAULTS: dict[str, GuardDefault] = {
    "empty": GuardDefault(0.5, largest=1),
    "collapse": GuardDefault(0.5, "stop", largest=1),
    "distinct": GuardDefault(0.25, largest=1),
    "length": GuardDefault(0.25, largest=1),
    "length_high": GuardDefault(2.0),
    "unfinished": GuardDefault(0.5, largest=1),
    "repetition": GuardDefault(0.5, largest=1),
    "entropy_low": GuardDefault(0.1, largest=1),
    "entropy_high": GuardDefault(1.5),
    "kl_coef": GuardDefault(0.01, largest=1),
    "negative_kl": GuardDefault(1.0),
    "kl": GuardDefault(60.0, "off"),
    "kl_per_token": GuardDefault(1.0),
    "over_optimization": GuardDefault(5.0),
    "between_prompts": GuardDefault(0.45, largest=1),
}
"""Defaults of each guard in GUARDS (training/ppo/guards/monitor.py); the checks' docstrings in checks.py give the reasons."""


class GuardSetting(NamedTuple):
    """Action and limit of a guard in a run."""

    action: Action
    limit: float


def parse_guards(guards: Mapping[str, Any], where: str = "guards") -> dict[str, GuardSetting]:
    """Parse `guards` into a setting for every guard. Raises a SalsaError that starts with `where`."""
    require(isinstance(guards, Mapping), f"{where}: must be a mapping such as {{length: stop}}, not {short(guards)}")
    for name in guards:
        if name not in DEFAULTS:
            raise SalsaError(f"{where}: unknown guard {short(name)}; {did_you_mean(str(name), [*DEFAULTS], 'guards')}")
    return {
        name: _setting(guards.get(name, guard.action), guard, f"{where}.{name}") for name, guard in DEFAULTS.items()
    }


def _setting(value: Any, guard: GuardDefault, where: str) -> GuardSetting:
    """Parse off | warn | stop, or {action, limit}. With a limit alone, the action is the default; of `off` it is warn."""
    if not isinstance(value, Mapping):
        return GuardSetting(_action(value, where), guard.limit)
    for key in value:
        require(key in ("action", "limit"), f"{where}: unknown key {short(key)}; the keys are action and limit")
    require(len(value) > 0, f"{where}: is empty; give an action, a limit or both")
    limit = value.get("limit", guard.limit)
    bound = "of at least 0" if guard.largest == math.inf else f"from 0 to {guard.largest:g}"
    require(
        isinstance(limit, int | float) and not isinstance(limit, bool) and 0 <= limit <= guard.largest and limit < math.inf,
        f"{where}.limit: must be a number {bound}, not {short(limit)}",
    )  # fmt: skip
    action = value.get("action", "warn" if guard.action == "off" else guard.action)
    return GuardSetting(_action(action, f"{where}.action"), float(limit))


def _action(value: Any, where: str) -> Action:
    if value is False:  # `off`, as YAML 1.1 reads it
        return "off"
    require(
        isinstance(value, str) and value in get_args(Action), f"{where}: must be off, warn or stop, not {short(value)}"
    )
    return value
