"""Datasets → demonstrations, preferences, prompts, in one form each: lists of messages (or text, for prompts).

Which columns are read: data/row_formats.py. A row that does not fit is refused by its number and column, never dropped in silence; what is odd
and may be meant is said once.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from salsa_peft.config.schema import Recipe, Source
from salsa_peft.data import row_formats, row_parts
from salsa_peft.data.chat.template_fields import (
    TOOL_CALLS_FIELD,
    apply_template,
    dropped_fields,
    message_text,
    messages_for_template,
    template_options,
)
from salsa_peft.data.chat.templates import text_ids
from salsa_peft.data.files import check_characters, load_rows
from salsa_peft.data.message_formats import Messages
from salsa_peft.data.message_formats import parse_messages as check_messages
from salsa_peft.data.row_formats import Prompt
from salsa_peft.utils.errors import require

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

TOY_FILES = {name: f"{name}.jsonl" for name in ("demonstrations", "preferences", "prompts", "held_out")}
TOY_PROMPTS = {"in": "eval_in.jsonl", "out": "eval_out.jsonl"}


def training_sources(recipe: Recipe, toy: Path | None) -> dict[str, Source]:
    """The training sets and the held-out demonstrations: the recipe's own, else the embedded world's in folder `toy`."""
    given = {name: getattr(recipe.data, name) for name in TOY_FILES}
    return {name: source or Source(path=str(toy / TOY_FILES[name])) for name, source in given.items() if source or toy}  # type: ignore[operator]


def evaluation_sources(recipe: Recipe, toy: Path | None) -> dict[str, Source]:
    """Name → held-out prompts: the recipe's, else the embedded world's, in and out of distribution."""
    if recipe.evaluate.prompts or toy is None:
        return dict(recipe.evaluate.prompts)
    return {name: Source(path=str(toy / file)) for name, file in TOY_PROMPTS.items()}


def warn_about_rows(path: str, numbers: Sequence[int], rows: int, what: str) -> None:
    """Say once what holds for the rows with these numbers."""
    if numbers:
        told = f"{path}: {len(numbers)} of {rows} rows (the first: row {min(numbers)}) {what}"
        print(told, file=sys.stderr, flush=True)


DROPPED_FIELD = "have {} that the tokenizer's chat template drops: the model does not see it"
DROPPED_SYSTEM_TURN = DROPPED_FIELD.format("a system turn")
EMPTY_ANSWER = "have an empty answer: a model learns from it to say nothing"
EMPTY_PROMPT = "have an empty prompt"
IDENTICAL_PAIR = "left out: chosen and rejected are the same, which says nothing"
UNDESIRABLE = "left out: their label is false, an answer that nobody wants (KTO's)"
REPEATED_PROMPT = (
    "have a chosen and a rejected text that begin with the prompt: it is taken off them, and stands before them once"
)
UNRELATED_PROMPT = (
    "have a prompt column that chosen does not begin with: it is not read, chosen and rejected hold their own"
)
PLACEHOLDER_INPUT = "have an input that says there is none: it is in the prompt as it stands"
PROMPT_WITHOUT_SYSTEM = "have a system turn in their chats that `prompt` has not: the prompt is asked without it"
EMPTY_INPUTS = ("no input", "noinput", "<noinput>", "n/a", "none")
"""What some Alpaca rows have in `input` for none."""


class RowWarnings:
    """What is odd in a source's rows, said once for each kind with the number of rows."""

    def __init__(self, path: str) -> None:
        self.path, self.rows = path, defaultdict[str, list[int]](list)

    def add(self, number: int, what: str, holds: object = True) -> None:
        """Row `number`, where it holds."""
        if holds:
            self.rows[what].append(number)

    def add_dropped(self, number: int, fields: Sequence[str]) -> None:
        """What the template leaves out of a row."""
        for field in fields:
            self.add(number, DROPPED_FIELD.format(field))

    def print(self, rows: int) -> None:
        """Says it; `rows` is the number of all."""
        for what, numbers in self.rows.items():
            warn_about_rows(self.path, numbers, rows, what)


