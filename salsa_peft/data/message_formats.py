"""Converts ShareGPT, typed content parts, tool calls and HH-RLHF's text to {role, content, …}.

TRL's maybe_convert_to_chatml only renames keys, and TRL imports torch, which a dry run avoids. Further keys of a message
are kept; data/chat/template_fields.py checks which of them the chat template shows. Imports no torch.
"""

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
"""Roles in ShareGPT, LLaMA-Factory, OpenAssistant and OpenAI's older API → roles of chat templates."""
CALL_ROLES = ("function_call", "tool_call")
"""Roles whose text is a tool call, or a list of tool calls, as JSON."""
REASONING_TYPES = ("reasoning", "thinking", "reasoning_content")
"""Types of content parts that hold the assistant's reasoning."""
WEIGHT_KEYS = ("weight", "loss_weight", "train", "training")
"""Keys under which OpenAI, LLaMA-Factory and axolotl give the loss weight (0 or 1) of a message."""
CONVERTED_KEYS = {"from", "value", "role", "content", "function_call", *WEIGHT_KEYS}
"""Keys that are converted or removed; all other keys are kept."""


def parse_messages(value: Any, where: str) -> Messages:
    """Messages {role, content, …} with text as content, from a list or its JSON text. Raises SalsaError."""
    if isinstance(value, str) and value.lstrip().startswith("["):  # as in csv files
        value = parse_json(value, where)
    fits = isinstance(value, list) and bool(value) and all(isinstance(message, dict) for message in value)
    columns = isinstance(value, list) and bool(value) and all(isinstance(message, list) for message in value)
    hint = "; the file seems to hold one list per column: write one object per row" if columns else ""
    require(fits, f"{where}: must be a list of {{role, content}} messages, not {describe(value)}{hint}")
    return [_message(message, where) for message in value]


def untrained_turns(value: Messages, where: str) -> list[int]:
    """Positions of assistant messages with loss weight 0. Raises SalsaError for weights besides 0 and 1."""
    found = []
    for position, message in enumerate(value):
        for key in WEIGHT_KEYS:
            weight = message.get(key)
            require(
                weight in (None, 0, 1),
                f"{where}: {key} must be 0 or 1, not {short(weight)}; other loss weights are not supported",
            )
            if weight == 0 and role_of(message, where) == "assistant":
                found.append(position)
    return list(dict.fromkeys(found))


def role_of(message: dict[str, Any], where: str) -> str:
    """A message's role, converted by ROLES. Raises SalsaError, also for an unknown role in `from`."""
    key = "from" if "from" in message and "role" not in message else "role"
    given = message.get(key)
    require(
        key in message, f"{where}: a message must have role and content, or from and value, but is {describe(message)}"
    )
    require(isinstance(given, str), f"{where}: {key} must be text, not {describe(given)}")
    known = ROLES.get(str(given).lower())
    require(
        known is not None or key == "role",
        f"{where}: unknown role {short(given)}; use human, gpt, system, function_call, observation or tool",
    )
    return str(given) if known is None else known


def _message(message: dict[str, Any], where: str) -> dict[str, Any]:
    role = role_of(message, where)
    content = message["value"] if "value" in message and "content" not in message else message.get("content")
    more = {key: value for key, value in message.items() if key not in CONVERTED_KEYS and value not in (None, [], {})}
    calls = parse_tool_calls(more.pop("tool_calls", None), where)
    if message.get("function_call") is not None:  # OpenAI's older API
        calls += parse_tool_calls([message["function_call"]], where)
    if str(message.get("role", message.get("from"))).lower() in CALL_ROLES:
        calls, content = parse_tool_calls(content, where), ""
    if isinstance(content, list) and content and all(isinstance(part, dict) and "type" in part for part in content):
        content, thoughts, called = _parts(content, where)
        calls += called
        more |= {"reasoning_content": thoughts} if thoughts else {}
    if content is None and calls:
        content = ""
    require(isinstance(content, str), f"{where}: the content of role {role} must be text, not {describe(content)}")
    return {"role": role, "content": content, **more, **({"tool_calls": calls} if calls else {})}


def _parts(content: list[dict[str, Any]], where: str) -> tuple[str, str, Messages]:
    """Text, reasoning and tool calls of typed content parts. Raises SalsaError for images and the like."""
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
            f"{where}: content has a part of type {short(kind)}, but only text is supported",
        )
        require(isinstance(value, str), f"{where}: the content part {short(part)} has no text")
        if kind == "text":
            text += str(value)
        else:
            thoughts += str(value)
    return text, thoughts, calls


def parse_tool_calls(value: Any, where: str) -> Messages:
    """Tool calls as [{type, function: {name, arguments}}], the form of Transformers' templates.

    Also accepts JSON text, a single call without a list, and calls without `function`. Raises SalsaError.
    """
    found = []
    for call in _as_list(parse_json(value, where), where, "tool calls"):
        inner: Any = call.get("function", call) if isinstance(call, dict) else None
        fits = isinstance(inner, dict) and isinstance(inner.get("name"), str)
        require(fits, f"{where}: a tool call must be {{name, arguments}}, not {short(call)}")
        arguments = inner.get("arguments", {})
        arguments = parse_json("{}" if arguments == "" else arguments, where)
        require(
            isinstance(arguments, dict),
            f"{where}: the arguments of {inner['name']} must be an object, not {short(arguments)}",
        )
        outer = call if inner is not call else {}
        found.append({"type": "function", **outer, "function": {**inner, "arguments": arguments}})
    return found


def parse_tools(value: Any, where: str) -> Messages | None:
    """A row's `tools` as [{type: function, function: {name, …}}], or None. Raises SalsaError."""
    if isinstance(value, str):
        value = parse_json(value, where) if value.strip() else None
    found = []
    for tool in _as_list(value, where, "descriptions of functions"):
        require(
            isinstance(tool, dict), f"{where}: a tool must be the description of a function (JSON), not {short(tool)}"
        )
        found.append({"type": "function", "function": tool} if "name" in tool and "function" not in tool else tool)
    return found or None


def _as_list(value: Any, where: str, what: str) -> list[Any]:
    found = [value] if isinstance(value, dict) else [] if value is None else value
    require(isinstance(found, list), f"{where}: must be a list of {what}, not {short(value)}")
    return list(found)


def parse_json(value: Any, where: str) -> Any:
    """Parse JSON text. Return other values unchanged. Raises a SalsaError that names `where`."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        raise SalsaError(f"{where}: {value[:60]!r} is not valid JSON ({error})") from error


def is_hh(text: Any) -> bool:
    r"""Whether text is a conversation in the form of Anthropic's HH-RLHF: "\n\nHuman: …\n\nAssistant: …"."""
    return isinstance(text, str) and bool(re.match(r"\s*Human:", text)) and "\n\nAssistant:" in text


def hh_messages(text: str) -> Messages:
    """Messages of HH-RLHF's text, with stripped content and without an empty last assistant turn."""
    pieces = re.split(r"(?:\A\s*|\n\n)(Human|Assistant):", text)[1:]
    found = [
        {"role": ROLES[name.lower()], "content": turn.strip()}
        for name, turn in zip(pieces[::2], pieces[1::2], strict=True)
    ]
    return found if found[-1]["content"] or found[-1]["role"] == "user" else found[:-1]
