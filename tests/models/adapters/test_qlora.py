"""PPO over a base in 4 bits (bitsandbytes, which runs on a CPU too): the adapters' network is that of LoRA on what the 4 bits stand for."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from plain_ppo import PROMPTS, gradients, length_reward, loss_of, plain_logprobs, roll_out
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from salsa_peft import SalsaPPOConfig, SalsaPPOTrainer
from salsa_peft.models.adapters import lora as adapters
from salsa_peft.utils.errors import SalsaError

bitsandbytes = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install 'salsa-peft[qlora]'")


@pytest.fixture
def make_quantised(make_base: Any, tmp_path: Path) -> Any:
    """make_quantised() → a tiny Llama whose linear layers are nf4, their scales quantised too."""

    def make(dtype: torch.dtype = torch.float32) -> Any:
        make_base(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
        four = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
        return AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=four, dtype=dtype)

    return make


@pytest.fixture
def make_run(make_adapter: Any, tokenizer: Any, tmp_path: Path) -> Any:
    """make_run(base, name) → a trainer of an adapter on it, its references beside it."""

    def make(base: Any, name: str = "run", **options: Any) -> SalsaPPOTrainer:
        model = base
        for seed, adapter in enumerate(("policy", "seed-0", "soup"), 1):
            model = make_adapter(model, adapter, seed)
        model.set_adapter("policy")
        settings: dict[str, Any] = {
            "batch_size": 8, "num_ppo_epochs": 1, "max_steps": 3, "kl_coef": 0.1, "max_new_tokens": 7, "learning_rate": 1e-3,
            "report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no",
        }  # fmt: skip
        args = SalsaPPOConfig(output_dir=str(tmp_path / name), **(settings | options))
        return SalsaPPOTrainer(
            model,
            args=args,
            train_dataset=PROMPTS,
            references=["soup", "seed-0", "base"],
            reward_funcs=length_reward,
            processing_class=tokenizer,
        )

    return make


def frozen(trainer: SalsaPPOTrainer) -> dict[str, torch.Tensor]:
    """Copies of everything that is not the policy's adapter or the value head: the base's bytes, the references."""
    named = [*trainer.model.named_parameters(), *trainer.model.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in named if not tensor.requires_grad}


def test_three_updates_over_four_bits(make_quantised: Any, make_run: Any) -> None:
    """References by toggling, the first ratio 1; only float32 adapters and the head move, and no byte of the base."""
    trainer = make_run(make_quantised())
    layers = [layer for layer in trainer.model.policy.modules() if isinstance(layer, LoraLayer)]
    assert len(layers) == 14 and all(isinstance(layer.get_base_layer(), bitsandbytes.nn.Linear4bit) for layer in layers)
    assert all("forward" in vars(layer) for layer in layers)  # ours
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
    before, trained = frozen(trainer), [p.detach().clone() for p in trainer.model.parameters() if p.requires_grad]
    rollout = roll_out(trainer)
    tables = [plain_logprobs(trainer, name, rollout) for name in ("policy", "soup", "seed-0", None)]
    torch.testing.assert_close(rollout.logprobs, tables[0].detach(), rtol=1e-4, atol=1e-4)
    expected = torch.stack([tables[0] - table for table in tables[1:]]).mean(0).detach()
    torch.testing.assert_close(rollout.kl, expected, rtol=1e-4, atol=1e-4)
    loss = loss_of(trainer, rollout, torch.arange(8), int(rollout.responses.lengths.sum()))
    assert loss.ratio.item() == pytest.approx(1, abs=1e-4) and loss.approxkl.item() == pytest.approx(0, abs=1e-6)
    trainer.train()
    assert trainer.ppo.update == 3 and frozen(trainer).keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in frozen(trainer).items())
    after = [p for p in trainer.model.parameters() if p.requires_grad]
    assert len(after) == 30 and not any(torch.equal(a, b) for a, b in zip(after, trained, strict=True))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_lora_on_the_dequantised_base(
    make_quantised: Any, make_base: Any, make_run: Any, checkpointing: bool
) -> None:
    """What the 4 bits stand for as float32 weights, under our own LoRA forward: the same log-probs and gradients. After a rollout: on
    CPUs with AVX512-BF16 bitsandbytes would have packed the weights there, and lost the gradients of all layers but the last."""
    quantised = make_quantised()
    plain = make_base(hidden_size=64, intermediate_size=128)
    for name, layer in quantised.named_modules():
        if isinstance(layer, bitsandbytes.nn.Linear4bit):
            whole = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            plain.get_submodule(name).weight.data.copy_(whole)
    found = []
    for base, name in ((quantised, "four"), (plain, "plain")):
        trainer = make_run(base, name, gradient_checkpointing=checkpointing)
        if checkpointing:
            trainer.model.gradient_checkpointing_enable()
        trainer.model.train()
        rollout = roll_out(trainer) if not found else found[0][0]
        loss = loss_of(trainer, rollout, torch.arange(8), int(rollout.responses.lengths.sum()))
        loss.loss.backward()
        found.append((rollout, loss, gradients(trainer)))
    assert found[1][1].ratio.item() == pytest.approx(1, abs=1e-4)
    four, other = found[0][2], found[1][2]
    assert four.keys() == other.keys() and len(four) == 30
    for name, gradient in four.items():
        torch.testing.assert_close(gradient, other[name], rtol=1e-3, atol=1e-4)


def test_bf16_over_four_bits(make_quantised: Any, make_run: Any) -> None:
    """As on a GPU: a bf16 base, float32 adapters, autocast; the first ratio is 1."""
    trainer = make_run(make_quantised(torch.bfloat16), bf16=True)
    trainer.accelerator.prepare(trainer.model)
    rollout = roll_out(trainer)
    loss = loss_of(trainer, rollout, torch.arange(8), int(rollout.responses.lengths.sum()))
    assert loss.ratio.item() == pytest.approx(1, abs=1e-6)
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}


def test_a_run_over_four_bits_goes_on_to_the_bit(make_quantised: Any, make_run: Any, tmp_path: Path) -> None:
    """From the middle; the adapter alone is in a checkpoint."""
    whole = make_run(make_quantised(), "a", save_strategy="steps", save_steps=1)
    whole.train()
    assert not list((tmp_path / "a" / "checkpoint-3").glob("model*.safetensors"))
    shutil.rmtree(tmp_path / "a" / "checkpoint-3")
    shutil.rmtree(tmp_path / "a" / "checkpoint-2")
    again = make_run(make_quantised(), "a", save_strategy="steps", save_steps=1)
    again.train(resume_from_checkpoint=True)
    for name in ("policy", "seed-0"):
        pairs = zip(*(adapters.parameters(trainer.model.policy, name) for trainer in (whole, again)), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)
    assert torch.equal(again.model.value_head.weight, whole.model.value_head.weight)


def test_what_a_four_bit_policy_may_not_be(make_quantised: Any, tokenizer: Any, tmp_path: Path) -> None:
    """The same as on any base: what lies outside the factors; and 4-bit weights train as adapters alone."""
    args = SalsaPPOConfig(
        output_dir=str(tmp_path / "x"), batch_size=8, max_new_tokens=7, use_cpu=True, report_to="none"
    )
    lora = {"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    for options, line in (
        ({"modules_to_save": ["norm"]}, "norm is in modules_to_save"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights 'loftq' changes the weights of the base"),
    ):
        model = make_quantised()
        if "init_lora_weights" in options:  # PEFT would want weights to quantise
            model = get_peft_model(model, LoraConfig(**lora), adapter_name="policy")
            model.peft_config["policy"].init_lora_weights = "loftq"
        else:
            model = get_peft_model(model, LoraConfig(**lora, **options), adapter_name="policy")
        with pytest.raises(SalsaError, match=line):
            SalsaPPOTrainer(
                model,
                args=args,
                train_dataset=PROMPTS,
                references=["base"],
                reward_funcs=length_reward,
                processing_class=tokenizer,
            )
    packed = get_peft_model(make_quantised(), LoraConfig(**lora), adapter_name="policy")
    packed.base_model.model.model.layers[1].mlp.up_proj.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(SalsaError, match=r"bitsandbytes has packed .*mlp\.up_proj for inference"):
        SalsaPPOTrainer(
            packed,
            args=args,
            train_dataset=PROMPTS,
            references=["base"],
            reward_funcs=length_reward,
            processing_class=tokenizer,
        )
    with pytest.raises(SalsaError, match=r"q_proj\.weight is quantised and cannot be trained"):
        SalsaPPOTrainer(
            make_quantised(),
            args=args,
            train_dataset=PROMPTS,
            references=["base"],
            reward_funcs=length_reward,
            processing_class=tokenizer,
        )
