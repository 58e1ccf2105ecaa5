"""Tiny models and trainers that tests and the scripts they launch make on the spot."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from plain_ppo import PROMPTS, length_reward
from transformers import LlamaConfig, LlamaForCausalLM

from salsa_peft import SalsaPPOConfig, SalsaPPOTrainer
from salsa_peft.models.adapters import lora as adapters


def make_base(tokenizer: Any, seed: int = 0, **options: Any) -> LlamaForCausalLM:
    """A tiny random Llama, its weights large enough that what it samples is far from uniform."""
    torch.manual_seed(seed)
    settings = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": len(tokenizer), "max_position_embeddings": 64, "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
    }  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(initializer_range=0.3, **(settings | options))).eval()
    model.lm_head.weight.data[tokenizer.eos_token_id] *= 3  # so that responses end at other lengths
    return model


def make_adapter(model: Any, name: str, seed: int, **options: Any) -> PeftModel:
    """The model with a LoRA adapter of random A and B (a fresh adapter's delta would be zero)."""
    config = LoraConfig(
        **({"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | options)
    )
    if isinstance(model, PeftModel):
        model.add_adapter(name, config)
    else:
        model = get_peft_model(model, config, adapter_name=name)
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapters.parameters(model, name):
        drawn = torch.empty(parameter.shape).normal_(std=0.2, generator=generator)  # on the CPU, wherever the model is
        parameter.data.copy_(drawn)
    return model


def make_trainer(
    tokenizer: Any,
    folder: Path,
    references: Any = None,
    reward: Any = length_reward,
    pad_is_eos: bool = False,
    adapter: dict[str, Any] | None = None,
    base: dict[str, Any] | None = None,
    full: bool = False,
    prompts: Any = PROMPTS,
    callbacks: Any = None,
    eval_dataset: Any = None,
    **options: Any,
) -> SalsaPPOTrainer:
    """A trainer on a random base with adapters policy, seed-0 and soup; `full`: of full weights, its reference too.

    references: a list, or a function that makes it of the model.
    """
    chosen = copy.deepcopy(tokenizer)
    if pad_is_eos:
        chosen.pad_token = chosen.eos_token
    model: Any = make_base(tokenizer, **(base or {}))
    if full:
        references = references or [make_base(tokenizer, 1)]
    else:
        for number, name in enumerate(("policy", "seed-0", "soup"), 1):
            model = make_adapter(model, name, number, **((adapter or {}) if name == "policy" else {}))
        model.set_adapter("policy")
    settings: dict[str, Any] = {
        "batch_size": 8, "max_new_tokens": 7, "learning_rate": 1e-3, "num_train_epochs": 1, "num_ppo_epochs": 1, "kl_coef": 0.1,
    }  # fmt: skip
    if options.get("value") not in ("none", "group"):
        settings["vf_coef"] = 0.1  # so that the value loss counts in what tests compare
    quiet = {"report_to": "none", "use_cpu": True, "bf16": False, "save_strategy": "no", "disable_tqdm": True}
    return SalsaPPOTrainer(
        model,
        args=SalsaPPOConfig(output_dir=str(folder), **(settings | quiet | options)),
        train_dataset=prompts,
        references=references(model) if callable(references) else references or ["soup"],
        reward_funcs=reward,
        processing_class=chosen,
        callbacks=callbacks,
        eval_dataset=eval_dataset,
    )
