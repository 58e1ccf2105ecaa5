"""Floating-point operations and bytes read of a decoder's forward, training and decoding. Imports no torch.

A forward takes two operations per weight and token (Kaplan et al., 2020, section 2.1). Attention, which adds 4% for
Llama-2-7B at 2,048 tokens, is left out, and so is the dequantisation of a 4-bit base.
"""

from __future__ import annotations

import dataclasses

from salsa_peft.config.schema import Recipe
from salsa_peft.models.architectures.memory import NF4
from salsa_peft.models.architectures.sizes import Architecture


@dataclasses.dataclass(frozen=True)
class Work:
    """Tokens, operations and bytes of a unit of work."""

    trained: float = 0
    """Tokens in forward and backward passes of training, in all epochs."""
    scored: float = 0
    """Tokens in forward passes without backward: of policy, references and rewards, and of prompts."""
    generated: float = 0
    """Tokens that are sampled."""
    operations: float = 0
    """Floating-point operations of training and scoring."""
    bytes: float = 0
    """Bytes that decoding reads from the GPU's memory: weights and KV cache, at every token of a batch."""

    def __add__(self, other: Work) -> Work:
        return Work(*map(sum, zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    def __mul__(self, times: float) -> Work:
        return Work(*(times * number for number in dataclasses.astuple(self)))


class Costs:
    """Costs of a recipe's model, per token or per batch. Adapters are counted at the recipe's rank."""

    def __init__(self, recipe: Recipe, size: Architecture) -> None:
        self.size, lora = size, recipe.adapter
        self.adapter = 0 if lora is None else size.adapter(lora.r, lora.target_modules)
        self.full = lora is None
        looked_up = 0 if size.tied else size.vocabulary * size.hidden
        self.multiplied = size.parameters - looked_up
        """Number of weights by which every token is multiplied: all but the input embeddings."""
        self.width = 4 if recipe.model.dtype == "float32" else 2
        linears = NF4.get(recipe.model.quantization or "", self.width) * size.in_linears
        self.weights = linears + self.width * (self.multiplied - size.in_linears) + 4.0 * self.adapter
        """Bytes of the weights that one decoding step reads."""

    def scoring(self, tokens: float) -> Work:
        """A forward: 2 operations per weight and token."""
        return Work(scored=tokens, operations=2 * (self.multiplied + self.adapter) * tokens)

    def training(self, tokens: float, checkpointing: bool) -> Work:
        """Forward and backward: 6 operations per weight and token, or 4 for weights that are not trained.

        A trained weight has a product for its output, one for its input's gradient and one for its own gradient; a
        frozen one has the first two. Gradient checkpointing repeats the forward.
        """
        each = 6 * (self.multiplied if self.full else self.adapter) + (0 if self.full else 4 * self.multiplied)
        repeated = 2 * (self.multiplied + self.adapter) if checkpointing else 0
        return Work(trained=tokens, operations=(each + repeated) * tokens)

    def generating(self, rows: float, batch: int, prompt: float, response: float) -> Work:
        """Sampling `rows` responses in batches: a forward of the prompts, then one decoding step for each token.

        Each step reads all weights once, and the keys and values of all tokens so far of every row of the batch. prompt,
        response: numbers of tokens of one row.
        """
        batches = rows / max(1, min(batch, rows))
        cache = self.width * self.size.kv_per_token * rows * (prompt + response / 2)
        read = response * (self.weights * batches + cache)
        return self.scoring(rows * prompt) + Work(generated=rows * response, bytes=read)
