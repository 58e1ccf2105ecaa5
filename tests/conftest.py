"""Small models and data that tests make; nothing is downloaded."""

from __future__ import annotations

import functools
import gc
import os
import random

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from paths import SHARED

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    from salsa_peft import SalsaPPOTrainer


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[Any]:
    """Import the libraries without garbage collection, and keep their objects out of every later collection.

    The imports then take 1.3 s less, and every trainer, which collects garbage when it starts, 0.3 s less.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.collect()
        gc.freeze()


def fsync(file: Any) -> None:
    """Check the file descriptor as os.fsync does, but do not wait for the disk."""
    os.fstat(file if isinstance(file, int) else file.fileno())


@pytest.fixture(scope="session", autouse=True)
def fast_disk() -> Iterator[None]:
    """os.fsync does not wait in the tests' process, since no test's files must survive a power failure."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        yield


@pytest.fixture
def shared() -> Path:
    """The folder of real data beside a developer's checkout; a test that uses it skips where it is missing."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the real data in {SHARED}")
    return SHARED


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """The embedded world's tokenizer: about 66 tokens; pad, bos and eos differ."""
    from salsa_peft.data.toy import make_tokenizer

    return make_tokenizer()


@pytest.fixture(scope="session")
def prompts(tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    """Twelve instructions of the embedded world, of 4 to 8 tokens."""
    from salsa_peft.data.toy_language import LENGTHS_IN, draw_prompts

    chats = [[{"role": "user", "content": text}] for text in draw_prompts(random.Random(1), 12, LENGTHS_IN, 0)]
    return [tokenizer.apply_chat_template(c, add_generation_prompt=True, return_dict=True)["input_ids"] for c in chats]


@pytest.fixture(scope="module")
def base() -> LlamaForCausalLM:
    """soup_members.make_llama: the base of made-up adapters."""
    from soup_members import make_llama

    return make_llama()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where a soup's members lie."""
    return tmp_path


@pytest.fixture
def make_base(tokenizer: PreTrainedTokenizerFast) -> Callable[..., LlamaForCausalLM]:
    """tiny.make_base with the tokenizer."""
    import tiny

    return functools.partial(tiny.make_base, tokenizer)


@pytest.fixture
def make_adapter() -> Callable[..., PeftModel]:
    """tiny.make_adapter"""
    import tiny

    return tiny.make_adapter


@pytest.fixture
def make_trainer(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Callable[..., SalsaPPOTrainer]:
    """tiny.make_trainer in a folder of the test's: make_trainer(references, reward, …), or `folder=`."""
    import tiny

    def make(*args: Any, folder: Path | None = None, **options: Any) -> SalsaPPOTrainer:
        return tiny.make_trainer(tokenizer, folder or tmp_path / "out", *args, **options)

    return make


@pytest.fixture
def inline() -> Iterator[None]:
    """Stages run in the tests' process, not in one of their own."""
    from inline_stages import inline_stages

    with inline_stages():
        yield


@pytest.fixture
def of_usual_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny model's forward passes are split as a usual model's, for which starting one costs next to nothing."""
    from salsa_peft.models import batches

    monkeypatch.setattr(batches, "MULTIPLICATIONS", 0)
