"""Bad data: each fault is handled right, or refused in one line with file, row and column; what is odd and may be meant is told once."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from salsa_peft.config.job import Job
from salsa_peft.config.load import load_recipe
from salsa_peft.config.options.ppo import Sampling
from salsa_peft.config.schema import Generation, Model, Source
from salsa_peft.data import datasets
from salsa_peft.data.check import check_source
from salsa_peft.data.files import load_rows
from salsa_peft.data.questions import questions
from salsa_peft.models.generation import generate, row_seeds
from salsa_peft.models.responses import pad_tokens
from salsa_peft.models.stage_context import prompts_that_fit
from salsa_peft.models.tokenizers import load_tokenizer
from salsa_peft.recipe import small_stages
from salsa_peft.recipe.__main__ import main as salsa_run
from salsa_peft.recipe.units import data_units, reward_units, sft_units
from salsa_peft.training import reward_model, sft
from salsa_peft.training.ppo.checks import check_tokenizer
from salsa_peft.training.ppo.prompts import PromptEncoder
from salsa_peft.utils.errors import SalsaError


def turn(role: str, content: Any) -> dict[str, Any]:
    """One."""
    return {"role": role, "content": content}


def user(content: Any) -> dict[str, Any]:
    """One turn."""
    return turn("user", content)


def assistant(content: Any) -> dict[str, Any]:
    """One turn."""
    return turn("assistant", content)


SYSTEM = turn("system", "be brief")
DEMONSTRATION = {"messages": [user("a"), assistant("b")]}
PAIR = {"prompt": "q", "chosen": "+", "rejected": "-"}
PROMPT = {"prompt": "q"}
TURNS = {"turns": ["first", "second"]}
DEMONSTRATIONS = "messages, conversations, prompt and completion or instruction and output"
PROMPTS = "prompt, messages, conversations, instruction, question or turns"
KINDS: dict[str, tuple[Callable[..., Any], dict[str, Any], str]] = {
    "demonstrations": (datasets.demonstrations, DEMONSTRATION, DEMONSTRATIONS),
    "preferences": (datasets.preferences, PAIR, "chosen and rejected"),
    "prompts": (datasets.prompts, PROMPT, PROMPTS),
    "questions": (questions, TURNS, PROMPTS),
}
"""Kind → what reads it, a good row, the columns that are missed first in a bad one."""
kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def put(tmp_path: Path) -> Callable[..., Source]:
    """put(row, row, …) or put(bytes) → a Source of a file of them."""

    def make(*rows: Any, suffix: str = ".jsonl", **options: Any) -> Source:
        path = tmp_path / f"rows{suffix}"
        raw = (
            rows[0] if rows and isinstance(rows[0], bytes) else "".join(json.dumps(row) + "\n" for row in rows).encode()
        )
        path.write_bytes(raw)
        return Source(path=str(path), **options)

    return make


def refusal(read: Callable[..., Any], source: Source, *more: Any, **options: Any) -> str:
    """The one line with which a file is refused, without its folder."""
    with pytest.raises(SalsaError) as caught:
        read(source, *more, **options)
    line = str(caught.value)
    assert line.isprintable(), line  # no line break, no control character, no half character
    assert line.startswith(source.path)
    return line.removeprefix(str(Path(source.path).parent) + "/")


class TestFiles:
    """What is no file of rows."""

    @kinds
    @pytest.mark.parametrize(
        ("raw", "line"),
        [
            (b"", "rows.jsonl: has no rows"),
            (b"\n \r\n\t\n", "rows.jsonl: has no rows"),
            (b"\xef\xbb\xbf", "rows.jsonl: has no rows"),
            (b"prompt,chosen,rejected\nq,a,b\n", "rows.jsonl, row 1: b'prompt,chosen,rejected' is not valid JSON (Expecting value: line 1"),
            ("{}\n{}\n".encode("utf-16"), "rows.jsonl: is UTF-16; save it as UTF-8"),
            ("{}\n{}\n".encode("utf-16-le"), "rows.jsonl: is UTF-16; save it as UTF-8"),
            (b"[" * 100_000, "rows.jsonl, row 1: b'[[[[["),
            (b'{"prompt": "a\x00b"}', r"""rows.jsonl, row 1: b'{"prompt": "a\x00b"}' is not valid JSON (Invalid control character"""),
            (b"3\n", "rows.jsonl, row 1: must be a JSON object, not '3'; write one object per line"),
        ],
    )  # fmt: skip
    def test_what_is_no_jsonl(self, put: Any, kind: str, raw: bytes, line: str) -> None:
        assert refusal(KINDS[kind][0], put(raw)).startswith(line)

    @kinds
    @pytest.mark.parametrize(
        ("bad", "line"),
        [
            (b"{}", "has no columns; it needs {columns}"),
            (b"null", "must be a JSON object, not 'None'; write one object per line"),
            (b"[]", "must be a JSON object, not '[]'; write one object per line"),
            (b'{"other": 1}', "has the columns other; it needs {columns}"),
            (b'{"a\\nb": 1}', "has the columns a b; it needs {columns}"),
            (b'{"other": "\xff"}', "is not UTF-8 ('utf-8' codec can't decode byte 0xff in position 11: invalid start byte); save the file as UTF-8"),
        ],
    )  # fmt: skip
    def test_the_bad_row_is_named(self, put: Any, kind: str, bad: bytes, line: str) -> None:
        """By its number among the rows: blank lines don't count."""
        read, fine, columns = KINDS[kind]
        raw = json.dumps(fine).encode() + b"\n\n  \r\n" + bad + b"\n" + json.dumps(fine).encode()
        assert refusal(read, put(raw)).startswith(f"rows.jsonl, row 2: {line.format(columns=columns)}")

    @kinds
    def test_a_row_whose_columns_are_null(self, put: Any, kind: str) -> None:
        """It has the column, so the line says what is wrong with it."""
        read, fine, columns = KINDS[kind]
        line = refusal(read, put(fine, dict.fromkeys(fine)))
        null = next(iter(fine)) if kind != "preferences" else "chosen is null; rejected"
        found = ", ".join(sorted(fine))
        assert line == f"rows.jsonl, row 2: has the columns {found}; it needs {columns}; {null} is null"

    @kinds
    def test_a_line_that_was_cut(self, put: Any, kind: str) -> None:
        """Wherever it was: no prefix of a row is a row."""
        read, fine, _ = KINDS[kind]
        whole = json.dumps(fine).encode()
        for length in range(1, len(whole)):
            line = refusal(read, put(whole + b"\n" + whole[:length]))
            assert line.startswith(f"rows.jsonl, row 2: {whole[:length][:60]!r} is not valid JSON (")
            assert line.endswith("); write one object per line")

    @kinds
    @pytest.mark.parametrize(("start", "end"), [(b"\xef\xbb\xbf", b"\n"), (b"", b"\r\n"), (b"\n\n", b"\n \n"), (b"\xef\xbb\xbf\r\n", b"\r\n")])  # fmt: skip
    def test_a_byte_order_mark_other_line_ends_and_blank_lines(
        self, put: Any, kind: str, start: bytes, end: bytes
    ) -> None:
        """Change nothing."""
        read, fine, _ = KINDS[kind]
        line = json.dumps(fine).encode()
        plain = read(put(line + b"\n" + line))
        assert len(plain) == 2 and read(put(start + line + end + line + end)) == plain

    @kinds
    def test_a_json_list_with_a_byte_order_mark(self, put: Any, kind: str) -> None:
        read, fine, _ = KINDS[kind]
        raw = json.dumps([fine]).encode()
        assert read(put(b"\xef\xbb\xbf" + raw, suffix=".json")) == read(put(raw, suffix=".json")) == read(put(fine))

    @kinds
    @pytest.mark.parametrize(
        ("suffix", "raw", "line"),
        [
            (".json", b"", "rows.json: has no rows"),
            (".json", b"[]", "rows.json: has no rows"),
            (".json", b"[1]", "rows.json, row 1: must be a JSON object, not '1'"),
            (".json", b"[{", "rows.json: is not valid JSON (Expecting property name"),
            (".json", b"[" * 100_000, "rows.json: is not valid JSON (maximum recursion depth"),
            (".json", b'[{"prompt": "\xe9"}]', "rows.json: is not UTF-8 ('utf-8' codec can't decode byte 0xe9"),
            (".parquet", b"", "rows.parquet: is not a Parquet file ("),
            (".parquet", b"prompt\nq\n", "rows.parquet: is not a Parquet file ("),
        ],
    )
    def test_other_forms(self, put: Any, kind: str, suffix: str, raw: bytes, line: str) -> None:
        assert refusal(KINDS[kind][0], put(raw, suffix=suffix)).startswith(line)

    @pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv"])
    @pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
    def test_an_encoding_is_named_by_reader_and_first_check(self, put: Any, suffix: str, encoding: str) -> None:
        text = {".jsonl": '{"prompt": "é"}\n', ".json": '[{"prompt": "é"}]'}.get(suffix, "prompt\né\n")
        source = put(text.encode(encoding), suffix=suffix)
        for check in (lambda: datasets.prompts(source), lambda: check_source("data.prompts", "prompts", source)):
            with pytest.raises(SalsaError, match=r"is (not UTF-8 \(.*\); save the file|UTF-16; save it) as UTF-8$"):
                check()

    @pytest.mark.parametrize(
        ("suffix", "separator", "word"),
        [(".csv", ";", "comma"), (".csv", "\t", "comma"), (".tsv", ",", "tab"), (".tsv", ";", "tab")],
    )
    def test_another_separator(self, put: Any, suffix: str, separator: str, word: str) -> None:
        """Also where the texts have commas."""
        source = put(f"prompt{separator}completion\nOne, two, three{separator}a\n".encode(), suffix=suffix)
        for check in (lambda: datasets.prompts(source), lambda: check_source("data.prompts", "prompts", source)):
            with pytest.raises(SalsaError, match=f"; the separator of a {suffix} file must be a {word}$"):
                check()

    @kinds
    def test_a_file_that_is_gone(self, tmp_path: Path, kind: str) -> None:
        """Between the recipe's check and the stage."""
        line = refusal(KINDS[kind][0], Source(path=str(tmp_path / "gone.jsonl")))
        assert line == "gone.jsonl: cannot be read: No such file or directory"

    def test_a_folder_that_datasets_reads(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Its own error names no row; ours says what it found."""
        import datasets as hf_datasets

        monkeypatch.setattr(hf_datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        (tmp_path / "set").mkdir()
        (tmp_path / "set" / "train.jsonl").write_text('{"prompt": "a"}\n{"prompt":\n')
        assert (
            "set/train.jsonl, row 2: b'{\"prompt\":' is not valid JSON (Expecting value: line 1 column 11 (char 10)); write one object per line"
            in refusal(datasets.prompts, Source(path=str(tmp_path / "set")))
        )

    @kinds
    def test_a_limited_source_names_the_files_row(self, put: Any, kind: str) -> None:
        """Not the place after the shuffle."""
        read, fine, _ = KINDS[kind]
        rows = [{}, *[fine] * 29]
        order = [number for number, _ in load_rows(put(*[fine] * 30, limit=29))]
        assert order.index(1) != 0  # the shuffle moved it
        assert refusal(read, put(*rows, limit=29)).startswith("rows.jsonl, row 1: has no columns")


ODD: list[Any] = [3, 1.5, True, None, {"text": "x"}, [{"type": "text", "text": 3}], ["x", 1], [["x"]], []]


class TestContent:
    """What is no text."""

    @pytest.mark.parametrize("odd", ODD)
    @pytest.mark.parametrize(
        ("read", "fine", "row", "column"),
        [
            (datasets.demonstrations, DEMONSTRATION, lambda odd: {"messages": [user("a"), assistant(odd)]}, "messages"),
            (datasets.demonstrations, DEMONSTRATION, lambda odd: {"messages": [user(odd), assistant("b")]}, "messages"),
            (datasets.demonstrations, DEMONSTRATION, lambda odd: {"messages": [user("a"), turn(odd, "b")]}, "messages"),
            (datasets.preferences, PAIR, lambda odd: PAIR | {"chosen": [assistant(odd)]}, "chosen"),
            (datasets.preferences, PAIR, lambda odd: PAIR | {"rejected": [assistant(odd)]}, "rejected"),
            (datasets.preferences, PAIR, lambda odd: PAIR | {"prompt": [user(odd)]}, "prompt"),
            (datasets.prompts, PROMPT, lambda odd: {"prompt": [user(odd)]}, "prompt"),
            (datasets.prompts, PROMPT, lambda odd: {"messages": [user(odd), assistant("a")]}, "messages"),
            (datasets.prompts, PROMPT, lambda odd: {"turns": [odd, "b"]}, "turns"),
            (questions, TURNS, lambda odd: {"prompt": [user(odd)]}, "prompt"),
            (questions, TURNS, lambda odd: {"turns": ["a", {"content": odd}]}, "turns"),
        ],
    )
    def test_in_a_turn(self, put: Any, read: Any, fine: Any, row: Any, column: str, odd: Any) -> None:
        """Also parts of a content that hold no text."""
        line = refusal(read, put(fine, row(odd)))
        assert line.startswith(f"rows.jsonl, row 2, {column}: ")
        assert " must be text, not " in line or re.search(r": the content part .* has no text$", line)

    @pytest.mark.parametrize("odd", [odd for odd in ODD if odd is not None])
    @pytest.mark.parametrize(
        ("kind", "column"),
        [
            ("demonstrations", "messages"), ("preferences", "chosen"), ("preferences", "rejected"), ("preferences", "prompt"),
            ("prompts", "prompt"), ("prompts", "messages"), ("prompts", "turns"), ("questions", "turns"),
        ],
    )  # fmt: skip
    def test_in_the_column(self, put: Any, kind: str, column: str, odd: Any) -> None:
        read, fine, _ = KINDS[kind]
        row = {column: odd} if kind == "prompts" else fine | {column: odd}
        line = refusal(read, put(fine, row))
        assert re.match(
            rf"rows\.jsonl, row 2, {column}: ((a turn )?must be .*, not |a message must have role and content, or from and value, but is )",
            line,
        ), line

    @kinds
    @pytest.mark.parametrize("half", [r"\ud800", r"\ude00", r"x\ud83d y"])
    def test_half_a_character(self, put: Any, kind: str, half: str) -> None:
        """JSON that was cut inside an emoji: no tokenizer takes it, and nothing could be written of it at the end of an evaluation."""
        read, fine, _ = KINDS[kind]
        for column in (*fine, "category"):
            row = json.dumps(fine | {column: "HERE"}).replace("HERE", half)
            line = refusal(read, put(f"{json.dumps(fine)}\n{row}".encode()))
            assert line.startswith(f"rows.jsonl, row 2, {column}: contains '\\ud")
            assert "half of a character (a lone surrogate); correct the text" in line
        inside = json.dumps({"prompt": [user("HERE")]}).replace("HERE", half)
        if kind in ("prompts", "questions"):
            assert refusal(read, put(inside.encode())).startswith("rows.jsonl, row 1, prompt: contains '\\ud")

    def test_two_halves_are_an_emoji(self, put: Any) -> None:
        """As json.dumps writes one."""
        assert datasets.prompts(put(rb'{"prompt": "\ud83d\ude00"}')) == [{"prompt": [user("😀")]}]

    def test_half_a_character_in_the_trainers_rows(self, tokenizer: Any) -> None:
        for prompt in ("\ud800", [user("copy \ud800")]):
            with pytest.raises(
                SalsaError,
                match=r"train_dataset, row 2, prompt: contains '\\ud800', half of a character \(a lone surrogate\); correct the text",
            ):
                PromptEncoder(tokenizer, None, len(tokenizer))(
                    [{"prompt": "copy owl"}, {"prompt": prompt}], "train_dataset"
                )


class TestEmptyText:
    """It may be meant, so it is told and kept."""

    @pytest.mark.parametrize("blank", ["", " ", "\n\t\u3000\u2028"])
    @pytest.mark.parametrize(
        ("read", "fine", "row", "told"),
        [
            (datasets.demonstrations, DEMONSTRATION, lambda blank: {"messages": [user("a"), assistant(blank)]}, datasets.EMPTY_ANSWER),
            (datasets.preferences, PAIR, lambda blank: PAIR | {"chosen": blank}, datasets.EMPTY_ANSWER),
            (datasets.prompts, PROMPT, lambda blank: {"prompt": blank}, datasets.EMPTY_PROMPT),
            (datasets.prompts, PROMPT, lambda blank: {"turns": [blank, "b"]}, datasets.EMPTY_PROMPT),
            (questions, PROMPT, lambda blank: {"turns": ["a", blank]}, datasets.EMPTY_PROMPT),
        ],
    )  # fmt: skip
    def test_is_told(self, put: Any, capsys: Any, read: Any, fine: Any, row: Any, told: str, blank: str) -> None:
        """Once, with the number of rows and the first of them; text beside it is no cause."""
        source = put(fine, row(blank), fine, row(blank))
        assert len(read(source)) == 4
        assert capsys.readouterr().err == f"{source.path}: 2 of 4 rows (the first: row 2) {told}\n"
        read(put(fine, row(f"{blank}x")))
        assert capsys.readouterr().err == ""

    def test_an_empty_rejected_answer_is_a_fair_one(self, put: Any, capsys: Any) -> None:
        (row,) = datasets.preferences(put(PAIR | {"rejected": ""}))
        assert row["rejected"] == [user("q"), assistant("")] and capsys.readouterr().err == ""

    def test_a_prompt_without_tokens_is_left_out(self, tokenizer: Any, capsys: Any) -> None:
        """Text as it is, in the trainer's rows: there would be nothing to answer. A turn has its template's tokens."""
        bare = copy.deepcopy(tokenizer)
        rows = [{"prompt": ""}, {"prompt": " \n"}, {"prompt": "owl"}, {"prompt": [user("")]}]
        kept, left_out = PromptEncoder(bare, None, len(bare))(rows, "train_dataset")
        assert left_out == 2 and capsys.readouterr().err == "train_dataset: 2 of 4 prompts left out: empty\n"
        assert [bare.decode(prompt.tokens).split() for prompt in kept] == [["owl"], ["<bos>", "<user>", "<assistant>"]]


class TestRoles:
    """Whose turn it is."""

    @pytest.mark.parametrize(
        ("read", "row", "line"),
        [
            (datasets.demonstrations, {"messages": [user("a"), user("b")]}, "messages: has no assistant turn; add one"),
            (datasets.demonstrations, {"messages": [SYSTEM]}, "messages: has no assistant turn; add one"),
            (datasets.demonstrations, {"messages": [user("a"), turn("human", "b")]}, "messages: has no assistant turn; add one"),
            (datasets.demonstrations, {"messages": [{"from": "narrator", "value": "a"}]},
             "messages: unknown role 'narrator'; use human, gpt, system, function_call, observation or tool"),
            (datasets.demonstrations, {"conversations": [{"speaker": "a", "text": "b"}]}, "conversations: a message must have role and content, or from and value, but is an object with the keys speaker, text"),
            (datasets.preferences, PAIR | {"chosen": [user("q")]}, "chosen: must end with an assistant turn, not with a user turn"),
            (datasets.preferences, PAIR | {"prompt": [user("q"), assistant("a")]},
             "prompt: must not end with an assistant turn, because the policy answers next; remove that turn"),
            (datasets.prompts, {"prompt": [user("q"), assistant("a")]}, "prompt: must not end with an assistant turn, because the policy answers next; remove that turn"),
            (datasets.prompts, {"messages": [assistant("a")]}, "messages: has no user turn; add one"),
            (questions, {"messages": [SYSTEM, assistant("a")]}, "messages: has no user turn; add one"),
        ],
    )  # fmt: skip
    def test_no_answer_or_no_question(self, put: Any, read: Any, row: Any, line: str) -> None:
        fine = {
            datasets.demonstrations: DEMONSTRATION,
            datasets.preferences: PAIR,
            datasets.prompts: PROMPT,
            questions: TURNS,
        }[read]
        assert refusal(read, put(fine, row)) == f"rows.jsonl, row 2, {line}"


class TestPairs:
    """Two answers to one prompt."""

    def test_equal_ones_are_left_out_and_told(self, put: Any, capsys: Any) -> None:
        """Their margin is 0 always, which accuracy would count as wrong; as text and as messages."""
        chat = [user("q"), assistant("a")]
        source = put(PAIR, PAIR | {"chosen": "-"}, {"chosen": chat, "rejected": chat}, PAIR | {"rejected": "+ "})
        rows = datasets.preferences(source)
        assert [row["rejected"][-1]["content"] for row in rows] == ["-", "+ "]
        assert capsys.readouterr().err == f"{source.path}: 2 of 4 rows (the first: row 2) {datasets.IDENTICAL_PAIR}\n"

    def test_none_that_differ(self, put: Any) -> None:
        line = refusal(datasets.preferences, put(PAIR | {"chosen": "-"}))
        assert line == "rows.jsonl: chosen and rejected are the same in every row; give pairs that differ"

    @pytest.mark.parametrize(
        ("chosen", "rejected", "place"),
        [
            ([user("q"), assistant("+")], [user("r"), assistant("-")], 1),
            ([SYSTEM, user("q"), assistant("+")], [user("q"), assistant("-")], 1),
            ([SYSTEM, user("q"), assistant("+")], [SYSTEM, user("r"), assistant("-")], 2),
            ([user("q"), assistant("a"), user("s"), assistant("+")], [user("q"), assistant("a"), user("t"), assistant("-")], 3),
            ([user("q"), assistant("a"), user("s"), assistant("+")], [user("q"), assistant("a")], 3),
            ([user("other"), assistant("+")], [assistant("-")], 1),
        ],
    )  # fmt: skip
    def test_of_other_prompts(self, put: Any, chosen: Any, rejected: Any, place: int) -> None:
        """The turn where they part is named; a `prompt` before one of them only is another prompt too."""
        line = refusal(datasets.preferences, put(PAIR, {"prompt": "q", "chosen": chosen, "rejected": rejected}))
        expected = f"this chat and chosen must have the same prompt and differ first in an assistant turn; they first differ in turn {place}"
        assert line == f"rows.jsonl, row 2, rejected: {expected}"

    def test_conversations_that_part_at_an_answer(self, put: Any) -> None:
        """Are fine, with different user's turns after it."""
        chosen = [user("q"), assistant("a"), user("s"), assistant("+")]
        rejected = [user("q"), assistant("b"), user("t"), assistant("-")]
        row = {"chosen": chosen, "rejected": rejected}
        assert datasets.preferences(put(row)) == [row]


class TestIds:
    """Of questions: each asked once, none merged with another."""

    @pytest.mark.parametrize("column", ["question_id", "uid"])
    @pytest.mark.parametrize(("one", "other"), [(5, 5), ("x", "x"), (5, "5"), ("5", 5)])
    def test_twice(self, put: Any, column: str, one: Any, other: Any) -> None:
        """As number or text: a judge's references go by the text."""
        rows = [{column: one, "prompt": "a"}, {column: 6, "prompt": "b"}, {column: other, "prompt": "c"}]
        line = refusal(questions, put(*rows))
        assert line == f"rows.jsonl, row 3, {column}: {other!r} is also the id of row 1; give each question its own id"

    def test_an_id_that_is_another_rows_number(self, put: Any) -> None:
        """The row has no id of its own, which the line says."""
        line = refusal(questions, put({"question_id": 2, "prompt": "a"}, {"prompt": "b"}))
        assert line == (
            "rows.jsonl, row 2: has no id (question_id, uid, prompt_id), so its row number 2 would be its id, but row 1 has that id; give every row an id, or remove the ids of all rows"
        )
        assert [one.id for one in questions(put({"question_id": 9, "prompt": "a"}, {"prompt": "b"}))] == [9, 2]

    def test_columns_that_are_no_ids(self, put: Any) -> None:
        """`id` names no question: rows' numbers do, and every row is asked."""
        rows = [{"id": 7, "prompt": "a"}, {"id": 7, "prompt": "b"}, {"id": 7, "prompt": "c"}]
        assert [(one.id, one.turns) for one in questions(put(*rows))] == [(1, ("a",)), (2, ("b",)), (3, ("c",))]

    def test_a_texts_own_id_may_come_twice(self, put: Any) -> None:
        rows = [{"prompt_id": "x", "prompt": "a"}, {"prompt_id": "x", "prompt": "a"}]
        assert [one.id for one in questions(put(*rows))] == [1, 2]

    def test_elsewhere_they_merge_nothing(self, put: Any) -> None:
        for column in ("id", "question_id", "prompt_id"):
            assert len(datasets.demonstrations(put(*[DEMONSTRATION | {column: 1}] * 3))) == 3
            assert len(datasets.preferences(put(*[PAIR | {column: 1}] * 3))) == 3
            assert len(datasets.prompts(put(*[PROMPT | {column: 1}] * 3))) == 3


TEXTS = [
    "👩‍👩‍👧‍👦 family, 🏳️‍🌈, 🇩🇪, 👍🏽",
    "שָׁלוֹם עֲלֵיכֶם \u202eabc\u202c",
    "السَّلَامُ عَلَيْكُم\u200c\u200d",
    "e\u0301 and é, Z̸̢͎a̶l̷g̴o",
    "line\u2028paragraph\u2029next\x85end",
    "nul \x00 bell \x07 escape \x1b[31m delete \x7f",
    "\ufeffmark inside\ufeff",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 \U0010fffd \uffff",
    "\r\nwindows\r\n",
]
KEPT = "{% for message in messages %}{{ '<' + message['role'] + '>' }}{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}{% else %}{{ message['content'] }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
DROPPING = KEPT.replace("%}{{ '<' +", " if message['role'] != 'system' %}{{ '<' +")
OF_ITS_OWN = "{{ '<system>a model' }}" + DROPPING
GEMMA = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + (
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate\nuser/assistant/user/assistant/...') }}{% endif %}{% endfor %}"
) + KEPT  # fmt: skip


def make_chat_tokenizer(template: str) -> Any:
    """A byte-level BPE: it has every text; <pad>, <s>, <eos>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    special, alphabet = ["<pad>", "<s>", "<eos>"], pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    fast.train_from_iterator(["<user><assistant><system> a brief answer"] * 3 + TEXTS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=fast, pad_token="<pad>", bos_token="<s>", eos_token="<eos>", chat_template=template
    )


@pytest.fixture
def chat_tokenizer() -> Any:
    """Its template has system turns."""
    return make_chat_tokenizer(KEPT)


class TestOddText:
    """Emoji, joiners, right to left, combining marks, line separators, NUL: as they are, to the last byte."""

    @pytest.mark.parametrize("text", TEXTS)
    @pytest.mark.parametrize("ascii_only", [True, False])
    def test_from_the_file_to_the_tokens_and_back(
        self, tmp_path: Path, chat_tokenizer: Any, text: str, ascii_only: bool
    ) -> None:
        """A line separator ends no row."""
        path = tmp_path / "rows.jsonl"
        rows = [DEMONSTRATION | {"messages": [user(text), assistant(text)]}, {"messages": [user("a"), assistant("b")]}]
        path.write_bytes("\n".join(json.dumps(row, ensure_ascii=ascii_only) for row in rows).encode())
        source = Source(path=str(path))
        assert datasets.demonstrations(source, chat_tokenizer) == rows
        (asked, _), (question, _) = datasets.prompts(source), questions(source)
        assert asked["prompt"] == question.messages == [user(text)]
        path.write_bytes(
            json.dumps({"prompt": text, "chosen": text, "rejected": "-"}, ensure_ascii=ascii_only).encode()
        )
        assert datasets.preferences(source, chat_tokenizer)[0]["chosen"] == [user(text), assistant(text)]
        tokens = datasets.prompt_tokens(asked, chat_tokenizer)
        whole = f"<user>{text}<assistant>".encode()
        assert chat_tokenizer.decode(tokens) == whole.decode()
        assert tokens == chat_tokenizer(whole.decode(), add_special_tokens=False)["input_ids"]


def chats(kind: str, *messages: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """A row of a kind that asks these, and the column that the refusal names."""
    asked = list(messages)
    return {
        "demonstrations": ({"messages": [*asked, assistant("b")]}, "messages"),
        "preferences": ({"prompt": asked, "chosen": "+", "rejected": "-"}, "chosen"),
        "prompts": ({"prompt": asked}, "prompt"),
        "questions": ({"messages": asked}, "messages"),
    }[kind]


class TestTemplates:
    """What a tokenizer's chat template drops or refuses."""

    @kinds
    @pytest.mark.parametrize("template", [DROPPING, OF_ITS_OWN])
    def test_a_dropped_system_turn_is_told(self, put: Any, capsys: Any, kind: str, template: str) -> None:
        """Once for a file, with the number of rows; also where the template has a system turn of its own. An empty one is no loss."""
        read, _, _ = KINDS[kind]
        fine, lost, nothing = (
            chats(kind, *turns)[0] for turns in ([user("q")], [SYSTEM, user("q")], [turn("system", " "), user("q")])
        )
        source = put(fine, nothing, lost, fine, lost)
        rows = read(source, tokenizer=make_chat_tokenizer(template))
        assert len(rows) == 5 and rows == read(source)
        told = f"{source.path}: 2 of 5 rows (the first: row 3) {datasets.DROPPED_FIELD.format('a system turn')}\n"
        assert capsys.readouterr().err == told
        read(source, tokenizer=make_chat_tokenizer(KEPT))
        assert capsys.readouterr().err == ""

    def test_a_dropped_system_turn_of_one_answer_alone(self, put: Any, capsys: Any) -> None:
        """A pair's chats are tried both; the row counts once."""
        row = {"chosen": [user("q"), assistant("+")], "rejected": [user("q"), assistant("-"), SYSTEM, assistant("-")]}
        source = put(row)
        datasets.preferences(source, make_chat_tokenizer(DROPPING))
        assert (
            capsys.readouterr().err
            == f"{source.path}: 1 of 1 rows (the first: row 1) {datasets.DROPPED_FIELD.format('a system turn')}\n"
        )

    def test_the_trainer_tells_it_too(self, capsys: Any) -> None:
        """By one process; the prompts are what the template makes of them."""
        tokenizer = make_chat_tokenizer(DROPPING)
        rows = [{"prompt": [user("q")]}, {"prompt": [SYSTEM, user("q")]}, {"prompt": "text"}, {"input_ids": [5]}]
        prompts, left_out = PromptEncoder(tokenizer, None, len(tokenizer))(rows, "train_dataset")
        told = f"train_dataset: 1 of 4 rows (the first: row 2) {datasets.DROPPED_FIELD.format('a system turn')}\n"
        assert left_out == 0 and capsys.readouterr().err == told
        assert prompts[0].tokens == prompts[1].tokens and tokenizer.decode(prompts[1].tokens) == "<user>q<assistant>"
        PromptEncoder(tokenizer, None, len(tokenizer), quiet=True)(rows, "train_dataset")
        PromptEncoder(make_chat_tokenizer(KEPT), None, len(tokenizer))(rows, "train_dataset")
        assert capsys.readouterr().err == ""

    @kinds
    @pytest.mark.parametrize(
        ("asked", "why"),
        [
            (
                [SYSTEM, user("q")],
                "System role not supported; remove the system turn, or set model.chat_template to a template with system turns",
            ),
            ([user("q"), user("r")], "Conversation roles must alternate user/assistant/user/assistant/..."),
        ],
    )
    def test_what_it_refuses(self, put: Any, kind: str, asked: Any, why: str) -> None:
        """Gemma's: no system role, and user and assistant in turn. In one line, whatever the template says."""
        read, _, _ = KINDS[kind]
        (fine, _), (row, column) = chats(kind, user("q")), chats(kind, *asked)
        line = refusal(read, put(fine, row), tokenizer=make_chat_tokenizer(GEMMA))
        assert line == f"rows.jsonl, row 2, {column}: the tokenizer's chat template rejects these messages: {why}"

    def test_what_it_refuses_of_a_rejected_answer(self, put: Any) -> None:
        """The column is its own."""
        row = {"chosen": [user("q"), assistant("+")], "rejected": [user("q"), assistant("-"), assistant("-")]}
        line = refusal(datasets.preferences, put(row), tokenizer=make_chat_tokenizer(GEMMA))
        assert line.startswith(
            "rows.jsonl, row 1, rejected: the tokenizer's chat template rejects these messages: Conversation roles"
        )

    def test_what_it_refuses_of_the_trainers_rows(self) -> None:
        tokenizer = make_chat_tokenizer(GEMMA)
        rows = [{"prompt": [user("q")]}, {"prompt": [user("q"), user("r")]}]
        with pytest.raises(SalsaError) as caught:
            PromptEncoder(tokenizer, None, len(tokenizer))(rows, "eval_dataset")
        assert str(caught.value) == (
            "eval_dataset, row 2, prompt: the tokenizer's chat template rejects these messages: Conversation roles must alternate"
            " user/assistant/user/assistant/..."
        )
        with pytest.raises(
            SalsaError, match=r"^prompts, prompt: the tokenizer's chat template rejects these messages: System role"
        ):
            datasets.prompt_tokens({"prompt": [SYSTEM, user("q")]}, tokenizer)  # no number is known, so none is said

    @kinds
    def test_no_template(self, put: Any, kind: str) -> None:
        read, _, _ = KINDS[kind]
        row, column = chats(kind, user("q"))
        line = refusal(read, put(row), tokenizer=make_chat_tokenizer(None))  # type: ignore[arg-type]
        assert (
            line
            == f"rows.jsonl, row 1, {column}: has messages, but the tokenizer has no chat template; set a chat template, or give text"
        )


def bench_of(tokenizer: Any, max_length: int, max_new_tokens: int) -> Any:
    """What `fitting` takes of a StageContext."""
    recipe = SimpleNamespace(generation=Generation(max_new_tokens=max_new_tokens), model=Model(max_length=max_length))
    return SimpleNamespace(recipe=recipe, tokenizer=tokenizer)


JOB: Any = SimpleNamespace(unit=SimpleNamespace(id="evaluate"))


class TestLengths:
    """Prompts that leave no room for a response."""

    def test_of_questions_and_sampled_policies(self, tokenizer: Any, put: Any, capsys: Any) -> None:
        """prompt + max_new_tokens = max_length is the last that fits."""
        rows = datasets.prompts(put(*({"prompt": " ".join(["owl"] * words)} for words in (20, 1, 2, 3))))
        assert [len(datasets.prompt_tokens(row, tokenizer)) for row in rows] == [
            23,
            4,
            5,
            6,
        ]  # <bos> <user> … <assistant>
        kept = prompts_that_fit(JOB, bench_of(tokenizer, 12, 7), rows)
        assert [row["prompt"][0]["content"] for row in kept] == ["owl", "owl owl"]
        assert "evaluate  2 of 4 rows left out: prompts longer than 5 tokens" in capsys.readouterr().err
        with pytest.raises(SalsaError, match=r"^data\.prompts: every prompt is longer than 3 tokens; raise"):
            prompts_that_fit(JOB, bench_of(tokenizer, 10, 7), rows, "data.prompts")

    def test_of_the_trainer(self, make_base: Any, tokenizer: Any, capsys: Any) -> None:
        """The same bound, from what the model reads."""
        model = make_base(max_position_embeddings=12)
        args: Any = SimpleNamespace(max_new_tokens=7, max_prompt_length=None, process_index=0)
        rows = [{"prompt": [user(" ".join(["owl"] * words))]} for words in (20, 1, 2, 3)]
        kept, left_out = PromptEncoder.of([model], args, tokenizer)(rows, "train_dataset")
        assert ([len(prompt.tokens) for prompt in kept], left_out) == ([4, 5], 2)
        assert "train_dataset: 2 of 4 prompts left out: empty, or longer than 5 tokens" in capsys.readouterr().err

    def test_of_a_trainer_whose_prompts_are_all_too_long(self, make_trainer: Any) -> None:
        with pytest.raises(SalsaError) as caught:
            make_trainer(prompts=[{"prompt": [user("owl " * 60)]}] * 9)
        assert str(caught.value).startswith("train_dataset: 0 prompts (9 left out: empty, or longer than 57 tokens")


class TestTokenizers:
    """Without a padding token, or with one that is EOS, or without EOS."""

    @pytest.mark.parametrize("pad", [None, "<eos>"])
    def test_padding_is_not_eos_in_a_stage(self, tmp_path: Path, chat_tokenizer: Any, pad: str | None) -> None:
        """A reward model finds the end by the padding token, so another special token pads: here the unused <pad>."""
        chat_tokenizer.pad_token = pad
        chat_tokenizer.save_pretrained(tmp_path)
        found = load_tokenizer(str(tmp_path))
        assert (found.pad_token, found.pad_token_id, found.eos_token_id) == ("<pad>", 0, 2)

    def test_no_eos(self, tmp_path: Path, chat_tokenizer: Any, make_base: Any) -> None:
        model = make_base(vocab_size=len(chat_tokenizer))
        chat_tokenizer.eos_token = None
        chat_tokenizer.save_pretrained(tmp_path)
        with pytest.raises(SalsaError, match="the tokenizer has no eos_token, which is needed to end responses"):
            load_tokenizer(str(tmp_path))
        with pytest.raises(SalsaError, match=r"^processing_class: the tokenizer has no eos_token"):
            check_tokenizer(chat_tokenizer, model)

    def test_no_padding_in_the_trainer(self, chat_tokenizer: Any, make_base: Any) -> None:
        model = make_base(vocab_size=len(chat_tokenizer))
        chat_tokenizer.pad_token = None
        with pytest.raises(SalsaError, match=r"^processing_class: the tokenizer has no pad_token. Set tokenizer\.pad"):
            check_tokenizer(chat_tokenizer, model)

    def test_padding_that_is_eos_in_the_trainer(self, make_base: Any, tokenizer: Any) -> None:
        """Prompts of other lengths, one with EOS in it: masks go by lengths, and what is sampled is the same. The EOS that ends counts once."""
        model, other = make_base(), copy.deepcopy(tokenizer)
        other.pad_token = other.eos_token
        prompts = [[2, 5, 9], [5, 2, 2, 7, 8], [6]]
        found = [
            generate(model, prompts, Sampling(max_new_tokens=8), each, row_seeds(range(3), 0))
            for each in (tokenizer, other)
        ]
        assert found[0].prompt_mask.tolist() == [[False] * 2 + [True] * 3, [True] * 5, [False] * 4 + [True]]
        assert found[1].finished.any() and not found[1].finished.all()
        for a, b in zip(found[0], found[1], strict=True):
            assert a.dtype != torch.bool or torch.equal(a, b)
        parts = [one.response_ids[one.response_mask].split(one.lengths.tolist()) for one in found]
        for a, b, finished in zip(*parts, found[0].finished.tolist(), strict=True):
            assert torch.equal(a, b) and (a == 2).tolist() == [False] * (len(a) - 1) + [finished]


class TestSpecialTokens:
    """Text that holds them."""

    def test_in_a_prompt(self, chat_tokenizer: Any, put: Any) -> None:
        """Nothing is cut: the prompt has them, its mask counts them, the last of a chat's turns too."""
        text = "a<eos>b<pad><s><eos>"
        (row,) = datasets.prompts(put({"prompt": text}))
        tokens = datasets.prompt_tokens(row, chat_tokenizer)
        assert chat_tokenizer.decode(tokens) == f"<user>{text}<assistant>"
        assert [token for token in tokens if token < 3] == [2, 0, 1, 2]
        ids, mask = pad_tokens([tokens, tokens[:3]], 0, torch.device("cpu"), "left")
        assert mask[0].all() and ids[0].tolist() == tokens and mask[1].sum() == 3

    def test_of_a_trained_row(self, trained: Any) -> None:
        """See TestStages: the labels are the answer, its own EOS text included, and the EOS that ends it."""
        assert trained.labels["<eos>in<pad>"] == [2, *trained.plain("in"), 0, 2]


class Trained:
    """What the sft and reward stages made of bad rows."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = make_chat_tokenizer(DROPPING)
        self.folder = folder
        self.job = self.jobs()
        self.labels: dict[str, list[int]] = {}

    def plain(self, text: str) -> list[int]:
        """Token ids."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def jobs(self) -> dict[str, Job]:
        """Of sft/seed-0 and of the reward, on a tiny base."""
        import tiny

        base = self.folder / "base"
        tiny.make_base(self.tokenizer, max_position_embeddings=128).save_pretrained(base)
        self.tokenizer.save_pretrained(base)
        (self.folder / "template.jinja").write_text(DROPPING, encoding="utf-8")
        for name, row in (("d", DEMONSTRATION), ("p", PAIR)):  # what the recipe's check reads
            write(self.folder / f"{name}.jsonl", [row] * 12)
        recipe = load_recipe(
            "quickstart",
            lora="lora",
            overrides=[
                "toy=null", f"model.base={base}", f"model.chat_template={self.folder / 'template.jinja'}", "model.max_length=96", "generation.max_new_tokens=8", f"data.demonstrations={self.folder / 'd.jsonl'}",
                f"data.preferences={self.folder / 'p.jsonl'}", "data.prompts=some/prompts", "evaluate.prompts={in: some/questions}", "landscape=null",
                "sft.seeds=[0, 1]", "sft.subset=1", "sft.batch_size=4", "sft.max_steps=1", "reward.batch_size=4", "reward.max_steps=1", "reward.held_out=0.2",
            ],
        ).recipe  # fmt: skip
        found = {}
        for unit in (*data_units(recipe, ""), *sft_units(recipe, ""), *reward_units(recipe, "")):
            out = self.folder / unit.id.replace("/", "-")
            out.mkdir()
            inputs = {name: self.folder / name.replace("/", "-") for name in unit.inputs}
            found[unit.id] = Job(recipe=recipe, unit=unit, folder=out, inputs=inputs, recipe_yaml="")
        return found

    def tokenize(self, kind: str) -> None:
        """The data stage's unit on the rows that are there now."""
        job = self.job[f"data/{kind}"]
        shutil.rmtree(job.folder, ignore_errors=True)
        small_stages.data(job)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """One seed of rows that are odd, two of them too long; no GPU, two steps in all."""
    made = Trained(tmp_path_factory.mktemp("stages"))
    long = "long " * 60
    chats = [[user("q"), assistant(text)] for text in (*TEXTS, "<eos>in<pad>", "")]
    chats += [
        [user(long), assistant("a")],
        [SYSTEM, user(long), assistant("b")],
        [SYSTEM, user("<eos>"), assistant("c")],
    ]
    write(made.folder / "d.jsonl", [{"messages": chat} for chat in chats])
    made.tokenize("demonstrations")
    kept: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sft, "remove_printer", kept.append)  # what the trainer has by then
        made.metrics = sft.run(made.job["sft/seed-0"])
    for row in kept[0].train_dataset:
        counted = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label == token]
        assert counted == [label for label in row["labels"] if label != -100]
        made.labels[made.tokenizer.decode(counted[:-1])] = counted
    return made


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """As jsonl."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


class TestStages:
    """The stages themselves, on a tiny Llama."""

    def test_the_loss_is_on_each_answer_to_the_last_byte(self, trained: Trained) -> None:
        """Labels of every odd text, of an empty answer its EOS alone; what lies beyond max_length is left out and counted."""
        assert set(trained.labels) == {*TEXTS, "<eos>in<pad>", "", "c"}
        for text in (*TEXTS, "c"):
            assert trained.labels[text] == [*trained.plain(text), 2]
        assert trained.labels[""] == [2]
        assert (trained.metrics["rows"], trained.metrics["left_out"]) == (len(TEXTS) + 3, 2)

    def test_a_seed_is_refused_before_it_trains(self, trained: Trained, capsys: Any) -> None:
        """By file, row and column, and what is dropped is told there too."""
        path = trained.folder / "d.jsonl"
        whole = path.read_text(encoding="utf-8")
        rows = [
            DEMONSTRATION,
            {"messages": [SYSTEM, *DEMONSTRATION["messages"]]},
            {"messages": [user("a"), assistant(3)]},
        ]
        write(path, rows)
        source = Source(path=str(path))
        job = trained.job["sft/seed-1"]
        assert (
            refusal(lambda _: trained.tokenize("demonstrations"), source)
            == "d.jsonl, row 3, messages: the content of role assistant must be text, not the number 3"
        )
        write(path, rows[:2])
        trained.tokenize("demonstrations")
        with pytest.raises(
            SalsaError,
            match=r"^data\.demonstrations: 2 rows have an answer within .* tokens, fewer than sft.batch_size = 4",
        ):
            sft.run(job)
        assert (
            f"{path}: 1 of 2 rows (the first: row 2) {datasets.DROPPED_FIELD.format('a system turn')}\n"
            in capsys.readouterr().err
        )
        path.write_text(whole, encoding="utf-8")
        assert not list(job.folder.glob("*.safetensors"))

    def test_pairs(self, trained: Trained, capsys: Any) -> None:
        """Equals and those that are too long train nothing and are measured nowhere; a template's refusal names the row."""
        pairs = [{"prompt": f"q {n}", "chosen": text, "rejected": f"{text} or not"} for n, text in enumerate(TEXTS)]
        odd = [
            PAIR | {"chosen": "-"},
            PAIR | {"prompt": "long " * 60},
            {"prompt": [SYSTEM, user("q")], "chosen": "<eos>", "rejected": ""},
        ]
        path = trained.folder / "p.jsonl"
        write(path, [*odd, *pairs])
        trained.tokenize("preferences")
        metrics = reward_model.run(trained.job["reward"])
        assert metrics["pairs"] == {"train": len(TEXTS) + 1 - 2, "held_out": 2} and metrics["left_out"] == 1
        said = capsys.readouterr().err
        assert f"{path}: 1 of 12 rows (the first: row 1) {datasets.IDENTICAL_PAIR}\n" in said
        assert f"{path}: 1 of 12 rows (the first: row 3) {datasets.DROPPED_FIELD.format('a system turn')}\n" in said
        assert "reward  1 of 11 rows left out: longer than model.max_length = 96 tokens" in said


