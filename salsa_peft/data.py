"""Datasets → demonstrations, preferences, prompts, in one form each: lists of messages (or text, for prompts).

A row that does not fit is refused by its number and column, never dropped in silence.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import Recipe, SalsaError, Source, require

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, str]]
TOY = {name: f"{name}.jsonl" for name in ("demonstrations", "preferences", "prompts", "held_out")}
TOY_PROMPTS = {"in": "eval_in.jsonl", "out": "eval_out.jsonl"}
SHUFFLE_SEED = 20_241


def sources(recipe: Recipe, toy: Path | None) -> dict[str, Source]:
    """The training sets and the held-out demonstrations: the recipe's own, else the embedded world's in folder `toy`."""
    given = {name: getattr(recipe.data, name) for name in TOY}
    return {name: source or Source(path=str(toy / TOY[name])) for name, source in given.items() if source or toy}  # type: ignore[operator]


def evaluation_sources(recipe: Recipe, toy: Path | None) -> dict[str, Source]:
    """Name → held-out prompts: the recipe's, else the embedded world's, in and out of distribution."""
    if recipe.evaluate.prompts or toy is None:
        return dict(recipe.evaluate.prompts)
    return {name: Source(path=str(toy / file)) for name, file in TOY_PROMPTS.items()}


def load(source: Source) -> list[tuple[int, dict[str, Any]]]:
    """The rows of a source with their numbers, from 1; with `limit`, the first after a fixed shuffle. Raises SalsaError for none.

    Local files are read here: datasets' cache goes by path and time, and its errors name no row.
    """
    if Path(source.path).suffix.lower() in FILES:
        rows = FILES[Path(source.path).suffix.lower()](Path(source.path))
    else:
        from datasets import load_dataset

        rows = load_dataset(source.path, source.name, split=source.split, revision=source.revision)
    require(len(rows) > 0, f"{source.path}: found no rows, expected at least one")
    places = list(range(len(rows)))
    if source.limit is not None and source.limit < len(rows):
        random.Random(SHUFFLE_SEED).shuffle(places)
    chosen = ((place + 1, rows[place]) for place in places[: source.limit])
    return [(number, as_row(row, f"{source.path}, row {number}")) for number, row in chosen]


def as_row(row: Any, where: str) -> dict[str, Any]:
    """A line of jsonl, or a row as it is. Raises SalsaError unless it is an object of columns."""
    try:
        value = json.loads(row) if isinstance(row, str | bytes) else row
    except ValueError as error:
        raise SalsaError(f"{where}: found {row[:60]!r}, expected one JSON object a line") from error
    require(isinstance(value, dict), f"{where}: found {str(value)[:60]!r}, expected one JSON object a line")
    return value


def _lines(path: Path) -> list[Any]:
    return [line for line in path.read_bytes().split(b"\n") if line.strip()]


def _json(path: Path) -> list[Any]:
    """A list of objects, or one object after another."""
    if not path.read_bytes().lstrip().startswith(b"["):
        return _lines(path)
    try:
        return list(json.loads(path.read_bytes()))
    except ValueError as error:
        raise SalsaError(f"{path}: found no JSON ({error}), expected a list of objects") from error


def _parquet(path: Path) -> list[Any]:
    from pyarrow import parquet

    return list(parquet.read_table(path).to_pylist())


FILES = {".jsonl": _lines, ".json": _json, ".parquet": _parquet}


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
    raise SalsaError(f"{where}: found columns {', '.join(sorted(row))}, expected {' or '.join(names)}")


def demonstrations(source: Source) -> list[dict[str, Messages]]:
    """→ rows {messages}, each with an assistant's turn; a chat's turns after the last such turn are cut off."""
    rows = []
    for number, row in load(source):
        where = f"{source.path}, row {number}"
        name = column(row, ["messages"], where)
        messages = check_messages(row[name], f"{where}, {name}")
        while messages and messages[-1]["role"] != "assistant":
            messages.pop()
        require(bool(messages), f"{where}, {name}: found no assistant turn, expected at least one")
        rows.append({"messages": messages})
    return rows


def preferences(source: Source) -> list[dict[str, Messages]]:
    """→ rows {chosen, rejected}, whole chats that start with the prompt (TRL's implicit-prompt form).

    `prompt` may be messages, or text (one user turn); it is put before answers that don't hold it already.
    """
    rows = []
    for number, row in load(source):
        where = f"{source.path}, row {number}"
        pair = {}
        for name in ("chosen", "rejected"):
            answer = row[column(row, [name], where)]
            if isinstance(answer, str):
                answer = [{"role": "assistant", "content": answer}]
            answer = check_messages(answer, f"{where}, {name}")
            if answer[0]["role"] == "assistant":
                answer = as_messages(row[column(row, ["prompt"], where)], f"{where}, prompt") + answer
            require(
                answer[-1]["role"] == "assistant",
                f"{where}, {name}: found a last turn of {answer[-1]['role']}, expected assistant",
            )
            pair[name] = answer
        rows.append(pair)
    return rows


def as_messages(prompt: Any, where: str) -> Messages:
    """Text → one user turn; messages stay."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else check_messages(prompt, where)


def prompts(source: Source, *, columns: bool = False) -> list[dict[str, Any]]:
    """→ rows {prompt}, messages that end before the assistant speaks; with `columns`, the row's others too, for a reward function.

    Of several turns the first.
    """
    rows = []
    for number, row in load(source):
        messages, _ = conversation(row, f"{source.path}, row {number}")
        rows.append({**row, "prompt": messages} if columns else {"prompt": messages})
    return rows


def conversation(row: dict[str, Any], where: str) -> tuple[Messages, tuple[str, ...]]:
    """A row → the messages before the first answer, and the texts of all user's turns that are answered, the first of them among the messages.

    Columns: `prompt` (messages, text, or the texts of several turns), else `messages` (its last assistant turn and what follows is cut
    off), else `turns` (texts, or {content}). Raises SalsaError that names `where`.
    """
    name = column(row, ["prompt", "messages", "turns"], where)
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
    spoken = messages[-1]["role"] == "assistant"
    require(not spoken, f"{where}, {name}: found a last turn of assistant, expected user: the policy answers next")
    return messages, (messages[-1]["content"],)


def prompt_tokens(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, number: int = 1) -> list[int]:
    """Token ids of a row's prompt: `input_ids` as they are; messages through the chat template; text as it is, with BOS."""
    if "input_ids" in row:
        return list(row["input_ids"])
    prompt = row[column(row, ["prompt"], f"row {number}")]
    if isinstance(prompt, str):
        ids: list[int] = tokenizer(prompt)["input_ids"]  # type: ignore[assignment]
        return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids
    messages = check_messages(prompt, f"row {number}, prompt")
    require(
        tokenizer.chat_template is not None,
        f"row {number}, prompt: found messages, but the tokenizer has no chat template; expected text, or set one",
    )
    encoded: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    return list(encoded["input_ids"])


def show(prompt: Messages) -> str:
    """A prompt for people: the content of one turn, or its turns with their roles."""
    return prompt[0]["content"] if len(prompt) == 1 else "\n".join(f"{m['role']}: {m['content']}" for m in prompt)
