"""Configurations of LoRA × architectures × how the members differ: what PEFT makes of the soup's folder is the mean of what it makes of
the members', or the soup is refused with a reason for which no adapter is the mean.

The rows are kinds of configuration that PEFT tests itself on (its test_custom_models.py and test_decoder_models.py), written anew.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from salsa_peft.soup.average import soup
from salsa_peft.utils.errors import SalsaError

W = [0.3, 0.7]
TOLERANCE = 2e-6
SMALL: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 32,
         "num_key_value_heads": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False}  # fmt: skip


class Bag(nn.Module):
    """Layers of every kind that PEFT puts LoRA on and Transformers' decoders do not have."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(12, 8)
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.conv1 = nn.Conv1d(8, 6, 3, padding=1)
        self.conv2 = nn.Conv2d(2, 4, 3, padding=1)
        self.grouped = nn.Conv2d(4, 8, 3, padding=1, groups=2)
        self.lin0 = nn.Linear(8, 10)
        self.score = nn.Linear(10, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.emb(ids)
        x = self.norm(x + self.attn(x, x, x)[0])
        y = self.conv1(x.transpose(1, 2)).mean(1)
        z = self.grouped(self.conv2(y[:, None, :4, None].expand(-1, 2, -1, 4)).tanh())
        return self.score(self.lin0(x.mean(1) + z.mean((2, 3))).tanh())


def of(config: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        torch.manual_seed(0)
        model: nn.Module = Bag() if config is None else hf.AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            parameter.data = torch.randn(parameter.shape) * 0.2
        if config is not None:
            model.tie_weights()  # type: ignore[operator]
        return model.eval()

    return make


EXPERTS = {"num_local_experts": 3, "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
MAKE = {
    "llama": of(hf.LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True)),
    "llama, tied": of(hf.LlamaConfig(**SMALL | {"tie_word_embeddings": True})),
    "gpt2": of(hf.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=32, n_positions=16, bos_token_id=0, eos_token_id=0)),
    "mixtral": of(hf.MixtralConfig(**SMALL, num_local_experts=3)),
    "qwen3_moe": of(hf.Qwen3MoeConfig(**SMALL, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=12, head_dim=8)),
    "gpt_oss": of(hf.GptOssConfig(**SMALL, num_local_experts=3, num_experts_per_tok=2, head_dim=8)),
    "gemma3": of(hf.Gemma3TextConfig(**SMALL | {"tie_word_embeddings": True}, head_dim=8)),
    "opt": of(hf.OPTConfig(hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=32, word_embed_proj_dim=16,
                           max_position_embeddings=32, tie_word_embeddings=False)),
    "bag": of(None),
}  # fmt: skip
GATED = {"attention": ["q_proj", "v_proj"], "one": "o_proj", "wide": "up_proj", "embedding": "embed_tokens", "head": "lm_head", "norm": "norm",
         "layers": "layers", "norms": "layernorm"}  # fmt: skip
NAMES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("llama", "llama, tied", "gemma3"), GATED),
    **dict.fromkeys(("mixtral", "qwen3_moe", "gpt_oss"), GATED | {"wide": "k_proj"}),
    "gpt2": {"attention": ["c_attn"], "one": "attn.c_proj", "wide": "c_fc", "embedding": "wte", "head": "lm_head", "norm": "ln_f",
             "layers": "h", "norms": "ln_1"},
    "opt": {"attention": ["q_proj", "v_proj"], "one": "out_proj", "wide": "fc1", "embedding": "embed_tokens", "head": "lm_head",
            "norm": "layer_norm", "layers": "layers", "norms": "final_layer_norm"},
    "bag": {"attention": ["lin0"], "one": "score", "wide": "conv1", "embedding": "emb", "head": "score", "norm": "norm", "norms": "norm"},
}  # fmt: skip
MOE = ("mixtral", "qwen3_moe", "gpt_oss")
BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def rows(arch: str) -> dict[str, dict[str, Any]]:
    """Name → LoraConfig's fields, of what an architecture has."""
    n = NAMES[arch]
    A, one = {"target_modules": n["attention"]}, n["attention"][0]
    found: dict[str, dict[str, Any]] = {
        "one module": {"target_modules": [n["one"]]},
        "several": {"target_modules": [*n["attention"], n["one"], n["wide"]]},
        "a regex": {"target_modules": rf".*({one}|{n['wide']})"},
        "high alpha": A | {"r": 8, "lora_alpha": 32},
        "rsLoRA": A | {"r": 4, "lora_alpha": 3, "use_rslora": True},
        "rank_pattern": A | {"rank_pattern": {one: 3}},
        "alpha_pattern": A | {"alpha_pattern": {one: 9}},
        "patterns, rsLoRA": A | {"rank_pattern": {one: 3}, "alpha_pattern": {f".*{one}": 5}, "use_rslora": True},
        "excluded": {"target_modules": [*n["attention"], n["one"]], "exclude_modules": [n["one"]]},
        "excluded by regex": {"target_modules": [*n["attention"], n["one"]], "exclude_modules": rf".*{n['one']}"},
        "gaussian": A | {"init_lora_weights": "gaussian"},
        "random": A | {"init_lora_weights": False},
        "orthogonal": A | {"init_lora_weights": "orthogonal", "r": 2},
        "dropout": A | {"lora_dropout": 0.1},
        "VeLoRA": A | {"velora_config": {"num_groups": 2}},
        "head saved": A | {"modules_to_save": [n["head"]]},
        "norms saved by suffix": A | {"modules_to_save": [n["norms"]]},
        "norms and head saved by suffix": A | {"modules_to_save": [n["norm"], n["head"][-4:]]},
        "embedding saved": A | {"modules_to_save": [n["embedding"]]},
        "both ends saved": A | {"modules_to_save": [n["embedding"], n["head"]]},
        "biases": A | {"bias": "all"},
        "biases of LoRA's layers": A | {"bias": "lora_only"},
        "embedding": {"target_modules": [n["embedding"]]},
        "embedding and linears": {"target_modules": [n["embedding"], *n["attention"]]},
        "embedding and head": {"target_modules": [n["embedding"], n["head"]]},
        "tokens": A | {"trainable_token_indices": {n["embedding"]: [3, 1, 7]}},
        "DoRA": A | {"use_dora": True},
        "PiSSA": A | {"init_lora_weights": "pissa"},
        "OLoRA": A | {"init_lora_weights": "olora"},
    }
    if arch in ("llama", "gpt2", "opt", "bag"):  # the others' layers have no bias that PEFT could merge it into
        found |= {"lora_bias": A | {"lora_bias": True}}
    if arch in ("llama", "llama, tied", "gpt2", "opt", "gemma3"):
        found |= {"the architecture's own": {"target_modules": None}}
    if arch != "bag":
        found |= {
            "all-linear": {"target_modules": "all-linear"},
            "some layers": A | {"layers_to_transform": [1]},
            "some layers by pattern": A | {"layers_to_transform": [0], "layers_pattern": n["layers"]},
            "a whole name": {"target_modules": [name_of(arch, one)]},
            "a rank by whole name": A | {"rank_pattern": {f"^{name_of(arch, one)}": 5}},
            "tokens as a list": A | {"trainable_token_indices": [9, 2]},
            "aLoRA": A | {"alora_invocation_tokens": [1]},
        }
    if arch == "llama":
        found |= {
            "layers replicated": A | {"layer_replication": [[0, 2], [0, 2]]},
            "KaSA": A | {"kasa_config": {}},
            "MonteCLoRA": A | {"monteclora_config": {}},
            "MiCA": A | {"init_lora_weights": "mica"},
        }
    if arch in ("llama, tied", "gemma3"):
        found |= {
            "tied, both ends saved": A | {"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
            "tied, embedding saved": A | {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
            "tied, LoRA on both ends": {
                "target_modules": ["embed_tokens", "lm_head", "q_proj"],
                "ensure_weight_tying": True,
            },
            "tied, tokens": A | {"trainable_token_indices": [4, 5], "ensure_weight_tying": True},
        }
    if arch in MOE:
        found |= {
            "experts": {"target_modules": [], "target_parameters": BOTH},
            "experts and linears": A | {"target_parameters": BOTH},
            "half of the experts": A | {"target_parameters": BOTH[:1]},
            "the other half": {"target_modules": [], "target_parameters": BOTH[1:]},
            "experts by last name": A | {"target_parameters": ["down_proj", "gate_up_proj"]},
            "experts, rsLoRA": A | {"target_parameters": BOTH, "use_rslora": True, "r": 5},
            "experts, a rank for one": A
            | {"target_parameters": BOTH, "rank_pattern": {"down_proj": 6}, "alpha_pattern": {"down_proj": 1}},
            "experts, router": A
            | {"target_parameters": [*BOTH, "router.weight" if arch == "gpt_oss" else "gate.weight"]},
            "experts and a saved head": A | {"target_parameters": BOTH, "modules_to_save": ["lm_head"]},
        }
    if arch in ("llama", "opt"):
        found |= {"a linear's weight": {"target_modules": [], "target_parameters": [f"{one}.weight"]}}
    if arch == "bag":
        convs = ["conv1", "conv2"]
        found |= {
            "attention": {"target_modules": ["attn"]},
            "attention and linears": {"target_modules": ["attn", "lin0"]},
            "attention, its rank": {"target_modules": ["attn", "lin0"], "rank_pattern": {"attn": 3}},
            "attention, biases": {"target_modules": ["attn"], "bias": "all"},
            "convolutions": {"target_modules": convs},
            "convolutions, lora_bias": {"target_modules": [*convs, "lin0"], "lora_bias": True},
            "convolutions and attention": {"target_modules": [*convs, "attn", "emb"]},
            "groups": {"target_modules": ["grouped"], "r": 4},
            "groups and convolutions": {"target_modules": ["grouped", "conv2", "lin0"], "r": 2},
        }
    return found


def name_of(arch: str, leaf: str) -> str:
    return next(name for name, _ in MAKE[arch]().named_modules() if name.endswith(f".{leaf}"))


VARIANTS: dict[str, Callable[[str, dict[str, Any]], dict[str, Any]]] = {
    "alike": lambda arch, options: options,
    "other ranks": lambda arch, options: options | {"r": 2 * options.get("r", 2), "lora_alpha": 3},
    "other modules": lambda arch, options: options | other_targets(arch, options),
}


def other_targets(arch: str, options: dict[str, Any]) -> dict[str, Any]:
    """Some modules more, or others; fields that only go with those of the first member are left."""
    n = NAMES[arch]
    if options.get("target_modules") in (None, "all-linear"):
        return {"target_modules": [n["one"]]}
    if options.get("target_parameters") and arch in MOE:
        return {"target_modules": [n["one"]], "target_parameters": BOTH[:1]}
    if isinstance(options["target_modules"], str):
        return {"target_modules": rf".*{n['one']}"}
    one = n["one"]
    if one in (options.get("modules_to_save") or ()) or (arch == "bag" and options.get("modules_to_save")):
        return {}
    return {"target_modules": [*options["target_modules"], one]} if one not in str(options["target_modules"]) else {}


NO_MEAN = {
    "use_dora is True": "not linear in its factors",
    "init_lora_weights is 'pissa'": "changes the base",
    "init_lora_weights is 'olora'": "changes the base",
    "layer_replication": "changes the base",
    "kasa_config": "changes the base",
    "every member must have it": "trained in full by one member: the other's value is the base's, which is not in the files",
}
"""Reasons for which no adapter is the mean, by what the refusal says."""


def train(arch: str, folder: Path, seed: int, options: dict[str, Any], **saving: Any) -> Path:
    """An adapter as PEFT saves it, what would be trained random."""
    task = None if arch == "bag" else "CAUSAL_LM"
    config = LoraConfig(**{"r": 2, "lora_alpha": 4, "task_type": task} | options)
    model = get_peft_model(MAKE[arch](), config)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.mul_(0.1).add_(
                torch.randn(parameter.shape, generator=generator) * 0.2
            )  # tied ones share memory
    model.save_pretrained(folder, **saving)
    (folder / "fingerprint.json").write_text(json.dumps({"base": "5e" * 32}))
    return folder


def opened(arch: str, folder: Path) -> PeftModel:
    return PeftModel.from_pretrained(MAKE[arch](), folder).eval()


def merged(arch: str, folder: Path) -> dict[str, torch.Tensor]:
    return {name: value.double() for name, value in opened(arch, folder).merge_and_unload().state_dict().items()}


def difference(arch: str, root: Path, members: list[Path]) -> float:
    """The largest of the soup's parameters against the mean of the members', PEFT merging both; the soup must be another than the base."""
    soup(root / "soup", members, W)
    for folder in (*members, root / "soup"):
        active_everywhere(folder)
    base = MAKE[arch]().state_dict()
    thetas, found = [merged(arch, member) for member in members], merged(arch, root / "soup")
    mean = {name: W[0] * thetas[0][name] + W[1] * thetas[1][name] for name in found}
    assert max(float((mean[name] - base[name].double()).abs().max()) for name in found) > 1e-2
    return max(float((found[name] - mean[name]).abs().max()) for name in found)


def active_everywhere(folder: Path) -> None:
    """aLoRA as plain LoRA, which PEFT merges: the delta is the same one, after the invocation tokens."""
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"alora_invocation_tokens": None}))


