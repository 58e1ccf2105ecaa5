"""A recipe's units of work by stage: the inputs of each unit, and the fields of its cache key.

The key fields of a unit are the settings that its result depends on. All other settings can change without running the
unit again: `evaluate` is in no policy's key (except the prompts that ppo.eval_prompts names); `name`, `description` and
`threads` are in no key at all. For local files and folders, the key has the content and not the path. It also has the
versions of the libraries that the unit uses, and of no others.
"""

from collections.abc import Iterable

from salsa_peft.config.job import Unit
from salsa_peft.recipe.units.data import (
    data_units,
    reward_quality_units,
    reward_units,
    sft_units,
    synthetic_units,
    toy_units,
)
from salsa_peft.recipe.units.models import POLICY_UNITS, further_soup_units, policy_units, soup_units
from salsa_peft.recipe.units.results import evaluate_units, hub_units, judge_units, landscape_units, report_units

__all__ = [
    "POLICY_UNITS",
    "data_units",
    "evaluate_units",
    "further_soup_units",
    "hub_units",
    "in_order",
    "judge_units",
    "landscape_units",
    "policy_units",
    "report_units",
    "reward_quality_units",
    "reward_units",
    "sft_units",
    "soup_units",
    "synthetic_units",
    "toy_units",
]


def in_order(units: Iterable[Unit]) -> list[Unit]:
    """The units sorted so that each comes after its inputs; otherwise their order stays."""
    of = {unit.id: unit for unit in units}
    found: dict[str, Unit] = {}

    def add(unit: Unit) -> None:
        for name in unit.inputs:
            if name in of and name not in found:
                add(of[name])
        found[unit.id] = unit

    for unit in of.values():
        if unit.id not in found:
            add(unit)
    return list(found.values())
