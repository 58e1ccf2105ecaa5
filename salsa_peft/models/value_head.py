"""PolicyWithValueHead: a causal language model with PPO's linear value head. Create, save and load it."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn

from salsa_peft.models import sharding
from salsa_peft.models.adapters import lora
from salsa_peft.models.adapters.names import VALUE_HEAD
from salsa_peft.models.base import apply_scalar_head, causal_lm, hidden_states
from salsa_peft.models.rewards.base import Reward
from salsa_peft.models.rewards.reward import adapter_in
from salsa_peft.models.weights import load_weights, save_checkpoint
from salsa_peft.utils.errors import SalsaError, require

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

VALUE_ADAPTER = "value"
"""Name of the value adapter, and the subfolder in which it is saved."""


class PolicyWithValueHead(nn.Module):
    """A policy, an adapter on the shared base or full weights, with PPO's linear value head.

    The head reads the hidden states of the policy or, with `value_adapter`, those of a second forward under that
    adapter. It is float32 over any base and starts as a copy of `start`, or at zero, so that all first values are 0.
    """

    def __init__(self, policy: PeftModel | PreTrainedModel, value_adapter: str | None = None,
                 start: Tensor | None = None) -> None:  # fmt: skip
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

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states (B, L, H), and values (B, L), float32. Value t is of the state that includes token t.

        The value before response token t is thus at position t − 1; `responses.response_values` selects it.
        """
        hidden = hidden_states(self.policy, input_ids, attention_mask)
        return hidden, self.values(hidden, input_ids, attention_mask)

    def values(self, hidden: Tensor | None, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Values (B, L) from the policy's hidden states (B, L, H), or from a forward under the value adapter."""
        if self.value_adapter is not None:
            assert self.toggle is not None
            with self.toggle(self.value_adapter):
                hidden = hidden_states(self.policy, input_ids, attention_mask)
        assert hidden is not None
        # copied, because FSDP2's hooks need an output that is no view; cast, because ZeRO-3 holds the head in bf16
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


def with_value_head(
    model: PeftModel | PreTrainedModel, policy: str | None, value: str, reward: Reward
) -> PolicyWithValueHead:
    """Add a value head to the policy, and freeze all adapters besides the policy's and the value's.

    policy: the policy's adapter; None for full weights. value: PPO's option of that name. With "adapter", a value
    adapter and its head start as copies of the reward adapter and head; SalsaError is raised if there is none.
    """
    name, start = None, adapter_in(reward) if value == "adapter" else None
    if value == "adapter":
        if not isinstance(model, PeftModel) or start is None:
            found = type(reward).__name__
            raise SalsaError(
                f"value: adapter starts from a reward adapter, and the reward is a {found}. Set value: head"
            )
        name = lora.unused_name(model, VALUE_ADAPTER)
        lora.attach(model, start.folder, name, trainable=True)
    for adapter in model.peft_config if isinstance(model, PeftModel) else ():
        lora.set_trainable(model, adapter, adapter in (policy, name))
    return PolicyWithValueHead(model, name, None if start is None else start.head.weight)


def save_policy(
    model: PolicyWithValueHead,
    policy_name: str | None,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    weights: dict[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Save the policy as a PEFT adapter or checkpoint with the tokenizer, and the value head beside it.

    A value adapter is saved in a subfolder. weights: all weights, gathered by Trainer, if the model is sharded. dtype:
    of a checkpoint with full weights; None keeps the model's.
    """
    policy, head = model.policy, model.value_head.state_dict()
    if weights is not None:
        tied = {f"policy.{name}" for name in causal_lm(policy).all_tied_weights_keys or ()}  # copies of other weights
        head = _of_submodule("value_head.", weights)
        weights = _of_submodule("policy.", {name: weight for name, weight in weights.items() if name not in tied})
    if isinstance(policy, PeftModel):
        lora.save(policy, str(policy_name), folder, tokenizer, state_dict=weights)
        if model.value_adapter is not None:
            lora.save(policy, model.value_adapter, folder / VALUE_ADAPTER, state_dict=weights)
    else:
        save_checkpoint(policy, folder, tokenizer, weights, dtype)
    head = {name: tensor.detach().cpu() for name, tensor in head.items()}
    save_file(head, folder / VALUE_HEAD, metadata={"format": "pt"})


def load_policy(model: PolicyWithValueHead, policy_name: str | None, folder: Path) -> None:
    """Load in place what `save_policy` saved."""
    policy = model.policy
    if isinstance(policy, PeftModel):
        lora.load(policy, str(policy_name), folder)
        if model.value_adapter is not None:
            lora.load(policy, model.value_adapter, folder / VALUE_ADAPTER)
    else:
        load_weights(policy, folder)
    sharding.load(model.value_head, lora.read_tensors(folder / VALUE_HEAD))


def _of_submodule(prefix: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
