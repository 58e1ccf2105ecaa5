"""The log-ratio of two adapters for given responses, whose mean estimates the KL."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from salsa_peft.models.adapters import lora
from salsa_peft.models.responses import pad_responses
from salsa_peft.models.rewards.divergence import LogRatio

PROMPTS = [[5, 9], [7, 8, 6, 10], [12]]
ANSWERS = [[11, 4, 20], [9], [30, 31, 32, 33, 2]]


def by_hand(model: Any, adapter: str | None, temperature: float) -> list[float]:
    """Sum of the answers' log-probabilities, one sequence after another, from the model's own logits."""
    found = []
    with torch.no_grad(), lora.active(model, adapter):
        for prompt, answer in zip(PROMPTS, ANSWERS, strict=True):
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1] / temperature
            chosen = logits.log_softmax(-1)[range(len(answer)), answer]
            found.append(float(chosen.sum()))
    return found


@pytest.mark.parametrize("adapter", ["policy", None])
def test_the_log_ratio(make_base: Callable[..., Any], make_adapter: Callable[..., Any], tokenizer: Any, adapter: str | None) -> None:  # fmt: skip
    """Of the active adapter (or of none) to the start, at the sampling temperature; 0 for the start itself."""
    model = make_adapter(make_adapter(make_base(), "start", 1), "policy", 2)
    responses = pad_responses(PROMPTS, ANSWERS, tokenizer.pad_token_id, [2], torch.device("cpu"))
    measure = LogRatio(model, "start", temperature=0.7, ends=(2,), min_new_tokens=0, rows=2)
    with lora.active(model, adapter):
        found = measure(responses, [{}] * 3).tolist()
        assert lora.Toggle(model).active == adapter, "the adapter that was active is active again"
    wanted = [a - b for a, b in zip(by_hand(model, adapter, 0.7), by_hand(model, "start", 0.7), strict=True)]
    assert found == pytest.approx(wanted, abs=1e-4) and max(map(abs, wanted)) > 0.1
    with lora.active(model, "start"):
        assert measure(responses, [{}] * 3).tolist() == pytest.approx([0.0] * 3, abs=1e-6)
