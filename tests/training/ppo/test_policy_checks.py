"""What a policy may not be is refused when the trainer is made, in one line; each of these trained, or was scored, wrongly in silence."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from plain_ppo import PROMPTS, length_reward, plain_logprobs, roll_out
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    Gemma2Config,
    Gemma3Config,
    LlamaForSequenceClassification,
    MixtralConfig,
    OPTConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from salsa_peft import SalsaPPOConfig, SalsaPPOTrainer
from salsa_peft.models.adapters import lora as adapters
from salsa_peft.models.adapters.names import SCORE_HEAD
from salsa_peft.models.base import remove_dropout
from salsa_peft.models.logprobs import check_head
from salsa_peft.models.responses import Sequences
from salsa_peft.models.value_head import PolicyWithValueHead
from salsa_peft.utils.errors import SalsaError


@pytest.fixture
def train(tokenizer: Any, tmp_path: Path) -> Any:
    """train(model, references) → a trainer of it."""

    def make(model: Any, references: Any = ("base",), chosen: Any = tokenizer, **options: Any) -> SalsaPPOTrainer:
        quiet = {"report_to": "none", "use_cpu": True, "bf16": False, "save_strategy": "no", "disable_tqdm": True}
        args = SalsaPPOConfig(
            output_dir=str(tmp_path), batch_size=8, max_new_tokens=7, num_ppo_epochs=1, **(quiet | options)
        )
        return SalsaPPOTrainer(
            model,
            args=args,
            train_dataset=PROMPTS,
            references=list(references),
            reward_funcs=length_reward,
            processing_class=chosen,
        )

    return make


def unfrozen(model: Any) -> Any:
    """The model with its norms trainable, as a user may have them."""
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.requires_grad_(True)
    return model


LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"modules_to_save": ["lm_head"]}, r"lm_head is in modules_to_save or trainable_token_indices, which references would share"),
        ({"modules_to_save": ["norm"]}, r"norm is in modules_to_save"),
        ({"trainable_token_indices": {"embed_tokens": [5, 6]}}, r"embed_tokens is in modules_to_save or trainable_token_indices"),
        ({"bias": "all"}, "has bias 'all', which would train biases that all roles share"),
        ({"bias": "lora_only"}, "has bias 'lora_only', which would train biases that all roles share"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa' changes the weights of the base"),
        ({"init_lora_weights": "olora"}, "init_lora_weights 'olora' changes the weights of the base"),
        ({"target_modules": ["q_proj", "lm_head"]}, "the adapter is on the output embeddings"),
    ],
)  # fmt: skip
def test_what_lies_outside_the_factors(make_base: Any, train: Any, options: dict[str, Any], line: str) -> None:
    """References share the base: they would see it change, or be it with a part taken out (PiSSA's residual: KL 13 where it is 0)."""
    base = make_base(attention_bias=True)
    with pytest.raises(SalsaError, match=line):
        train(get_peft_model(base, LoraConfig(**(LORA | options)), adapter_name="policy"))


@pytest.mark.parametrize("tied", [False, True])
def test_tokens_that_train_are_refused_tied_or_not(make_base: Any, train: Any, tied: bool) -> None:
    """Tied, PEFT puts its wrapper on the output embeddings too."""
    model = get_peft_model(
        make_base(tie_word_embeddings=tied), LoraConfig(**LORA, trainable_token_indices={"embed_tokens": [5, 6]})
    )
    with pytest.raises(SalsaError, match="embed_tokens is in modules_to_save or trainable_token_indices"):
        train(model)


def test_base_weights_that_train_are_named(make_base: Any, make_adapter: Any, train: Any) -> None:
    with pytest.raises(SalsaError, match=r"input_layernorm\.weight of the base is trainable, but references share it"):
        train(unfrozen(make_adapter(make_base(), "policy", 1)))


@pytest.mark.parametrize(
    ("config", "line"),
    [
        (PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"), "has peft_type PROMPT_TUNING; only LoRA is supported"),
        (IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[]), "has peft_type IA3; only LoRA is supported"),
    ],
    ids=["prompt tuning", "ia3"],
)  # fmt: skip
def test_other_tuners(make_base: Any, train: Any, config: Any, line: str) -> None:
    """The engine reads the trunk past prompt tuning's tokens; a checkpoint of IA3 can't be gone on from."""
    with pytest.raises(SalsaError, match=line):
        train(get_peft_model(make_base(), config, adapter_name="policy"))


@pytest.mark.parametrize("state", ["disabled", "merged", "two"])
def test_the_policy_must_be_active_alone_and_not_merged(
    make_base: Any, make_adapter: Any, train: Any, state: str
) -> None:
    """Disabled or merged, the KL was 0 or that of another base; with two, what was sampled was not what was trained."""
    model = make_adapter(make_adapter(make_base(), "policy", 1), "soup", 2)
    model.set_adapter("policy")
    if state == "disabled":
        model.base_model.disable_adapter_layers()
    elif state == "merged":
        model.merge_adapter(["policy"])
    else:
        model.base_model.set_adapter(["policy", "soup"])
    line = {
        "disabled": "adapter 'policy' is disabled",
        "merged": "an adapter is merged into the base",
        "two": r"the active adapters are \['policy', 'soup'\]. Call model.set_adapter\('policy'\)",
    }[state]
    with pytest.raises(SalsaError, match=line):
        train(model, ["soup"])


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_trained_weights_are_float32(make_base: Any, train: Any, full: bool) -> None:
    """At 2e-6 AdamW moved bf16 weights by 0.0010 where float32 ones moved by 0.457; a bf16 base under float32 adapters is fine."""
    base = make_base().bfloat16()
    if full:
        model, references = base, [make_base(1).bfloat16()]
    else:
        model = get_peft_model(base, LoraConfig(**LORA), adapter_name="policy", autocast_adapter_dtype=False)
        references = ["base"]
    with pytest.raises(
        SalsaError, match=r"is in bfloat16, which rounds small updates away. .* dtype=torch.float32 and set bf16=True"
    ):
        train(model, references)
    if not full:
        model = get_peft_model(make_base().bfloat16(), LoraConfig(**LORA), adapter_name="policy")
        trainer = train(model)
        assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}


SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
         "initializer_range": 0.3, "max_position_embeddings": 64}  # fmt: skip


def made(config: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize(
    ("config", "line"),
    [
        (FalconConfig(vocab_size=80, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, hidden_dropout=0.3, initializer_range=0.3),
         r"falcon: .*\(config: hidden_dropout 0.3\)"),
        (MixtralConfig(vocab_size=80, num_local_experts=4, router_jitter_noise=0.3, **SMALL), r"mixtral: .*\(config: router_jitter_noise 0.3\)"),
    ],
    ids=["falcon", "mixtral"],
)  # fmt: skip
def test_noise_that_is_no_module(config: Any, line: str, train: Any) -> None:
    """The first ratio was 0.85 where it is 1."""
    model = made(config)
    model.requires_grad_(True)
    with pytest.raises(SalsaError, match=line):
        train(model, [made(config)])
    assert not model.training


@pytest.mark.parametrize("name", ["final_logit_softcapping", "logits_scaling", "logit_scale"])
def test_a_scale_of_the_logits_that_the_model_has_not(make_base: Any, name: str) -> None:
    """A configuration may name one that its architecture never reads."""
    model = make_base()
    check_head(model)
    setattr(model.config, name, 0.5)
    with pytest.raises(
        SalsaError, match=r"llama: the model's logits differ by .* from those computed from its hidden states"
    ):
        check_head(model)


def test_a_cap_that_is_not_told_is_found_where_logits_are_small() -> None:
    """A soft cap leaves an untrained model's logits as they are, and a trained one's not."""
    config = Gemma2Config(
        **(SMALL | {"vocab_size": 80, "head_dim": 8, "initializer_range": 0.02, "query_pre_attn_scalar": 8})
    )
    model = made(config)
    assert model(input_ids=torch.tensor([[1, 2, 3]])).logits.abs().max() < 1
    check_head(model)
    forward, model.forward = model.forward, None
    model.config.final_logit_softcapping = None  # what check_head reads

    def capped(**inputs: Any) -> Any:
        output = forward(**inputs)
        output.logits = 30 * torch.tanh(output.logits / 30)
        return output

    model.forward = capped
    with pytest.raises(
        SalsaError, match=r"gemma2: the model's logits differ by .* from those computed from its hidden states"
    ):
        check_head(model)


def test_a_head_that_is_no_plain_linear_layer(make_base: Any) -> None:
    """Dory's scales every token's logit by a number of its own."""

    class Scaled(torch.nn.Linear):
        def forward(self, states: torch.Tensor) -> torch.Tensor:
            return super().forward(states) * 2

    model = make_base()
    model.lm_head = Scaled(32, model.config.vocab_size, bias=False)
    with pytest.raises(
        SalsaError, match=r"the output embeddings are a Scaled, but only a plain linear layer is supported"
    ):
        check_head(model)


def test_what_is_no_causal_language_model(make_base: Any, train: Any, tokenizer: Any) -> None:
    """A trunk, a classifier, an encoder with a decoder."""
    base = make_base()
    t5 = T5ForConditionalGeneration(
        T5Config(d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, vocab_size=len(tokenizer), decoder_start_token_id=0)
    )  # fmt: skip
    for model in (base.model, LlamaForSequenceClassification(base.config), t5):
        with pytest.raises(SalsaError, match=rf"a {type(model).__name__} is not a decoder-only causal language model"):
            train(model, [make_base(1)])
    with pytest.raises(SalsaError, match="a T5ForConditionalGeneration is not a decoder-only"):
        train(base, [t5])


@pytest.mark.parametrize("kind", ["gemma3", "opt"])
def test_models_whose_width_stands_elsewhere(kind: str, tokenizer: Any, train: Any) -> None:
    """Gemma 3's text model inside a multimodal one; OPT-350m's output embeddings, narrower than its trunk."""
    size = len(tokenizer)
    if kind == "gemma3":
        text = SMALL | {"head_dim": 8, "vocab_size": size, "query_pre_attn_scalar": 8}
        vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
                  "patch_size": 14}  # fmt: skip
        config: Any = Gemma3Config(
            text_config=text, vision_config=vision, image_token_index=60, boi_token_index=61, eoi_token_index=62
        )
    else:
        config = OPTConfig(hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=size, word_embed_proj_dim=16,
                           max_position_embeddings=64, init_std=0.3)  # fmt: skip
    policy = tiny.make_adapter(made(config), "policy", 1, target_modules=["q_proj", "v_proj"])
    trainer = train(policy)
    rollout = roll_out(trainer)
    expected = plain_logprobs(trainer, "policy", rollout).detach()
    torch.testing.assert_close(rollout.logprobs, expected, rtol=1e-4, atol=1e-4)
    assert trainer.model.value_head.in_features == (32 if kind == "gemma3" else 16)


