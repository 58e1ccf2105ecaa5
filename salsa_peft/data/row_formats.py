"""Row formats: for each kind of data, a table of columns and the functions that read them.

Text columns, ShareGPT, Alpaca, Dolly, HH-RLHF and TRL's dataset types are read as in TRL, alignment-handbook and
LLaMA-Factory. To add a format, add a function and an entry of its table. docs/data.md lists the formats for users.
Imports no torch.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

from salsa_peft.data.message_formats import Messages, is_hh, parse_json, parse_messages, untrained_turns
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

PAIR_COLUMNS = tuple((f"chosen{ending}", f"rejected{ending}") for ending in ("", "_messages", "_response"))
ENDS_WITH_ANSWER = "must not end with an assistant turn, because the policy answers next; remove that turn"


class Prompt(NamedTuple):
    """A prompt: the messages up to an answer."""

    messages: Messages
    column: str
    """Column that the prompt is read from."""
    turns: tuple[str, ...] = ()
    """Texts of all user turns, if the column has several turns without answers between them."""

    @property
    def texts(self) -> tuple[str, ...]:
        """Texts of the user turns to answer, in order. `messages` ends with the first of these turns."""
        return self.turns or (self.messages[-1]["content"],)


class Demonstration(NamedTuple):
    """A chat for supervised fine-tuning."""

    messages: Messages
    column: str
    """Column with the answers."""
    skipped: tuple[int, ...] = ()
    """Positions of the assistant turns without loss."""


# Demonstrations


def _whole_chat(row: Row, names: Sequence[str], where: str) -> Demonstration:
    """A demonstration in one column that holds the whole chat."""
    name = names[0]
    raw = raw_chat(row, name, where)
    messages = parse_messages(raw, f"{where}, {name}")
    found = with_system(row, messages, where)
    skipped = [position + len(found) - len(messages) for position in untrained_turns(raw, f"{where}, {name}")]
    return Demonstration(found, name, tuple(skipped))


def _question_and_answer(row: Row, names: Sequence[str], where: str) -> Demonstration:
    """A demonstration in two columns. Answers in `history` have loss; those in `prompt` do not, as in TRL."""
    question, name = names
    prompt = with_system(row, read_question(row, question, where), where)
    reply = read_answer(row, name, where)
    if is_hh(row[question]) and isinstance(row[name], str):
        reply = _stripped(reply)
    messages = append_answer(prompt, reply)
    before = len(prompt) if question == "prompt" and messages[: len(prompt)] == prompt else 0
    earlier = [position for position in range(before) if messages[position]["role"] == "assistant"]
    return Demonstration(messages, name, tuple(earlier))


def _stripped(messages: Messages) -> Messages:
    return [{**turn, "content": turn["content"].strip()} for turn in messages]


DEMONSTRATIONS: dict[tuple[str, ...], Callable[[Row, Sequence[str], str], Demonstration]] = {
    ("messages",): _whole_chat,
    ("conversations",): _whole_chat,
    ("conversation",): _whole_chat,
    ("prompt", "completion"): _question_and_answer,
    ("prompt", "response"): _question_and_answer,
    ("instruction", "output"): _question_and_answer,
    ("instruction", "response"): _question_and_answer,
    ("question", "answer"): _question_and_answer,
    ("question", "response"): _question_and_answer,
    ("query", "response"): _question_and_answer,
}
"""Columns → function that reads them. The first entry whose columns a row has is used."""


def demonstration(row: Row, where: str) -> Demonstration:
    """The chat of a row. Raises a SalsaError that names `where` and the column."""
    for names, read in DEMONSTRATIONS.items():
        if has_columns(row, *names):
            return read(row, names, where)
    hint = ""
    if has_columns(row, "text"):
        hint = "; the loss needs to know which part is the assistant's, and `text` alone does not show it"
    elif has_columns(row, "chosen", "rejected"):
        hint = "; rows with chosen and rejected belong to data.preferences"
    missed = dict.fromkeys(name for names in DEMONSTRATIONS for name in names)
    raise missing_columns(row, EXPECTED_COLUMNS["demonstrations"] + hint, where, list(missed))


def is_undesirable(row: Row) -> bool:
    """Whether KTO's `label` marks a row's answer as undesirable, so that the row is no demonstration."""
    return row.get("label") is False or row.get("label") in ("False", "false")


# Preferences


def pair_columns(row: Row) -> tuple[str, str]:
    """Names of the columns with the chosen and the rejected answer."""
    return next((pair for pair in PAIR_COLUMNS if has_columns(row, *pair)), PAIR_COLUMNS[0])


PROMPT_COLUMNS = ("prompt", "conversations", "conversation", "instruction", "question", "query")
"""Columns that may hold the prompt of a pair; the first one that a row has is used."""


def lacks_prompt(row: Row) -> bool:
    """Whether chosen is text that contains no prompt, in a row without a prompt column."""
    chosen = parse_json_messages(row.get(pair_columns(row)[0]))
    return isinstance(chosen, str) and not is_hh(chosen) and not set(PROMPT_COLUMNS) & set(row)


def _prompt_of_pair(row: Row, where: str) -> Prompt | None:
    """The prompt in a column of its own, or None if a pair has no such column."""
    name = first_column(row, PROMPT_COLUMNS)
    if name is None:
        return None
    read = read_chat if name.startswith("conversation") else read_question
    return Prompt(read(row, name, where), name)


class Pair(NamedTuple):
    """A preference: two whole chats with the same prompt."""

    chosen: Messages
    rejected: Messages
    names: tuple[str, str]
    """Columns of chosen and rejected."""
    prompt: Prompt | None
    """The prompt in the row's prompt column; None if the row has no such column."""
    prompt_removed: bool = False
    """Whether both texts started with the prompt's text, which was removed from them."""


