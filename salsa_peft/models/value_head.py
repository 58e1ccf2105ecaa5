"""PolicyWithValueHead, a causal language model with PPO's value head: creating, saving, loading."""

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
"""Name of the value adapter, and of the subfolder in which that adapter is saved."""


class PolicyWithValueHead(nn.Module):
    """A policy (an adapter on the shared base, or full weights) with PPO's linear value head.

    The head reads the policy's hidden states or, with `value_adapter`, those of a second forward with that adapter.
    The head is float32 whatever the base's dtype. Its weights start as a copy of `start`, by default at zero.
    critic: False for a policy without value head, whose values are None.
    """

    def __init__(self, policy: PeftModel | PreTrainedModel, value_adapter: str | None = None,
                 start: Tensor | None = None, *, critic: bool = True) -> None:  # fmt: skip
        super().__init__()
        self.policy, self.value_adapter = policy, value_adapter
        self._no_split_modules = causal_lm(policy)._no_split_modules  # the layers that accelerate shards one by one
        self.value_head: nn.Linear | None = None
        if critic:
            self.value_head = nn.Linear(causal_lm(policy).get_output_embeddings().weight.shape[1], 1)  # H
            nn.init.zeros_(self.value_head.weight)
            nn.init.zeros_(self.value_head.bias)
            if start is not None:
                self.value_head.weight.data.copy_(start)
        self.starts_at_zero = critic and start is None
        self.toggle = lora.Toggle(policy) if isinstance(policy, PeftModel) else None
        if causal_lm(policy).is_activation_checkpointing:  # set by the user, and would not restore the active adapter
            self.activation_checkpointing_enable()

    def forward(self, input_ids: Tensor, before: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """Return hidden states (n, H) and values (n,), float32, at the positions before n response tokens.

        The values are None without a value head. The arguments are the fields of a `responses.ForwardBatch`.
        """
        hidden = self._states(input_ids, before, options)
        return hidden, None if self.value_head is None else self.values(hidden, input_ids, before, options)

    def values(self, hidden: Tensor | None, input_ids: Tensor, before: Tensor, options: dict[str, Any]) -> Tensor:
        """Values (n,) from the policy's hidden states (n, H) or, with a value adapter, from its own forward pass."""
        if self.value_adapter is not None:
            assert self.toggle is not None
            with self.toggle(self.value_adapter):
                hidden = self._states(input_ids, before, options)
        assert hidden is not None and self.value_head is not None
        # a copy, because FSDP2's hooks need an output that is no view; a cast, because ZeRO-3 holds the head in bf16
        return apply_scalar_head(self.value_head, hidden).to(torch.float32, copy=True)

    def policy_parameters(self) -> list[nn.Parameter]:
        """The trained parameters of the policy, without those of the value adapter and the value head."""
        policy, name = self.policy, self.value_adapter
        own = set() if name is None else {id(parameter) for parameter in lora.parameters(policy, name)}
        return [parameter for parameter in policy.parameters() if parameter.requires_grad and id(parameter) not in own]

    def set_value_bias(self, bias: Tensor) -> None:
        """Set the value head's bias to a number ()."""
        assert self.value_head is not None
        sharding.load(self.value_head, {"bias": bias.view(1)}, strict=False)

    def _states(self, input_ids: Tensor, before: Tensor, options: dict[str, Any]) -> Tensor:
        return hidden_states(self.policy, input_ids, **options).flatten(0, 1)[before]

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **layers: Any
    ) -> None:
        """Enable gradient checkpointing, whose recomputation uses the adapter that was active in the forward."""
        options = {"use_reentrant": False, **(activation_checkpointing_kwargs or {})}
        if (toggle := self.toggle) is not None:
            require(
                not options["use_reentrant"],
                "activation_checkpointing_kwargs: use_reentrant must be false, because reentrant checkpointing"
                " recomputes a forward with the adapter that is active in the backward, which may be a different one",
            )
            # one context for the forward, and one for its recomputation
            options["context_fn"] = lambda: (contextlib.nullcontext(), toggle(toggle.active))
        causal_lm(self.policy).activation_checkpointing_enable(options, **layers)
        causal_lm(self.policy).enable_input_require_grads()  # else frozen embeddings would cut the gradient

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """Call activation_checkpointing_enable, which has this name in earlier versions of Transformers."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs)


def with_value_head(
    model: PeftModel | PreTrainedModel, policy: str | None, value: str, reward: Reward
) -> PolicyWithValueHead:
    """Add a value head to a policy, and freeze all adapters except the policy's and the value adapter.

    policy: the policy's adapter; None for full weights. value: PPO's option `value`. With "adapter", a value adapter is
    added too. It and the value head start as copies of the reward adapter and its score head or, if the reward has no
    reward adapter on this base, as a copy of the policy's adapter with a head of zeros. With "none" and "group" there is
    no value head. Raises SalsaError for "adapter" if the policy has full weights.
    """
    name, start = None, None
    if value == "adapter":
        if not isinstance(model, PeftModel) or policy is None:
            raise SalsaError(
                "value: adapter needs a policy that is an adapter, but this policy has full weights. Set value to head,"
                " none or group"
            )
        name, start = lora.unused_name(model, VALUE_ADAPTER), adapter_in(reward)
        if start is None:
            lora.duplicate(model, policy, name)
        else:
            lora.attach(model, start.folder, name, trainable=True)
    for adapter in model.peft_config if isinstance(model, PeftModel) else ():
        lora.set_trainable(model, adapter, adapter in (policy, name))
    critic = value in ("head", "adapter")
    return PolicyWithValueHead(model, name, None if start is None else start.head.weight, critic=critic)


def save_policy(
    model: PolicyWithValueHead,
    policy_name: str | None,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    weights: dict[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Save the policy as a PEFT adapter or a checkpoint, and in the same folder tokenizer and value head, if any.

    A value adapter is saved in a subfolder. weights: the gathered weights of a sharded model. dtype: dtype of the saved
    full weights, by default the model's.
    """
    policy, head = model.policy, {} if model.value_head is None else model.value_head.state_dict()
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
    if model.value_head is not None:
        head = {name: tensor.detach().cpu() for name, tensor in head.items()}
        save_file(head, folder / VALUE_HEAD, metadata={"format": "pt"})


def load_policy(model: PolicyWithValueHead, policy_name: str | None, folder: Path) -> None:
    """Load a folder saved by `save_policy` into a model with the same adapters or architecture."""
    policy = model.policy
    if isinstance(policy, PeftModel):
        lora.load(policy, str(policy_name), folder)
        if model.value_adapter is not None:
            lora.load(policy, model.value_adapter, folder / VALUE_ADAPTER)
    else:
        load_weights(policy, folder)
    if model.value_head is not None:
        sharding.load(model.value_head, lora.read_tensors(folder / VALUE_HEAD))


def _of_submodule(prefix: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
