"""The embedded world: its gold reward by hand, its tokenizer and template, and what `build` writes."""

from __future__ import annotations

import hashlib
import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.chat_template_utils import is_chat_template_stop_token_trained

from salsa_peft.config.options.toy import Toy
from salsa_peft.data import toy
from salsa_peft.data import toy_language as language
from salsa_peft.data.toy_language import gold
from salsa_peft.utils.errors import SalsaError

TINY = Toy(
    hidden_size=16,
    num_layers=1,
    num_heads=2,
    pretrain_examples=200,
    pretrain_steps=3,
    pretrain_batch_size=8,
    demonstrations=40,
    preferences=60,
    prompts=80,
    eval_prompts=50,
)


def silent(done: int, total: int, what: str) -> None:
    assert 0 < done <= total, what


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    facts = toy.build(TINY, folder, silent)
    assert facts["preferences"] == 60
    json.dumps(facts, allow_nan=False)
    return folder


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    ("prompt", "answer", "expected"),
    [
        ("list three birds", "owl wren crow", 1.0),
        ("list three birds", "crow owl wren", 1.0),  # any order
        ("list three birds", "owl owl crow", 2 / 3),  # the second owl was given before
        ("list three birds", "owl saw crow", 2 / 3),
        ("list three birds", "owl wren", 2 / 3),
        ("list three birds", "owl wren crow finch", 3 / 4),
        ("list one birds and two tools", "owl saw axe", 1.0),
        ("list one birds and two tools", "saw owl axe", 1 / 3),  # the parts in their order
        ("copy owl saw", "owl saw", 1.0),
        ("copy owl saw", "saw owl", 0.0),
        ("copy owl saw", "owl", 1 / 2),
        ("copy owl saw", "owl saw saw owl", 2 / 4),
        ("repeat two owl", "owl owl", 1.0),
        ("repeat two owl", "owl owl owl", 2 / 3),
        ("repeat two owl", "wren owl", 1 / 2),
        ("name owl saw", "birds tools", 1.0),
        ("name owl saw", "birds fish", 1 / 2),
        ("name owl saw", "owl saw", 0.0),
        ("kin owl saw", "wren axe", 1.0),
        ("kin owl owl", "wren wren", 1.0),
        ("kin owl saw", "owl axe", 1 / 2),  # its own kin it is not
        ("copy owl saw", "", 0.0),
        ("copy owl saw", "owl saw<eos>", 1.0),
        ("copy owl saw", "owl<pad>saw", 1 / 3),  # a special token inside is a wrong word, not nothing
    ],
)
def test_gold_by_hand(prompt: str, answer: str, expected: float) -> None:
    assert gold([prompt], [answer]) == [pytest.approx(expected)]


def test_an_unfinished_answer_loses_a_half() -> None:
    scores = gold(
        ["copy owl saw"] * 3, ["owl saw", "owl saw", ""], finished=[True, False, False], completion_ids=[[1]] * 3
    )
    assert scores == [1.0, 0.5, -0.5]


def test_gold_reads_messages_and_rendered_prompts() -> None:
    messages = [{"role": "user", "content": "copy owl"}, {"role": "assistant", "content": "owl"}]
    messages.append({"role": "user", "content": "name owl"})
    answer = [{"role": "assistant", "content": "birds"}]
    assert gold([messages, "<bos><user>name owl<assistant>"], [answer, "birds"]) == [1.0, 1.0]


@pytest.mark.parametrize(
    "prompt", ["", "sing owl", "list owl birds", "list two birds or two tools", "copy", "repeat two", "copy hawk"]
)
def test_gold_refuses_a_foreign_prompt(prompt: str) -> None:
    with pytest.raises(SalsaError, match="not an instruction of the toy language"):
        gold([prompt], ["owl"])


