"""The section `rewarded_soups`, and the policies and soups that it stands for (Ramé et al., 2023, arXiv 2306.04488)."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field
from pydantic.dataclasses import dataclass

from salsa_peft.config.fields import STRICT, NonNegative, require_unique
from salsa_peft.config.policies.warp import section_of, with_settings
from salsa_peft.config.rewards import RewardPart
from salsa_peft.utils.errors import require
from salsa_peft.utils.messages import did_you_mean, number_in_name

Share = Annotated[float, Field(ge=0, le=1)]


@dataclass(config=STRICT, kw_only=True)
class RewardedSoups:
    """Rewarded soups: a policy for each of two rewards, soups of the two, and policies of weighted rewards as controls.

    The policies are rewarded-NAME for the two parts of reward.model, the soups rewarded-soup-W, where W is the second
    policy's weight, and the controls morl-W, which are trained on (1 − W) · first reward + W · second reward.
    """

    rewards: Annotated[list[str], Field(min_length=2, max_length=2)]
    """Names of two parts of reward.model. Example: [brevity, sentiment]."""
    weights: list[Share] = dataclasses.field(default_factory=lambda: [0.25, 0.5, 0.75])
    """Weight of the second policy in each soup; the first policy has the rest."""
    scalarized: list[Share] = dataclasses.field(default_factory=lambda: [0.5])
    """Weight of the second reward for each control (multi-objective RL with a scalarised reward). An empty list: none."""
    start: str = "seed-0"
    """Model where all these policies start, as in a policy's `start`."""
    reference: Any = "seed-0"
    """Reference of all these policies, as in a policy's `reference`."""
    kl_coef: NonNegative | None = None
    """KL coefficient β of all these policies. None: ppo.kl_coef. Example: 0.05."""

    @property
    def ends(self) -> list[str]:
        """Names of the two policies."""
        return [f"rewarded-{name}" for name in self.rewards]

    @property
    def soups(self) -> dict[str, float]:
        """Name of each soup → the second policy's weight."""
        return {f"rewarded-soup-{number_in_name(weight)}": weight for weight in self.weights}

    @property
    def controls(self) -> dict[str, float]:
        """Name of each control → the second reward's weight."""
        return {f"morl-{number_in_name(weight)}": weight for weight in self.scalarized}

    def check(self, parts: Sequence[RewardPart]) -> None:
        """Raise SalsaError for repeated values, and for rewards that reward.model lacks or does not maximize."""
        for key in ("rewards", "weights", "scalarized"):
            require_unique(f"rewarded_soups.{key}", getattr(self, key))
        weights = {part.name: part.weight for part in parts}
        for name in self.rewards:
            where = f"rewarded_soups.rewards: {name}"
            require(
                name in weights,
                f"{where}: reward.model has no such part; {did_you_mean(name, [*weights], 'its parts')}",
            )
            require(
                weights[name] > 0,
                f"{where} has weight {weights[name]:g} in reward.model, but must have one above 0 to be trained on",
            )


def expand_rewarded_soups(data: dict[str, Any]) -> dict[str, Any]:
    """A recipe's settings with the policies and soups of `rewarded_soups` added.

    What the settings say of one of them has precedence. Values of the wrong type are left for the schema to report.
    """
    section = section_of(data, "rewarded_soups", RewardedSoups)
    if section is None:
        return data
    first, second = section.rewards
    if first == second:  # the check reports it
        return data
    rewards = {name: {reward: 1.0} for name, reward in zip(section.ends, section.rewards, strict=True)}
    rewards |= {name: {first: round(1 - weight, 12), second: weight} for name, weight in section.controls.items()}
    shared = {"start": section.start, "reference": section.reference, "kl_coef": section.kl_coef}
    policies = {name: {**shared, "reward": reward} for name, reward in rewards.items()}
    soups = {
        name: {"members": section.ends, "weights": [round(1 - weight, 12), weight]}
        for name, weight in section.soups.items()
    }
    return with_settings(data, policies, soups)
