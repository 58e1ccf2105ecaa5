"""What the results of a run are called: soup, reward, seed-N, a policy's name → the unit that makes it."""

from __future__ import annotations

from salsa_peft.config import Recipe
from salsa_peft.utils.errors import require
from salsa_peft.utils.messages import nearest, short


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
        f"{short(name)}: found no such result, expected one of this recipe; {nearest(name, known, 'results')}",
    )
    return ("seed", f"sft/{name}") if name in seeds else (name, name)
