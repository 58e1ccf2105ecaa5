"""Adapter, checkpoint and reward model folders as PEFT, unsloth, axolotl, LLaMA-Factory and TRL write them."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

TEMPLATE = "{% for message in messages %}{{ message.role + ' ' + message.content + eos_token }}{% endfor %}"


def adapter(base: Path, out: Path, seed: int, scale: float = 0.05, **options: Any) -> Path:
    """What PEFT's save_pretrained leaves of a causal model's adapter: random factors, no fingerprint."""
    task = options.pop("task_type", "CAUSAL_LM")
    auto = AutoModelForSequenceClassification if task == "SEQ_CLS" else AutoModelForCausalLM
    torch.manual_seed(seed)
    model = auto.from_pretrained(
        base, dtype=torch.float32, **({"num_labels": options.pop("num_labels", 1)} if task == "SEQ_CLS" else {})
    )
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **options}
    peft = get_peft_model(model, LoraConfig(task_type=task, **settings))
    generator = torch.Generator().manual_seed(seed)
    for parameter in peft.parameters():
        if parameter.requires_grad:
            parameter.data += scale * torch.randn(parameter.shape, generator=generator)
    peft.save_pretrained(out)
    return out


def edit(path: Path, **values: Any) -> None:
    """Change fields of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def plain(folder: Path, base: Path) -> None:
    """PEFT's own folder: nothing to add."""


def unsloth(folder: Path, base: Path) -> None:
    """Trained on the pre-quantised twin; a tokenizer that pads on the left with another token."""
    edit(
        folder / "adapter_config.json", base_model_name_or_path="unsloth/tiny-bnb-4bit", corda_config=None, eva_config=None, use_qalora=False,
        qalora_group_size=16, auto_mapping={"base_model_class": "LlamaForCausalLM", "parent_library": "transformers", "unsloth_fixed": True},
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.all_special_tokens[-1]
    tokenizer.save_pretrained(folder)


def axolotl(folder: Path, base: Path) -> None:
    """The base's config.json beside the adapter, and the checkpoints of the training in folders inside."""
    inside = folder / "checkpoint-2"
    shutil.copytree(folder, inside)
    for name in ("optimizer.pt", "scheduler.pt", "training_args.bin"):
        (inside / name).write_bytes(b"a pickle")
    shutil.copy(base / "config.json", folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)


def llama_factory(folder: Path, base: Path) -> None:
    """A base at a path of another computer; figures and logs."""
    if (folder / "adapter_config.json").exists():
        edit(folder / "adapter_config.json", base_model_name_or_path="/home/somebody/models/tiny")
    for name in ("all_results.json", "train_results.json", "trainer_state.json"):
        (folder / name).write_text("{}")
    (folder / "trainer_log.jsonl").write_text("{}\n")
    (folder / "training_args.bin").write_bytes(b"a pickle")
    (folder / "Modelfile").write_text("FROM .\n")


def trl(folder: Path, base: Path) -> None:
    """A Trainer's checkpoint: its state, and a tokenizer with a template of its own."""
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        (folder / name).write_bytes(b"a pickle")
    (folder / "trainer_state.json").write_text("{}")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)


MAKERS: dict[str, Callable[[Path, Path], None]] = {
    "peft": plain, "unsloth": unsloth, "axolotl": axolotl, "llama-factory": llama_factory, "trl": trl,
}  # fmt: skip


def adapter_by(maker: str, base: Path, out: Path, seed: int, **options: Any) -> Path:
    """An adapter's folder as one of MAKERS leaves it."""
    adapter(base, out, seed, **options)
    MAKERS[maker](out, base)
    return out


def checkpoint(
    base: Path, out: Path, seed: int, dtype: torch.dtype = torch.float32, scale: float = 0.02, shards: str = "5GB"
) -> Path:
    """Full weights, some way from the base's."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += scale * torch.randn(parameter.shape, generator=generator)
    model.to(dtype).save_pretrained(out, max_shard_size=shards)
    AutoTokenizer.from_pretrained(base).save_pretrained(out)
    return out


def checkpoint_by(maker: str, base: Path, out: Path, seed: int, **options: Any) -> Path:
    """A checkpoint's folder as one of MAKERS leaves it; of axolotl with its checkpoints inside, of TRL in bfloat16."""
    checkpoint(base, out, seed, dtype=torch.bfloat16 if maker == "trl" else torch.float32, **options)
    if maker == "axolotl":
        shutil.copytree(out, out / "checkpoint-2")
    elif maker in ("llama-factory", "trl"):
        MAKERS[maker](out, base)
    return out


def classifier(
    base: Path,
    out: Path,
    seed: int,
    labels: int = 1,
    dtype: torch.dtype = torch.float32,
    template: str | None = TEMPLATE,
) -> Path:
    """A sequence classifier as TRL's RewardTrainer saves one of full weights."""
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(base, dtype=torch.float32, num_labels=labels)
    model.score.weight.data.normal_(std=0.5)
    model.config.pad_token_id = 0
    model.to(dtype).save_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(out)
    return out


def renamed(folder: Path, change: Callable[[str], str]) -> Path:
    """An adapter whose tensors have other names."""
    path = folder / "adapter_model.safetensors"
    save_file({change(name): tensor for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    return folder


def copied(folder: Path, out: Path) -> Path:
    """The folder, elsewhere."""
    shutil.copytree(folder, out)
    return copy.copy(out)