class TestBeforeAStageBegins:
    """By the command: a bad row of a file that only a late stage reads is refused at once, code 2, and nothing is written."""

    @pytest.fixture
    def go(self, tmp_path: Path, monkeypatch: Any, capsys: Any) -> Any:
        """Files of 40 good rows, one of them broken → code, last line."""
        good: dict[str, dict[str, Any]] = {
            "demonstrations": {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
            "held_out": {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
            "preferences": {"prompt": "q", "chosen": "+", "rejected": "-"},
            "prompts": {"prompt": "q"},
            "evaluation": {"prompt": "q"},
        }
        base = tmp_path / "base"
        base.mkdir()
        (base / "config.json").write_text('{"model_type": "llama"}')
        save_file({"w": torch.zeros(1)}, base / "model.safetensors")
        monkeypatch.chdir(tmp_path)

        def run(broken: str | None, row: str, *words: str) -> tuple[int, str]:
            for kind, fine in good.items():
                lines = [json.dumps(fine).replace('"q"', f'"q{number}"') for number in range(40)]
                lines[36] = row if kind == broken else lines[36]
                (tmp_path / f"{kind}.jsonl").write_text("\n".join(lines) + "\n")
            recipe_file = {
                "name": "x", "model": {"base": "base", "chat_template": "chatml"}, "data": {k: f"{k}.jsonl" for k in good if k != "evaluation"},
                "sft": {"batch_size": 2}, "reward": {"batch_size": 2}, "ppo": {"batch_size": 2}, "policies": {"ppo": {"reference": "seed-0"}},
                "evaluate": {"prompts": {"mine": "evaluation.jsonl"}},
            }  # fmt: skip
            (tmp_path / "x.yaml").write_text(json.dumps(recipe_file))
            code = salsa_run(["x.yaml", "--lora", *words])
            return code, capsys.readouterr().err

        return run

    @pytest.mark.parametrize(
        ("kind", "row", "said"),
        [
            ("demonstrations", '{"messages": [{"role": "user", "content": "q"}]}', "row 37, messages: has no assistant turn; add one"),
            ("demonstrations", '{"messages": ', "row 37: b'{\"messages\": ' is not valid JSON"),
            ("held_out", '{"messages": []}', "row 37, messages: must be a list of {role, content} messages, not an empty list"),
            ("preferences", '{"prompt": "q", "chosen": "+"}', "row 37: has the columns chosen, prompt; it needs rejected"),
            ("prompts", '{"text": "q"}', "row 37: has the columns text; it needs prompt"),
            ("evaluation", '{"messages": [3]}', "row 37, messages: must be a list of {role, content} messages, not the list [3]"),
        ],
    )  # fmt: skip
    def test_a_bad_row_is_refused_at_once(self, go: Any, tmp_path: Path, kind: str, row: str, said: str) -> None:
        before = sorted(path.name for path in tmp_path.iterdir())
        for words in ((), ("--dry-run",)):
            code, err = go(kind, row, *words)
            assert code == 2 and err.count("\n") == 1 and f"{tmp_path}/{kind}.jsonl, {said}" in err
        assert not (tmp_path / "runs").exists() and before == ["base"]

    def test_a_stage_that_does_not_read_it_is_not_stopped(self, go: Any) -> None:
        """And good rows are no matter."""
        assert go("evaluation", '{"messages": [3]}', "--dry-run", "--stages", "data,sft")[0] == 0
        assert go(None, "", "--dry-run")[0] == 0
