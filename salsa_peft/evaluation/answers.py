"""A model's answers to questions, turn by turn, scored: what the evaluate stage and the landscape ask.

A batch holds one turn, one temperature and one limit of length. Batches are the same whatever is known already, so that a run that goes
on answers as one that was never stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from salsa_peft.config.job import Job
from salsa_peft.config.options.ppo import Sampling
from salsa_peft.data import datasets
from salsa_peft.data.chat.turn_ends import stop_token_ids
from salsa_peft.data.message_formats import Messages
from salsa_peft.data.questions import Question, temperature
from salsa_peft.evaluation.comparisons import clusters
from salsa_peft.models.adapters import lora
from salsa_peft.models.generation import generate_batches
from salsa_peft.models.responses import Responses, pad_prompts
from salsa_peft.models.rewards.base import Reward
from salsa_peft.models.rewards.function import decode
from salsa_peft.models.stage_context import StageContext, prompts_that_fit
from salsa_peft.utils.statistics import mean_interval

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Rows = list[dict[str, Any]]
Known = Mapping[tuple[int, int], dict[str, Any]]
"""(index of the question, turn) → its row."""


class Asked(NamedTuple):
    """One turn of one question, as a model will see it."""

    at: int
    """The question's index."""
    messages: Messages
    tokens: list[int]
    temperature: float
    limit: int
    """Tokens that there is room for; 0: none."""


def answer(
    model: nn.Module,
    adapter: str | None,
    questions: Sequence[Question],
    rewards: Mapping[str, Reward],
    context: StageContext,
    seed: int,
    known: Known | None = None,
    keep: Callable[[Rows], None] = lambda rows: None,
) -> Rows:
    """A row for each turn of each question, in order, with the response, its scores and its length; from `adapter`, or the model's full weights.

    known: answers that are there, which are taken as they are. keep: called with the rows of each batch that is answered here.
    """
    found = dict(known or {})
    with lora.active(model, adapter):
        for turn in range(1, max((len(one.turns) for one in questions), default=0) + 1):
            asked = [
                _ask(index, one, turn, found, context) for index, one in enumerate(questions) if len(one.turns) >= turn
            ]
            for part, responses in _responses(model, asked, turn, context, seed, found):
                rows = _rows(part, responses, turn, questions, rewards, context.tokenizer)
                found |= {(row["index"], turn): row for row in rows}
                keep(rows)
    return [found[place] for place in sorted(found)]


def _ask(index: int, question: Question, turn: int, found: Known, context: StageContext) -> Asked:
    messages = question.conversation([found[index, earlier]["response"] for earlier in range(1, turn)])
    tokens = datasets.prompt_tokens({**question.row, "prompt": messages}, context.tokenizer)
    generation, longest = context.recipe.generation, context.recipe.model.max_length
    room = min(generation.max_new_tokens, longest - len(tokens)) if turn > 1 else generation.max_new_tokens
    chosen = temperature(question, context.recipe.evaluate.temperature, generation.temperature)
    return Asked(index, messages, tokens if room > 0 else tokens[-(longest - 1) :], chosen, max(room, 0))


def _responses(
    model: nn.Module, asked: list[Asked], turn: int, context: StageContext, seed: int, found: Known
) -> Iterator[tuple[list[Asked], Responses]]:
    """Batches of one temperature and one limit, those that are known left out."""
    generation = context.recipe.generation
    for heat, limit in sorted({(one.temperature, one.limit) for one in asked}):
        part = [one for one in asked if (one.temperature, one.limit) == (heat, limit)]
        if limit == 0:
            left = [one for one in part if (one.at, turn) not in found]
            if left:
                yield left, _empty([one.tokens for one in left], context.tokenizer, model)
            continue
        sampling = Sampling(
            max_new_tokens=limit, min_new_tokens=min(generation.min_new_tokens, limit), temperature=heat
        )

        def there(rows: list[int], part: list[Asked] = part) -> bool:
            return all((part[row].at, turn) in found for row in rows)

        batches = generate_batches(
            model,
            [one.tokens for one in part],
            sampling,
            context.tokenizer,
            seed,
            generation.batch_size,
            places=[one.at for one in part],
            turn=turn,
            skip=there,
        )
        for rows, responses in batches:
            yield [part[row] for row in rows], responses


def _empty(prompts: list[list[int]], tokenizer: PreTrainedTokenizerBase, model: nn.Module) -> Responses:
    """The end of a turn for each conversation that has left no room for an answer."""
    device = next(model.parameters()).device
    ids, mask = pad_prompts(prompts, int(tokenizer.pad_token_id), device)  # type: ignore[arg-type]
    end = torch.full((len(prompts), 1), stop_token_ids(tokenizer)[0], device=device)
    ended = torch.ones(len(prompts), dtype=torch.bool, device=device)
    return Responses(ids, mask, end, ended[:, None], ended)


def _rows(
    asked: list[Asked],
    responses: Responses,
    turn: int,
    questions: Sequence[Question],
    rewards: Mapping[str, Reward],
    tokenizer: Any,
) -> Rows:
    shown = [{**questions[one.at].row, "prompt": one.messages} for one in asked]
    scores = {name: reward(responses, shown).tolist() for name, reward in rewards.items()}
    texts = decode(tokenizer, responses.response_ids, responses.content_mask)
    return [
        {
            "index": one.at,
            "question_id": questions[one.at].id,
            "category": questions[one.at].category,
            "turn": turn,
            "prompt": datasets.prompt_text(questions[one.at].messages)
            if turn == 1
            else questions[one.at].turns[turn - 1],
            "response": texts[place],
            "scores": {name: values[place] for name, values in scores.items()},
            "length": int(responses.lengths[place]),
            "empty": bool(responses.empty[place]),
        }
        for place, one in enumerate(asked)
    ]


def fitting_questions(job: Job, context: StageContext, questions: Sequence[Question]) -> list[Question]:
    """Those whose first turn leaves room for a whole answer within model.max_length; the others are noted. Raises SalsaError for none."""
    rows = [{**question.row, "prompt": question.messages, "question": question} for question in questions]
    return [row["question"] for row in prompts_that_fit(job, context, rows)]


def means(rows: Sequence[Mapping[str, Any]], measure: str) -> Any:
    """The mean score of all turns with its interval over questions."""
    return mean_interval([row["scores"][measure] for row in rows], clusters(rows))
