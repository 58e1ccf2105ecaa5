"""The names that Transformers gives a checkpoint's tensors, and soups of members whose files name them in different ways.

What is expected is always the float64 mean of the state dicts that Transformers loads, never a name of ours.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from salsa_peft.soup.checkpoints.average import average, grams
from salsa_peft.soup.checkpoints.configs import check_alike
from salsa_peft.soup.checkpoints.read import CONFIG, INDEX, SINGLE, read_checkpoint
from salsa_peft.soup.live import LiveCheckpoints
from salsa_peft.utils import tensor_names
from salsa_peft.utils.errors import SalsaError
from salsa_peft.utils.fingerprints import base_fingerprint, base_fingerprints

Tensors = dict[str, torch.Tensor]
SIZES: dict[str, Any] = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
                         "num_key_value_heads": 1, "max_position_embeddings": 64, "pad_token_id": 0}  # fmt: skip
VISION = {"model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
          "image_size": 28, "patch_size": 14}  # fmt: skip


def build(kind: str, seed: int, **changes: Any) -> Any:
    """A tiny model with random weights."""
    made: dict[str, Callable[[], Any]] = {
        "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES | changes)),
        "classifier": lambda: transformers.LlamaForSequenceClassification(
            transformers.LlamaConfig(**SIZES | {"num_labels": 1} | changes)
        ),
        "gpt2": lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=8, **changes)
        ),
        "mixtral": lambda: transformers.MixtralForCausalLM(
            transformers.MixtralConfig(**SIZES | {"num_local_experts": 3} | changes)
        ),
        "llava": lambda: transformers.LlavaForConditionalGeneration(
            transformers.LlavaConfig(
                text_config=SIZES | {"model_type": "llama"}, vision_config=VISION, image_token_id=39
            )
        ),
    }
    model = made[kind]()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def save(folder: Path, kind: str, seed: int, change: Callable[[Tensors], Tensors] | None = None, **more: Any) -> Path:
    """What Transformers saves, its tensors changed afterwards."""
    build(kind, seed, **more).save_pretrained(folder)
    if change is not None:
        tensors = change(load_file(folder / SINGLE))
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()}, folder / SINGLE, metadata={"format": "pt"}
        )
    return folder


def as_in_memory(kind: str, seed: int) -> Callable[[Tensors], Tensors]:
    """The model's own state dict: experts in one tensor, the newest names."""
    return lambda _: {name: tensor.clone() for name, tensor in build(kind, seed).state_dict().items()}


def with_frequencies(tensors: Tensors) -> Tensors:
    return tensors | {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.arange(4.0) for i in (0, 1)}


def as_on_the_hub(tensors: Tensors) -> Tensors:
    """GPT-2's names and masks."""
    masks = {f"h.{i}.attn.bias": torch.tril(torch.ones(1, 1, 8, 8)).byte() for i in (0, 1)}
    return {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()} | masks


def prefixed(prefix: str, before: str = "") -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name.replace(before, prefix + before, 1): tensor for name, tensor in tensors.items()}


PAIRS: dict[str, tuple[str, Any, Any]] = {
    "rotary frequencies": ("llama", with_frequencies, None),
    "torch.compile": ("llama", prefixed("_orig_mod."), None),
    "torch.compile in both": ("llama", prefixed("_orig_mod."), prefixed("_orig_mod.")),
    "DistributedDataParallel": ("llama", prefixed("module."), None),
    "checkpointed layers under FSDP": (
        "llama", prefixed("_fsdp_wrapped_module._checkpoint_wrapped_module.", "self_attn."), prefixed("_fsdp_wrapped_module.")
    ),
    "doubled base prefix": ("llama", prefixed("model."), None),
    "no base prefix": ("llama", lambda t: {name.removeprefix("model."): tensor for name, tensor in t.items()}, None),
    "a classifier's buffers": ("classifier", with_frequencies, None),
    "GPT-2 of the Hub": ("gpt2", as_on_the_hub, None),
    "tied head written": ("gpt2", lambda t: t | {"lm_head.weight": t["transformer.wte.weight"].clone()}, None),
    "experts apart and in one": ("mixtral", None, as_in_memory("mixtral", 2)),
    "multimodal layouts": ("llava", None, as_in_memory("llava", 2)),
}  # fmt: skip


