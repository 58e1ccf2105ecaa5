"""Measures that greedy and learned soups maximize: SFT loss, reward score, or a Python function.

A measure is called with the members' weights, sets a model to the weighted mean (soup/live.py) and evaluates it. Only
the SFT loss has a gradient, which the strategy learned needs. To add a measure, write a class here and add a case to
`recipe_measure` and `command_measure`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers.utils.logging import disable_progress_bar

from salsa_peft.config.options.soup import MEASURES
from salsa_peft.config.schema import Generation, Model, Source
from salsa_peft.data import datasets
from salsa_peft.data.chat.template_fields import messages_for_template, trained_tokens
from salsa_peft.data.chat.turn_ends import model_stop_token_ids
from salsa_peft.data.files import READERS
from salsa_peft.models.adapters import forward, lora
from salsa_peft.models.base import causal_lm, hidden_states, load_base, remove_dropout
from salsa_peft.models.batches import split_by_length
from salsa_peft.models.generation import generate_batches
from salsa_peft.models.logprobs import head_of, token_logprobs
from salsa_peft.models.responses import pad_tokens, send
from salsa_peft.models.rewards.function import load_function
from salsa_peft.models.rewards.reward import as_reward, recipe_reward
from salsa_peft.models.stage_context import StageContext, prompts_that_fit
from salsa_peft.models.tokenizers import load_tokenizer
from salsa_peft.soup.checkpoints.alignment import align
from salsa_peft.soup.checkpoints.read import read_checkpoint
from salsa_peft.soup.live import LiveAdapters, LiveCheckpoints
from salsa_peft.soup.lora.stacked_adapter import StackedAdapter
from salsa_peft.soup.member_folders import local
from salsa_peft.soup.options import base_of, check_family
from salsa_peft.utils.errors import SalsaError, require

if TYPE_CHECKING:
    from argparse import Namespace

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from salsa_peft.config.job import Job
    from salsa_peft.models.rewards.base import Reward, Rows
    from salsa_peft.soup.live import LiveSoup
    from salsa_peft.soup.strategies import Measure


class SFTLoss:
    """The negative SFT loss: mean log-likelihood (nats) of assistant tokens in held-out demonstrations.

    rows: chats with the key `messages`. The assistant tokens are those that SFT trains (data/chat/assistant_masks.py).
    Raises SalsaError if no chat has such a token among its first max_length tokens.
    """

    def __init__(
        self, live: LiveSoup, rows: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, max_length: int,
        batch_size: int,
    ) -> None:  # fmt: skip
        self.live, self.pad = live, int(tokenizer.pad_token_id or 0)
        chats = ({**row, "messages": messages_for_template(row["messages"], tokenizer)} for row in rows)
        encoded = [[part[:max_length] for part in trained_tokens(chat, tokenizer)] for chat in chats]
        self.chats = [chat for chat in encoded if any(chat[1][1:])]
        """Token ids of each chat, and for each token whether SFT trains it."""
        self.batches = split_by_length([len(ids) for ids, _ in self.chats], batch_size)
        self.left_out = len(encoded) - len(self.chats)
        require(
            bool(self.chats),
            f"held-out demonstrations: none of the {len(rows)} rows has an assistant token among its first {max_length}"
            " tokens; raise model.max_length (--max-length)",
        )
        self.tokens = sum(sum(mask[1:]) for _, mask in self.chats)
        self.head = head_of(causal_lm(live.model), 1.0, model_stop_token_ids(tokenizer, causal_lm(live.model)))

    def __call__(self, weights: Sequence[float]) -> float:
        """The measure at these weights."""
        self.live.set(weights)
        with torch.no_grad(), self.live.at_point():
            return self._sum([self._part(batch) for batch in self.batches])

    def gradient(self, weights: Sequence[float]) -> tuple[float, list[float]]:
        """The measure and its derivative by each weight."""
        self.live.set(weights)
        parts = []
        with self.live.at_point(), self.live.differentiable():
            for batch in self.batches:
                part = self._part(batch)
                part.backward()
                parts.append(part.detach())
            return self._sum(parts), self.live.slopes()

    def _sum(self, parts: Sequence[torch.Tensor]) -> float:
        return math.fsum(torch.stack(list(parts)).tolist())

    def _part(self, batch: Sequence[int]) -> torch.Tensor:
        """One batch's part of the mean log-likelihood; the parts of all batches add up to the mean."""
        chats = [self.chats[row] for row in batch]
        ids, _ = pad_tokens([ids for ids, _ in chats], self.pad, next(self.live.model.parameters()).device)
        trained = [
            (row * ids.shape[1] + place, tokens[place])
            for row, (tokens, counted) in enumerate(chats)
            for place in range(1, len(tokens))
            if counted[place]
        ]
        places, labels = send([np.array(column) for column in zip(*trained, strict=True)], ids.device)
        states = hidden_states(self.live.model, ids).flatten(0, 1)[places - 1]
        return token_logprobs(states, labels, None, self.head, with_entropy=False).logprobs.sum() / self.tokens


class _WithoutGradient:
    """Base class of measures without a gradient, which the strategy learned cannot use."""

    name: str

    def gradient(self, weights: Sequence[float]) -> tuple[float, list[float]]:
        """Raise SalsaError, because the measure has no gradient."""
        raise SalsaError(f"strategy learned: the measure {self.name} has no gradient; use sft_loss, or strategy greedy")


