"""Reads demonstrations, preferences and prompts from a source, as rows of messages.

data/row_formats.py lists the accepted columns. An unusable row raises an error with its number and column, and no row
is dropped without a message. Suspicious but usable rows are counted and reported once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from salsa_peft.config.options.synthetic import SYNTHETIC_DATA
from salsa_peft.config.options.toy import TOY_PROMPTS
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
from salsa_peft.data.message_formats import Messages, parse_messages
from salsa_peft.data.row_formats import Prompt
from salsa_peft.utils.console import say
from salsa_peft.utils.errors import require

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

TOY_FILES = {name: f"{name}.jsonl" for name in ("demonstrations", "preferences", "prompts", "held_out")}
"""Kind of training data → its file in the results of the toy and synthetic stages."""


def training_sources(recipe: Recipe, inputs: Mapping[str, Path]) -> dict[str, Source]:
    """Name → source of training data and held_out: the recipe's, or else synthetic data, or else toy data.

    inputs: the folders of a job's input units, of which `synthetic` and `toy` have data.
    """
    made: dict[str, Source] = {}
    for unit, names in (("toy", (*TOY_FILES,)), ("synthetic", SYNTHETIC_DATA)):
        if unit in inputs:
            made |= {name: Source(path=str(inputs[unit] / TOY_FILES[name])) for name in names}
    given = {name: getattr(recipe.data, name) for name in TOY_FILES}
    return made | {name: source for name, source in given.items() if source is not None}


def evaluation_sources(recipe: Recipe, toy: Path | None) -> dict[str, Source]:
    """Name → source of evaluation prompts: the recipe's sets, or else the toy data in folder `toy`."""
    if recipe.evaluate.prompts or toy is None:
        return dict(recipe.evaluate.prompts)
    return {name: Source(path=str(toy / file)) for name, file in TOY_PROMPTS.items()}


DROPPED_FIELD = "have {} that the tokenizer's chat template drops, so the model does not see it"
EMPTY_ANSWER = "have an empty answer, from which a model learns to say nothing"
EMPTY_PROMPT = "have an empty prompt"
IDENTICAL_PAIR = "are left out, because chosen and rejected are the same"
UNDESIRABLE = "are left out, because their label is false: an undesirable answer of KTO's data"
REPEATED_PROMPT = "repeat the prompt at the start of chosen and rejected; this repetition is removed"
UNRELATED_PROMPT = (
    "have a prompt column that is no part of chosen; the column is ignored, because chosen and rejected are whole chats"
)
PLACEHOLDER_INPUT = "have a placeholder such as 'n/a' in input, which stays in the prompt"
PROMPT_WITHOUT_SYSTEM = "have a system turn in their chats but not in `prompt`; the system turn is not used"
EMPTY_INPUTS = ("no input", "noinput", "<noinput>", "n/a", "none")
"""Placeholders for an empty `input` in Alpaca data."""


class RowWarnings:
    """Warnings about a source's rows, each printed once with the number of its rows and the first row."""

    def __init__(self, path: str) -> None:
        self.path, self.rows = path, defaultdict[str, list[int]](list)

    def add(self, number: int, what: str, holds: object = True) -> None:
        """Count row `number` for the warning `what` if `holds` is true."""
        if holds:
            self.rows[what].append(number)

    def add_dropped(self, number: int, fields: Sequence[str]) -> None:
        """Count row `number` for each field that the chat template drops."""
        for field in fields:
            self.add(number, DROPPED_FIELD.format(field))

    def print(self, rows: int) -> None:
        """Print the warnings. rows: number of all rows of the source."""
        for what, numbers in self.rows.items():
            say(f"{self.path}: {len(numbers)} of {rows} rows (the first: row {min(numbers)}) {what}")


