"""Prompts and responses as padded tensors, forward passes over them, and their log-probabilities under a model.

Shapes: B sequences, P prompt tokens (padded on the left), T response tokens (padded on the right), H hidden size. In a
forward pass: b sequences, L tokens of the longest, n response tokens of all. A response includes the token that ends it
(data/chat/turn_ends.py), which counts in its length, and nothing after that token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from salsa_peft.data.chat.turn_ends import AssistantTurn
from salsa_peft.models.base import hidden_states, packed_options
from salsa_peft.models.batches import split_by_length, split_by_tokens
from salsa_peft.models.logprobs import Head, TokenLogprobs, token_logprobs
from salsa_peft.utils.errors import require


class Responses(NamedTuple):
    """A batch of prompts and responses: token ids and masks."""

    prompt_ids: Tensor
    """(B, P), token ids of the prompts."""
    prompt_mask: Tensor
    """(B, P) bool, False at padding."""
    response_ids: Tensor
    """(B, T), token ids of the responses."""
    response_mask: Tensor
    """(B, T) bool, False at padding."""
    finished: Tensor
    """(B,) bool: whether the response ended with an end token, instead of being cut by the length limit."""

    @property
    def input_ids(self) -> Tensor:
        """Token ids of prompts and responses together, (B, P + T)."""
        return torch.cat([self.prompt_ids, self.response_ids], dim=1)

    @property
    def attention_mask(self) -> Tensor:
        """Mask of prompts and responses together, (B, P + T) bool, False at padding."""
        return torch.cat([self.prompt_mask, self.response_mask], dim=1)

    @property
    def lengths(self) -> Tensor:
        """Number of tokens of each response, (B,), including the token that ends it."""
        return self.response_mask.sum(-1)

    @property
    def content_mask(self) -> Tensor:
        """Mask of the responses without the tokens that end them, (B, T) bool."""
        places = torch.arange(self.response_mask.shape[1], device=self.response_mask.device)
        return self.response_mask & (places < (self.lengths - self.finished.long())[:, None])

    @property
    def empty(self) -> Tensor:
        """Whether each response consists of only the token that ends it, (B,) bool."""
        return self.finished & (self.lengths == 1)


def pad_tokens(
    sequences: Sequence[Sequence[int]], pad: int, device: torch.device, side: str = "right"
) -> tuple[Tensor, Tensor]:
    """Pad lists of token ids on one side; returns ids and mask, (B, L) each."""
    rows = [torch.tensor(ids, dtype=torch.long) for ids in sequences]
    ids = pad_sequence(rows, batch_first=True, padding_value=pad, padding_side=side)
    mask = pad_sequence([torch.ones(len(row), dtype=torch.bool) for row in rows], batch_first=True, padding_side=side)
    return ids.to(device, non_blocking=True), mask.to(device, non_blocking=True)


def token_lists(ids: Tensor, mask: Tensor) -> list[list[int]]:
    """The token ids (B, L) of each row where the mask is True, copied to the CPU in one transfer."""
    kept = ids.masked_fill(~mask, -1)  # no token has the id -1
    return [[token for token in row if token >= 0] for row in kept.tolist()]


class ForwardBatch(NamedTuple):
    """The input of one forward pass over prompts with their responses, and where the response tokens are in it.

    A position counts the tokens of the input row after row, padding included.
    """

    input_ids: Tensor
    """Token ids: (b, L), each row padded on the right; or (1, N), all rows one after another without padding."""
    options: dict[str, Any]
    """Further arguments of the model for rows without padding; {} for padded rows."""
    before: Tensor
    """Position before each response token, (n,): its hidden state gives the token's log-prob and value."""
    last: Tensor
    """Position of the last token of each row, (b,)."""
    cells: Tensor
    """Place of each response token in a flattened table (B, T) of the whole batch, (n,)."""
    forbidden: Tensor | None
    """Mask of the response tokens at which end tokens are forbidden, (n,) bool; None if they are allowed everywhere."""

    @property
    def labels(self) -> Tensor:
        """Token ids of the responses, (n,)."""
        return self.input_ids.flatten()[self.before + 1]


