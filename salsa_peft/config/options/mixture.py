"""Options of PPO with several references: their mean, and their weights."""

import dataclasses
from typing import Annotated, Any, Literal

from pydantic import Field

from salsa_peft.config.fields import NonNegative, Positive
from salsa_peft.utils.errors import require
from salsa_peft.utils.messages import short

WEIGHTS = ("reference_weights", "reference_weights_end")
"""Options that are a list with one weight for each reference."""


@dataclasses.dataclass(kw_only=True)
class ReferenceMixture:
    """How the KL term combines the references r_i of a policy that has several. docs/references.md compares the means."""

    # The names are "kl" and the keys of MEANS in training/ppo/mixture/kl.py.
    reference_mean: Literal["kl", "geometric", "arithmetic"] = "kl"
    """Mean of several references. kl: the mean of the KLs to them, Σ w_i KL(π ‖ r_i). geometric: the KL to their
    geometric (logarithmic) mean, log r = Σ w_i log r_i − log Z. arithmetic: the KL to their arithmetic mean,
    r = Σ w_i r_i. Source: kl is the paper's MKL (eq. 5)."""
    reference_weights: list[NonNegative] | None = None
    """Weights w_i of the references in the mean, one for each, with the sum 1. None: equal weights. With
    reference_weights_end or reference_weights_step the weights of the first update. Example: [0.75, 0.25]."""
    reference_weights_end: list[NonNegative] | None = None
    """Weights of the run's last update, to which the weights change linearly. None: no schedule. Example: [0.25, 0.75]."""
    reference_weights_step: Positive | None = None
    """Step size η of learned weights: after each update w_i ← w_i exp(η g_i), scaled to the sum 1, where g_i is the
    covariance of the standardised scores with reference i's log-probs of the responses (docs/references.md). None: the
    weights are not learned. Source: exponentiated gradient (Kivinen and Warmuth, 1997). Example: 0.1."""
    reference_weights_min: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Lower bound of each learned weight, below 1 / number of references. Example: 0.05."""

    @property
    def weighs_references(self) -> bool:
        """Whether the references have weights that are set, scheduled or learned."""
        return any(getattr(self, name) is not None for name in (*WEIGHTS, "reference_weights_step"))

    def check_mixture(self, prefix: str) -> None:
        """Raise SalsaError for weights that are no weights, or options that contradict one another."""
        for name in WEIGHTS:
            weights: list[float] | None = getattr(self, name)
            total = 1.0 if weights is None else sum(weights)
            require(
                abs(total - 1) < 1e-6, f"{prefix}{name}: {short(weights)} sum to {total:g}, not 1; scale the weights"
            )
        start, end, step, least = (
            getattr(self, name) for name in (*WEIGHTS, "reference_weights_step", "reference_weights_min")
        )
        require(
            end is None or step is None,
            f"{prefix}reference_weights_step: weights are either learned or scheduled; remove it or reference_weights_end",
        )
        given = [1 / len(end)] * len(end) if start is None and end is not None else start
        require(
            end is None or len(given) == len(end),
            f"{prefix}reference_weights_end: has {len(end or ())} weights, but reference_weights has {len(given or ())};"
            " give one weight for each reference",
        )
        require(
            end is None or end != given,
            f"{prefix}reference_weights_end: has no effect, because the weights of the first update are the same; remove it",
        )
        require(
            step is not None or not least,
            f"{prefix}reference_weights_min: {least:g} has no effect without reference_weights_step; remove it",
        )
        require(
            start is None or min(start) >= least,
            f"{prefix}reference_weights: {short(start)} has a weight below reference_weights_min {least:g}; change one of"
            " the two",
        )
        require(
            step is None or start is None or min(start) > 0,
            f"{prefix}reference_weights: {short(start)} has a weight of 0, which reference_weights_step cannot change;"
            " start from a small weight, or leave that reference out",
        )

    def check_references(self, prefix: str, whose: str, references: int) -> None:
        """Raise SalsaError for options that do not fit the number of references of a policy.

        prefix: starts the keys in messages. whose: the policy with a colon, or nothing, before the key.
        """
        remedy = "set it in `overrides` of policies with several" if whose else "remove it, or pass several"
        for field in dataclasses.fields(ReferenceMixture):
            value = getattr(self, field.name)
            require(
                references > 1 or value == field.default,
                f"{whose}{prefix}{field.name}: {_shown(value)} has no effect with one reference; {remedy}",
            )
        for name in WEIGHTS:
            weights = getattr(self, name)
            require(
                weights is None or len(weights) == references,
                f"{whose}{prefix}{name}: has {len(weights or ())} weights for {references} references; give one weight for"
                " each reference",
            )
        require(
            self.reference_weights_min * references < 1,
            f"{whose}{prefix}reference_weights_min: {self.reference_weights_min:g} must be below 1/{references}, because"
            f" the weights of {references} references sum to 1; lower it",
        )


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else short(value) if isinstance(value, list) else str(value)
