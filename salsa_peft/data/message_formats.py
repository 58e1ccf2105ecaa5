"""Messages as data sets have them → {role, content, …} of text: ShareGPT's keys and roles, typed parts, tool calls, HH-RLHF's strings.

TRL's maybe_convert_to_chatml renames keys alone, and TRL imports torch, which a dry run must not. Further keys of a message stay: which of
them a chat template shows is looked at in data/chat/template_fields.py. Imports no torch.
"""

from __future__ import annotations

import json
import re
from typing import Any

from salsa_peft.utils.errors import SalsaError, require
from salsa_peft.utils.messages import describe, short

Messages = list[dict[str, Any]]
ROLES = {
    "human": "user", "user": "user", "prompter": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "bot": "assistant", "bing": "assistant", "bard": "assistant", "model": "assistant", "system": "system", "tool": "tool",
    "observation": "tool", "function": "tool", "function_response": "tool", "tool_response": "tool",
    "function_call": "assistant", "tool_call": "assistant",
}  # fmt: skip
"""Roles of ShareGPT, LLaMA-Factory, OpenAssistant and OpenAI's older interface → those of chat templates. `role` may have others too."""
CALL_ROLES = ("function_call", "tool_call")
"""Roles whose text is a tool call, or a list of them, as JSON."""
REASONING_TYPES = ("reasoning", "thinking", "reasoning_content")
"""Types of a content's part that are an assistant's thoughts."""
WEIGHT_KEYS = ("weight", "loss_weight", "train", "training")
"""Keys of a message that say whether it is trained on: OpenAI's, LLaMA-Factory's, axolotl's."""
CONVERTED_KEYS = {"from", "value", "role", "content", "function_call", *WEIGHT_KEYS}


def parse_messages(value: Any, where: str) -> Messages:
    """A list of messages, also as JSON text → {role, content, …} whose content is text. Raises SalsaError that names `where`."""
    if isinstance(value, str) and value.lstrip().startswith("["):  # as csv files have them
        value = parse_json(value, where)
    fits = isinstance(value, list) and bool(value) and all(isinstance(message, dict) for message in value)
    columns = isinstance(value, list) and bool(value) and all(isinstance(message, list) for message in value)
    hint = "; a list of such lists is a file by columns: write one object a row" if columns else ""
    require(fits, f"{where}: found {describe(value)}, expected a list of {{role, content}} messages{hint}")
    return [_message(message, where) for message in value]


def untrained_turns(value: Messages, where: str) -> list[int]:
    """Positions of the assistant's messages that their own weight keeps out of the loss. Raises SalsaError for a weight but 0 or 1."""
    found = []
    for position, message in enumerate(value):
        for key in WEIGHT_KEYS:
            weight = message.get(key)
            require(
                weight in (None, 0, 1),
                f"{where}: found {key} {short(weight)}, expected 0 or 1: a turn is trained or not",
            )
            if weight == 0 and role_of(message, where) == "assistant":
                found.append(position)
    return list(dict.fromkeys(found))


def role_of(message: dict[str, Any], where: str) -> str:
    """A message's role as chat templates call it. Raises SalsaError for no text, and for an unknown one under ShareGPT's key `from`."""
    key = "from" if "from" in message and "role" not in message else "role"
    given = message.get(key)
    if key not in message:
        raise SalsaError(
            f"{where}: found no role in {describe(message)}, expected messages of {{role, content}} or {{from, value}}"
        )
    require(isinstance(given, str), f"{where}: found {describe(given)} as {key}, expected text")
    known = ROLES.get(str(given).lower())
    require(
        known is not None or key == "role",
        f"{where}: found the unknown role {short(given)}, expected human, gpt, system, function_call, observation or tool; rename it",
    )
    return str(given) if known is None else known


