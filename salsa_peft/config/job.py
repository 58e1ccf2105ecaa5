"""Unit and Job, what a stage is given; and what the results of a run are called. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from salsa_peft.config.schema import Recipe
from salsa_peft.utils.errors import require
from salsa_peft.utils.messages import did_you_mean, short

if TYPE_CHECKING:
    from salsa_peft.config.schema import Recipe


@dataclass(frozen=True, kw_only=True)
class Unit:
    """One piece of work with a result of its own: a seed, the soup, a policy."""

    stage: str
    name: str
    """Of the piece: seed-0, salsa; the stage's own name where it has one piece only."""
    run: str
    """The function that does it: "salsa_peft.training.sft:run", run(job) → facts."""
    inputs: tuple[str, ...] = ()
    """Ids of units whose results it reads."""
    slice: dict[str, Any] = field(default_factory=dict)
    """The part of the resolved recipe that the result depends on, JSON-able, local paths out (they are in `files`)."""
    files: tuple[str, ...] = ()
    """Local files and folders whose content counts."""
    several: bool = False
    """Whether its stage is one of several pieces (sft, ppo), also where there is only one now."""

    @property
    def id(self) -> str:
        """sft/seed-0, or soup."""
        return f"{self.stage}/{self.name}" if self.several else self.stage


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a stage function is given."""

    recipe: Recipe
    unit: Unit
    folder: Path
    """Where the result goes; empty at the start."""
    inputs: dict[str, Path]
    """Unit id → its finished folder."""
    recipe_yaml: str
    """The resolved recipe, for the report and the cards."""


def policy_id(recipe: Recipe, name: str) -> str:
    """The unit that trains a policy: ppo/salsa, dpo/salsa-dpo."""
    return f"{recipe.policies[name].algorithm}/{name}"


def unit_of(recipe: Recipe, name: str) -> tuple[str, str]:
    """What a result of that name is (soup | policy | seed | reward), and the unit that makes it. Raises SalsaError with the nearest name."""
    if name in recipe.policies:
        return "policy", policy_id(recipe, name)
    seeds = [f"seed-{position}" for position in range(len(recipe.sft.seeds))]
    known = ["soup", *recipe.policies, *seeds, *(["reward"] if recipe.reward.trained else [])]
    require(
        name in known,
        f"{short(name)}: found no such result, expected one of this recipe; {did_you_mean(name, known, 'results')}",
    )
    return ("seed", f"sft/{name}") if name in seeds else (name, name)