def demonstrations(source: Source, tokenizer: PreTrainedTokenizerBase | None = None) -> list[dict[str, Any]]:
    """→ rows {messages}, each with an assistant's turn; a chat's turns after the last such turn are cut off.

    With `tools` and `chat_template_kwargs` where the data has them, and `skipped`: the positions of the assistant's turns that the loss
    leaves out. tokenizer: whose chat template each row is tried on, and in whose form messages come.
    """
    rows, odd = [], RowWarnings(source.path)
    loaded = load_rows(source)
    for number, row in loaded:
        where = f"{source.path}, row {number}"
        found, more = row_formats.demonstration(row, where), row_parts.template_inputs(row, where)
        if row_formats.is_undesirable(row):
            odd.add(number, UNDESIRABLE)
            continue
        messages = list(found.messages)
        while messages and messages[-1]["role"] != "assistant":
            messages.pop()
        require(bool(messages), f"{where}, {found.name}: found no assistant turn, expected at least one")
        skipped = [place for place in found.skipped if place < len(messages)]
        spoken = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
        require(
            len(skipped) < len(spoken),
            f"{where}, {found.name}: found no assistant turn with a weight, expected at least one",
        )
        odd.add(
            number,
            PLACEHOLDER_INPUT,
            str(row.get("input")).strip().lower() in EMPTY_INPUTS and row.get("input") is not None,
        )
        messages = messages_for_template(messages, tokenizer)
        fields = dropped_fields(messages, tokenizer, f"{where}, {found.name}", template_options(more))
        odd.add_dropped(number, fields)
        calls = TOOL_CALLS_FIELD not in fields
        odd.add(number, EMPTY_ANSWER, any(is_empty(messages[place], calls) for place in spoken if place not in skipped))
        rows.append({"messages": messages, **more, **({"skipped": skipped} if skipped else {})})
    odd.print(len(loaded))
    require(bool(rows), f"{source.path}: found a label of false in every row, expected demonstrations to learn from")
    return rows


def is_empty(message: dict[str, Any], calls: bool = True) -> bool:
    """Whether a turn says nothing and calls nothing; calls: whether the template shows a call."""
    return not message_text(message).strip() and not (calls and message.get("tool_calls"))


def preferences(source: Source, tokenizer: PreTrainedTokenizerBase | None = None) -> list[dict[str, Any]]:
    """→ rows {chosen, rejected}, whole chats that start with the prompt (TRL's implicit-prompt form); pairs of equals are left out, and told.

    The prompt, where it has a column, is put before answers that don't hold it already. With `tools` and `chat_template_kwargs` where the
    data has them. tokenizer: whose chat template each row is tried on, and in whose form messages come.
    """
    rows, odd = [], RowWarnings(source.path)
    loaded = load_rows(source)
    for number, row in loaded:
        where = f"{source.path}, row {number}"
        pair, more = row_formats.preference(row, where), row_parts.template_inputs(row, where)
        sides = dict(zip(("chosen", "rejected"), pair[:2], strict=True))
        for name, chat in zip(pair.names, sides.values(), strict=True):
            last = chat[-1]["role"]
            require(last == "assistant", f"{where}, {name}: found a last turn of {last}, expected assistant")
        odd.add(number, REPEATED_PROMPT, pair.taken_off)
        if pair.chosen == pair.rejected:
            odd.add(number, IDENTICAL_PAIR)
            continue
        check_same_prompt(pair.chosen, pair.rejected, f"{where}, {pair.names[1]}")
        odd.add(number, EMPTY_ANSWER, is_empty(pair.chosen[-1]))
        odd.add(number, UNRELATED_PROMPT, row_formats.has_unrelated_prompt(pair))
        sides = {name: messages_for_template(chat, tokenizer) for name, chat in sides.items()}
        told = [
            dropped_fields(chat, tokenizer, f"{where}, {name}", template_options(more))
            for name, chat in zip(pair.names, sides.values(), strict=True)
        ]
        odd.add_dropped(number, sorted({field for fields in told for field in fields}))
        rows.append({**sides, **more})
    odd.print(len(loaded))
    require(bool(rows), f"{source.path}: found chosen and rejected the same in every row, expected pairs that differ")
    return rows


def check_prompt_end(prompt: Messages, where: str) -> None:
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


