"""Expansion of `sweep:` and `search:` into policies.

A sweep makes policies that differ in one number. A search trains each policy at several KL coefficients and picks the
candidate with the highest win rate, as the paper does for each method. Both add their policies to `policies` before the
recipe is checked. A searched policy in `evaluate.pairs` stands for the picked candidate. The win rate of a picked
candidate is biased upwards on the questions of the search, as the report says; `search.questions` can limit the search
to some sets. To add a sweep, add a function and an entry of SWEEPS. Imports no torch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from salsa_peft.config.fields import MAX_POLICIES, SEED, is_number, join_keys, require_seed, require_unique
from salsa_peft.config.policies.search import SEED_0
from salsa_peft.config.references import parse_reference
from salsa_peft.config.schema import SFT
from salsa_peft.utils.errors import SalsaError, require
from salsa_peft.utils.messages import did_you_mean, number_in_name, short

if TYPE_CHECKING:
    from salsa_peft.config.schema import Recipe


ReferenceValues = Iterator[Any]
"""Values of a policy's `reference:`, one for each number of a sweep."""


def alpha(where: str, values: list[float], seeds: int, members: Any = (0, 1)) -> ReferenceValues:
    """References θ = (1 − α) θ_a + α θ_b of two seeds (paper, Figure 4a); at α = 0 or 1, one seed's model."""
    two = isinstance(members, list | tuple) and len(members) == 2 and members[0] != members[1]
    require(
        two and all(_is_seed(member, seeds) for member in members),
        f"{where}.members: must be two different positions 0 to {seeds - 1} of sft.seeds, not {short(members)}",
    )
    a, b = members
    for value in values:
        ends = {0.0: f"seed-{a}", 1.0: f"seed-{b}"}
        weights = [round(1 - value, 12), value]  # 0.1 for α 0.9, not 0.09999999999999998
        yield ends.get(value, {"soup": {"members": [a, b], "weights": weights}})


def members(where: str, values: list[float], seeds: int) -> ReferenceValues:
    """Uniform soups of the first n seeds (paper, Figure 5); n = 1 is seed-0."""
    for value in values:
        require(
            value in range(1, seeds + 1),
            f"{where}.values: must be whole numbers from 1 to {seeds}, the number of seeds in sft.seeds, not {value:g}",
        )
        count = int(value)
        yield "seed-0" if count == 1 else {"soup": {"members": list(range(count))}}


def kl_coef(where: str, values: list[float], seeds: int, reference: Any = "soup") -> ReferenceValues:
    """Yield the same reference once for each KL coefficient in `values` (paper, A.4)."""
    for parsed in parse_reference(f"{where}.reference", reference):
        for seed in filter(None, map(SEED.match, parsed.reads)):
            require_seed(f"{where}.reference", int(seed[1]), seeds)
    for value in values:
        require(value >= 0, f"{where}.values: must be at least 0, not {value:g}")
        yield reference


def scale(where: str, values: list[float], seeds: int, seed: Any = 0) -> ReferenceValues:
    """References base + λ·δ with the delta δ of one seed, as a control."""
    fits = _is_seed(seed, seeds)
    require(fits, f"{where}.seed: must be a position 0 to {seeds - 1} of sft.seeds, not {short(seed)}")
    return ({"shrunk": {"seed": seed, "scale": value}} for value in values)


SWEEPS: dict[str, tuple[Callable[..., ReferenceValues], tuple[str, ...]]] = {
    "alpha": (alpha, ("members",)),
    "members": (members, ()),
    "kl_coef": (kl_coef, ("reference",)),
    "scale": (scale, ("seed",)),
}
"""Kind of sweep → (function that makes its references, its keys besides values and kl_coef)."""
NAME_PREFIX = {"kl_coef": "kl"}
"""Kind of sweep → prefix of its policies' names, if the prefix is not the kind itself."""


