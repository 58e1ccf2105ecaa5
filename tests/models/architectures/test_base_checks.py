"""What a base's config.json says that a run can't do: refused when the recipe is read, with the remedy."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from small_recipe import load_checked as load_recipe

from salsa_peft.models.architectures import checks as base_checks
from salsa_peft.utils.errors import SalsaError

LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "vocab_size": 80,
    "max_position_embeddings": 256,
}
BITS_8 = {"quant_method": "bitsandbytes", "load_in_8bit": True}
BITS_4 = {"quant_method": "bitsandbytes", "load_in_4bit": True}
UNNAMED = {"_load_in_8bit": True, "load_in_8bit": True}
"""As bitsandbytes' first models were saved."""
MIXTRAL = {**LLAMA, "model_type": "mixtral", "num_local_experts": 4}


def write(folder: Path, config: dict[str, Any]) -> Path:
    """A recipe on a base that has nothing but its config.json."""
    (folder / "base").mkdir(exist_ok=True)
    (folder / "base" / "config.json").write_text(json.dumps(config))
    rows = [{"prompt": f"q {n}", "chosen": "yes", "rejected": "no"} for n in range(16)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    chats = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}] * 8
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
    content = {
        "name": "t", "model": {"base": "base", "max_length": 64, "chat_template": "chatml"},
        "data": {"demonstrations": "chats.jsonl", "preferences": "pairs.jsonl", "prompts": "pairs.jsonl"},
        "sft": {"batch_size": 2}, "reward": {"batch_size": 2}, "generation": {"max_new_tokens": 8},
        "ppo": {"batch_size": 4, "num_mini_batches": 1}, "policies": {"salsa": {"reference": "soup"}}, "landscape": None,
        "evaluate": {"prompts": {"mine": "pairs.jsonl"}},
    }  # fmt: skip
    (folder / "r.json").write_text(json.dumps(content))
    return folder / "r.json"


def load(folder: Path, config: dict[str, Any], *sets: str, lora: str | None = "lora") -> None:
    load_recipe(str(write(folder, config)), lora=lora, overrides=list(sets))


@pytest.mark.parametrize(
    ("config", "sets", "lora", "line"),
    [
        ({**LLAMA, "quantization_config": UNNAMED}, [], None, r"already quantised \(bitsandbytes, 8 bits\), and quantised weights cannot be trained. Use the model in float weights$"),
        ({**LLAMA, "quantization_config": BITS_4}, [], None, r"\(bitsandbytes, 4 bits\), and quantised weights cannot be trained. Use the model in float weights, or add --lora$"),
        ({**LLAMA, "quantization_config": BITS_8}, [], "lora", r"\(bitsandbytes, 8 bits\), but adapters can only be trained on float weights .* --lora qlora quantises that model to 4 bits"),
        ({**LLAMA, "quantization_config": {"quant_method": "gptq", "bits": 4}}, [], "lora", r"\(gptq\), but adapters can only be trained on float weights or bitsandbytes' 4 bits"),
        ({**LLAMA, "quantization_config": {"quant_method": "awq", "bits": 4}}, [], None, r"\(awq\), and quantised weights cannot be trained"),
        ({**LLAMA, "quantization_config": BITS_4}, [], "qlora", r"but model.quantization nf4-double needs float weights. Use --lora lora"),
        ({**LLAMA, "quantization_config": BITS_4}, ["export=[merged]"], "lora", r"`export: \[merged\]` needs float weights"),
        ({"model_type": "t5", "is_encoder_decoder": True}, [], "lora", "is a t5 model, which is an encoder-decoder model. Use a decoder-only"),
        ({"model_type": "t5"}, [], "lora", "is a t5 model, which is an encoder-decoder model"),
        ({"model_type": "bart", "is_encoder_decoder": True}, [], "lora", "is a bart model, which is an encoder-decoder model"),
        ({"model_type": "roberta"}, [], "lora", "is a roberta model, which fills in masked tokens"),
        ({"model_type": "clip"}, [], "lora", "is a clip model, which the installed Transformers does not support as a language model"),
        ({"model_type": "baichuan", "auto_map": {}}, [], "lora", "code in the model's repository is never run"),
        ({**LLAMA, "model_type": "xlstm"}, [], "lora", r"is a xlstm model, whose logits also depend on a soft cap"),
        ({**LLAMA, "model_type": "dory"}, [], None, r"is a dory model, whose logits also depend on"),
        (LLAMA, ["model.max_length=512"], "lora", r"model.max_length: 512 is too long, because 'base' reads at most 256 tokens. Set model.max_length=256"),
        ({"model_type": "gpt2", "n_positions": 128}, ["model.max_length=129"], None, "reads at most 128 tokens"),
        ({**LLAMA, "rope_scaling": {"type": "linear", "factor": 4.0}}, ["model.max_length=1025"], "lora", "reads at most 1024 tokens"),
        (LLAMA, ["adapter.target_modules=[q_proj,lm_head]"], "lora", "adapter.target_modules: lm_head is the output embeddings"),
        (LLAMA, ["adapter.target_modules=.*(q_proj|lm_head)"], "lora", "adapter.target_modules: lm_head is the output embeddings"),
        (MIXTRAL, ["adapter.lora_dropout=0.1"], "lora", r"adapter.lora_dropout: must be 0, because all-linear adapts the experts .*target_modules=\[q_proj"),
        (MIXTRAL, ["ppo.rollout_backend=vllm"], "lora", "ppo.rollout_backend: vllm cannot load merged experts"),
        ({**MIXTRAL, "router_jitter_noise": 0.01}, [], "lora", "sets router_jitter_noise in its config.json, which adds noise in training mode"),
        ({**LLAMA, "model_type": "falcon", "hidden_dropout": 0.1}, [], None, "sets hidden_dropout in its config.json"),
        ({**LLAMA, "model_type": "rwkv"}, [], None, r"is a rwkv model, whose implementation in Transformers reads the padding .* Use a base of another architecture"),
        ({**LLAMA, "model_type": "recurrent_gemma"}, [], "lora", "is a recurrent_gemma model, whose implementation in Transformers reads the padding"),
        ({**LLAMA, "model_type": "xlstm"}, ["policies={dpo: {algorithm: dpo, reference: soup}}"], "lora", "is a xlstm model, whose implementation"),
        ({**LLAMA, "model_type": "mamba"}, [], "lora", r"LoRA on out_proj has no effect, .* read that module's weight directly. Set adapter.target_modules=\[in_proj\], or train full"),
        ({**LLAMA, "model_type": "mamba2"}, ["adapter.target_modules=[in_proj,out_proj]"], "lora", r"LoRA on out_proj has no effect, .*target_modules=\[in_proj\]"),
        ({**LLAMA, "model_type": "falcon_h1"}, [], "lora", r"Set adapter.target_modules=\[in_proj,q_proj,k_proj,v_proj,o_proj\]"),
        ({**LLAMA, "model_type": "nemotron_h"}, ["adapter.target_modules=.*(in|out)_proj"], "lora", "LoRA on out_proj has no effect"),
        ({**LLAMA, "model_type": "falcon_mamba"}, ["adapter.target_modules=[in_proj,conv1d]"], "lora", "LoRA on conv1d has no effect"),
        ({**LLAMA, "model_type": "granitemoehybrid", "layer_types": ["mamba", "attention"]}, [], "lora", "LoRA on out_proj has no effect"),
        ({**LLAMA, "model_type": "granitemoehybrid", "layer_types": ["linear_attention", "full_attention"]}, [], "lora", "LoRA on out_proj has no effect"),
    ],
)  # fmt: skip
def test_what_is_refused(tmp_path: Path, config: dict[str, Any], sets: list[str], lora: str | None, line: str) -> None:
    """One line, from the configuration alone."""
    with pytest.raises(SalsaError, match=line):
        load(tmp_path, config, *sets, lora=lora)


