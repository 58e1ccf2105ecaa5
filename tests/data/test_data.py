"""Datasets → messages: every form that is taken, every refusal's line, the real files, our chat templates."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from paths import TEMPLATES

from salsa_peft.config.schema import Source
from salsa_peft.data import datasets
from salsa_peft.data.check import count_rows
from salsa_peft.data.files import load_rows
from salsa_peft.utils.errors import SalsaError


def user(text: str) -> dict[str, str]:
    """One turn."""
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    """One turn."""
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "be brief"}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Source]:
    """Rows → a jsonl file as a Source."""

    def make(*rows: dict[str, Any], **options: Any) -> Source:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return Source(path=str(path), **options)

    return make


class TestForms:
    def test_demonstrations(self, write: Any) -> None:
        """Turns after the last answer are dropped; other columns don't matter."""
        chat = [SYSTEM, user("a"), assistant("b"), user("c"), assistant("d")]
        found = datasets.demonstrations(write({"messages": chat, "id": 1}, {"messages": [*chat, user("e")], "id": 2}))
        assert found == [{"messages": chat}, {"messages": chat}]

    @pytest.mark.parametrize("prompt", [[user("q")], "q"])
    @pytest.mark.parametrize("text", [True, False])
    def test_preferences_with_a_prompt(self, write: Any, prompt: Any, text: bool) -> None:
        """Prompt and answers, each as text or messages."""
        good, bad = ("+", "-") if text else ([assistant("+")], [assistant("-")])
        found = datasets.preferences(write({"prompt": prompt, "chosen": good, "rejected": bad}))
        assert found == [{"chosen": [user("q"), assistant("+")], "rejected": [user("q"), assistant("-")]}]

    @pytest.mark.parametrize("columns", [{}, {"prompt": "q"}, {"prompt": [SYSTEM, user("q")]}])
    def test_preferences_that_hold_their_prompt(self, write: Any, columns: dict[str, Any]) -> None:
        """HuggingFaceH4's form: whole chats, and a prompt column that is not put before them again."""
        good, bad = [SYSTEM, user("q"), assistant("+")], [SYSTEM, user("q"), assistant("-")]
        assert datasets.preferences(write(columns | {"chosen": good, "rejected": bad})) == [
            {"chosen": good, "rejected": bad}
        ]

    def test_preferences_of_several_turns(self, write: Any) -> None:
        prompt = [user("a"), assistant("b"), user("c")]
        found = datasets.preferences(
            write({"prompt": prompt, "chosen": [assistant("+")], "rejected": [assistant("-")]})
        )
        assert found == [{"chosen": [*prompt, assistant("+")], "rejected": [*prompt, assistant("-")]}]

    @pytest.mark.parametrize(
        ("row", "expected"),
        [
            ({"prompt": "q"}, [user("q")]),
            ({"prompt": [SYSTEM, user("q")]}, [SYSTEM, user("q")]),
            ({"prompt": [user("a"), assistant("b"), user("c")]}, [user("a"), assistant("b"), user("c")]),
            ({"messages": [user("q"), assistant("a")]}, [user("q")]),
            (
                {"messages": [SYSTEM, user("a"), assistant("b"), user("c"), assistant("d")]},
                [SYSTEM, user("a"), assistant("b"), user("c")],
            ),
            ({"messages": [user("q")]}, [user("q")]),
            ({"turns": ["first", "second"]}, [user("first")]),
            ({"prompt": "q", "messages": [user("other")], "turns": ["another"]}, [user("q")]),
            ({"prompt": None, "turns": ["first"]}, [user("first")]),
        ],
    )
    def test_prompts(self, write: Any, row: dict[str, Any], expected: list[dict[str, str]]) -> None:
        assert datasets.prompts(write(row)) == [{"prompt": expected}]

    def test_shown_to_people(self) -> None:
        assert datasets.prompt_text([user("q")]) == "q"
        assert datasets.prompt_text([SYSTEM, user("q")]) == "system: be brief\nuser: q"

    def test_a_file_is_sliced_as_datasets_slices_a_split(self, write: Any) -> None:
        """Held-out rows of one file are not its training rows; row numbers stay the file's; a split by name is in no file."""
        rows = [{"prompt": f"p{i}"} for i in range(10)]

        def take(split: str, **more: Any) -> list[int]:
            return [number for number, _ in load_rows(write(*rows, split=split, **more))]

        assert take("train[:80%]") == [*range(1, 9)] and take("train[80%:]") == [9, 10]
        assert take("train[:2]+train[-1:]") == [1, 2, 10]
        assert set(take("train[5:]", limit=3)) < {6, 7, 8, 9, 10}
        for split, line in (
            ("train[5:2]", r"split 'train\[5:2\]' contains none of the 10 rows; use a slice such as train\[:80%\]"),
            (
                "train[a:]",
                r"split 'train\[a:\]' is not a slice of 10 rows \(Unrecognized instruction format: train\[a:\]\); use one such as train\[:80%\]",
            ),
            ("validation", "`split: validation` has no meaning for a single file"),
        ):
            with pytest.raises(SalsaError, match=line):
                take(split)

    def test_rows_of_a_slice_are_counted_before_the_file_is_read(self, write: Any) -> None:
        """As many as load_rows gives; a slice in percent is not counted."""
        rows = [{"prompt": f"p{i}"} for i in range(10)]
        for split, limit in (
            ("train[:7]", None),
            ("train[7:]", None),
            ("train[2:6]", None),
            ("train[:7]", 3),
            ("train[-2:]", None),
        ):
            source = write(*rows, split=split, limit=limit)
            assert count_rows(source) in (len(load_rows(source)), None)
            assert (count_rows(source) is None) == ("-" in split)
        assert count_rows(write(*rows, split="train[:80%]")) is None and count_rows(write(*rows)) == 10

    def test_limit_is_deterministic(self, write: Any) -> None:
        """The first rows after one shuffle: the same every time, smaller limits inside larger, not the file's order."""
        rows = [{"prompt": f"q{i}"} for i in range(40)]

        def take(limit: int | None) -> list[str]:
            return [row["prompt"][0]["content"] for row in datasets.prompts(write(*rows, limit=limit))]

        ten = take(10)
        assert ten == take(10)
        assert len(set(ten)) == 10
        assert ten[:4] == take(4)
        assert ten != [f"q{i}" for i in range(10)]
        assert take(None) == take(40) == take(99) == [f"q{i}" for i in range(40)]

    def test_a_folder_of_the_hubs_form(self, tmp_path: Path) -> None:
        """A data set's local copy: its splits by name."""
        folder = tmp_path / "set"
        folder.mkdir()
        for split in ("train", "test"):
            (folder / f"{split}.jsonl").write_text(json.dumps({"prompt": split}) + "\n")
        assert datasets.prompts(Source(path=str(folder), split="test")) == [{"prompt": [user("test")]}]


