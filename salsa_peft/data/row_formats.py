"""Rows as people have them → ours: a table of the shapes for each kind of data. A new shape is one function and one line.

Text columns, ShareGPT, Alpaca, Dolly, HH-RLHF and TRL's own types, as TRL, alignment-handbook and LLaMA-Factory read them. What is read:
README, "Data". Which words a row's parts have is data/message_formats.py's. Imports no torch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from salsa_peft.data.message_formats import Messages, is_hh, parse_messages, untrained_turns
from salsa_peft.data.row_parts import (
    Row,
    append_answer,
    first_column,
    has_columns,
    missing_columns,
    parse_json_messages,
    raw_chat,
    read_answer,
    read_chat,
    read_question,
    with_system,
)
from salsa_peft.utils.errors import require
from salsa_peft.utils.messages import describe

PAIR_COLUMNS = (
    ("chosen", "rejected"),
    ("chosen_messages", "rejected_messages"),
    ("chosen_response", "rejected_response"),
)


class Prompt(NamedTuple):
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


# Demonstrations


def _whole(row: Row, names: Sequence[str], where: str) -> Demonstration:
    """A column that holds the whole chat."""
    name = names[0]
    raw = raw_chat(row, name, where)
    messages = parse_messages(raw, f"{where}, {name}")
    found = with_system(row, messages, where)
    skipped = [position + len(found) - len(messages) for position in untrained_turns(raw, f"{where}, {name}")]
    return Demonstration(found, name, tuple(skipped))


def _question_and_answer(row: Row, names: Sequence[str], where: str) -> Demonstration:
    """A question and its answer in columns of their own. Answers inside `prompt` are not trained on (TRL), those of `history` are."""
    question, name = names
    asked = with_system(row, read_question(row, question, where), where)
    given_answer = read_answer(row, name, where)
    if is_hh(row[question]) and isinstance(row[name], str):
        given_answer = [{**turn, "content": turn["content"].strip()} for turn in given_answer]
    messages = append_answer(asked, given_answer)
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
        if has_columns(row, *names):
            return read(row, names, where)
    hint = ""
    if has_columns(row, "text"):
        hint = "; `text` alone does not say which of it is the assistant's, whom the loss is on"
    elif has_columns(row, "chosen", "rejected"):
        hint = "; rows of chosen and rejected are for data.preferences"
    missed = dict.fromkeys(name for names in DEMONSTRATIONS for name in names)
    raise missing_columns(row, EXPECTED_COLUMNS["demonstrations"] + hint, where, list(missed))


def is_undesirable(row: Row) -> bool:
    """Whether a row is an answer that KTO's `label` calls undesirable, which is nothing to learn by heart."""
    return row.get("label") is False or row.get("label") in ("False", "false")


# Preferences


def pair_columns(row: Row) -> tuple[str, str]:
    """The columns of the two answers."""
    return next((pair for pair in PAIR_COLUMNS if has_columns(row, *pair)), PAIR_COLUMNS[0])


PROMPT_COLUMNS = ("prompt", "conversations", "conversation", "instruction", "question", "query")
"""Columns of what a pair's answers answer."""


def lacks_prompt(row: Row) -> bool:
    """Whether chosen is text without a prompt in it or beside it."""
    chosen = parse_json_messages(row.get(pair_columns(row)[0]))
    return isinstance(chosen, str) and not is_hh(chosen) and not set(PROMPT_COLUMNS) & set(row)


def _prompt_of_pair(row: Row, where: str) -> Prompt | None:
    """The prompt column of a pair, where it has one."""
    name = first_column(row, PROMPT_COLUMNS)
    if name is None:
        return None
    read = read_chat if name.startswith("conversation") else read_question
    return Prompt(read(row, name, where), name)


class Pair(NamedTuple):
    """A row as two chats."""

    chosen: Messages
    rejected: Messages
    names: tuple[str, str]
    prompt: Prompt | None
    taken_off: bool = False
    """Whether both texts began with the prompt's text, which was taken off them."""


def preference(row: Row, where: str) -> Pair:
    """A row as two chats that each hold the prompt. Raises SalsaError that names `where` and the column."""
    names = pair_columns(row)
    missing = [name for name in names if row.get(name) is None]
    if missing:
        label = "; rows with a `label` are unpaired (KTO's)" if isinstance(row.get("label"), bool) else ""
        raise missing_columns(row, " and ".join(missing) + label, where, missing)
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
        said = read_answer(row, name, where)
        if asked is not None and is_hh(row[asked.name]) and isinstance(row[name], str):
            said = [{**turn, "content": turn["content"].strip()} for turn in said]
        alone = said[0]["role"] not in ("user", "system") and not any(turn["role"] == "user" for turn in said)
        if alone and asked is None:
            raise missing_columns(row, "prompt" + NO_PROMPT, where, ["prompt"])
        if alone and asked is not None:
            require(
                asked.messages[-1]["role"] != "assistant",
                f"{where}, {asked.name}: found a last turn of assistant, expected user: the policy answers next",
            )
        found.append(with_system(row, said if asked is None else append_answer(asked.messages, said), where))
    return Pair(found[0], found[1], names, asked, taken_off)


