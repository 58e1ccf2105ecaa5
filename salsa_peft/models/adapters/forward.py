"""LoRA forward that adds scaling · B(A x) to W x in place, without PEFT's temporary tensors and casts.

PEFT's forward allocates three tensors of the output's size in each layer and keeps one. Under autocast it also casts x
to the factors' float32 and back, and keeps that second copy of x for the backward pass. tests/benchmarks/lora_forward.py
measures both; docs/measurements.md has the figures.
Layers with DoRA, biases or merged weights, and batches for several adapters use PEFT's forward. So do layers whose
input and factors differ in dtype without autocast.
"""

from types import MethodType
from typing import Any

import torch
from peft.tuners.lora import Linear, LoraLayer
from torch import Tensor, nn


def install(model: nn.Module) -> None:
    """Install this forward in the model's present LoRA layers on nn.Linear and on 4-bit layers."""
    for layer in model.modules():
        if isinstance(layer, LoraLayer) and is_supported(layer):
            vars(layer)["forward"] = MethodType(forward, layer)


def is_supported(layer: LoraLayer) -> bool:
    """Whether the layer is PEFT's ordinary LoRA layer on nn.Linear, or on bitsandbytes' Linear4bit."""
    base = type(layer.get_base_layer())
    return (type(layer) is Linear and base is nn.Linear) or type(layer).__name__ == base.__name__ == "Linear4bit"


def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Compute the same as PEFT 0.21's lora.Linear.forward, up to rounding: x (…, in) → (…, out).

    Under autocast the factors are cast to its dtype; their gradients are float32, as the factors are.
    """
    base, kind = self.base_layer, x.device.type
    As, Bs = self.lora_A, self.lora_B  # looked up once, because nn.Module does it slowly
    names = [] if self.disable_adapters else [name for name in self.active_adapters if name in As]
    factors = [(As[name], Bs[name]) for name in names]
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    linear = type(base) is nn.Linear
    if dtype is None:
        same = all(x.dtype == A.weight.dtype == B.weight.dtype for A, B in factors)
    else:
        same = linear or x.dtype == dtype
    plain = all(B.bias is None for _, B in factors) and self.lora_variant.keys().isdisjoint(names)
    if self.merged or args or kwargs or not (same and plain):
        return type(self).forward(self, x, *args, **kwargs)
    rows = x.reshape(-1, x.shape[-1])  # in two dimensions, since autograd copies gradients of a view changed in place
    if dtype is not None:  # once, rather than in W and in A
        rows = rows.to(dtype)
    out = base(rows)
    if out.dtype != rows.dtype:
        return type(self).forward(self, x)
    for name, (A, B) in zip(names, factors, strict=True):
        inner = A(self.lora_dropout[name](rows))
        weight = B.weight.to(inner.dtype).t()
        # in place, since nothing else holds `out` and the backward of a linear layer does not read its output; the
        # output of bitsandbytes' autograd function must not be changed
        add = out.addmm_ if linear else out.addmm
        out = add(inner, weight, alpha=self.scaling[name])
    return out.view(*x.shape[:-1], out.shape[-1])
