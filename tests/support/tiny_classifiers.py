"""Tiny sequence classifiers as reward models."""

from __future__ import annotations

from typing import Any

import torch

CHAT = "{{ bos_token }}{% for m in messages %}{{ '[' + m['role'] + '] ' + m['content'] + ' [end]' }}{% endfor %}"


def own_classifier(tokenizer: Any, labels: int = 1, **options: Any) -> Any:
    """A tiny random Llama with a score head."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.4, num_labels=labels, pad_token_id=tokenizer.pad_token_id,
        **({"max_position_embeddings": 64} | options),
    )  # fmt: skip
    return LlamaForSequenceClassification(config).eval()


def single(classifier: Any, ids: list[int]) -> float:
    """The plain score: one sequence, no padding, the head on its last token's state."""
    with torch.no_grad():
        state = classifier.model(torch.tensor([ids])).last_hidden_state[0, -1]
        return float(classifier.score(state))
