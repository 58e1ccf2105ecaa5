"""A policy of the recipe: where its training starts, its references, its reward, and its own settings."""

import dataclasses
from typing import Any, Literal

from pydantic.dataclasses import dataclass

from salsa_peft.config.fields import STRICT, NonNegative
from salsa_peft.config.references import Reference, parse_reference


@dataclass(config=STRICT, kw_only=True)
class Policy:
    """A policy, whose training starts from the model `start`."""

    reference: Any
    """Reference of the KL term: base | seed-N | soup | a policy | a soup of `soups` | {soup: {members, weights}} |
    {shrunk: {seed, scale}} | {stretched: {soup, seed}} | {ema: {decay}} | path of an adapter (full weights: of a
    checkpoint) | a list of these, whose KLs are averaged."""
    start: str = "seed-0"
    """Model where training starts: seed-N, soup, a soup of `soups`, another policy, or an adapter's path (full weights: a
    checkpoint's). Example: salsa."""
    kl_coef: NonNegative | None = None
    """Initial KL coefficient β. None: kl_coef of the algorithm's section."""
    algorithm: Literal["ppo", "dpo", "kto", "rloo", "grpo"] = "ppo"
    """ppo: SalsaPPOTrainer. The others: TRL's trainers with this reference. dpo and kto learn from `data.preferences`;
    ppo, rloo and grpo from `data.prompts` and `reward`. The section of the same name has the settings."""
    reward: dict[str, float] | None = None
    """This policy's own weights of the parts of reward.model, by name; a part without a weight is left out, unless its
    weight is 0 in reward.model. None: the weights in reward.model. Example: {adapter: 0.5, brevity: 0.5}."""
    overrides: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Settings of this policy alone: keys of the algorithm's section and, for ppo, of `generation`. Example: {seed: 1}."""

    def references(self, where: str) -> list[Reference]:
        """The parsed references. `where` is the policy's key, for messages."""
        return [one.of_policy(self.start) for one in parse_reference(f"{where}.reference", self.reference)]
