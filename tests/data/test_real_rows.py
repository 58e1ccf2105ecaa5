"""Real rows of well-known data sets (../shared/hub/rows): each row as demonstration, preference and prompt is used, beside what TRL makes of
it, or refused in one line. `pytest -s` prints one of each file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from paths import SHARED
from trl_rows import HERMES, by_reward, by_sft, tokenizer_of

from salsa_peft.config.schema import Source
from salsa_peft.data import datasets
from salsa_peft.data.questions import questions
from salsa_peft.data.tokenized import tokenized_demonstrations
from salsa_peft.utils.errors import SalsaError

ROWS = SHARED / "hub" / "rows"
pytestmark = pytest.mark.skipif(not ROWS.is_dir(), reason="needs the real rows in ../shared/hub/rows")
Row = dict[str, Any]
ROLES = {"human": "user", "gpt": "assistant", "observation": "tool", "function_call": "assistant"}


def user(text: str) -> list[Row]:
    """One turn."""
    return [{"role": "user", "content": text}]


def assistant(text: str) -> list[Row]:
    """One turn."""
    return [{"role": "assistant", "content": text}]


def chat(messages: list[Row]) -> list[Row]:
    """ShareGPT's and LLaMA-Factory's messages as TRL's documentation has them."""
    found = []
    for message in messages:
        role, content = message.get("from", message.get("role")), message.get("value", message.get("content"))
        made: Row = {"role": ROLES.get(role, role)}
        if role == "function_call":
            made |= {"tool_calls": [{"type": "function", "function": json.loads(content)}]}
        elif isinstance(content, list):
            made["content"] = "".join(part["value"] for part in content if part["type"] == "text")
            for part in content:
                if part["type"] == "reasoning":
                    made["reasoning_content"] = part["value"]
                elif part["type"] == "tool_call":
                    made["tool_calls"] = [{"type": "function", "function": json.loads(part["value"])}]
        else:
            made["content"] = content
        found.append(made)
    return found


def tools(row: Row) -> Row:
    """As TRL takes them."""
    if "tools" not in row:
        return {}
    found = json.loads(row["tools"])
    return {"tools": [one if "function" in one else {"type": "function", "function": one} for one in found]}


def pairs(row: Row) -> list[Row]:
    """LDJnr's Capybara."""
    return [turn for pair in row["conversation"] for turn in user(pair["input"]) + assistant(pair["output"])]


def asked(row: Row, about: str) -> list[Row]:
    """An instruction and what it is about."""
    return user(row["instruction"] + ("\n" + row[about] if row[about] else ""))


