"""Prompts and responses as padded tensors, and their log-probabilities under a model.

Shapes: B sequences, P prompt tokens (padded on the left), T response tokens (padded on the right), N = True in the
mask. A response includes the token that ends it (data/chat/turn_ends.py) and nothing after; one that is this token
alone has length 1.
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
    """(B, P)"""
    prompt_mask: Tensor
    """(B, P) bool"""
    response_ids: Tensor
    """(B, T)"""
    response_mask: Tensor
    """(B, T) bool"""
    finished: Tensor
    """(B,) bool: a token that ends responses ended it, not the length limit."""

    @property
    def input_ids(self) -> Tensor:
        """(B, P + T)"""
        return torch.cat([self.prompt_ids, self.response_ids], dim=1)

    @property
    def attention_mask(self) -> Tensor:
        """(B, P + T) bool"""
        return torch.cat([self.prompt_mask, self.response_mask], dim=1)

    @property
    def lengths(self) -> Tensor:
        """(B,): the number of tokens of each response, with the one that ends it."""
        return self.response_mask.sum(-1)

    @property
    def content_mask(self) -> Tensor:
        """(B, T) bool: the response without the token that ends it, which may not be a special token."""
        places = torch.arange(self.response_mask.shape[1], device=self.response_mask.device)
        return self.response_mask & (places < (self.lengths - self.finished.long())[:, None])

    @property
    def empty(self) -> Tensor:
        """(B,) bool: the response is only the token that ends it."""
        return self.finished & (self.lengths == 1)

    def rows(self, index: Tensor) -> Responses:
        """The rows of an index, without columns that are padding in all of them."""
        picked = Responses(*(field[index] for field in self))
        left = int((~picked.prompt_mask).long().cumprod(-1).sum(-1).min())
        right = int(picked.lengths.max())
        return Responses(picked.prompt_ids[:, left:], picked.prompt_mask[:, left:], picked.response_ids[:, :right],
                         picked.response_mask[:, :right], picked.finished)  # fmt: skip


def pad_tokens(
    sequences: Sequence[Sequence[int]], pad: int, device: torch.device, side: str = "right"
) -> tuple[Tensor, Tensor]:
    """Token ids → ids and mask, (B, L), padded on one side."""
    rows = [torch.tensor(ids, dtype=torch.long) for ids in sequences]
    ids = pad_sequence(rows, batch_first=True, padding_value=pad, padding_side=side)
    mask = pad_sequence([torch.ones(len(row), dtype=torch.bool) for row in rows], batch_first=True, padding_side=side)
    return ids.to(device), mask.to(device)


def response_states(hidden: Tensor, responses: Responses) -> Tensor:
    """(B, P + T, H) → (N, H): the states from which the tokens of the responses were sampled."""
    return response_values(hidden, responses)[responses.response_mask]


def forbidden_eos(responses: Responses, min_new_tokens: int) -> Tensor:
    """(N,) bool: positions before `min_new_tokens`, where no token that ends a response is allowed."""
    early = torch.arange(responses.response_ids.shape[1], device=responses.response_ids.device) < min_new_tokens
    return early.expand_as(responses.response_mask)[responses.response_mask]


def scatter(values: Tensor, mask: Tensor) -> Tensor:
    """(N,) → (B, T), 0 where the mask is False."""
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)


def response_logprobs(
    hidden: Tensor, responses: Responses, head: Head, min_new_tokens: int, *, with_entropy: bool = False
) -> tuple[Tensor, Tensor]:
    """Log-probs and, with `with_entropy`, entropies (B, T), 0 in padding, from states (B, P + T, H)."""
    labels = responses.response_ids[responses.response_mask]
    states = response_states(hidden, responses)
    result = token_logprobs(states, labels, forbidden_eos(responses, min_new_tokens), head, with_entropy=with_entropy)
    return scatter(result.logprobs, responses.response_mask), scatter(result.entropy, responses.response_mask)


@torch.no_grad()
def last_token_states(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """(B, H): the trunk's state at the last token that is not padding, which a reward model's head reads."""
    hidden = hidden_states(model, input_ids, attention_mask)
    places = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    last = (attention_mask.long() * places).argmax(-1)
    return hidden[torch.arange(len(hidden), device=hidden.device), last]


def response_values(values: Tensor, responses: Responses) -> Tensor:
    """(B, P + T, …) → (B, T, …): the value, or anything else, of the state before each response token."""
    start = responses.prompt_ids.shape[1] - 1
    return values[:, start : start + responses.response_ids.shape[1]]


def pad_responses(prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], pad: int, ends: Sequence[int],
                  device: torch.device) -> Responses:  # fmt: skip
    """Responses from token ids; a finished answer ends with one of the tokens `ends`."""
    finished = torch.tensor([bool(answer) and answer[-1] in ends for answer in answers], device=device)
    return Responses(*pad_tokens(prompts, pad, device, "left"), *pad_tokens(answers, pad, device), finished)


def pad_to_width(tensor: Tensor, width: int, value: float = 0, *, left: bool = False) -> Tensor:
    """(B, L) → (B, width), padded with `value` on the right, or on the left."""
    missing = width - tensor.shape[1]
    return torch.nn.functional.pad(tensor, (missing, 0) if left else (0, missing), value=value)


def append_turn_end(responses: Responses, rows: Sequence[Mapping[str, Any]], turn: AssistantTurn) -> Responses:
    """Append what the chat template writes after the end token, to responses that end a turn; it is scored too."""
    ended = ends_turn(responses, rows, turn)
    if not turn.after or not ended.any():
        return responses
    device, count = responses.response_ids.device, responses.response_ids.shape[1] + len(turn.after)
    ids, mask = pad_to_width(responses.response_ids, count), pad_to_width(responses.response_mask, count)
    places = responses.lengths[ended][:, None] + torch.arange(len(turn.after), device=device)
    which = ended.nonzero()
    ids[which, places], mask[which, places] = torch.tensor(turn.after, device=device), True
    return responses._replace(response_ids=ids, response_mask=mask)


def concatenate(parts: Sequence[Responses], pad: int) -> Responses:
    """Join parts of a rollout batch, which may differ in width."""
    prompt, response = (max(part[i].shape[1] for part in parts) for i in (0, 2))
    return Responses(
        torch.cat([pad_to_width(part.prompt_ids, prompt, pad, left=True) for part in parts]),
        torch.cat([pad_to_width(part.prompt_mask, prompt, left=True) for part in parts]),
        torch.cat([pad_to_width(part.response_ids, response, pad) for part in parts]),
        torch.cat([pad_to_width(part.response_mask, response) for part in parts]),
        torch.cat([part.finished for part in parts]),
    )


def ends_turn(responses: Responses, rows: Sequence[Mapping[str, Any]], turn: AssistantTurn) -> Tensor:
    """(B,) bool: the response ends an assistant's turn with the chat template's own end token."""
    asked = [
        not isinstance(row.get("prompt"), str) or (turn.opening and row["prompt"].endswith(turn.opening))
        for row in rows
    ]
    last = responses.response_ids.gather(-1, (responses.lengths - 1).clamp(min=0)[:, None]).squeeze(-1)
    end = -1 if turn.end is None else turn.end  # no token has the id -1
    return (last == end) & last.new_tensor(list(map(bool, asked))).bool()
