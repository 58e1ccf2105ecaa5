"""The trainer's datasets → prompts: each row's tokens, what is too long left out and counted, what does not fit refused by its number."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from salsa_peft.data.chat.template_fields import dropped_fields, messages_for_template, template_options
from salsa_peft.data.chat.templates import adds_bos
from salsa_peft.data.datasets import RowWarnings, prompt_tokens
from salsa_peft.data.message_formats import parse_messages
from salsa_peft.models.base import max_positions
from salsa_peft.utils.errors import SalsaError, require
from salsa_peft.utils.messages import one_line, short

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from salsa_peft.training.ppo.config import SalsaPPOConfig


OWN_BOS = "begin with {} already: the tokenizer's own is left out"


class Prompt(NamedTuple):
    """One prompt of the data."""

    tokens: list[int]
    row: Mapping[str, Any]
    """The data's row, which reward functions see."""


class PromptEncoder(NamedTuple):
    """What turns rows into prompts that fit."""

    tokenizer: PreTrainedTokenizerBase
    longest: int | None
    """Tokens of the longest prompt that is kept. None: any."""
    vocabulary: int
    """Rows of the input embeddings."""
    quiet: bool = False
    """Whether to say nothing of what is left out (another process does)."""

    @classmethod
    def of(
        cls, models: Sequence[PreTrainedModel], args: SalsaPPOConfig, tokenizer: PreTrainedTokenizerBase
    ) -> PromptEncoder:
        """For prompts that leave room for a response in each of `models`, the policy's the first, and within max_prompt_length.

        Raises SalsaError for a max_new_tokens that leaves none.
        """
        read = [number for number in (max_positions(model.config) for model in models) if number is not None]
        require(
            not read or args.max_new_tokens < min(read),
            f"max_new_tokens: found {args.max_new_tokens}, expected less than the {min(read, default=0)} tokens that the models read,"
            " so that a prompt fits too",
        )
        given = [] if args.max_prompt_length is None else [args.max_prompt_length]
        longest = min([*given, *(number - args.max_new_tokens for number in read)], default=None)
        rows: Any = models[0].get_input_embeddings().weight
        return cls(tokenizer, longest, len(rows), quiet=args.process_index > 0)

    def __call__(self, rows: Any, name: str) -> tuple[list[Prompt], int]:
        """Rows → prompts, and how many were left out for more than `longest` tokens, or none; said once. Raises SalsaError that
        begins with `name` for what are no rows, and names the row that has no usable prompt."""
        expected = "expected rows with `prompt` or `input_ids`"
        if isinstance(rows, Mapping):  # datasets.DatasetDict is one
            raise SalsaError(
                f"{name}: found {type(rows).__name__} of {short(list(rows))}, {expected}; pass one of these"
            )
        try:
            each = iter(rows)
        except TypeError as error:
            raise SalsaError(f"{name}: found {one_line(short(rows))}, {expected}") from error
        prompts = [Prompt(self.tokens(row, number, name), row) for number, row in enumerate(each, 1)]
        kept = [prompt for prompt in prompts if prompt.tokens and len(prompt.tokens) <= (self.longest or sys.maxsize)]
        left_out = len(prompts) - len(kept)
        if left_out and not self.quiet:
            print(f"{name}: {left_out} of {len(prompts)} prompts left out: {self.limit}", file=sys.stderr, flush=True)
        if not self.quiet:
            odd = RowWarnings(name)
            for number, prompt in enumerate(prompts, 1):
                odd.add_dropped(number, self.dropped(prompt.row, number, name))
                odd.add(number, OWN_BOS.format(self.tokenizer.bos_token), self.begins_with_bos(prompt.row))
            odd.print(len(prompts))
        return kept, left_out

    @property
    def limit(self) -> str:
        """Why a prompt is left out, for messages."""
        return "empty" + (
            ""
            if self.longest is None
            else f", or longer than {self.longest} tokens (max_prompt_length, or what the models read less max_new_tokens)"
        )

    def tokens(self, row: Any, number: int, name: str) -> list[int]:
        """A row's token ids."""
        where = f"{name}, row {number}"
        require(
            isinstance(row, Mapping),
            f"{where}: found {one_line(short(row))}, expected a mapping with `prompt` or `input_ids`",
        )
        given = row.get("prompt")
        if "input_ids" not in row:
            require(
                "prompt" in row,
                f"{where}: found the columns {', '.join(map(str, row))}, expected `prompt` or `input_ids`",
            )
            require(given is not None, f"{where}, prompt: found None, expected text or messages")
            spoken = (
                isinstance(given, list)
                and given
                and isinstance(given[-1], Mapping)
                and given[-1].get("role") == "assistant"
            )
            require(
                not spoken, f"{where}, prompt: found a last turn of assistant, expected user: the policy answers next"
            )
        ids = [int(token) for token in prompt_tokens(row, self.tokenizer, number, name)]  # type: ignore[arg-type]
        odd = [token for token in ids if not 0 <= token < self.vocabulary]
        require(
            not odd, f"{where}: found token id {odd[:1]}, expected 0 to {self.vocabulary - 1}, the model's embeddings"
        )
        return ids

    def begins_with_bos(self, row: Mapping[str, Any]) -> bool:
        """Whether a text has the BOS that the tokenizer adds: a chat template has rendered it."""
        text = row.get("prompt") if "input_ids" not in row else None
        return isinstance(text, str) and adds_bos(self.tokenizer) and text.startswith(str(self.tokenizer.bos_token))

    def dropped(self, row: Mapping[str, Any], number: int, name: str) -> list[str]:
        """What the chat template leaves out of a row: a system turn, `tools` …"""
        messages: Any = None if "input_ids" in row else row["prompt"]
        if not isinstance(messages, list):
            return []
        where = f"{name}, row {number}, prompt"
        return dropped_fields(
            messages_for_template(parse_messages(messages, where), self.tokenizer),
            self.tokenizer,
            where,
            template_options(row),
        )
