"""Soups merged into bases as the Hub has them, and of members that only a merge can average: against the mean of PEFT's own merges."""

from __future__ import annotations

import copy
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from paths import SHARED
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from salsa_peft.soup.merge.average import merge
from salsa_peft.utils.errors import SalsaError

HUB = SHARED / "hub"
WEIGHTS = [0.3, 0.7]
SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 1}  # fmt: skip


def llama(**options: Any) -> T.PreTrainedModel:
    return T.LlamaForCausalLM(T.LlamaConfig(**SIZES, initializer_range=0.3, **options))


def tied() -> T.PreTrainedModel:
    return llama(tie_word_embeddings=True)


def qwen2() -> T.PreTrainedModel:
    return T.Qwen2ForCausalLM(T.Qwen2Config(**SIZES, initializer_range=0.3))


def mixtral() -> T.PreTrainedModel:
    return T.MixtralForCausalLM(T.MixtralConfig(**SIZES, num_local_experts=3, initializer_range=0.3))


def siglip() -> T.PreTrainedModel:
    """Its head is torch's MultiheadAttention."""
    part = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = part | {"image_size": 28, "patch_size": 14}
    return T.SiglipModel(T.SiglipConfig(text_config=part | {"vocab_size": 40}, vision_config=vision))


def made(build: Any, folder: Path) -> Path:
    torch.manual_seed(0)
    build().float().save_pretrained(folder, max_shard_size="6KB")
    return folder


def opened(folder: Path, auto: str = "AutoModelForCausalLM", rows: int | None = None) -> T.PreTrainedModel:
    model = getattr(T, auto).from_pretrained(folder, dtype=torch.float32)
    if rows is not None:
        model.resize_token_embeddings(rows)
    return model.eval()


