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
    """No garbage collection of the libraries: not while they are imported, and none of their objects is looked at later.

    Every trainer collects garbage when it starts, which took 0.3 s each time; the imports took 1.3 s more.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.collect()
        gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_the_disk() -> Iterator[None]:
    """os.fsync checks its descriptor and returns: what tests write need not outlive a power cut. Started processes have their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: os.fstat(file if isinstance(file, int) else file.fileno()) and None)
        yield


@pytest.fixture
def shared() -> Path:
    """The folder of real data beside a developer's checkout; a test that uses it skips where it is missing."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the real data in {SHARED}")
    return SHARED


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """The embedded world's: 66 tokens or so, distinct pad, bos, eos."""
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