class TestTokenizer:
    def test_a_token_that_is_not_there(self, make_base: Any, make_adapter: Any, train: Any, tokenizer: Any) -> None:
        """GPT-2, Llama and Mistral have no padding token, which is the EOS then, as in TRL."""
        chosen = copy.deepcopy(tokenizer)
        chosen.pad_token = None
        train(make_adapter(make_base(), "policy", 1), chosen=chosen)
        assert chosen.pad_token == chosen.eos_token == "<eos>"
        chosen.eos_token = None
        with pytest.raises(SalsaError, match=r"processing_class: the tokenizer has no eos_token\. Set"):
            train(make_adapter(make_base(), "policy", 1), chosen=chosen)

    def test_a_token_without_an_embedding(self, make_base: Any, make_adapter: Any, train: Any, tokenizer: Any) -> None:
        chosen = copy.deepcopy(tokenizer)
        chosen.add_special_tokens({"pad_token": "[PAD]"})
        line = rf"pad_token '\[PAD\]' has id {len(tokenizer)}, but the model has only {len(tokenizer)} embeddings"
        with pytest.raises(SalsaError, match=line):
            train(make_adapter(make_base(), "policy", 1), chosen=chosen)

    def test_further_eos_tokens_are_told(
        self, make_base: Any, make_adapter: Any, train: Any, tokenizer: Any, capsys: Any
    ) -> None:
        """As Gemma-it's <end_of_turn>."""
        base = make_base()
        base.generation_config.eos_token_id = [tokenizer.eos_token_id, 10]
        train(make_adapter(base, "policy", 1))
        token = tokenizer.convert_ids_to_tokens(10)
        assert f"a response ends at any of <eos> (2), {token} (10)" in capsys.readouterr().err
        train(make_adapter(make_base(), "policy", 1))
        assert "processing_class" not in capsys.readouterr().err


