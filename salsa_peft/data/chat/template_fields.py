"""What a chat template does with messages: the form it reads, the fields it drops, the loss mask.

A template gives no error for a field that it drops. A field counts as dropped if changing it does not change the
rendered text. Imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from salsa_peft.data.chat.assistant_masks import assistant_tokens
from salsa_peft.data.chat.templates import (
    ANSWER,
    CHAT,
    cached_per_tokenizer,
    common_prefix_length,
    content_for_template,
    try_render,
)
from salsa_peft.data.message_formats import Messages, parse_tools
from salsa_peft.utils.errors import SalsaError, require
from salsa_peft.utils.messages import one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHAT_ROLES = ("user", "assistant")
FIELD = "`{}` in their messages"
TOOL_CALLS_FIELD = FIELD.format("tool_calls")
"""Name of tool calls in the result of `dropped_fields`."""


def template_options(row: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of apply_chat_template that a row has besides its messages, as in TRL's trainers."""
    tools = parse_tools(row.get("tools"), "tools")
    return ({"tools": tools} if tools else {}) | dict(row.get("chat_template_kwargs") or {})


def apply_template(messages: Messages, tokenizer: PreTrainedTokenizerBase, where: str, **options: Any) -> Any:
    """The result of apply_chat_template. Raises SalsaError for a missing template or rejected messages."""
    require(
        tokenizer.chat_template is not None,
        f"{where}: has messages, but the tokenizer has no chat template; set a chat template, or give text",
    )
    try:
        return tokenizer.apply_chat_template(messages, **options)
    except (TemplateError, TypeError) as error:
        system = any(message["role"] == "system" for message in messages)
        remedy = (
            "; remove the system turn, or set model.chat_template to a template with system turns" if system else ""
        )
        raise SalsaError(
            f"{where}: the tokenizer's chat template rejects these messages: {one_line(error)}{remedy}"
        ) from error


@cached_per_tokenizer
def reads_text_arguments(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template reads a tool call's arguments as JSON text (DeepSeek) instead of an object."""

    def shown(arguments: Any) -> bool:
        function = {"name": "f", "arguments": arguments}
        answer = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}
        return ANSWER in (try_render(content_for_template([CHAT[0], answer], tokenizer), tokenizer) or "")

    return not shown({"x": ANSWER}) and shown(json.dumps({"x": ANSWER}))


def messages_for_template(messages: Messages, tokenizer: PreTrainedTokenizerBase | None) -> Messages:
    """Messages in the form that the tokenizer's template reads; unchanged without a tokenizer or template."""
    if tokenizer is None or tokenizer.chat_template is None:
        return messages
    if reads_text_arguments(tokenizer):
        messages = [
            {**message, "tool_calls": [_with_text_arguments(call) for call in message["tool_calls"]]}
            if "tool_calls" in message
            else message
            for message in messages
        ]
    return content_for_template(messages, tokenizer)


def _with_text_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    arguments = call["function"]["arguments"]
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return {**call, "function": {**call["function"], "arguments": text}}


def dropped_fields(
    messages: Messages, tokenizer: PreTrainedTokenizerBase | None, where: str, options: Mapping[str, Any] | None = None
) -> list[str]:
    """Names of what the template drops from messages: a system turn, `tool_calls`, `tools` …

    Raises SalsaError if the template rejects the messages, or drops the content of a user or assistant turn.
    """
    if tokenizer is None:
        return []
    given = dict(options or {})
    text = str(apply_template(messages, tokenizer, where, tokenize=False, **given))

    def shown(other: Messages, **changed: Any) -> bool:
        return text != try_render(other, tokenizer, **(given | changed))  # None: the template needs what was changed

    found = []
    for place, message in enumerate(messages):
        before, behind, role = messages[:place], messages[place + 1 :], message["role"]
        words = message_text(message).strip()
        doubtful = bool(words) and (role not in CHAT_ROLES or words not in text)
        if doubtful and not shown([*before, _other_words(message), *behind]):
            require(
                role not in CHAT_ROLES,
                f"{where}: the tokenizer's chat template drops the content of turn {place + 1} ({role}); set"
                " model.chat_template to another template",
            )
            found.append(f"a {role} turn")
        more = [key for key in message if key not in ("role", "content") and message[key] not in (None, "", [], {})]
        bare = {"role": role, "content": message["content"]}
        if more and shown([*before, bare, *behind]):  # the template reads at least one of these keys
            rest = {key: {name: value for name, value in message.items() if name != key} for key in more}
            more = [key for key in more if not shown([*before, rest[key], *behind])]
        found += map(FIELD.format, more)
    if given.get("tools") and not shown(messages, tools=None):
        found.append("`tools`")
    return sorted(set(found))


def message_text(message: Mapping[str, Any]) -> str:
    """A message's text, also if its content is a list of parts."""
    content = message["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _other_words(message: Mapping[str, Any]) -> dict[str, Any]:
    words = f"{message_text(message)} – other"
    return {**message, "content": words if isinstance(message["content"], str) else [{"type": "text", "text": words}]}


def trained_tokens(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Token ids of a row's chat, and a mask: 1 for the assistant's tokens outside `skipped` turns, else 0.

    A turn starts where the tokens of the messages before it, with the generation prompt, first differ from those of the
    whole chat (TRL finds a completion's start in this way), and ends where the next assistant turn starts.
    """
    messages = row["messages"]
    ids, mask = assistant_tokens(messages, tokenizer, **template_options(row))
    if not row.get("skipped"):
        return ids, mask
    places = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    starts = [common_prefix_length(_before(row, place, tokenizer), ids) for place in places]
    for place, start, end in zip(places, starts, [*starts[1:], len(ids)], strict=True):
        if place in row["skipped"]:
            mask[start:end] = [0] * (end - start)
    return ids, mask


def _before(row: Mapping[str, Any], place: int, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if place == 0:
        return []
    encoded: Any = tokenizer.apply_chat_template(
        row["messages"][:place], add_generation_prompt=True, return_dict=True, **template_options(row)
    )
    return list(encoded["input_ids"])
