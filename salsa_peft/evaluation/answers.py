"""Generate and score multi-turn answers of one model, for the evaluate and landscape stages.

All answers in a batch have the same turn and temperature; each has the length limit that its conversation leaves.
Which prompts share a batch does not depend on which answers exist already, so that a resumed run gives the same answers
as an uninterrupted one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from salsa_peft.config.job import Job
from salsa_peft.config.options.ppo import Sampling
from salsa_peft.data import datasets
from salsa_peft.data.chat.turn_ends import stop_token_ids
from salsa_peft.data.message_formats import Messages
from salsa_peft.data.questions import Question, temperature
from salsa_peft.models import precision
from salsa_peft.models.adapters import lora
from salsa_peft.models.generation import generate_batches
from salsa_peft.models.responses import Responses, pad_tokens
from salsa_peft.models.rewards.base import Reward
from salsa_peft.models.rewards.function import decode
from salsa_peft.models.stage_context import StageContext, prompts_that_fit

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class HeldOut:
    """A reward that no policy maximizes (a part of weight 0), as a measure. It need not apply to every answer."""

    reward: Reward


Rewards = Mapping[str, Reward | HeldOut]
"""Name of a measure → the reward that computes it."""
Known = Mapping[tuple[int, int], dict[str, Any]]
"""(index of the question, turn) → row of the answer."""


class TurnPrompt(NamedTuple):
    """Prompt for one turn of one question: the conversation so far, as messages and as token ids."""

    question: int
    """Index of the question."""
    messages: Messages
    tokens: list[int]
    temperature: float
    limit: int
    """Maximum number of tokens in the answer; 0 if the conversation leaves no room for an answer."""


def answer(
    model: nn.Module,
    adapter: str | None,
    questions: Sequence[Question],
    rewards: Rewards,
    context: StageContext,
    seed: int,
    known: Known | None = None,
    keep: Callable[[Rows], None] = lambda rows: None,
) -> Rows:
    """Answer every turn of all questions; returns one row per turn with response, scores and length.

    adapter: name of the adapter to activate; None: no adapter. known: existing answers, which are not generated again.
    keep: called with the rows of each new batch.
    """
    found = dict(known or {})
    with lora.active(model, adapter), precision.autocast(model):
        for turn in range(1, max((len(one.turns) for one in questions), default=0) + 1):
            asked = [(index, one) for index, one in enumerate(questions) if len(one.turns) >= turn]
            prompts = [_prompt(index, one, turn, found, context) for index, one in asked]
            for part, responses in _responses(model, prompts, turn, context, seed, found):
                rows = _rows(part, responses, turn, questions, rewards, context.tokenizer)
                found |= {(row["index"], turn): row for row in rows}
                keep(rows)
    return [found[place] for place in sorted(found)]


def _prompt(index: int, question: Question, turn: int, found: Known, context: StageContext) -> TurnPrompt:
    messages = question.conversation([found[index, earlier]["response"] for earlier in range(1, turn)])
    tokens = datasets.prompt_tokens({**question.row, "prompt": messages}, context.tokenizer)
    generation, longest = context.recipe.generation, context.recipe.model.max_length
    room = min(generation.max_new_tokens, longest - len(tokens)) if turn > 1 else generation.max_new_tokens
    chosen = temperature(question, context.recipe.evaluate.temperature, generation.temperature)
    return TurnPrompt(index, messages, tokens if room > 0 else tokens[-(longest - 1) :], chosen, max(room, 0))


def _responses(
    model: nn.Module, prompts: list[TurnPrompt], turn: int, context: StageContext, seed: int, found: Known
) -> Iterator[tuple[list[TurnPrompt], Responses]]:
    """Yield each batch's prompts and responses; a batch whose answers are all known is skipped."""
    generation, tokenizer = context.recipe.generation, context.tokenizer

    def all_known(group: Sequence[TurnPrompt], rows: Sequence[int]) -> bool:
        return all((group[row].question, turn) in found for row in rows)

    # 1. conversations that leave no room
    full = [one for one in prompts if one.limit == 0]
    for start in range(0, len(full), generation.batch_size):
        part = full[start : start + generation.batch_size]
        if not all_known(part, range(len(part))):
            yield part, _empty([one.tokens for one in part], tokenizer, model)
    # 2. the others by temperature, each response with its own limit
    for heat in sorted({one.temperature for one in prompts if one.limit}):
        group = [one for one in prompts if one.limit and one.temperature == heat]
        limits = [one.limit for one in group]
        shortest = min(generation.min_new_tokens, max(limits))
        sampling = Sampling(max_new_tokens=max(limits), min_new_tokens=shortest, temperature=heat)
        batches = generate_batches(
            model, [one.tokens for one in group], sampling, tokenizer, seed, generation.batch_size, limits=limits,
            places=[one.question for one in group], turn=turn,
            skip=partial(all_known, group),
        )  # fmt: skip
        for rows, responses in batches:
            yield [group[row] for row in rows], responses


def _empty(prompts: list[list[int]], tokenizer: PreTrainedTokenizerBase, model: nn.Module) -> Responses:
    """Responses that consist of a stop token alone, for conversations that leave no room for an answer."""
    device = next(model.parameters()).device
    ids, mask = pad_tokens(prompts, int(tokenizer.pad_token_id), device, "left")  # type: ignore[arg-type]
    stop = torch.full((len(prompts), 1), stop_token_ids(tokenizer)[0], device=device)
    ended = torch.ones(len(prompts), dtype=torch.bool, device=device)
    return Responses(ids, mask, stop, ended[:, None], ended)


def _rows(
    prompts: list[TurnPrompt],
    responses: Responses,
    turn: int,
    questions: Sequence[Question],
    rewards: Rewards,
    tokenizer: Any,
) -> Rows:
    columns = [{**questions[one.question].row, "prompt": one.messages} for one in prompts]
    scores = {name: scores_of(reward, responses, columns) for name, reward in rewards.items()}
    texts = decode(tokenizer, responses.response_ids, responses.content_mask)
    lengths, empty = torch.stack([responses.lengths, responses.empty.long()]).tolist()
    asked = [questions[one.question] for one in prompts]
    return [
        {
            "index": prompts[place].question,
            "question_id": question.id,
            "category": question.category,
            "turn": turn,
            "prompt": datasets.prompt_text(question.messages) if turn == 1 else question.turns[turn - 1],
            "response": texts[place],
            "scores": {name: values[place] for name, values in scores.items() if values[place] is not None},
            "length": lengths[place],
            "empty": bool(empty[place]),
        }
        for place, question in enumerate(asked)
    ]


def scores_of(reward: Reward | HeldOut, responses: Responses, rows: Rows) -> list[float | None]:
    """A score for each response; None where a held-out reward does not apply."""
    if not isinstance(reward, HeldOut):
        return reward(responses, rows).tolist()
    scores, applies = (found.tolist() for found in reward.reward.scores_and_mask(responses, rows))
    return [score if applied else None for score, applied in zip(scores, applies, strict=True)]


def fitting_questions(job: Job, context: StageContext, questions: Sequence[Question]) -> list[Question]:
    """Questions whose first turn leaves room for a full answer within model.max_length.

    The number of questions left out is printed. Raises SalsaError if no question fits.
    """
    rows = [{**question.row, "prompt": question.messages, "question": question} for question in questions]
    return [row["question"] for row in prompts_that_fit(job, context, rows)]
