"""Parts of rows: text, questions, answers, whole chats, system turns, tools. Imports no torch."""

import contextlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from salsa_peft.data.message_formats import Messages, hh_messages, is_hh, parse_json, parse_messages, parse_tools
from salsa_peft.utils.errors import SalsaError, require
from salsa_peft.utils.messages import describe, one_line, short

Row = Mapping[str, Any]
INPUTS = ("input", "context")
"""Columns with the input of an instruction, in Alpaca and in Dolly."""
SYSTEMS = ("system", "system_prompt")
TURN_MARKS = ("<|im_start|>", "<|start_header_id|>", "<start_of_turn>", "<|user|>", "<|system|>", "[INST]")
"""Marks at the start of text that a chat template has rendered: chatml, Llama 3 and 2, Mistral, Gemma, Zephyr, Phi."""


def has_columns(row: Row, *names: str) -> bool:
    """Whether the row has all of these columns, and none is null."""
    return all(row.get(name) is not None for name in names)


def first_column(row: Row, names: Sequence[str]) -> str | None:
    """The first of these columns that the row has and that is not null, or None."""
    return next((name for name in names if row.get(name) is not None), None)


def missing_columns(row: Row, expected: str, where: str, missed: Sequence[str] = ()) -> SalsaError:
    """Return a SalsaError for a row that lacks columns. missed: columns to mention if they are null."""
    found = f"has the columns {one_line(', '.join(sorted(map(str, row))))}" if row else "has no columns"
    null = "".join(f"; {name} is null" for name in missed if name in row and row[name] is None)
    return SalsaError(f"{where}: {found}; it needs {expected}{null}")


def read_text(row: Row, name: str, where: str) -> str:
    """The text of a column. Raises SalsaError for other values, and for text rendered with a template."""
    value = row[name]
    require(isinstance(value, str), f"{where}, {name}: must be text, not {describe(value)}")
    start = str(value).lstrip()
    for bos in ("<|begin_of_text|>", "<bos>", "<s>"):
        start = start.removeprefix(bos).lstrip()
    require(
        not start.startswith(TURN_MARKS),
        f"{where}, {name}: is already rendered with a chat template ({short(value)}), and the recipe's template would"
        " be applied to it again; give messages, or the text of the turn alone",
    )
    return str(value)


def read_question(row: Row, name: str, where: str) -> Messages:
    r"""The messages of a question column: plain text, messages, or a transcript in HH-RLHF's form.

    Only plain text is combined with other columns, as in LLaMA-Factory: the pairs of question and answer in `history`
    come before it, and if the column is `instruction`, "\n" and the column `input` or `context` come after it.
    """
    value = parse_json_messages(row[name])
    if is_hh(value):
        return hh_messages(value)
    if isinstance(value, str):
        more = first_column(row, INPUTS) if name == "instruction" else None
        parts = [read_text(row, name, where), *([read_text(row, more, where)] if more else [])]
        content = "\n".join(part for part in parts if part or part is parts[0])
        return [*_history(row, where), {"role": "user", "content": content}]
    return _messages(value, f"{where}, {name}")


def _messages(value: Any, where: str) -> Messages:
    """Parse one message or a list of messages. Raises SalsaError."""
    fits = isinstance(value, list) or (isinstance(value, dict) and bool({"role", "from"} & set(value)))
    require(fits, f"{where}: must be text or messages, not {describe(value)}")
    return parse_messages([value] if isinstance(value, dict) else value, where)


def _history(row: Row, where: str) -> Messages:
    found = Messages()
    for pair in parse_json(row.get("history") or [], f"{where}, history"):
        fits = isinstance(pair, list) and len(pair) == 2 and all(isinstance(turn, str) for turn in pair)
        require(fits, f"{where}, history: must be pairs of a question and its answer, not {short(pair)}")
        found += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return found


def parse_json_messages(value: Any) -> Any:
    """Parse messages that are JSON text, as in csv files. Return other values unchanged."""
    if isinstance(value, str) and value.lstrip().startswith("[{"):
        with contextlib.suppress(ValueError, RecursionError):  # ordinary text may start like this
            found = json.loads(value)
            if all(isinstance(turn, dict) and {"role", "from"} & set(turn) for turn in found):
                return found
    return value


def raw_chat(row: Row, name: str, where: str) -> Any:
    """The unparsed messages of a whole chat. Capybara's pairs and LIMA's lists of texts are converted."""
    value = row[name]
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = parse_json(value, f"{where}, {name}")
    if isinstance(value, list) and value and name != "messages":
        if all(isinstance(pair, dict) and {"input", "output"} <= set(pair) for pair in value):
            value = [
                {"role": role, "content": pair[key]}
                for pair in value
                for role, key in (("user", "input"), ("assistant", "output"))
            ]
        elif all(isinstance(turn, str) for turn in value):
            value = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(value)]
    return value


def read_chat(row: Row, name: str, where: str) -> Messages:
    """The messages of a whole chat. Raises SalsaError."""
    return parse_messages(raw_chat(row, name, where), f"{where}, {name}")


def read_answer(row: Row, name: str, where: str) -> Messages:
    """The messages of an answer, or of a chat that ends with it: text, one message, or several."""
    value = parse_json_messages(row[name])
    if is_hh(value):
        return hh_messages(value)
    if isinstance(value, str):
        return [{"role": "assistant", "content": read_text(row, name, where)}]
    return _messages(value, f"{where}, {name}")


def with_system(row: Row, messages: Messages, where: str) -> Messages:
    """Put the row's system prompt first. Raises SalsaError if the messages have a different one."""
    name = first_column(row, SYSTEMS)
    if name is None or not (words := read_text(row, name, where)).strip():
        return messages
    if messages and messages[0]["role"] == "system":
        same = messages[0]["content"].strip() == words.strip()
        require(
            same, f"{where}, {name}: differs from the system turn at the start of the messages; remove one of the two"
        )
        return messages
    return [{"role": "system", "content": words}, *messages]


def append_answer(prompt: Messages, answer: Messages) -> Messages:
    """The prompt followed by the answer. If the answer contains the prompt, the prompt is not repeated."""
    systems = prompt[:1] if prompt and prompt[0]["role"] == "system" else []
    rest = prompt[len(systems) :]
    if answer[0]["role"] not in ("user", "system"):
        return prompt + answer
    own = answer[0]["role"] == "system"
    return answer if own or (rest and answer[: len(rest)] != rest) else systems + answer


def _older_tools(row: Row, where: str) -> bool:
    """Whether the column `functions` holds OpenAI's older form of tools, possibly as JSON text."""
    value = row.get("functions")
    if isinstance(value, str) and value.lstrip().startswith("[{"):
        value = parse_json(value, f"{where}, functions")
    tools = value if isinstance(value, list) else []
    return bool(tools) and all(isinstance(tool, dict) and "name" in tool for tool in tools)


def template_inputs(row: Row, where: str) -> dict[str, Any]:
    """The chat template's inputs besides the messages: `tools` or `functions`, and chat_template_kwargs."""
    found: dict[str, Any] = {}
    name = "tools" if row.get("tools") is not None or not _older_tools(row, where) else "functions"
    if row.get(name) is not None and (tools := parse_tools(row[name], f"{where}, {name}")):
        found["tools"] = tools
    options = row.get("chat_template_kwargs")
    if isinstance(options, str) and options.strip():
        options = parse_json(options, f"{where}, chat_template_kwargs")
    require(
        options is None or options == "" or isinstance(options, dict),
        f"{where}, chat_template_kwargs: must be a mapping of template options, not {short(options)}",
    )
    return found | ({"chat_template_kwargs": options} if options else {})
