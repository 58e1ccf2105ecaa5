"""The KL term's references: a model of the run (a seed, a policy, a soup), the base, a path, or an EMA of the policy.

To add a kind of reference that is written as a mapping, add a function and an entry of REFERENCE_KINDS.
"""

import dataclasses
import sys
from typing import Any

from pydantic.dataclasses import dataclass

from salsa_peft.config.fields import STRICT, is_number
from salsa_peft.config.options.soup import Soup
from salsa_peft.utils.errors import require
from salsa_peft.utils.messages import short


@dataclass(config=STRICT, kw_only=True)
class Reference:
    """A reference of the KL term: the base plus a weighted sum of models' deltas, or the model at `path`.

    A named model has one member of weight 1. A soup has several members, whose weights sum to 1. `shrunk` has one
    member, with the scale as its weight. `base` has no member. With `norm_of` the delta is scaled to the norm of another
    model's delta.
    """

    label: str
    """Name for plots and logs."""
    members: list[str] = dataclasses.field(default_factory=list)
    """Names of the members: models of the run, or folders and Hub ids, which have a slash; START."""
    weights: list[float] = dataclasses.field(default_factory=list)
    """One weight per member."""
    soup: bool = False
    """Whether this is the recipe's own soup (the output of the soup stage)."""
    path: str | None = None
    """Folder or Hub id of a LoRA adapter of the same base; in a run with full weights, of a checkpoint."""
    sync_every: int | None = None
    """Number of updates between two EMA steps of a soup towards the policy (TR-DPO). None: no such steps."""
    mixup_alpha: float = 0.1
    """α of an EMA step: θ_ref ← (1 − α) θ_ref + α θ_policy."""
    norm_of: str | None = None
    """The model, "soup" or seed-N, to the norm of whose delta this delta is scaled. None: it is not scaled."""

    @property
    def reads(self) -> list[str]:
        """Names of the models of the run that the reference is made from."""
        named = [member for member in self.members if "/" not in member]
        return list(
            dict.fromkeys([*(["soup"] if self.soup else []), *named, *([self.norm_of] if self.norm_of else [])])
        )

    @property
    def paths(self) -> list[str]:
        """Folders and Hub ids of the other models that the reference is made from."""
        return [*(member for member in self.members if "/" in member), *([self.path] if self.path else [])]

    def of_policy(self, start: str) -> "Reference":
        """The reference of a policy that starts at `start`, which takes the place of START among the members."""
        return dataclasses.replace(self, members=[start if member == START else member for member in self.members])


START = "<start>"
"""The member that stands for the policy's start."""
SOUP_NORM = "soup-norm"
"""The scale of `shrunk` with which one seed's delta gets the norm of the recipe's soup."""


def _shrunk(where: str, value: Any) -> Reference:
    options = value if isinstance(value, dict) else {}
    seed, scale = options.get("seed", 0), options.get("scale")
    fits = set(options) <= {"seed", "scale"} and type(seed) is int and seed >= 0
    require(fits, f"{where}.shrunk: must have the form {{seed: N, scale: λ}}, not {short(value)}")
    if scale == SOUP_NORM:
        label = f"shrunk seed-{seed} with the norm of the soup"
        return Reference(label=label, members=[f"seed-{seed}"], weights=[1.0], norm_of="soup")
    require(
        is_number(scale),
        f"{where}.shrunk: scale must be a number such as 0.6, or {SOUP_NORM}, but the value is {short(value)}",
    )
    return Reference(label=f"shrunk {scale:g}·seed-{seed}", members=[f"seed-{seed}"], weights=[float(options["scale"])])


def _stretched(where: str, value: Any) -> Reference:
    """A soup whose delta is scaled to the norm of one seed's delta; without `soup`, the recipe's own soup."""
    options = value if isinstance(value, dict) else {}
    seed = options.get("seed", 0)
    fits = isinstance(value, dict) and set(options) <= {"soup", "seed"} and type(seed) is int and seed >= 0
    require(fits, f"{where}.stretched: must have the form {{soup: {{members, weights}}, seed: N}}, not {short(value)}")
    given = "soup" in options
    soup = _inline_soup(f"{where}.stretched", options["soup"]) if given else Reference(label="soup", soup=True)
    require(
        soup.sync_every is None,
        f"{where}.stretched.soup: sync_every does not work with a soup that is scaled to a norm; remove it",
    )
    return dataclasses.replace(
        soup, label=f"stretched {soup.label} with the norm of seed-{seed}", norm_of=f"seed-{seed}"
    )