class Sequences:
    """Prompts with their responses, one sequence each, and the sequences' lengths on the CPU.

    The lengths are copied from the device once. All forward passes are then prepared on the CPU, which does not have to
    wait for the device. min_new_tokens: number of tokens of a response before an end token is allowed.
    """

    def __init__(self, responses: Responses, min_new_tokens: int = 0) -> None:
        self.tokens, self.min_new_tokens = responses.input_ids.flatten(), min_new_tokens
        self.prompt_width, self.width = responses.prompt_ids.shape[1], responses.response_ids.shape[1]  # P, T
        self.prompts, self.responses = torch.stack(
            [responses.prompt_mask.sum(-1), responses.response_mask.sum(-1)]
        ).tolist()
        """Number of tokens of each prompt, and of each response."""
        self.counts = np.array([self.prompts, self.responses])
        self.lengths = [sum(pair) for pair in zip(self.prompts, self.responses, strict=True)]
        """Number of tokens of each sequence."""
        require(all(self.lengths), "responses: a prompt and its response have no tokens together; leave such rows out")

    def batches(
        self, rows: Sequence[int], limit: int, tokens: int | None, *, packed: bool = False, pass_tokens: int = 0
    ) -> list[list[int]]:
        """Split rows for forward passes of at most `limit` rows and `tokens` tokens.

        packed: without padding. pass_tokens: the model's tokens_per_pass, for padded rows.
        """
        lengths = [self.lengths[row] for row in rows]
        if packed:
            parts = split_by_tokens(lengths, limit, tokens)
        else:
            parts = split_by_length(lengths, limit, tokens, pass_tokens=pass_tokens)
        return [[rows[place] for place in part] for part in parts]

    def forward_batch(self, rows: Sequence[int], *, packed: bool = False) -> ForwardBatch:
        """The input of a forward pass over these rows. packed: one after another, without padding."""
        index = np.array(rows)
        prompts, responses = self.counts[:, index]
        lengths, longest = prompts + responses, max(self.lengths[row] for row in rows)
        starts = lengths.cumsum() - lengths if packed else np.arange(len(rows)) * longest
        # a sequence's tokens are consecutive, because prompts are padded on the left and responses on the right
        first = index * (self.prompt_width + self.width) + self.prompt_width - prompts
        places = np.arange(longest)
        inside = places < lengths[:, None]
        tokens = np.where(inside, first[:, None] + places, 0)
        row, place = (np.arange(self.width) < responses[:, None]).nonzero()
        parts = [
            tokens[inside] if packed else tokens,
            (starts + prompts - 1)[row] + place,
            starts + lengths - 1,
            (index * self.width)[row] + place,
        ]
        if packed:
            parts += [np.broadcast_to(places, inside.shape)[inside], np.append(starts, lengths.sum())]
        source, positions, last, cell, *packing = send(parts, self.tokens.device)
        options = packed_options(packing[0], packing[1], longest) if packed else {}
        forbidden = cell % self.width < self.min_new_tokens if self.min_new_tokens else None
        input_ids = self.tokens[source].view(1 if packed else len(rows), -1)
        return ForwardBatch(input_ids, options, positions, last, cell, forbidden)

    def table(self, cells: Tensor, values: Tensor) -> Tensor:
        """A table (B, T) with these values (n,) at the places `cells`, and 0 elsewhere."""
        table = values.new_zeros(len(self.lengths) * self.width)
        return table.index_copy(0, cells, values).view(-1, self.width)


def send(parts: Sequence[NDArray[np.int64]], device: torch.device) -> Sequence[Tensor]:
    """Copy arrays to a device as flat tensors, all in one copy that does not wait for the device."""
    whole = torch.from_numpy(np.concatenate([part.ravel() for part in parts]))
    whole = whole.pin_memory() if device.type == "cuda" else whole
    return whole.to(device, non_blocking=True).split([part.size for part in parts])