def preference(row: Row, where: str) -> Pair:
    """Read a row as two chats that both contain the prompt. Raises SalsaError."""
    names = pair_columns(row)
    missing = [name for name in names if row.get(name) is None]
    if missing:
        label = "; rows with a `label` are KTO data without pairs" if isinstance(row.get("label"), bool) else ""
        raise missing_columns(row, " and ".join(missing) + label, where, missing)
    prompt = _prompt_of_pair(row, where)
    texts, text = [row[name] for name in names], None if prompt is None else row[prompt.column]
    removed = isinstance(text, str) and bool(text) and not any(map(is_hh, texts))
    removed = removed and all(isinstance(answer, str) and answer.startswith(str(text)) for answer in texts)
    if removed:
        row = {**row, **{name: row[name][len(str(text)) :].lstrip() for name in names}}
    chats = []
    for name in names:
        answer = read_answer(row, name, where)
        if is_hh(text) and isinstance(row[name], str):
            answer = _stripped(answer)
        if answer[0]["role"] not in ("user", "system") and not any(turn["role"] == "user" for turn in answer):
            if prompt is None:
                raise missing_columns(row, "prompt" + NO_PROMPT, where, ["prompt"])
            ends = prompt.messages[-1]["role"] == "assistant"
            require(not ends, f"{where}, {prompt.column}: {ENDS_WITH_ANSWER}")
        chats.append(with_system(row, answer if prompt is None else append_answer(prompt.messages, answer), where))
    return Pair(chats[0], chats[1], names, prompt, removed)


NO_PROMPT = " (or question, instruction or conversations), because the answers do not contain the prompt"


def has_unrelated_prompt(pair: Pair) -> bool:
    """Whether a pair of whole chats has a prompt column that is no part of chosen and so is not used."""
    if pair.prompt is None:
        return False
    contents = [turn["content"].strip() for turn in pair.chosen]
    prompt = [turn["content"].strip() for turn in pair.prompt.messages if turn["role"] in ("user", "system")]
    return any(content not in contents for content in prompt)


# Prompts


