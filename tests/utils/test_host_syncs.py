"""The counter of waits for a GPU that other tests rely on: what it counts, and what it does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from host_syncs import HostSyncs

TABLE = torch.arange(6).reshape(2, 3)
MASK = TABLE > 2


@pytest.mark.parametrize(
    "read",
    [
        lambda: TABLE.tolist(),
        lambda: TABLE[0, 0].item(),
        lambda: bool(MASK.any()),
        lambda: int(TABLE.sum()),
        lambda: 1 if TABLE.sum() > 0 else 0,
        lambda: f"{TABLE.sum()}",
        lambda: list(range(5))[TABLE[0, 0]],
        lambda: TABLE[MASK],
        lambda: TABLE.clone().__setitem__(MASK, torch.tensor([1, 2, 3])),
        lambda: MASK.nonzero(),
        lambda: torch.where(MASK),
        lambda: TABLE.masked_select(MASK),
        lambda: torch.equal(TABLE, TABLE),
        lambda: torch.unique(TABLE),
        lambda: torch.repeat_interleave(TABLE[0], torch.tensor([1, 2, 3])),
        lambda: TABLE.cpu(),
        lambda: TABLE.to("cpu"),
        lambda: TABLE.numpy(),
    ],
)
def test_what_waits(read: Callable[[], Any]) -> None:
    with HostSyncs() as syncs:
        read()
    assert syncs.total == 1


def test_what_does_not_wait() -> None:
    """Arithmetic, indices, masks that keep the shape; each element that is read counts by itself."""
    with HostSyncs() as syncs:
        TABLE[torch.tensor([1, 0])].sum(-1).masked_fill(MASK[:, 0], 0).clamp(max=3)
        torch.where(MASK, TABLE, 0).gather(1, TABLE.clamp(max=2)).argmax(-1)
    assert syncs.total == 0
    with HostSyncs() as syncs:
        [float(value) for value in TABLE[0]]
    assert syncs.total == 3
