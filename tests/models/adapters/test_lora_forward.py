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
from torch.utils.checkpoint import checkpoint

from salsa_peft.models.adapters import forward as lora_forward
from salsa_peft.models.adapters import lora as adapters
from salsa_peft.models.base import keep_4bit_layout


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


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}], ids=lambda o: next(iter(o)))
def test_what_is_not_plain_is_left_to_peft(options: dict[str, Any]) -> None:
    theirs, ours = make(**options), make(**options)
    lora_forward.install(ours)
    assert left_to_peft(ours) and torch.equal(ours(X), theirs(X))


def test_dropout_and_several_active_adapters() -> None:
    """The same dropout mask as PEFT's with the same random state; the sum of two adapters."""
    theirs, ours = make(lora_dropout=0.5), make(lora_dropout=0.5)
    lora_forward.install(ours)
    for model in (theirs, ours):
        model.base_model.set_adapter(["a", "b"])
    outs = []
    for model in (theirs, ours):
        torch.manual_seed(3)
        outs.append(model(X))
    torch.testing.assert_close(outs[1], outs[0], rtol=1e-6, atol=1e-6)
    assert not torch.equal(ours(X), ours(X)) and not left_to_peft(ours)


def test_merged_layers_and_bfloat16_without_autocast_are_left_to_peft() -> None:
    theirs, ours = make(), make()
    lora_forward.install(ours)
    for model in (theirs, ours):
        model.merge_adapter()
    assert torch.equal(ours(X), theirs(X)) and left_to_peft(ours)
    for model in (theirs, ours):
        model.unmerge_adapter()
        cast_base(model)
    x = X.bfloat16()
    with patch.object(Linear, "forward", autospec=True, side_effect=Linear.forward) as forward:
        assert torch.equal(ours(x), theirs(x)) and forward.call_count == 4


def cast_base(model: Any) -> None:
    """Both base layers to bf16."""
    for layer in adapters.tuner_layers(model):
        layer.get_base_layer().to(torch.bfloat16)


def wide(dtype: torch.dtype) -> Any:
    """As `make`, with layers wide enough for rounding errors to average out."""
    with patch.object(Two, "__init__", wide_layers):
        model = make(r=8)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.05)
    if dtype == torch.bfloat16:
        cast_base(model)
    return model


def wide_layers(self: Two) -> None:
    nn.Module.__init__(self)
    self.first, self.second = nn.Linear(256, 192, bias=False), nn.Linear(192, 128)


WIDE = torch.randn(5, 16, 256, generator=torch.Generator().manual_seed(2))


