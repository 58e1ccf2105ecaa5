"""Scores of a linear head on the last token of each prompt with its response."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from salsa_peft.models.base import apply_scalar_head, packs_rows
from salsa_peft.models.batches import tokens_per_pass
from salsa_peft.models.responses import Responses, Sequences, last_states, send


@torch.no_grad()
def last_token_scores(
    model: nn.Module, head: nn.Linear, responses: Responses, rows: int, tokens: int | None = None
) -> Tensor:
    """Scores (B,) of the model with its active adapter.

    A forward pass has at most `rows` sequences of similar length and `tokens` tokens; with flash attention it has no
    padding at all.
    """
    sequences, packed = Sequences(responses), packs_rows(model)
    count, pass_tokens = len(sequences.lengths), tokens_per_pass(model)
    batches = sequences.batches(range(count), rows, tokens, packed=packed, pass_tokens=pass_tokens)
    inputs = (sequences.forward_batch(batch, packed=packed) for batch in batches)
    return in_rows_order([apply_scalar_head(head, last_states(model, one)) for one in inputs], batches)


def in_rows_order(scores: Sequence[Tensor], batches: Sequence[Sequence[int]]) -> Tensor:
    """Scores of all batches, (B,), in the order of the rows. batches: the indices of each batch's rows."""
    found = torch.cat(list(scores))
    (order,) = send([np.array([row for batch in batches for row in batch])], found.device)
    return torch.empty_like(found).index_copy(0, order, found)
