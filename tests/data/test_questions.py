"""Questions in the forms that others have them, with all their turns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from paths import SHARED

from salsa_peft.config.schema import Source
from salsa_peft.data import datasets
from salsa_peft.data.questions import Question, questions, temperature
from salsa_peft.utils.errors import SalsaError

DATA = SHARED / "data"


@pytest.fixture
def read(tmp_path: Path) -> Any:
    """read(rows, limit, columns) → their questions."""

    def make(rows: list[dict[str, Any]], limit: int | None = None, columns: bool = False) -> list[Question]:
        (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return questions(Source(path=str(tmp_path / "q.jsonl"), limit=limit), columns=columns)

    return make


USER = {"role": "user", "content": "Hi"}


@pytest.mark.parametrize(
    ("row", "identity", "category", "messages", "turns"),
    [
        ({"question_id": 81, "category": "writing", "turns": ["Hi", "More"]}, 81, "writing", [USER], ("Hi", "More")),
        ({"uid": "ab", "category": "arena-hard-v0.1", "cluster": "x", "prompt": "Hi"}, "ab", "arena-hard-v0.1", [USER], ("Hi",)),
        ({"question_id": "ab", "turns": [{"content": "Hi"}]}, "ab", None, [USER], ("Hi",)),
        ({"prompt_id": 7, "category": "math", "prompt": ["Hi", "More"]}, 7, "math", [USER], ("Hi", "More")),
        ({"prompt": "Hi"}, 1, None, [USER], ("Hi",)),
        ({"messages": [USER, {"role": "assistant", "content": "Yes"}]}, 1, None, [USER], ("Hi",)),
        (
            {"prompt": [{"role": "system", "content": "S"}, USER]},
            1,
            None,
            [{"role": "system", "content": "S"}, USER],
            ("Hi",),
        ),
    ],
)  # fmt: skip
def test_every_form(read: Any, row: Any, identity: Any, category: Any, messages: Any, turns: Any) -> None:
    """FastChat's, arena-hard-auto's old and new, the Hub's MT-Bench, plain prompts, chats."""
    (found,) = read([row])
    assert found[:4] == (identity, category, messages, turns)


def test_the_next_answer_sees_those_before_it(read: Any) -> None:
    """User and assistant in turn, the answers' own texts."""
    (found,) = read([{"turns": ["one", "two", "three"]}])
    assert found.conversation([]) == [{"role": "user", "content": "one"}]
    assert [message["content"] for message in found.conversation(["A", "B"])] == ["one", "A", "two", "B", "three"]
    assert [message["role"] for message in found.conversation(["A"])] == ["user", "assistant", "user"]


def test_ids_that_come_twice(read: Any) -> None:
    """A question's id may not; a prompt's own may, then rows' numbers are taken."""
    with pytest.raises(
        SalsaError, match=r"q\.jsonl, row 3, question_id: 5 is also the id of row 1; give each question its own id"
    ):
        read([{"question_id": 5, "prompt": "a"}, {"question_id": 6, "prompt": "b"}, {"question_id": 5, "prompt": "c"}])
    found = read(
        [{"prompt_id": "x", "prompt": "a"}, {"prompt_id": "y", "prompt": "b"}, {"prompt_id": "x", "prompt": "a"}]
    )
    assert [one.id for one in found] == [1, 2, 3]
    assert [one.id for one in read([{"prompt_id": "x", "prompt": "a"}])] == ["x"]