def demonstrations(source: Source, tokenizer: PreTrainedTokenizerBase | None = None) -> list[dict[str, Any]]:
    """Rows {messages} that end with an assistant turn. Turns after the last assistant turn are cut off.

    Rows also have `tools` and `chat_template_kwargs` if the data has them, and `skipped`: positions of the assistant
    turns without loss. tokenizer: renders each row with its chat template as a check, and determines the form of the
    messages.
    """
    rows, warnings = [], RowWarnings(source.path)
    loaded = load_rows(source)
    for number, row in loaded:
        where = f"{source.path}, row {number}"
        found, more = row_formats.demonstration(row, where), row_parts.template_inputs(row, where)
        if row_formats.is_undesirable(row):
            warnings.add(number, UNDESIRABLE)
            continue
        messages = list(found.messages)
        while messages and messages[-1]["role"] != "assistant":
            messages.pop()
        require(bool(messages), f"{where}, {found.column}: has no assistant turn; add one")
        skipped = [place for place in found.skipped if place < len(messages)]
        spoken = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
        require(
            len(skipped) < len(spoken),
            f"{where}, {found.column}: every assistant turn has weight 0, so there is nothing to learn; leave out the"
            " row",
        )
        warnings.add(number, PLACEHOLDER_INPUT, str(row.get("input") or "").strip().lower() in EMPTY_INPUTS)
        messages = messages_for_template(messages, tokenizer)
        fields = dropped_fields(messages, tokenizer, f"{where}, {found.column}", template_options(more))
        warnings.add_dropped(number, fields)
        trained = (messages[place] for place in spoken if place not in skipped)
        warnings.add(number, EMPTY_ANSWER, any(is_empty(turn, TOOL_CALLS_FIELD not in fields) for turn in trained))
        rows.append({"messages": messages, **more, **({"skipped": skipped} if skipped else {})})
    warnings.print(len(loaded))
    require(
        bool(rows),
        f"{source.path}: every row has label: false (an undesirable answer) and is left out, so no row is left; add rows"
        " with label: true",
    )
    return rows


def is_empty(message: dict[str, Any], calls: bool = True) -> bool:
    """Whether a message has neither text nor tool calls. calls: whether the template shows tool calls."""
    return not message_text(message).strip() and not (calls and message.get("tool_calls"))


def preferences(source: Source, tokenizer: PreTrainedTokenizerBase | None = None) -> list[dict[str, Any]]:
    """Rows {chosen, rejected}: whole chats that start with the prompt (TRL's implicit-prompt form).

    Identical pairs are left out. A prompt column is put before answers that do not contain the prompt. Rows also have
    `tools` and `chat_template_kwargs` if the data has them. tokenizer: renders each row with its chat template as a
    check, and determines the form of the messages.
    """
    rows, warnings = [], RowWarnings(source.path)
    loaded = load_rows(source)
    for number, row in loaded:
        where = f"{source.path}, row {number}"
        pair, more = row_formats.preference(row, where), row_parts.template_inputs(row, where)
        sides = dict(zip(("chosen", "rejected"), pair[:2], strict=True))
        for name, chat in zip(pair.names, sides.values(), strict=True):
            last = chat[-1]["role"]
            require(last == "assistant", f"{where}, {name}: must end with an assistant turn, not with a {last} turn")
        warnings.add(number, REPEATED_PROMPT, pair.prompt_removed)
        if pair.chosen == pair.rejected:
            warnings.add(number, IDENTICAL_PAIR)
            continue
        check_same_prompt(pair.chosen, pair.rejected, f"{where}, {pair.names[1]}")
        warnings.add(number, EMPTY_ANSWER, is_empty(pair.chosen[-1]))
        warnings.add(number, UNRELATED_PROMPT, row_formats.has_unrelated_prompt(pair))
        sides = {name: messages_for_template(chat, tokenizer) for name, chat in sides.items()}
        fields = [
            dropped_fields(chat, tokenizer, f"{where}, {name}", template_options(more))
            for name, chat in zip(pair.names, sides.values(), strict=True)
        ]
        warnings.add_dropped(number, sorted(set().union(*fields)))
        rows.append({**sides, **more})
    warnings.print(len(loaded))
    require(bool(rows), f"{source.path}: chosen and rejected are the same in every row; give pairs that differ")
    return rows


