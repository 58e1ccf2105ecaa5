"""The base class of rewards, and the reward that wraps a library user's callable."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from salsa_peft.models.responses import Responses

Rows = Sequence[Mapping[str, Any]]
"""The data's rows, one for each response."""


class Reward(ABC):
    """Scores responses. Subclasses define `__call__`; the other methods suit rewards without a model."""

    on_device: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext
    """Context in which `frozen_model` is on the device; training/references.py replaces it if it offloads the model."""

    micro_batch_tokens: int | None = None
    """Most tokens, padding included, in one forward pass of the reward's model; a longer sequence has one of its own. PPO
    sets its own micro_batch_tokens. None: no limit."""

    @cached_property
    def name(self) -> str:
        """The reward's name in logs, and in a weighted sum that gives the reward no other name."""
        return type(self).__name__

    @cached_property
    def code(self) -> str:
        """Name of the class or function that scores. A resumed run compares this name, not the code."""
        return type(self).__name__

    @abstractmethod
    def __call__(self, responses: Responses, rows: Rows) -> Tensor:
        """Return a score for each response, (B,) float32. rows[i] is the data's row of response i."""

    def scores_and_mask(self, responses: Responses, rows: Rows) -> tuple[Tensor, Tensor]:
        """Return scores (B,), float32, and a mask (B,) of the responses that get a score; other scores are 0."""
        scores = self(responses, rows).float()
        return scores, torch.ones_like(scores, dtype=torch.bool)

    def components(self) -> list[Reward]:
        """The reward itself in a list or, for a weighted sum, the rewards in the sum."""
        return [self]

    def weights(self) -> Iterable[Tensor] | None:
        """The weights of the reward's model, which a resumed run compares; None without a model."""
        return None

    def frozen_model(self) -> nn.Module | None:
        """A frozen model that only this reward uses, so that it can be offloaded; None without such a model."""
        return None

    def metric_names(self) -> list[str]:
        """Names of the metrics that the reward records for every batch."""
        return []

    @cached_property
    def _metrics(self) -> dict[str, tuple[float, int]]:
        return {}

    def add_metric(self, name: str, total: float, count: int) -> None:
        """Add `total`, the sum of `count` values, to a metric that is logged with the scores."""
        before = self._metrics.get(name, (0.0, 0))
        self._metrics[name] = (before[0] + total, before[1] + count)

    def take_metrics(self) -> dict[str, tuple[float, int]]:
        """Return the metrics collected since the last call, name → (sum, count), and reset them."""
        metrics = dict(self._metrics)
        self._metrics.clear()
        return metrics


class CallableReward(Reward):
    """Makes a Reward of a callable `(responses, rows) → (B,)`."""

    def __init__(self, function: Callable[[Responses, Rows], Tensor]) -> None:
        self.function = function
        self.name = self.code = type(function).__name__

    def __call__(self, responses: Responses, rows: Rows) -> Tensor:
        return self.function(responses, rows)

    def weights(self) -> Iterable[Tensor] | None:
        """The parameters of the callable if it is a torch module, else None."""
        return self.function.parameters() if isinstance(self.function, nn.Module) else None
