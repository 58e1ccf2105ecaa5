"""Prompts: tokenizing a dataset's rows, leaving out long prompts, and the order in rollout batches."""

from __future__ import annotations

import operator
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Sampler

from salsa_peft.data.chat.template_fields import dropped_fields, messages_for_template, template_options
from salsa_peft.data.chat.templates import adds_bos
from salsa_peft.data.datasets import RowWarnings, prompt_tokens
from salsa_peft.data.message_formats import parse_messages
from salsa_peft.models.base import max_positions
from salsa_peft.utils.console import say
from salsa_peft.utils.errors import SalsaError, require
from salsa_peft.utils.messages import one_line, short

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from salsa_peft.training.ppo.config import SalsaPPOConfig


OWN_BOS = "begin with {} already, so the tokenizer adds none"


class Prompt(NamedTuple):
    """A tokenized prompt."""

    tokens: list[int]
    row: Mapping[str, Any]
    """The dataset's row, which is passed to reward functions."""


class PromptEncoder(NamedTuple):
    """Tokenizes the prompts of a dataset's rows, and leaves out empty and long prompts."""

    tokenizer: PreTrainedTokenizerBase
    longest: int | None
    """Largest number of tokens of a prompt that is kept; None means no limit."""
    vocabulary: int
    """Number of the policy's input embeddings."""
    quiet: bool = False
    """Whether to print nothing, as in all processes but the main one."""

    @classmethod
    def of(
        cls, models: Sequence[PreTrainedModel], args: SalsaPPOConfig, tokenizer: PreTrainedTokenizerBase
    ) -> PromptEncoder:
        """Create an encoder of prompts that each of `models` (policy first) can read with a response.

        args.max_prompt_length limits prompts too. Raises SalsaError if max_new_tokens leaves no room for a prompt.
        """
        lengths = [length for length in (max_positions(model.config) for model in models) if length is not None]
        require(
            not lengths or args.max_new_tokens < min(lengths),
            f"max_new_tokens: {args.max_new_tokens} leaves no room for a prompt in the {min(lengths, default=0)}"
            " tokens that the models can read; lower it",
        )
        limits = [length - args.max_new_tokens for length in lengths]
        limits += [] if args.max_prompt_length is None else [args.max_prompt_length]
        embeddings: Any = models[0].get_input_embeddings().weight
        return cls(tokenizer, min(limits, default=None), len(embeddings), quiet=args.process_index > 0)

    def __call__(self, rows: Any, name: str) -> tuple[list[Prompt], int]:
        """Encode the prompts of `rows`. Returns those kept, and the number of empty or too long prompts.

        Raises SalsaError if `rows` cannot be iterated over, or a row has no usable prompt. Messages start with `name`.
        """
        if isinstance(rows, Mapping):  # for example a datasets.DatasetDict
            keys = short(list(rows))
            raise SalsaError(
                f"{name}: this is a {type(rows).__name__} with the keys {keys}. Pass the dataset under one of the keys"
            )
        try:
            iterator = iter(rows)
        except TypeError as error:
            found = one_line(short(rows))
            raise SalsaError(f"{name}: pass rows with `prompt` or `input_ids`, not {found}") from error
        prompts = [Prompt(self.tokens(row, number, name), row) for number, row in enumerate(iterator, 1)]
        kept = [prompt for prompt in prompts if prompt.tokens and len(prompt.tokens) <= (self.longest or sys.maxsize)]
        left_out = len(prompts) - len(kept)
        if self.quiet:
            return kept, left_out
        if left_out:
            say(f"{name}: {left_out} of {len(prompts)} prompts left out: {self.limit}")
        warnings = RowWarnings(name)
        for number, prompt in enumerate(prompts, 1):
            warnings.add_dropped(number, self.dropped(prompt.row, number, name))
            warnings.add(number, OWN_BOS.format(self.tokenizer.bos_token), self.begins_with_bos(prompt.row))
        warnings.print(len(prompts))
        return kept, left_out

    @property
    def limit(self) -> str:
        """Why prompts are left out, as text for messages."""
        why = "(max_prompt_length, or the models' context length minus max_new_tokens)"
        return "empty" if self.longest is None else f"empty, or longer than {self.longest} tokens {why}"

    def tokens(self, row: Any, number: int, name: str) -> list[int]:
        """Token ids of a row's prompt. number: the row's, from 1. Raises SalsaError for an unusable prompt."""
        where = f"{name}, row {number}"
        require(
            isinstance(row, Mapping), f"{where}: {one_line(short(row))} must be a mapping with `prompt` or `input_ids`"
        )
        if "input_ids" not in row:
            columns = ", ".join(map(str, row))
            require("prompt" in row, f"{where}: must have `prompt` or `input_ids`, but has only {columns}")
            prompt = row["prompt"]
            require(prompt is not None, f"{where}, prompt: must be text or messages, but is None")
            last = prompt[-1] if isinstance(prompt, list) and prompt else None
            require(
                not isinstance(last, Mapping) or last.get("role") != "assistant",
                f"{where}, prompt: the last message must be the user's, since the policy answers it, but is the"
                " assistant's",
            )
            ids = list(map(int, prompt_tokens(row, self.tokenizer, number, name)))  # type: ignore[arg-type]
        else:
            ids = whole_numbers(row["input_ids"], f"{where}, input_ids")
        unknown = [token for token in ids if not 0 <= token < self.vocabulary]
        require(
            not unknown,
            f"{where}: token id {unknown[:1]} has no embedding; ids must be from 0 to {self.vocabulary - 1}",
        )
        return ids

    def begins_with_bos(self, row: Mapping[str, Any]) -> bool:
        """Whether a prompt's text begins with the BOS that the tokenizer adds, as a rendered template may."""
        text = row.get("prompt") if "input_ids" not in row else None
        return isinstance(text, str) and adds_bos(self.tokenizer) and text.startswith(str(self.tokenizer.bos_token))

    def dropped(self, row: Mapping[str, Any], number: int, name: str) -> list[str]:
        """Fields of a row's prompt that the chat template ignores, such as a system message or `tools`."""
        messages: Any = None if "input_ids" in row else row["prompt"]
        if not isinstance(messages, list):
            return []
        where = f"{name}, row {number}, prompt"
        messages = messages_for_template(parse_messages(messages, where), self.tokenizer)
        return dropped_fields(messages, self.tokenizer, where, template_options(row))