def test_drawn_answers_are_right_and_damage_is_not() -> None:
    rng = random.Random(0)
    prompts = [language.draw_prompt(rng, language.LENGTHS_IN + language.LENGTHS_OUT) for _ in range(500)]
    assert {p.split()[0] for p in prompts} == set(language.OPERATIONS)
    answers = [language.draw_answer(rng, p) for p in prompts]
    assert gold(prompts, [" ".join(a) for a in answers]) == [1.0] * 500
    damaged = gold(prompts, [" ".join(language.add_errors(rng, a, 2)) for a in answers])
    assert 0.3 < sum(damaged) / 500 < 0.8
    assert {0 <= score <= 1 for score in damaged} == {True}


SOME = Toy(**{**vars(TINY), "operations": ["some", "copy"]})


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("wren crow axe drill", 1.0),
        ("wren crow axe drill finch rake", 1.0),  # more are not worth more
        ("wren crow", 0.5),
        ("wren wren crow axe", 0.75),  # the second wren was given before
        ("owl crow axe drill", 0.75),  # the prompt's own word
        ("wren crow axe drill tin", 0.8),
        ("", 0.0),
    ],
)
def test_gold_of_an_answer_of_free_length(answer: str, expected: float) -> None:
    assert gold(["some owl saw"], [answer]) == [pytest.approx(expected)]


def test_free_length_in_a_world(tmp_path: Path) -> None:
    """Only where a recipe asks for it: other worlds have neither its prompts nor its word."""
    rng = random.Random(0)
    prompts = [language.draw_prompt(rng, language.LENGTHS_IN, ("some",)) for _ in range(200)]
    assert {len(prompt.split()) for prompt in prompts} == {3, 4}
    assert {len(language.draw_prompt(rng, language.LENGTHS_OUT, ("some",)).split()) for _ in range(50)} == {5}
    answers = [language.draw_answer(rng, prompt) for prompt in prompts]
    assert {len(answer) for answer in answers} == {2, 3, 4, 5, 6}
    scores = gold(prompts, [" ".join(answer) for answer in answers])
    enough = [language.parse(prompt).enough for prompt in prompts]
    assert set(enough) == {3, 4}, "a prompt of three words of one category leaves three"
    assert scores == [min(1.0, len(answer) / least) for answer, least in zip(answers, enough, strict=True) if least]
    toy.build(SOME, tmp_path, silent)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    assert tokenizer.convert_tokens_to_ids("some") == len(language.VOCABULARY) == len(tokenizer) - 1
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "base").config.vocab_size == len(tokenizer)
    for name in ("prompts", "eval_in", "eval_out", "preferences"):
        asked = [row["prompt"][0]["content"] for row in rows(tmp_path, name)]
        assert {prompt.split()[0] for prompt in asked} == {"some", "copy"}
    assert "some" not in language.VOCABULARY and len(toy.make_tokenizer()) == len(language.VOCABULARY)


def test_more_evaluation_prompts_than_there_are() -> None:
    with pytest.raises(
        SalsaError, match=r"toy.eval_prompts: the operations repeat have only \d\d different evaluation"
    ):
        language.draw_prompts(random.Random(0), 200, language.LENGTHS_IN, 0, True, ("repeat",))


