"""`search:` → each policy at several KL coefficients, of which the one of highest win rate stands for it (the paper takes for each method that β).

    search: {kl_coef: [0.01, 0.05, 0.2], by: judge}    # ppo → ppo-kl-0.01, ppo-kl-0.05, ppo-kl-0.2; salsa → …

The candidates are written into `policies` before the recipe is checked, as sweeps are; `evaluate.pairs` may name a policy that is searched, and
means the candidate that was picked. Picked and reported on the same questions a win rate is flattered: the report says so, and `questions`
can name a set of its own. Imports no torch.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from salsa_peft.fields import MOST_POLICIES, STRICT, NonNegative
from salsa_peft.utils.errors import require
from salsa_peft.utils.messages import name_number, nearest, short

if TYPE_CHECKING:
    from salsa_peft.config import Recipe

Pairs = list[tuple[str, str]]
SEED_0 = "seed-0"


@dataclass(config=STRICT, kw_only=True)
class Search:
    """Which KL coefficients are tried, and who picks."""

    kl_coef: Annotated[list[NonNegative], Field(min_length=1)]
    """β at the start, of each candidate."""
    by: Literal["reward", "judge"] = "reward"
    """What the win rates come from: the recipe's reward, or evaluate.judge (the paper)."""
    methods: list[str] = dataclasses.field(default_factory=list)
    """Policies that are searched. Empty: all of them."""
    against: str = SEED_0
    """Whom the candidates are compared with."""
    questions: list[str] = dataclasses.field(default_factory=list)
    """Which of evaluate.prompts pick, all their questions together. Empty: all."""


def expand_search(data: dict[str, Any]) -> dict[str, Any]:
    """A recipe's departures with the candidates in `policies`, in the place of what is searched. Raises SalsaError that names the key.

    A recipe as it ran, which has the candidates and names the methods, stays as it is; what the schema refuses is left to it.
    """
    given, policies = data.get("search"), data.get("policies", {})
    if not isinstance(given, dict) or not isinstance(policies, dict) or not _are_numbers(given.get("kl_coef")):
        return data
    betas = [float(beta) for beta in given["kl_coef"]]
    require(len(set(betas)) == len(betas), f"search.kl_coef: found {short(given['kl_coef'])}, expected no number twice")
    require(
        len(policies) * len(betas) <= MOST_POLICIES,
        f"search.kl_coef: found {len(betas)} numbers for {len(policies)} policies, expected at most {MOST_POLICIES} in all; take fewer",
    )
    methods = given.get("methods") or list(policies)
    if not isinstance(methods, list) or not all(isinstance(method, str) for method in methods):
        return data
    for method in methods:
        there = method in policies or all(name in policies for name in _candidate_names(method, betas))
        require(
            there,
            f"search.methods: found {short(method)}, which is no policy; {nearest(method, list(policies), 'policies')}",
        )
    made: dict[str, Any] = {}
    for name, policy in policies.items():
        candidates = _candidate_names(name, betas) if name in methods and isinstance(policy, dict) else {}
        for candidate, beta in candidates.items():
            require(
                candidate not in policies,
                f"search: found a policy {candidate} among policies, which {name} at β {beta:g} would be called; expected another name",
            )
            made[candidate] = {**policy, "kl_coef": beta}
        if not candidates:
            made[name] = policy
    return {**data, "policies": made, "search": {**given, "methods": methods}}


def _are_numbers(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(one) in (int, float) for one in value)


def _candidate_names(method: str, betas: Iterable[float]) -> dict[str, float]:
    return {f"{method}-kl-{name_number(beta)}": beta for beta in betas}


def candidates(recipe: Recipe) -> dict[str, dict[str, float]]:
    """Searched policy → its candidates and their β; {} without a search."""
    section = recipe.search
    return {} if section is None else {method: _candidate_names(method, section.kl_coef) for method in section.methods}


def check_search(recipe: Recipe, models: Sequence[str], sets: Sequence[str]) -> None:
    """Raise SalsaError where a search has no judge, no opponent or no questions. models: what answers; sets: names of evaluate.prompts."""
    section = recipe.search
    if section is None:
        return
    judged = section.by != "judge" or recipe.evaluate.judge is not None
    require(judged, "search.by: found judge and no evaluate.judge, expected one; or set search.by=reward")
    require(
        section.against in models,
        f"search.against: found {short(section.against)}, expected what answers; {nearest(section.against, list(models), 'models')}",
    )
    own = [name for names in candidates(recipe).values() for name in names]
    require(
        section.against not in own,
        f"search.against: found {short(section.against)}, which is a candidate itself, expected another, such as {SEED_0}",
    )
    for name in section.questions:
        require(
            name in sets, f"search.questions: found {short(name)}, expected some of evaluate.prompts: {', '.join(sets)}"
        )


def trials(recipe: Recipe) -> Pairs:
    """Every candidate against the opponent: what is picked by."""
    section = recipe.search
    return (
        [] if section is None else [(name, section.against) for names in candidates(recipe).values() for name in names]
    )


def pairs(recipe: Recipe) -> Pairs:
    """Who is compared with whom: as given, else soup and every policy against seed-0, and every later policy against each earlier one.

    A searched policy is called by its own name, which `picked` replaces.
    """
    if recipe.evaluate.pairs:
        return [(a, b) for a, b in recipe.evaluate.pairs]
    of = {name: method for method, names in candidates(recipe).items() for name in names}
    policies = list(dict.fromkeys(of.get(name, name) for name in recipe.policies))
    return [(name, SEED_0) for name in ["soup", *policies]] + [(b, a) for a, b in itertools.combinations(policies, 2)]


def pick(recipe: Recipe, rates: Mapping[str, Mapping[str, Any]], sets: Sequence[str]) -> dict[str, Any] | None:
    """The candidate of highest adjusted win rate for each searched policy, and what was tried; of equals the first. None without a search.

    rates: candidate → {adjusted_win_rate, low, high} against the opponent.
    """
    section = recipe.search
    if section is None:
        return None
    methods = {}
    for method, names in candidates(recipe).items():
        tried: list[dict[str, Any]] = [
            {"policy": name, "kl_coef": beta} | {key: rates[name][key] for key in ("adjusted_win_rate", "low", "high")}
            for name, beta in names.items()
        ]
        best = max(tried, key=lambda one: one["adjusted_win_rate"])
        methods[method] = {"best": best["policy"], "tried": tried}
    return {
        "by": section.by,
        "datasets": section.questions or list(sets),
        "against": section.against,
        "methods": methods,
    }


def picked(compared: Pairs, found: Mapping[str, Any] | None) -> Pairs:
    """Pairs with the picked candidate in the place of each searched policy, none twice."""
    best = {method: told["best"] for method, told in (found or {"methods": {}})["methods"].items()}
    named = ((best.get(a, a), best.get(b, b)) for a, b in compared)
    return list(dict.fromkeys(pair for pair in named if pair[0] != pair[1]))


def spread(compared: Pairs, recipe: Recipe) -> Pairs:
    """Pairs with every candidate in the place of each searched policy."""
    of = candidates(recipe)
    return [(x, y) for a, b in compared for x in of.get(a, [a]) for y in of.get(b, [b]) if x != y]