def whole_numbers(tokens: Any, where: str) -> list[int]:
    """Token ids as a list of int. Raises SalsaError for anything but whole numbers, in a list, an array or a tensor."""
    try:
        return [operator.index(token) for token in tokens]
    except TypeError as error:
        raise SalsaError(f"{where}: must be a list of whole numbers, not {one_line(short(tokens))}") from error


class RolloutBatches(Sampler[list[int]]):
    """Sampler of rollout batches (row indices), which repeats each batch for its micro-steps.

    Rows are shuffled in every epoch. Rows that do not fill a last batch are left out of the epoch. batch_size: number
    of prompts in a batch. copies: number of times that each prompt is in its batch, one after another.
    """

    def __init__(self, rows: int, batch_size: int, repeats: int, seed: int, copies: int = 1) -> None:
        self.rows, self.batch_size, self.repeats, self.seed, self.copies = rows, batch_size, repeats, seed, copies
        self.epoch = 0

    def __len__(self) -> int:
        return self.rows // self.batch_size * self.repeats

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration. Trainer calls this, also when it resumes within an epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(
            self.rows, generator=torch.Generator().manual_seed(self.seed + 1_000_003 * self.epoch)
        ).tolist()
        for start in range(0, self.rows // self.batch_size * self.batch_size, self.batch_size):
            batch = [row for row in order[start : start + self.batch_size] for _ in range(self.copies)]
            for _ in range(self.repeats):
                yield batch


class RolloutLoader(DataLoader):
    """A DataLoader that passes the epoch to its batch sampler."""

    def set_epoch(self, epoch: int) -> None:
        """Set the batch sampler's epoch. transformers.Trainer calls this."""
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]