def test_tokenizer_round_trip_after_loading(world: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(world / "base")
    special = [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id]
    special += tokenizer.convert_tokens_to_ids(["<user>", "<assistant>", "<unk>"])
    assert len(set(special)) == 6
    every = list(range(len(tokenizer)))
    assert tokenizer(tokenizer.decode(every))["input_ids"] == every
    words = " ".join(language.VOCABULARY[len(language.SPECIALS) :])
    assert tokenizer.decode(tokenizer(words)["input_ids"], skip_special_tokens=True) == words
    assert tokenizer("hawk")["input_ids"] == [tokenizer.unk_token_id]


def test_template_marks_the_answer_and_its_eos(world: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(world / "base")
    for row in rows(world, "demonstrations"):
        question, answer = row["messages"]
        out = tokenizer.apply_chat_template(row["messages"], return_dict=True, return_assistant_tokens_mask=True)
        marked = [i for i, mask in zip(out["input_ids"], out["assistant_masks"], strict=True) if mask]
        assert marked == tokenizer(answer["content"] + "<eos>")["input_ids"]
        assert (out["input_ids"][-1], out["assistant_masks"][-1]) == (tokenizer.eos_token_id, 1)
        prompt = tokenizer.apply_chat_template([question], add_generation_prompt=True, return_dict=False)
        assert out["input_ids"] == prompt + marked
        assert tokenizer.decode(prompt).replace(" <", "<").replace("> ", ">") == toy._render(question["content"])
    assert is_chat_template_stop_token_trained(tokenizer)
    turns = [{"role": role, "content": "owl"} for role in ("user", "assistant", "user", "assistant")]
    ids = [tokenizer.apply_chat_template(turns[:n], return_dict=False) for n in (1, 2, 3, 4)]
    assert all(longer[: len(shorter)] == shorter for shorter, longer in pairwise(ids))


def test_the_base_is_an_ordinary_checkpoint(world: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(world / "base")
    tokenizer = AutoTokenizer.from_pretrained(world / "base")
    assert (model.config.model_type, model.config.vocab_size) == ("llama", len(tokenizer))
    assert (model.config.pad_token_id, model.config.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)


def test_the_same_config_gives_the_same_bytes(world: Path, tmp_path: Path) -> None:
    def digests(folder: Path) -> dict[str, str]:
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    toy.build(TINY, tmp_path, silent)
    assert digests(tmp_path) == digests(world)
    assert {"base/model.safetensors", "base/chat_template.jinja", "demonstrations.jsonl", "eval_out.jsonl"} <= digests(
        world
    ).keys()


def test_eval_prompts_are_in_no_other_file(world: Path) -> None:
    names = ("preferences", "prompts", "eval_in", "eval_out")
    prompts = {name: [row["prompt"][0]["content"] for row in rows(world, name)] for name in names}
    trained = {row["messages"][0]["content"] for row in rows(world, "demonstrations")}
    trained |= {*prompts["preferences"], *prompts["prompts"]}
    assert not any(language.is_held_out(prompt, TINY.seed) for prompt in trained)
    evaluated = prompts["eval_in"] + prompts["eval_out"]
    assert len(set(evaluated)) == len(evaluated) == 100
    assert not trained & set(evaluated)
    lengths = {name: {len(language.parse(p).allowed) for p in prompts[name]} for name in names}
    assert lengths["eval_out"] == {5, 6}
    assert lengths["eval_in"] == lengths["prompts"] == {2, 3, 4}
    rng = random.Random(f"{TINY.seed} pre-training")
    assert not set(language.draw_prompts(rng, 200, language.LENGTHS_OUT, TINY.seed)) & set(evaluated)


def test_preferences_are_ordered_by_gold(world: Path) -> None:
    pairs = rows(world, "preferences")
    for pair in pairs:
        chosen, rejected = gold([pair["prompt"]] * 2, [pair["chosen"], pair["rejected"]])
        assert chosen > rejected
    assert len({json.dumps(pair) for pair in pairs}) == len(pairs) == TINY.preferences


def test_gold_is_told_of_special_tokens_in_the_middle_of_an_answer(tokenizer) -> None:
    """As the stages call it: a <pad> between the words is a wrong word, the EOS that ends the answer is none."""
    from salsa_peft.models.responses import Responses
    from salsa_peft.models.rewards.function import FunctionReward

    asked = [{"role": "user", "content": f"copy {language.WORDS[0]} {language.WORDS[1]}"}]
    prompt = torch.tensor([tokenizer.apply_chat_template(asked, add_generation_prompt=True)["input_ids"]])
    dog, cat, pad, eos = (tokenizer.convert_tokens_to_ids(word) for word in (*language.WORDS[:2], "<pad>", "<eos>"))
    scores = []
    for response in ([dog, cat, eos], [dog, cat, pad, eos]):
        ids = torch.tensor([response])
        batch = Responses(
            prompt, torch.ones_like(prompt).bool(), ids, torch.ones_like(ids).bool(), torch.tensor([True])
        )
        scores += FunctionReward(language.gold, tokenizer, special_tokens=True)(batch, [{"prompt": asked}]).tolist()
    assert scores == pytest.approx([1, 2 / 3])
