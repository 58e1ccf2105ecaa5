"""`sweep:` → policies that differ in one number. A new sweep is one function, one row of SWEEPS and one test.

    sweep:
      alpha: {values: [0, 0.25, 0.5, 0.75, 1], kl_coef: [0.01, 0.05]}    # alpha-0-kl-0.01, alpha-0-kl-0.05, alpha-0.25-kl-0.01 …

They are written into `policies` before the recipe is checked, so that everything behind it knows policies alone. Left out: sweeps over
other sections, which are other recipes. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from salsa_peft.config import SFT
from salsa_peft.fields import MOST_POLICIES
from salsa_peft.reference_kinds import parse_reference
from salsa_peft.utils.errors import SalsaError, require
from salsa_peft.utils.messages import name_number, nearest, short

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
        raise SalsaError(f"{where}: unknown sweep; {nearest(kind, list(SWEEPS), 'known ones')}")
    make, options = SWEEPS[kind]
    known = ["values", *options] + ([] if kind == "kl_coef" else ["kl_coef"])
    require(isinstance(given, dict), f"{where}: found {short(given)}, expected {{values: […]}}")
    for key in given:
        if key not in known:
            raise SalsaError(f"{where}.{_plain(key)}: unknown key; {nearest(key, known)}")
    values = _numbers(f"{where}.values", given.get("values"))
    several, betas = _betas(f"{where}.kl_coef", given.get("kl_coef"))
    require(
        len(values) * len(betas) <= MOST_POLICIES,
        f"{where}: found {len(values)} values × {len(betas)} KL coefficients, expected at most {MOST_POLICIES} policies; take fewer",
    )
    references = make(where, values, seeds, **{key: given[key] for key in options if key in given})
    for value, reference in zip(values, references, strict=True):
        name = f"{PREFIX.get(kind, kind)}-{name_number(value)}"
        for beta in [value] if kind == "kl_coef" else betas:
            own = {} if beta is None else {"kl_coef": beta}
            yield (f"{name}-kl-{name_number(beta or 0.0)}" if several else name), {"reference": reference, **own}


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
