"""Questions for evaluation: MT-Bench, Arena-Hard and any prompts, in the forms that FastChat, arena-hard-auto and the Hub have them.

Of a conversation with several user's turns (`turns`, or `prompt` as a list of texts) all are asked, one after the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from salsa_peft.config.schema import Source
from salsa_peft.data.chat.template_fields import dropped_fields, messages_for_template, template_options
from salsa_peft.data.datasets import EMPTY_PROMPT, RowWarnings, read_prompt
from salsa_peft.data.files import load_rows
from salsa_peft.data.message_formats import Messages
from salsa_peft.data.row_parts import template_inputs
from salsa_peft.utils.errors import require
from salsa_peft.utils.messages import short

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPERATURES: Mapping[str, float] = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
    "arena-hard-200": 0.0,
}
"""Category → temperature of its answers, as in FastChat's llm_judge."""
ID_COLUMNS = ("question_id", "uid", "prompt_id")
"""Columns that name a question: FastChat's, arena-hard-auto's, the Hub's; the last is of a text, which may come twice."""


class Question(NamedTuple):
    """What is asked, turn by turn."""

    id: int | str
    """As the data has it; else its row's number."""
    category: str | None
    messages: Messages
    """Before the first answer; the user's turn last."""
    turns: tuple[str, ...]
    """The user's texts that are answered; the first is the last of `messages`."""
    reference: list[Any] | None
    """Reference answers by turn, for judges."""
    row: dict[str, Any]
    """The data's other columns, where a reward function asks for them; its tools and the template's options in any case."""

    def conversation(self, answers: list[str]) -> Messages:
        """What stands before the next answer, given those so far."""
        found = list(self.messages)
        for answer, turn in zip(answers, self.turns[1:], strict=False):
            found += [{"role": "assistant", "content": answer}, {"role": "user", "content": turn}]
        return found


def questions(
    source: Source, *, columns: bool = False, tokenizer: PreTrainedTokenizerBase | None = None
) -> list[Question]:
    """The questions of a source; `columns`: with the data's others. Raises SalsaError with row and column, also where an id comes twice.

    tokenizer: whose chat template each row is tried on.
    """
    found, numbers, seen, by_row = [], [], dict[str, int](), False
    odd = RowWarnings(source.path)
    for number, row in load_rows(source):
        where = f"{source.path}, row {number}"
        asked, more = read_prompt(row, where), template_inputs(row, where)
        messages, turns = asked.messages, asked.turns or (asked.messages[-1]["content"],)
        name = next((key for key in ID_COLUMNS if isinstance(row.get(key), int | str)), None)
        identity = number if name is None else row[name]
        twice = str(identity) in seen  # references go by an id's text: 7 and "7" are one
        other = seen.get(str(identity))
        require(
            not twice or name is not None,
            f"{where}: found no id ({', '.join(ID_COLUMNS)}), and row {other} has its number {number}; give every row one, or none",
        )
        require(
            not twice or name == ID_COLUMNS[-1],
            f"{where}, {name}: found {short(identity)}, which row {other} has too, expected each question once",
        )
        by_row |= twice
        seen[str(identity)] = number
        odd.add(number, EMPTY_PROMPT, any(not turn.strip() for turn in turns))
        odd.add_dropped(
            number,
            dropped_fields(
                messages_for_template(messages, tokenizer), tokenizer, f"{where}, {asked.name}", template_options(more)
            ),
        )
        numbers.append(number)
        category = row.get("category")
        reference = row.get("reference")
        found.append(
            Question(
                id=identity,
                category=category if isinstance(category, str) else None,
                messages=messages,
                turns=turns,
                reference=reference if isinstance(reference, list) and reference else None,
                row={**(row if columns else {}), **more},
            )
        )
    odd.print(len(found))
    return [one._replace(id=number) for one, number in zip(found, numbers, strict=True)] if by_row else found


def temperature(question: Question, chosen: float | str, otherwise: float) -> float:
    """Of its answers. chosen: evaluate.temperature, a number or "category"; otherwise: generation.temperature."""
    if not isinstance(chosen, str):
        return float(chosen)
    return TEMPERATURES.get(question.category or "", otherwise)
