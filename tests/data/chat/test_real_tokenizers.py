"""The real tokenizers and templates of sixteen model families: ends, padding, BOS, loss mask, beside what TRL makes of the same rows."""

from __future__ import annotations

import functools
import importlib.util
import json
import lzma
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from paths import SHARED, TEMPLATES

from salsa_peft.data import datasets
from salsa_peft.data.chat import templates as chat_templates
from salsa_peft.data.chat import turn_ends
from salsa_peft.data.chat.assistant_masks import assistant_tokens
from salsa_peft.models.tokenizers import load_tokenizer

CHAT = [
    {"role": "user", "content": "Name two birds."},
    {"role": "assistant", "content": "Owl and wren.\n\n- both fly"},
    {"role": "user", "content": "And a fish?"},
    {"role": "assistant", "content": "Pike"},
]


class Row(NamedTuple):
    """What a family's folder is to give, by the names of its tokens."""

    template: str
    end: str | None
    after: list[str]
    ends: list[str]
    pad: str
    bos: int
    """How often the BOS stands in a prompt."""
    forced: str = ""
    """The start of what the template puts before a conversation."""


LLAMA3_ENDS = ["<|eot_id|>", "<|end_of_text|>", "<|eom_id|>"]
LLAMA3_SYSTEM = "<|start_header_id|>system<|end_header_id|>\n\nKnowledge until: December 2023\nToday is: 26 Jul 2024"
PHI = ["<|end|>", "<|endoftext|>", "<|assistant|>"]
TABLE = {
    "gemma-2-2b-it": Row("tokenizer", "<end_of_turn>", ["<0x0A>"], ["<end_of_turn>", "<eos>"], "<pad>", 1),
    "gemma-3-4b-text": Row("tokenizer", "<end_of_turn>", ["<0x0A>"], ["<end_of_turn>", "<eos>"], "<pad>", 1),
    "llama-3.1-8b-instruct-int8": Row("tokenizer", "<|eot_id|>", [], LLAMA3_ENDS, "<|finetune_right_pad_id|>", 1, LLAMA3_SYSTEM),
    "llama-3.2-1b-instruct": Row("tokenizer", "<|eot_id|>", [], LLAMA3_ENDS, "<|finetune_right_pad_id|>", 1, LLAMA3_SYSTEM),
    "llava-1.5-7b-hf": Row("tokenizer", None, [], ["</s>"], "<pad>", 1),
    "phi-3-mini-128k-instruct": Row("tokenizer", "<|end|>", ["<|endoftext|>"], PHI, "<unk>", 0),
    "qwen2.5-0.5b-instruct": Row(
        "tokenizer", "<|im_end|>", ["Ċ"], ["<|im_end|>", "<|endoftext|>"], "<|fim_pad|>", 0, "<|im_start|>system\nYou are Qwen"
    ),
    "smollm2-135m-instruct": Row(
        "tokenizer", "<|im_end|>", ["Ċ"], ["<|im_end|>"], "<|endoftext|>", 0, "<|im_start|>system\nYou are a helpful AI"
    ),
    "tinyllama-1.1b-chat": Row("tokenizer", "</s>", ["<0x0A>"], ["</s>"], "<unk>", 1),
    "zephyr-7b-beta": Row("tokenizer", "</s>", ["<0x0A>"], ["</s>"], "<unk>", 1),
    "gemma-2b": Row("zephyr", "<eos>", [], ["<eos>"], "<pad>", 1),
    "llama-1-7b-fp16-invfreq": Row("chatml", "</s>", [], ["</s>"], "<unk>", 1),
    "llama-2-7b-hf": Row("chatml", "</s>", [], ["</s>"], "<unk>", 1),
    "mistral-7b-v0.1": Row("zephyr", "</s>", [], ["</s>"], "<unk>", 1),
    "wizardlm-2-8x22b": Row("chatml", "</s>", [], ["</s>"], "<unk>", 1),
    "gpt2": Row("zephyr", "<|endoftext|>", [], ["<|endoftext|>"], "<|endoftext|>", 3),  # one token for all: three turns end
}  # fmt: skip


