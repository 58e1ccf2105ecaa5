"""Small models and data that tests make; nothing is downloaded."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture
def shared() -> Path:
    """The folder of real data beside a developer's checkout; a test that uses it skips where it is missing."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the real data in {SHARED}")
    return SHARED


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """The embedded world's: 66 tokens or so, distinct pad, bos, eos."""
    from salsa_peft.toy import make_tokenizer

    return make_tokenizer()


@pytest.fixture
def make_base(tokenizer: PreTrainedTokenizerFast) -> Callable[..., LlamaForCausalLM]:
    """seed → a tiny random Llama, its weights large enough that what it samples is far from uniform."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(seed: int = 0, **options: Any) -> LlamaForCausalLM:
        torch.manual_seed(seed)
        settings = {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        }
        config = LlamaConfig(
            vocab_size=len(tokenizer), max_position_embeddings=64, initializer_range=0.3, pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, **(settings | options),
        )  # fmt: skip
        model = LlamaForCausalLM(config).eval()
        model.lm_head.weight.data[tokenizer.eos_token_id] *= 3  # so that responses end at other lengths
        return model

    return make


@pytest.fixture
def make_adapter() -> Callable[..., PeftModel]:
    """(model, name, seed) → the model with a LoRA adapter of random A and B (a fresh adapter's delta would be zero)."""
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model

    from salsa_peft import adapters

    def make(model: Any, name: str, seed: int, **options: Any) -> PeftModel:
        config = LoraConfig(
            **({"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | options)
        )
        if isinstance(model, PeftModel):
            model.add_adapter(name, config)
        else:
            model = get_peft_model(model, config, adapter_name=name)
        generator = torch.Generator().manual_seed(seed)
        for parameter in adapters.parameters(model, name):
            parameter.data.normal_(std=0.2, generator=generator)
        return model

    return make