@pytest.mark.parametrize(
    ("config", "sets", "lora"),
    [
        (LLAMA, ["model.max_length=256"], None),
        ({**LLAMA, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, ["model.max_length=1024"], "lora"),
        ({**LLAMA, "quantization_config": BITS_4}, [], "lora"),
        ({**LLAMA, "model_type": "gemma2", "final_logit_softcapping": 30.0}, [], "lora"),
        ({**LLAMA, "model_type": "cohere", "logit_scale": 0.06}, [], None),
        ({"model_type": "llava", "text_config": {"model_type": "llama"}, "vision_config": {"model_type": "clip_vision_model"}}, [], "lora"),
        ({"model_type": "gpt2", "n_positions": 1024}, [], None),
        (MIXTRAL, ["adapter.lora_dropout=0.1", "adapter.target_modules=[q_proj,v_proj]"], "lora"),
        ({"hidden_size": 8}, [], "lora"),  # says nothing of its kind
        (LLAMA, ["adapter.target_modules=[q_proj,lm_head]", "policies={dpo: {algorithm: dpo, reference: soup}}"], "lora"),
        ({**LLAMA, "model_type": "dory"}, ["policies={dpo: {algorithm: dpo, reference: soup}}"], "lora"),
        ({**LLAMA, "model_type": "mamba"}, [], None),
        ({**LLAMA, "model_type": "falcon_mamba"}, ["adapter.target_modules=[in_proj]"], "lora"),
        ({**LLAMA, "model_type": "mamba2"}, ["adapter.target_modules=.*in_proj"], "lora"),
        ({**LLAMA, "model_type": "granitemoehybrid", "layer_types": ["attention", "full_attention"]}, [], "lora"),
        ({**LLAMA, "model_type": "jamba"}, [], "lora"),
    ],
)  # fmt: skip
def test_what_is_not(tmp_path: Path, config: dict[str, Any], sets: list[str], lora: str | None) -> None:
    load(tmp_path, config, *sets, lora=lora)


def test_transformers_tables_are_what_it_imports() -> None:
    """Read from the source, without torch."""
    from transformers.models.auto import modeling_auto

    for name, table in base_checks.TABLES.items():
        assert base_checks.architectures()[name] == set(vars(modeling_auto)[table]), name


TINY: dict[str, dict[str, Any]] = {
    "rwkv": {"attention_hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 32},
    "recurrent_gemma": {"num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 32, "lru_width": 16},
    "xlstm": {"num_hidden_layers": 2, "num_heads": 2, "chunk_size": 16},
    "mamba": {"num_hidden_layers": 2, "state_size": 4},
    "llama": {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 32},
}  # fmt: skip


@pytest.mark.parametrize("kind", TINY)
def test_which_architectures_read_padding_as_text(kind: str) -> None:
    """A padded prompt's logits against those of the prompt alone: where they differ, and only there, the base is refused."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, hidden_size=16, vocab_size=32, use_cache=False, **TINY[kind])
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2)
    prompt = torch.tensor([[5, 9, 4, 21, 7]])
    padded, mask = (
        torch.cat([torch.full((1, 6), filler), rest], 1) for filler, rest in ((3, prompt), (0, torch.ones_like(prompt)))
    )
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    options = {} if kind in ("rwkv", "xlstm") else {"position_ids": positions}  # which take none
    with torch.no_grad():
        alone = model(input_ids=prompt).logits
        found = model(input_ids=padded, attention_mask=mask, **options).logits[:, 6:]
    assert ((found - alone).abs().max() > 1e-3 * alone.abs().max()) == (kind in base_checks.UNMASKED)


def test_the_command_says_it_in_a_line_and_without_torch(tmp_path: Path) -> None:
    """Code 2; --dry-run is what is run before a queue's turn."""
    path = write(tmp_path, {**LLAMA, "quantization_config": BITS_8})
    code = (
        "import sys; from salsa_peft.recipe.__main__ import main; code = main(sys.argv[1:]);"
        " assert not {'torch', 'transformers', 'peft'} & set(sys.modules); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path), "--dry-run"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert (
        done.stderr.startswith("r.json: line 1: model.base: 'base' is already quantised")
        and done.stderr.count("\n") == 1
    )


@pytest.mark.parametrize(
    ("sets", "line"),
    [
        (
            ["model.base=runs/seed-9"],
            r"model.base: there is no folder '.*/runs/seed-9'; give the folder or Hub id of a model",
        ),
        (
            ["sft.from=[runs/seed-9,null]"],
            r"sft.from\[0\]: there is no folder '.*/runs/seed-9'; give the folder or Hub id of a LoRA adapter",
        ),
        (
            ["policies.salsa.reference=runs/seed-9"],
            r"policies.salsa.reference: there is no folder '.*/runs/seed-9'; give the folder or Hub id of a LoRA adapter",
        ),
        (
            ["reward.model=runs/seed-9"],
            r"reward.model: there is no folder '.*/runs/seed-9'; give the folder or Hub id of a sequence classifier",
        ),
        (
            ["evaluate.models=[runs/seed-9]"],
            r"evaluate.models\[0\]: there is no folder '.*/runs/seed-9'; give the folder or Hub id of a LoRA adapter",
        ),
        (["model.base=a\\\\b"], "model.base: there is no folder .*; give the folder or Hub id of a model"),
        (["model.base=a/b/c"], "model.base: there is no folder '.*/a/b/c'; give the folder or Hub id of a model"),
    ],
)
def test_a_mistyped_folder_is_no_hub_id(
    tmp_path: Path, sets: list[str], line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(SalsaError, match=line):
        load(tmp_path, LLAMA, *sets)
    load(tmp_path, LLAMA, "sft.from=[someone/seed,null]", "policies.salsa.reference=someone/soup")  # may be on the Hub


@pytest.mark.parametrize(
    ("files", "line"),
    [
        ({"adapter_config.json": '{"base_model_name_or_path": "some/base"}', "adapter_model.safetensors": "", "config.json": "{}"},
         r"is an adapter, not a model. Set model.base to some/base, the model that .* `salsa soup MERGED theirs --merge --base some/base`$"),
        ({"adapter_config.json": "{}", "adapter_model.bin": ""}, "Set model.base to the model that it was trained on"),
        ({"model-q4.gguf": ""}, "model.base: '.*theirs' has its weights only in model-q4.gguf, a file of llama.cpp"),
        ({"config.json": "{}", "pytorch_model.bin": "", "training_args.bin": ""}, "only in pytorch_model.bin, a pickle, which is never loaded. Load the model"),
        ({"params.json": "{}", "consolidated.00.pth": ""}, "only in consolidated.00.pth, a pickle, which is never loaded. Convert the model"),
    ],
)  # fmt: skip
def test_a_base_that_is_no_model_in_safetensors(
    tmp_path: Path, files: dict[str, str], line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    for name, content in files.items():
        (theirs / name).write_text(content)
    with pytest.raises(SalsaError, match=line):
        load(tmp_path, LLAMA, "model.base=theirs")
    (theirs / "model.safetensors").write_text("")
    (theirs / "config.json").write_text(json.dumps(LLAMA))
    load(tmp_path, LLAMA, "model.base=theirs")
