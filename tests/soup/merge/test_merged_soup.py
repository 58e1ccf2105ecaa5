"""Soups of adapters merged into their base: against PEFT's own merge, its odd layers, 4-bit bases, and every refusal's line."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from salsa_peft.soup.checkpoints.write import Output
from salsa_peft.soup.merge import plan as merge_plan
from salsa_peft.soup.merge import sums as merge_sums
from salsa_peft.soup.merge.average import merge
from salsa_peft.utils.errors import SalsaError
from salsa_peft.utils.fingerprints import base_fingerprint

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 32}


def llama(**options: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(**(SIZES | {"num_key_value_heads": 1, "initializer_range": 0.3} | options))
    ).eval()


def save(model: torch.nn.Module, folder: Path, shard: str = "1GB") -> Path:
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


def train(base: torch.nn.Module, folder: Path, seed: int, **options: Any) -> Path:
    """An adapter folder as PEFT writes it; everything that it trains is random."""
    config = LoraConfig(
        **({"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | options)
    )
    model = get_peft_model(copy.deepcopy(base), config)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.3, generator=generator)
    model.save_pretrained(folder)
    return folder


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def opened(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def peft_mean(base: torch.nn.Module, members: list[Path], weights: list[float]) -> dict[str, torch.Tensor]:
    """θ_base + Σ w_i (PEFT's merge of member i − θ_base), float64."""
    start = {name: tensor.double() for name, tensor in base.state_dict().items()}
    total = {name: tensor.clone() for name, tensor in start.items()}
    for member, weight in zip(members, weights, strict=True):
        merged = PeftModel.from_pretrained(copy.deepcopy(base), member).merge_and_unload().state_dict()
        for name in total:
            total[name] += weight * (merged[name].double() - start[name])
    return total


def assert_close(folder: Path, expected: dict[str, torch.Tensor], tolerance: float = 2e-6) -> None:
    found = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    for name, tensor in found.items():
        name = name if name in expected else f"transformer.{name}"
        assert torch.allclose(tensor.double(), expected[name], rtol=0, atol=tolerance), name


@pytest.fixture(autouse=True)
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a tiny weight is several pieces."""
    monkeypatch.setattr(merge_sums, "ELEMENTS", 50)
    monkeypatch.setattr(merge_plan, "ELEMENTS", 50)


def test_a_merge_is_pefts_and_opens_in_plain_transformers(tmp_path: Path) -> None:
    """Other ranks, alphas, rsLoRA and modules; a base in shards; logits of the weighted deltas to 1e-5; the base's files."""
    base = llama()
    folder = save(base, tmp_path / "base", "4KB")
    members = [
        train(base, tmp_path / "a", 1),
        train(base, tmp_path / "b", 2, r=4, use_rslora=True, target_modules="all-linear"),
    ]
    (members[0] / "tokenizer.json").write_text('{"of": "the member"}')
    (members[0] / "tokenizer_config.json").write_text("{}")
    weights = [0.3, 0.9]
    told: list[tuple[int, int]] = []
    summary = merge(tmp_path / "out", folder, members, weights, progress=lambda *at: told.append(at), more={"asked": 1})
    assert summary["asked"] == json.loads((tmp_path / "out" / "soup.json").read_text())["asked"] == 1
    expected = peft_mean(base, members, weights)
    assert_close(tmp_path / "out", expected)
    model = copy.deepcopy(base)
    model.load_state_dict({name: tensor.float() for name, tensor in expected.items()})
    assert torch.allclose(logits(opened(tmp_path / "out")), logits(model), rtol=0, atol=1e-5)
    for path in folder.iterdir():
        ours = (tmp_path / "out" / path.name).read_bytes()
        if path.suffix == ".safetensors":
            length = 8 + int.from_bytes(ours[:8], "little")
            assert path.read_bytes()[:length] == ours[:length]
        else:
            assert path.read_bytes() == ours
    assert (tmp_path / "out" / "tokenizer.json").read_text() == '{"of": "the member"}'
    assert told[-1][0] == told[-1][1] > 0
    assert summary["rounding"] < 1e-6
    assert (summary["kind"], summary["quantized_base"], summary["replaced"]) == ("merged", None, [])


def test_a_bf16_base_stays_bf16_and_says_what_rounding_lost(tmp_path: Path) -> None:
    """Added in float32, rounded once."""
    base = llama().bfloat16()
    folder, members = save(base, tmp_path / "base"), [train(base, tmp_path / "a", 1), train(base, tmp_path / "b", 2)]
    summary = merge(tmp_path / "out", folder, members, [0.5, 0.5])
    start, found = load_file(folder / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    lost = delta = 0.0
    loaded = [load_file(member / "adapter_model.safetensors") for member in members]
    for name, tensor in found.items():
        assert tensor.dtype == torch.bfloat16
        key = f"base_model.model.{name.removesuffix('weight')}lora_%s.weight"
        if key % "A" not in loaded[0]:
            assert torch.equal(tensor, start[name])
            continue
        change = sum(0.5 * 2 * (factors[key % "B"].float() @ factors[key % "A"].float()) for factors in loaded)
        assert torch.equal(tensor, (start[name].float() + change).bfloat16())
        lost += float((tensor.float() - start[name].float() - change).norm()) ** 2
        delta += float(change.norm()) ** 2
    assert summary["rounding"] == pytest.approx((lost / delta) ** 0.5, rel=1e-3)


def test_full_parts_biases_and_tokens(tmp_path: Path) -> None:
    """modules_to_save and trained tokens replace the base's; lora_bias adds to its bias."""
    base = llama(attention_bias=True)
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(generator=torch.Generator().manual_seed(7))
    folder = save(base, tmp_path / "base")
    for name, options, replaced in (
        ("full", {"modules_to_save": ["lm_head"]}, ["lm_head.weight"]),
        ("tokens", {"trainable_token_indices": [3, 30]}, ["model.embed_tokens.weight"]),
        ("bias", {"lora_bias": True}, []),
    ):
        members = [train(base, tmp_path / f"{name}{seed}", seed, **options) for seed in (1, 2)]
        summary = merge(tmp_path / name, folder, members, [0.25, 0.75])
        assert summary["replaced"] == replaced
        assert_close(tmp_path / name, peft_mean(base, members, [0.25, 0.75]))


def test_conv1d_and_embeddings_lie_across(tmp_path: Path) -> None:
    """GPT-2's linears hold (in, out), the square one too; LoRA on embeddings (tokens, features)."""
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(
        GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32, n_positions=16, tie_word_embeddings=False)
    ).eval()
    folder = save(gpt2, tmp_path / "gpt2")
    members = [
        train(gpt2, tmp_path / f"g{seed}", seed, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
        for seed in (1, 2)
    ]
    merge(tmp_path / "out", folder, members, [0.4, 0.6])
    assert_close(tmp_path / "out", peft_mean(gpt2, members, [0.4, 0.6]))
    base = llama(vocab_size=16)  # a square embedding: its shape does not say which way it lies
    members = [train(base, tmp_path / f"e{seed}", seed, target_modules=["embed_tokens", "q_proj"]) for seed in (1, 2)]
    merge(tmp_path / "embedded", save(base, tmp_path / "base"), members, [0.4, 0.6])
    assert_close(tmp_path / "embedded", peft_mean(base, members, [0.4, 0.6]))


def test_a_base_saved_without_the_models_prefix(tmp_path: Path) -> None:
    """As the Hub's gpt2 is: h.0.attn … where the model says transformer.h.0.attn …"""
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32, n_positions=16)).eval()
    folder = save(gpt2, tmp_path / "gpt2")
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {name.removeprefix("transformer."): t for name, t in tensors.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    members = [train(gpt2, tmp_path / "g", 1, target_modules=["c_attn"], fan_in_fan_out=True)]
    merge(tmp_path / "out", folder, members, [1.0])
    assert_close(tmp_path / "out", peft_mean(gpt2, members, [1.0]))


def test_broken_off_it_leaves_nothing_and_starts_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the second shard: no file of it is left, and the same call ends with the bytes and figures of one that nothing disturbed."""
    base = llama()
    folder, member = save(base, tmp_path / "base", "4KB"), train(base, tmp_path / "a", 1)
    whole = merge(tmp_path / "whole", folder, [member], [0.5])
    shard, begun = Output.shard, []

    def stop(self: Output, name: str, header: bytes) -> Any:
        begun.append(name)
        if len(begun) == 2:
            raise KeyboardInterrupt
        return shard(self, name, header)

    with monkeypatch.context() as patch:
        patch.setattr(Output, "shard", stop)
        with pytest.raises(KeyboardInterrupt):
            merge(tmp_path / "out", folder, [member], [0.5])
    assert len(begun) == 2 and not (tmp_path / "out").exists()
    again = merge(tmp_path / "out", folder, [member], [0.5])
    for path in (tmp_path / "whole").iterdir():
        assert path.name == "soup.json" or path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()
    assert (again["rounding"], again["norm"]) == (whole["rounding"], whole["norm"])


def refused(tmp_path: Path, line: str, base: Path, *members: Path, **options: Any) -> None:
    with pytest.raises(SalsaError, match=line) as caught:
        merge(tmp_path / "none", base, members, [1 / len(members)] * len(members), **options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "none").exists()


def test_refusals(tmp_path: Path) -> None:
    """A base that is not the adapters', quantised weights of other kinds, NaN; nothing is left behind."""
    base = llama()
    folder, plain = save(base, tmp_path / "base"), train(base, tmp_path / "plain", 1)
    deep = train(llama(num_hidden_layers=3), tmp_path / "deep", 1)
    line = r"deep/adapter_model.safetensors: .*layers.2.self_attn.q_proj.lora_A.weight is not in LlamaForCausalLM"
    refused(tmp_path, line, folder, deep)
    wide = train(llama(hidden_size=32), tmp_path / "wide", 1)
    refused(
        tmp_path,
        r"wide/.*q_proj.lora_A.default.weight has shape \[2, 32\], but \[2, 16\] in LlamaForCausalLM",
        folder,
        wide,
    )
    (plain / "fingerprint.json").write_text(json.dumps({"base": "5e" * 32}))
    line = r"plain was trained on another base than .*/base: .* has 5e5e5e5e5e5e…, .* assert with --same-base"
    refused(tmp_path, line, folder, plain)
    merge(tmp_path / "asserted", folder, [plain], [1.0], same_base=True)
    (plain / "fingerprint.json").write_text(json.dumps({"base": base_fingerprint(folder)}))
    merge(tmp_path / "right", folder, [plain], [1.0])
    refused(tmp_path, "quantized_base: 'int4' is not one of nf4, nf4-double", folder, plain, quantized_base="int4")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.v_proj.weight"][3, 3] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (plain / "fingerprint.json").unlink()
    refused(tmp_path, r"base: model.layers.0.self_attn.v_proj.weight is not finite after the merge", folder, plain)
    config = json.loads((folder / "config.json").read_text())
    for method, found in (
        ({"quant_method": "gptq"}, "gptq"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes, 8 bits"),
        ({"_load_in_8bit": True, "load_in_8bit": True}, "bitsandbytes, 8 bits"),
    ):
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": method}))
        refused(tmp_path, rf"base/config.json: the weights are quantised \({found}\), .* with --base", folder, plain)


def test_a_4_bit_base_is_dequantised_and_never_written_back(tmp_path: Path) -> None:
    """bitsandbytes' own checkpoint; and a plain base through nf4: both are what the QLoRA adapter was trained on."""
    functional = pytest.importorskip("bitsandbytes.functional", reason="4-bit bases need bitsandbytes (extra qlora)")
    from transformers import BitsAndBytesConfig

    base = llama(hidden_size=64, intermediate_size=64, num_attention_heads=2).bfloat16()
    folder = save(base, tmp_path / "base", "40KB")
    for double in (False, True):
        kind = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype="bfloat16",
            bnb_4bit_use_double_quant=double,
        )
        four = AutoModelForCausalLM.from_pretrained(folder, quantization_config=kind, device_map="cpu")
        packed = save(four, tmp_path / f"packed{double}", "20KB")
        member = train(base, tmp_path / f"a{double}", 1, target_modules="all-linear")
        summary = merge(tmp_path / f"out{double}", packed, [member], [0.5])
        assert (summary["dequantised"], summary["dtype"]) == (14, "bfloat16")
        plain = merge(
            tmp_path / f"plain{double}", folder, [member], [0.5], quantized_base="nf4-double" if double else "nf4"
        )
        assert plain["requantised"] == 14
        config = json.loads((tmp_path / f"out{double}" / "config.json").read_text())
        assert "quantization_config" not in config
        one, two = (opened(tmp_path / f"{name}{double}").state_dict() for name in ("out", "plain"))
        assert one.keys() == two.keys() == base.state_dict().keys()
        for name, tensor in one.items():
            assert torch.equal(tensor, two[name]), name
        name = "model.layers.1.mlp.up_proj"
        weight = base.state_dict()[f"{name}.weight"]
        rounded = functional.dequantize_4bit(
            *functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=double)
        )
        factors = load_file(member / "adapter_model.safetensors")
        B, A = (factors[f"base_model.model.{name}.lora_{half}.weight"].float() for half in "BA")
        assert torch.equal(one[f"{name}.weight"], (rounded.float() + 0.5 * 2 * (B @ A)).bfloat16())


