"""Random tensors under random masks, for the tests that hold pure functions against slow loops."""

from __future__ import annotations

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

PROPERTY = settings(max_examples=40, deadline=None, derandomize=True, database=None)
LENGTHS = st.lists(st.integers(1, 6), min_size=1, max_size=4)
POISON = (float("nan"), float("inf"), -float("inf"), 1e30)


def mask_of(lengths: list[int]) -> Tensor:
    """(B, T) True at the first `lengths[b]` tokens, one column wider than the longest."""
    return torch.arange(max(lengths) + 1) < torch.tensor(lengths)[:, None]


def draw(lengths: list[int], seed: int, count: int) -> list[Tensor]:
    """`count` tensors (B, T), standard normal."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(mask_of(lengths).shape, generator=generator) for _ in range(count)]


def poisoned(values: Tensor, mask: Tensor, poison: float) -> Tensor:
    """What stands outside the mask replaced."""
    return values.masked_fill(~mask, poison)
