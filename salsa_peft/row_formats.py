"""Rows as people have them → ours: a table of the shapes for each kind of data. A new shape is one function and one line.

Text columns, ShareGPT, Alpaca, Dolly, HH-RLHF and TRL's own types, as TRL, alignment-handbook and LLaMA-Factory read them. What is read:
README, "Data". Which words a row's parts have is message_formats.py's. Imports no torch.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from .errors import SalsaError, require
from .message_formats import (
    Messages,
    from_json,
    hh_messages,
    is_hh,
    parse_messages,
    tool_list,
    untrained,
)
from .messages import kind_text, one_line, short

Row = Mapping[str, Any]
INPUTS = ("input", "context")
"""What an instruction is about: Alpaca's column, Dolly's."""
SYSTEMS = ("system", "system_prompt")
PAIRS = (("chosen", "rejected"), ("chosen_messages", "rejected_messages"), ("chosen_response", "rejected_response"))
TURN_MARKS = ("<|im_start|>", "<|start_header_id|>", "<start_of_turn>", "<|user|>", "<|system|>", "[INST]")
"""How text begins that a chat template has rendered already: chatml, Llama 3 and 2, Mistral, Gemma, Zephyr, Phi."""


class Asked(NamedTuple):
    """What a row asks."""

    messages: Messages
    name: str
    """The column that it is from."""
    turns: tuple[str, ...] = ()
    """The user's texts, where the column has several turns without their answers."""


class Demonstration(NamedTuple):
    """A row as a chat."""

    messages: Messages
    name: str
    skipped: tuple[int, ...] = ()
    """Positions of the assistant's turns that are not trained on."""


def given(row: Row, *names: str) -> bool:
    """Whether the row has all of these columns, none of them null."""
    return all(row.get(name) is not None for name in names)


def one_of(row: Row, names: Sequence[str]) -> str | None:
    """The first of these columns that the row has, not null."""
    return next((name for name in names if row.get(name) is not None), None)


def absent(row: Row, expected: str, where: str, missed: Sequence[str] = ()) -> SalsaError:
    """The refusal of a row without the columns of its kind: what it has, what was expected, which are null."""
    found = f"columns {one_line(', '.join(sorted(map(str, row))))}" if row else "no columns"
    null = "".join(f"; {name} is null" for name in missed if name in row and row[name] is None)
    return SalsaError(f"{where}: found {found}, expected {expected}{null}")


# Parts of rows


def text(row: Row, name: str, where: str) -> str:
    """A column of text, which no chat template has rendered. Raises SalsaError."""
    value = row[name]
    require(isinstance(value, str), f"{where}, {name}: found {kind_text(value)}, expected text")
    begins = str(value).lstrip()
    for bos in ("<|begin_of_text|>", "<bos>", "<s>"):
        begins = begins.removeprefix(bos).lstrip()
    require(
        not begins.startswith(TURN_MARKS),
        f"{where}, {name}: found text that a chat template has rendered already ({short(value)}), expected messages, or the turn's text alone:"
        " the recipe's template would be put around it",
    )
    return str(value)


def instruction(row: Row, name: str, where: str) -> Messages:
    r"""A question of one or two columns, instruction and input joined by "\n" as LLaMA-Factory does; HH-RLHF's text → its turns.

    LLaMA-Factory's `history`, pairs of texts, stands before it.
    """
    value = _json_messages(row[name])
    if is_hh(value):
        return hh_messages(value)
    if isinstance(value, str):
        about = one_of(row, INPUTS) if name == "instruction" else None
        parts = [text(row, name, where), *([text(row, about, where)] if about else [])]
        asked = [{"role": "user", "content": "\n".join(part for part in parts if part or part is parts[0])}]
        return _history(row, where) + asked
    return _messages(value, f"{where}, {name}")


def _messages(value: Any, where: str) -> Messages:
    """One message, or a list of them. Raises SalsaError."""
    fits = isinstance(value, list) or (isinstance(value, dict) and bool({"role", "from"} & set(value)))
    require(fits, f"{where}: found {kind_text(value)}, expected text or messages")
    return parse_messages([value] if isinstance(value, dict) else value, where)


def _history(row: Row, where: str) -> Messages:
    found, pairs = Messages(), row.get("history") or []
    for pair in from_json(pairs, f"{where}, history") if isinstance(pairs, str) else pairs:
        fits = isinstance(pair, list) and len(pair) == 2 and all(isinstance(one, str) for one in pair)
        require(fits, f"{where}, history: found {short(pair)}, expected pairs of a question and its answer")
        found += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return found