def load(folder: Path) -> Tensors:
    """By plain Transformers; nothing may be missing or left over."""
    kind = json.loads((folder / CONFIG).read_text())["architectures"][0]
    model, info = (
        vars(transformers).get(kind, transformers.__getattr__(kind)).from_pretrained(folder, output_loading_info=True)
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    return dict(model.state_dict())


@pytest.mark.parametrize("name", PAIRS)
def test_the_mean_of_members_that_name_their_tensors_differently(tmp_path: Path, name: str) -> None:
    """In both orders; and distances are those of the loaded models."""
    kind, first, second = PAIRS[name]
    save(tmp_path / "a", kind, 1, first), save(tmp_path / "b", kind, 2, second)
    plain = {1: build(kind, 1).state_dict(), 2: build(kind, 2).state_dict()}
    for out, weights in (("ab", {1: 0.3, 2: 0.7}), ("ba", {2: 0.6, 1: 0.4})):
        summary = average(tmp_path / out, [tmp_path / folder for folder in out], list(weights.values()))
        for tensor_name, tensor in load(tmp_path / out).items():
            mean = sum(plain[seed][tensor_name].double() * weight for seed, weight in weights.items())
            assert float((tensor - mean).abs().max()) <= 1e-7, tensor_name
        names = [key for key in plain[1] if kind != "gpt2" or key != "lm_head.weight"]
        squared = sum(float((plain[1][key] - plain[2][key]).double().square().sum()) for key in names)
        if name != "tied head written" or out == "ba":  # there the embeddings count twice, as they are written twice
            assert summary["pairs"][0]["distance"] == pytest.approx(squared**0.5, rel=1e-5)
    if name != "tied head written":
        (found,) = grams([tmp_path / "b"], tmp_path / "a").values()
        assert float(found[0, 0]) == pytest.approx(squared, rel=1e-5)


def test_wrappers_and_untied_heads_are_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    a, b = save(tmp_path / "a", "llama", 1, prefixed("_orig_mod.")), save(tmp_path / "b", "llama", 2)
    average(tmp_path / "out", [a, b], [0.5, 0.5])
    tied, untied = save(tmp_path / "tied", "llama", 1, tie_word_embeddings=True), save(tmp_path / "untied", "llama", 2)
    average(tmp_path / "heads", [tied, untied], [0.5, 0.5])
    found = [message for message in caplog.messages if str(tmp_path) in message]
    assert found == [
        f"{a}: prefixes of wrappers are removed, as from _orig_mod.lm_head.weight",
        f"{untied} has separate output embeddings, so the soup has them too",
    ]
    embeddings = [load(folder)["model.embed_tokens.weight"] for folder in (tied, untied)]
    loaded = load(tmp_path / "heads")
    torch.testing.assert_close(loaded["model.embed_tokens.weight"], (embeddings[0] + embeddings[1]) / 2)
    torch.testing.assert_close(loaded["lm_head.weight"], (embeddings[0] + load(untied)["lm_head.weight"]) / 2)


def test_what_has_no_place_in_the_model_is_refused_by_name(tmp_path: Path) -> None:
    """A value head, a head that another class has, two names of one tensor, a tensor of another shape."""
    a = save(tmp_path / "a", "llama", 1)
    refused = {
        r"/0/model.safetensors: v_head.weight has no place in LlamaForCausalLM": lambda t: t | {"v_head.weight": torch.ones(1)},
        r"/1: its model \(LlamaForCausalLM\) has no lm_head.weight, which is in .*/a/model.safetensors": lambda t: {
            name: tensor for name, tensor in t.items() if name != "lm_head.weight"
        },
        r"/2: model.norm.weight and _orig_mod.model.norm.weight are both loaded as model.norm.weight|/2: _orig_mod.model.norm.weight and": (
            lambda t: t | {"_orig_mod.model.norm.weight": t["model.norm.weight"].clone()}
        ),
        r"/3: model.norm.weight has shape \[15\], but model.norm.weight in the model has \[16\]": lambda t: t
        | {"model.norm.weight": t["model.norm.weight"][:15].clone()},
    }  # fmt: skip
    for number, (line, change) in enumerate(refused.items()):
        other = save(tmp_path / str(number), "llama", 2, change)
        for members in ([a, other], [other, a]):
            with pytest.raises(SalsaError, match=line) as caught:
                average(tmp_path / "out", members, [0.5, 0.5])
            assert "\n" not in str(caught.value)
    classifier = save(tmp_path / "classifier", "classifier", 1)
    with pytest.raises(SalsaError, match=r"lm_head.weight, which is in .* \(LlamaForCausalLM\)"):
        average(tmp_path / "out", [a, classifier], [0.5, 0.5])
    two = save(tmp_path / "two", "classifier", 1, num_labels=2)
    with pytest.raises(SalsaError, match=r"two: score.weight has shape \[2, 16\], but \[1, 16\] in .*classifier"):
        average(tmp_path / "out", [classifier, two], [0.5, 0.5])
    headless = [
        save(
            tmp_path / f"headless-{i}", "llama", i, lambda t: {name: t[name] for name in t if name != "lm_head.weight"}
        )
        for i in (1, 2)
    ]
    with pytest.raises(
        SalsaError, match=r"no member has lm_head.weight, so LlamaForCausalLM would initialise it at random"
    ):
        average(tmp_path / "out", headless, [0.5, 0.5])
    unknown = save(tmp_path / "unknown", "llama", 1, prefixed("_orig_mod."))
    edit(unknown, model_type="of-tomorrow")
    with pytest.raises(
        SalsaError, match=r"unknown/config.json: transformers .* does not support model_type 'of-tomorrow'"
    ):
        average(tmp_path / "out", [unknown, unknown], [0.5, 0.5])
    edit(unknown, model_type="llama", rms_norm_eps="none")
    with pytest.raises(
        SalsaError, match=r"unknown/config.json: Transformers cannot read this configuration: .*rms_norm_eps"
    ):
        average(tmp_path / "out", [unknown, unknown], [0.5, 0.5])


def edit(folder: Path, drop: tuple[str, ...] = (), **changes: Any) -> None:
    config = json.loads((folder / CONFIG).read_text()) | changes
    (folder / CONFIG).write_text(json.dumps({key: value for key, value in config.items() if key not in drop}))


def config_of(cls: str, **fields: Any) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(transformers.__getattr__(cls)(**SIZES | fields).to_json_string(use_diff=False))
    return content


LLAMA, ROPE = config_of("LlamaConfig"), {"rope_theta": 10000.0, "rope_type": "default"}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 10000.0}
OLD = {key: value for key, value in LLAMA.items() if key not in ("rope_parameters", "head_dim", "dtype", "mlp_bias")}
SAME: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "fields of version 4": (OLD | {"rope_theta": 10000.0, "rope_scaling": None, "torch_dtype": "float16"}, LLAMA),
    "notes of others": (LLAMA | {"unsloth_version": "2026.1", "badwordsids": [1]}, LLAMA),
    "what generation and training read": (LLAMA | {"eos_token_id": [1, 7], "use_cache": False, "attention_dropout": 0.1}, LLAMA),
    "float32 noise": (LLAMA | {"rms_norm_eps": 9.999999974752427e-07}, LLAMA),
    "an older spelling": (OLD | {"rope_scaling": {"type": "linear", "factor": 4.0}},
                          LLAMA | {"rope_parameters": {"rope_type": "linear", "factor": 4, "rope_theta": 10000.0}}),
    "defaults said or not": (LLAMA | {"rope_parameters": YARN}, LLAMA | {"rope_parameters": YARN | {"beta_fast": 32, "beta_slow": 1}}),
    "positions of ordinary rotary embeddings": (LLAMA | {"max_position_embeddings": 128}, LLAMA),
    "Gemma's gelu": (config_of("GemmaConfig", hidden_act="gelu") | {"hidden_act": "gelu"}, config_of("GemmaConfig")),
    "gelu by two names": (config_of("LlamaConfig", hidden_act="gelu_new"), config_of("LlamaConfig", hidden_act="gelu_pytorch_tanh")),
    "a window that is not used": (config_of("Qwen2Config") | {"sliding_window": 32768, "use_sliding_window": False}, config_of("Qwen2Config")),
    "Qwen2-VL's mrope": (
        config_of("Qwen2VLConfig", rope_scaling={"type": "mrope", "mrope_section": [1, 1, 2]}),
        config_of("Qwen2VLConfig", rope_parameters={"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1000000.0}),
    ),
}  # fmt: skip
DIFFERENT: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "theta": ("rope_parameters", LLAMA, LLAMA | {"rope_parameters": ROPE | {"rope_theta": 500000.0}}),
    "theta of version 4": ("rope_parameters", OLD | {"rope_theta": 500000.0}, LLAMA),
    "scaling": ("rope_parameters", OLD | {"rope_scaling": {"type": "linear", "factor": 4.0}}, LLAMA),
    "yarn's factor": ("rope_parameters", LLAMA | {"rope_parameters": YARN}, LLAMA | {"rope_parameters": YARN | {"factor": 8.0}}),
    "positions of dynamic embeddings": (
        "rope_parameters", *({**LLAMA, "max_position_embeddings": n, "rope_parameters": ROPE | {"rope_type": "dynamic", "factor": 2.0}} for n in (64, 128))
    ),
    "activation": ("hidden_act", LLAMA, LLAMA | {"hidden_act": "gelu"}),
    "gelu and its approximation": ("hidden_act", LLAMA | {"hidden_act": "gelu"}, LLAMA | {"hidden_act": "gelu_new"}),
    "norm": ("rms_norm_eps", LLAMA, LLAMA | {"rms_norm_eps": 1e-5}),
    "window": ("sliding_window", config_of("MistralConfig"), config_of("MistralConfig", sliding_window=None)),
    "heads": ("num_attention_heads", LLAMA, {**OLD, "num_attention_heads": 4}),
    "soft cap": ("final_logit_softcapping", config_of("Gemma2Config"), config_of("Gemma2Config", final_logit_softcapping=None)),
    "a part": ("text_config.rms_norm_eps", *(json.loads(transformers.LlavaConfig(
        text_config=SIZES | {"model_type": "llama", "rms_norm_eps": eps}, vision_config=VISION).to_json_string()) for eps in (1e-5, 1e-6))),
}  # fmt: skip


