"""The `soup` section: members, weights, and the strategy that chooses the weights."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Protocol

from pydantic import Field
from pydantic.dataclasses import dataclass

from salsa_peft.config.fields import SEED, STRICT, Count, Positive, Seed, require_seed, require_unique
from salsa_peft.config.rewards import FUNCTION, check_function
from salsa_peft.utils.errors import require
from salsa_peft.utils.messages import short

Member = Annotated[int, Field(ge=0)] | Annotated[str, Field(min_length=1)]
"""A member of a soup: a position in sft.seeds, or a model's name."""
MEASURES = ("sft_loss", "reward")
MEASURED_STRATEGIES = ("greedy", "learned")
"""The strategies that maximize a measure on held-out data."""
GEOMETRIC_STRATEGIES = ("slerp", "karcher", "model_stock")
"""The strategies that read the angles between the members' changes from the start."""
ELEMENTWISE_STRATEGIES = ("ties", "dare")
"""The strategies that drop a part of the elements of the members' changes."""


class StrategyOptions(Protocol):
    """The options of a strategy that recipes, `salsa soup` and `soup()` share."""

    @property
    def strategy(self) -> str: ...
    @property
    def per(self) -> str: ...
    @property
    def start(self) -> str | Path: ...
    @property
    def scale(self) -> float: ...
    @property
    def density(self) -> float | None: ...
    @property
    def drop_seed(self) -> int | None: ...


def check_strategy(where: str, options: StrategyOptions) -> None:
    """Raise SalsaError for options that have no effect on the strategy. where: text before an option's name."""
    strategy = options.strategy
    require(options.per in ("model", "layer"), f"{where}per: {options.per!r} is unknown; use model or layer")
    require(
        options.per == "model" or strategy in GEOMETRIC_STRATEGIES,
        f"{where}per: layer has no effect with strategy {strategy}; leave it out, or use one of"
        f" {', '.join(GEOMETRIC_STRATEGIES)}",
    )
    require(math.isfinite(options.scale), f"{where}scale: {options.scale} is not a finite number; use one such as 0.5")
    for name, value, default in (("start", options.start, "base"), ("scale", options.scale, 1.0)):
        require(
            value == default or strategy not in MEASURED_STRATEGIES,
            f"{where}{name}: {value} has no effect with strategy {strategy}, which measures the weighted mean of the"
            " members; leave it out",
        )
    require(
        options.density is None or strategy in ELEMENTWISE_STRATEGIES,
        f"{where}density: {options.density} has no effect with strategy {strategy}; leave it out, or use ties or dare",
    )
    require(
        options.density is None or 0 < options.density <= 1,
        f"{where}density: {options.density} is not a share above 0 and at most 1; use one such as 0.2",
    )
    require(
        options.scale != 0 or strategy not in ELEMENTWISE_STRATEGIES,
        f"{where}scale: 0 leaves nothing of what strategy {strategy} merges; use strategy linear, or another scale",
    )
    require(
        options.drop_seed is None or strategy == "dare",
        f"{where}drop_seed: {options.drop_seed} has no effect with strategy {strategy}; leave it out, or use dare",
    )


def named(members: Sequence[Member] | None) -> list[str]:
    """The members' names; a position N in sft.seeds is seed-N."""
    return [f"seed-{member}" if isinstance(member, int) else member for member in members or ()]


@dataclass(config=STRICT, kw_only=True)
class Soup:
    """A weighted average of several models: θ = Σ w_i θ_i."""

    members: Annotated[list[Member], Field(min_length=1)] = dataclasses.field(default_factory=lambda: [0, 1])
    """The models to average: positions in sft.seeds, or names: seed-N, a policy, another soup, the folder or Hub id of
    an adapter (full weights: of a checkpoint). Example: [ppo, salsa]."""
    weights: list[float] | None = None
    """One weight per member, summing to 1. None: equal weights. Source: the paper's best soup has two
    members of weight ½. Example: [0.25, 0.75]."""

    @property
    def names(self) -> list[str]:
        """The members' names; a position N in sft.seeds is seed-N."""
        return named(self.members)

    @property
    def resolved_weights(self) -> list[float]:
        """The given weights, or equal weights if none are given."""
        return self.weights if self.weights is not None else [1 / len(self.members)] * len(self.members)

    def check(self, where: str, seeds: int) -> None:
        """Raise SalsaError for missing or repeated members, and for weights whose number or sum is wrong."""
        for name in self.names:
            if seed := SEED.match(name):
                require_seed(f"{where}.members", int(seed[1]), seeds)
        require_unique(f"{where}.members", self.names)
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
class SoupSection(Soup):
    """Settings of the soup. linear and slerp use `weights`; greedy and learned choose them by `measure`."""

    strategy: Literal["linear", "slerp", "karcher", "model_stock", "ties", "dare", "greedy", "learned"] = "linear"
    """linear: Σ w_i θ_i. slerp: spherical interpolation of the members' deltas, one member after the other. karcher:
    the mean direction of the deltas on the sphere, with their mean norm. model_stock: the mean delta, shortened by the
    angle between the members. ties: of each matrix the largest elements, where the members agree in sign. dare: random
    elements, scaled up. greedy: a member joins the uniform mean if the measure does not get worse. learned:
    gradient steps on the measure find the weights. Source: linear is the paper's; slerp of more than two is of Ramé et
    al. (2024), model_stock of Jang et al. (2024), ties of Yadav et al. (2023), dare of Yu et al. (2024), greedy and learned are of Wortsman et al. (2022)."""
    per: Literal["model", "layer"] = "model"
    """slerp, karcher, model_stock: one set of weights for the whole model, or one for each layer (module with LoRA, or
    tensor of a checkpoint), by the angles of this layer. Source: layer is WARP's. Example: layer."""
    start: str = "base"
    """Model from which the members' deltas are measured: base, or seed-N, a folder or a Hub id. Source: WARP (Ramé et
    al., 2024). Example: seed-0."""
    scale: float = 1.0
    """η of θ = θ_start + η · (merged delta): below 1, the soup is interpolated towards the start (LITI). Source: WARP
    (Ramé et al., 2024). Example: 0.5."""
    density: float | None = None
    """ties, dare: share of the elements of each matrix that is kept, above 0 and at most 1. None: 0.2 for ties, 0.1 for
    dare. Source: TIES (Yadav et al., 2023); DARE (Yu et al., 2024). Example: 0.5."""
    drop_seed: Seed | None = None
    """Seed of the random choice in strategy dare. None: 0. Example: 1."""
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
    def reads(self) -> list[str]:
        """Names of the models that the soup is made from: its members and its start, unless that is the base."""
        return [*self.names, *([] if self.start == "base" else [self.start])]

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
        check_strategy(f"{where}.", self)
        require(
            self.strategy not in ("slerp", "model_stock") or len(self.members) > 1,
            f"{where}.strategy: {self.strategy} needs at least two members, but there is one; add one, or use linear",
        )
        require(
            self.strategy not in ("greedy", "model_stock") or self.weights is None,
            f"{where}.weights: strategy {self.strategy} chooses the weights itself; remove the weights {self.weights}",
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
