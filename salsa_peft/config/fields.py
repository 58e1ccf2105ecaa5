"""Field types of the recipe's sections, and the patterns of names."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import ConfigDict, Field

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")
SEED = re.compile(r"seed-(\d+)\Z")
MAX_POLICIES = 1000
"""Most policies of a recipe, with sweeps and searches expanded: a few lines of a sweep could ask for millions."""
STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