FINE = {"prompt": "q", "chosen": [assistant("+")], "rejected": [assistant("-")]}


class TestRefusals:
    @pytest.mark.parametrize(
        ("read", "fine", "row", "message"),
        [
            (datasets.demonstrations, {"text": None, "messages": [user("a"), assistant("b")]}, {"text": "x", "messages": None},
             r": has the columns messages, text; it needs messages, conversations, prompt and completion or instruction and output; the loss needs to know which part is the assistant's, and `text` alone does not show it; messages is null"),
            (datasets.demonstrations, {"messages": [user("a"), assistant("b")]}, {"messages": [user("a")]},
             r", messages: has no assistant turn; add one"),
            (datasets.demonstrations, {"messages": [user("a"), assistant("b")]}, {"messages": []},
             r", messages: must be a list of \{role, content\} messages, not an empty list"),
            (datasets.demonstrations, {"messages": [user("a"), assistant("b")]}, {"messages": [{"role": None, "content": "a"}]},
             r", messages: role must be text, not null"),
            (datasets.demonstrations, {"messages": [user("a"), assistant("b")]}, {"messages": [{"role": "user", "content": None}]},
             r", messages: the content of role user must be text, not null"),
            (datasets.preferences, FINE, FINE | {"chosen": None}, r": has the columns chosen, prompt, rejected; it needs chosen; chosen is null"),
            (datasets.preferences, FINE, FINE | {"rejected": None}, r": has the columns chosen, prompt, rejected; it needs rejected; rejected is null"),
            (datasets.preferences, FINE, FINE | {"prompt": None}, r": has the columns chosen, prompt, rejected; it needs prompt \(or question, instruction or conversations\), because the answers do not contain the prompt; prompt is null"),
            (datasets.preferences, FINE, FINE | {"rejected": [user("q"), user("r")]},
             r", rejected: must end with an assistant turn, not with a user turn"),
            (datasets.preferences, FINE, FINE | {"chosen": []}, r", chosen: must be a list of \{role, content\} messages, not an empty list"),
            (datasets.prompts, {"prompt": "q", "x": 1}, {"prompt": None, "x": 1}, r": has the columns prompt, x; it needs prompt, messages, conversations, instruction, question or turns; prompt is null"),
            (datasets.prompts, {"prompt": [user("q")]}, {"prompt": []}, r", prompt: must be a list of \{role, content\} messages, not an empty list"),
            (datasets.prompts, {"prompt": [user("q")]}, {"prompt": [user("q"), assistant("a")]},
             r", prompt: must not end with an assistant turn, because the policy answers next; remove that turn"),
            (datasets.prompts, {"messages": [user("q")]}, {"messages": [assistant("a")]}, r", messages: has no user turn; add one"),
            (datasets.prompts, {"turns": ["a", "b"]}, {"turns": []}, r", turns: must be a list of user turns, not an empty list"),
        ],
    )  # fmt: skip
    def test_the_second_row_is_named(
        self, write: Any, read: Any, fine: dict[str, Any], row: dict[str, Any], message: str
    ) -> None:
        """File, row and column in one line; the first row is fine."""
        source = write(fine, row)
        assert read(write(fine))
        source = write(fine, row)
        with pytest.raises(SalsaError, match=message) as refusal:
            read(source)
        assert str(refusal.value).startswith(f"{source.path}, row 2")
        assert "\n" not in str(refusal.value)

    def test_what_is_no_list_of_messages(self) -> None:
        for value in ("text", 3, None, ["text"], {"role": "user"}):
            with pytest.raises(SalsaError, match=r"here: must be a list of \{role, content\} messages, not "):
                datasets.parse_messages(value, "here")

    def test_a_file_without_rows(self, write: Any) -> None:
        with pytest.raises(SalsaError, match=r"rows\.jsonl: has no rows"):
            load_rows(write())

    def test_messages_without_a_template(self, tokenizer: Any) -> None:
        import copy

        bare = copy.deepcopy(tokenizer)
        bare.chat_template = None
        with pytest.raises(
            SalsaError,
            match="prompts, row 4, prompt: has messages, but the tokenizer has no chat template; set a chat template, or give text",
        ):
            datasets.prompt_tokens({"prompt": [user("copy owl")]}, bare, 4)
        assert datasets.prompt_tokens({"prompt": "copy owl"}, bare) == bare("copy owl")["input_ids"]
        with pytest.raises(SalsaError, match="prompts, row 4: has the columns text; it needs prompt"):
            datasets.prompt_tokens({"text": "copy owl"}, bare, 4)