def _json_messages(value: Any) -> Any:
    """Messages where text is their JSON, as csv files have them; else the value."""
    if isinstance(value, str) and value.lstrip().startswith("[{"):
        with contextlib.suppress(ValueError, RecursionError):  # text may well begin so
            found = json.loads(value)
            if all(isinstance(one, dict) and {"role", "from"} & set(one) for one in found):
                return found
    return value


def raw_conversation(row: Row, name: str, where: str) -> Any:
    """The messages of a whole chat, as they are: ShareGPT's list, Capybara's pairs of {input, output}, LIMA's list of texts."""
    value = row[name]
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = from_json(value, f"{where}, {name}")
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


def conversation(row: Row, name: str, where: str) -> Messages:
    """A whole chat."""
    return parse_messages(raw_conversation(row, name, where), f"{where}, {name}")


def answer(row: Row, name: str, where: str) -> Messages:
    """One answer, or the chat that ends with it: text, one message, or messages."""
    value = _json_messages(row[name])
    if is_hh(value):
        return hh_messages(value)
    if isinstance(value, str):
        return [{"role": "assistant", "content": text(row, name, where)}]
    return _messages(value, f"{where}, {name}")


def with_system(row: Row, messages: Messages, where: str) -> Messages:
    """The messages after the row's `system` column. Raises SalsaError where they begin with another system turn."""
    name = one_of(row, SYSTEMS)
    if name is None or not (words := text(row, name, where)).strip():
        return messages
    if messages and messages[0]["role"] == "system":
        same = messages[0]["content"].strip() == words.strip()
        require(
            same,
            f"{where}, {name}: found another text than the first turn's system text, expected one of them; take one out",
        )
        return messages
    return [{"role": "system", "content": words}, *messages]


def after(asked: Messages, answered: Messages) -> Messages:
    """The answer after what was asked, which stands before it once: an answer that holds its prompt already does not get it again."""
    systems = asked[:1] if asked and asked[0]["role"] == "system" else []
    rest = asked[len(systems) :]
    if answered[0]["role"] not in ("user", "system"):
        return asked + answered
    own = answered[0]["role"] == "system"
    return answered if own or (rest and answered[: len(rest)] != rest) else systems + answered


# Demonstrations


def _whole(row: Row, names: Sequence[str], where: str) -> Demonstration:
    """A column that holds the whole chat."""
    name = names[0]
    raw = raw_conversation(row, name, where)
    messages = parse_messages(raw, f"{where}, {name}")
    found = with_system(row, messages, where)
    skipped = [position + len(found) - len(messages) for position in untrained(raw, f"{where}, {name}")]
    return Demonstration(found, name, tuple(skipped))


def _question_and_answer(row: Row, names: Sequence[str], where: str) -> Demonstration:
    """A question and its answer in columns of their own. Answers inside `prompt` are not trained on (TRL), those of `history` are."""
    question, name = names
    asked = with_system(row, instruction(row, question, where), where)
    given_answer = answer(row, name, where)
    if is_hh(row[question]) and isinstance(row[name], str):
        given_answer = [{**turn, "content": turn["content"].strip()} for turn in given_answer]
    messages = after(asked, given_answer)
    before = len(asked) if question == "prompt" and messages[: len(asked)] == asked else 0
    earlier = [position for position in range(before) if messages[position]["role"] == "assistant"]
    return Demonstration(messages, name, tuple(earlier))


DEMONSTRATIONS: dict[tuple[str, ...], Callable[[Row, Sequence[str], str], Demonstration]] = {
    ("messages",): _whole,
    ("conversations",): _whole,
    ("conversation",): _whole,
    ("prompt", "completion"): _question_and_answer,
    ("prompt", "response"): _question_and_answer,
    ("instruction", "output"): _question_and_answer,
    ("instruction", "response"): _question_and_answer,
    ("question", "answer"): _question_and_answer,
    ("question", "response"): _question_and_answer,
    ("query", "response"): _question_and_answer,
}
"""Columns → what reads them; the first that fits."""


def demonstration(row: Row, where: str) -> Demonstration:
    """A row as a chat. Raises SalsaError that names `where` and the column."""
    for names, read in DEMONSTRATIONS.items():
        if given(row, *names):
            return read(row, names, where)
    hint = ""
    if given(row, "text"):
        hint = "; `text` alone does not say which of it is the assistant's, whom the loss is on"
    elif given(row, "chosen", "rejected"):
        hint = "; rows of chosen and rejected are for data.preferences"
    missed = dict.fromkeys(name for names in DEMONSTRATIONS for name in names)
    raise absent(row, EXPECTED["demonstrations"] + hint, where, list(missed))


