"""A soup on a live model: attached beside other roles, moved between weights in place."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from soup_members import OPTIONS, PROPERTY, Q0, logits, open_plain, soup_tensors, train
from transformers import LlamaConfig, LlamaForCausalLM

from salsa_peft.soup.lora.stacked_adapter import StackedAdapter
from salsa_peft.utils.errors import SalsaError


class TestLive:
    def state(self, model: PeftModel) -> tuple[object, ...]:
        active = [(name, module.active_adapters) for name, module in model.named_modules() if hasattr(module, "lora_A")]
        parameters = {id(p): p.requires_grad for name, p in model.named_parameters() if ".soup." not in name}
        return model.active_adapters, [entry for entry in active if Q0 in entry[0]], parameters, model.training

    @PROPERTY
    @given(first=OPTIONS, second=OPTIONS, weights=st.tuples(st.floats(-1, 2), st.floats(-1, 2)))
    def test_attach_and_set_weights_equal_a_saved_adapter(self, base, first, second, weights) -> None:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            members = [train(base, folder / "a", 0, **first), train(base, folder / "b", 1, **second)]
            stacked = StackedAdapter.load(members)
            model = get_peft_model(copy.deepcopy(base), LoraConfig(r=3, target_modules=["q_proj"]), "policy").train()
            before = self.state(model)
            stacked.attach(model, "soup", [0.5, 0.5])
            assert self.state(model) == before
            attached = [p for name, p in model.named_parameters() if ".soup." in name]
            assert len(attached) == 2 * len(stacked.stacks)
            assert {p.dtype for p in attached} == {torch.float32} and not any(p.requires_grad for p in attached)
            addresses = [p.data_ptr() for p in attached]
            stacked.set_weights(model, "soup", weights)
            assert [p.data_ptr() for p in attached] == addresses
            assert not any(p.requires_grad for p in attached)
            stacked.save(folder / "saved", weights)
            model.eval().set_adapter("soup", inference_mode=True)
            assert torch.equal(logits(model), logits(open_plain(base, folder / "saved")))

    def test_a_layer_that_had_no_adapter_does_not_wake_up(self, base, folder: Path) -> None:
        """PEFT leaves a freshly wrapped layer on "default": an attached soup of that name would act in it at once."""
        stacked = StackedAdapter.load([train(base, folder / "a", 0)])
        model = get_peft_model(copy.deepcopy(base), LoraConfig(target_modules=["o_proj"]), "policy").eval()
        before = logits(model)
        stacked.attach(model, "default", [1.0])
        assert torch.equal(logits(model), before) and model.active_adapters == ["policy"]

    def test_attach_over_a_bfloat16_base_is_float32(self, base, folder: Path) -> None:
        stacked = StackedAdapter.load([train(base, folder / "a", 0)])
        model = get_peft_model(copy.deepcopy(base).bfloat16(), LoraConfig(target_modules=["q_proj"]), "policy")
        stacked.attach(model, "soup", [0.3])
        layer = model.get_base_model().get_submodule(Q0)
        expected = soup_tensors([folder / "a"], [0.3])[f"base_model.model.{Q0}.lora_B.weight"]
        assert torch.equal(layer.lora_B["soup"].weight, expected) and layer.scaling["soup"] == 1.0

    def test_refusals(self, base, folder: Path) -> None:
        stacked = StackedAdapter.load([train(base, folder / "a", 0)])
        model = get_peft_model(copy.deepcopy(base), LoraConfig(target_modules=["q_proj"], r=1), "policy")
        with pytest.raises(SalsaError, match="already has an adapter 'policy'"):
            stacked.attach(model, "policy", [1])
        with pytest.raises(SalsaError, match="attach this soup under that name first"):
            stacked.set_weights(model, "soup", [1])
        model.add_adapter("other", LoraConfig(target_modules=["q_proj", "v_proj"], r=1))
        with pytest.raises(SalsaError, match="Use the name under which this soup was attached, and a model"):
            stacked.set_weights(model, "other", [1])
        stacked.attach(model, "soup", [1])
        model.merge_adapter(["soup"])
        with pytest.raises(SalsaError, match="merged into the base"):
            stacked.set_weights(model, "soup", [1])
        wide = LlamaForCausalLM(LlamaConfig(**base.config.to_dict() | {"hidden_size": 32, "head_dim": 16}))
        with pytest.raises(SalsaError, match="Use the name under which this soup was attached, and a model"):
            stacked.attach(get_peft_model(wide, LoraConfig(target_modules=["q_proj"])), "soup", [1])
        short = LlamaForCausalLM(LlamaConfig(**base.config.to_dict() | {"num_hidden_layers": 1}))
        with pytest.raises(
            SalsaError, match=r"has LoRA on model\.layers\.1\.self_attn\.q_proj, which the model does not have"
        ):
            stacked.attach(get_peft_model(short, LoraConfig(target_modules=["q_proj"])), "soup", [1])