@dataclass
class RewardScore(_WithoutGradient):
    """Mean reward score of one sampled response per prompt. Every call samples with the same seeds."""

    name = "reward"
    live: LiveSoup
    rows: Rows
    prompts: Sequence[Sequence[int]]
    reward: Reward
    generation: Generation
    tokenizer: PreTrainedTokenizerBase
    seed: int = 0

    def __call__(self, weights: Sequence[float]) -> float:
        """The measure at these weights."""
        self.live.set(weights)
        scores: list[float] = []
        with self.live.at_point():
            answers = generate_batches(
                self.live.model, self.prompts, self.generation, self.tokenizer, self.seed, self.generation.batch_size
            )
            for indices, responses in answers:
                scores += self.reward(responses, [self.rows[row] for row in indices]).tolist()
        return sum(scores) / len(scores)


@dataclass
class FunctionMeasure(_WithoutGradient):
    """A measure that calls a Python function with the soup's model in evaluation mode."""

    live: LiveSoup
    function: Callable[[Any], float]
    name: str

    def __call__(self, weights: Sequence[float]) -> float:
        """The measure at these weights. Raises SalsaError if the function does not return a number."""
        self.live.set(weights)
        with torch.no_grad(), self.live.at_point():
            found: Any = self.function(self.live.model)
        try:
            return float(found)
        except (TypeError, ValueError) as error:
            raise SalsaError(
                f"measure {self.name}: the function returned {found!r:.60}, but must return a number (higher is better)"
            ) from error


def recipe_measure(job: Job, folders: Sequence[Path]) -> Measure:
    """The measure that a recipe's `soup:` section names, for the adapters or checkpoints in `folders`."""
    recipe, section = job.recipe, job.recipe.soup
    context = StageContext.of_job(job)
    context.check(job.inputs)
    live: LiveSoup = (
        _on_base(context.load_base(), folders) if recipe.adapter else _checkpoints(context.load_base(), folders)
    )
    if section.measure not in MEASURES:
        return FunctionMeasure(live, load_function(section.measure), section.measure)
    sources = datasets.training_sources(recipe, job.inputs)
    if section.measure == "sft_loss":
        rows = datasets.demonstrations(sources["held_out"], context.tokenizer)[: section.limit]
        size = recipe.sft.micro_batch_size or recipe.sft.batch_size
        return SFTLoss(live, rows, context.tokenizer, recipe.model.max_length, size)
    found = datasets.prompts(sources["prompts"], columns=recipe.reward.reads_columns, tokenizer=context.tokenizer)
    asked = prompts_that_fit(job, context, found[: section.limit], "data.prompts")
    tokens = [datasets.prompt_tokens(row, context.tokenizer, number) for number, row in enumerate(asked, 1)]
    reward = recipe_reward(recipe, live.model, job.inputs, context.tokenizer, recipe.generation.batch_size)
    return RewardScore(live, asked, tokens, reward, recipe.generation, context.tokenizer)


def _on_base(base: PreTrainedModel, folders: Sequence[Path], same_base: bool = False) -> LiveAdapters:
    """The adapters in `folders`, attached to `base`, in eval mode and with dropout removed."""
    model = lora.attach(base, folders[0], "start")
    live = LiveAdapters(model, StackedAdapter.load(folders, same_base=same_base))
    remove_dropout(model)
    forward.install(model)
    model.eval()
    return live


def _checkpoints(model: PreTrainedModel, folders: Sequence[Path]) -> LiveCheckpoints:
    """The checkpoints in `folders`, whose weighted mean is set as the parameters of `model`, in eval mode."""
    read = [read_checkpoint(folder) for folder in folders]
    align(read)
    return LiveCheckpoints(model.eval(), read)


def command_measure(args: Namespace, folders: Sequence[Path], kind: str) -> Measure:
    """The measure of `salsa soup --measure`. Missing data raises SalsaError before a model is loaded."""
    disable_progress_bar()  # Transformers' bar for loading weights; the command shows its own
    function = load_function(args.measure) if ":" in args.measure else None
    rows = _rows(args) if function is None else []
    tokenizer_of = folders[0] if (folders[0] / "tokenizer_config.json").is_file() else None
    if kind == "adapters":
        named = local(*base_of(StackedAdapter.load(folders[:1]).members[0].config, folders[0], args.base))
        check_family(folders, named, args.same_base)
        tokenizer = load_tokenizer(str(tokenizer_of or named))
        live: LiveSoup = _on_base(load_base(str(named), Model(), tokenizer), folders, args.same_base)
    else:
        tokenizer = load_tokenizer(str(folders[0]))
        live = _checkpoints(load_base(str(folders[0]), Model(), tokenizer), folders)
    if function is not None:
        return FunctionMeasure(live, function, args.measure)
    if args.measure == "sft_loss":
        return SFTLoss(live, rows, tokenizer, args.max_length, 8)
    tokens = [datasets.prompt_tokens(row, tokenizer, number) for number, row in enumerate(rows, 1)]
    sampling = Generation(max_new_tokens=args.max_new_tokens, batch_size=16)
    return RewardScore(live, rows, tokens, as_reward(args.reward, live.model, tokenizer), sampling, tokenizer)


def _rows(args: Namespace) -> Any:
    """The held-out chats (sft_loss) or prompts (reward) of --data."""
    require(
        args.measure in MEASURES,
        f"--measure: {args.measure} is unknown; use {', '.join(MEASURES)}, or module:name (a function of the model)",
    )
    require(args.data is not None, f"--data: measure {args.measure} needs held-out rows; add --data FILE")
    require(
        args.measure != "reward" or args.reward is not None,
        "--reward: measure reward needs a reward model; add --reward REWARD",
    )
    file = Path(args.data)
    require(
        file.suffix.lower() not in READERS or file.is_file(),
        f"--data: no such file: {args.data}; use a jsonl, json or parquet file, or a Hub id",
    )
    source = Source(path=args.data, limit=args.limit)
    return datasets.demonstrations(source) if args.measure == "sft_loss" else datasets.prompts(source)