SFT: dict[tuple[str, int], Callable[[Row], Row]] = {
    **{("ultrachat_200k", n): lambda row: {"messages": row["messages"]} for n in (1, 2)},
    ("ultrachat_200k", 3): lambda row: {"messages": row["messages"][:-1]},
    **{("ultrafeedback_binarized", n): lambda row: {"messages": row["messages"]} for n in (1, 2)},
    **{("sharegpt", n): lambda row: {"messages": chat(row["conversations"])} for n in (1, 2)},
    **{("alpaca", n): lambda row: {"prompt": asked(row, "input"), "completion": assistant(row["output"])} for n in (1, 2, 3, 4)},
    **{("dolly", n): lambda row: {"prompt": asked(row, "context"), "completion": assistant(row["response"])} for n in (1, 2, 3)},
    **{("capybara", n): lambda row: {"messages": row["messages"]} for n in (1, 2, 3)},
    ("capybara", 4): lambda row: {"messages": pairs(row)},
    **{("tool_calls", n): lambda row: {"messages": chat(row["conversations"]), **tools(row)} for n in (1, 2)},
    ("tool_calls", 3): lambda row: {"messages": chat(row["messages"]), **tools(row)},
    ("kto_and_parts", 2): lambda row: {"messages": row["messages"]},
    ("kto_and_parts", 3): lambda row: {"messages": chat(row["messages"])},
}  # fmt: skip
"""(file, row) → the row in one of TRL's own types. Rows that are not here are refused."""
REWARD: dict[tuple[str, int], Callable[[Row], Row]] = {
    **{("ultrafeedback_binarized", n): lambda row: {k: row[k] for k in ("prompt", "chosen", "rejected")} for n in (1, 2, 3)},
    **{
        ("sharegpt", n): lambda row: {"prompt": chat(row["conversations"]), **{k: chat([row[k]]) for k in ("chosen", "rejected")}}
        for n in (3, 4)
    },
    ("kto_and_parts", 4): lambda row: {k: chat(row[f"{k}_messages"]) for k in ("chosen", "rejected")},
}  # fmt: skip
PROMPTS: dict[tuple[str, int], Callable[[Row], Row]] = {
    ("ultrachat_200k", 0): lambda row: {"prompt": user(row["prompt"])},
    ("ultrafeedback_binarized", 0): lambda row: {"prompt": user(row["prompt"])},
    **{("sharegpt", n): lambda row: {"prompt": chat(row["conversations"])[:-1]} for n in (1, 2)},
    ("sharegpt", 0): lambda row: {"prompt": chat(row["conversations"])},
    ("alpaca", 0): lambda row: {"prompt": asked(row, "input")},
    ("dolly", 0): lambda row: {"prompt": asked(row, "context")},
    ("capybara", 4): lambda row: {"prompt": pairs(row)[:-1]},
    ("capybara", 0): lambda row: {"prompt": row["messages"][:-1]},
    ("tool_calls", 3): lambda row: {"prompt": chat(row["messages"])[:-1], **tools(row)},
    ("tool_calls", 0): lambda row: {"prompt": chat(row["conversations"])[:-1], **tools(row)},
    **{("kto_and_parts", n): lambda row: {"prompt": chat(row["messages"])[:-1]} for n in (1, 2, 3)},
    ("kto_and_parts", 4): lambda row: {"prompt": chat(row["chosen_messages"])[:-1]},
    ("mt_bench_questions", 0): lambda row: {"prompt": user(row["turns"][0])},
    ("arena_hard_v0.1", 0): lambda row: {"prompt": user(row["prompt"])},
}
"""(file, row), row 0 for all of a file that are not named."""
REFUSED = {
    (
        "demonstrations",
        "kto_and_parts",
        1,
    ): "every row has label: false (an undesirable answer) and is left out, so no row is left; add rows with label: true",
    ("demonstrations", "ultrafeedback_binarized", 3): "messages: has no assistant turn; add one",
    ("demonstrations", "sharegpt", 3): "conversations: has no assistant turn; add one",
    ("demonstrations", "sharegpt", 4): "conversations: has no assistant turn; add one",
    (
        "preferences",
        "kto_and_parts",
        1,
    ): "it needs chosen and rejected; rows with a `label` are KTO data without pairs",
    (
        "preferences",
        "kto_and_parts",
        2,
    ): "it needs chosen and rejected; rows with a `label` are KTO data without pairs",
}
"""Lines that say more than which columns there are."""