@pytest.mark.parametrize("name", SAME)
def test_configurations_in_other_words_are_the_same(name: str) -> None:
    one, two = SAME[name]
    for head, other in ((one, two), (two, one)):
        check_alike(head, other, Path("a"), Path("b"))


@pytest.mark.parametrize("name", DIFFERENT)
def test_configurations_of_another_function_are_refused_by_field(name: str) -> None:
    field, one, two = DIFFERENT[name]
    for head, other in ((one, two), (two, one)):
        with pytest.raises(SalsaError, match=rf"^b: {field} is .*, but .* in a: "):
            check_alike(head, other, Path("a"), Path("b"))


def test_a_live_model_moves_between_files_of_other_names(tmp_path: Path) -> None:
    """What references, landscapes and learned soups of full weights stand on: base as on the Hub, seeds as Transformers saves them."""
    for kind, first, second in (("gpt2", as_on_the_hub, None), ("mixtral", None, as_in_memory("mixtral", 2))):
        folders = [save(tmp_path / kind / "a", kind, 1, first), save(tmp_path / kind / "b", kind, 2, second)]
        model = build(kind, 3)
        LiveCheckpoints(model, [read_checkpoint(folder) for folder in folders]).set([0.25, 0.75])
        one, two = build(kind, 1).state_dict(), build(kind, 2).state_dict()
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(tensor, 0.25 * one[name] + 0.75 * two[name])