def test_dropout_of_what_is_attached_later_is_off(
    make_base: Any, make_adapter: Any, make_trainer: Any, tmp_path: Path
) -> None:
    """A value adapter that starts from a reward adapter with dropout: its values in training are the rollout's."""
    reward = make_adapter(make_base(), "reward", 7, lora_dropout=0.5)
    adapters.save(reward, "reward", tmp_path / "reward", extra={SCORE_HEAD: torch.ones(1, 32) * 0.1})
    trainer = make_trainer(reward=str(tmp_path / "reward"), value="adapter")
    rates = {module.p for module in trainer.model.modules() if isinstance(module, torch.nn.Dropout)}
    assert rates <= {0.0}
    batch = Sequences(roll_out(trainer).responses).forward_batch(range(8))
    values = []
    for _ in range(2):
        trainer.model.train()
        values.append(trainer.model(batch.input_ids, batch.before, batch.options)[1].detach())
    assert torch.equal(*values) and values[0].abs().max() > 0


@pytest.mark.parametrize("reentrant", [None, True])
def test_checkpointing_that_the_user_switched_on(
    make_base: Any, make_adapter: Any, make_trainer: Any, tmp_path: Path, reentrant: bool | None
) -> None:
    """As prepare_model_for_kbit_training does: what is recomputed for the value adapter must run under it."""
    model = make_adapter(make_adapter(make_base(), "policy", 1), "value", 2)
    model.set_adapter("policy")
    for name in ("policy", "value"):
        adapters.set_trainable(model, name, True)
    ids = torch.tensor([[1, 5, 6, 7, 8]])
    found = []
    for on in (False, True):
        if on:
            options = {} if reentrant is None else {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
            model.get_base_model().gradient_checkpointing_enable(**options)
        policy = PolicyWithValueHead(model, "value", torch.ones(1, 32)).train()
        remove_dropout(policy)
        hidden, values = policy(ids, torch.arange(5), {})
        (hidden.sum() + values.pow(2).sum()).backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad})
        model.zero_grad()
    assert model.get_base_model().is_activation_checkpointing
    for name, gradient in found[0].items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("old_logprobs", ["recompute", "rollout"])
def test_values_and_adapter_scores_are_float32_under_autocast(
    make_base: Any, make_adapter: Any, make_trainer: Any, tmp_path: Path, old_logprobs: str
) -> None:
    """bf16 has three digits: rounded to them, neighbouring responses score alike."""
    reward = make_adapter(make_base(), "reward", 7)
    adapters.save(reward, "reward", tmp_path / "reward", extra={SCORE_HEAD: torch.randn(1, 32)})
    trainer = make_trainer(reward=str(tmp_path / "reward"), bf16=True, old_logprobs=old_logprobs)
    trainer.model.value_head.weight.data.normal_()
    rollout = roll_out(trainer)
    for numbers in (rollout.values[rollout.responses.response_mask], rollout.scores):
        assert not torch.equal(numbers, numbers.bfloat16().float())


def test_everything_is_on_the_device_of_the_arguments(
    make_base: Any, make_adapter: Any, tokenizer: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    """Trainer moves the policy there; figures and references of their own must be there too. The device here is `meta`."""
    args = SalsaPPOConfig(
        output_dir=str(tmp_path), batch_size=8, max_new_tokens=7, report_to="none", use_cpu=True, bf16=False
    )
    monkeypatch.setattr(SalsaPPOConfig, "device", torch.device("meta"))
    trainer = SalsaPPOTrainer(make_adapter(make_base(), "policy", 1), args=args, train_dataset=PROMPTS, references=["base", make_base(1)],
                              reward_funcs=length_reward, processing_class=tokenizer)  # fmt: skip
    own = trainer.references[1].model
    assert own is not None
    assert {trainer.ppo.sums.device.type, next(own.parameters()).device.type} == {"meta"}
    assert next(trainer.model.parameters()).device.type == "meta"
