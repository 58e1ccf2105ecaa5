"""The `hub` section: what a finished run pushes to the Hub.

The token comes from `hf auth login` or HF_TOKEN, never from a recipe.
"""

import dataclasses
import re

from pydantic.dataclasses import dataclass

from salsa_peft.config.fields import STRICT, require_unique
from salsa_peft.utils.errors import require
from salsa_peft.utils.messages import short

PART = r"(?!.*(?:--|\.\.))[A-Za-z0-9](?:[A-Za-z0-9._-]{0,%d}[A-Za-z0-9_])?(?<!\.git)"
NAMESPACE = re.compile(PART % 62 + r"\Z")
REPO_ID = re.compile((PART % 62).replace(".*", "[^/]*") + "/" + PART % 94 + r"\Z")
"""Pattern of ids of repositories to create. `utils.hub.HUB_ID` is less strict: it matches every id that exists."""
REPO_EXPECTED = (
    "which is no repository id; give namespace/name, of letters, digits and single dots, - and _ between them, at most 96"
    " characters"
)


@dataclass(config=STRICT, kw_only=True)
class Hub:
    """Results to push after the report. A failed push fails no run; `salsa hub push` repeats the push."""

    push: list[str] = dataclasses.field(default_factory=list)
    """Results to push, each into its own repository: soup, reward, seed-N, a policy's name. Empty: none. Example:
    [soup, salsa]."""
    namespace: str | None = None
    """User or organization. None: the logged-in user. Example: my-team."""
    name: str | None = None
    """First part of the repositories' names <name>-<result>. None: the name of the run's folder. Example: my-model."""
    private: bool = True
    """Whether the repositories are private."""
    base_model: str | None = None
    """The base's Hub id for the model card, where model.base is a local folder. None: model.base. Example:
    HuggingFaceTB/SmolLM2-135M-Instruct."""

    def check(self, where: str) -> None:
        """Raise SalsaError for names that the Hub would reject."""
        for key, value in (("namespace", self.namespace), ("name", self.name)):
            require(
                value is None or NAMESPACE.match(value) is not None,
                f"{where}.{key}: must consist of letters, digits and single dots, - and _ between them, at most 64"
                f" characters, not {short(value)}",
            )
        fits = self.base_model is None or REPO_ID.match(self.base_model) is not None
        require(fits, f"{where}.base_model: found {short(self.base_model)}, {REPO_EXPECTED}")
        require_unique(f"{where}.push", self.push)