def prompts(
    source: Source, *, columns: bool = False, tokenizer: PreTrainedTokenizerBase | None = None
) -> list[dict[str, Any]]:
    """→ rows {prompt}, messages that end before the assistant speaks; with `columns`, the row's others too, for a reward function.

    Of several turns the first. With `tools` and `chat_template_kwargs` where the data has them. tokenizer: whose chat template each row
    is tried on.
    """
    rows, odd = [], RowWarnings(source.path)
    for number, row in load_rows(source):
        where = f"{source.path}, row {number}"
        asked, more = read_prompt(row, where), row_parts.template_inputs(row, where)
        odd.add(number, EMPTY_PROMPT, not (asked.turns or (asked.messages[-1]["content"],))[0].strip())
        odd.add(number, PROMPT_WITHOUT_SYSTEM, row_formats.prompt_lacks_system_turn(row, asked))
        odd.add_dropped(
            number,
            dropped_fields(
                messages_for_template(asked.messages, tokenizer),
                tokenizer,
                f"{where}, {asked.name}",
                template_options(more),
            ),
        )
        rows.append({**(row if columns else {}), "prompt": asked.messages, **more})
    odd.print(len(rows))
    return rows


def check_no_template_options(rows: Sequence[dict[str, Any]], stage: str) -> None:
    """Raise SalsaError for prompts with options of their own, which TRL's RLOO and GRPO leave out of what they render."""
    own = [number for number, row in enumerate(rows, 1) if template_options(row)]
    require(
        not own,
        f"data.prompts: found `tools` or `chat_template_kwargs` in {len(own)} rows (the first: row {min(own, default=0)}), which TRL's {stage}"
        " leaves out of its prompts; take the columns out, or use algorithm ppo",
    )


def read_prompt(row: dict[str, Any], where: str) -> Prompt:
    """What a row asks: messages before the answer, and the texts of several user's turns where the row has them (`turns`, or `prompt` as
    a list of texts). Raises SalsaError that names `where`."""
    asked = row_formats.prompt(row, where)
    check_prompt_end(asked.messages, f"{where}, {asked.name}")
    return asked


def prompt_tokens(
    row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, number: int | None = None, name: str = "prompts"
) -> list[int]:
    """Token ids of a row's prompt: `input_ids` as they are; messages through the chat template, with the row's `tools` and
    `chat_template_kwargs`; text as it is, with one BOS.

    number, name: the row's and its data set's, for messages.
    """
    if "input_ids" in row:
        return list(row["input_ids"])
    where = name if number is None else f"{name}, row {number}"
    if row.get("prompt") is None:
        raise row_parts.missing_columns(row, "prompt", where, ["prompt"])
    prompt = row["prompt"]
    check_characters(prompt, f"{where}, prompt")
    if isinstance(prompt, str):
        ids = text_ids(prompt, tokenizer)
        return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids
    messages = messages_for_template(check_messages(prompt, f"{where}, prompt"), tokenizer)
    options = template_options(row) | {"add_generation_prompt": True, "return_dict": True}
    encoded = apply_template(messages, tokenizer, f"{where}, prompt", **options)
    return list(encoded["input_ids"])


def to_dataset(rows: list[dict[str, Any]]) -> Dataset:
    """Rows as TRL's trainers take them. Chats, tools and options are JSON in Arrow: as structs every object would get the keys of all, and
    arguments that differ in type would be refused."""
    from datasets import Dataset, Features, Json, concatenate_datasets

    nested = [name for name in JSON_COLUMNS if any(name in row for row in rows)]
    default: dict[str, Any] = {"chat_template_kwargs": {}}
    chats = {name: [row.get(name, default.get(name)) for row in rows] for name in nested}
    others = [{name: value for name, value in row.items() if name not in JSON_COLUMNS} for row in rows]
    parts = [Dataset.from_dict(chats, features=Features({name: Json() for name in nested}))]
    if any(others):
        parts.append(Dataset.from_list(others, on_mixed_types="use_json"))
    return concatenate_datasets(parts, axis=1)


JSON_COLUMNS = ("messages", "chosen", "rejected", "prompt", "tools", "chat_template_kwargs", "skipped")
"""Columns of ours whose values are lists and objects."""


def prompt_text(prompt: Messages) -> str:
    """A prompt for people: the content of one turn, or its turns with their roles."""
    return prompt[0]["content"] if len(prompt) == 1 else "\n".join(f"{m['role']}: {m['content']}" for m in prompt)