class TestRealFiles:
    """The data beside a developer's checkout: every row parses."""

    def test_demonstrations(self, shared: Path) -> None:
        rows = datasets.demonstrations(Source(path=str(shared / "data" / "demonstrations.jsonl")))
        assert len(rows) == 999
        assert all(row["messages"][-1]["role"] == "assistant" for row in rows)
        assert all(
            row["prompt"][-1]["role"] == "user"
            for row in datasets.prompts(Source(path=str(shared / "data" / "demonstrations.jsonl")))
        )

    def test_preferences(self, shared: Path) -> None:
        rows = datasets.preferences(Source(path=str(shared / "data" / "preferences.jsonl")))
        assert len(rows) == 300
        for row in rows:
            assert row["chosen"][0]["role"] in ("user", "system")
            assert row["chosen"][:-1] == row["rejected"][:-1]
            assert row["chosen"][-1]["role"] == row["rejected"][-1]["role"] == "assistant"
        prompts = datasets.prompts(Source(path=str(shared / "data" / "preferences.jsonl")))
        assert [row["prompt"] for row in prompts] == [row["chosen"][:-1] for row in rows]

    @pytest.mark.parametrize(
        ("name", "rows", "column"), [("mt_bench", 80, "turns"), ("arena_hard_v0.1", 500, "prompt")]
    )
    def test_questions(self, shared: Path, name: str, rows: int, column: str) -> None:
        path = shared / "data" / name / "question.jsonl"
        found = datasets.prompts(Source(path=str(path)))
        assert len(found) == rows
        lines = [json.loads(line)[column] for line in path.read_text(encoding="utf-8").splitlines()]
        assert [row["prompt"] for row in found] == [[user(line[0] if column == "turns" else line)] for line in lines]


CHATS = [
    [user("Name a bird."), assistant("owl")],
    [SYSTEM, user("a\n\nb"), assistant("first\nanswer"), user(" more "), assistant("second  \n")],
    [user("<b>assistant</b>\n"), assistant("")],
    [user("naïve 猫"), assistant("assistant\n</s> isn't here"), user("?"), assistant("!")],
]