def check_same_prompt(chosen: Messages, rejected: Messages, where: str) -> None:
    """Raise SalsaError unless two chats first differ in an assistant turn, so that the prompt is the same."""
    place = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    answers = place is not None and chosen[place]["role"] == rejected[place]["role"] == "assistant"
    turn = 1 + (min(len(chosen), len(rejected)) if place is None else place)
    require(
        answers,
        f"{where}: this chat and chosen must have the same prompt and differ first in an assistant turn; they first"
        f" differ in turn {turn}",
    )


def prompts(
    source: Source, *, columns: bool = False, tokenizer: PreTrainedTokenizerBase | None = None
) -> list[dict[str, Any]]:
    """Rows {prompt: messages}, without a chat's last answer. columns: keep the other columns, for rewards.

    Rows also have `tools` and `chat_template_kwargs` if the data has them. tokenizer: renders each row with its chat
    template as a check.
    """
    rows, warnings = [], RowWarnings(source.path)
    for number, row in load_rows(source):
        where = f"{source.path}, row {number}"
        prompt, more = read_prompt(row, where), row_parts.template_inputs(row, where)
        warnings.add(number, EMPTY_PROMPT, not prompt.texts[0].strip())
        warnings.add(number, PROMPT_WITHOUT_SYSTEM, row_formats.prompt_lacks_system_turn(row, prompt))
        chat = messages_for_template(prompt.messages, tokenizer)
        warnings.add_dropped(
            number, dropped_fields(chat, tokenizer, f"{where}, {prompt.column}", template_options(more))
        )
        rows.append({**(row if columns else {}), "prompt": prompt.messages, **more})
    warnings.print(len(rows))
    return rows


def check_no_template_options(rows: Sequence[dict[str, Any]], stage: str) -> None:
    """Raise SalsaError for prompts with tools or template options, which TRL's RLOO and GRPO ignore."""
    own = [number for number, row in enumerate(rows, 1) if template_options(row)]
    require(
        not own,
        f"data.prompts: {len(own)} rows (the first: row {min(own, default=0)}) have `tools` or `chat_template_kwargs`,"
        f" which TRL's {stage} ignores; remove the columns, or use algorithm ppo",
    )


def read_prompt(row: dict[str, Any], where: str) -> Prompt:
    """The prompt of a row. Raises a SalsaError that names `where` and the column."""
    prompt = row_formats.prompt(row, where)
    require(prompt.messages[-1]["role"] != "assistant", f"{where}, {prompt.column}: {row_formats.ENDS_WITH_ANSWER}")
    return prompt


def prompt_tokens(
    row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, number: int | None = None, name: str = "prompts"
) -> list[int]:
    """Token ids of a row's prompt.

    `input_ids` are returned as they are. Messages are rendered with the chat template and the row's `tools` and
    `chat_template_kwargs`. Text is tokenized with at most one BOS and without EOS. number, name: row number and
    name of the data, for messages.
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
    messages = messages_for_template(parse_messages(prompt, f"{where}, prompt"), tokenizer)
    options = template_options(row) | {"add_generation_prompt": True, "return_dict": True}
    encoded = apply_template(messages, tokenizer, f"{where}, prompt", **options)
    return list(encoded["input_ids"])


def to_dataset(rows: list[dict[str, Any]]) -> Dataset:
    """Rows as a Dataset for TRL's trainers.

    Chats, tools and options are stored as Arrow's JSON type. As structs, each object would get the keys of all others,
    and arguments of different types would be rejected.
    """
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
"""Columns that are stored as JSON, because they hold lists and objects."""


def prompt_text(prompt: Messages) -> str:
    """A prompt as readable text: the content of a single turn, or all turns with their roles."""
    return prompt[0]["content"] if len(prompt) == 1 else "\n".join(f"{m['role']}: {m['content']}" for m in prompt)
