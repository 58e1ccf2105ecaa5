"""Prompts: tokenizing a dataset's rows, leaving out those that are too long, and their order in rollout batches."""

from __future__ import annotations

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


OWN_BOS = "begin with {} already: the tokenizer's own is left out"


class Prompt(NamedTuple):
    """A tokenized prompt."""

    tokens: list[int]
    row: Mapping[str, Any]
    """The dataset's row, which reward functions get."""


class PromptEncoder(NamedTuple):
    """Turns rows into prompts that fit."""

    tokenizer: PreTrainedTokenizerBase
    longest: int | None
    """Tokens of the longest prompt that is kept; None: no limit."""
    vocabulary: int
    """Number of input embeddings."""
    quiet: bool = False
    """Print nothing, because another process does."""

    @classmethod
    def of(
        cls, models: Sequence[PreTrainedModel], args: SalsaPPOConfig, tokenizer: PreTrainedTokenizerBase
    ) -> PromptEncoder:
        """For prompts that leave room for a response in each of `models`, of which the policy is the first.

        max_prompt_length is a limit too. Raises SalsaError for a max_new_tokens that leaves no room for a prompt.
        """
        lengths = [length for length in (max_positions(model.config) for model in models) if length is not None]
        require(
            not lengths or args.max_new_tokens < min(lengths),
            f"max_new_tokens: {args.max_new_tokens} leaves no room for a prompt in the {min(lengths, default=0)}"
            " tokens that the models can read",
        )
        limits = [length - args.max_new_tokens for length in lengths]
        limits += [] if args.max_prompt_length is None else [args.max_prompt_length]
        embeddings: Any = models[0].get_input_embeddings().weight
        return cls(tokenizer, min(limits, default=None), len(embeddings), quiet=args.process_index > 0)

    def __call__(self, rows: Any, name: str) -> tuple[list[Prompt], int]:
        """Rows → prompts, and how many were left out because they are empty or too long.

        Raises SalsaError for what are no rows and for a row without a usable prompt; the message starts with `name`.
        """
        if isinstance(rows, Mapping):  # for example a datasets.DatasetDict
            keys = short(list(rows))
            raise SalsaError(
                f"{name}: this is a {type(rows).__name__} with the keys {keys}. Pass the dataset of one of them"
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
        """Why prompts are left out, for messages."""
        why = "(max_prompt_length, or what the models can read less max_new_tokens)"
        return "empty" if self.longest is None else f"empty, or longer than {self.longest} tokens {why}"

    def tokens(self, row: Any, number: int, name: str) -> list[int]:
        """The token ids of a row's prompt."""
        where = f"{name}, row {number}"
        require(
            isinstance(row, Mapping),
            f"{where}: found {one_line(short(row))}, expected a mapping with `prompt` or `input_ids`",
        )
        if "input_ids" not in row:
            columns = ", ".join(map(str, row))
            require("prompt" in row, f"{where}: there is neither `prompt` nor `input_ids`, only {columns}")
            prompt = row["prompt"]
            require(prompt is not None, f"{where}, prompt: this is None; it must be text or messages")
            last = prompt[-1] if isinstance(prompt, list) and prompt else None
            require(
                not isinstance(last, Mapping) or last.get("role") != "assistant",
                f"{where}, prompt: the last message is the assistant's; it must be the user's, since the policy"
                " answers it",
            )
        ids = [int(token) for token in prompt_tokens(row, self.tokenizer, number, name)]  # type: ignore[arg-type]
        unknown = [token for token in ids if not 0 <= token < self.vocabulary]
        require(
            not unknown,
            f"{where}: token id {unknown[:1]} has no embedding; the model's are 0 to {self.vocabulary - 1}",
        )
        return ids

    def begins_with_bos(self, row: Mapping[str, Any]) -> bool:
        """Whether a text starts with the BOS that the tokenizer adds, as texts from a chat template do."""
        text = row.get("prompt") if "input_ids" not in row else None
        return isinstance(text, str) and adds_bos(self.tokenizer) and text.startswith(str(self.tokenizer.bos_token))

    def dropped(self, row: Mapping[str, Any], number: int, name: str) -> list[str]:
        """Parts of a row that the chat template ignores, such as a system message or `tools`."""
        messages: Any = None if "input_ids" in row else row["prompt"]
        if not isinstance(messages, list):
            return []
        where = f"{name}, row {number}, prompt"
        messages = messages_for_template(parse_messages(messages, where), self.tokenizer)
        return dropped_fields(messages, self.tokenizer, where, template_options(row))


class RolloutBatches(Sampler[list[int]]):
    """Row indices of rollout batches, each repeated for its micro-steps; shuffled in every epoch.

    Rows that do not fill the last batch of an epoch are left out of it.
    """

    def __init__(self, rows: int, batch_size: int, repeats: int, seed: int) -> None:
        self.rows, self.batch_size, self.repeats, self.seed, self.epoch = rows, batch_size, repeats, seed, 0

    def __len__(self) -> int:
        return self.rows // self.batch_size * self.repeats

    def set_epoch(self, epoch: int) -> None:
        """Called by transformers.Trainer, also when it resumes within an epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(
            self.rows, generator=torch.Generator().manual_seed(self.seed + 1_000_003 * self.epoch)
        ).tolist()
        for start in range(0, self.rows // self.batch_size * self.batch_size, self.batch_size):
            for _ in range(self.repeats):
                yield order[start : start + self.batch_size]


class RolloutLoader(DataLoader):
    """A DataLoader that passes the epoch on to its batch sampler."""

    def set_epoch(self, epoch: int) -> None:
        """Called by transformers.Trainer."""
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]
