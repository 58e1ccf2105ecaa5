"""Questions with the answers of all contestants, in the form that the judge stage of a recipe reads."""

from collections.abc import Mapping, Sequence
from typing import Any

from salsa_peft.data.questions import Question
from salsa_peft.evaluation.judges.stage import Dataset

Texts = Sequence[Sequence[str]]
"""For each question the answers to its turns."""
Scores = Sequence[Sequence[float]]


def as_dataset(
    name: str, questions: Sequence[Question], answers: Mapping[str, Texts], scores: Mapping[str, Scores] | None
) -> Dataset:
    """The set of questions called `name` with all answers, whose lengths are numbers of characters.

    answers: model → its answers. scores: model → the reward's score of each answer. None: there is no reward.
    """
    asked = [one.for_judge(name, index) for index, one in enumerate(questions)]
    rows: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for model, texts in answers.items():
        for index, (question, turns) in enumerate(zip(questions, texts, strict=True)):
            rows[model, index] = [
                {
                    "dataset": name,
                    "model": model,
                    "index": index,
                    "question_id": question.id,
                    "category": question.category,
                    "turn": turn + 1,
                    "prompt": question.turns[turn],
                    "response": text,
                    "scores": {} if scores is None else {"reward": scores[model][index][turn]},
                    "length": len(text),
                    "empty": not text,
                }
                for turn, text in enumerate(turns)
            ]
    return Dataset(asked, rows)
