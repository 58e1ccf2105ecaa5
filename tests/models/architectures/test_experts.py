"""Adapters on the experts of mixtures (PEFT's target_parameters) in every role, against plain PEFT models of one adapter each."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from plain_ppo import PROMPTS, check_gradients, length_reward, plain_logprobs, roll_out
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from salsa_peft import SalsaPPOConfig, SalsaPPOTrainer
from salsa_peft.config.schema import Reward
from salsa_peft.models.adapters import lora as adapters
from salsa_peft.models.adapters.merged import merged_parameters
from salsa_peft.models.base import causal_lm
from salsa_peft.training import reference_sync, reward_model
from salsa_peft.training.references import FrozenReference
from salsa_peft.utils.errors import SalsaError

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
         "vocab_size": 80, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8},
}
IDS = torch.tensor([[1, 9, 12, 7, 30, 61, 5, 44]])


def config_of(kind: str) -> Any:
    return AutoConfig.for_model(kind, **SIZES, **KINDS[kind], initializer_range=0.3)


class Family:
    """A random base in a folder, with adapters on all linear layers and experts."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.folder, self.config = folder, config_of(kind)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(self.config).eval()
        model.get_output_embeddings().weight.data[2] *= 3  # so that responses end at other lengths
        model.save_pretrained(folder / "base")

    def base(self, auto: Any = AutoModelForCausalLM, **options: Any) -> Any:
        return auto.from_pretrained(self.folder / "base", dtype=torch.float32, **options).eval()

    def adapter(self, name: str, seed: int, **options: Any) -> Path:
        """Saved by PEFT."""
        config = LoraConfig(
            **({"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | options)
        )
        model = get_peft_model(self.base(), config)
        assert model.peft_config["default"].target_parameters, "PEFT takes the experts along"
        generator = torch.Generator().manual_seed(seed)
        for parameter in adapters.parameters(model, "default"):
            parameter.data.copy_(torch.empty(parameter.shape).normal_(std=0.15, generator=generator))
        model.save_pretrained(self.folder / name)
        return self.folder / name

    @torch.no_grad()
    def logits(self, adapter: Path | None) -> torch.Tensor:
        """Of a plain model with this adapter alone."""
        model = self.base() if adapter is None else PeftModel.from_pretrained(self.base(), adapter).eval()
        return model(input_ids=IDS).logits


@pytest.fixture(params=sorted(KINDS))
def family(request: pytest.FixtureRequest, tmp_path: Path) -> Family:
    return Family(request.param, tmp_path)


def test_adapters_on_one_base_are_what_they_are_alone(family: Family, tmp_path: Path) -> None:
    """Attached, toggled, copied, saved and attached again; one of them leaves the experts as they are."""
    folders: dict[str, Path | None] = {name: family.adapter(name, seed) for seed, name in enumerate(("a", "b"), 1)}
    attention = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(family.base(), attention).save_pretrained(tmp_path / "q")
    folders["q"] = tmp_path / "q"
    model: Any = family.base()
    for name, folder in folders.items():
        model = adapters.attach(model, folder, name, trainable=name == "a")
    adapters.save(model, "b", tmp_path / "again")
    folders["again"] = tmp_path / "again"
    model = adapters.attach(model, tmp_path / "again", "again")
    toggle = adapters.Toggle(model)
    for name in (*folders, None, "a"):
        with toggle(name), torch.no_grad():
            found = causal_lm(model)(input_ids=IDS).logits
        torch.testing.assert_close(found, family.logits(folders[name] if name else None), rtol=1e-5, atol=1e-5)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(".a." in name for name in trained) and any("experts" in name for name in trained)


def test_adapters_on_other_parameters_of_one_base(family: Family) -> None:
    """PEFT says no to them by a ValueError."""
    model = adapters.attach(family.base(), family.adapter("a", 1), "a")
    other = family.adapter("b", 2, target_modules=["q_proj"], target_parameters=["experts.down_proj"])
    with pytest.raises(
        SalsaError,
        match=r"b: this adapter has the target_parameters experts.down_proj, but adapter 'a' on the same base has down_proj,",
    ):
        adapters.attach(model, other, "b")


def test_the_reward_model_starts_as_a_copy_of_a_seed(family: Family) -> None:
    """Its trunk under the adapter is that of the seed."""
    seed = family.adapter("seed-0", 1)
    classifier = family.base(AutoModelForSequenceClassification, num_labels=1)
    context: Any = SimpleNamespace(
        recipe=SimpleNamespace(adapter=True, reward=Reward()), load_classifier=lambda *_: classifier
    )
    model = reward_model.start_from_seed(context, seed)
    plain = PeftModel.from_pretrained(family.base(), seed).get_base_model()
    with torch.no_grad():
        found, expected = (one.model(input_ids=IDS)[0] for one in (model.get_base_model(), plain))
    torch.testing.assert_close(found, expected)
    assert (expected - family.base().model(input_ids=IDS)[0]).abs().max() > 0.1


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}], ids=str)
def test_ppo(family: Family, tokenizer: Any, tmp_path: Path, options: dict[str, Any]) -> None:
    """Log-probs and KL against plain PEFT models, gradients against the plain formula, and what trains moves."""
    policy, reference = family.adapter("policy", 1), family.adapter("reference", 2)
    model = adapters.attach(family.base(), policy, "policy", trainable=True)
    model.set_adapter("policy")
    args = SalsaPPOConfig(
        output_dir=str(tmp_path / "out"), batch_size=8, max_new_tokens=12, report_to="none", use_cpu=True, bf16=False,
        save_strategy="no", num_ppo_epochs=1, max_steps=1, learning_rate=1e-3, **options,
    )  # fmt: skip
    trainer = SalsaPPOTrainer(
        model,
        args=args,
        train_dataset=PROMPTS,
        references=[str(reference), "base"],
        reward_funcs=length_reward,
        processing_class=tokenizer,
    )
    rollout = roll_out(trainer)
    plain = [PeftModel.from_pretrained(family.base(), folder).eval() for folder in (policy, reference)]
    with torch.no_grad():
        own, other, base = (plain_logprobs(trainer, one, rollout) for one in (*plain, family.base()))
    torch.testing.assert_close(rollout.logprobs, own, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rollout.kl, own - (other + base) / 2, rtol=1e-5, atol=1e-5)
    if not options:
        check_gradients(trainer, 4)
    before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, weight in trainer.model.named_parameters() if not weight.equal(before[name])}
    assert all(".policy." in name or "value_head" in name for name in moved)
    assert any("experts" in name for name in moved) and any("q_proj" in name for name in moved)