def train(model: T.PreTrainedModel, folder: Path, seed: int, **options: Any) -> Path:
    """An adapter folder as PEFT writes it; everything that it trains is moved at random."""
    config = LoraConfig(**({"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | options))
    peft = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in peft.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    peft.save_pretrained(folder)
    return folder


def peft_merge(model: T.PreTrainedModel, member: Path) -> dict[str, torch.Tensor]:
    state = PeftModel.from_pretrained(model, member).merge_and_unload().state_dict()
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def assert_mean(out: Path, merged: list[dict[str, torch.Tensor]], auto: str, tolerance: float = 2e-6) -> None:
    """The result opens with nothing missing and nothing unexpected, and is Σ w_i (PEFT's merge of member i)."""
    model, info = getattr(T, auto).from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    found = model.state_dict()
    assert found.keys() == merged[0].keys()
    for name, tensor in found.items():
        expected = sum(weight * state[name].double() for weight, state in zip(WEIGHTS, merged, strict=True))
        error = ((tensor.double() - expected).abs() - tolerance * expected.abs().clamp(min=1)).max()
        assert error <= 0, f"{name}: {error}"


BOTH = {"modules_to_save": ["embed_tokens", "lm_head"]}
EXPERTS = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
CASES: dict[str, tuple[Any, dict[str, Any], dict[str, Any], int | None]] = {
    "DoRA beside LoRA": (llama, {"use_dora": True, "target_modules": ["q_proj", "embed_tokens"]}, {"r": 3}, None),
    "modules_to_save in one member": (llama, {"modules_to_save": ["lm_head"]}, {"target_modules": "all-linear"}, None),
    "other trained tokens": (llama, {"trainable_token_indices": [3, 5]}, {"trainable_token_indices": [9, 5, 7]}, None),
    "biases in one member": (qwen2, {"bias": "all"}, {"lora_bias": True}, None),
    "tied, trained tokens": (tied, {"trainable_token_indices": [3, 5]}, {}, None),
    "tied, added and trained tokens": (tied, {"trainable_token_indices": [41, 42]}, {"trainable_token_indices": [42]}, 44),
    "tied, head saved": (tied, {"modules_to_save": ["lm_head"]}, {}, None),
    "tied, both saved": (tied, BOTH, BOTH, None),
    "tied, both saved as one": (tied, BOTH | {"ensure_weight_tying": True}, BOTH | {"ensure_weight_tying": True}, None),
    "tied, LoRA on both": (tied, {"target_modules": ["embed_tokens", "lm_head"]}, {}, None),
    "added tokens, both saved": (llama, BOTH, BOTH, 44),
    "added tokens, saved by PEFT": (llama, {}, {"target_modules": ["v_proj"]}, 44),
    "added tokens, tied": (tied, {}, BOTH, 44),
    "fewer tokens": (llama, {}, {}, 36),
    "experts in one member": (mixtral, EXPERTS, {"target_modules": "all-linear"}, None),
    "MultiheadAttention": (siglip, {"target_modules": ["attention"], "task_type": None}, {"target_modules": ["fc1"], "task_type": None}, None),
    "convolution": (siglip, {"target_modules": ["patch_embedding"], "task_type": None}, {"target_modules": ["fc1"], "task_type": None}, None),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_merge_is_the_mean_of_pefts_merges(case: str, tmp_path: Path) -> None:
    build, one, other, rows = CASES[case]
    auto = "AutoModel" if build is siglip else "AutoModelForCausalLM"
    base = made(build, tmp_path / "base")
    members = [train(opened(base, auto, rows), tmp_path / f"a{i}", i, **given) for i, given in enumerate((one, other))]
    summary = merge(tmp_path / "out", base, members, WEIGHTS)
    assert_mean(tmp_path / "out", [peft_merge(opened(base, auto, rows), member) for member in members], auto)
    assert summary["rows"] == rows
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.get("vocab_size") == (rows or json.loads((base / "config.json").read_text()).get("vocab_size"))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    sizes = {
        file.name: {name: t.nbytes for name, t in load_file(file).items()}
        for file in (tmp_path / "out").glob("*.safetensors")
    }
    assert index["weight_map"] == {name: file for file, tensors in sizes.items() for name in tensors}
    assert index["metadata"]["total_size"] == sum(sum(tensors.values()) for tensors in sizes.values())


def test_untied_a_merge_computes_what_the_adapter_does(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """PEFT's own merge adds the deltas of both to the one tensor, which its adapter model does not compute: that is said."""
    base = made(tied, tmp_path / "base")
    member = train(opened(base), tmp_path / "a", 1, target_modules=["q_proj", "embed_tokens", "lm_head"])
    adapter = PeftModel.from_pretrained(opened(base), member)
    ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    with torch.no_grad():
        assert merge(tmp_path / "untied", base, [member], [1.0], untie=True)["untied"] is True
        assert "--untie" not in caplog.text
        assert torch.allclose(opened(tmp_path / "untied")(ids).logits, adapter(ids).logits, rtol=0, atol=2e-5)
        assert merge(tmp_path / "one", base, [member], [1.0])["untied"] is False
        assert "lm_head.weight and model.embed_tokens.weight are one tensor" in caplog.text
        assert not torch.allclose(opened(tmp_path / "one")(ids).logits, adapter(ids).logits, rtol=0, atol=1e-2)


def test_a_scaled_delta_and_what_has_none(tmp_path: Path) -> None:
    """Weights of any sum scale what was learned, saved modules too: the base's values are known. New tokens have none there."""
    base = made(llama, tmp_path / "base")
    member = train(opened(base), tmp_path / "a", 1, modules_to_save=["lm_head"], use_dora=True)
    merge(tmp_path / "out", base, [member], [0.4])
    start, end = opened(base).state_dict(), peft_merge(opened(base), member)
    for name, tensor in opened(tmp_path / "out").state_dict().items():
        assert torch.allclose(tensor, start[name] + 0.4 * (end[name] - start[name]), rtol=0, atol=2e-6), name
    longer = train(opened(base, rows=44), tmp_path / "b", 1)
    for members, weights, line in (
        ([longer], [0.4], "weights: they sum to 0.4, but must sum to 1, because .* the tokens that were added"),
        ([member, longer], [0.5, 0.5], "b was trained with 44 rows of embeddings, .*a with 40"),
    ):
        with pytest.raises(SalsaError, match=line):
            merge(tmp_path / "none", base, members, weights)
        assert not (tmp_path / "none").exists()


def test_prefixes_of_wrappers_and_tensors_without_a_place(tmp_path: Path) -> None:
    """What a compiled model saved is merged as itself; what PEFT would drop in silence is refused, and so is an incomplete file."""
    base = made(llama, tmp_path / "base")
    member = train(opened(base), tmp_path / "a", 1)
    path, tensors = member / "adapter_model.safetensors", load_file(member / "adapter_model.safetensors")
    merge(tmp_path / "plain", base, [member], [1.0])
    save_file({n.replace("model.model.", "model._orig_mod.model."): t for n, t in tensors.items()}, path)
    merge(tmp_path / "compiled", base, [member], [1.0])
    for file in (tmp_path / "plain").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "compiled" / file.name).read_bytes()
    first = min(tensors)
    for given, line in (
        (tensors | {"base_model.model.other.lora_A.weight": torch.ones(2, 2)}, r"other.lora_A.weight is not in Llama"),
        ({name: t for name, t in tensors.items() if name != first}, r"there are no values for .*lora_A.default.weight"),
        (tensors | {first: tensors[first] * float("inf")}, rf"{first} has values that are not finite"),
    ):  # fmt: skip
        save_file(given, path)
        with pytest.raises(SalsaError, match=line):
            merge(tmp_path / "none", base, [member], [1.0])


def test_refused_before_anything_is_written(tmp_path: Path) -> None:
    base = made(llama, tmp_path / "base")
    biased = train(opened(base), tmp_path / "biased", 1, lora_bias=True)
    head = train(opened(base, "AutoModelForSequenceClassification"), tmp_path / "head", 1, task_type="SEQ_CLS")
    for member, line in (
        (
            biased,
            r"PEFT cannot merge model.layers.0.self_attn.q_proj \(.*no bias.*\); average the adapters without --merge",
        ),
        (head, r"head is an adapter of a classifier \(task_type SEQ_CLS\)"),
    ):
        with pytest.raises(SalsaError, match=line):
            merge(tmp_path / "none", base, [member], [1.0])
        assert not (tmp_path / "none" / "config.json").exists()


def test_the_result_is_whole(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What Transformers would start at random is refused; what it has no place for is said and stays."""
    base = made(llama, tmp_path / "base")
    member = train(opened(base), tmp_path / "a", 1)
    resized = train(opened(base, rows=44), tmp_path / "resized", 1)
    path = resized / "adapter_model.safetensors"
    save_file({name: t for name, t in load_file(path).items() if "lora_" in name or "lm_head" in name}, path)
    with pytest.raises(SalsaError, match=r"has no model.embed_tokens.weight of 44 rows, .*save_embedding_layers=True"):
        merge(tmp_path / "none", base, [resized], [1.0])
    (base / "model.safetensors.index.json").unlink()
    tensors = {name: t for file in base.glob("*.safetensors") for name, t in load_file(file).items()}
    for file in base.glob("*.safetensors"):
        file.unlink()
    save_file(tensors | {"v_head.summary.weight": torch.ones(1, 16)}, base / "model.safetensors", {"format": "pt"})
    merge(tmp_path / "extra", base, [member], [1.0])
    assert "v_head.summary.weight and 0 other tensors are not part of LlamaForCausalLM" in caplog.text
    assert "v_head.summary.weight" in load_file(tmp_path / "extra" / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        SalsaError,
        match=r"base: the base has no tensor model.norm.weight, so LlamaForCausalLM would initialise it at random",
    ):
        merge(tmp_path / "none", base, [member], [1.0])


def test_one_module_in_several_shards(tmp_path: Path) -> None:
    """Experts that are one parameter are computed once, and their figures count once, however many shards they are written to."""
    base = made(mixtral, tmp_path / "base")
    member = train(opened(base), tmp_path / "a", 1, **EXPERTS)
    opened(base).save_pretrained(tmp_path / "single")
    one, other = (merge(tmp_path / f"of {name}", tmp_path / name, [member], [0.5]) for name in ("base", "single"))
    assert (one["shards"] > 3, other["shards"]) == (True, 1)
    assert one["norm"] == pytest.approx(other["norm"], rel=1e-12)
    found, expected = (opened(tmp_path / f"of {name}").state_dict() for name in ("base", "single"))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


FAMILIES = sorted(path.name for path in (HUB / "models").glob("*")) if HUB.is_dir() else []
TARGETS = ("linears", "attention and embeddings")
QUICK = [("llama-2-7b-hf", TARGETS[0]), ("gpt2", TARGETS[1]), ("llava-1.5-7b-hf", TARGETS[0])]
ULP = {torch.float32: 2e-7, torch.bfloat16: 2**-8, torch.float16: 2**-11}
PLACES = [
    pair if pair in QUICK else pytest.param(*pair, marks=pytest.mark.slow)
    for pair in ((family, targets) for family in FAMILIES for targets in TARGETS)
]


@pytest.fixture
def of_the_hub(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Path], Path]:
    """Makes a model folder with a family's real names and dtypes, in two shards."""
    spec = importlib.util.spec_from_file_location("make_tiny", HUB / "make_tiny.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "make_tiny", module)
    spec.loader.exec_module(module)

    def make(family: str, folder: Path) -> Path:
        monkeypatch.setattr(sys, "argv", ["make_tiny.py", family, str(folder), "--shards", "2"])
        module.main()
        return folder

    return make


@pytest.mark.skipif(not FAMILIES, reason="needs ../shared/hub, real folders without their weights")
@pytest.mark.parametrize(("family", "targets"), PLACES)
def test_bases_of_the_hub(family: str, targets: str, tmp_path: Path, of_the_hub: Callable[[str, Path], Path]) -> None:
    """Real names, dtypes and extra tensors: the mean of PEFT's merges to one rounding in the base's dtype."""
    base = of_the_hub(family, tmp_path / "base")
    if family.endswith("int8"):
        with pytest.raises(SalsaError, match=r"quantised \(bitsandbytes, 8 bits\)"):
            merge(tmp_path / "out", base, [train(opened(made(llama, tmp_path / "b")), tmp_path / "a", 1)], [1.0])
        return
    auto = "AutoModelForImageTextToText" if "llava" in family else "AutoModelForCausalLM"
    options: dict[str, Any] = {"target_modules": "all-linear", "fan_in_fan_out": family == "gpt2"}
    if targets != TARGETS[0]:
        linears = {"gpt2": ["c_attn"], "phi-3-mini-128k-instruct": ["qkv_proj"]}.get(
            family, r".*layers\.\d+\.self_attn\.(q|v)_proj"
        )
        options |= {"target_modules": linears, "modules_to_save": ["wte" if family == "gpt2" else "embed_tokens"]}
    model = opened(base, auto)
    members = [train(copy.deepcopy(model), tmp_path / f"a{i}", i, **options) for i in (0, 1)]
    merge(tmp_path / "out", base, members, WEIGHTS)
    dtypes = {tensor.dtype for file in base.glob("*.safetensors") for tensor in load_file(file).values()}
    merged = [peft_merge(copy.deepcopy(model), member) for member in members]
    assert_mean(tmp_path / "out", merged, auto, max(ULP.get(dtype, 0.0) for dtype in dtypes))
