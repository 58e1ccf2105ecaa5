"""The KL to several references r_i with weights w_i, of the response tokens of one forward pass's rows.

| reference_mean | the KL is |
|---|---|
| kl | Σ w_i KL(π ‖ r_i), the paper's MKL |
| geometric | KL(π ‖ r), log r = Σ w_i log r_i − log Z, with Z the sum of Π r_i^w_i over the vocabulary |
| arithmetic | KL(π ‖ r), r = Σ w_i r_i |

The geometric mean needs the distributions of all references over the vocabulary, for Z, and so does the arithmetic one
with the estimator `full`. For them the references' hidden states are kept until all references have scored, and the
distributions exist for CHUNK tokens at a time. Shapes: n response tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from salsa_peft.config.options.ppo import PPOOptions
from salsa_peft.models.architectures.memory import CHUNK
from salsa_peft.models.logprobs import Head, distribution_kl, full_kl, log_distribution
from salsa_peft.models.responses import ForwardBatch, response_logprobs
from salsa_peft.training.ppo.losses import KL_ESTIMATORS


def geometric_mean(weighted: Iterable[tuple[float, Tensor]]) -> Tensor:
    """Log-probs (n, V) of r = Π r_i^w_i / Z from pairs of w_i > 0 and log r_i (n, V), which are overwritten."""
    total: Tensor | None = None
    for weight, logp in weighted:
        logp.mul_(weight)
        total = logp if total is None else total.add_(logp)
    assert total is not None
    return total.log_softmax(-1)


def arithmetic_mean(weighted: Iterable[tuple[float, Tensor]]) -> Tensor:
    """Log-probs of r = Σ w_i r_i from pairs of w_i > 0 and log r_i, of any shape; the latter are overwritten."""
    total: Tensor | None = None
    for weight, logp in weighted:
        logp.add_(math.log(weight))
        total = logp if total is None else torch.logaddexp(total, logp, out=total)
    assert total is not None
    return total


Distribution = Callable[[slice], Tensor]
"""Function that computes a model's log-probs (n', V) of a slice of the response tokens."""
Precision = Callable[[], AbstractContextManager[Any]]
"""Function that makes the context in which a model computes, such as models.precision.autocast_as."""
MEANS = {"geometric": geometric_mean, "arithmetic": arithmetic_mean}
"""Value of `reference_mean`, but for "kl" → function that makes one distribution of several."""


class ReferenceKL:
    """The KL of one forward pass's rows to all references, which are added one after another."""

    def __init__(self, args: PPOOptions, weights: Sequence[float], head: Head, logprobs: Tensor, states: Tensor | None,
                 *, keeps_logprobs: bool = False) -> None:  # fmt: skip
        """weights: of the references, with the sum 1. head: the policy's. logprobs: the policy's, (n,).

        states: the policy's hidden states (n, H), which only the estimator `full` needs. keeps_logprobs: whether
        `logprobs_of` is read.
        """
        self.args, self.weights, self.head, self.logprobs, self.states = args, weights, head, logprobs, states
        full = args.kl_estimator == "full"
        self.mixes = args.reference_mean == "geometric" or (full and args.reference_mean == "arithmetic")
        self.reads_logprobs = keeps_logprobs or not (full or self.mixes)
        self.added, self.total = 0, torch.zeros_like(logprobs)
        self.logprobs_of: list[Tensor] = []
        """Each reference's log-probs of the response tokens, (n,)."""
        self.distributions: list[Distribution] = []
        self.batch: ForwardBatch | None = None  # of the last reference; all have the response tokens in the same order

    def add(self, states: Tensor, batch: ForwardBatch, head: Head, precision: Precision) -> None:
        """Add the next reference. states: its response_states (n, H). precision: makes the context it computes in."""
        weight, args = self.weights[self.added], self.args
        self.added, self.batch = self.added + 1, batch
        if self.reads_logprobs:
            self.logprobs_of.append(response_logprobs(states, batch, head).logprobs)
        if self.mixes:
            self.distributions.append(distribution_of(states, batch.forbidden, head, precision))
            return
        if args.reference_mean != "kl":
            return
        if args.kl_estimator == "full":
            assert self.states is not None
            found = full_kl(self.states, states, batch.forbidden, self.head, head)
        else:
            found = KL_ESTIMATORS[args.kl_estimator](self.logprobs, self.logprobs_of[-1])
        self.total += found * (weight * len(self.weights))  # times 1 with equal weights, so that nothing is rounded

    def kl(self) -> Tensor:
        """The KL at each response token, (n,), when all references are added."""
        args = self.args
        if args.reference_mean == "kl":
            return self.total / len(self.weights)
        if self.mixes:
            return torch.cat([self._kl_of_chunk(part) for part in chunks(len(self.logprobs))])
        weighted = zip(self.weights, self.logprobs_of, strict=True)
        mixture = arithmetic_mean((weight, logp.clone()) for weight, logp in weighted if weight > 0)
        return KL_ESTIMATORS[args.kl_estimator](self.logprobs, mixture)

    def _kl_of_chunk(self, part: slice) -> Tensor:
        assert self.batch is not None
        weighted = zip(self.weights, self.distributions, strict=True)
        mixture = MEANS[self.args.reference_mean]((w, distribution(part)) for w, distribution in weighted if w > 0)
        if self.args.kl_estimator != "full":
            chosen = mixture.gather(-1, self.batch.labels[part][:, None]).squeeze(-1)
            return KL_ESTIMATORS[self.args.kl_estimator](self.logprobs[part], chosen)
        assert self.states is not None
        forbidden = None if self.batch.forbidden is None else self.batch.forbidden[part]
        policy = log_distribution(self.states[part], self.head, forbidden)
        return distribution_kl(policy, mixture, masked=forbidden is not None)


def distribution_of(states: Tensor, forbidden: Tensor | None, head: Head, precision: Precision) -> Distribution:
    """Function that computes a reference's log-probs (n', V) of a slice of the tokens.

    The head's values are kept on the device, where an offloaded model no longer is when the function is called.
    """
    kept = head._replace(weight=head.weight.detach(), bias=None if head.bias is None else head.bias.detach())

    def distribution(part: slice) -> Tensor:
        with precision():
            return log_distribution(states[part], kept, None if forbidden is None else forbidden[part])

    return distribution


def chunks(count: int) -> list[slice]:
    """Slices of at most CHUNK tokens that divide `count` tokens."""
    return [slice(start, start + CHUNK) for start in range(0, count, CHUNK)]