def test_a_bases_fingerprint_is_that_of_its_parameters(tmp_path: Path) -> None:
    """The same with what is no parameter, under other prefixes and in shards; the one of plain files is that of earlier versions."""
    plain = save(tmp_path / "plain", "llama", 1)
    found = base_fingerprint(plain)
    assert base_fingerprints(plain) == [found]
    for name, change in {"frequencies": with_frequencies, "compiled": prefixed("_orig_mod.")}.items():
        folder = save(tmp_path / name, "llama", 1, change)
        assert base_fingerprint(folder) == found
        assert len(base_fingerprints(folder)) == 2  # an adapter that an earlier version signed is known too
    build("llama", 1).save_pretrained(tmp_path / "shards", max_shard_size="5KB")
    assert base_fingerprint(tmp_path / "shards") == found
    assert base_fingerprint(save(tmp_path / "other", "llama", 2)) != found
    gpt2 = save(tmp_path / "gpt2", "gpt2", 1)
    for name, change in {"hub": as_on_the_hub, "head": PAIRS["tied head written"][1]}.items():
        assert base_fingerprint(save(tmp_path / name, "gpt2", 1, change)) == base_fingerprint(gpt2)
    untied = save(tmp_path / "untied", "gpt2", 1, lambda t: t | {"lm_head.weight": t["transformer.wte.weight"] + 1})
    assert base_fingerprint(untied) != base_fingerprint(gpt2)


