"""The base class of all rewards: scores, the figures to log beside them, and what training needs to know of the models inside."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections import defaultdict
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
    """Scores responses. A subclass needs `__call__` alone; the other methods have defaults for a reward without a model."""

    on_device: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext
    """Context in which `frozen_model` is on the device. training/offload.py replaces it where the model is offloaded to the CPU."""

    @cached_property
    def name(self) -> str:
        """The reward's name in logs and, unless another is given, in a weighted sum."""
        return type(self).__name__

    @property
    def code(self) -> str:
        """The name of the class or function that scores. Checkpoints keep it, since code itself cannot be compared."""
        return type(self).__name__

    @abstractmethod
    def __call__(self, responses: Responses, rows: Rows) -> Tensor:
        """Score each response → (B,), float32; rows[i] is the data's row of response i."""

    def scores_and_mask(self, responses: Responses, rows: Rows) -> tuple[Tensor, Tensor]:
        """Scores (B,), float32, and a mask (B,) of the responses that the reward applies to; the score of others is 0."""
        scores = self(responses, rows).float()
        return scores, torch.ones_like(scores, dtype=torch.bool)

    def components(self) -> list[Reward]:
        """The reward itself or, for a weighted sum, the rewards in it."""
        return [self]

    def weights(self) -> Iterable[Tensor] | None:
        """The weights that identify the reward's model, by which a resumed run recognises it; None without a model."""
        return None

    def frozen_model(self) -> nn.Module | None:
        """A frozen model that this reward alone uses, so that it can be offloaded; None without one."""
        return None

    @cached_property
    def tally(self) -> Tally:
        """The metrics to log beside the scores."""
        return Tally()

    def take_figures(self) -> dict[str, tuple[float, int]]:
        """Metrics to log beside the scores: name → (sum, count) since the last call. Sums, so that processes can add theirs up."""
        return self.tally.take()


class CallableReward(Reward):
    """A callable `(responses, rows) → (B,)` of a library user's, which need not be a Reward."""

    def __init__(self, function: Callable[[Responses, Rows], Tensor]) -> None:
        self.function, self.name = function, type(function).__name__

    @property
    def code(self) -> str:
        """The callable's class."""
        return self.name

    def __call__(self, responses: Responses, rows: Rows) -> Tensor:
        return self.function(responses, rows)

    def weights(self) -> Iterable[Tensor] | None:
        """The parameters of a callable that is a torch module."""
        return self.function.parameters() if isinstance(self.function, nn.Module) else None


class Tally:
    """Sums and counts of metrics, until they are taken for the log."""

    def __init__(self) -> None:
        self.figures: dict[str, tuple[float, int]] = defaultdict(lambda: (0.0, 0))

    def add(self, name: str, total: float, count: int) -> None:
        """Add a sum over `count` values to a metric."""
        before = self.figures[name]
        self.figures[name] = (before[0] + total, before[1] + count)

    def take(self) -> dict[str, tuple[float, int]]:
        """Name → (sum, count) since the last call."""
        taken = dict(self.figures)
        self.figures.clear()
        return taken