NO_PROMPT = " (or question, instruction or conversations) beside answers that don't hold it"


def has_unrelated_prompt(pair: Pair) -> bool:
    """Whether the `prompt` of a pair of whole chats is no part of them, so that it is not read."""
    if pair.prompt is None:
        return False
    words = [turn["content"].strip() for turn in pair.chosen]
    asked = [turn["content"].strip() for turn in pair.prompt.messages if turn["role"] in ("user", "system")]
    return any(turn not in words for turn in asked)


# Prompts


def _asked(row: Row, name: str, where: str) -> Prompt:
    """Messages or text that end before the assistant speaks."""
    messages = read_question(row, name, where) if name not in CHAT_COLUMNS else read_chat(row, name, where)
    messages = with_system(row, messages, where)
    behind = list(itertools.takewhile(lambda turn: turn["role"] not in ("user", "tool"), reversed(messages)))
    if name in CHAT_COLUMNS and any(
        turn["role"] == "assistant" for turn in behind
    ):  # a system turn that nobody has answered stays
        messages = messages[: -len(behind)]
    require(any(turn["role"] == "user" for turn in messages), f"{where}, {name}: found no user turn, expected one")
    return Prompt(messages, name)


def _several(row: Row, name: str, where: str) -> Prompt:
    """The user's turns without answers: MT-Bench's texts, arena-hard-auto's {content}."""
    value = row[name]
    require(
        isinstance(value, list) and bool(value),
        f"{where}, {name}: found {describe(value)}, expected a list of user's turns",
    )
    turns = []
    for turn in value:
        said = turn.get("content") if isinstance(turn, dict) else turn
        require(isinstance(said, str), f"{where}, {name}: found {describe(said)}, expected text")
        turns.append(str(said))
    return Prompt(with_system(row, [{"role": "user", "content": turns[0]}], where), name, tuple(turns))


def _shared(row: Row, name: str, where: str) -> Prompt:
    """What chosen and rejected hold both, up to the turn where they part."""
    pair = preference(row, where)
    messages = [a for a, _ in _while_equal(pair.chosen, pair.rejected)]
    while messages and messages[-1]["role"] not in ("user", "tool"):
        messages.pop()
    require(bool(messages), f"{where}, {name}: found no user turn that chosen and rejected share, expected one")
    return Prompt(messages, name)


def _while_equal(one: Messages, other: Messages) -> list[tuple[Any, Any]]:
    found = []
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        found.append((a, b))
    return found


CHAT_COLUMNS = ("messages", "conversations", "conversation")
"""Columns of whole chats, whose last answer is cut off."""
PROMPTS: dict[str, Callable[[Row, str, str], Prompt]] = {
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


def prompt(row: Row, where: str) -> Prompt:
    """What a row asks. Raises SalsaError that names `where` and the column."""
    name = first_column(row, list(PROMPTS))
    if name is None:
        raise missing_columns(row, EXPECTED_COLUMNS["prompts"], where, list(PROMPTS))
    value = row[name]
    if name == "prompt" and isinstance(value, list) and value and all(isinstance(turn, str) for turn in value):
        return _several(row, name, where)
    return PROMPTS[name](row, name, where)


def prompt_lacks_system_turn(row: Row, asked: Prompt) -> bool:
    """Whether the row's chats begin with a system turn that its `prompt` column lacks."""
    if asked.name != "prompt" or asked.messages[0]["role"] == "system":
        return False
    name = first_column(row, ("messages", "chosen"))
    first = row[name][0] if name is not None and isinstance(row[name], list) and row[name] else None
    return isinstance(first, dict) and first.get("role", first.get("from")) == "system"


def _listed(shapes: Sequence[Sequence[str]]) -> str:
    return ", ".join(" and ".join(names) for names in shapes[:-1]) + " or " + " and ".join(shapes[-1])


EXPECTED_COLUMNS = {
    "demonstrations": _listed([("messages",), ("conversations",), ("prompt", "completion"), ("instruction", "output")]),
    "preferences": "chosen and rejected",
    "prompts": _listed([("prompt",), ("messages",), ("conversations",), ("instruction",), ("question",), ("turns",)]),
}
"""Kind → the columns that a refusal names; the tables have more."""


def has_columns_of(kind: str, columns: set[str]) -> bool:
    """Whether rows with these columns are read as data of a kind."""
    if kind == "preferences":
        return any(set(pair) <= columns for pair in PAIR_COLUMNS)
    if kind == "prompts":
        return bool(set(PROMPTS) & columns)
    return any(set(names) <= columns for names in DEMONSTRATIONS)
