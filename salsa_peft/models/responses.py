"""Prompts and responses as padded tensors, and their log-probabilities under a model.

Shapes: B sequences, P prompt tokens (padded on the left), T response tokens (padded on the right), N response tokens
without padding in the whole batch, H hidden size. A response includes the token that ends it (data/chat/turn_ends.py),
which counts in its length, and nothing after that token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from salsa_peft.data.chat.turn_ends import AssistantTurn
from salsa_peft.models.base import hidden_states
from salsa_peft.models.logprobs import Head, token_logprobs


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

    def rows(self, index: Tensor) -> Responses:
        """The responses at these indices, without columns that are padding in every selected row."""
        picked = Responses(*(field[index] for field in self))
        left = int((~picked.prompt_mask).long().cumprod(-1).sum(-1).min())
        right = int(picked.lengths.max())
        return Responses(picked.prompt_ids[:, left:], picked.prompt_mask[:, left:], picked.response_ids[:, :right],
                         picked.response_mask[:, :right], picked.finished)  # fmt: skip


def pad_tokens(
    sequences: Sequence[Sequence[int]], pad: int, device: torch.device, side: str = "right"
) -> tuple[Tensor, Tensor]:
    """Pad lists of token ids on one side; returns ids and mask, (B, L) each."""
    rows = [torch.tensor(ids, dtype=torch.long) for ids in sequences]
    ids = pad_sequence(rows, batch_first=True, padding_value=pad, padding_side=side)
    mask = pad_sequence([torch.ones(len(row), dtype=torch.bool) for row in rows], batch_first=True, padding_side=side)
    return ids.to(device), mask.to(device)


def token_lists(ids: Tensor, mask: Tensor) -> list[list[int]]:
    """The token ids (B, L) of each row where the mask is True, copied to the CPU in one transfer."""
    kept = ids.masked_fill(~mask, -1)  # no token has the id -1
    return [[token for token in row if token >= 0] for row in kept.tolist()]


def response_states(hidden: Tensor, responses: Responses) -> Tensor:
    """Hidden states from which the response tokens were sampled: (B, P + T, H) → (N, H)."""
    return response_values(hidden, responses)[responses.response_mask]


def forbidden_eos(responses: Responses, min_new_tokens: int) -> Tensor:
    """Mask of each response's first `min_new_tokens` tokens, where end tokens are forbidden, (N,) bool."""
    early = torch.arange(responses.response_ids.shape[1], device=responses.response_ids.device) < min_new_tokens
    return early.expand_as(responses.response_mask)[responses.response_mask]


def scatter(values: Tensor, mask: Tensor) -> Tensor:
    """Put N values where the mask (B, T) is True, and 0 elsewhere: (N,) → (B, T)."""
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)


def response_logprobs(
    hidden: Tensor, responses: Responses, head: Head, min_new_tokens: int, *, with_entropy: bool = False
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies (0 unless `with_entropy`), (B, T) each, from hidden states (B, P + T, H)."""
    labels = responses.response_ids[responses.response_mask]
    states = response_states(hidden, responses)
    result = token_logprobs(states, labels, forbidden_eos(responses, min_new_tokens), head, with_entropy=with_entropy)
    return scatter(result.logprobs, responses.response_mask), scatter(result.entropy, responses.response_mask)


@torch.no_grad()
def last_token_states(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Hidden states (B, H) of the last non-padding token of each row, for a reward model's head."""
    hidden = hidden_states(model, input_ids, attention_mask)
    places = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    last = (attention_mask.long() * places).argmax(-1)
    return hidden[torch.arange(len(hidden), device=hidden.device), last]


def response_values(values: Tensor, responses: Responses) -> Tensor:
    """Values or hidden states at the position before each response token: (B, P + T, …) → (B, T, …)."""
    start = responses.prompt_ids.shape[1] - 1
    return values[:, start : start + responses.response_ids.shape[1]]


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
