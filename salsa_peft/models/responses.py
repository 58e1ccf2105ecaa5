"""Responses, and how probable policy and references find them.

Shapes: B sequences, P prompt tokens (padded on the left), T response tokens (padded on the right), N = True in the mask.
The token that ends a response (data/chat/turn_ends.py) counts, nothing after it; a response that is this token alone has length 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from salsa_peft.data.chat.turn_ends import AssistantTurn
from salsa_peft.models.base import hidden_states
from salsa_peft.models.logprobs import Head, token_logprobs

if TYPE_CHECKING:
    from torch import Tensor

    pass


class Responses(NamedTuple):
    """What was generated: tokens and masks only."""

    prompt_ids: Tensor
    """(B, P)"""
    prompt_mask: Tensor
    """(B, P) bool"""
    response_ids: Tensor
    """(B, T)"""
    response_mask: Tensor
    """(B, T) bool"""
    finished: Tensor
    """(B,) bool: a token that ends responses ended it, rather than the limit."""

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
        """(B,): tokens of each response, the one that ends it included."""
        return self.response_mask.sum(-1)

    @property
    def content_mask(self) -> Tensor:
        """(B, T) bool: the response without the token that ends it. Such a token need not be a special one, which decoding leaves out."""
        places = torch.arange(self.response_mask.shape[1], device=self.response_mask.device)
        return self.response_mask & (places < (self.lengths - self.finished.long())[:, None])

    @property
    def empty(self) -> Tensor:
        """(B,) bool: the response is the token that ends it, alone."""
        return self.finished & (self.lengths == 1)

    def rows(self, index: Tensor) -> Responses:
        """Some rows, without the columns that are padding in all of them."""
        picked = Responses(*(field[index] for field in self))
        left = int((~picked.prompt_mask).long().cumprod(-1).sum(-1).min())
        right = int(picked.lengths.max())
        return Responses(picked.prompt_ids[:, left:], picked.prompt_mask[:, left:], picked.response_ids[:, :right],
                         picked.response_mask[:, :right], picked.finished)  # fmt: skip


def pad_prompts(prompts: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids → ids and mask, (B, P), padded on the left."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    return ids, torch.arange(width, device=device) >= width - lengths[:, None]


def response_states(hidden: Tensor, responses: Responses) -> Tensor:
    """(B, P + T, H) → (N, H): the states from which the response's counted tokens were sampled."""
    start = responses.prompt_ids.shape[1] - 1
    return hidden[:, start : start + responses.response_ids.shape[1]][responses.response_mask]


def forbidden_eos(responses: Responses, min_new_tokens: int) -> Tensor:
    """(N,) bool: no token that ends a response could be sampled here."""
    early = torch.arange(responses.response_ids.shape[1], device=responses.response_ids.device) < min_new_tokens
    return early.expand_as(responses.response_mask)[responses.response_mask]


def scatter(values: Tensor, mask: Tensor) -> Tensor:
    """(N,) → (B, T), 0 where the mask is False."""
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)


def response_logprobs(
    hidden: Tensor, responses: Responses, head: Head, min_new_tokens: int, *, with_entropy: bool = False
) -> tuple[Tensor, Tensor]:
    """Hidden states (B, P + T, H) → log-probs of the response and, where asked for, entropies there, both (B, T), 0 elsewhere."""
    labels = responses.response_ids[responses.response_mask]
    states = response_states(hidden, responses)
    result = token_logprobs(states, labels, forbidden_eos(responses, min_new_tokens), head, with_entropy=with_entropy)
    return scatter(result.logprobs, responses.response_mask), scatter(result.entropy, responses.response_mask)


@torch.no_grad()
def last_token_states(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """(B, H): the trunk's state at the last token that counts, what a reward model's head reads."""
    hidden = hidden_states(model, input_ids, attention_mask)
    places = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    last = (attention_mask.long() * places).argmax(-1)
    return hidden[torch.arange(len(hidden), device=hidden.device), last]


def response_values(values: Tensor, responses: Responses) -> Tensor:
    """(B, P + T) → (B, T): V of the state before each response token."""
    start = responses.prompt_ids.shape[1] - 1
    return values[:, start : start + responses.response_ids.shape[1]]


def pad_responses(prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], pad: int, ends: Sequence[int],
                  device: torch.device) -> Responses:  # fmt: skip
    """Token ids of prompts and of what was answered, with the one of `ends` that ended it, if any → Responses."""
    prompt_ids, prompt_mask = pad_prompts(prompts, pad, device)
    width = max(len(answer) for answer in answers)
    ids = torch.tensor([[*answer, *[pad] * (width - len(answer))] for answer in answers], device=device)
    lengths = torch.tensor([len(answer) for answer in answers], device=device)
    finished = torch.tensor([bool(answer) and answer[-1] in ends for answer in answers], device=device)
    return Responses(prompt_ids, prompt_mask, ids, torch.arange(width, device=device) < lengths[:, None], finished)


def pad_to_width(tensor: Tensor, width: int, value: float = 0, *, left: bool = False) -> Tensor:
    """(B, L) → (B, width), filled up with `value` on the right, or on the left."""
    missing = width - tensor.shape[1]
    return torch.nn.functional.pad(tensor, (missing, 0) if left else (0, missing), value=value)


def append_tokens(responses: Responses, rows: Tensor, tokens: Sequence[int]) -> Responses:
    """`tokens` behind the responses of `rows` (B,), bool, for what scores more than was sampled; the others stay."""
    if not tokens or not rows.any():
        return responses
    device, count = responses.response_ids.device, responses.response_ids.shape[1] + len(tokens)
    ids, mask = pad_to_width(responses.response_ids, count), pad_to_width(responses.response_mask, count)
    places = responses.lengths[rows][:, None] + torch.arange(len(tokens), device=device)
    which = rows.nonzero()
    ids[which, places], mask[which, places] = torch.tensor(tokens, device=device), True
    return responses._replace(response_ids=ids, response_mask=mask)


def concatenate(parts: Sequence[Responses], pad: int) -> Responses:
    """Parts of a rollout batch with other widths → one."""
    prompt, response = (max(part[i].shape[1] for part in parts) for i in (0, 2))
    return Responses(
        torch.cat([pad_to_width(part.prompt_ids, prompt, pad, left=True) for part in parts]),
        torch.cat([pad_to_width(part.prompt_mask, prompt, left=True) for part in parts]),
        torch.cat([pad_to_width(part.response_ids, response, pad) for part in parts]),
        torch.cat([pad_to_width(part.response_mask, response) for part in parts]),
        torch.cat([part.finished for part in parts]),
    )


def ends_turn(responses: Responses, rows: Sequence[Mapping[str, Any]], turn: AssistantTurn) -> Tensor:
    """(B,) bool: responses that the template's own end of a turn ends_turn, after a prompt that asks for a turn; a text need not."""
    asked = [
        not isinstance(row.get("prompt"), str) or (turn.opening and row["prompt"].endswith(turn.opening))
        for row in rows
    ]
    last = responses.response_ids.gather(-1, (responses.lengths - 1).clamp(min=0)[:, None]).squeeze(-1)
    # a token that no vocabulary has, where the template has no end of a turn
    return (last == (-1 if turn.end is None else turn.end)) & last.new_tensor(list(map(bool, asked))).bool()
