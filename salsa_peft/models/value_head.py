"""PolicyWithValueHead: a causal language model with PPO's linear value head on its trunk."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch import nn

from salsa_peft.models.adapters import lora
from salsa_peft.models.base import apply_scalar_head, causal_lm, hidden_states
from salsa_peft.utils.errors import require

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class PolicyWithValueHead(nn.Module):
    """A policy, an adapter on the shared base or full weights, with PPO's linear value head.

    The head reads the hidden states of the policy or, with `value_adapter`, those of a second forward under that
    adapter. It is float32 over any base and starts as a copy of `start`, or at zero, so that all first values are 0.
    """

    def __init__(self, policy: PeftModel | PreTrainedModel, value_adapter: str | None = None,
                 start: torch.Tensor | None = None) -> None:  # fmt: skip
        super().__init__()
        self.policy, self.value_adapter = policy, value_adapter
        self._no_split_modules = causal_lm(policy)._no_split_modules  # the layers that accelerate shards
        self.value_head = nn.Linear(causal_lm(policy).get_output_embeddings().weight.shape[1], 1)  # H
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        if start is not None:
            self.value_head.weight.data.copy_(start)
        self.toggle = lora.Toggle(policy) if isinstance(policy, PeftModel) else None
        if causal_lm(policy).is_activation_checkpointing:  # by the user, for whom it does not restore the adapter
            self.activation_checkpointing_enable()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states (B, L, H), and values (B, L), float32, of the states after each token."""
        hidden = hidden_states(self.policy, input_ids, attention_mask)
        return hidden, self.values(hidden, input_ids, attention_mask)

    def values(
        self, hidden: torch.Tensor | None, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> torch.Tensor:
        """Values (B, L) from the policy's hidden states (B, L, H), or from a forward under the value adapter."""
        if self.value_adapter is not None:
            assert self.toggle is not None
            with self.toggle(self.value_adapter):
                hidden = hidden_states(self.policy, input_ids, attention_mask)
        assert hidden is not None
        # a copy, because FSDP2's hooks need an output that is no view; the cast is for ZeRO-3, which holds the head in bf16 under bf16
        return apply_scalar_head(self.value_head, hidden).to(torch.float32, copy=True)

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **layers: Any
    ) -> None:
        """Called by Trainer. The recomputation runs under the adapter that was active in the forward."""
        options = {"use_reentrant": False, **(activation_checkpointing_kwargs or {})}
        if (toggle := self.toggle) is not None:
            require(
                not options["use_reentrant"],
                "activation_checkpointing_kwargs: use_reentrant must be false, because with it the recomputation runs"
                " under whichever adapter is active then",
            )
            # the contexts of a forward and of its recomputation
            options["context_fn"] = lambda: (contextlib.nullcontext(), toggle(toggle.active))
        causal_lm(self.policy).activation_checkpointing_enable(options, **layers)
        causal_lm(self.policy).enable_input_require_grads()  # checkpointing needs it where the embeddings are frozen

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """activation_checkpointing_enable, by the name that earlier versions of Transformers call."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs)
