"""PEFT's LoRA forward for linear layers without its temporaries: W x, then B(A x)·scaling added in place in one product.

Own code, since PEFT makes three tensors of the output's size for each layer, of which one is kept: on SmolLM2-135M (a CPU, micro-batch 4)
the holes that they leave in memory cost a sixth of PPO's peak (2,511 MB → 2,116), the passes over them a twentieth of the time of forward
and backward. Whatever is not plain LoRA on a plain linear layer (DoRA, dropout, merged, quantised, biases, mixed batches) is left to
PEFT's own forward.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn


def install(model: nn.Module) -> None:
    """Give every plain LoRA layer of the model this forward; the others, and layers wrapped later, keep PEFT's."""
    for layer in model.modules():
        if type(layer) is Linear and type(layer.get_base_layer()) is nn.Linear:
            vars(layer)["forward"] = MethodType(forward, layer)


def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """As peft.tuners.lora.Linear.forward (PEFT 0.21) up to rounding: x (…, in) → (…, out)."""
    active = self.active_adapters
    if self.merged or args or kwargs or self.disable_adapters or len(active) != 1:
        return Linear.forward(self, x, *args, **kwargs)
    (name,) = active
    if name not in self.lora_A:
        return self.base_layer(x)
    A, B = self.lora_A[name], self.lora_B[name]
    plain = (
        A.bias is None and B.bias is None and not self.lora_variant and isinstance(self.lora_dropout[name], nn.Identity)
    )
    if not plain or not x.dtype == A.weight.dtype == B.weight.dtype or torch.is_autocast_enabled(x.device.type):
        return Linear.forward(self, x)
    out = self.base_layer(x)
    if out.dtype != x.dtype or not out.is_contiguous():
        return Linear.forward(self, x)
    inner = A(x)
    rows = out.view(-1, out.shape[-1])  # nobody else has it, and a linear layer's backward does not read it
    return rows.addmm_(inner.reshape(-1, inner.shape[-1]), B.weight.t(), alpha=self.scaling[name]).view_as(out)
