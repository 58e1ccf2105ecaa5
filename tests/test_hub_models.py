"""Whole small runs on real model families: each is done with the right numbers, or refused by --dry-run; none fails after training began."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hub_runs
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    CohereConfig,
    LlamaConfig,
    LlavaConfig,
    MixtralConfig,
    PreTrainedTokenizerFast,
)

REFUSED = {"llama-3.1-8b-instruct-int8": "is quantised already"}
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


def check(found: hub_runs.Outcome) -> None:
    """Done, and the numbers are those of plain forwards and sums."""
    print(found.cell)
    assert found.state == "done", found.reason
    assert found.size > 1e-4, "seed and soup must differ, or nothing is compared"
    assert found.kl <= 1e-5 and found.soup <= 1e-5 and found.score <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("mode", hub_runs.MODES)
@pytest.mark.parametrize("name", hub_runs.families())
def test_a_family_of_the_hub(shared: Path, name: str, mode: str, tmp_path: Path) -> None:
    """Its real configuration, tokenizer and tensor names, with small random weights."""
    found = hub_runs.run_family(name, mode, tmp_path)
    if name in REFUSED:
        assert found.state == "refused" and REFUSED[name] in found.reason
    else:
        check(found)


@pytest.mark.slow
@pytest.mark.parametrize("mode", hub_runs.MODES)
@pytest.mark.parametrize("name", sorted(hub_runs.PAPER))
def test_the_papers_recipes(shared: Path, name: str, mode: str, tmp_path: Path) -> None:
    """Cut by --set, on the families that the paper trains."""
    check(hub_runs.run_paper(name, mode, tmp_path))


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
    recipe = hub_runs.write_recipe(tmp_path, tmp_path / "base", "chatml")
    found = hub_runs.run([str(recipe)], tmp_path / "base", tmp_path / "run", mode)
    check(found)
    if make is llava:
        adapter = json.loads((hub_runs.unit(tmp_path / "run", "soup") / "adapter_config.json").read_text())
        assert not any("vision" in name for name in map(str, adapter["target_modules"]))
