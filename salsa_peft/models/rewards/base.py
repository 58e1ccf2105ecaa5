"""The base class of rewards: scores, metrics to log with them, models to identify and to offload."""

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
"""Rows of the data: one for each response."""


class Reward(ABC):
    """Scores responses. A subclass must define `__call__`; the other defaults fit rewards without a model."""

    on_device: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext
    """Context in which `frozen_model` is on the device. training/offload.py replaces it where the model is offloaded to
    the CPU."""

    @cached_property
    def name(self) -> str:
        """The reward's name in logs and, unless another is given, in a weighted sum."""
        return type(self).__name__

    @cached_property
    def code(self) -> str:
        """The name of the class or function that scores, for checkpoints: code itself cannot be compared."""
        return type(self).__name__

    @abstractmethod
    def __call__(self, responses: Responses, rows: Rows) -> Tensor:
        """Score each response → (B,), float32; rows[i] is the data's row of response i."""

    def scores_and_mask(self, responses: Responses, rows: Rows) -> tuple[Tensor, Tensor]:
        """Scores (B,), float32, and a mask (B,) of the responses it applies to; other scores are 0."""
        scores = self(responses, rows).float()
        return scores, torch.ones_like(scores, dtype=torch.bool)

    def components(self) -> list[Reward]:
        """The reward itself or, for a weighted sum, the rewards in it."""
        return [self]

    def weights(self) -> Iterable[Tensor] | None:
        """The weights by which a resumed run recognises the reward's model; None without a model."""
        return None

    def frozen_model(self) -> nn.Module | None:
        """A frozen model that this reward alone uses, so that it can be offloaded; None without one."""
        return None

    @cached_property
    def _metrics(self) -> dict[str, tuple[float, int]]:
        return {}

    def add_metric(self, name: str, total: float, count: int) -> None:
        """Add a sum over `count` values to a metric that is logged with the scores."""
        before = self._metrics.get(name, (0.0, 0))
        self._metrics[name] = (before[0] + total, before[1] + count)

    def take_metrics(self) -> dict[str, tuple[float, int]]:
        """Metrics to log: name → (sum, count) since the last call; processes add theirs up."""
        metrics = dict(self._metrics)
        self._metrics.clear()
        return metrics


class CallableReward(Reward):
    """Wraps a library user's callable `(responses, rows) → (B,)`."""

    def __init__(self, function: Callable[[Responses, Rows], Tensor]) -> None:
        self.function = function
        self.name = self.code = type(function).__name__

    def __call__(self, responses: Responses, rows: Rows) -> Tensor:
        return self.function(responses, rows)

    def weights(self) -> Iterable[Tensor] | None:
        """The parameters of a callable that is a torch module."""
        return self.function.parameters() if isinstance(self.function, nn.Module) else None
