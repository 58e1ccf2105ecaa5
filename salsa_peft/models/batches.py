"""Batches of rows of similar length, so that a forward pass computes little padding."""

from collections.abc import Sequence

from torch import nn

from salsa_peft.models.base import causal_lm, trunk

SMALL = 256
"""Number of tokens, padding included, that are not worth a second forward pass: one of so few is hardly faster."""
MULTIPLICATIONS = 1_500_000
"""Number of multiplications with a model's largest matrix in the time that a CPU takes to start a forward pass. Measured
with a Llama of 260,000 parameters, an adapter and one thread: a pass starts in the time of 120 to 180 tokens, and its
largest matrix has 64 × 172 weights."""


def tokens_per_pass(model: nn.Module) -> int:
    """Number of tokens that a CPU computes in the time that it takes to start a forward pass; 0 on other devices.

    This matters for small models only: it is 136 for a model with 260,000 parameters, and 1 for SmolLM2-135M.
    """
    lm = causal_lm(model)
    if lm.device.type != "cpu":
        return 0
    embeddings = lm.get_input_embeddings().weight
    largest: int = max(weight.numel() for weight in trunk(lm).parameters() if weight is not embeddings)
    return MULTIPLICATIONS // largest


def overhead(lengths: Sequence[int], pass_tokens: int = 0) -> int:
    """Number of tokens that count as much as one more forward pass.

    A sixteenth of the mean length, from 16 to 64: padding then adds 1% to the tokens of chats (mean length 700), and 3%
    to those of short texts (mean length 80). At least `pass_tokens`, the model's `tokens_per_pass`. SMALL if all rows
    together are no more than that.
    """
    if len(lengths) * max(lengths, default=0) <= SMALL:
        return SMALL
    return max(min(max(sum(lengths) // (16 * len(lengths)), 16), 64), pass_tokens)


def split_by_length(
    lengths: Sequence[int], rows: int, tokens: int | None = None, *, pass_tokens: int = 0
) -> list[list[int]]:
    """Split rows into batches for a forward pass each: lists of indices, from the shortest rows to the longest.

    The split minimises the number of tokens with padding, Σ rows of a batch × its longest row, plus `overhead` tokens
    for each batch (dynamic programming over the sorted lengths). rows: most rows of a batch. tokens: most tokens of a
    batch with its padding; a row that is longer has a batch of its own. pass_tokens: as for `overhead`.
    """
    order = sorted(range(len(lengths)), key=lambda row: lengths[row])
    extra = overhead(lengths, pass_tokens)
    costs, starts = [0], [0]  # of the best split of the first 0, 1, 2, … sorted rows; where its last batch starts
    for end, row in enumerate(order, 1):
        longest = lengths[row]
        fit = rows if tokens is None else min(rows, max(tokens // max(longest, 1), 1))
        # the best start never moves back as `end` grows, because the costs satisfy the quadrangle inequality
        earliest = max(starts[-1], end - fit)
        cost, start = min((costs[first] + (end - first) * longest + extra, first) for first in range(earliest, end))
        costs.append(cost)
        starts.append(start)
    batches, end = [], len(order)
    while end:
        batches.append(order[starts[end] : end])
        end = starts[end]
    return batches[::-1]


def split_by_tokens(lengths: Sequence[int], rows: int, tokens: int | None = None) -> list[list[int]]:
    """Split rows into batches for forward passes without padding: lists of indices, in the rows' order.

    rows, tokens: most rows and most tokens of a batch; a row that is longer than `tokens` has a batch of its own.
    """
    batches: list[list[int]] = []
    count = 0
    for row, length in enumerate(lengths):
        if not batches or len(batches[-1]) == rows or (tokens is not None and count + length > tokens):
            batches.append([])
            count = 0
        batches[-1].append(row)
        count += length
    return batches
