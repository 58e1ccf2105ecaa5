"""The soup section, and what a policy's `reference:` may say: seeds, soups, shrunk seeds, the base, another adapter.

A new kind that is a mapping is one function and one row of REFERENCE_KINDS.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from salsa_peft.config.fields import SEED, STRICT, Count, Positive
from salsa_peft.config.rewards import FUNCTION, check_function, function_with_folder
from salsa_peft.utils.errors import require
from salsa_peft.utils.messages import short


@dataclass(config=STRICT, kw_only=True)
class Soup:
    """The weight average of seeds: θ = Σ w_i θ_i."""

    members: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] = dataclasses.field(
        default_factory=lambda: [0, 1]
    )
    """Positions in sft.seeds."""
    weights: list[float] | None = None
    """One per member, sum 1. None: uniform (α = ½ for two, the paper's best)."""

    @property
    def resolved_weights(self) -> list[float]:
        """The weights, uniform where none are given."""
        return self.weights if self.weights is not None else [1 / len(self.members)] * len(self.members)

    def check(self, where: str, seeds: int) -> None:
        """Raise SalsaError for members that are not there and weights that don't fit."""
        for member in self.members:
            require(
                member < seeds,
                f"{where}.members: found seed {member}, expected positions 0 to {seeds - 1} of sft.seeds",
            )
        require(
            len(set(self.members)) == len(self.members),
            f"{where}.members: found {short(self.members)}, expected no member twice",
        )
        require(
            len(self.resolved_weights) == len(self.members),
            f"{where}.weights: found {len(self.resolved_weights)} weights for {len(self.members)} members, expected one each",
        )
        total = sum(self.resolved_weights)
        require(
            abs(total - 1) < 1e-6,
            f"{where}.weights: found {short(self.resolved_weights)}, which sum to {total:g}, expected a sum of 1; scale them",
        )


@dataclass(config=STRICT, kw_only=True)
class Reference:
    """What the KL term looks at: the base plus a weighted sum of seeds' deltas, or another adapter.

    seed-N is one member at 1, a soup its members at weights of sum 1, `shrunk` one member at a scale, `base` no member.
    """

    label: str
    members: list[int] = dataclasses.field(default_factory=list)
    weights: list[float] = dataclasses.field(default_factory=list)
    soup: bool = False
    """The recipe's own soup (the soup stage's output)."""
    path: str | None = None
    """A folder or Hub id of a LoRA adapter of the same base."""
    sync_every: int | None = None
    """Of a soup: updates between two moves towards the policy. None: it stays."""
    mixup_alpha: float = 0.1
    """θ_ref ← (1 − α) θ_ref + α θ_policy at each of them."""


def _shrunk(where: str, value: Any) -> Reference:
    given = value if isinstance(value, dict) else {}
    seed, scale = given.get("seed", 0), given.get("scale")
    found = f"{where}.shrunk: found {short(value)}"
    require(
        set(given) <= {"seed", "scale"} and type(seed) is int and seed >= 0, f"{found}, expected {{seed: N, scale: λ}}"
    )
    require(_is_number(scale), f"{found}, expected a number for scale, such as 0.6")
    return Reference(label=f"shrunk {scale:g}·seed-{seed}", members=[seed], weights=[float(given["scale"])])


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300


def _inline_soup(where: str, value: Any) -> Reference:
    given = dict(value) if isinstance(value, dict) else {}
    moving = _moving(where, given)
    if moving and not given:
        return Reference(
            label=f"soup, moving (every {moving['sync_every']}, α {moving['mixup_alpha']:g})", soup=True, **moving
        )
    members, weights = given.get("members", [0, 1]), given.get("weights")
    fits = (
        isinstance(value, dict)
        and set(given) <= {"members", "weights"}
        and isinstance(members, list)
        and isinstance(weights, list | None)
    )
    fits = (
        fits
        and bool(members)
        and all(type(m) is int and m >= 0 for m in members)
        and all(map(_is_number, weights or []))
    )
    require(fits, f"{where}.soup: found {short(value)}, expected {{members: [0, 1], weights: [0.5, 0.5]}}")
    soup = Soup(members=members, weights=None if weights is None else [float(w) for w in weights])
    soup.check(f"{where}.soup", max(members) + 1)  # whether these seeds are there is seen with the recipe
    label = "soup of " + ", ".join(f"{w:g}·seed-{m}" for w, m in zip(soup.resolved_weights, members, strict=False))
    label += f", moving (every {moving['sync_every']}, α {moving['mixup_alpha']:g})" if moving else ""
    return Reference(label=label, members=members, weights=soup.resolved_weights, **moving)


def _moving(where: str, given: dict[str, Any]) -> dict[str, Any]:
    """Take sync_every and mixup_alpha out of a soup's options; {} where it stays."""
    found = {key: given.pop(key) for key in ("sync_every", "mixup_alpha") if key in given}
    every, alpha = found.get("sync_every"), found.get("mixup_alpha", 0.1)
    if not found:
        return {}
    require(
        type(every) is int and every > 0,
        f"{where}.soup.sync_every: found {short(every)}, expected a whole number of updates, at least 1",
    )
    require(
        _is_number(alpha) and 0 < alpha <= 1,
        f"{where}.soup.mixup_alpha: found {short(alpha)}, expected a number above 0, at most 1",
    )
    return {"sync_every": every, "mixup_alpha": float(alpha)}


REFERENCE_KINDS = {"soup": _inline_soup, "shrunk": _shrunk}


def parse_reference(where: str, value: Any) -> list[Reference]:
    """What a policy's `reference:` says → a list of references (their KLs are averaged).

    A string: seed-N, base, soup, or a folder or Hub id of an adapter; a mapping: one of REFERENCE_KINDS; a list of these.
    Raises SalsaError that names the key.
    """
    if isinstance(value, list):
        require(bool(value), f"{where}: found an empty list, expected at least one reference")
        return [
            reference for index, entry in enumerate(value) for reference in parse_reference(f"{where}[{index}]", entry)
        ]
    if isinstance(value, dict) and len(value) == 1 and next(iter(value)) in REFERENCE_KINDS:
        kind, options = next(iter(value.items()))
        return [REFERENCE_KINDS[kind](where, options)]
    require(
        isinstance(value, str) and bool(value),
        f"{where}: found {short(value)}, expected seed-N, base, soup, {{soup: …}}, {{shrunk: …}}, an adapter's path or a list of these",
    )
    if seed := SEED.match(value):
        return [Reference(label=value, members=[int(seed[1])], weights=[1.0])]
    if value == "base":
        return [Reference(label="base")]
    if value == "soup":
        return [Reference(label="soup", soup=True)]
    return [Reference(label=value.rstrip("/").rsplit("/", 1)[-1], path=value)]


MEASURES = ("sft_loss", "reward")
MEASURED_STRATEGIES = ("greedy", "learned")


@dataclass(config=STRICT, kw_only=True)
class SoupSection(Soup):
    """The soup stage. linear and slerp take the weights as they are; greedy and learned look for them by `measure`."""

    strategy: Literal["linear", "slerp", "greedy", "learned"] = "linear"
    """linear: Σ w_i θ_i (the paper). slerp: of two, on the great circle between their deltas, t the second weight. greedy: a member joins
    the uniform mean if the measure does not fall; learned: weights by gradient of the measure (both Wortsman et al., 2022)."""
    measure: str = "sft_loss"
    """What greedy and learned go by: sft_loss on data.held_out, reward (mean score of a response to each of data.prompts), or
    module:name, a Python function of the model, higher is better. learned: sft_loss."""
    limit: Count = 128
    """Rows of it, the first."""
    steps: Count = 20
    """learned: steps of Adam."""
    step_size: Positive = 0.1
    """learned: Adam's learning rate, of the weights' logits (Wortsman et al.: 0.1)."""
    rank: Count | None = None
    """Recompress the soup's deltas to this rank, which loses some of it (soup.json says how much). None: exact, rank Σ r_i."""

    @property
    def uses_measure(self) -> bool:
        """Whether the weights are chosen by a measure."""
        return self.strategy in MEASURED_STRATEGIES

    @property
    def measure_source(self) -> str | None:
        """Which of the data's sources the measure needs."""
        return {"sft_loss": "held_out", "reward": "prompts"}.get(self.measure) if self.uses_measure else None

    def check(self, where: str, seeds: int) -> None:
        """Raise SalsaError for what does not fit together."""
        super().check(where, seeds)
        found = f"{where}.strategy: found {self.strategy}"
        require(
            self.strategy != "slerp" or len(self.members) == 2, f"{found} of {len(self.members)} members, expected two"
        )
        require(
            self.strategy != "greedy" or self.weights is None,
            f"{where}.weights: found {self.weights} with strategy greedy, which chooses them; leave them out",
        )
        if not self.uses_measure:
            return
        known = self.measure in MEASURES
        require(
            known or FUNCTION.match(self.measure) is not None,
            f"{where}.measure: found {self.measure!r:.60}, expected {', '.join(MEASURES)} or module:name, a function of the model",
        )
        require(
            self.strategy != "learned" or self.measure == "sft_loss",
            f"{where}.measure: found {self.measure!r:.60} with strategy learned, expected sft_loss: it alone has a gradient; or take greedy",
        )
        if not known:
            check_function(f"{where}.measure", self.measure)


def measure_with_folder(value: object, folder: str) -> object:
    """A measure's function with the folder that its module lies in; anything else as it is."""
    return function_with_folder(value, folder) if isinstance(value, str) and ":" in value else value