def _one_prompt(row: Row, name: str, where: str) -> Prompt:
    """A prompt as messages or text; the last answer of a whole chat is cut off."""
    messages = read_question(row, name, where) if name not in CHAT_COLUMNS else read_chat(row, name, where)
    messages = with_system(row, messages, where)
    last = list(itertools.takewhile(lambda turn: turn["role"] not in ("user", "tool"), reversed(messages)))
    if name in CHAT_COLUMNS and any(turn["role"] == "assistant" for turn in last):  # a last system turn alone stays
        messages = messages[: -len(last)]
    require(any(turn["role"] == "user" for turn in messages), f"{where}, {name}: has no user turn; add one")
    return Prompt(messages, name)


def _several_turns(row: Row, name: str, where: str) -> Prompt:
    """User turns without answers, as texts (MT-Bench) or {content} (arena-hard-auto)."""
    value = row[name]
    if isinstance(value, str) and value.lstrip().startswith("["):  # as in csv files
        value = parse_json(value, f"{where}, {name}")
    require(
        isinstance(value, list) and bool(value), f"{where}, {name}: must be a list of user turns, not {describe(value)}"
    )
    turns = []
    for turn in value:
        text = turn.get("content") if isinstance(turn, dict) else turn
        require(isinstance(text, str), f"{where}, {name}: a turn must be text, not {describe(text)}")
        turns.append(str(text))
    return Prompt(with_system(row, [{"role": "user", "content": turns[0]}], where), name, tuple(turns))


def _common_prompt(row: Row, name: str, where: str) -> Prompt:
    """The turns that chosen and rejected share, up to the last user or tool turn among them."""
    pair = preference(row, where)
    equal = itertools.takewhile(lambda turns: turns[0] == turns[1], zip(pair.chosen, pair.rejected, strict=False))
    messages = [turn for turn, _ in equal]
    while messages and messages[-1]["role"] not in ("user", "tool"):
        messages.pop()
    require(
        bool(messages),
        f"{where}, {name}: chosen and rejected do not begin with the same user turn; begin both with the same prompt",
    )
    return Prompt(messages, name)


CHAT_COLUMNS = ("messages", "conversations", "conversation")
"""Columns with whole chats. To get a prompt, the last answer is cut off."""
PROMPTS: dict[str, Callable[[Row, str, str], Prompt]] = {
    "prompt": _one_prompt,
    "messages": _one_prompt,
    "turns": _several_turns,
    "conversations": _one_prompt,
    "conversation": _one_prompt,
    "instruction": _one_prompt,
    "question": _one_prompt,
    "query": _one_prompt,
    "chosen": _common_prompt,
    "chosen_messages": _common_prompt,
}
"""Column → function that reads it. The first column that the row has is used."""


def prompt(row: Row, where: str) -> Prompt:
    """The prompt of a row. Raises a SalsaError that names `where` and the column."""
    name = first_column(row, list(PROMPTS))
    if name is None:
        raise missing_columns(row, EXPECTED_COLUMNS["prompts"], where, list(PROMPTS))
    value = row[name]
    if name == "prompt" and isinstance(value, list) and value and all(isinstance(turn, str) for turn in value):
        return _several_turns(row, name, where)
    return PROMPTS[name](row, name, where)


def prompt_lacks_system_turn(row: Row, prompt: Prompt) -> bool:
    """Whether the row's chats start with a system turn that its `prompt` column lacks."""
    if prompt.column != "prompt" or prompt.messages[0]["role"] == "system":
        return False
    name = first_column(row, ("messages", "chosen"))
    first = row[name][0] if name is not None and isinstance(row[name], list) and row[name] else None
    return isinstance(first, dict) and first.get("role", first.get("from")) == "system"


EXPECTED_COLUMNS = {
    "demonstrations": "messages, conversations, prompt and completion or instruction and output",
    "preferences": "chosen and rejected",
    "prompts": "prompt, messages, conversations, instruction, question or turns",
}
"""Kind of data → its most common columns, for messages; the tables above have all columns."""


def has_columns_of(kind: str, columns: set[str]) -> bool:
    """Whether rows with these columns can be read as data of a kind."""
    if kind == "preferences":
        return any(set(pair) <= columns for pair in PAIR_COLUMNS)
    if kind == "prompts":
        return bool(set(PROMPTS) & columns)
    return any(set(names) <= columns for names in DEMONSTRATIONS)