def _message(message: dict[str, Any], where: str) -> dict[str, Any]:
    role = role_of(message, where)
    content = message["value"] if "value" in message and "content" not in message else message.get("content")
    more = {key: value for key, value in message.items() if key not in CONVERTED_KEYS and value not in (None, [], {})}
    calls = parse_tool_calls(more.pop("tool_calls", None), where)
    if message.get("function_call") is not None:  # OpenAI's older interface
        calls += parse_tool_calls([message["function_call"]], where)
    if str(message.get("role", message.get("from"))).lower() in CALL_ROLES:
        calls, content = parse_tool_calls(content, where), ""
    if isinstance(content, list) and content and all(isinstance(part, dict) and "type" in part for part in content):
        content, thoughts, called = _parts(content, where)
        calls += called
        more |= {"reasoning_content": thoughts} if thoughts else {}
    if content is None and calls:
        content = ""
    require(isinstance(content, str), f"{where}: found {describe(content)} as the content of {role}, expected text")
    return {"role": role, "content": content, **more, **({"tool_calls": calls} if calls else {})}


def _parts(content: list[dict[str, Any]], where: str) -> tuple[str, str, Messages]:
    """A list of typed parts → text, thoughts, tool calls. Raises SalsaError for images and other parts that are no text."""
    text, thoughts, calls = "", "", Messages()
    for part in content:
        kind = part["type"]
        value = next(
            (part[key] for key in ("text", "value", kind) if isinstance(key, str) and part.get(key) is not None), None
        )
        if kind == "tool_call":
            calls += parse_tool_calls(value, where)
            continue
        require(
            kind in ("text", *REASONING_TYPES),
            f"{where}: found a part of type {short(kind)} in content, expected text: only text can be trained on",
        )
        require(isinstance(value, str), f"{where}: found a part {short(part)} in content, expected text")
        if kind == "text":
            text += str(value)
        else:
            thoughts += str(value)
    return text, thoughts, calls


def parse_tool_calls(value: Any, where: str) -> Messages:
    """Tool calls → [{type, function: {name, arguments}}] with arguments as an object, which is what Transformers' templates read.

    JSON text, one call without a list and calls without `function` around them are taken too. Raises SalsaError.
    """
    if isinstance(value, str):
        value = parse_json(value, where)
    found = []
    for call in _as_list(value, where, "tool calls"):
        inner: Any = call.get("function", call) if isinstance(call, dict) else None
        fits = isinstance(inner, dict) and isinstance(inner.get("name"), str)
        require(fits, f"{where}: found the tool call {short(call)}, expected {{name, arguments}}")
        arguments = inner.get("arguments", {})
        if isinstance(arguments, str):
            arguments = parse_json(arguments or "{}", where)
        require(
            isinstance(arguments, dict),
            f"{where}: found the arguments {short(arguments)} of {inner['name']}, expected an object",
        )
        outer = call if inner is not call else {}
        found.append({"type": "function", **outer, "function": {**inner, "arguments": arguments}})
    return found


def parse_tools(value: Any, where: str) -> Messages | None:
    """A row's `tools`, also as JSON text → [{type: function, function: {name, …}}]; None for none. Raises SalsaError."""
    if isinstance(value, str):
        value = parse_json(value, where) if value.strip() else None
    found = []
    for tool in _as_list(value, where, "descriptions of functions"):
        require(isinstance(tool, dict), f"{where}: found {short(tool)}, expected the description of a function (JSON)")
        found.append({"type": "function", "function": tool} if "name" in tool and "function" not in tool else tool)
    return found or None


def _as_list(value: Any, where: str, what: str) -> list[Any]:
    found = [value] if isinstance(value, dict) else [] if value is None else value
    require(isinstance(found, list), f"{where}: found {short(value)}, expected a list of {what}")
    return list(found)


def parse_json(text: str, where: str) -> Any:
    """What JSON text holds. Raises SalsaError that names `where`."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SalsaError(f"{where}: found {text[:60]!r}, expected JSON ({error})") from error


def is_hh(text: Any) -> bool:
    r"""Whether text is a conversation as Anthropic's HH-RLHF has it: "\n\nHuman: …\n\nAssistant: …"."""
    return isinstance(text, str) and bool(re.match(r"\s*Human:", text)) and "\n\nAssistant:" in text


def hh_messages(text: str) -> Messages:
    """The turns of HH-RLHF's text, blanks around them left out; of an empty last turn of the assistant nothing."""
    pieces = re.split(r"(?:\A\s*|\n\n)(Human|Assistant):", text)[1:]
    found = [
        {"role": ROLES[name.lower()], "content": turn.strip()}
        for name, turn in zip(pieces[::2], pieces[1::2], strict=True)
    ]
    return found if found[-1]["content"] or found[-1]["role"] == "user" else found[:-1]