def test_a_reference_that_moves(family: Family) -> None:
    """Expert by expert, exact where the rank holds both."""
    model: Any = adapters.attach(family.base(), family.adapter("policy", 1), "policy", trainable=True)
    adapters.attach(model, family.adapter("soup", 2, r=8), "soup")
    experts = [layer for layer in adapters.tuner_layers(model) if "soup" in layer.lora_A]
    for layer in experts:  # half of the rank is room
        A = layer.lora_A["soup"].weight
        A.data.view(getattr(layer, "num_experts", 1), -1, A.shape[1])[
            :, A.shape[0] // getattr(layer, "num_experts", 1) // 2 :
        ] = 0
    before = [[layer.get_delta_weight(name).clone() for name in ("soup", "policy")] for layer in experts]
    told = reference_sync.sync(model, "policy", [FrozenReference("soup", "soup", None, 1, 0.25)], 1)
    assert told == pytest.approx(0, abs=1e-5)
    for layer, (soup, policy) in zip(experts, before, strict=True):
        torch.testing.assert_close(layer.get_delta_weight("soup"), 0.75 * soup + 0.25 * policy, rtol=1e-4, atol=1e-5)
    assert any(math.prod(soup.shape) == soup.numel() and soup.dim() == 3 for soup, _ in before)


def test_merged_weights(family: Family) -> None:
    """By the base's own names, as PEFT merges them; the base stays."""
    folder = family.adapter("policy", 1)
    model = adapters.attach(adapters.attach(family.base(), folder, "policy"), family.adapter("soup", 2), "soup")
    found = dict(merged_parameters(model, "policy"))
    expected = dict(PeftModel.from_pretrained(family.base(), folder).merge_and_unload().named_parameters())
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-5, atol=1e-6)
    with adapters.active(model, None), torch.no_grad():
        torch.testing.assert_close(causal_lm(model)(input_ids=IDS).logits, family.logits(None))
