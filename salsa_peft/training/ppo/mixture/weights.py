"""Weights of several references: fixed, scheduled over the run, or learned from the scores.

Learned weights take a step of exponentiated gradient (Kivinen and Warmuth, 1997) after each update,

    w_i ← w_i exp(η g_i) / Σ_j w_j exp(η g_j),    g_i = mean over responses y of  z(y) · d_i(y) / σ

with the standardised scores z, and d_i(y) = log r_i(y) − the mean of log r_j(y) over the references, where log r_i(y) is
the sum over the response's tokens. It is the gradient of the mean of z(y) Σ w_i log r_i(y), the score-weighted
log-likelihood of the references' logarithmic mean: the reference that gives more probability to the better responses
gains weight. σ is the deviation of the d_i over responses, pooled over references, so that g_i has no unit and is near 0
where the references do not tell better responses from worse ones. With two references g_i is the correlation of score and
log-likelihood ratio. Shapes: B responses, T response tokens, K references.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from salsa_peft.training.ppo.config import SalsaPPOConfig


class ReferenceWeights:
    """The weights of a run's references, with the sum 1. labels: the references' labels."""

    def __init__(self, args: SalsaPPOConfig, labels: Sequence[str]) -> None:
        self.args, self.names = args, metric_names(labels)
        self.learned = list(args.reference_weights or [1 / len(labels)] * len(labels))
        """The current weights if they are learned, else the weights of the first update."""

    def at(self, update: int) -> list[float]:
        """The weights of an update. update: its number, from 1."""
        end = self.args.reference_weights_end
        if end is None:
            return self.learned
        last = self.args.max_steps // self.args.steps_per_update
        share = min((update - 1) / (last - 1), 1.0) if last > 1 else 0.0
        return [(1 - share) * start + share * stop for start, stop in zip(self.learned, end, strict=True)]

    def learn(self, gradient: Tensor) -> None:
        """Take a step with the gradient g (K,) of `score_gradient`."""
        args = self.args
        assert args.reference_weights_step is not None
        self.learned = step(self.learned, gradient.tolist(), args.reference_weights_step, args.reference_weights_min)

    def metrics(self, update: int, gradient: Tensor | None) -> dict[str, float]:
        """Each weight in this update and, if they are learned, its g; {} if the weights are all equal by default."""
        if not self.args.weighs_references:
            return {}
        found = {f"reference_weight/{name}": w for name, w in zip(self.names, self.at(update), strict=True)}
        if gradient is not None:
            found |= {f"reference_gradient/{n}": g for n, g in zip(self.names, gradient.tolist(), strict=True)}
        return found


def metric_names(labels: Sequence[str]) -> list[str]:
    """Names of references in metrics: the labels, of a path its last part, with a number where they are repeated."""
    short = [label.rstrip("/").rsplit("/", 1)[-1] for label in labels]
    return [f"{name}-{place}" if short.count(name) > 1 else name for place, name in enumerate(short)]


def score_gradient(scores: Tensor, logprobs: Tensor, mask: Tensor, group: int = 1) -> Tensor:
    """The gradient g (K,) of the weights; see above. It is 0 if scores or references do not differ.

    scores: (B,). logprobs: the references' log-probs of the response tokens, (K, B, T). mask: (B, T). group: number of
    responses to a prompt, one after another; with several, scores and d_i are compared within each prompt.
    """
    sums = torch.where(mask, logprobs.double(), 0.0).sum(-1)
    centred = _centred(scores.double()[None], group)
    relative = _centred(sums - sums.mean(0), group)
    spread = centred.square().mean().sqrt() * relative.square().mean().sqrt()
    return torch.where(spread > 0, (centred * relative).mean(-1) / spread, 0.0)


def _centred(values: Tensor, group: int) -> Tensor:
    """Values (K, B) less the batch's mean or, with groups of several, less the group's mean."""
    if group == 1:
        return values - values.mean(-1, keepdim=True)
    groups = values.view(len(values), -1, group)
    return (groups - groups.mean(-1, keepdim=True)).view_as(values)


def step(weights: Sequence[float], gradient: Sequence[float], size: float, least: float) -> list[float]:
    """Weights after a step of exponentiated gradient, none below `least`, with the sum 1."""
    powers = [math.log(weight) + size * g for weight, g in zip(weights, gradient, strict=True)]
    largest = max(powers)
    # not 0, from which no step would lead back
    return bounded([max(math.exp(power - largest), sys.float_info.min) for power in powers], least)


def bounded(weights: Sequence[float], least: float) -> list[float]:
    """The weights, scaled to the sum 1, with those below `least` raised to it and the others scaled down.

    That is the projection in relative entropy onto the simplex with this bound (Herbster and Warmuth, 2001).
    """
    raised: set[int] = set()
    while True:
        rest = sum(weight for place, weight in enumerate(weights) if place not in raised)
        scale = (1 - least * len(raised)) / rest
        found = [least if place in raised else scale * weight for place, weight in enumerate(weights)]
        low = {place for place, weight in enumerate(found) if weight < least}
        if not low:
            return found
        raised |= low
