"""The trainer's datasets: what is no row of prompts is refused by its number; what is too long is left out and told."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from plain_ppo import PROMPTS

from salsa_peft.training.ppo.prompts import PromptEncoder
from salsa_peft.utils.errors import SalsaError

CHAT = PROMPTS[0]["prompt"]


@pytest.mark.parametrize(
    ("rows", "line"),
    [
        (None, "data: pass rows with `prompt` or `input_ids`, not None"),
        ({"train": PROMPTS}, r"data: this is a dict with the keys \['train'\]. Pass the dataset under one of the keys"),
        (["a b"], "data, row 1: 'a b' must be a mapping"),
        ([PROMPTS[0], {"prompt": None, "id": 1}], "data, row 2, prompt: must be text or messages, but is None"),
        ([{"text": "a"}], "data, row 1: must have `prompt` or `input_ids`, but has only text"),
        ([{"prompt": [{"role": "system", "content": "be good"}, *CHAT]}], r"data, row 1, prompt: the tokenizer's chat template rejects these messages: the embedded world knows the roles user and assistant, not system; remove the system turn, or set model\.chat_template to a template with system turns"),
        ([{"prompt": [*CHAT, {"role": "assistant", "content": "owl"}]}], "data, row 1, prompt: the last message must be the user's"),
        ([{"input_ids": [1, 9999]}], r"data, row 1: token id \[9999\] has no embedding; ids must be from 0 to 64"),
        ([{"input_ids": [1, -1]}], r"data, row 1: token id \[-1\] has no embedding; ids must be from 0 to 64"),
    ],
)  # fmt: skip
def test_what_is_no_prompt(tokenizer: Any, rows: Any, line: str) -> None:
    with pytest.raises(SalsaError, match=line):
        PromptEncoder(tokenizer, None, len(tokenizer))(rows, "data")


def test_datasets(tokenizer: Any) -> None:
    """Hugging Face's, also as tensors, and a plain list."""
    from datasets import Dataset, DatasetDict

    encode = PromptEncoder(tokenizer, None, len(tokenizer))
    made = Dataset.from_dict({"input_ids": [[3, 4, 5], [6]]})
    for rows in (made, made.with_format("torch"), made.to_iterable_dataset(), list(made)):
        assert [prompt.tokens for prompt in encode(rows, "data")[0]] == [[3, 4, 5], [6]]
    with pytest.raises(SalsaError, match=r"data: this is a DatasetDict with the keys \['train'\]"):
        encode(DatasetDict(train=made), "data")


def test_what_is_left_out_is_told_once(tokenizer: Any, capsys: Any) -> None:
    """Empty ones and those that are too long; by one process."""
    rows = [{"input_ids": [5] * length} for length in (0, 1, 3, 4, 9)]
    kept, left_out = PromptEncoder(tokenizer, 3, 10)(rows, "train_dataset")
    assert ([len(prompt.tokens) for prompt in kept], left_out) == ([1, 3], 3)
    said = capsys.readouterr().err
    assert said.startswith("train_dataset: 3 of 5 prompts left out: empty, or longer than 3 tokens (max_prompt_length")
    PromptEncoder(tokenizer, 3, 10, quiet=True)(rows, "train_dataset")
    PromptEncoder(tokenizer, 9, 10)(rows[1:], "train_dataset")
    assert capsys.readouterr().err == ""


def test_the_longest_prompt(make_base: Any, tokenizer: Any) -> None:
    """What leaves room for a response in the policy and in every reference, and max_prompt_length where that is less."""

    def longest(*positions: int, given: int | None = None) -> int | None:
        models = [make_base(max_position_embeddings=number) for number in positions]
        args: Any = SimpleNamespace(max_new_tokens=7, max_prompt_length=given, process_index=0)
        return PromptEncoder.of(models, args, tokenizer).longest

    assert (longest(64), longest(64, given=200), longest(64, given=9)) == (57, 57, 9)
    assert longest(64, 16) == 9
    with pytest.raises(
        SalsaError, match="max_new_tokens: 7 leaves no room for a prompt in the 7 tokens that the models can read"
    ):
        longest(64, 7)


def test_the_trainer_tells_of_both_sets(make_trainer: Any, capsys: Any) -> None:
    """Also of one that evaluate() is given; a set too long for all its prompts is refused there."""
    long = [{"input_ids": [5] * 58}]
    trainer = make_trainer(prompts=PROMPTS + long, eval_dataset=PROMPTS[:2] + long)
    assert (trainer.left_out, len(trainer.eval_dataset)) == (1, 2)
    said = capsys.readouterr().err
    assert "train_dataset: 1 of 17 prompts left out" in said and "eval_dataset: 1 of 3 prompts left out" in said
    with pytest.raises(
        SalsaError, match=r"eval_dataset: there are no prompts to evaluate on\. Pass rows with `prompt`"
    ):
        trainer.evaluate(long)
