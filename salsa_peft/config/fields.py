"""What the recipe's sections are made of: kinds of numbers, names, and the error that a user can mend."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import ConfigDict, Field

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")
SEED = re.compile(r"seed-(\d+)\Z")
MAX_POLICIES = 1000
"""Of a recipe: a few lines of a sweep, each policy searched, could ask for more than any memory holds."""
STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
