"""Our LoRA forward against PEFT's own: values and gradients, and that what is not plain LoRA is left to PEFT."""

from __future__ import annotations

import copy
from typing import Any
from unittest.mock import patch

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear
from torch import Tensor, nn

from salsa_peft.models.adapters import forward as lora_forward
from salsa_peft.models.adapters import lora as adapters


class Two(nn.Module):
    """Two linear layers, the second with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 5, bias=False), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


X = torch.randn(3, 7, 6, generator=torch.Generator().manual_seed(1))


def make(**options: Any) -> Any:
    """Both layers with adapters a and b of random weights; a is active and trains."""
    torch.manual_seed(0)
    config = LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": ["first", "second"]} | options)
    model = get_peft_model(Two(), config, adapter_name="a")
    model.add_adapter("b", LoraConfig(r=2, lora_alpha=7, target_modules=["first"]))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.5)
    return model


def passes(model: Any, adapter: str | None = "a") -> tuple[Tensor, list[Tensor]]:
    """The output and the gradients of a scalar of it, to the input and to every weight that has one."""
    x = X.clone().requires_grad_()
    with adapters.active(model, adapter):
        out = model(x)
    weights = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(out.square().sum(), [x, *weights], allow_unused=True)
    return out.detach(), [g for g in grads if g is not None]


def left_to_peft(model: Any) -> bool:
    """Whether PEFT's forward runs in any layer."""
    with patch.object(Linear, "forward", autospec=True, side_effect=Linear.forward) as theirs:
        model(X)
    return bool(theirs.called)


@pytest.mark.parametrize("adapter", ["a", "b", None])
def test_values_and_gradients_are_pefts(adapter: str | None) -> None:
    """Also where a layer lacks the active adapter, and where none is active."""
    theirs, ours = make(), make()
    lora_forward.install(ours)
    (out, grads), (our_out, our_grads) = passes(theirs, adapter), passes(ours, adapter)
    torch.testing.assert_close(our_out, out, rtol=1e-6, atol=1e-6)
    assert len(grads) == len(our_grads) >= 1
    for one, other in zip(our_grads, grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert not left_to_peft(ours)


def test_the_input_and_the_base_stay_as_they_are() -> None:
    """What is added in place is added to nobody else's tensor."""
    model = make()
    lora_forward.install(model)
    x, before = X.clone(), copy.deepcopy(model.state_dict())
    assert torch.equal(model(x), model(x)) and torch.equal(x, X)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "options", [{"use_dora": True}, {"lora_dropout": 0.5}, {"lora_bias": True}], ids=lambda o: next(iter(o))
)
def test_what_is_not_plain_is_left_to_peft(options: dict[str, Any]) -> None:
    theirs, ours = make(**options), make(**options)
    lora_forward.install(ours)
    assert left_to_peft(ours)
    torch.manual_seed(3)
    out = theirs(X)
    torch.manual_seed(3)
    assert torch.equal(ours(X), out)


def test_merged_autocast_and_bfloat16_are_left_to_peft() -> None:
    theirs, ours = make(), make()
    lora_forward.install(ours)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ours(X), theirs(X)) and left_to_peft(ours)
    for model in (theirs, ours):
        model.merge_adapter()
    assert torch.equal(ours(X), theirs(X)) and left_to_peft(ours)
    for model in (theirs, ours):
        model.unmerge_adapter()
        model.base_model.model.first.base_layer.to(torch.bfloat16)
        model.base_model.model.second.base_layer.to(torch.bfloat16)
    x = X.bfloat16()
    assert torch.equal(ours(x), theirs(x))


def test_a_copy_of_the_model_has_its_own() -> None:
    """The forward of a deep copy reads the copy's weights."""
    model = make()
    lora_forward.install(model)
    twin, before = copy.deepcopy(model), model(X)
    twin.base_model.model.first.lora_B["a"].weight.data.zero_()
    assert not torch.equal(twin(X), before) and torch.equal(model(X), before)
