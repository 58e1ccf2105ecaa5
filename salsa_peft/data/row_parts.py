"""Parts of rows: columns of text and of messages, questions, answers, whole chats, system turns, tools. Imports no torch."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from salsa_peft.data.message_formats import Messages, hh_messages, is_hh, parse_json, parse_messages, parse_tools
from salsa_peft.utils.errors import SalsaError, require
from salsa_peft.utils.messages import describe, one_line, short

Row = Mapping[str, Any]
INPUTS = ("input", "context")
"""What an instruction is about: Alpaca's column, Dolly's."""
SYSTEMS = ("system", "system_prompt")
TURN_MARKS = ("<|im_start|>", "<|start_header_id|>", "<start_of_turn>", "<|user|>", "<|system|>", "[INST]")
"""How text begins that a chat template has rendered already: chatml, Llama 3 and 2, Mistral, Gemma, Zephyr, Phi."""


def has_columns(row: Row, *names: str) -> bool:
    """Whether the row has all of these columns, none of them null."""
    return all(row.get(name) is not None for name in names)


def first_column(row: Row, names: Sequence[str]) -> str | None:
    """The first of these columns that the row has, not null."""
    return next((name for name in names if row.get(name) is not None), None)


def missing_columns(row: Row, expected: str, where: str, missed: Sequence[str] = ()) -> SalsaError:
    """The refusal of a row without the columns of its kind: what it has, what was expected, which are null."""
    found = f"columns {one_line(', '.join(sorted(map(str, row))))}" if row else "no columns"
    null = "".join(f"; {name} is null" for name in missed if name in row and row[name] is None)
    return SalsaError(f"{where}: found {found}, expected {expected}{null}")


def read_text(row: Row, name: str, where: str) -> str:
    """A column of text, which no chat template has rendered. Raises SalsaError."""
    value = row[name]
    require(isinstance(value, str), f"{where}, {name}: found {describe(value)}, expected text")
    begins = str(value).lstrip()
    for bos in ("<|begin_of_text|>", "<bos>", "<s>"):
        begins = begins.removeprefix(bos).lstrip()
    require(
        not begins.startswith(TURN_MARKS),
        f"{where}, {name}: found text that a chat template has rendered already ({short(value)}), expected messages, or the turn's text alone:"
        " the recipe's template would be put around it",
    )
    return str(value)


def read_question(row: Row, name: str, where: str) -> Messages:
    r"""A question of one or two columns, instruction and input joined by "\n" as LLaMA-Factory does; HH-RLHF's text → its turns.

    LLaMA-Factory's `history`, pairs of texts, stands before it.
    """
    value = parse_json_messages(row[name])
    if is_hh(value):
        return hh_messages(value)
    if isinstance(value, str):
        about = first_column(row, INPUTS) if name == "instruction" else None
        parts = [read_text(row, name, where), *([read_text(row, about, where)] if about else [])]
        asked = [{"role": "user", "content": "\n".join(part for part in parts if part or part is parts[0])}]
        return _history(row, where) + asked
    return _messages(value, f"{where}, {name}")


def _messages(value: Any, where: str) -> Messages:
    """One message, or a list of them. Raises SalsaError."""
    fits = isinstance(value, list) or (isinstance(value, dict) and bool({"role", "from"} & set(value)))
    require(fits, f"{where}: found {describe(value)}, expected text or messages")
    return parse_messages([value] if isinstance(value, dict) else value, where)


def _history(row: Row, where: str) -> Messages:
    found, pairs = Messages(), row.get("history") or []
    for pair in parse_json(pairs, f"{where}, history") if isinstance(pairs, str) else pairs:
        fits = isinstance(pair, list) and len(pair) == 2 and all(isinstance(one, str) for one in pair)
        require(fits, f"{where}, history: found {short(pair)}, expected pairs of a question and its answer")
        found += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return found


def parse_json_messages(value: Any) -> Any:
    """Messages where text is their JSON, as csv files have them; else the value."""
    if isinstance(value, str) and value.lstrip().startswith("[{"):
        with contextlib.suppress(ValueError, RecursionError):  # text may well begin so
            found = json.loads(value)
            if all(isinstance(one, dict) and {"role", "from"} & set(one) for one in found):
                return found
    return value


def raw_chat(row: Row, name: str, where: str) -> Any:
    """The messages of a whole chat, as they are: ShareGPT's list, Capybara's pairs of {input, output}, LIMA's list of texts."""
    value = row[name]
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = parse_json(value, f"{where}, {name}")
    if isinstance(value, list) and value and name != "messages":
        if all(isinstance(one, dict) and {"input", "output"} <= set(one) for one in value):
            value = [
                {"role": role, "content": one[key]}
                for one in value
                for role, key in (("user", "input"), ("assistant", "output"))
            ]
        elif all(isinstance(one, str) for one in value):
            value = [{"role": ("user", "assistant")[i % 2], "content": one} for i, one in enumerate(value)]
    return value


