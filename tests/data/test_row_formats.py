"""Rows in the shapes of well-known data sets: what is read of each, beside what TRL makes of it, and what is said or refused."""

from __future__ import annotations

import bz2
import csv
import dataclasses
import gzip
import json
import lzma
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from paths import ROOT
from small_recipe import load_checked as load_recipe
from trl_rows import HERMES, by_dpo, by_reward, by_sft, tokenizer_of

from salsa_peft.config.schema import Data, Reward, Source
from salsa_peft.data import check, datasets, row_formats
from salsa_peft.data import files as data_files
from salsa_peft.data.chat.template_fields import reads_text_arguments
from salsa_peft.data.check import count_rows
from salsa_peft.data.files import load_rows
from salsa_peft.data.questions import questions
from salsa_peft.data.tokenized import tokenized_demonstrations
from salsa_peft.recipe.__main__ import main as salsa_run
from salsa_peft.utils.errors import SalsaError

Row = dict[str, Any]


def turns(*texts: str, system: str | None = None) -> list[Row]:
    """User and assistant by turns."""
    chat = [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(texts)]
    return [{"role": "system", "content": system}, *chat] if system else chat


def sharegpt(*texts: str) -> list[Row]:
    """The same with ShareGPT's keys."""
    return [{"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(texts)]


@pytest.fixture
def put(tmp_path: Path) -> Any:
    """put(row, …) → a Source of a jsonl file."""

    def make(*rows: Row) -> Source:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return Source(path=str(path))

    return make


CALL = {"type": "function", "function": {"name": "age", "arguments": {"born": "1990-05-15"}}}
TOOL = {
    "type": "function",
    "function": {"name": "age", "description": "An age.", "parameters": {"type": "object", "properties": {}}},
}
CALLED = [
    *turns("How old?"),
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": '{"age": 31}'},
    {"role": "assistant", "content": "31."},
]
PLAIN = turns("q", "a")


class TestDemonstrations:
    @pytest.mark.parametrize(
        ("row", "expected"),
        [
            ({"messages": PLAIN}, PLAIN),
            ({"messages": sharegpt("q", "a")}, PLAIN),
            ({"messages": [{"role": "Human", "content": "q"}, {"role": "GPT", "content": "a"}]}, PLAIN),
            ({"messages": json.dumps(PLAIN)}, PLAIN),
            ({"conversations": sharegpt("q", "a", "r", "b")}, turns("q", "a", "r", "b")),
            ({"conversations": PLAIN}, PLAIN),
            ({"conversations": ["q", "a", "r", "b"]}, turns("q", "a", "r", "b")),
            ({"conversations": [{"from": "system", "value": "s"}, *sharegpt("q", "a")]}, turns("q", "a", system="s")),
            ({"conversations": sharegpt("q", "a"), "system": "s"}, turns("q", "a", system="s")),
            ({"messages": turns("q", "a", system="s"), "system": "s"}, turns("q", "a", system="s")),
            ({"conversation": [{"input": "q", "output": "a"}, {"input": "r", "output": "b"}]}, turns("q", "a", "r", "b")),
            ({"prompt": "q", "completion": "a"}, PLAIN),
            ({"prompt": turns("q"), "completion": PLAIN[1:]}, PLAIN),
            ({"prompt": turns("q"), "completion": "a"}, PLAIN),
            ({"prompt": "q", "completion": PLAIN}, PLAIN),
            ({"prompt": "[1, 2] sorted?", "completion": "[{}]"}, turns("[1, 2] sorted?", "[{}]")),
            ({"prompt": "\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant:", "completion": " b"}, turns("q", "a", "r", "b")),
            ({"instruction": "i", "input": "", "output": "o"}, turns("i", "o")),
            ({"instruction": "i", "input": "x", "output": "o", "text": "Below is …"}, turns("i\nx", "o")),
            ({"instruction": "i", "input": None, "output": "o", "system": "s", "history": [["q", "a"]]}, turns("q", "a", "i", "o", system="s")),
            ({"instruction": "i", "context": "c", "response": "r", "category": "open_qa"}, turns("i\nc", "r")),
            ({"question": "q", "answer": "a"}, PLAIN),
            ({"system_prompt": "s", "question": "q", "response": "a"}, turns("q", "a", system="s")),
            ({"query": "q", "response": "a"}, PLAIN),
            ({"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, PLAIN[1]]}, PLAIN),
            ({"messages": [{"role": "user", "content": [{"type": "text", "value": "q"}, {"type": "text", "value": "r"}]}, PLAIN[1]]}, turns("qr", "a")),
        ],
    )  # fmt: skip
    def test_every_shape(self, put: Any, row: Row, expected: list[Row]) -> None:
        found = datasets.demonstrations(put(row))
        assert found[0]["messages"] == expected

    def test_ktos_undesirable_answers_are_left_out_and_told(self, put: Any, capsys: Any) -> None:
        source = put({"messages": PLAIN, "label": True}, {"prompt": "q", "completion": "b", "label": False})
        assert datasets.demonstrations(source) == [{"messages": PLAIN}]
        assert capsys.readouterr().err == f"{source.path}: 1 of 2 rows (the first: row 2) {datasets.UNDESIRABLE}\n"

    def test_an_input_that_says_there_is_none_is_told(self, put: Any, capsys: Any) -> None:
        source = put({"instruction": "i", "input": "No input", "output": "o"})
        assert datasets.demonstrations(source)[0]["messages"] == turns("i\nNo input", "o")
        assert datasets.PLACEHOLDER_INPUT in capsys.readouterr().err

    def test_what_is_not_trained_on(self, put: Any) -> None:
        """Answers inside TRL's prompt, and turns of weight 0; a system turn moves the places."""
        weighted = [
            *turns("q"),
            {"role": "assistant", "content": "a", "weight": 0},
            *turns("r"),
            {"role": "assistant", "content": "b", "weight": 1},
        ]
        rows = datasets.demonstrations(
            put(
                {"prompt": turns("q", "a", "r"), "completion": turns("", "b")[1:]},
                {"messages": weighted, "system": "s"},
                {"messages": [{"role": "user", "content": "q", "loss_weight": 0.0}, {"role": "assistant", "content": "a", "loss_weight": 1.0}]},
            )
        )  # fmt: skip
        assert [row.get("skipped") for row in rows] == [[1], [2], None]
        history = {"instruction": "i", "output": "o", "history": [["q", "a"]]}
        assert "skipped" not in datasets.demonstrations(put(history))[0]
        assert rows[1]["messages"] == turns("q", "a", "r", "b", system="s")

    @pytest.mark.parametrize(
        ("row", "said"),
        [
            ({"text": "### Human: hi ### Assistant: yo"}, "rows.jsonl, row 1: has the columns text; it needs messages, conversations, prompt and completion or instruction and output; the loss needs to know which part is the assistant's, and `text` alone does not show it"),
            ({"chosen": "a", "rejected": "b"}, "rows.jsonl, row 1: has the columns chosen, rejected; it needs messages, conversations, prompt and completion or instruction and output; rows with chosen and rejected belong to data.preferences"),
            ({"prompt": "<|im_start|>user\nq<|im_end|>\n", "completion": "a"}, "rows.jsonl, row 1, prompt: is already rendered with a chat template ('<|im_start|>user\\nq<|im_end|>\\n'), and the recipe's template would be applied to it again; give messages, or the text of the turn alone"),
            ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, PLAIN[1]]},
             "rows.jsonl, row 1, messages: content has a part of type 'image_url', but only text is supported"),
            ({"messages": [*turns("q"), {"role": "assistant", "content": "a", "weight": 0}]}, "messages: every assistant turn has weight 0, so there is nothing to learn; leave out the row"),
            ({"messages": [*turns("q"), {"role": "assistant", "content": "a", "weight": 0.5}]}, "messages: weight must be 0 or 1, not 0.5; other loss weights are not supported"),
            ({"messages": turns("q", "a", system="s"), "system": "t"}, "rows.jsonl, row 1, system: differs from the system turn at the start of the messages; remove one of the two"),
            ({"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": "age(1)"}], "tools": "[]"},
             "rows.jsonl, row 1, conversations: 'age(1)' is not valid JSON (Expecting value: line 1 column 1 (char 0))"),
            ({"messages": PLAIN, "tools": "hammer"}, "rows.jsonl, row 1, tools: 'hammer' is not valid JSON (Expecting value: line 1 column 1 (char 0))"),
            ({"messages": PLAIN, "tools": [1]}, "rows.jsonl, row 1, tools: a tool must be the description of a function (JSON), not 1"),
            ({"messages": PLAIN, "chat_template_kwargs": [1]}, "rows.jsonl, row 1, chat_template_kwargs: must be a mapping of template options, not [1]"),
            ({"instruction": "i", "history": ["x"], "output": "o"}, "rows.jsonl, row 1, history: must be pairs of a question and its answer, not 'x'"),
            ({"messages": [*turns("q"), {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": "[1]"}]}]},
             "rows.jsonl, row 1, messages: the arguments of f must be an object, not [1]"),
        ],
    )  # fmt: skip
    def test_what_is_refused(self, put: Any, row: Row, said: str) -> None:
        """In one line, by row and column."""
        with pytest.raises(SalsaError) as refusal:
            datasets.demonstrations(put(row))
        assert said in str(refusal.value) and "\n" not in str(refusal.value)


PAIR = {"chosen": turns("q", "+"), "rejected": turns("q", "-")}


class TestPreferences:
    @pytest.mark.parametrize(
        ("row", "expected"),
        [
            ({"prompt": "q", "chosen": "+", "rejected": "-"}, PAIR),
            ({"question": "q", "chosen": "+", "rejected": "-"}, PAIR),
            ({"prompt": "q", "chosen": PAIR["chosen"][1], "rejected": PAIR["rejected"][1]}, PAIR),
            ({"conversations": sharegpt("q"), "chosen": {"from": "gpt", "value": "+"}, "rejected": {"from": "gpt", "value": "-"}}, PAIR),
            ({"chosen_messages": PAIR["chosen"], "rejected_messages": PAIR["rejected"]}, PAIR),
            ({"instruction": "q", "chosen_response": "+", "rejected_response": "-"}, PAIR),
            ({"instruction": "q", "input": "x", "chosen": "+", "rejected": "-"}, {"chosen": turns("q\nx", "+"), "rejected": turns("q\nx", "-")}),
            ({"prompt": "q", **PAIR, "score_chosen": 8.5, "score_rejected": 8.5}, PAIR),
            ({"prompt": turns("q"), **PAIR}, PAIR),
            ({"chosen": "\n\nHuman: q\n\nAssistant: +", "rejected": "\n\nHuman: q\n\nAssistant: -"}, PAIR),
            ({"prompt": "\n\nHuman: q\n\nAssistant:", "chosen": "\n\nHuman: q\n\nAssistant: +", "rejected": "\n\nHuman: q\n\nAssistant: -"}, PAIR),
            ({"prompt": "\n\nHuman: q\n\nAssistant:", "chosen": " +", "rejected": " -"}, PAIR),
            ({"system": "s", "question": "q", "chosen": "+", "rejected": "-"}, {"chosen": turns("q", "+", system="s"), "rejected": turns("q", "-", system="s")}),
            ({"system": "s", **PAIR}, {"chosen": turns("q", "+", system="s"), "rejected": turns("q", "-", system="s")}),
            ({"system": "", **PAIR}, PAIR),
            ({"prompt": turns("q", system="s"), **PAIR}, {"chosen": turns("q", "+", system="s"), "rejected": turns("q", "-", system="s")}),
        ],
    )  # fmt: skip
    def test_every_shape(self, put: Any, capsys: Any, row: Row, expected: Row) -> None:
        """The prompt stands in both, once; nothing is said."""
        assert datasets.preferences(put(row)) == [expected] and capsys.readouterr().err == ""

    def test_texts_that_hold_the_prompt(self, put: Any, capsys: Any) -> None:
        """Only where both do, and then it is said."""
        assert datasets.preferences(put({"prompt": "hi", "chosen": "hi good", "rejected": "hi bad"})) == [
            {"chosen": turns("hi", "good"), "rejected": turns("hi", "bad")}
        ]
        assert datasets.REPEATED_PROMPT in capsys.readouterr().err
        assert datasets.preferences(put({"prompt": "hi", "chosen": "hi there", "rejected": "no"}))[0][
            "chosen"
        ] == turns("hi", "hi there")
        assert capsys.readouterr().err == ""

    def test_a_prompt_that_is_not_read_is_told(self, put: Any, capsys: Any) -> None:
        """TRL reads the chats' own too."""
        assert datasets.preferences(put({"prompt": "other", **PAIR})) == [PAIR]
        assert datasets.UNRELATED_PROMPT in capsys.readouterr().err

    def test_unpaired_rows_are_refused(self, put: Any) -> None:
        with pytest.raises(
            SalsaError,
            match=r"rows\.jsonl, row 1: has the columns label, messages; it needs chosen and rejected; rows with a `label` are KTO data without pairs",
        ):
            datasets.preferences(put({"messages": PLAIN, "label": True}))

    def test_only_a_null_column_is_called_null(self, put: Any) -> None:
        for row, null in (
            ({"prompt": "q", "chosen": "a", "rejected": "b"}, False),
            ({"prompt": None, "score": 1}, True),
        ):
            with pytest.raises(SalsaError) as caught:
                datasets.demonstrations(put(row))
            assert ("prompt is null" in str(caught.value)) == null

    def test_text_without_a_prompt_is_refused(self, put: Any) -> None:
        with pytest.raises(
            SalsaError,
            match=r"rows\.jsonl, row 1: has the columns chosen, rejected; it needs prompt \(or question, instruction or conversations\), because the answers do not contain the prompt",
        ):
            datasets.preferences(put({"chosen": "a", "rejected": "b"}))


class TestPrompts:
    @pytest.mark.parametrize(
        ("row", "expected"),
        [
            ({"prompt": "\n\nHuman: q\n\nAssistant:"}, turns("q")),
            ({"prompt": "q", "system": "s"}, turns("q", system="s")),
            ({"conversations": sharegpt("q", "a", "r", "b")}, turns("q", "a", "r")),
            ({"conversation": [{"input": "q", "output": "a"}]}, turns("q")),
            ({"instruction": "i", "context": "c", "response": "r"}, turns("i\nc")),
            ({"question": "q", "answer": "a"}, turns("q")),
            ({"chosen": "\n\nHuman: q\n\nAssistant: +", "rejected": "\n\nHuman: q\n\nAssistant: -"}, turns("q")),
            ({"chosen_messages": PAIR["chosen"], "chosen": PAIR["chosen"], "rejected": PAIR["rejected"]}, turns("q")),
            ({"prompt": [{"role": "user", "content": [{"type": "text", "text": "q"}]}]}, turns("q")),
            ({"messages": CALLED}, CALLED[:-1]),
        ],
    )  # fmt: skip
    def test_every_shape(self, put: Any, row: Row, expected: list[Row]) -> None:
        """For PPO, and as questions."""
        assert datasets.prompts(put(row)) == [{"prompt": expected}]
        assert questions(put(row))[0].messages == expected

    def test_what_stands_behind_the_last_user_turn_stays_unless_it_was_answered(self, put: Any) -> None:
        ask, brief, answer = (
            {"role": role, "content": text}
            for role, text in (("user", "q"), ("system", "be brief"), ("assistant", "a"))
        )
        rows = put({"messages": [ask, brief]}, {"messages": [ask, answer, brief]}, {"messages": [ask, answer]})
        assert [row["prompt"] for row in datasets.prompts(rows)] == [[ask, brief], [ask], [ask]]

    def test_a_system_turn_beside_the_prompt_is_told(self, put: Any, capsys: Any) -> None:
        datasets.prompts(put({"prompt": "q", "messages": turns("q", "a", system="s")}))
        assert datasets.PROMPT_WITHOUT_SYSTEM in capsys.readouterr().err


class TestTools:
    @pytest.mark.parametrize(
        "row",
        [
            {"messages": CALLED, "tools": [TOOL]},
            {"messages": CALLED, "tools": json.dumps([TOOL["function"]])},
            {"messages": [CALLED[0], {**CALLED[1], "content": None}, *CALLED[2:]], "tools": [TOOL]},
            {"messages": [CALLED[0], {"role": "assistant", "tool_calls": json.dumps([CALL["function"]])}, *CALLED[2:]], "tools": TOOL},
            {"messages": [CALLED[0], {"role": "assistant", "function_call": {"name": "age", "arguments": '{"born": "1990-05-15"}'}},
                          {"role": "function", "content": CALLED[2]["content"]}, CALLED[3]], "tools": [TOOL]},
            {"conversations": [{"from": "human", "value": "How old?"}, {"from": "function_call", "value": json.dumps(CALL["function"])},
                               {"from": "observation", "value": '{"age": 31}'}, {"from": "gpt", "value": "31."}], "tools": json.dumps([TOOL])},
            {"messages": [CALLED[0], {"role": "assistant", "content": [{"type": "tool_call", "value": json.dumps(CALL["function"])}]}, *CALLED[2:]],
             "tools": [TOOL]},
        ],
    )  # fmt: skip
    def test_every_shape(self, put: Any, row: Row) -> None:
        """OpenAI's old and new, LLaMA-Factory's, parts; arguments become objects, bare functions are wrapped."""
        assert datasets.demonstrations(put(row)) == [{"messages": CALLED, "tools": [TOOL]}]

    def test_thoughts_as_a_part(self, put: Any) -> None:
        content = [{"type": "reasoning", "value": "hm"}, {"type": "text", "value": "a"}]
        (row,) = datasets.demonstrations(put({"messages": [*turns("q"), {"role": "assistant", "content": content}]}))
        assert row["messages"][1] == {"role": "assistant", "content": "a", "reasoning_content": "hm"}

    def test_arrow_adds_no_keys(self, put: Any, tmp_path: Path) -> None:
        """Parquet gives every message the keys of all; templates ask whether one is there."""
        from datasets import Dataset

        other = {"type": "function", "function": {"name": "sum", "arguments": {"of": [1, 2]}}}
        rows = [
            {"messages": CALLED},
            {"messages": PLAIN},
            {"messages": [*turns("q"), {"role": "assistant", "content": "", "tool_calls": [other]}]},
        ]
        Dataset.from_list(rows).to_parquet(str(tmp_path / "rows.parquet"))
        assert datasets.demonstrations(Source(path=str(tmp_path / "rows.parquet"))) == rows

    def test_rows_for_trl_are_what_they_were(self) -> None:
        """Arguments of other types in every row, numbers as text, nulls, no tools: Arrow's structs would refuse or change them."""
        calls = [{"x": 1}, {"x": "1"}, {"x": [1, {"y": None}]}, {"z": 2.5}]
        rows = [{"messages": [{"role": "assistant", "content": "42", "tool_calls": [{"function": {"name": "f", "arguments": one}}]}],
                 "id": number, "answer": "42"} for number, one in enumerate(calls)]  # fmt: skip
        rows[1]["tools"] = [TOOL]
        made = datasets.to_dataset(rows)
        assert made.to_list() == [{"tools": None, **row} for row in rows]
        assert made.map(lambda row: {"n": 1}).filter(lambda row: row["n"]).to_list() == [
            {"tools": None, **row, "n": 1} for row in rows
        ]


BARE = (
    "{% for message in messages if message.role != 'tool' %}<{{ message.role }}>{% if message.role == 'assistant' %}{% generation %}"
    "{{ message.content + eos_token }}{% endgeneration %}{% else %}{{ message.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TEXT_ARGUMENTS = HERMES.replace("call.function.arguments | tojson", "call.function.name + call.function.arguments")
PARTS = BARE.replace("message.content + eos_token", "message.content[0].text + eos_token").replace(
    "{{ message.content }}", "{% for part in message.content if part.type == 'text' %}{{ part.text }}{% endfor %}"
)


class TestTemplates:
    ROW: ClassVar[Row] = {"messages": [*CALLED[:3], {**CALLED[3], "reasoning_content": "thirty-one"}], "tools": [TOOL]}

    def test_a_template_that_shows_all(self, put: Any, capsys: Any) -> None:
        tokenizer = tokenizer_of(HERMES)
        (row,) = datasets.demonstrations(put(self.ROW), tokenizer)
        assert row == self.ROW and capsys.readouterr().err == ""
        for needle in ("age", "1990-05-15", "thirty-one", '{"age": 31}', "An age."):
            assert needle in tokenizer.apply_chat_template(row["messages"], tools=row["tools"], tokenize=False)

    def test_every_field_that_is_dropped_is_told(self, put: Any, capsys: Any) -> None:
        """Once for a file; and that an answer is then empty."""
        source = put(self.ROW, {"messages": PLAIN}, self.ROW)
        assert len(datasets.demonstrations(source, tokenizer_of(BARE))) == 3
        said = capsys.readouterr().err.splitlines()
        dropped = ["`reasoning_content` in their messages", "`tool_calls` in their messages", "`tools`", "a tool turn"]
        told = [datasets.DROPPED_FIELD.format(field) for field in dropped] + [datasets.EMPTY_ANSWER]
        assert said == [f"{source.path}: 2 of 3 rows (the first: row 1) {one}" for one in told]

    def test_of_prompts_and_pairs(self, put: Any, capsys: Any) -> None:
        datasets.prompts(put({"prompt": "q", "tools": [TOOL]}), tokenizer=tokenizer_of(BARE))
        datasets.preferences(
            put({"prompt": "q", "chosen": CALLED[1], "rejected": "-", "tools": [TOOL]}), tokenizer_of(BARE)
        )
        questions(put({"prompt": "q", "tools": [TOOL]}), tokenizer=tokenizer_of(BARE))
        assert capsys.readouterr().err.count("`tools` that the tokenizer's chat template drops") == 3

    def test_what_the_user_says_is_not_dropped(self, put: Any) -> None:
        """It is refused: nothing could be learned."""
        mute = BARE.replace("{{ message.content }}", "")
        with pytest.raises(
            SalsaError,
            match=r"rows\.jsonl, row 1, messages: the tokenizer's chat template drops the content of turn 1 \(user\); set model\.chat_template to another template",
        ):
            datasets.demonstrations(put({"messages": turns("xyz", "a")}), tokenizer_of(mute))

    def test_arguments_as_text(self, put: Any) -> None:
        """Where the template adds them to text (DeepSeek's)."""
        tokenizer = tokenizer_of(TEXT_ARGUMENTS)
        assert reads_text_arguments(tokenizer) and not reads_text_arguments(tokenizer_of(HERMES))
        (row,) = datasets.demonstrations(put(self.ROW), tokenizer)
        assert row["messages"][1]["tool_calls"][0]["function"]["arguments"] == '{"born": "1990-05-15"}'
        assert '<call>age age{"born": "1990-05-15"}' in tokenizer.apply_chat_template(row["messages"], tokenize=False)

    def test_content_as_parts(self, put: Any) -> None:
        """Where the template shows nothing of text alone (LLaVA's)."""
        tokenizer = tokenizer_of(PARTS)
        (row,) = datasets.demonstrations(put({"messages": PLAIN}), tokenizer)
        assert tokenizer.apply_chat_template(row["messages"], tokenize=False) == "<user>q<assistant>a<eos>"
        assert tokenizer.decode(datasets.prompt_tokens({"prompt": turns("q")}, tokenizer)) == "<user>q<assistant>"
        assert (
            tokenizer.decode(datasets.prompt_tokens({"prompt": row["messages"][:1]}, tokenizer)) == "<user>q<assistant>"
        )

    def test_a_prompts_tools_and_options_are_in_its_tokens(self, put: Any) -> None:
        tokenizer = tokenizer_of(HERMES + "{{ mood }}")
        rows = datasets.prompts(
            put({"prompt": "q", "tools": json.dumps([TOOL]), "chat_template_kwargs": {"mood": "glad"}}),
            tokenizer=tokenizer,
        )
        expected = tokenizer.apply_chat_template(
            turns("q"), tools=[TOOL], add_generation_prompt=True, mood="glad", tokenize=False
        )
        assert tokenizer.decode(datasets.prompt_tokens(rows[0], tokenizer)) == expected and "glad" in expected


@pytest.fixture(scope="module")
def tiny_model() -> Any:
    import tiny

    return tiny.make_base(tokenizer_of(HERMES), max_position_embeddings=1024)


class TestBesideTRL:
    """Id by id."""

    def test_demonstrations(self, put: Any, tiny_model: Any, tmp_path: Path) -> None:
        """Of TRL's own types TRL is given the rows as they are: tools as JSON text, calls, answers inside a prompt."""
        from datasets import Dataset, Features, Json

        tokenizer = tokenizer_of(HERMES)
        rows: list[Row] = [
            {"messages": PLAIN},
            {"messages": CALLED, "tools": json.dumps([TOOL])},
            {"prompt": turns("q", "a", "r"), "completion": turns("", "b")[1:]},
            {"prompt": turns("q", system="s"), "completion": turns("", "b")[1:], "tools": json.dumps([TOOL])},
        ]
        ours = by_sft(
            tokenizer,
            tiny_model,
            tokenized_demonstrations(datasets.demonstrations(put(*rows), tokenizer), tokenizer),
            tmp_path,
        )
        for row, found in zip(rows, ours, strict=True):
            features = Features({name: Json() for name in row})
            plain = Dataset.from_list([{**row, **({"tools": [TOOL]} if "tools" in row else {})}], features=features)
            assert found == by_sft(tokenizer, tiny_model, plain, tmp_path)[0]
        trained = [tokenizer.decode([label for label in labels if label != -100]) for _, labels in ours]
        assert trained == ["a<eos>", '<call>age {"born": "1990-05-15"}<eos>31.<eos>', "b<eos>", "b<eos>"]

    def test_preferences(self, put: Any, tiny_model: Any, tmp_path: Path) -> None:
        """The reward model's rows, and DPO's."""
        from datasets import Dataset, Features, Json

        tokenizer = tokenizer_of(HERMES)
        rows: list[Row] = [
            PAIR,
            {"prompt": turns("q"), "chosen": [CALLED[1]], "rejected": turns("", "-")[1:], "tools": [TOOL]},
        ]
        ours = datasets.to_dataset(datasets.preferences(put(*rows), tokenizer))
        for place, row in enumerate(rows):
            theirs = Dataset.from_list([row], features=Features({name: Json() for name in row}))
            mine = ours.select([place])
            assert by_reward(tokenizer, tiny_model, mine, tmp_path) == by_reward(
                tokenizer, tiny_model, theirs, tmp_path
            )
            found = by_dpo(tokenizer, tiny_model, mine, tmp_path)
            assert found == by_dpo(tokenizer, tiny_model, theirs, tmp_path)
            asked = {"prompt": turns("q"), **({"tools": [TOOL]} if "tools" in row else {})}
            assert found[0]["prompt_ids"] == datasets.prompt_tokens(asked, tokenizer)


def test_functions_are_the_older_name_of_tools(put: Any) -> None:
    """OpenAI's function_call and functions; a column of that name with other data is none."""
    described = {"name": "f", "parameters": {}}
    chat = [turns("q")[0], {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}}]
    for given in ([described], json.dumps([described])):
        found = datasets.demonstrations(put({"messages": chat, "functions": given}))
        assert found[0]["tools"] == [{"type": "function", "function": described}]
    for other in (["sin", "cos"], "sin", 3, [], [{"id": 1}]):
        assert "tools" not in datasets.demonstrations(put({"messages": PLAIN, "functions": other}))[0]


class TestBeforeAStageBegins:
    """data/check.py"""

    def test_prompts_with_tools_are_refused_for_trls_sampling_trainers(self, put: Any) -> None:
        """Their prompts are rendered without; ours are not."""
        source = put({"prompt": "q"}, {"prompt": "q", "tools": [TOOL]})
        recipe: Any = SimpleNamespace(
            data=Data(prompts=source), evaluate=SimpleNamespace(prompts={}), reward=Reward(), synthetic=None
        )
        check.check_every_row(recipe, {"ppo"})
        with pytest.raises(
            SalsaError,
            match=r"data\.prompts: 1 rows \(the first: row 2\) have `tools` or `chat_template_kwargs`, which TRL's rloo ignores; remove the columns, or use algorithm ppo",
        ):
            check.check_every_row(recipe, {"rloo"})

    def test_a_reward_function_takes_columns_that_the_prompts_have(self, put: Any, tmp_path: Path) -> None:
        """In PPO's prompts and in evaluation's; `prompt` itself is not passed, as in TRL."""
        (tmp_path / "own_columns.py").write_text(
            "def plain(completions, level, log_metric, k=1, *, finished, **rest): return []\n"
            "def other(prompt, completions, *, answer): return []\n"
            "first = lambda completions, answer: []\n"
        )
        source = put({"prompt": "q"}, {"prompt": "q", "level": 3})
        for name, absent in (("plain", None), ("other", "prompt, answer"), ("first", "answer")):
            for own, asked, stage in ((source, {}, "ppo"), (None, {"mine": source}, "evaluate")):
                recipe: Any = SimpleNamespace(
                    data=Data(prompts=own), evaluate=SimpleNamespace(prompts=asked),
                    reward=Reward(model=f"{tmp_path}/own_columns:{name}"), synthetic=None,
                )  # fmt: skip
                if absent is None:
                    check.check_every_row(recipe, {stage})
                    continue
                line = rf"reward.model: {name} requires {absent}, which is neither a column of .*jsonl \(columns besides the prompt: level\)"
                with pytest.raises(SalsaError, match=line):
                    check.check_every_row(recipe, {stage})

    @pytest.mark.parametrize("disk", [True, False])
    def test_folders_are_looked_at_too(self, tmp_path: Path, disk: bool) -> None:
        from datasets import Dataset

        folder = tmp_path / "set"
        made = Dataset.from_list([{"messages": PLAIN}, {"messages": turns("q")}])
        folder.mkdir()
        made.save_to_disk(str(folder)) if disk else made.to_json(str(folder / "train.jsonl"))
        recipe: Any = SimpleNamespace(
            data=Data(demonstrations=Source(path=str(folder))), evaluate=SimpleNamespace(prompts={}), synthetic=None
        )
        with pytest.raises(SalsaError, match="set, row 2, messages: has no assistant turn; add one"):
            check.check_every_row(recipe, {"data/demonstrations"})

    def test_rows_of_the_hub_are_looked_at_too(self, tmp_path: Path, monkeypatch: Any) -> None:
        """A part of them, and those of the stages that are to be made."""
        import huggingface_hub

        rows = [{"prompt": f"q {place}"} for place in range(1200)]
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: str(tmp_path / "a.jsonl"))
        source = Source(path="hf://datasets/me/x/a.jsonl")
        recipe: Any = SimpleNamespace(
            data=Data(prompts=source), reward=Reward(), evaluate=SimpleNamespace(prompts={}), synthetic=None
        )
        seen = []
        reader = check.READERS["prompts"]
        monkeypatch.setitem(check.READERS, "prompts", lambda one: seen.append(reader(one)) or seen[-1])
        check.check_every_row(recipe, {"ppo"})
        check.check_every_row(recipe, {"reward"}, hub=True)
        assert not seen
        check.check_every_row(recipe, {"ppo"}, hub=True)
        whole = datasets.prompts(dataclasses.replace(source, limit=1100))
        assert len(seen[0]) == check.MAX_HUB_ROWS and seen[0] == whole[: check.MAX_HUB_ROWS]
        (tmp_path / "a.jsonl").write_text('{"prompt": "q"}\n{"question_id": 3}\n')
        with pytest.raises(
            SalsaError,
            match=r"hf://datasets/me/x/a\.jsonl, row 2: has the columns question_id; it needs prompt, messages, conversations, instruction, question or turns",
        ):
            check.check_every_row(recipe, {"ppo"}, hub=True)

    @pytest.mark.parametrize("key", ["preferences", "prompts"])
    def test_the_hub_out_of_reach_is_said_before_a_seed_is_trained(self, tmp_path: Path, key: str, capfd: Any) -> None:
        words = ["quickstart", "--lora", "--output-dir", str(tmp_path / "out"), "--set", f"data.{key}=me/x"]
        assert salsa_run(words) == 2
        assert "huggingface.co/datasets/me/x: not in the local cache, and the Hub" in capfd.readouterr().err
        assert not (tmp_path / "out").exists()
        assert salsa_run([*words, "--dry-run"]) == 0, "a plan fetches nothing"


def test_the_page_names_the_columns_in_their_order() -> None:
    """Each kind of data has one row of the table in docs/data.md, with every column that is read."""
    lines = (ROOT / "docs" / "data.md").read_text(encoding="utf-8").splitlines()
    table = {
        kind: next(line for line in lines if line.startswith(f"| `data.{kind}`"))
        for kind in ("demonstrations", "preferences", "prompts")
    }
    names = {
        "demonstrations": [name for shape in row_formats.DEMONSTRATIONS for name in shape],
        "preferences": [*(pair[0] for pair in row_formats.PAIR_COLUMNS), *row_formats.PROMPT_COLUMNS],
        "prompts": [*row_formats.PROMPTS],
    }
    for kind, found in names.items():
        assert [name for name in found if f"`{name}`" not in table[kind]] == []
    pieces = table["demonstrations"].split("|")[2].split(" · ")
    firsts = list(dict.fromkeys(shape[0] for shape in row_formats.DEMONSTRATIONS))
    assert [piece.split("`")[1] for piece in pieces] == firsts
    for names_of, piece in zip(firsts, pieces, strict=True):
        answers = [shape[1] for shape in row_formats.DEMONSTRATIONS if shape[0] == names_of and len(shape) == 2]
        assert [name for name in piece.rpartition(" and ")[2].split("`")[1::2] if answers] == answers


class TestFolders:
    """What datasets reads, or leaves out, is said by file."""

    GOOD = '{"prompt": "q", "completion": "a"}\n'

    @pytest.mark.parametrize(
        ("name", "text", "line"),
        [
            ("b.jsonl", '{"prompt": [', 'set/b\\.jsonl, row 1: b\'\\{"prompt": \\[\' is not valid JSON \\(Expecting value: line 1 column 13 \\(char 12\\)\\); write one object per line'),
            ("b.jsonl", '{"text": "x"}', r"has the columns text, but a\.jsonl has prompt, completion\. All files of a folder must have the same columns: give one file, or put files with different columns into different folders"),
            ("b.jsonl", '{"prompt": [3], "completion": "a"}', r"set/b\.jsonl, row 1, prompt: is the list \[3\], but text in a\.jsonl; all files of a folder must have the same types"),
            ("b.csv", "prompt,completion\n1,q,a\n", r"set/b\.csv, row 1: has more fields than the header; put text with commas in quotes"),
        ],
    )  # fmt: skip
    def test_the_odd_file_is_named(self, tmp_path: Path, name: str, text: str, line: str) -> None:
        (tmp_path / "set").mkdir()
        (tmp_path / "set" / "a.jsonl").write_text(self.GOOD)
        (tmp_path / "set" / name).write_text(text)
        with pytest.raises(SalsaError, match=line) as caught:
            datasets.demonstrations(Source(path=str(tmp_path / "set")))
        assert "\n" not in str(caught.value)

    def test_a_packed_file_that_is_no_parquet(self, tmp_path: Path) -> None:
        (tmp_path / "a.parquet").write_bytes(b"PAR1 nothing")
        with pytest.raises(
            SalsaError,
            match=r"a\.parquet: is not a Parquet file",
        ):
            datasets.demonstrations(Source(path=str(tmp_path)))

    def test_a_split_that_is_not_there_accuses_no_file(self, tmp_path: Path) -> None:
        (tmp_path / "train.jsonl").write_text(self.GOOD)
        (tmp_path / "test.jsonl").write_text('{"prompt": "q"}\n')
        with pytest.raises(SalsaError, match=r"split 'dev'"):
            datasets.demonstrations(Source(path=str(tmp_path), split="dev"))

    def test_a_file_of_another_kind_is_said(self, tmp_path: Path, capsys: Any) -> None:
        folder = tmp_path / "set"
        folder.mkdir()
        (folder / "a.jsonl").write_text(self.GOOD)
        assert datasets.demonstrations(Source(path=str(folder))) and capsys.readouterr().err == ""
        (folder / "b.csv").write_text("prompt,completion\nc,d\n")
        assert len(datasets.demonstrations(Source(path=str(folder)))) == 1
        assert f"{folder}/b.csv: ignored, because the folder's other files are .jsonl\n" in capsys.readouterr().err


class TestWrapped:
    """Rows in a list inside one object."""

    ROW: ClassVar[Row] = {"prompt": "q", "completion": "a"}

    @pytest.mark.parametrize("indent", [None, 1])
    @pytest.mark.parametrize(
        ("whole", "rows"),
        [
            ({"data": [ROW] * 3}, 3),
            ({"version": "1.0", "data": [ROW] * 3, "tags": ["x"]}, 3),
            ({**ROW, "tools": [{"name": "f"}, {"name": "g"}]}, 1),
        ],
    )
    def test_they_are_found_and_counted(self, tmp_path: Path, whole: Any, rows: int, indent: int | None) -> None:
        """A row of its own with a list of objects is a row."""
        path = tmp_path / "rows.json"
        path.write_text(json.dumps(whole, indent=indent))
        assert len(data_files.load_rows(Source(path=str(path)))) == rows == count_rows(Source(path=str(path)))
        override = [f"data.demonstrations={path}", "sft.batch_size=1", "sft.micro_batch_size=1"]
        assert load_recipe("quickstart", lora="lora", overrides=override).recipe.data.demonstrations

    def test_what_is_no_list_of_rows(self, tmp_path: Path) -> None:
        path = tmp_path / "rows.json"
        for whole, line in (
            (
                {"train": [self.ROW], "test": [self.ROW]},
                "is an object with the lists train, test; put the list to read into its own file",
            ),
            (
                {"messages": [turns("q", "a")]},
                r"rows\.json, row 1, messages: must be a list of \{role, content\} messages, not the list \[\[\{'role': 'user', 'content': 'q'\}, \{'role': 'assistant',…; the file seems to hold one list per column: write one object per row",
            ),
        ):
            path.write_text(json.dumps(whole))
            with pytest.raises(SalsaError, match=line):
                datasets.demonstrations(Source(path=str(path)))


class TestFiles:
    ROWS: ClassVar[list[Row]] = [{"prompt": 'a, "b"\nc', "completion": "d\u2028e"}, {"prompt": "f", "completion": ""}]

    @pytest.mark.parametrize("suffix", [".jsonl", ".JSONL", ".ndjson", ".json", ".csv", ".tsv", ".parquet"])
    @pytest.mark.parametrize("packed", ["", ".gz", ".bz2", ".xz"])
    def test_every_kind(self, tmp_path: Path, suffix: str, packed: str) -> None:
        path = tmp_path / f"rows{suffix}"
        if suffix == ".parquet":
            if packed:
                pytest.skip("Parquet packs itself")
            from datasets import Dataset

            Dataset.from_list(self.ROWS).to_parquet(str(path))
        elif suffix in (".csv", ".tsv"):
            with path.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, ["prompt", "completion"], delimiter="\t" if suffix == ".tsv" else ",")
                writer.writeheader()
                writer.writerows(self.ROWS)
        elif suffix == ".json":
            path.write_text(json.dumps(self.ROWS, indent=1))
        else:
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.ROWS), encoding="utf-8")
        if packed:
            squeeze = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}[packed]
            whole, path = path.read_bytes(), path.with_name(path.name + packed)
            path.write_bytes(squeeze(whole))
        expected = [{"messages": turns(row["prompt"], row["completion"])} for row in self.ROWS]
        assert datasets.demonstrations(Source(path=str(path))) == expected
        recipe = load_recipe(
            "quickstart", lora="lora", overrides=[f"data.demonstrations={path}", "sft.batch_size=2", "sft.subset=1"]
        )
        assert recipe.recipe.data.demonstrations is not None

    @pytest.mark.parametrize(
        "text", ['{"data": [{"prompt": "q"}]}', '{\n "prompt": "q"\n}', '{"prompt": "q"}', '[{"prompt": "q"}]']
    )
    def test_forms_of_json(self, tmp_path: Path, text: str) -> None:
        """A list, one object over several lines, rows inside an object."""
        (tmp_path / "x.json").write_text(text)
        assert datasets.prompts(Source(path=str(tmp_path / "x.json"))) == [{"prompt": turns("q")}]
        load_recipe("quickstart", lora="lora", overrides=[f"evaluate.prompts.x={tmp_path / 'x.json'}"])

    def test_a_chat_alone_in_its_file(self, tmp_path: Path) -> None:
        (tmp_path / "x.json").write_text(json.dumps({"messages": PLAIN}, indent=1))
        assert datasets.demonstrations(Source(path=str(tmp_path / "x.json"))) == [{"messages": PLAIN}]

    def test_folders_of_save_to_disk(self, tmp_path: Path) -> None:
        """With splits or without; a split that is not there is named with those that are."""
        from datasets import Dataset, DatasetDict

        made = Dataset.from_list([{"messages": PLAIN}, {"messages": CALLED}])
        made.save_to_disk(str(tmp_path / "one"))
        DatasetDict(train=made, test=made.select([0])).save_to_disk(str(tmp_path / "two"))
        assert datasets.demonstrations(Source(path=str(tmp_path / "one"))) == [
            {"messages": PLAIN},
            {"messages": CALLED},
        ]
        assert len(datasets.demonstrations(Source(path=str(tmp_path / "two")))) == 2
        assert datasets.demonstrations(Source(path=str(tmp_path / "two"), split="test")) == [{"messages": PLAIN}]
        with pytest.raises(SalsaError, match="two: has no split 'dev'; use one of train, test"):
            load_rows(Source(path=str(tmp_path / "two"), split="dev"))

    @pytest.mark.parametrize(
        ("name", "raw", "said"),
        [
            ("a.jsonl.gz", b"no gzip", "a.jsonl.gz: cannot be read: Not a gzipped file"),
            ("a.jsonl.gz", gzip.compress(b'{"prompt": "q"}\n' * 99, mtime=0)[:-20], "a.jsonl.gz: cannot be decompressed: "),
            ("a.csv", b"prompt\nq,r\n", "a.csv, row 1: has more fields than the header; put text with commas in quotes"),
            ("a.csv", b"prompt\n\xff\n", "a.csv: is not UTF-8 ('utf-8' codec can't decode"),
            ("a.csv", b'prompt\n"q" r\n', "a.csv: is not a table ("),
            ("folder", None, "folder: cannot be read as a dataset (split 'train'): "),
        ],
    )  # fmt: skip
    def test_what_cannot_be_read_is_one_line(self, tmp_path: Path, name: str, raw: bytes | None, said: str) -> None:
        path = tmp_path / name
        path.mkdir() if raw is None else path.write_bytes(raw)
        with pytest.raises(SalsaError) as refusal:
            datasets.prompts(Source(path=str(path)))
        line = str(refusal.value)
        assert line.removeprefix(f"{tmp_path}/").startswith(said) and "\n" not in line

    @pytest.mark.parametrize(
        ("path", "parts"),
        [
            ("hf://datasets/me/x", ("me/x", None, "")),
            ("hf://datasets/me/x/data/a.jsonl", ("me/x", None, "data/a.jsonl")),
            ("hf://datasets/me/x@v1/data", ("me/x", "v1", "data")),
            ("hf://datasets/me/x@refs/convert/parquet/default", ("me/x", "refs/convert/parquet", "default")),
        ],
    )  # fmt: skip
    def test_the_hubs_own_paths(self, path: str, parts: Any) -> None:
        assert data_files._hub_path(Source(path=path)) == parts
        recipe = load_recipe("quickstart", lora="lora", overrides=[f"data.prompts={path}"]).recipe
        assert recipe.data.prompts is not None and recipe.data.prompts.path == path

    @pytest.mark.parametrize("path", ["hf://me/x", "hf://datasets/x", "hf://models/me/x"])
    def test_other_paths_of_the_hub_are_refused(self, path: str) -> None:
        with pytest.raises(
            SalsaError,
            match=r"data\.prompts: 'hf://.*' must have the form hf://datasets/NAMESPACE/NAME\[/FOLDER or FILE\]",
        ):
            load_recipe("quickstart", lora="lora", overrides=[f"data.prompts={path}"])

    def test_a_file_of_the_hub_is_fetched_and_read_as_one_here(self, tmp_path: Path, monkeypatch: Any) -> None:
        import huggingface_hub

        asked = []
        (tmp_path / "a.jsonl").write_text('{"prompt": "q"}\n{"prompt": 3}\n')

        def fetch(repository: str, file: str, **options: Any) -> str:
            asked.append((repository, file, options))
            return str(tmp_path / "a.jsonl")

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
        with pytest.raises(
            SalsaError,
            match=r"hf://datasets/me/x@v1/a\.jsonl, row 2, prompt: must be text or messages, not the number 3",
        ):
            datasets.prompts(Source(path="hf://datasets/me/x@v1/a.jsonl"))
        assert asked == [("me/x", "a.jsonl", {"repo_type": "dataset", "revision": "v1"})]

    def test_the_hub_out_of_reach_is_one_line(self) -> None:
        for path in ("me/x", "hf://datasets/me/x", "hf://datasets/me/x/a.jsonl", "hf://datasets/me/x/data/*.parquet"):
            with pytest.raises(
                SalsaError, match=r"huggingface.co/datasets/me/x: not in the local cache, and the Hub cannot be reached"
            ):
                load_rows(Source(path=path))
