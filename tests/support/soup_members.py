"""Soup members as PEFT saves them, and the weights that PEFT loads from a folder."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from salsa_peft.soup.lora.stacked_adapter import StackedAdapter

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8, 1, 8]])
Q0 = "model.layers.0.self_attn.q_proj"
WEIGHTS = "adapter_model.safetensors"
PROPERTY = settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)


def make_llama() -> LlamaForCausalLM:
    """A tiny Llama, its weights large enough that an adapter shows in the logits."""
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 32,
    }
    return LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=1, initializer_range=0.3)).eval()


def train(base: LlamaForCausalLM, folder: Path, seed: int, **options: object) -> Path:
    """An adapter folder as PEFT writes it, its factors random instead of trained."""
    config = LoraConfig(
        **{"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | options
    )
    model = get_peft_model(copy.deepcopy(base), config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data.normal_(0, 0.3, generator=generator)
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    (folder / "fingerprint.json").write_text(json.dumps({"base": "5e" * 32}))
    return folder


def soup_tensors(members: list[Path], weights: list[float]) -> dict[str, torch.Tensor]:
    """The tensors in the file of a soup."""
    with tempfile.TemporaryDirectory() as name:
        StackedAdapter.load(members).save(Path(name) / "soup", weights)
        return load_file(Path(name) / "soup" / WEIGHTS)


def open_plain(base: LlamaForCausalLM, folder: Path) -> PeftModel:
    return PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def merged_delta(base: LlamaForCausalLM, folder: Path) -> dict[str, torch.Tensor]:
    """What PEFT itself takes an adapter's delta to be: weights after merging minus weights before."""
    merged = open_plain(base, folder).merge_and_unload().state_dict()
    return {name: (merged[name].double() - weight.double()) for name, weight in base.state_dict().items()}


def weighted_base(base: LlamaForCausalLM, members: list[Path], weights: list[float]) -> LlamaForCausalLM:
    """The base with Σ w_i · delta_i merged in."""
    state = {name: weight.double() for name, weight in base.state_dict().items()}
    for member, weight in zip(members, weights, strict=True):
        for name, delta in merged_delta(base, member).items():
            state[name] = state[name] + weight * delta
    model = copy.deepcopy(base)
    model.load_state_dict({name: weight.float() for name, weight in state.items()})
    return model


def edit(folder: Path, **fields: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "adapter_model.safetensors").items()}
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


OPTIONS = st.fixed_dictionaries(
    {
        "r": st.integers(1, 5),
        "lora_alpha": st.integers(1, 8),
        "use_rslora": st.booleans(),
        "target_modules": st.lists(
            st.sampled_from(["q_proj", "v_proj", "o_proj", "down_proj", "up_proj"]), min_size=1, unique=True
        ),
    },
    optional={
        "rank_pattern": st.sampled_from([{"q_proj": 3}, {r"layers\.1\..*": 4}, {"^" + Q0: 1, "q_proj": 2}]),
        "alpha_pattern": st.sampled_from([{"v_proj": 5}, {r".*\.0\.self_attn\.q_proj": 7}]),
        "layers_to_transform": st.sampled_from([[0], [1], [0, 1]]),
        "exclude_modules": st.just(["layers.1.self_attn.v_proj"]),
    },
).filter(lambda options: options["target_modules"] != ["v_proj"])
WEIGHTS2 = st.floats(-0.5, 1.5).map(lambda a: [1 - a, a])
