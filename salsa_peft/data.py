"""Datasets → demonstrations, preferences, prompts, in one form each: lists of messages (or text, for prompts).

A row that does not fit is refused by its number and column, never dropped in silence; what is odd and may be meant is said once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from .chat_templates import readable, text_ids
from .config import Recipe, SalsaError, Source, require
from .data_files import FILES as FILES
from .data_files import check_characters
from .data_files import load as load
from .messages import one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, str]]
TOY = {name: f"{name}.jsonl" for name in ("demonstrations", "preferences", "prompts", "held_out")}
TOY_PROMPTS = {"in": "eval_in.jsonl", "out": "eval_out.jsonl"}


def sources(recipe: Recipe, toy: Path | None) -> dict[str, Source]:
    """The training sets and the held-out demonstrations: the recipe's own, else the embedded world's in folder `toy`."""
    given = {name: getattr(recipe.data, name) for name in TOY}
    return {name: source or Source(path=str(toy / TOY[name])) for name, source in given.items() if source or toy}  # type: ignore[operator]


def evaluation_sources(recipe: Recipe, toy: Path | None) -> dict[str, Source]:
    """Name → held-out prompts: the recipe's, else the embedded world's, in and out of distribution."""
    if recipe.evaluate.prompts or toy is None:
        return dict(recipe.evaluate.prompts)
    return {name: Source(path=str(toy / file)) for name, file in TOY_PROMPTS.items()}


def check_messages(value: Any, where: str) -> Messages:
    """Messages as {role, content} of text only. Raises SalsaError that names `where`."""
    fits = isinstance(value, list) and bool(value) and all(isinstance(m, dict) for m in value)
    require(fits, f"{where}: found {str(value)[:60]!r}, expected a list of {{role, content}} messages")
    for message in value:
        for key in ("role", "content"):
            text = message.get(key)
            require(isinstance(text, str), f"{where}: found {key} {str(text)[:60]!r}, expected text")
    return [{"role": message["role"], "content": message["content"]} for message in value]


def column(row: dict[str, Any], names: Sequence[str], where: str) -> str:
    """The first of `names` that the row has. Raises SalsaError that says what it has."""
    for name in names:
        if row.get(name) is not None:
            return name
    found = f"columns {one_line(', '.join(sorted(row)))}" if row else "no columns"
    null = "".join(f"; {name} is null" for name in names if name in row)
    raise SalsaError(f"{where}: found {found}, expected {' or '.join(names)}{null}")


def note(path: str, numbers: Sequence[int], rows: int, what: str) -> None:
    """Say once what holds for the rows with these numbers."""
    if numbers:
        told = f"{path}: {len(numbers)} of {rows} rows (the first: row {min(numbers)}) {what}"
        print(told, file=sys.stderr, flush=True)


DROPPED = "have a system turn that the tokenizer's chat template drops: the model does not see it"
EMPTY_ANSWER = "have an empty answer: a model learns from it to say nothing"
EMPTY_PROMPT = "have an empty prompt"
SAME = "left out: chosen and rejected are the same, which says nothing"


def through_template(messages: Messages, tokenizer: PreTrainedTokenizerBase, where: str, **options: Any) -> Any:
    """What apply_chat_template gives. Raises SalsaError that names `where` for a tokenizer without a template, or one that refuses."""
    require(
        tokenizer.chat_template is not None,
        f"{where}: found messages, but the tokenizer has no chat template; expected text, or set one",
    )
    try:
        return tokenizer.apply_chat_template(readable(messages, tokenizer), **options)
    except TemplateError as error:
        system = any(message["role"] == "system" for message in messages)
        remedy = "; remove the system turn, or set model.chat_template to one that has such turns" if system else ""
        raise SalsaError(f"{where}: the tokenizer's chat template refuses it: {one_line(error)}{remedy}") from error


def drops(messages: Messages, tokenizer: PreTrainedTokenizerBase | None, where: str) -> bool:
    """Whether the template drops the system turns: other words in them give the same text. Raises SalsaError for what it refuses.

    Without a tokenizer False.
    """
    if tokenizer is None:
        return False
    text = through_template(messages, tokenizer, where, tokenize=False)
    given = [message["role"] == "system" and bool(message["content"].strip()) for message in messages]
    other = [
        {**message, "content": f"{message['content']} – other"} if system else message
        for message, system in zip(messages, given, strict=True)
    ]
    return any(given) and text == through_template(other, tokenizer, where, tokenize=False)


def demonstrations(source: Source, tokenizer: PreTrainedTokenizerBase | None = None) -> list[dict[str, Messages]]:
    """→ rows {messages}, each with an assistant's turn; a chat's turns after the last such turn are cut off.

    tokenizer: whose chat template each row is tried on.
    """
    rows, empty, dropped = [], [], []
    for number, row in load(source):
        where = f"{source.path}, row {number}"
        name = column(row, ["messages"], where)
        messages = check_messages(row[name], f"{where}, {name}")
        while messages and messages[-1]["role"] != "assistant":
            messages.pop()
        require(bool(messages), f"{where}, {name}: found no assistant turn, expected at least one")
        empty += [number] * any(m["role"] == "assistant" and not m["content"].strip() for m in messages)
        dropped += [number] * drops(messages, tokenizer, f"{where}, {name}")
        rows.append({"messages": messages})
    note(source.path, empty, len(rows), EMPTY_ANSWER)
    note(source.path, dropped, len(rows), DROPPED)
    return rows


def preferences(source: Source, tokenizer: PreTrainedTokenizerBase | None = None) -> list[dict[str, Messages]]:
    """→ rows {chosen, rejected}, whole chats that start with the prompt (TRL's implicit-prompt form); pairs of equals are left out, and told.

    `prompt` may be messages, or text (one user turn); it is put before answers that don't hold it already. tokenizer: whose chat
    template each row is tried on.
    """
    rows, same, empty, dropped = [], [], [], []
    loaded = load(source)
    for number, row in loaded:
        where = f"{source.path}, row {number}"
        pair = {}
        for name in ("chosen", "rejected"):
            answer = row[column(row, [name], where)]
            if isinstance(answer, str):
                answer = [{"role": "assistant", "content": answer}]
            answer = check_messages(answer, f"{where}, {name}")
            if answer[0]["role"] == "assistant":
                asked = as_messages(row[column(row, ["prompt"], where)], f"{where}, prompt")
                check_asks(asked, f"{where}, prompt")
                answer = asked + answer
            require(
                answer[-1]["role"] == "assistant",
                f"{where}, {name}: found a last turn of {answer[-1]['role']}, expected assistant",
            )
            pair[name] = answer
        if pair["chosen"] == pair["rejected"]:
            same.append(number)
            continue
        check_same_prompt(pair["chosen"], pair["rejected"], f"{where}, rejected")
        empty += [number] * (not pair["chosen"][-1]["content"].strip())
        lost = [drops(chat, tokenizer, f"{where}, {name}") for name, chat in pair.items()]
        dropped += [number] * any(lost)
        rows.append(pair)
    note(source.path, same, len(loaded), SAME)
    note(source.path, empty, len(loaded), EMPTY_ANSWER)
    note(source.path, dropped, len(loaded), DROPPED)
    require(bool(rows), f"{source.path}: found chosen and rejected the same in every row, expected pairs that differ")
    return rows


def check_asks(prompt: Messages, where: str) -> None:
    """Raise SalsaError for a prompt that ends with an answer."""
    spoken = prompt[-1]["role"] == "assistant"
    require(not spoken, f"{where}: found a last turn of assistant, expected user: the policy answers next")


def check_same_prompt(chosen: Messages, rejected: Messages, where: str) -> None:
    """Raise SalsaError unless two chats part where the assistant speaks: else they answer different prompts."""
    place = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    answers = place is not None and chosen[place]["role"] == rejected[place]["role"] == "assistant"
    turn = 1 + (min(len(chosen), len(rejected)) if place is None else place)
    require(
        answers,
        f"{where}: found another prompt than chosen's (turn {turn}), expected the same up to an assistant's turn",
    )


def as_messages(prompt: Any, where: str) -> Messages:
    """Text → one user turn; messages stay."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else check_messages(prompt, where)


def prompts(
    source: Source, *, columns: bool = False, tokenizer: PreTrainedTokenizerBase | None = None
) -> list[dict[str, Any]]:
    """→ rows {prompt}, messages that end before the assistant speaks; with `columns`, the row's others too, for a reward function.

    Of several turns the first. tokenizer: whose chat template each row is tried on.
    """
    rows, empty, dropped = [], [], []
    for number, row in load(source):
        where = f"{source.path}, row {number}"
        messages, turns = conversation(row, where)
        empty += [number] * (not turns[0].strip())
        dropped += [number] * drops(messages, tokenizer, f"{where}, {asking(row, where)}")
        rows.append({**row, "prompt": messages} if columns else {"prompt": messages})
    note(source.path, empty, len(rows), EMPTY_PROMPT)
    note(source.path, dropped, len(rows), DROPPED)
    return rows


def asking(row: dict[str, Any], where: str) -> str:
    """The column that holds a row's prompt."""
    return column(row, ["prompt", "messages", "turns"], where)


def conversation(row: dict[str, Any], where: str) -> tuple[Messages, tuple[str, ...]]:
    """A row → the messages before the first answer, and the texts of all user's turns that are answered, the first of them among the messages.

    Columns: `prompt` (messages, text, or the texts of several turns), else `messages` (its last assistant turn and what follows is cut
    off), else `turns` (texts, or {content}). Raises SalsaError that names `where`.
    """
    name = asking(row, where)
    value = row[name]
    if name == "turns" or (isinstance(value, list) and value and all(isinstance(turn, str) for turn in value)):
        require(
            isinstance(value, list) and bool(value),
            f"{where}, {name}: found {str(value)[:60]!r}, expected a list of user's turns",
        )
        turns = []
        for turn in value:
            text = turn.get("content") if isinstance(turn, dict) else turn
            require(isinstance(text, str), f"{where}, {name}: found {str(text)[:60]!r}, expected text")
            turns.append(str(text))
        return as_messages(turns[0], f"{where}, {name}"), tuple(turns)
    messages = as_messages(value, f"{where}, {name}")
    while name == "messages" and messages and messages[-1]["role"] != "user":
        messages.pop()
    require(bool(messages), f"{where}, {name}: found no user turn, expected one")
    check_asks(messages, f"{where}, {name}")
    return messages, (messages[-1]["content"],)


def prompt_tokens(
    row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, number: int | None = None, name: str = "prompts"
) -> list[int]:
    """Token ids of a row's prompt: `input_ids` as they are; messages through the chat template; text as it is, with one BOS.

    number, name: the row's and its data set's, for messages.
    """
    if "input_ids" in row:
        return list(row["input_ids"])
    where = name if number is None else f"{name}, row {number}"
    prompt = row[column(row, ["prompt"], where)]
    check_characters(prompt, f"{where}, prompt")
    if isinstance(prompt, str):
        ids = text_ids(prompt, tokenizer)
        return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids
    messages = check_messages(prompt, f"{where}, prompt")
    encoded = through_template(messages, tokenizer, f"{where}, prompt", add_generation_prompt=True, return_dict=True)
    return list(encoded["input_ids"])


def show(prompt: Messages) -> str:
    """A prompt for people: the content of one turn, or its turns with their roles."""
    return prompt[0]["content"] if len(prompt) == 1 else "\n".join(f"{m['role']}: {m['content']}" for m in prompt)
