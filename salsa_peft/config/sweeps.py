"""`sweep:` and `search:` expanded into policies.

A sweep makes policies that differ in one number; a new one is one function, one row of SWEEPS and one test. A search trains each policy at
several KL coefficients, and the one of highest win rate stands for it (the paper picks each method's β so). The candidates are written into
`policies` before the recipe is checked. `evaluate.pairs` may name a policy that is searched: it then means the candidate that was picked.
Picked and reported on the same questions a win rate is flattered; the report says so, and `questions` can name a set of its own. Imports no torch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from salsa_peft.config.fields import MOST_POLICIES
from salsa_peft.config.options.search import SEED_0
from salsa_peft.config.references import parse_reference
from salsa_peft.config.schema import SFT
from salsa_peft.utils.errors import SalsaError, require
from salsa_peft.utils.messages import did_you_mean, number_in_name, short

if TYPE_CHECKING:
    from salsa_peft.config.schema import Recipe


References = Iterator[Any]
"""What `reference:` says, one for each value."""


def alpha(where: str, values: list[float], seeds: int, members: Any = (0, 1)) -> References:
    """θ = (1 − α) θ_a + α θ_b of two seeds as the reference (paper, Figure 4a); at the ends a seed itself."""
    two = isinstance(members, list | tuple) and len(members) == 2 and members[0] != members[1]
    require(
        two and all(_is_seed(member, seeds) for member in members),
        f"{where}.members: found {short(members)}, expected two different positions 0 to {seeds - 1} of sft.seeds",
    )
    a, b = members
    for value in values:
        ends = {0.0: f"seed-{a}", 1.0: f"seed-{b}"}
        weights = [round(1 - value, 12), value]  # 0.1 beside 0.9, not 0.09999999999999998
        yield ends.get(value, {"soup": {"members": [a, b], "weights": weights}})


def members(where: str, values: list[float], seeds: int) -> References:
    """The uniform soup of the first n seeds as the reference (Figure 5); of one seed it is PPO."""
    for value in values:
        require(
            value in range(1, seeds + 1),
            f"{where}.values: found {value:g}, expected whole numbers 1 to {seeds}, the seeds in sft.seeds",
        )
        count = int(value)
        yield "seed-0" if count == 1 else {"soup": {"members": list(range(count))}}


def kl_coef(where: str, values: list[float], seeds: int, reference: Any = "soup") -> References:
    """One reference at several KL coefficients (A.4)."""
    for parsed in parse_reference(f"{where}.reference", reference):
        for member in parsed.members:
            require(
                member < seeds,
                f"{where}.reference: found seed-{member}, expected seed-0 to seed-{seeds - 1}: positions in sft.seeds",
            )
    for value in values:
        require(value >= 0, f"{where}.values: found {value:g}, expected numbers of at least 0")
        yield reference


def scale(where: str, values: list[float], seeds: int, seed: Any = 0) -> References:
    """The control: base + λ·δ of one seed as the reference."""
    fits = _is_seed(seed, seeds)
    require(fits, f"{where}.seed: found {short(seed)}, expected a position 0 to {seeds - 1} of sft.seeds")
    return ({"shrunk": {"seed": seed, "scale": value}} for value in values)


SWEEPS: dict[str, tuple[Callable[..., References], tuple[str, ...]]] = {
    "alpha": (alpha, ("members",)),
    "members": (members, ()),
    "kl_coef": (kl_coef, ("reference",)),
    "scale": (scale, ("seed",)),
}
"""Kind → (what makes its references, what it takes besides values and kl_coef)."""
PREFIX = {"kl_coef": "kl"}
"""Of the policies' names, where it is not the kind."""