def undesirable(row: Row) -> bool:
    """Whether a row is an answer that KTO's `label` calls undesirable, which is nothing to learn by heart."""
    return row.get("label") is False or row.get("label") in ("False", "false")


# Preferences


def pair_names(row: Row) -> tuple[str, str]:
    """The columns of the two answers."""
    return next((pair for pair in PAIRS if given(row, *pair)), PAIRS[0])


ASKING = ("prompt", "conversations", "conversation", "instruction", "question", "query")
"""Columns of what a pair's answers answer."""


def lacks_prompt(row: Row) -> bool:
    """Whether chosen is text without a prompt in it or beside it."""
    chosen = _json_messages(row.get(pair_names(row)[0]))
    return isinstance(chosen, str) and not is_hh(chosen) and not set(ASKING) & set(row)


def _prompt_of_pair(row: Row, where: str) -> Asked | None:
    """The prompt column of a pair, where it has one."""
    name = one_of(row, ASKING)
    if name is None:
        return None
    read = conversation if name.startswith("conversation") else instruction
    return Asked(read(row, name, where), name)


class Pair(NamedTuple):
    """A row as two chats."""

    chosen: Messages
    rejected: Messages
    names: tuple[str, str]
    prompt: Asked | None
    taken_off: bool = False
    """Whether both texts began with the prompt's text, which was taken off them."""


def preference(row: Row, where: str) -> Pair:
    """A row as two chats that each hold the prompt. Raises SalsaError that names `where` and the column."""
    names = pair_names(row)
    missing = [name for name in names if row.get(name) is None]
    if missing:
        label = "; rows with a `label` are unpaired (KTO's)" if isinstance(row.get("label"), bool) else ""
        raise absent(row, " and ".join(missing) + label, where, missing)
    asked = _prompt_of_pair(row, where)
    texts = [row[name] for name in names]
    taken_off = False
    if asked is not None and isinstance(row[asked.name], str) and not any(map(is_hh, texts)):
        before = row[asked.name]
        taken_off = bool(before) and all(isinstance(one, str) and one.startswith(before) for one in texts)
        if taken_off:
            row = {**row, **{name: row[name][len(before) :].lstrip() for name in names}}
    found = []
    for name in names:
        said = answer(row, name, where)
        if asked is not None and is_hh(row[asked.name]) and isinstance(row[name], str):
            said = [{**turn, "content": turn["content"].strip()} for turn in said]
        alone = said[0]["role"] not in ("user", "system") and not any(turn["role"] == "user" for turn in said)
        if alone and asked is None:
            raise absent(row, "prompt" + NO_PROMPT, where, ["prompt"])
        if alone and asked is not None:
            require(
                asked.messages[-1]["role"] != "assistant",
                f"{where}, {asked.name}: found a last turn of assistant, expected user: the policy answers next",
            )
        found.append(with_system(row, said if asked is None else after(asked.messages, said), where))
    return Pair(found[0], found[1], names, asked, taken_off)


NO_PROMPT = " (or question, instruction or conversations) beside answers that don't hold it"


def foreign_prompt(pair: Pair) -> bool:
    """Whether the `prompt` of a pair of whole chats is no part of them, so that it is not read."""
    if pair.prompt is None:
        return False
    words = [turn["content"].strip() for turn in pair.chosen]
    asked = [turn["content"].strip() for turn in pair.prompt.messages if turn["role"] in ("user", "system")]
    return any(turn not in words for turn in asked)


# Prompts


def _asked(row: Row, name: str, where: str) -> Asked:
    """Messages or text that end before the assistant speaks."""
    messages = instruction(row, name, where) if name not in WHOLE else conversation(row, name, where)
    messages = with_system(row, messages, where)
    behind = list(itertools.takewhile(lambda turn: turn["role"] not in ("user", "tool"), reversed(messages)))
    if name in WHOLE and any(
        turn["role"] == "assistant" for turn in behind
    ):  # a system turn that nobody has answered stays
        messages = messages[: -len(behind)]
    require(any(turn["role"] == "user" for turn in messages), f"{where}, {name}: found no user turn, expected one")
    return Asked(messages, name)


