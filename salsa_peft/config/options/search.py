"""The recipe's `search:`: which KL coefficients are tried for each policy, and who picks. Imports no torch."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from salsa_peft.config.fields import STRICT, NonNegative

SEED_0 = "seed-0"


@dataclass(config=STRICT, kw_only=True)
class Search:
    """Which KL coefficients are tried, and who picks."""

    kl_coef: Annotated[list[NonNegative], Field(min_length=1)]
    """β at the start, of each candidate."""
    by: Literal["reward", "judge"] = "reward"
    """What the win rates come from: the recipe's reward, or evaluate.judge (the paper)."""
    methods: list[str] = dataclasses.field(default_factory=list)
    """Policies that are searched. Empty: all of them."""
    against: str = SEED_0
    """Whom the candidates are compared with."""
    questions: list[str] = dataclasses.field(default_factory=list)
    """Which of evaluate.prompts pick, all their questions together. Empty: all."""
