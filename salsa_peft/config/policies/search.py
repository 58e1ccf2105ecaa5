"""The recipe's `search:`, which tries several KL coefficients for each policy. Imports no torch."""

import dataclasses
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from salsa_peft.config.fields import STRICT, NonNegative

SEED_0 = "seed-0"


@dataclass(config=STRICT, kw_only=True)
class Search:
    """Trains each policy at several KL coefficients and picks the candidate with the best win rate."""

    kl_coef: Annotated[list[NonNegative], Field(min_length=1)]
    """Initial KL coefficient β of each candidate. Unit: reward per nat."""
    by: Literal["reward", "judge"] = "reward"
    """What decides a comparison: the recipe's reward, or evaluate.judge. Source: the paper has the judge."""
    methods: list[str] = dataclasses.field(default_factory=list)
    """Policies to search. Empty: all policies."""
    against: str = SEED_0
    """Model that the candidates are compared with."""
    questions: list[str] = dataclasses.field(default_factory=list)
    """Names of the sets in evaluate.prompts whose pooled questions decide the search. Empty: all sets. Example:
    [mine]."""
