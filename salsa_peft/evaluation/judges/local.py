"""Judge by a chat model in this process, with the model's chat template, greedy or sampled.

At a temperature above 0, each request is sampled with its own seed, so that the reply does not depend on the batch. The
model is loaded for the first request that is not in the cache.
"""

import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LogitsProcessor, LogitsProcessorList

from salsa_peft.config.judge import Judge
from salsa_peft.data.chat.templates import content_for_template
from salsa_peft.data.chat.turn_ends import model_stop_token_ids
from salsa_peft.evaluation.judges.cache import Reply
from salsa_peft.evaluation.judges.chat import CALLS, Messages, Outcome
from salsa_peft.models.base import device, max_positions, resolve_dtype
from salsa_peft.models.generation import WITHOUT_FLOAT64, sample_token, uniform_numbers
from salsa_peft.models.responses import pad_tokens
from salsa_peft.utils.errors import require
from salsa_peft.utils.fingerprints import fingerprint
from salsa_peft.utils.hub import local_folder, readable_hub_errors

WHERE = "evaluate.judge.model"
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

    def __init__(self, section: Judge) -> None:
        self.section, self.calls = section, dict.fromkeys(CALLS, 0)
        self.folder = local_folder(str(section.model))
        self.identity = fingerprint(self.folder)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(str(self.folder), trust_remote_code=False)
        require(
            self.tokenizer.chat_template is not None, f"{WHERE}: {section.model} has no chat template; use a chat model"
        )
        added = [str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        self.special = sorted({*added, *self.tokenizer.all_special_tokens}, key=len, reverse=True)
        self.model: Any = None
        self.ends: list[int] = []

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
        rows.sort(key=lambda row: (row.room, -len(row.ids)))
        for _, of in itertools.groupby(rows, key=lambda row: row.room):  # one length limit per batch
            alike = list(of)
            for start in range(0, len(alike), self.section.concurrency):
                done(self._answer(alike[start : start + self.section.concurrency]))

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
        with readable_hub_errors(str(self.section.model)):
            model: Any = AutoModelForCausalLM.from_pretrained(
                str(self.folder), dtype=resolve_dtype("auto"), trust_remote_code=False, use_safetensors=True
            )
        self.ends = list(model_stop_token_ids(self.tokenizer, model))
        require(bool(self.ends), f"{WHERE}: {self.section.model} has no token that ends a turn; use a chat model")
        return model.to(device()).eval().requires_grad_(False)

    @torch.no_grad()
    def _answer(self, batch: Sequence[Row]) -> dict[str, Outcome]:
        room = batch[0].room
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.ends[0]
        ids, mask = pad_tokens([row.ids for row in batch], pad, self.model.device, "left")
        settings = GenerationConfig(do_sample=False, max_new_tokens=room, eos_token_id=self.ends, pad_token_id=pad)
        processors = LogitsProcessorList()
        if self.section.temperature > 0:
            seeds = [int(row.key[:15], 16) for row in batch]
            processors.append(SeededSampling(seeds, room, self.section.temperature, self.model.device))
        self.model.generation_config = settings  # replaces the model's own penalties and top-p
        tokens = self.model.generate(input_ids=ids, attention_mask=mask.long(), logits_processor=processors)
        self.calls["asked"] += len(batch)
        found = {}
        for row, reply in zip(batch, tokens[:, ids.shape[1] :].tolist(), strict=True):
            end = next((at for at, token in enumerate(reply) if token in self.ends), None)
            text = self.tokenizer.decode(reply[:end], skip_special_tokens=True)
            length = len(reply) if end is None else end + 1
            found[row.key] = Outcome(Reply(text, "length" if end is None else "stop", len(row.ids), length))
        return found


class SeededSampling(LogitsProcessor):
    """Logits processor that samples each row's token with the row's own uniform random numbers."""

    def __init__(self, seeds: Sequence[int], length: int, temperature: float, place: torch.device) -> None:
        uniforms = uniform_numbers(seeds, length)
        self.uniforms = uniforms if place.type in WITHOUT_FLOAT64 else uniforms.to(place)
        self.temperature, self.step = temperature, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Sample from the logits (B, V); returns logits of 0 for the sampled token and −∞ for all others."""
        token = sample_token((scores.float() / self.temperature).softmax(-1), self.uniforms[:, self.step])
        self.step += 1
        return torch.full_like(scores, -torch.inf).scatter_(-1, token, 0.0)