def _several(row: Row, name: str, where: str) -> Asked:
    """The user's turns without answers: MT-Bench's texts, arena-hard-auto's {content}."""
    value = row[name]
    require(
        isinstance(value, list) and bool(value),
        f"{where}, {name}: found {kind_text(value)}, expected a list of user's turns",
    )
    turns = []
    for turn in value:
        said = turn.get("content") if isinstance(turn, dict) else turn
        require(isinstance(said, str), f"{where}, {name}: found {kind_text(said)}, expected text")
        turns.append(str(said))
    return Asked(with_system(row, [{"role": "user", "content": turns[0]}], where), name, tuple(turns))


def _shared(row: Row, name: str, where: str) -> Asked:
    """What chosen and rejected hold both, up to the turn where they part."""
    pair = preference(row, where)
    messages = [a for a, _ in _while_equal(pair.chosen, pair.rejected)]
    while messages and messages[-1]["role"] not in ("user", "tool"):
        messages.pop()
    require(bool(messages), f"{where}, {name}: found no user turn that chosen and rejected share, expected one")
    return Asked(messages, name)


def _while_equal(one: Messages, other: Messages) -> list[tuple[Any, Any]]:
    found = []
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        found.append((a, b))
    return found


WHOLE = ("messages", "conversations", "conversation")
"""Columns of whole chats, whose last answer is cut off."""
PROMPTS: dict[str, Callable[[Row, str, str], Asked]] = {
    "prompt": _asked,
    "messages": _asked,
    "turns": _several,
    "conversations": _asked,
    "conversation": _asked,
    "instruction": _asked,
    "question": _asked,
    "query": _asked,
    "chosen": _shared,
    "chosen_messages": _shared,
}
"""Column → what reads it; the first that the row has."""


def prompt(row: Row, where: str) -> Asked:
    """What a row asks. Raises SalsaError that names `where` and the column."""
    name = one_of(row, list(PROMPTS))
    if name is None:
        raise absent(row, EXPECTED["prompts"], where, list(PROMPTS))
    value = row[name]
    if name == "prompt" and isinstance(value, list) and value and all(isinstance(turn, str) for turn in value):
        return _several(row, name, where)
    return PROMPTS[name](row, name, where)


def more_system(row: Row, asked: Asked) -> bool:
    """Whether the row's chats begin with a system turn that its `prompt` column lacks."""
    if asked.name != "prompt" or asked.messages[0]["role"] == "system":
        return False
    name = one_of(row, ("messages", "chosen"))
    first = row[name][0] if name is not None and isinstance(row[name], list) and row[name] else None
    return isinstance(first, dict) and first.get("role", first.get("from")) == "system"


# What goes with every kind


def _older_tools(row: Row) -> bool:
    """Whether a row has OpenAI's older column `functions`, also as JSON text, and no other data of that name."""
    value = row.get("functions")
    if isinstance(value, str) and value.lstrip().startswith("[{"):
        value = from_json(value, "functions")
    return isinstance(value, list) and bool(value) and all(isinstance(one, dict) and "name" in one for one in value)


def extras(row: Row, where: str) -> dict[str, Any]:
    """What a chat template is given beside the messages: the row's tools (OpenAI's older `functions` too), and TRL's
    chat_template_kwargs."""
    found: dict[str, Any] = {}
    name = "tools" if row.get("tools") is not None or not _older_tools(row) else "functions"
    if row.get(name) is not None and (tools := tool_list(row[name], f"{where}, {name}")):
        found["tools"] = tools
    options = row.get("chat_template_kwargs")
    if isinstance(options, str) and options.strip():
        options = from_json(options, f"{where}, chat_template_kwargs")
    require(
        options is None or options == "" or isinstance(options, dict),
        f"{where}, chat_template_kwargs: found {short(options)}, expected options of the template by name",
    )
    return found | ({"chat_template_kwargs": options} if options else {})


def _listed(shapes: Sequence[Sequence[str]]) -> str:
    return ", ".join(" and ".join(names) for names in shapes[:-1]) + " or " + " and ".join(shapes[-1])


EXPECTED = {
    "demonstrations": _listed([("messages",), ("conversations",), ("prompt", "completion"), ("instruction", "output")]),
    "preferences": "chosen and rejected",
    "prompts": _listed([("prompt",), ("messages",), ("conversations",), ("instruction",), ("question",), ("turns",)]),
}
"""Kind → the columns that a refusal names; the tables have more."""


def fits(kind: str, columns: set[str]) -> bool:
    """Whether rows with these columns are read as data of a kind."""
    if kind == "preferences":
        return any(set(pair) <= columns for pair in PAIRS)
    if kind == "prompts":
        return bool(set(PROMPTS) & columns)
    return any(set(names) <= columns for names in DEMONSTRATIONS)
