"""The recipe's `soup:` section: members and weights, how the weights are chosen, and on what."""

from __future__ import annotations

from typing import Literal

from pydantic.dataclasses import dataclass

from salsa_peft.fields import STRICT, Count, Positive
from salsa_peft.reference_kinds import Soup
from salsa_peft.reward_kinds import FUNCTION, check_function, placed
from salsa_peft.utils.errors import require

MEASURES = ("sft_loss", "reward")
MEASURED = ("greedy", "learned")


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
    def measured(self) -> bool:
        """Whether the weights are chosen by a measure."""
        return self.strategy in MEASURED

    @property
    def reads(self) -> str | None:
        """Which of the data's sources the measure needs."""
        return {"sft_loss": "held_out", "reward": "prompts"}.get(self.measure) if self.measured else None

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
        if not self.measured:
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


def placed_measure(value: object, folder: str) -> object:
    """A measure's function with the folder that its module lies in; anything else as it is."""
    return placed(value, folder) if isinstance(value, str) and ":" in value else value
