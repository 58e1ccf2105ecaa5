"""The `soup` section, and the KL term's references: a seed's model, a soup, the base, or a path.

To add a kind of reference that is written as a mapping, add a function and an entry of REFERENCE_KINDS.
"""

import dataclasses
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from salsa_peft.config.fields import SEED, STRICT, Count, Positive, is_number, require_unique
from salsa_peft.config.rewards import FUNCTION, check_function
from salsa_peft.utils.errors import require
from salsa_peft.utils.messages import short


def require_seed(key: str, position: int, seeds: int) -> None:
    """Raise SalsaError unless `position` is a position in sft.seeds. seeds: length of sft.seeds."""
    require(position < seeds, f"{key}: there is no seed-{position}; sft.seeds has seed-0 to seed-{seeds - 1}")


@dataclass(config=STRICT, kw_only=True)
class Soup:
    """A weighted average of the SFT models of several seeds: θ = Σ w_i θ_i."""

    members: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] = dataclasses.field(
        default_factory=lambda: [0, 1]
    )
    """Positions in sft.seeds of the models to average."""
    weights: list[float] | None = None
    """One weight per member, summing to 1. None: equal weights. Source: the paper's best soup has two
    members of weight ½. Example: [0.25, 0.75]."""

    @property
    def resolved_weights(self) -> list[float]:
        """The given weights, or equal weights if none are given."""
        return self.weights if self.weights is not None else [1 / len(self.members)] * len(self.members)

    def check(self, where: str, seeds: int) -> None:
        """Raise SalsaError for missing or repeated members, and for weights whose number or sum is wrong."""
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
            f"{where}.weights: {short(self.resolved_weights)} sum to {total:g}, not 1; scale the weights",
        )


@dataclass(config=STRICT, kw_only=True)
class Reference:
    """A reference of the KL term: the base plus a weighted sum of seeds' deltas, or the model at `path`.

    seed-N has one member of weight 1. A soup has several members, whose weights sum to 1. `shrunk` has one member, with
    the scale as its weight. `base` has no member. With `norm_of` the delta is scaled to the norm of another model's delta.
    """

    label: str
    """Name for plots and logs."""
    members: list[int] = dataclasses.field(default_factory=list)
    """Positions in sft.seeds of the members."""
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
    def seeds(self) -> list[int]:
        """Positions in sft.seeds of all SFT models that the reference reads."""
        of = SEED.match(self.norm_of or "")
        return list(dict.fromkeys([*self.members, *([int(of[1])] if of else [])]))

    @property
    def reads_soup(self) -> bool:
        """Whether the reference reads the recipe's own soup."""
        return self.soup or self.norm_of == "soup"


SOUP_NORM = "soup-norm"
"""The scale of `shrunk` with which one seed's delta gets the norm of the recipe's soup."""


def _shrunk(where: str, value: Any) -> Reference:
    options = value if isinstance(value, dict) else {}
    seed, scale = options.get("seed", 0), options.get("scale")
    fits = set(options) <= {"seed", "scale"} and type(seed) is int and seed >= 0
    require(fits, f"{where}.shrunk: must have the form {{seed: N, scale: λ}}, not {short(value)}")
    if scale == SOUP_NORM:
        label = f"shrunk seed-{seed} with the norm of the soup"
        return Reference(label=label, members=[seed], weights=[1.0], norm_of="soup")
    require(
        is_number(scale),
        f"{where}.shrunk: scale must be a number such as 0.6, or {SOUP_NORM}, but the value is {short(value)}",
    )
    return Reference(label=f"shrunk {scale:g}·seed-{seed}", members=[seed], weights=[float(options["scale"])])


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


REFERENCE_KINDS = {"soup": _inline_soup, "shrunk": _shrunk, "stretched": _stretched}


def parse_reference(where: str, value: Any) -> list[Reference]:
    """Parse a policy's `reference:`. The KLs to several references are averaged.

    A string is seed-N, base, soup, or a model's folder or Hub id. A mapping has one key, which is in REFERENCE_KINDS. A
    list has such strings and mappings. Raises a SalsaError that names the key.
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
        f"{where}: must be seed-N, base, soup, {{soup: …}}, {{shrunk: …}}, {{stretched: …}}, an adapter's path or a list"
        f" of these, not {short(value)}",
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
    """Settings of the soup. linear and slerp use `weights`; greedy and learned choose them by `measure`."""

    strategy: Literal["linear", "slerp", "greedy", "learned"] = "linear"
    """linear: Σ w_i θ_i. slerp: spherical interpolation between two members' deltas, with t = the second
    weight. greedy: a member joins the uniform mean if the measure does not get worse. learned: gradient steps on the
    measure find the weights. Source: linear is the paper's; greedy and learned are of Wortsman et
    al. (2022)."""
    measure: str = "sft_loss"
    """Measure of greedy and learned: sft_loss on data.held_out, reward (mean score of responses to data.prompts), or
    module:name (a Python function of the model, where higher is better). learned supports sft_loss only."""
    limit: Count = 128
    """Number of rows that the measure uses: the first rows of its data."""
    steps: Count = 20
    """Number of Adam steps of strategy learned."""
    step_size: Positive = 0.1
    """Adam's learning rate for the weights' logits in strategy learned. Source: Wortsman et al. (2022)."""
    rank: Count | None = None
    """Rank to which the soup's deltas are compressed; soup.json records the error. None: sum of the members' ranks.
    Example: 16."""

    @property
    def uses_measure(self) -> bool:
        """Whether the weights are chosen by a measure."""
        return self.strategy in MEASURED_STRATEGIES

    @property
    def measure_source(self) -> str | None:
        """Key of the section `data` that the measure reads; None if it reads none or there is no measure."""
        return {"sft_loss": "held_out", "reward": "prompts"}.get(self.measure) if self.uses_measure else None

    def check(self, where: str, seeds: int) -> None:
        """Raise SalsaError for options that contradict one another."""
        super().check(where, seeds)
        require(
            self.strategy != "slerp" or len(self.members) == 2,
            f"{where}.strategy: slerp needs two members, but there are {len(self.members)}; give two, or use linear",
        )
        require(
            self.strategy != "greedy" or self.weights is None,
            f"{where}.weights: strategy greedy chooses the weights itself; remove the weights {self.weights}",
        )
        if not self.uses_measure:
            return
        known = self.measure in MEASURES
        require(
            known or FUNCTION.match(self.measure) is not None,
            f"{where}.measure: must be {', '.join(MEASURES)} or module:name (a function of the model), not"
            f" {self.measure!r:.60}",
        )
        require(
            self.strategy != "learned" or self.measure == "sft_loss",
            f"{where}.measure: strategy learned needs sft_loss, because {self.measure!r:.60} has no gradient; set"
            " measure=sft_loss or strategy=greedy",
        )
        if not known:
            check_function(f"{where}.measure", self.measure)
