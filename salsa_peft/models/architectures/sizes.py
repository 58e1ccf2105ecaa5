"""Parameters, linear layers and KV cache of a decoder, from its config.json. Imports no torch.

The sizes are exact for Llama, Mistral, Gemma, Qwen2, Qwen3 and similar architectures, as tests against Transformers
show. Any other architecture is assumed to give the keys of its config.json the same meaning, which is wrong for
mixtures of experts, state-space models and encoders.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from salsa_peft.config.schema import Recipe
from salsa_peft.utils.errors import SalsaError
from salsa_peft.utils.files import read_json
from salsa_peft.utils.hub import cached_folder

KNOWN: dict[str, dict[str, Any]] = {
    "meta-llama/Llama-2-7b-hf": {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32, "vocab_size": 32000, "tie_word_embeddings": False,
    },
    "mistralai/Mistral-7B-v0.1": {
        "model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 32000, "tie_word_embeddings": False,
    },
    "google/gemma-2b": {
        "model_type": "gemma", "hidden_size": 2048, "intermediate_size": 16384, "num_hidden_layers": 18, "num_attention_heads": 8,
        "num_key_value_heads": 1, "head_dim": 256, "vocab_size": 256000, "tie_word_embeddings": True,
    },
}  # fmt: skip
"""Sizes in the config.json of the SALSA paper's bases. These are gated on the Hub; --dry-run works without access."""
TIED = ("gemma", "gemma2", "gemma3_text")
"""Architectures whose input and output embeddings are tied by default."""


class Linear(NamedTuple):
    """Name and size of a linear layer that every decoder layer has."""

    name: str
    inputs: int
    outputs: int
    bias: bool


@dataclass(frozen=True)
class Architecture:
    """The sizes of a decoder."""

    kind: str
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    qkv_bias: bool
    norms: int
    """Number of parameters in the norms of one layer."""

    @classmethod
    def of(cls, config: dict[str, Any]) -> Architecture:
        """Read the sizes from the content of a config.json. Raises KeyError if a key is missing."""
        config = config.get("text_config", config)
        kind, hidden = str(config.get("model_type", "")), int(config["hidden_size"])
        heads = int(config["num_attention_heads"])
        head_dim = int(config.get("head_dim") or hidden // heads)
        of_heads = 2 * head_dim if kind in ("qwen3", "gemma3_text") else 0  # norms of queries and keys
        return cls(
            kind=kind,
            hidden=hidden,
            inner=int(config["intermediate_size"]),
            layers=int(config["num_hidden_layers"]),
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=head_dim,
            vocabulary=int(config["vocab_size"]),
            tied=bool(config.get("tie_word_embeddings", kind in TIED)),
            qkv_bias=bool(config.get("attention_bias", kind == "qwen2")),
            norms=(4 if kind in ("gemma2", "gemma3_text") else 2) * hidden + of_heads,
        )

    @property
    def linears(self) -> list[Linear]:
        """The linear layers of one decoder layer. nf4 quantises them, and all-linear adapts them."""
        h, wide, narrow = self.hidden, self.heads * self.head_dim, self.kv_heads * self.head_dim
        return [
            Linear("q_proj", h, wide, self.qkv_bias), Linear("k_proj", h, narrow, self.qkv_bias),
            Linear("v_proj", h, narrow, self.qkv_bias), Linear("o_proj", wide, h, self.qkv_bias and self.kind == "llama"),
            Linear("gate_proj", h, self.inner, False), Linear("up_proj", h, self.inner, False),
            Linear("down_proj", self.inner, h, False),
        ]  # fmt: skip

    @property
    def in_linears(self) -> int:
        """Number of weights in the linear layers of all decoder layers, without biases."""
        return self.layers * sum(linear.inputs * linear.outputs for linear in self.linears)

    @property
    def parameters(self) -> int:
        """Number of parameters, where tied embeddings count once."""
        biases = self.layers * sum(linear.outputs for linear in self.linears if linear.bias)
        embeddings = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return self.in_linears + biases + self.layers * self.norms + self.hidden + embeddings

    @property
    def head(self) -> int:
        """Number of parameters of untied output embeddings, which a classifier lacks; 0 for tied embeddings."""
        return 0 if self.tied else self.vocabulary * self.hidden

    @property
    def largest(self) -> int:
        """Number of parameters in the largest weight."""
        return max(self.vocabulary * self.hidden, *(linear.inputs * linear.outputs for linear in self.linears))

    @property
    def kv_per_token(self) -> int:
        """Number of values that the KV cache holds per token, in all layers together."""
        return 2 * self.layers * self.kv_heads * self.head_dim

    def adapter(self, rank: int, modules: str | list[str]) -> int:
        """Number of parameters of a LoRA adapter of this rank on these target modules."""
        chosen = [one for one in self.linears if modules == "all-linear" or one.name in modules]
        return self.layers * sum(rank * (one.inputs + one.outputs) for one in chosen)


def architecture_of_recipe(recipe: Recipe) -> Architecture | None:
    """Sizes of a recipe's base; None if its config.json is not on this machine, or lacks a size."""
    if recipe.model.base is None:
        toy = recipe.toy
        assert toy is not None
        sizes = {"hidden_size": toy.hidden_size, "intermediate_size": 2 * toy.hidden_size, "num_hidden_layers": toy.num_layers,
                 "num_attention_heads": toy.num_heads, "vocab_size": 66, "model_type": "llama"}  # fmt: skip
        return Architecture.of(sizes)
    return architecture_of_base(recipe.model.base, recipe.model.revision)


def architecture_of_base(base: str, revision: str | None = None) -> Architecture | None:
    """Sizes of a folder's or Hub id's model; None if its config.json is not on this machine or incomplete."""
    found = config_of_base(base, revision)
    try:
        return None if found is None else Architecture.of(found)
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None


def config_of_base(base: str, revision: str | None) -> dict[str, Any] | None:
    """Content of the config.json of a folder, or of a Hub id in the cache or in KNOWN; else None."""
    folder = Path(base) if Path(base).is_absolute() else cached_folder(base, revision)
    if folder is None:
        return KNOWN.get(base)
    try:
        content = read_json(folder / "config.json")
    except SalsaError:
        return None
    return content if isinstance(content, dict) else None