def outputs_differ(root: Path, members: list[Path]) -> float:
    """The same for a layer of the bag that PEFT cannot merge: what it gives for one input is the mean too."""
    soup(root / "soup", members, W)
    x = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        made = [opened("bag", folder).get_base_model().grouped(x) for folder in (*members, root / "soup")]
        base = MAKE["bag"]().grouped(x)
    assert (made[2] - base).abs().max() > 1e-2
    return float((W[0] * made[0] + W[1] * made[1] - made[2]).abs().max())


CASES = [(arch, row, variant) for arch in MAKE for row in rows(arch) for variant in VARIANTS]
SAMPLE = [
    ("llama", "several", "other modules"), ("llama", "patterns, rsLoRA", "other ranks"), ("llama", "norms and head saved by suffix", "alike"),
    ("llama", "embedding and head", "other modules"), ("llama", "tokens", "other modules"), ("llama", "biases", "alike"),
    ("llama", "DoRA", "alike"), ("llama", "a linear's weight", "other ranks"), ("llama, tied", "tied, both ends saved", "other ranks"),
    ("llama, tied", "tied, LoRA on both ends", "other ranks"), ("gpt2", "all-linear", "other ranks"), ("mixtral", "experts and linears", "other ranks"),
    ("mixtral", "all-linear", "alike"), ("mixtral", "experts", "other modules"), ("qwen3_moe", "experts, a rank for one", "other ranks"),
    ("qwen3_moe", "the other half", "other modules"), ("gpt_oss", "experts, rsLoRA", "other ranks"), ("gemma3", "embedding and head", "alike"),
    ("opt", "the architecture's own", "other ranks"), ("opt", "norms and head saved by suffix", "alike"), ("bag", "attention, its rank", "other ranks"), ("bag", "attention, biases", "alike"),
    ("bag", "groups", "other ranks"), ("bag", "convolutions and attention", "other ranks"),
]  # fmt: skip


def check(arch: str, row: str, variant: str, root: Path) -> str:
    """ "exact", or the refusal; an assertion fails where it is neither."""
    options = rows(arch)[row]
    members = [train(arch, root / "a", 0, options), train(arch, root / "b", 1, VARIANTS[variant](arch, options))]
    try:
        found = (
            outputs_differ(root, members)
            if "grouped" in str(options["target_modules"])
            else difference(arch, root, members)
        )
    except SalsaError as error:
        return str(error)
    assert found <= TOLERANCE, found
    return "exact"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("arch", "row", "variant"),
    [pytest.param(*case, marks=[] if case in SAMPLE else [pytest.mark.slow]) for case in CASES],
)
def test_the_mean_or_a_reason_why_there_is_none(arch: str, row: str, variant: str, tmp_path: Path) -> None:
    said = check(arch, row, variant, tmp_path)
    assert said == "exact" or any(reason in said for reason in NO_MEAN), said


def test_the_sample_is_of_the_matrix() -> None:
    assert set(SAMPLE) <= set(CASES)