def response_states(model: nn.Module, batch: ForwardBatch) -> Tensor:
    """Hidden states from which the response tokens were sampled, (n, H), with the active adapter."""
    return hidden_states(model, batch.input_ids, **batch.options).flatten(0, 1)[batch.before]


def response_logprobs(states: Tensor, batch: ForwardBatch, head: Head, *, with_entropy: bool = False) -> TokenLogprobs:
    """Log-probs and entropies (0 unless `with_entropy`) of the response tokens, from response_states (n, H)."""
    return token_logprobs(states, batch.labels, batch.forbidden, head, with_entropy=with_entropy)


def last_states(model: nn.Module, batch: ForwardBatch) -> Tensor:
    """Hidden states of each row's last token, (b, H), for a reward model's head."""
    return hidden_states(model, batch.input_ids, **batch.options).flatten(0, 1)[batch.last]


def pad_responses(prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], pad: int, ends: Sequence[int],
                  device: torch.device) -> Responses:  # fmt: skip
    """Make Responses from token ids. ends: the tokens that end a response, for Responses.finished."""
    finished = torch.tensor([bool(answer) and answer[-1] in ends for answer in answers], device=device)
    return Responses(*pad_tokens(prompts, pad, device, "left"), *pad_tokens(answers, pad, device), finished)


def pad_to_width(tensor: Tensor, width: int, value: float = 0, *, left: bool = False) -> Tensor:
    """Pad a tensor (B, L) to (B, width) with `value`, on the right or, with `left`, on the left."""
    missing = width - tensor.shape[1]
    return torch.nn.functional.pad(tensor, (missing, 0) if left else (0, missing), value=value)


def append_turn_end(responses: Responses, rows: Sequence[Mapping[str, Any]], turn: AssistantTurn) -> Responses:
    """Append the tokens that the chat template writes after a turn's end; reward models score these too."""
    if not turn.after:
        return responses
    ended, count = ends_turn(responses, rows, turn)[:, None], len(turn.after)
    width = responses.response_ids.shape[1] + count
    ids, mask = pad_to_width(responses.response_ids, width), pad_to_width(responses.response_mask, width)
    places = responses.lengths[:, None] + torch.arange(count, device=ids.device)
    after = torch.where(ended, torch.tensor(turn.after, device=ids.device), ids.gather(1, places))
    mask = mask.scatter(1, places, ended.expand_as(places))
    return responses._replace(response_ids=ids.scatter(1, places, after), response_mask=mask)


def concatenate(parts: Sequence[Responses], pad: int) -> Responses:
    """Join batches of responses into one batch, padded to the longest prompt and the longest response."""
    prompt, response = (max(part[i].shape[1] for part in parts) for i in (0, 2))
    return Responses(
        torch.cat([pad_to_width(part.prompt_ids, prompt, pad, left=True) for part in parts]),
        torch.cat([pad_to_width(part.prompt_mask, prompt, left=True) for part in parts]),
        torch.cat([pad_to_width(part.response_ids, response, pad) for part in parts]),
        torch.cat([pad_to_width(part.response_mask, response) for part in parts]),
        torch.cat([part.finished for part in parts]),
    )


def ends_turn(responses: Responses, rows: Sequence[Mapping[str, Any]], turn: AssistantTurn) -> Tensor:
    """Whether each response ends an assistant turn with the chat template's own end token, (B,) bool."""
    asked = [
        not isinstance(row.get("prompt"), str) or (turn.opening and row["prompt"].endswith(turn.opening))
        for row in rows
    ]
    last = responses.response_ids.gather(-1, (responses.lengths - 1).clamp(min=0)[:, None]).squeeze(-1)
    end = -1 if turn.end is None else turn.end  # no token has the id -1
    return (last == end) & last.new_tensor(list(map(bool, asked))).bool()
