"""The soup section, and the references of the KL term: seeds, soups, the base, other adapters.

To add a kind of reference written as a mapping, add a function and a row of REFERENCE_KINDS.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from salsa_peft.config.fields import SEED, STRICT, Count, Positive, is_number, require_unique
from salsa_peft.config.rewards import FUNCTION, check_function
from salsa_peft.utils.errors import require
from salsa_peft.utils.messages import short


def require_seed(key: str, position: int, seeds: int) -> None:
    """Raise SalsaError unless `position` is one of sft.seeds."""
    require(position < seeds, f"{key}: there is no seed-{position}; sft.seeds has seed-0 to seed-{seeds - 1}")


@dataclass(config=STRICT, kw_only=True)
class Soup:
    """A weighted average of seeds: θ = Σ w_i θ_i."""

    members: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] = dataclasses.field(
        default_factory=lambda: [0, 1]
    )
    """Positions in sft.seeds."""
    weights: list[float] | None = None
    """One weight per member; their sum is 1. None: equal weights (½ for two members, the paper's best)."""

    @property
    def resolved_weights(self) -> list[float]:
        """The weights; equal ones if none are given."""
        return self.weights if self.weights is not None else [1 / len(self.members)] * len(self.members)

    def check(self, where: str, seeds: int) -> None:
        """Raise SalsaError for members that are missing or repeated, and for weights that do not fit them."""
        for member in self.members:
            require_seed(f"{where}.members", member, seeds)
        require_unique(f"{where}.members", self.members)
        require(
            len(self.resolved_weights) == len(self.members),
            f"{where}.weights: found {len(self.resolved_weights)} weights for {len(self.members)} members; give one"
            " per member",
        )
        total = sum(self.resolved_weights)
        require(
            abs(total - 1) < 1e-6,
            f"{where}.weights: {short(self.resolved_weights)} sum to {total:g}, not 1; scale them",
        )


@dataclass(config=STRICT, kw_only=True)
class Reference:
    """A reference of the KL term: the base plus a weighted sum of seeds' deltas, or the model at `path`.

    seed-N is one member of weight 1, a soup its members with weights of sum 1, `shrunk` one member with a scale, `base`
    no member.
    """

    label: str
    """Name for plots and logs."""
    members: list[int] = dataclasses.field(default_factory=list)
    """Positions in sft.seeds."""
    weights: list[float] = dataclasses.field(default_factory=list)
    """One per member."""
    soup: bool = False
    """Whether this is the recipe's own soup (the output of the soup stage)."""
    path: str | None = None
    """Folder or Hub id of a LoRA adapter of the same base; with full weights, of a checkpoint."""
    sync_every: int | None = None
    """EMA reference sync of a soup (TR-DPO): updates between two steps towards the policy. None: no sync."""
    mixup_alpha: float = 0.1
    """α of a sync step: θ_ref ← (1 − α) θ_ref + α θ_policy."""


def _shrunk(where: str, value: Any) -> Reference:
    options = value if isinstance(value, dict) else {}
    seed, scale = options.get("seed", 0), options.get("scale")
    fits = set(options) <= {"seed", "scale"} and type(seed) is int and seed >= 0
    require(fits, f"{where}.shrunk: must have the form {{seed: N, scale: λ}}, not {short(value)}")
    require(is_number(scale), f"{where}.shrunk: scale must be a number such as 0.6; found {short(value)}")
    return Reference(label=f"shrunk {scale:g}·seed-{seed}", members=[seed], weights=[float(options["scale"])])


def _inline_soup(where: str, value: Any) -> Reference:
    options = dict(value) if isinstance(value, dict) else {}
    sync = _sync_options(where, options)
    suffix = f", moving (every {sync['sync_every']}, α {sync['mixup_alpha']:g})" if sync else ""
    if sync and not options:
        return Reference(label=f"soup{suffix}", soup=True, **sync)
    members, weights = options.get("members", [0, 1]), options.get("weights")
    fits = isinstance(value, dict) and set(options) <= {"members", "weights"} and isinstance(members, list)
    fits = fits and bool(members) and all(type(m) is int and m >= 0 for m in members)
    fits = fits and isinstance(weights, list | None) and all(map(is_number, weights or []))
    require(fits, f"{where}.soup: must have the form {{members: [0, 1], weights: [0.5, 0.5]}}, not {short(value)}")
    soup = Soup(members=members, weights=None if weights is None else [float(w) for w in weights])
    soup.check(f"{where}.soup", max(members) + 1)  # config/validate.py checks that the seeds exist
    label = "soup of " + ", ".join(f"{w:g}·seed-{m}" for w, m in zip(soup.resolved_weights, members, strict=False))
    return Reference(label=label + suffix, members=members, weights=soup.resolved_weights, **sync)


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


REFERENCE_KINDS = {"soup": _inline_soup, "shrunk": _shrunk}


def parse_reference(where: str, value: Any) -> list[Reference]:
    """The references in a policy's `reference:`, whose KLs are averaged.

    A string is seed-N, base, soup, or an adapter's folder or Hub id; a mapping is one of REFERENCE_KINDS; a list holds
    these. Raises SalsaError that names the key.
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
        f"{where}: must be seed-N, base, soup, {{soup: …}}, {{shrunk: …}}, an adapter's path or a list of these, not"
        f" {short(value)}",
    )
    if seed := SEED.match(value):
        return [Reference(label=value, members=[int(seed[1])], weights=[1.0])]
    if value in ("base", "soup"):
        return [Reference(label=value, soup=value == "soup")]
    return [Reference(label=value.rstrip("/").rsplit("/", 1)[-1], path=value)]


MEASURES = ("sft_loss", "reward")
MEASURED_STRATEGIES = ("greedy", "learned")


@dataclass(config=STRICT, kw_only=True)
class SoupSection(Soup):
    """The soup stage. linear and slerp use the given weights; greedy and learned choose them by `measure`."""

    strategy: Literal["linear", "slerp", "greedy", "learned"] = "linear"
    """linear: Σ w_i θ_i (the paper). slerp: spherical interpolation between two members' deltas, t the second weight.
    greedy: a member joins the uniform mean if the measure does not fall; learned: weights by gradient of the measure
    (both Wortsman et al., 2022)."""
    measure: str = "sft_loss"
    """Measure of greedy and learned: sft_loss on data.held_out, reward (mean score of responses to data.prompts), or
    module:name, a Python function of the model, higher is better. learned supports sft_loss only."""
    limit: Count = 128
    """Rows that the measure uses: the first ones."""
    steps: Count = 20
    """learned: optimizer steps (Adam)."""
    step_size: Positive = 0.1
    """learned: Adam's learning rate for the weights' logits (default: Wortsman et al.)."""
    rank: Count | None = None
    """Compress the soup's deltas to this rank. This is lossy; soup.json records the error. None: exact, rank Σ r_i."""

    @property
    def uses_measure(self) -> bool:
        """Whether the weights are chosen by a measure."""
        return self.strategy in MEASURED_STRATEGIES

    @property
    def measure_source(self) -> str | None:
        """Key of `data` that the measure reads, or None."""
        return {"sft_loss": "held_out", "reward": "prompts"}.get(self.measure) if self.uses_measure else None

    def check(self, where: str, seeds: int) -> None:
        """Raise SalsaError for options that do not agree."""
        super().check(where, seeds)
        require(
            self.strategy != "slerp" or len(self.members) == 2,
            f"{where}.strategy: slerp needs two members, but there are {len(self.members)}",
        )
        require(
            self.strategy != "greedy" or self.weights is None,
            f"{where}.weights: strategy greedy chooses the weights itself; remove {self.weights}",
        )
        if not self.uses_measure:
            return
        known = self.measure in MEASURES
        require(
            known or FUNCTION.match(self.measure) is not None,
            f"{where}.measure: must be {', '.join(MEASURES)} or module:name, a function of the model, not"
            f" {self.measure!r:.60}",
        )
        require(
            self.strategy != "learned" or self.measure == "sft_loss",
            f"{where}.measure: strategy learned needs sft_loss, because {self.measure!r:.60} has no gradient; or use"
            " strategy greedy",
        )
        if not known:
            check_function(f"{where}.measure", self.measure)