def expand(data: dict[str, Any]) -> dict[str, Any]:
    """A recipe's departures with `sweep` written into `policies`. Raises SalsaError that names the key."""
    sweeps = data.get("sweep", {})
    require(
        isinstance(sweeps, dict), f"sweep: found {short(sweeps)}, expected kinds such as alpha: {{values: [0, 0.5, 1]}}"
    )
    rest = {key: value for key, value in data.items() if key != "sweep"}
    policies, seeds = data.get("policies", {}), _seeds(data.get("sft", {}))
    if not sweeps or not isinstance(policies, dict) or seeds is None:  # the schema refuses what else these two may be
        return rest
    made = dict(policies)
    for kind, given in sweeps.items():
        for name, policy in _policies(kind, given, seeds):
            there = made.get(name, policy)
            require(
                isinstance(there, dict) and {"kl_coef": None, **there} == {"kl_coef": None, **policy},
                f"sweep.{kind}: found a policy {name} among policies that says something else, expected another name for that",
            )
            made[name] = policy
    return {**rest, "policies": made}


def _policies(kind: str, given: Any, seeds: int) -> Iterator[tuple[str, dict[str, Any]]]:
    where = f"sweep.{_plain(kind)}"
    if kind not in SWEEPS:
        raise SalsaError(f"{where}: unknown sweep; {did_you_mean(kind, list(SWEEPS), 'known ones')}")
    make, options = SWEEPS[kind]
    known = ["values", *options] + ([] if kind == "kl_coef" else ["kl_coef"])
    require(isinstance(given, dict), f"{where}: found {short(given)}, expected {{values: […]}}")
    for key in given:
        if key not in known:
            raise SalsaError(f"{where}.{_plain(key)}: unknown key; {did_you_mean(key, known)}")
    values = _numbers(f"{where}.values", given.get("values"))
    several, betas = _betas(f"{where}.kl_coef", given.get("kl_coef"))
    require(
        len(values) * len(betas) <= MOST_POLICIES,
        f"{where}: found {len(values)} values × {len(betas)} KL coefficients, expected at most {MOST_POLICIES} policies; take fewer",
    )
    references = make(where, values, seeds, **{key: given[key] for key in options if key in given})
    for value, reference in zip(values, references, strict=True):
        name = f"{PREFIX.get(kind, kind)}-{number_in_name(value)}"
        for beta in [value] if kind == "kl_coef" else betas:
            own = {} if beta is None else {"kl_coef": beta}
            yield (f"{name}-kl-{number_in_name(beta or 0.0)}" if several else name), {"reference": reference, **own}


def _betas(where: str, value: Any) -> tuple[bool, list[float] | list[None]]:
    """Whether there are several, so that names say which, and the KL coefficients; [None] is ppo.kl_coef."""
    if value is None:
        return False, [None]
    several = isinstance(value, list)
    expected = "a number or a list of numbers"
    betas = _numbers(where, value if several else [value], expected, value)
    require(min(betas) >= 0, f"{where}: found {short(value)}, expected at least 0")
    return several, betas


def _numbers(where: str, value: Any, expected: str = "a list of numbers", shown: Any = None) -> list[float]:
    found = f"{where}: found {'nothing' if value is None else short(shown or value)}, expected"
    fits = isinstance(value, list) and bool(value)
    require(fits and all(type(one) in (int, float) and abs(one) < 1e300 for one in value), f"{found} {expected}")
    numbers = [float(one) + 0.0 for one in value]  # −0 is 0
    require(len(set(numbers)) == len(numbers), f"{found} no number twice")
    return numbers


def _seeds(sft: Any) -> int | None:
    """How many seeds a recipe's `sft:` has; None where it says something else."""
    seeds = sft.get("seeds", SFT().seeds) if isinstance(sft, dict) else None
    return len(seeds) if isinstance(seeds, list) and seeds else None


def _is_seed(value: Any, seeds: int) -> bool:
    return type(value) is int and 0 <= value < seeds


def _plain(key: str) -> str:
    return key if key.isprintable() and len(key) <= 80 else short(key)


Pairs = list[tuple[str, str]]


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
            f"search.methods: found {short(method)}, which is no policy; {did_you_mean(method, list(policies), 'policies')}",
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
    return {f"{method}-kl-{number_in_name(beta)}": beta for beta in betas}


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
        f"search.against: found {short(section.against)}, expected what answers; {did_you_mean(section.against, list(models), 'models')}",
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