def test_shards_without_an_index_get_one_and_a_wrong_size_is_counted_anew(tmp_path: Path) -> None:
    a, b = save(tmp_path / "a", "llama", 1), tmp_path / "b"
    build("llama", 2).save_pretrained(b, max_shard_size="5KB")
    index = json.loads((b / INDEX).read_text())
    size = sum(tensor.nbytes for tensor in load_file(a / SINGLE).values())
    (b / INDEX).write_text(json.dumps(index | {"metadata": {"total_size": 1, "note": "kept"}}))
    average(tmp_path / "counted", [b, a], [0.5, 0.5])
    written = json.loads((tmp_path / "counted" / INDEX).read_text())
    assert written == index | {"metadata": {"total_size": size, "note": "kept"}}
    (b / INDEX).unlink()
    average(tmp_path / "indexed", [b, a], [0.5, 0.5])
    assert json.loads((tmp_path / "indexed" / INDEX).read_text())["weight_map"] == index["weight_map"]
    assert load(tmp_path / "indexed").keys() == load(a).keys()
    (last := sorted(b.glob("*.safetensors"))[-1]).unlink()
    with pytest.raises(SalsaError, match=rf"/b: {last.name}, one of \d+ weight files, is missing; copy it again"):
        average(tmp_path / "out", [a, b], [0.5, 0.5])
    (a / SINGLE).rename(a / "consolidated.safetensors")
    with pytest.raises(
        SalsaError,
        match=r"/a: this folder has neither .*; it holds consolidated.safetensors, which Transformers does not read",
    ):
        average(tmp_path / "out", [a, a], [0.5, 0.5])


def test_unwrapped() -> None:
    for name, plain in {
        "model.norm.weight": "model.norm.weight",
        "_orig_mod.model.norm.weight": "model.norm.weight",
        "module.module.model.layers.0._checkpoint_wrapped_module.mlp.weight": "model.layers.0.mlp.weight",
        "_fsdp_wrapped_module.model._orig_mod._fsdp_wrapped_module.norm.weight": "model.norm.weight",
        "base_model.model._orig_mod.model.q_proj.lora_A.weight": "base_model.model.model.q_proj.lora_A.weight",
        "model.some_module.module.weight": "model.some_module.module.weight",
    }.items():
        assert tensor_names.without_wrappers(name) == plain
