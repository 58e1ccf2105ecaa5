"""Questions for evaluation: MT-Bench, Arena-Hard and other prompts.

A question may have several user turns (`turns`, or `prompt` as a list of texts), which the model answers one after the
other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from salsa_peft.config.fields import question_id
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

GREEDY = ("extraction", "math", "coding", "reasoning", "arena-hard-200")
TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1, **dict.fromkeys(GREEDY, 0.0)}
"""Category → sampling temperature of the answers, as in FastChat's llm_judge."""
ID_COLUMNS = ("question_id", "uid", "prompt_id")
"""Columns with a question's id, in FastChat, arena-hard-auto and on the Hub. If a prompt_id repeats, ids are row numbers."""


class Question(NamedTuple):
    """A question, or a conversation with several questions."""

    id: int | str
    """Id in the data; the row's number if the data has no ids or repeats a prompt_id."""
    category: str | None
    """Category in the data, such as MT-Bench's."""
    messages: Messages
    """Messages up to the first answer; the last one is a user turn."""
    turns: tuple[str, ...]
    """Texts of the user turns to answer; the first one is the last of `messages`."""
    reference: list[Any] | None
    """Reference answers for the judge, one per turn."""
    row: dict[str, Any]
    """Tools and template options, and the data's other columns if a reward function needs them."""

    def conversation(self, answers: list[str]) -> Messages:
        """The messages before the next answer, given the answers so far."""
        found = list(self.messages)
        for answer, turn in zip(answers, self.turns[1:], strict=False):
            found += [{"role": "assistant", "content": answer}, {"role": "user", "content": turn}]
        return found

    def for_judge(self, dataset: str, index: int) -> dict[str, Any]:
        """The question as judges read it, a row of questions.jsonl. index: its position in the set called `dataset`."""
        return {
            "dataset": dataset, "index": index, "question_id": self.id, "category": self.category, "messages": self.messages,
            "turns": list(self.turns), "reference": self.reference,
        }  # fmt: skip


def questions(
    source: Source, *, columns: bool = False, tokenizer: PreTrainedTokenizerBase | None = None
) -> list[Question]:
    """The questions of a source. Raises SalsaError for a bad row or a repeated id that is no prompt_id.

    columns: keep the data's other columns. tokenizer: renders each row with its chat template as a check.
    """
    found, seen, by_row = [], dict[str, int](), False
    warnings, loaded = RowWarnings(source.path), load_rows(source)
    for number, row in loaded:
        where = f"{source.path}, row {number}"
        prompt, more = read_prompt(row, where), template_inputs(row, where)
        name, identity = row_id(row, number, where)
        other = seen.get(str(identity))  # reference answers are found by the id's text: 7 and "7" are the same
        twice = other is not None
        require(
            not twice or name is not None,
            f"{where}: has no id ({', '.join(ID_COLUMNS)}), so its row number {number} would be its id, but row {other}"
            " has that id; give every row an id, or remove the ids of all rows",
        )
        require(
            not twice or name == ID_COLUMNS[-1],
            f"{where}, {name}: {short(identity)} is also the id of row {other}; give each question its own id",
        )
        by_row |= twice
        seen[str(identity)] = number
        warnings.add(number, EMPTY_PROMPT, any(not turn.strip() for turn in prompt.texts))
        chat = messages_for_template(prompt.messages, tokenizer)
        warnings.add_dropped(
            number, dropped_fields(chat, tokenizer, f"{where}, {prompt.column}", template_options(more))
        )
        category, reference = row.get("category"), row.get("reference")
        found.append(
            Question(
                id=identity,
                category=category if isinstance(category, str) else None,
                messages=prompt.messages,
                turns=prompt.texts,
                reference=reference if isinstance(reference, list) and reference else None,
                row={**(row if columns else {}), **more},
            )
        )
    warnings.print(len(found))
    if by_row:
        return [question._replace(id=number) for question, (number, _) in zip(found, loaded, strict=True)]
    return found


def row_id(row: Mapping[str, Any], number: int, where: str) -> tuple[str | None, int | str]:
    """The column of a row's id and the id; without such a column None and the row's number.

    Raises SalsaError, which starts with `where`, for an id that is null, or neither text nor a whole number.
    """
    there = [key for key in ID_COLUMNS if key in row]
    if not there:
        return None, number
    name = next((key for key in there if row[key] is not None), there[0])
    return name, question_id(row[name], f"{where}, {name}")


def temperature(question: Question, chosen: float | str, otherwise: float) -> float:
    """Temperature for a question. chosen: evaluate.temperature. otherwise: generation.temperature."""
    if not isinstance(chosen, str):
        return float(chosen)
    return TEMPERATURES.get(question.category or "", otherwise)
