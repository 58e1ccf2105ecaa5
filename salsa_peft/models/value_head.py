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
    """What PPO trains: a policy (an adapter on the shared base, or full weights) and a linear value head, one module.

    The head reads the policy's own trunk, or with `value_adapter` the trunk under that adapter, in a forward of its own. It
    starts at zero, so that the first values are 0 whatever the base, or as a copy of `start`; it is float32 over any base.
    """

    def __init__(self, policy: PeftModel | PreTrainedModel, value_adapter: str | None = None,
                 start: torch.Tensor | None = None) -> None:  # fmt: skip
        super().__init__()
        self.policy, self.value_adapter = policy, value_adapter
        self._no_split_modules = causal_lm(policy)._no_split_modules  # the layers, which accelerate shards one by one
        self.value_head = nn.Linear(causal_lm(policy).get_output_embeddings().weight.shape[1], 1)  # H
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        if start is not None:
            self.value_head.weight.data.copy_(start)
        self.toggle = lora.Toggle(policy) if isinstance(policy, PeftModel) else None
        if causal_lm(policy).is_activation_checkpointing:  # switched on by the user, where nothing holds the adapter
            self.activation_checkpointing_enable()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """→ hidden states (B, L, H) and values (B, L), float32: V at position i judges the state after token i."""
        hidden = hidden_states(self.policy, input_ids, attention_mask)
        return hidden, self.values(hidden, input_ids, attention_mask)

    def values(
        self, hidden: torch.Tensor | None, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> torch.Tensor:
        """Values (B, L) from the policy's states (B, L, H), which a value adapter's own forward takes the place of."""
        if self.value_adapter is not None:
            assert self.toggle is not None
            with self.toggle(self.value_adapter):
                hidden = hidden_states(self.policy, input_ids, attention_mask)
        assert hidden is not None
        # a copy: FSDP2 hangs hooks on what forward returns, which may be no view; with bf16 ZeRO-3 holds the head in bf16
        return apply_scalar_head(self.value_head, hidden).to(torch.float32, copy=True)

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **layers: Any
    ) -> None:
        """Called by transformers.Trainer. A frozen embedding's output must require grad for it, and what is recomputed in the
        backward must run under the adapter that was active in the forward."""
        options = {"use_reentrant": False, **(activation_checkpointing_kwargs or {})}
        if self.toggle is not None:
            require(
                not options["use_reentrant"],
                "activation_checkpointing_kwargs: found use_reentrant true, expected false: its recomputation would run under"
                " whichever adapter is active then",
            )
            options["context_fn"] = self._under_the_same_adapter
        causal_lm(self.policy).activation_checkpointing_enable(options, **layers)
        causal_lm(self.policy).enable_input_require_grads()

    def _under_the_same_adapter(self) -> tuple[Any, Any]:
        """torch.utils.checkpoint's context_fn: contexts of the forward and of its recomputation."""
        assert self.toggle is not None
        return contextlib.nullcontext(), self.toggle(self.toggle.active)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """The same under its older name."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs)
