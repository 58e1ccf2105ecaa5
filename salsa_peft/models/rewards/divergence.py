"""How far a model is from another: the log-ratio of the two for the model's own responses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from salsa_peft.models.adapters import lora
from salsa_peft.models.base import causal_lm
from salsa_peft.models.batches import tokens_per_pass
from salsa_peft.models.logprobs import head_of
from salsa_peft.models.responses import ForwardBatch, Responses, Sequences, response_logprobs, response_states
from salsa_peft.models.rewards.base import Reward


class LogRatio(Reward):
    """log π(y | x) − log π_0(y | x) of each response y, where π is the model with its active adapter.

    If the responses are samples of π, the mean is an unbiased estimate of KL(π ‖ π_0), in nats per response.
    """

    def __init__(
        self, model: PeftModel, other: str, *, temperature: float, ends: tuple[int, ...], min_new_tokens: int, rows: int
    ) -> None:
        """other: the adapter of π_0. The next arguments are those of the sampling. rows: most rows of a forward pass."""
        self.model, self.other, self.rows, self.min_new_tokens = model, other, rows, min_new_tokens
        self.head = head_of(causal_lm(model), temperature, ends)

    @torch.no_grad()
    def __call__(self, responses: Responses, rows: Sequence[Mapping[str, Any]]) -> Tensor:
        sequences = Sequences(responses, self.min_new_tokens)
        parts = sequences.batches(
            range(len(sequences.lengths)), self.rows, None, pass_tokens=tokens_per_pass(self.model)
        )
        total = torch.zeros(len(sequences.lengths), device=responses.response_ids.device)
        for part in parts:
            batch = sequences.forward_batch(part)
            own = self._logprobs(batch)
            with lora.active(self.model, self.other):
                ratio = own - self._logprobs(batch)
            total += sequences.table(batch.cells, ratio).sum(-1)
        return total

    def _logprobs(self, batch: ForwardBatch) -> Tensor:
        return response_logprobs(response_states(self.model, batch), batch, self.head).logprobs