def autocast_passes(model: Any, adapter: str | None, x: Tensor) -> list[Tensor]:
    """The output under bf16 autocast, and the gradients of a scalar of it to the input and the trained weights."""
    x = x.clone().requires_grad_()
    with adapters.active(model, adapter), torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(x)
    weights = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(out.double().square().sum(), [x, *weights], allow_unused=True)
    return [out.detach(), *(g for g in grads if g is not None)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("adapter", ["a", "b", None])
def test_under_autocast_errors_are_no_larger_than_pefts(adapter: str | None, dtype: torch.dtype) -> None:
    """Output and gradients against float64; float32 factors get float32 gradients; PEFT's forward never runs."""
    theirs, ours = wide(dtype), wide(dtype)
    lora_forward.install(ours)
    x = WIDE.to(dtype)
    exact = [part.double() for part in float64_passes(theirs, adapter, x)]
    with patch.object(Linear, "forward", autospec=True, side_effect=Linear.forward) as forward:
        found = autocast_passes(ours, adapter, x)
    assert not forward.called
    expected = autocast_passes(theirs, adapter, x)
    assert [part.dtype for part in found] == [part.dtype for part in expected]
    assert len(found) == len(exact) == {"a": 6, "b": 2, None: 2}[adapter]
    for mine, peft, right in zip(found, expected, exact, strict=True):
        error, allowed = ((part.double() - right).norm() / right.norm() for part in (mine, peft))
        assert error <= 1.1 * allowed and allowed < 0.02


def float64_passes(model: Any, adapter: str | None, x: Tensor) -> list[Tensor]:
    """What autocast_passes returns, of the same weights in float64."""
    twin = copy.deepcopy(model).double()
    x = x.double().requires_grad_()
    with adapters.active(twin, adapter):
        out = twin(x)
    grads = torch.autograd.grad(
        out.square().sum(), [x, *(p for p in twin.parameters() if p.requires_grad)], allow_unused=True
    )
    return [out.detach(), *(g for g in grads if g is not None)]


def test_under_autocast_the_backward_keeps_no_copy_of_the_input() -> None:
    """Kept: both layers' inputs, A x of each, the factors in bf16; PEFT's forward keeps the second input twice."""
    kept = {}
    for name in ("peft", "ours"):
        model = wide(torch.bfloat16)
        if name == "ours":
            lora_forward.install(model)
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept[name] = kept_bytes(model, WIDE.bfloat16().requires_grad_(), own)
    rows = WIDE.shape[0] * WIDE.shape[1]
    factors = 8 * (256 + 192) + 8 * (192 + 128)
    assert kept["ours"] == 2 * (rows * (256 + 192 + 2 * 8) + factors)
    assert kept["peft"] == kept["ours"] + 2 * rows * 192


def kept_bytes(model: Any, x: Tensor, own: set[int]) -> int:
    """Bytes of the tensors, other than those of `own`, that a forward under autocast keeps for its backward."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    keeping = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with keeping, torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(x)
    assert out.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("autocast", [False, True])
def test_no_gradient_is_copied_for_the_sum_in_place(autocast: bool) -> None:
    """A view that is changed in place would get autograd's CopySlices, which copies the whole gradient twice."""
    model = make()
    lora_forward.install(model)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        nodes = [model(X.clone().requires_grad_()).grad_fn]
    seen = set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [following for following, _ in node.next_functions]
    names = [node.name() for node in seen]
    assert "CopySlices" not in names and names.count("AddmmBackward0") >= 2


def test_gradient_checkpointing_under_autocast() -> None:
    """The recomputed forward gives the same gradients to the bit."""
    model = wide(torch.bfloat16)
    lora_forward.install(model)
    plain = autocast_passes(model, "a", WIDE.bfloat16())
    forward = type(model.base_model.model).forward
    with patch.object(Two, "forward", lambda self, x: checkpoint(forward, self, x, use_reentrant=False)):
        found = autocast_passes(model, "a", WIDE.bfloat16())
    assert all(torch.equal(one, other) for one, other in zip(found, plain, strict=True))


@pytest.mark.parametrize("shape", [(5, 16, 256), (1, 1, 256)], ids=str)
def test_four_bit_layers(shape: tuple[int, ...]) -> None:
    """nf4 layers, also with a single row, for which bitsandbytes has a kernel of its own: errors no larger than PEFT's."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    from peft.tuners.lora.bnb import Linear4bit

    def quantised(self: Two) -> None:
        nn.Module.__init__(self)
        self.is_loaded_in_4bit = True
        self.first, self.second = (
            bitsandbytes.nn.Linear4bit(*sizes, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
            for sizes in ((256, 192), (192, 128))
        )
        keep_4bit_layout(self)
        self.to("cpu")

    with patch.object(Two, "__init__", quantised):
        theirs = make(r=8)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter, dtype=torch.float32) * 0.05
    ours = copy.deepcopy(theirs)
    lora_forward.install(ours)
    x = WIDE[: shape[0], : shape[1]].bfloat16()
    with patch.object(Linear4bit, "forward", autospec=True, side_effect=Linear4bit.forward) as forward:
        found = autocast_passes(ours, "a", x)
    assert not forward.called
    expected = autocast_passes(theirs, "a", x)
    for mine, peft in zip(found, expected, strict=True):
        assert (mine.double() - peft.double()).norm() <= 0.01 * peft.double().norm()


def test_a_copy_of_the_model_has_its_own() -> None:
    """The forward of a deep copy reads the copy's weights."""
    model = make()
    lora_forward.install(model)
    twin, before = copy.deepcopy(model), model(X)
    twin.base_model.model.first.lora_B["a"].weight.data.zero_()
    assert not torch.equal(twin(X), before) and torch.equal(model(X), before)
