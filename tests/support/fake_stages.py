"""The recipe's stages on fake weights of a large model's shapes: only loading and saving weights are replaced."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, Trainer
from trl.kernels import chunked_logprob

from salsa_peft.config.job import Job, Unit
from salsa_peft.config.load import load_recipe
from salsa_peft.config.schema import Recipe
from salsa_peft.data.toy import make_tokenizer
from salsa_peft.models import base, precision, stage_context
from salsa_peft.models.architectures.sizes import KNOWN
from salsa_peft.models.stage_context import StageContext

LLAMA2 = "meta-llama/Llama-2-7b-hf"


def write_base(folder: Path, layers: int) -> Path:
    """config.json of Llama-2-7B with some of its layers, and the embedded world's tokenizer."""
    tokenizer = make_tokenizer()
    special = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    config = AutoConfig.for_model(**KNOWN[LLAMA2] | special | {"num_hidden_layers": layers}, max_position_embeddings=4096)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_rows(folder: Path, name: str, rows: list[dict[str, Any]]) -> str:
    """A local data set."""
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def turn(role: str, words: int) -> dict[str, str]:
    """A message of so many words, each of them a token."""
    return {"role": role, "content": " ".join(["cat"] * words)}


def recipe_of(folder: Path, layers: int, mode: str, length: int, **sections: Any) -> Recipe:
    """llama2_full's settings on data of one length: every sequence has `length` tokens. mode: lora, qlora, master or stochastic."""
    chat = [turn("user", length // 2), turn("assistant", length)]
    pair = {"prompt": chat[0]["content"], "chosen": chat, "rejected": chat}
    given = {
        "name": "rehearsal", "toy": {},
        "model": {"base": str(write_base(folder / "base", layers)), "max_length": length, "dtype": "bfloat16", "chat_template": "zephyr"},
        "data": {"demonstrations": write_rows(folder, "chats", [{"messages": chat}] * 4), "preferences": write_rows(folder, "pairs", [pair] * 8),
                 "prompts": write_rows(folder, "prompts", [{"prompt": chat[:1]}] * 8)},
        "precision": mode if mode in ("master", "stochastic") else "auto",
        **sections,
    }  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(given))
    return load_recipe(str(path), lora=mode if mode in ("lora", "qlora") else None, overrides=[]).recipe


def make_fake(auto_class: Callable[[Any], Any], folder: str, model: Any, trained: torch.dtype | None, **options: Any) -> Any:
    """In place of models.base._load: the same model with made-up weights."""
    config = AutoConfig.from_pretrained(folder)
    for name, value in options.items():
        setattr(config, name, value)
    dtype = trained or base.resolve_dtype(model.dtype)
    made = auto_class(config).from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
    return made.requires_grad_(trained is not None)


def replace_loading(patch: pytest.MonkeyPatch) -> None:
    """Weights are made up in place of being read, and nothing is saved."""
    patch.setattr(base, "_load", make_fake)
    patch.setattr(StageContext, "save", lambda *_: None)
    arguments = stage_context.training_arguments

    def on_cuda(*given: Any) -> dict[str, Any]:
        return arguments(*given) | {"bf16": True}  # autocast as on CUDA

    patch.setattr(stage_context, "training_arguments", on_cuda)
    full = precision.arguments
    patch.setattr(precision, "arguments", lambda name: full(name) | {"bf16": precision.PRECISIONS[name].autocast})
    # the temporary tensors of torchao's compiled step depend on how its kernels are fused: it is left out
    patch.setattr(torch, "compile", lambda function, **_: lambda *_: None)
    # TRL's Triton kernels work in place; what replaces them on a CPU makes temporary tensors
    for name in ("_forward_tile", "_backward_tile", "_addmm_fp32"):
        patch.setattr(chunked_logprob, name, lambda *_, **__: None)


def watch(patch: pytest.MonkeyPatch, peaks: Any) -> None:
    """Trainer's forward and backward are the phase train, its optimizer's step is the phase step."""
    step, create = Trainer.training_step, Trainer.create_optimizer

    def training_step(trainer: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        peaks.track(model)
        peaks.enter("train")
        try:
            return step(trainer, model, *args, **kwargs)
        finally:
            peaks.enter("step")

    patch.setattr(Trainer, "training_step", training_step)


def job_of(recipe: Recipe, stage: str, name: str, folder: Path, inputs: dict[str, Path]) -> Job:
    """A unit of the recipe's run."""
    unit = Unit(stage=stage, name=name, run="", multi_unit=stage in ("sft", "ppo"))
    folder.mkdir(exist_ok=True)
    return Job(recipe=recipe, unit=unit, folder=folder, inputs=inputs, recipe_yaml="")