def _inline_soup(where: str, value: Any) -> Reference:
    options = dict(value) if isinstance(value, dict) else {}
    sync = _sync_options(where, options)
    suffix = f", moving (every {sync['sync_every']}, α {sync['mixup_alpha']:g})" if sync else ""
    if sync and not options:
        return Reference(label=f"soup{suffix}", soup=True, **sync)
    members, weights = options.get("members", [0, 1]), options.get("weights")
    fits = isinstance(value, dict) and set(options) <= {"members", "weights"} and isinstance(members, list)
    fits = fits and bool(members) and all((type(m) is int and m >= 0) or (isinstance(m, str) and m) for m in members)
    fits = fits and isinstance(weights, list | None) and all(map(is_number, weights or []))
    require(fits, f"{where}.soup: must have the form {{members: [0, 1], weights: [0.5, 0.5]}}, not {short(value)}")
    soup = Soup(members=members, weights=None if weights is None else [float(w) for w in weights])
    soup.check(f"{where}.soup", sys.maxsize)  # config/validate.py checks that the members exist
    label = "soup of " + ", ".join(
        f"{w:g}·{last_part(name)}" for w, name in zip(soup.resolved_weights, soup.names, strict=True)
    )
    return Reference(label=label + suffix, members=soup.names, weights=soup.resolved_weights, **sync)


def _sync_options(where: str, options: dict[str, Any]) -> dict[str, Any]:
    """Remove sync_every and mixup_alpha from a soup's options and return them; {} if the soup has neither."""
    found = {key: options.pop(key) for key in ("sync_every", "mixup_alpha") if key in options}
    every, alpha = found.get("sync_every"), found.get("mixup_alpha", 0.1)
    if not found:
        return {}
    require(
        type(every) is int and every > 0,
        f"{where}.soup.sync_every: must be a whole number of updates of at least 1, not {short(every)}",
    )
    require(
        is_number(alpha) and 0 < alpha <= 1,
        f"{where}.soup.mixup_alpha: must be a number above 0 and at most 1, not {short(alpha)}",
    )
    return {"sync_every": every, "mixup_alpha": float(alpha)}


def _ema(where: str, value: Any) -> Reference:
    """An exponential moving average of the policy, which starts at the policy's start (WARP's anchor)."""
    options: dict[str, Any] = value if isinstance(value, dict) else {}
    decay, every = options.get("decay", -1), options.get("sync_every", 1)
    fits = set(options) <= {"decay", "sync_every"} and type(every) is int and every > 0 and is_number(decay)
    require(
        fits and 0 <= decay < 1,
        f"{where}.ema: must have the form {{decay: 0.99}}, with a decay of at least 0 and below 1 and, if wanted,"
        f" sync_every (a number of updates), not {short(value)}",
    )
    label = f"EMA of the policy (decay {decay:g}" + ("" if every == 1 else f", every {every} updates") + ")"
    return Reference(
        label=label,
        members=[START],
        weights=[1.0],
        sync_every=every,
        mixup_alpha=round(1 - decay, 12),
    )


REFERENCE_KINDS = {"soup": _inline_soup, "shrunk": _shrunk, "stretched": _stretched, "ema": _ema}


ACCEPTED_REFERENCES = "seed-N, base, soup, a policy, {soup: …}, {shrunk: …}, {stretched: …}, {ema: …}"


def parse_reference(where: str, value: Any) -> list[Reference]:
    """Parse a policy's `reference:`. The KLs to several references are averaged.

    A string is base, a model of the run (seed-N, soup, a policy, a soup of `soups`), or a model's folder or Hub id, which
    has a slash. A mapping has one key, which is in REFERENCE_KINDS. A list has such strings and mappings. Raises a
    SalsaError that names the key.
    """
    if isinstance(value, list):
        require(bool(value), f"{where}: is an empty list; name at least one reference")
        return [
            reference for index, entry in enumerate(value) for reference in parse_reference(f"{where}[{index}]", entry)
        ]
    if isinstance(value, dict) and len(value) == 1 and next(iter(value)) in REFERENCE_KINDS:
        kind, options = next(iter(value.items()))
        return [REFERENCE_KINDS[kind](where, options)]
    require(
        isinstance(value, str) and bool(value),
        f"{where}: must be {ACCEPTED_REFERENCES}, an adapter's path or a list of these, not {short(value)}",
    )
    if "/" in value:
        return [Reference(label=last_part(value), path=value)]
    if value in ("base", "soup"):
        return [Reference(label=value, soup=value == "soup")]
    return [Reference(label=value, members=[value], weights=[1.0])]


def last_part(name: str) -> str:
    """The last part of a path or Hub id; a name without a slash as it is."""
    return name.rstrip("/").rsplit("/", 1)[-1]