def expand_sweeps(data: dict[str, Any]) -> dict[str, Any]:
    """A recipe's settings with `sweep` expanded into `policies`. Raises a SalsaError that names the key."""
    sweeps = data.get("sweep", {})
    require(
        isinstance(sweeps, dict),
        f"sweep: must be a mapping such as {{alpha: {{values: [0, 0.5, 1]}}}}, not {short(sweeps)}",
    )
    rest = {key: value for key, value in data.items() if key != "sweep"}
    policies, sft = data.get("policies", {}), data.get("sft", {})
    seeds = sft.get("seeds", SFT().seeds) if isinstance(sft, dict) else None
    if not (sweeps and isinstance(policies, dict) and isinstance(seeds, list) and seeds):  # the schema reports these
        return rest
    expanded = dict(policies)
    for kind, options in sweeps.items():
        for name, policy in _policies(kind, options, len(seeds)):
            other = expanded.get(name, policy)
            require(
                isinstance(other, dict) and {"kl_coef": None, **other} == {"kl_coef": None, **policy},
                f"sweep.{kind}: makes a policy {name}, but there is a different policy {name} already; rename that policy",
            )
            expanded[name] = policy
    return {**rest, "policies": expanded}


def _policies(kind: str, given: Any, seeds: int) -> Iterator[tuple[str, dict[str, Any]]]:
    where = join_keys("sweep", kind)
    if kind not in SWEEPS:
        raise SalsaError(f"{where}: unknown sweep; {did_you_mean(kind, list(SWEEPS), 'sweeps')}")
    make, options = SWEEPS[kind]
    known = ["values", *options] + ([] if kind == "kl_coef" else ["kl_coef"])
    require(isinstance(given, dict), f"{where}: must be a mapping {{values: […]}}, not {short(given)}")
    for key in given:
        if key not in known:
            raise SalsaError(f"{join_keys(where, key)}: unknown key; {did_you_mean(key, known)}")
    values = _numbers(f"{where}.values", given.get("values"))
    several, betas = _kl_coefs(f"{where}.kl_coef", given.get("kl_coef"))
    require(
        len(values) * len(betas) <= MAX_POLICIES,
        f"{where}: {len(values)} values × {len(betas)} KL coefficients are more than {MAX_POLICIES} policies; use"
        " fewer",
    )
    references = make(where, values, seeds, **{key: given[key] for key in options if key in given})
    for value, reference in zip(values, references, strict=True):
        name = f"{NAME_PREFIX.get(kind, kind)}-{number_in_name(value)}"
        for beta in [value] if kind == "kl_coef" else betas:
            own = {} if beta is None else {"kl_coef": beta}
            yield (f"{name}-kl-{number_in_name(beta or 0.0)}" if several else name), {"reference": reference, **own}


def _kl_coefs(where: str, value: Any) -> tuple[bool, list[float] | list[None]]:
    """Whether policy names include the KL coefficient, and the coefficients ([None]: ppo.kl_coef)."""
    if value is None:
        return False, [None]
    several = isinstance(value, list)
    require(several or is_number(value), f"{where}: must be a number or a list of numbers, not {short(value)}")
    betas = _numbers(where, value if several else [value])
    require(min(betas) >= 0, f"{where}: must be at least 0, not {min(betas):g}")
    return several, betas


def _numbers(where: str, value: Any) -> list[float]:
    require(value is not None, f"{where}: is required; give a list of numbers")
    fits = isinstance(value, list) and bool(value) and all(is_number(number) for number in value)
    require(fits, f"{where}: must be a list of numbers, not {short(value)}")
    numbers = [float(number) + 0.0 for number in value]  # −0 becomes 0
    require_unique(where, numbers)
    return numbers


def _is_seed(value: Any, seeds: int) -> bool:
    return type(value) is int and 0 <= value < seeds


Pairs = list[tuple[str, str]]


def expand_search(data: dict[str, Any]) -> dict[str, Any]:
    """A recipe's settings with each searched policy replaced by its candidates. Raises SalsaError.

    A saved recipe has the candidates already and is returned unchanged. Values of the wrong type are left for the schema to
    report.
    """
    search, policies = data.get("search"), data.get("policies", {})
    if not isinstance(search, dict) or not isinstance(policies, dict):
        return data
    betas = search.get("kl_coef")
    if not isinstance(betas, list) or not betas or any(not is_number(beta) or beta < 0 for beta in betas):
        return data
    betas = [float(beta) for beta in betas]
    require_unique("search.kl_coef", betas)
    require(
        len(policies) * len(betas) <= MAX_POLICIES,
        f"search.kl_coef: {len(betas)} coefficients × {len(policies)} policies are more than {MAX_POLICIES} policies;"
        " use fewer",
    )
    methods = search.get("methods") or list(policies)
    if not isinstance(methods, list) or not all(isinstance(method, str) for method in methods):
        return data
    for method in methods:
        known = method in policies or all(name in policies for name in _candidate_names(method, betas))
        require(
            known,
            f"search.methods: there is no policy {short(method)}; {did_you_mean(method, list(policies), 'policies')}",
        )
    expanded: dict[str, Any] = {}
    for name, policy in policies.items():
        candidates = _candidate_names(name, betas) if name in methods and isinstance(policy, dict) else {}
        for candidate, beta in candidates.items():
            require(
                candidate not in policies,
                f"search: the candidate of {name} with kl_coef {beta:g} gets the name {candidate}, but `policies` has"
                " a policy of that name; rename that policy",
            )
            expanded[candidate] = {**policy, "kl_coef": beta}
        if not candidates:
            expanded[name] = policy
    return {**data, "policies": expanded, "search": {**search, "methods": methods}}


