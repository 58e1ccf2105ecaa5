"""The `hub` section: what a run pushes to the Hub when it is finished. No token stands in a recipe: it is the Hub's login, or HF_TOKEN."""

from __future__ import annotations

import dataclasses
import re

from pydantic.dataclasses import dataclass

from salsa_peft.config.fields import STRICT
from salsa_peft.utils.errors import require
from salsa_peft.utils.messages import short

PART = r"(?!.*(?:--|\.\.))[A-Za-z0-9](?:[A-Za-z0-9._-]{0,%d}[A-Za-z0-9_])?(?<!\.git)"
NAMESPACE = re.compile(PART % 62 + r"\Z")
REPO_ID = re.compile((PART % 62).replace(".*", "[^/]*") + "/" + PART % 94 + r"\Z")
"""namespace/name."""
REPO_EXPECTED = "expected namespace/name, of letters, digits and single dots, - and _ between them, 96 at most"


@dataclass(config=STRICT, kw_only=True)
class Hub:
    """Pushing, after the report. A push that fails is noted, and `salsa hub push RUN` makes up for it."""

    push: list[str] = dataclasses.field(default_factory=list)
    """Results, a repository each: soup, reward, seed-N, a policy's name. Empty: none."""
    namespace: str | None = None
    """User or organisation. None: whose login it is."""
    name: str | None = None
    """Repositories are called <name>-<result>. None: as the run's folder."""
    private: bool = True
    """Whether only you and those you let see them."""
    base_model: str | None = None
    """The base's id on the Hub, for a base that is a local folder here. None: model.base."""

    def check(self, where: str) -> None:
        """Raise SalsaError for names that the Hub would not take."""
        for key in ("namespace", "name"):
            value = getattr(self, key)
            fits = value is None or NAMESPACE.match(value) is not None
            require(
                fits,
                f"{where}.{key}: found {short(value)}, expected letters, digits and single dots, - and _ between them, at most 64",
            )
        fits = self.base_model is None or REPO_ID.match(self.base_model) is not None
        require(fits, f"{where}.base_model: found {short(self.base_model)}, {REPO_EXPECTED}")
        for value in self.push:
            require(self.push.count(value) == 1, f"{where}.push: found {short(value)} twice, expected each once")