@pytest.fixture(scope="session")
def unpack(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Family → its folder without weights, as hub/make_tiny.py unpacks one."""
    hub = SHARED / "hub"
    if not hub.is_dir():
        pytest.skip(f"needs the real tokenizers in {hub}")
    spec: Any = importlib.util.spec_from_file_location("make_tiny", hub / "make_tiny.py")
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)

    @functools.cache
    def folder(family: str) -> Path:
        out = tmp_path_factory.mktemp(family)
        for file in (hub / "models" / family).iterdir():
            if file.suffix == ".xz" and not file.name.startswith("tokenizer.json"):
                (out / file.stem).write_bytes(lzma.decompress(file.read_bytes()))
            elif file.suffix in (".json", ".jinja", ".model"):
                shutil.copy(file, out / file.name)
        maker.put_tokenizer(family, out)
        return out

    folder.hub = hub  # type: ignore[attr-defined]
    return folder


def load(folder: Path, template: str) -> Any:
    return load_tokenizer(
        str(folder), chat_template=template if template == "tokenizer" else str(TEMPLATES / f"{template}.jinja")
    )


@pytest.mark.parametrize("family", TABLE)
def test_a_family(unpack: Any, family: str) -> None:
    from transformers import GenerationConfig

    row, folder = TABLE[family], unpack(family)
    tokenizer = load(folder, row.template)
    named = tokenizer.convert_ids_to_tokens
    turn = turn_ends.assistant_turn(tokenizer)
    assert (None if turn.end is None else named(turn.end)) == row.end
    assert named(list(turn.after)) == row.after
    assert named(list(turn_ends.stop_token_ids(tokenizer, GenerationConfig.from_pretrained(folder)))) == row.ends
    assert (tokenizer.pad_token, tokenizer.padding_side, tokenizer.truncation_side) == (row.pad, "right", "right")
    assert chat_templates.default_prefix(tokenizer).startswith(row.forced) and bool(
        chat_templates.default_prefix(tokenizer)
    ) is bool(row.forced)
    # BOS, in a prompt from messages and from text that was rendered
    prompt = datasets.prompt_tokens({"prompt": CHAT[:3]}, tokenizer)
    starts = family == "smollm2-135m-instruct"  # whose BOS starts each turn, and is not added
    assert prompt.count(tokenizer.bos_token_id) == (5 if starts else row.bos)
    text = chat_templates.render(CHAT[:3], tokenizer, add_generation_prompt=True)
    assert datasets.prompt_tokens({"prompt": text}, tokenizer) == prompt
    # the loss: what was answered and what ends it; the prompt is what stands before the last answer
    ids, mask = assistant_tokens(CHAT, tokenizer)
    assert ids[: len(prompt)] == prompt and not mask[len(prompt) - 1] and mask[len(prompt)]
    learned = "".join(tokenizer.decode([token for token, counts in zip(ids, mask, strict=True) if counts]).split())
    end = row.end or ""
    if family != "llava-1.5-7b-hf":  # its blank after an answer is part of the next turn's first token
        assert learned == "".join(f"{CHAT[1]['content']}{end}{CHAT[3]['content']}{end}".split())
    assert tokenizer.pad_token_id not in ids or family == "gpt2"


@pytest.mark.parametrize(
    "family", [name for name, row in TABLE.items() if row.template == "tokenizer" and "llava" not in name]
)
def test_the_same_tokens_as_trl(unpack: Any, family: str) -> None:
    """TRL's SFT and reward trainers render the same; where it knows the template, its mask has ours and what stands after the end."""
    from trl.chat_template_utils import get_training_chat_template
    from trl.data_utils import _tokenize

    tokenizer = load(unpack(family), "tokenizer")
    ids, mask = assistant_tokens(CHAT, tokenizer)
    assert _tokenize(tokenizer, CHAT)["input_ids"] == ids
    try:
        template = get_training_chat_template(tokenizer)
    except ValueError:
        return
    trls = _tokenize(tokenizer, CHAT, chat_template=template, return_assistant_tokens_mask=True)
    assert trls["input_ids"] == ids
    turn = turn_ends.assistant_turn(tokenizer)
    more = [token for token, own, theirs in zip(ids, mask, trls["assistant_masks"], strict=True) if theirs and not own]
    assert set(more) <= {*turn.after, tokenizer.bos_token_id} | set(
        tokenizer("\n", add_special_tokens=False)["input_ids"]
    )
    assert all(theirs for own, theirs in zip(mask, trls["assistant_masks"], strict=True) if own)


def test_a_truncation_that_was_saved(unpack: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(unpack("gpt2"), tmp_path / "gpt2")
    quirk = json.loads((unpack.hub / "models" / "gpt2" / "saved_truncation.quirk.json").read_text(encoding="utf-8"))
    file = folder / "tokenizer.json"
    file.write_text(
        json.dumps(json.loads(file.read_text(encoding="utf-8")) | {"truncation": quirk["truncation"]}), encoding="utf-8"
    )
    tokenizer = load(folder, "zephyr")
    long = [{"role": "user", "content": "word " * 300}, {"role": "assistant", "content": "word " * 300}]
    assert len(assistant_tokens(long, tokenizer)[0]) > 600
    assert len(datasets.prompt_tokens({"prompt": "word " * 300}, tokenizer)) >= 300
