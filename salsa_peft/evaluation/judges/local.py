"""Judge by a chat model in this process, with the model's chat template, greedy or sampled.

At a temperature above 0, each request is sampled with its own seed, so that the reply does not depend on the batch. The
model is loaded for the first request that is not in the cache.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jinja2 import TemplateError
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from salsa_peft.config.judge import Judge
from salsa_peft.config.options.ppo import Sampling
from salsa_peft.data.chat.templates import content_for_template
from salsa_peft.data.chat.turn_ends import model_stop_token_ids
from salsa_peft.evaluation.judges.cache import Reply
from salsa_peft.evaluation.judges.chat import CALLS, Messages, Outcome
from salsa_peft.models.base import device, max_positions, resolve_dtype
from salsa_peft.models.generation import batches_by_length, generate
from salsa_peft.models.responses import token_lists
from salsa_peft.utils.errors import require
from salsa_peft.utils.fingerprints import fingerprint
from salsa_peft.utils.hub import local_folder, readable_hub_errors

ROOM = 64
"""Number of tokens (or max_tokens, if less) that a prompt must leave for the reply; else it is not sent."""


class Row(NamedTuple):
    """A request as token ids."""

    key: str
    ids: list[int]
    room: int
    """Maximum number of tokens in the reply."""


class LocalModel:
    """Chat backend that generates replies with a local model and counts requests in `calls`."""

    def __init__(self, section: Judge, where: str = "evaluate.judge") -> None:
        self.section, self.where, self.calls = section, f"{where}.model", dict.fromkeys(CALLS, 0)
        self.folder = local_folder(str(section.model))
        self.identity = fingerprint(self.folder)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(str(self.folder), trust_remote_code=False)
        require(
            self.tokenizer.chat_template is not None,
            f"{self.where}: {section.model} has no chat template; use a chat model",
        )
        added = [str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        self.special = sorted({*added, *self.tokenizer.all_special_tokens}, key=len, reverse=True)
        self.model: Any = None

    @property
    def address(self) -> tuple[str, str]:
        """The word "local" and the model's fingerprint, so that replies of a replaced model are not reused."""
        return "local", self.identity

    def __call__(self, requests: Mapping[str, Messages], done: Callable[[dict[str, Outcome]], None]) -> None:
        if self.model is None:
            self.model = self._load()
        longest = min(int(self.tokenizer.model_max_length), max_positions(self.model.config) or sys.maxsize)
        rows = []
        for key, messages in requests.items():
            ids = self.encode(messages)
            room = min(self.section.max_tokens, longest - len(ids))
            if room < min(ROOM, self.section.max_tokens):
                done({key: Outcome(None, f"the prompt is too long for the judge, which reads up to {longest} tokens")})
            else:
                rows.append(Row(key, ids, room))
        lengths, limits = [len(row.ids) for row in rows], [row.room for row in rows]
        # the longest first, which need the most memory
        for batch in batches_by_length(lengths, limits, self.section.concurrency, longest, longest_first=True):
            done(self._answer([rows[row] for row in batch]))

    def encode(self, messages: Messages) -> list[int]:
        """Token ids of the judge's messages, rendered with the model's chat template.

        If the template rejects the system message, the system text is put before the user's text. If a message
        spells out a special token, a space is inserted into the token, so that it is encoded as plain text.
        """
        messages = [{**message, "content": self._plain(message["content"])} for message in messages]
        try:
            encoded = self._templated(messages)
        except TemplateError:
            joined = "\n\n".join(message["content"] for message in messages)
            encoded = self._templated([{"role": "user", "content": joined}])
        return list(encoded["input_ids"])

    def _templated(self, messages: Messages) -> Any:
        chat = content_for_template(messages, self.tokenizer)
        return self.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)

    def _plain(self, text: str) -> str:
        for token in self.special:
            text = text.replace(token, f"{token[0]} {token[1:]}")
        return text

    def _load(self) -> Any:
        disable_progress_bar()  # Transformers' bar for loading weights
        with readable_hub_errors(str(self.section.model)):
            model: Any = AutoModelForCausalLM.from_pretrained(
                str(self.folder), dtype=resolve_dtype("auto"), trust_remote_code=False, use_safetensors=True
            )
        ends = model_stop_token_ids(self.tokenizer, model)
        require(bool(ends), f"{self.where}: {self.section.model} has no token that ends a turn; use a chat model")
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.convert_ids_to_tokens(ends[0])
        return model.to(device()).eval().requires_grad_(False)

    def _answer(self, batch: Sequence[Row]) -> dict[str, Outcome]:
        limits, seeds = [row.room for row in batch], [int(row.key[:15], 16) for row in batch]
        sampling = Sampling(max_new_tokens=max(limits), temperature=self.section.temperature)
        made = generate(self.model, [row.ids for row in batch], sampling, self.tokenizer, seeds, limits=limits)
        self.calls["asked"] += len(batch)
        replies, finished = token_lists(made.response_ids, made.response_mask), made.finished.tolist()
        found = {}
        for row, reply, ended in zip(batch, replies, finished, strict=True):
            text = self.tokenizer.decode(reply[:-1] if ended else reply, skip_special_tokens=True)
            found[row.key] = Outcome(Reply(text, "stop" if ended else "length", len(row.ids), len(reply)))
        return found