def test_without_bitsandbytes_the_line_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    base = llama()
    folder, member = save(base, tmp_path / "base"), train(base, tmp_path / "a", 1)
    refused(
        tmp_path,
        r"base: weights in 4 bits need bitsandbytes, which cannot be imported .*pip install bitsandbytes",
        folder,
        member,
        quantized_base="nf4",
    )


def test_the_members_tokenizer_goes_with_it_where_it_is_one_and_fits(tmp_path: Path) -> None:
    """Settings alone do not replace the base's; a new token past the base's 32 rows is refused, the base's own is not."""
    base = llama()
    folder, member = save(base, tmp_path / "base"), train(base, tmp_path / "a", 1)

    def tokenizer(*tokens: int) -> str:
        return json.dumps({"model": {"vocab": {f"t{number}": number for number in tokens}}})

    (folder / "tokenizer.json").write_text(tokenizer(0, 32))
    (folder / "tokenizer_config.json").write_text('{"of": "the base"}')
    (member / "tokenizer_config.json").write_text('{"of": "the member"}')
    (member / "chat_template.jinja").write_text("x")
    merge(tmp_path / "settings", folder, [member], [1.0])
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "settings" / name).read_bytes() == (folder / name).read_bytes()
    assert (tmp_path / "settings" / "chat_template.jinja").exists()
    (member / "tokenizer.json").write_text(tokenizer(0, 31, 32))
    merge(tmp_path / "fits", folder, [member], [1.0])
    assert (tmp_path / "fits" / "tokenizer.json").read_text() == tokenizer(0, 31, 32)
    (member / "tokenizer.json").write_text(tokenizer(0, 40))
    refused(tmp_path, r"a/tokenizer.json: token 't40' has the id 40, but .* has only 32 rows", folder, member)