@pytest.fixture(params=["chatml", "zephyr"])
def chat_tokenizer(request: pytest.FixtureRequest) -> Any:
    """A byte-level BPE trained on the chats themselves, so that tokens may reach across a turn's edges; with BOS and EOS."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    texts = [f"<|im_start|>{m['role']}\n<|{m['role']}|>\n{m['content']}\n" for chat in CHATS for m in chat] * 3
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    fast.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=["<pad>", "<s>", "<eos>"])
    )
    template = (TEMPLATES / f"{request.param}.jinja").read_text(encoding="utf-8")
    return PreTrainedTokenizerFast(
        tokenizer_object=fast, pad_token="<pad>", bos_token="<s>", eos_token="<eos>", chat_template=template
    )


class TestTemplates:
    @pytest.mark.parametrize("chat", CHATS)
    def test_the_mask_is_the_answers_and_their_eos(self, chat_tokenizer: Any, chat: list[dict[str, str]]) -> None:
        """What TRL's assistant_only_loss trains on: each assistant turn's text and EOS, nothing more, nothing less."""
        found = chat_tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
        runs: list[list[int]] = []
        before = 0
        for token, counts in zip(found["input_ids"], found["assistant_masks"], strict=True):
            if counts and not before:
                runs.append([])
            if counts:
                runs[-1].append(token)
            before = counts
        assert [chat_tokenizer.decode(run) for run in runs] == [
            m["content"] + "<eos>" for m in chat if m["role"] == "assistant"
        ]
        assert all(run.count(chat_tokenizer.eos_token_id) == 1 for run in runs)

    @pytest.mark.parametrize("chat", CHATS)
    def test_the_prompt_is_a_prefix_of_the_chat(self, chat_tokenizer: Any, chat: list[dict[str, str]]) -> None:
        """PPO's prompt is what SFT saw before the answer, token by token; the rest is the answer and EOS, and then nothing."""
        whole = chat_tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"]
        prompt = datasets.prompt_tokens({"prompt": chat[:-1]}, chat_tokenizer)
        assert whole[: len(prompt)] == prompt
        assert chat_tokenizer.decode(whole[len(prompt) :]) == chat[-1]["content"] + "<eos>"
        assert whole[-1] == chat_tokenizer.eos_token_id

    @pytest.mark.xfail(
        strict=True,
        reason="a known limit: such an answer's first token holds the newline before it, in a BPE that has it",
    )
    def test_an_answer_that_starts_with_blanks(self, chat_tokenizer: Any) -> None:
        """The template takes answers as they are."""
        chat = [user("q"), assistant("\n\nb")]
        prompt = datasets.prompt_tokens({"prompt": chat[:-1]}, chat_tokenizer)
        assert chat_tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"][: len(prompt)] == prompt

    def test_the_formats_text(self, chat_tokenizer: Any) -> None:
        """By hand."""
        text = chat_tokenizer.apply_chat_template([SYSTEM, user("q"), assistant("a")], tokenize=False)
        if "im_start" in chat_tokenizer.chat_template:
            expected = "<|im_start|>system\nbe brief<eos>\n<|im_start|>user\nq<eos>\n<|im_start|>assistant\na<eos>"
        else:
            expected = "<|system|>\nbe brief<eos>\n<|user|>\nq<eos>\n<|assistant|>\na<eos>"
        assert text == expected

    def test_plain_text_is_the_turns_with_blanks_between_them(self, chat_tokenizer: Any) -> None:
        """No mark and no end token, whether or not a turn has blanks at its edges; the loss is on the answers alone."""
        chat_tokenizer.chat_template = (TEMPLATES / "plain.jinja").read_text(encoding="utf-8")
        chat = [user("Once there was a\n"), assistant(" cat. It"), user("ran"), assistant("home.")]
        assert chat_tokenizer.apply_chat_template(chat, tokenize=False) == "Once there was a cat. It ran home."
        found = chat_tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
        taken = [token for token, mask in zip(found["input_ids"], found["assistant_masks"], strict=True) if mask]
        assert chat_tokenizer.decode(taken) == " cat. It home."
        assert chat_tokenizer.decode(datasets.prompt_tokens({"prompt": chat[:1]}, chat_tokenizer)) == "Once there was a"

    def test_the_embedded_worlds_template_too(self, tokenizer: Any) -> None:
        chat = [user("copy owl saw"), assistant("owl saw")]
        found = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
        prompt = datasets.prompt_tokens({"prompt": chat[:-1]}, tokenizer)
        assert found["input_ids"][: len(prompt)] == prompt
        assert found["assistant_masks"] == [0] * len(prompt) + [1, 1, 1]
        assert found["input_ids"][-1] == tokenizer.eos_token_id

    def test_a_final_eos_of_the_tokenizer_is_taken_off_a_text_prompt(self, tokenizer: Any) -> None:
        """Some tokenizers end every text with EOS, after which nothing would be sampled."""
        assert datasets.prompt_tokens({"prompt": "copy owl <eos>"}, tokenizer) == tokenizer("copy owl")["input_ids"]
        assert datasets.prompt_tokens({"input_ids": [7, 2]}, tokenizer) == [7, 2]