def test_ids_of_other_types(read: Any) -> None:
    """81.0 is 81, as pandas writes it; a null beside an id of another column is ignored."""
    rows = [
        {"question_id": 81.0, "prompt": "a"},
        {"question_id": None, "uid": "x", "prompt": "b"},
        {"uid": "81.0", "prompt": "c"},
    ]
    assert [(one.id, type(one.id)) for one in read(rows)] == [(81, int), ("x", str), ("81.0", str)]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"question_id": None, "prompt": "a"}, "q.jsonl, row 1, question_id: an id must be text or a whole number, not null; give every row its id"),
        ({"question_id": None, "uid": None, "prompt": "a"}, "q.jsonl, row 1, question_id: an id must be"),
        ({"uid": 1.5, "prompt": "a"}, "q.jsonl, row 1, uid: an id must be text or a whole number, not the number 1.5; give"),
        ({"uid": float("nan"), "prompt": "a"}, "q.jsonl, row 1, uid: an id must be text or a whole number, not the number nan; give"),
        ({"prompt_id": True, "prompt": "a"}, "q.jsonl, row 1, prompt_id: an id must be text or a whole number, not true; give"),
        ({"prompt_id": ["a"], "prompt": "a"}, "q.jsonl, row 1, prompt_id: an id must be text or a whole number, not the list"),
        ({"turns": []}, "q.jsonl, row 1, turns: must be a list of user turns, not an empty list"),
        ({"turns": "text"}, "q.jsonl, row 1, turns: must be a list of user turns, not 'text'"),
        ({"turns": ["a", 3]}, "q.jsonl, row 1, turns: a turn must be text, not the number 3"),
        ({"turns": [{"text": "a"}]}, "q.jsonl, row 1, turns: a turn must be text, not null"),
        (
            {"text": "a"},
            "q.jsonl, row 1: has the columns text; it needs prompt, messages, conversations, instruction, question or turns",
        ),
        ({"prompt": []}, "q.jsonl, row 1, prompt: must be a list of {role, content} messages, not an empty list"),
    ],
)  # fmt: skip
def test_what_is_no_question_is_refused(read: Any, row: Any, said: str) -> None:
    """By its row and column."""
    with pytest.raises(SalsaError) as found:
        read([row])
    assert said in str(found.value)


def test_references_and_columns_stay(read: Any) -> None:
    """For judges, and for reward functions that ask."""
    row = {"question_id": 1, "turns": ["a"], "reference": ["42"], "extra": 3}
    assert read([row])[0].reference == ["42"] and read([row])[0].row == {}
    assert read([row], columns=True)[0].row["extra"] == 3
    assert read([{**row, "reference": []}])[0].reference is None


def test_ppos_prompts_are_the_first_turns(tmp_path: Path) -> None:
    """data.prompts reads the same forms."""
    (tmp_path / "q.jsonl").write_text(
        json.dumps({"turns": ["one", "two"]}) + "\n" + json.dumps({"prompt": ["three", "four"]})
    )
    found = datasets.prompts(Source(path=str(tmp_path / "q.jsonl")))
    assert [row["prompt"][0]["content"] for row in found] == ["one", "three"]


def test_temperatures_are_fastchats_for_its_categories(read: Any) -> None:
    """0.7 for writing, 0 for math, 0.1 for stem; generation's else; a number for all."""
    found = read([{"category": name, "prompt": "a"} for name in ("writing", "roleplay", "math", "extraction", "coding", "reasoning",
                                                                  "stem", "humanities", "arena-hard-v0.1")])  # fmt: skip
    assert [temperature(one, "category", 0.9) for one in found] == [0.7, 0.7, 0, 0, 0, 0, 0.1, 0.1, 0.9]
    assert {temperature(one, 0.0, 0.9) for one in found} == {0.0}


@pytest.mark.skipif(not DATA.is_dir(), reason="../shared/data is not here")
def test_the_real_sets() -> None:
    """MT-Bench: 80 questions of two turns; Arena-Hard v0.1: 500 of one, each with an id of its own."""
    mt = questions(Source(path=str(DATA / "mt_bench" / "question.jsonl")))
    assert len(mt) == 80 and {len(one.turns) for one in mt} == {2} and mt[0].id == 81
    assert {one.category for one in mt} == {
        "writing",
        "roleplay",
        "reasoning",
        "math",
        "coding",
        "extraction",
        "stem",
        "humanities",
    }
    arena = questions(Source(path=str(DATA / "arena_hard_v0.1" / "question.jsonl")))
    assert len({one.id for one in arena}) == 500 and {len(one.turns) for one in arena} == {1}
