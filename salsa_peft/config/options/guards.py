"""The recipe's `ppo.guards`: which guards there are, their default limits and actions. What each looks at is in training/ppo/guards.py. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

from salsa_peft.utils.errors import SalsaError, require
from salsa_peft.utils.messages import did_you_mean, short

Action = Literal["off", "warn", "stop"]


class GuardDefault(NamedTuple):
    """A row of DEFAULTS."""

    limit: float
    action: Action = "warn"
    largest: float = math.inf
    """The largest limit that a recipe may set."""


DEFAULTS: dict[str, GuardDefault] = {
    "empty": GuardDefault(0.5, largest=1),
    "length": GuardDefault(0.25, largest=1),
    "repetition": GuardDefault(0.5, largest=1),
    "entropy_low": GuardDefault(0.1, largest=1),
    "entropy_high": GuardDefault(1.5),
    "kl_coef": GuardDefault(0.01, largest=1),
    "negative_kl": GuardDefault(1.0),
    "kl": GuardDefault(60.0, "off"),
}
"""One row for each of guards.GUARDS."""


class Setting(NamedTuple):
    """What a recipe says of a guard."""

    action: Action
    limit: float


def parse(guards: Mapping[str, Any], where: str = "guards") -> dict[str, Setting]:
    """A recipe's `guards` → a setting for every guard. Raises SalsaError, beginning with `where` and the guard's name."""
    require(isinstance(guards, Mapping), f"{where}: found {short(guards)}, expected a mapping such as {{length: stop}}")
    for name in guards:
        if name not in DEFAULTS:
            raise SalsaError(
                f"{where}: found {short(name)}, expected a guard; {did_you_mean(str(name), [*DEFAULTS], 'guards')}"
            )
    return {
        name: _setting(guards[name], guard, f"{where}.{name}") if name in guards else Setting(guard.action, guard.limit)
        for name, guard in DEFAULTS.items()
    }


def _setting(found: Any, guard: GuardDefault, where: str) -> Setting:
    """off | warn | stop, or {action, limit}, each of which may be left out: a limit alone warns."""
    if not isinstance(found, Mapping):
        return Setting(_action(found, where), guard.limit)
    for key in found:
        require(key in ("action", "limit"), f"{where}: found the key {short(key)}, expected action or limit")
    require(len(found) > 0, f"{where}: found {{}}, expected action or limit")
    limit = found.get("limit", guard.limit)
    most = "" if guard.largest == math.inf else f" to {guard.largest:g}"
    require(
        isinstance(limit, int | float) and not isinstance(limit, bool) and 0 <= limit <= guard.largest and limit < math.inf,
        f"{where}.limit: found {short(limit)}, expected a number from 0{most}",
    )  # fmt: skip
    return Setting(_action(found.get("action", "warn"), f"{where}.action"), float(limit))


def _action(found: Any, where: str) -> Action:
    if found is False:  # `off` in YAML 1.1
        return "off"
    known = get_args(Action)
    require(isinstance(found, str) and found in known, f"{where}: found {short(found)}, expected {', '.join(known)}")
    return found