def numbered(name: str) -> list[Row]:
    """A file's rows."""
    return [json.loads(line) for line in (ROWS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


FILES = sorted(path.stem for path in ROWS.glob("*.jsonl") if path.stem != "judge_prompts") if ROWS.is_dir() else []
CASES = [(name, number) for name in FILES for number in range(1, len(numbered(name)) + 1)]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Its template shows tools, calls and thoughts."""
    return tokenizer_of(HERMES)


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> Any:
    import tiny

    return tiny.make_base(tokenizer, max_position_embeddings=64)


@pytest.fixture
def one(tmp_path: Path) -> Callable[[str, int], tuple[Row, Source]]:
    """A row, and the source of a file of it alone."""

    def make(name: str, number: int) -> tuple[Row, Source]:
        row = numbered(name)[number - 1]
        path = tmp_path / f"{name}.jsonl"
        path.write_text(json.dumps(row) + "\n", encoding="utf-8")
        return row, Source(path=str(path))

    return make


def refused(kind: str, name: str, number: int, read: Callable[[], Any]) -> None:
    """In one line with the file and what was found."""
    with pytest.raises(SalsaError) as caught:
        read()
    line = str(caught.value)
    assert line.isprintable() and f"{name}.jsonl" in line
    assert REFUSED.get((kind, name, number), "row 1: has the columns ") in line
    print(f"{kind}, {name} row {number} refused: {line}")


def show(kind: str, name: str, number: int, tokenizer: Any, ours: Any, theirs: Any) -> None:
    """Both, for people: a file's first row."""
    if number == 1:
        print(f"{kind}, {name} row {number}\n  ours: {tokenizer.decode(ours)!r}\n  TRL:  {tokenizer.decode(theirs)!r}")


@pytest.mark.parametrize(("name", "number"), CASES)
class TestEveryRow:
    def test_as_a_demonstration(
        self, one: Any, tokenizer: Any, model: Any, tmp_path: Path, name: str, number: int
    ) -> None:
        """Ids and labels of TRL's SFTTrainer and its collator."""
        from datasets import Dataset, Features, Json

        row, source = one(name, number)
        if (name, number) not in SFT:
            refused("demonstrations", name, number, lambda: datasets.demonstrations(source, tokenizer))
            return
        given = SFT[name, number](row)
        rows = Dataset.from_list([given], features=Features({key: Json() for key in given}))
        ((ids, labels),) = by_sft(
            tokenizer, model, tokenized_demonstrations(datasets.demonstrations(source, tokenizer), tokenizer), tmp_path
        )
        theirs = by_sft(tokenizer, model, rows, tmp_path)
        show("demonstration", name, number, tokenizer, ids, theirs[0][0])
        assert (ids, labels) == theirs[0] and any(label != -100 for label in labels)

    def test_as_a_preference(
        self, one: Any, tokenizer: Any, model: Any, tmp_path: Path, name: str, number: int
    ) -> None:
        """Ids of TRL's RewardTrainer, after TRL's maybe_extract_prompt where the row is TRL's."""
        from datasets import Dataset, Features, Json
        from trl.data_utils import maybe_extract_prompt

        row, source = one(name, number)
        if (name, number) not in REWARD:
            refused("preferences", name, number, lambda: datasets.preferences(source, tokenizer))
            return
        given = maybe_extract_prompt(REWARD[name, number](row))
        rows = Dataset.from_list([given], features=Features({key: Json() for key in given}))
        (ours,) = by_reward(tokenizer, model, datasets.to_dataset(datasets.preferences(source, tokenizer)), tmp_path)
        (theirs,) = by_reward(tokenizer, model, rows, tmp_path)
        show("preference", name, number, tokenizer, ours["chosen_ids"], theirs["chosen_ids"])
        assert ours == theirs and ours["chosen_ids"] != ours["rejected_ids"]

    def test_as_a_prompt(self, one: Any, tokenizer: Any, name: str, number: int) -> None:
        """Ids of TRL's own template call, for PPO and as a question."""
        from trl.data_utils import apply_chat_template

        row, source = one(name, number)
        make = PROMPTS.get((name, number), PROMPTS.get((name, 0)))
        if make is None:
            refused("prompts", name, number, lambda: datasets.prompts(source, tokenizer=tokenizer))
            return
        given = make(row)
        theirs = tokenizer(
            apply_chat_template({"prompt": given["prompt"]}, tokenizer, tools=given.get("tools"))["prompt"]
        )["input_ids"]
        (ours,) = datasets.prompts(source, tokenizer=tokenizer)
        ids = datasets.prompt_tokens(ours, tokenizer)
        show("prompt", name, number, tokenizer, ids, theirs)
        assert ids == theirs
        (question,) = questions(source, tokenizer=tokenizer)
        assert datasets.prompt_tokens({**question.row, "prompt": question.messages}, tokenizer) == theirs


def test_mt_benchs_references_and_turns() -> None:
    """Both turns, and references where there are any, an empty second one too."""
    found = questions(Source(path=str(ROWS / "mt_bench_questions.jsonl")))
    assert [len(one.turns) for one in found] == [2] * 5
    assert found[0].reference is None and found[2].reference == ["Thomas may work at a hospital.", ""]
