"""Whole small runs on real model families: each is done with the right numbers, or refused by --dry-run; none fails after training began."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import family_runs
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    CohereConfig,
    LlamaConfig,
    LlavaConfig,
    MixtralConfig,
    PreTrainedTokenizerFast,
)

from salsa_peft.models.adapters import lora as adapters
from salsa_peft.models.base import classifier_class, language_model_only

REFUSED = {"llama-3.1-8b-instruct-int8": "is already quantised"}
"""Families that can't be trained on, and what is said of them."""
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
         "max_position_embeddings": 256, "initializer_range": 0.3}  # fmt: skip
TOWER = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


SPECIAL = ("<|pad|>", "<|im_start|>", "<|im_end|>")


def check(found: family_runs.Outcome) -> None:
    """Done, and the numbers are those of plain forwards and sums."""
    print(found.cell)
    assert found.state == "done", found.reason
    assert found.size > 1e-4, "seed and soup must differ, or nothing is compared"
    assert found.kl <= 1e-5 and found.soup <= 1e-5 and found.score <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("mode", family_runs.MODES)
@pytest.mark.parametrize("name", family_runs.families())
def test_a_family_of_the_hub(shared: Path, name: str, mode: str, tmp_path: Path) -> None:
    """Its real configuration, tokenizer and tensor names, with small random weights."""
    found = family_runs.run_family(name, mode, tmp_path)
    if name in REFUSED:
        assert found.state == "refused" and REFUSED[name] in found.reason
    else:
        check(found)


@pytest.mark.slow
@pytest.mark.parametrize("mode", family_runs.MODES)
@pytest.mark.parametrize("name", sorted(family_runs.PAPER))
def test_the_papers_recipes(shared: Path, name: str, mode: str, tmp_path: Path) -> None:
    """Cut by --set, on the families that the paper trains."""
    check(family_runs.run_paper(name, mode, tmp_path))


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A token for every byte, chatml's two and one to pad."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *alphabet])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.add_special_tokens(list(SPECIAL))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token=SPECIAL[0], bos_token=SPECIAL[1], eos_token=SPECIAL[2]
    )


def cohere(**ids: int) -> Any:
    """Its logits are scaled, and Transformers has no sequence classifier of it."""
    return AutoModelForCausalLM.from_config(CohereConfig(**SIZES, **ids, logit_scale=0.3))


def mixtral(**ids: int) -> Any:
    """Experts are parameters: all-linear takes them along."""
    return AutoModelForCausalLM.from_config(MixtralConfig(**SIZES, **ids, num_local_experts=4))


def llava(**ids: int) -> Any:
    """A tower for images beside a language model."""
    text = LlamaConfig(**SIZES, **ids).to_dict()
    config = LlavaConfig(text_config=text, vision_config=CLIPVisionConfig(**TOWER).to_dict(), image_token_index=5)
    return AutoModelForImageTextToText.from_config(config)


@pytest.mark.parametrize(("make", "mode"), [(cohere, "full"), (mixtral, "lora"), (llava, "lora")])
def test_a_made_up_model_of_each_mechanism(make: Callable[..., Any], mode: str, tmp_path: Path) -> None:
    """Scaled logits, a head that Transformers lacks, experts, towers: from the seeds to the evaluation."""
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    make(vocab_size=len(tokenizer), **ids).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    recipe = family_runs.write_recipe(tmp_path, tmp_path / "base", "chatml")
    found = family_runs.run([str(recipe)], tmp_path / "base", tmp_path / "run", mode)
    check(found)
    if make is llava:
        adapter = json.loads((family_runs.unit(tmp_path / "run", "soup") / "adapter_config.json").read_text())
        assert not any("vision" in name for name in map(str, adapter["target_modules"]))


@pytest.mark.parametrize("kind", ["mamba", "mamba2", "falcon_mamba", "cohere"])
def test_a_score_head_on_a_family_that_transformers_has_none_for(kind: str, tmp_path: Path) -> None:
    """All of the base's weights under their names, and the head's product of the last token's states."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 40, "pad_token_id": 0}
    special: dict[str, Any] = {
        "mamba2": {"num_heads": 4, "head_dim": 8, "n_groups": 1, "state_size": 4},
        "cohere": {"num_attention_heads": 2, "intermediate_size": 32},
    }
    config = AutoConfig.for_model(kind, **sizes, **special.get(kind, {"state_size": 4}))
    lm = AutoModelForCausalLM.from_config(config).eval()
    for parameter in lm.parameters():
        parameter.data.normal_(0, 0.2)
    lm.save_pretrained(tmp_path)
    model, told = classifier_class(config).from_pretrained(tmp_path, num_labels=1, output_loading_info=True)
    assert told["missing_keys"] == {"score.weight"}
    assert set(model.eval().state_dict()) - {"score.weight"} <= set(lm.state_dict())
    ids = torch.tensor([[5, 9, 12, 7], [8, 3, 30, 2]])
    with torch.no_grad():
        states = lm(input_ids=ids, output_hidden_states=True).hidden_states[-1][:, -1]
        torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, states @ model.score.weight.T)


def test_an_adapter_in_a_multimodal_models_older_layout(tmp_path: Path) -> None:
    """PEFT loads both layouts alike, and so does a base that roles share; LoRA stays in the language model."""
    torch.manual_seed(0)
    llava(vocab_size=80, pad_token_id=0, bos_token_id=1, eos_token_id=2).save_pretrained(tmp_path / "base")

    def base() -> Any:
        return AutoModelForImageTextToText.from_pretrained(tmp_path / "base", dtype=torch.float32).eval()

    options = language_model_only(base())
    config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False, **options)
    made = get_peft_model(base(), config)
    made.save_pretrained(tmp_path / "new")
    shutil.copytree(tmp_path / "new", tmp_path / "old")
    tensors = load_file(tmp_path / "new" / "adapter_model.safetensors")
    assert all("language_model" in name for name in tensors)
    now, then = "base_model.model.model.language_model.", "base_model.model.language_model.model."
    older = {name.replace(now, then): tensor for name, tensor in tensors.items()}
    save_file(older, tmp_path / "old" / "adapter_model.safetensors", metadata={"format": "pt"})
    ids = torch.tensor([[1, 9, 12, 7]])
    model: Any = base()
    for name in ("new", "old"):
        model = adapters.attach(model, tmp_path / name, name)
        with adapters.active(model, name), torch.no_grad():
            torch.testing.assert_close(model(input_ids=ids).logits, made(input_ids=ids).logits)
    with adapters.active(model, None), torch.no_grad():
        assert (model(input_ids=ids).logits - made(input_ids=ids).logits).abs().max() > 1e-3