def _candidate_names(method: str, betas: Iterable[float]) -> dict[str, float]:
    return {f"{method}-kl-{number_in_name(beta)}": beta for beta in betas}


def candidates(recipe: Recipe) -> dict[str, dict[str, float]]:
    """Searched policy → the names of its candidates and their KL coefficients; {} without a search."""
    search = recipe.search
    return {} if search is None else {method: _candidate_names(method, search.kl_coef) for method in search.methods}


def check_search(recipe: Recipe, models: Sequence[str]) -> None:
    """Raise SalsaError for a search without its judge or with a bad `against`. models: evaluated models."""
    if (search := recipe.search) is None:
        return
    require(
        search.by != "judge" or recipe.evaluate.judge is not None,
        "search.by: judge needs evaluate.judge; add evaluate.judge, or set search.by=reward",
    )
    require(
        search.against in models,
        f"search.against: {short(search.against)} is not an evaluated model;"
        f" {did_you_mean(search.against, list(models), 'models')}",
    )
    require(
        all(search.against not in names for names in candidates(recipe).values()),
        f"search.against: {short(search.against)} is a candidate of the search; name a model that is not a candidate,"
        f" such as {SEED_0}",
    )


def candidate_pairs(recipe: Recipe) -> Pairs:
    """Pairs of a candidate and search.against, whose comparisons decide which candidate is picked."""
    return [(name, recipe.search.against) for names in candidates(recipe).values() for name in names if recipe.search]


def compared_pairs(recipe: Recipe) -> Pairs:
    """evaluate.pairs, or by default soup and policies against seed-0 and all pairs of policies.

    A searched policy has its own name in the pairs, until `with_picked` puts the picked candidate there.
    """
    if recipe.evaluate.pairs:
        return [(a, b) for a, b in recipe.evaluate.pairs]
    of = {name: method for method, names in candidates(recipe).items() for name in names}
    policies = list(dict.fromkeys(of.get(name, name) for name in recipe.policies))
    return [(name, SEED_0) for name in ["soup", *policies]] + [(b, a) for a, b in itertools.combinations(policies, 2)]


def pick_candidates(
    recipe: Recipe, rates: Mapping[str, Mapping[str, Any]], sets: Sequence[str]
) -> dict[str, Any] | None:
    """For each searched policy, pick the first candidate with the highest adjusted win rate.

    rates: candidate → {adjusted_win_rate, low, high} against search.against. Returns None without a search.
    """
    if (search := recipe.search) is None:
        return None
    methods = {}
    for method, names in candidates(recipe).items():
        tried: list[dict[str, Any]] = [
            {"policy": name, "kl_coef": beta} | {key: rates[name][key] for key in ("adjusted_win_rate", "low", "high")}
            for name, beta in names.items()
        ]
        best = max(tried, key=lambda candidate: candidate["adjusted_win_rate"])
        methods[method] = {"best": best["policy"], "tried": tried}
    return {"by": search.by, "datasets": search.questions or list(sets), "against": search.against, "methods": methods}


def with_picked(pairs: Pairs, result: Mapping[str, Any] | None) -> Pairs:
    """Replace searched policies in `pairs` by their picked candidates. result: value of pick_candidates."""
    best = {method: found["best"] for method, found in (result or {"methods": {}})["methods"].items()}
    named = ((best.get(a, a), best.get(b, b)) for a, b in pairs)
    return list(dict.fromkeys(pair for pair in named if pair[0] != pair[1]))
