"""Tiny random models of the paper's architectures."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import GemmaConfig, LlamaConfig, MistralConfig

from salsa_peft.config.load import load_recipe
from salsa_peft.config.schema import Recipe
from salsa_peft.data.toy import make_tokenizer
from salsa_peft.models.architectures.sizes import Architecture, architecture_of_recipe

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


CONFIGS = {
    "llama": lambda **more: LlamaConfig(**SIZES, **more),
    "mistral": lambda **more: MistralConfig(**SIZES, sliding_window=64, **more),
    "gemma": lambda **more: GemmaConfig(
        **SIZES, head_dim=32, **more
    ),  # embeddings tied, heads wider than hidden / heads
}


def make_base(kind: str, folder: Path) -> Path:
    """A random base of an architecture with the embedded world's tokenizer, as Transformers saves it."""
    from transformers import AutoModelForCausalLM

    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    config = CONFIGS[kind](vocab_size=len(tokenizer), max_position_embeddings=64, initializer_range=0.3, **ids)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def paper(name: str = "llama2_full", lora: str | None = None, *overrides: str) -> tuple[Recipe, Architecture]:
    """A recipe of the paper and its base."""
    found = load_recipe(name, lora=lora, overrides=list(overrides)).recipe
    size = architecture_of_recipe(found)
    assert size is not None
    return found, size