def read_chat(row: Row, name: str, where: str) -> Messages:
    """A whole chat."""
    return parse_messages(raw_chat(row, name, where), f"{where}, {name}")


def read_answer(row: Row, name: str, where: str) -> Messages:
    """One answer, or the chat that ends with it: text, one message, or messages."""
    value = parse_json_messages(row[name])
    if is_hh(value):
        return hh_messages(value)
    if isinstance(value, str):
        return [{"role": "assistant", "content": read_text(row, name, where)}]
    return _messages(value, f"{where}, {name}")


def with_system(row: Row, messages: Messages, where: str) -> Messages:
    """The messages after the row's `system` column. Raises SalsaError where they begin with another system turn."""
    name = first_column(row, SYSTEMS)
    if name is None or not (words := read_text(row, name, where)).strip():
        return messages
    if messages and messages[0]["role"] == "system":
        same = messages[0]["content"].strip() == words.strip()
        require(
            same,
            f"{where}, {name}: found another text than the first turn's system text, expected one of them; take one out",
        )
        return messages
    return [{"role": "system", "content": words}, *messages]


def append_answer(asked: Messages, answered: Messages) -> Messages:
    """The answer after what was asked, which stands before it once: an answer that holds its prompt already does not get it again."""
    systems = asked[:1] if asked and asked[0]["role"] == "system" else []
    rest = asked[len(systems) :]
    if answered[0]["role"] not in ("user", "system"):
        return asked + answered
    own = answered[0]["role"] == "system"
    return answered if own or (rest and answered[: len(rest)] != rest) else systems + answered


def _older_tools(row: Row, where: str) -> bool:
    """Whether a row has OpenAI's older column `functions`, also as JSON text, and no other data of that name."""
    value = row.get("functions")
    if isinstance(value, str) and value.lstrip().startswith("[{"):
        value = parse_json(value, f"{where}, functions")
    return isinstance(value, list) and bool(value) and all(isinstance(one, dict) and "name" in one for one in value)


def template_inputs(row: Row, where: str) -> dict[str, Any]:
    """What a chat template is given beside the messages: the row's tools (OpenAI's older `functions` too), and TRL's
    chat_template_kwargs."""
    found: dict[str, Any] = {}
    name = "tools" if row.get("tools") is not None or not _older_tools(row, where) else "functions"
    if row.get(name) is not None and (tools := parse_tools(row[name], f"{where}, {name}")):
        found["tools"] = tools
    options = row.get("chat_template_kwargs")
    if isinstance(options, str) and options.strip():
        options = parse_json(options, f"{where}, chat_template_kwargs")
    require(
        options is None or options == "" or isinstance(options, dict),
        f"{where}, chat_template_kwargs: found {short(options)}, expected options of the template by name",
    )
    return found | ({"chat_template_kwargs": options} if options else {})
