"""What a base's config.json says that a run can't do: told when the recipe is read, before any weights load. Imports no torch.

A base that is not at hand (a Hub id that nobody fetched) is looked at when its config.json is there, at the first stage's start.
Transformers' own tables say which architectures it has; they are read from its source, since importing them takes torch.
"""

from __future__ import annotations

import functools
import importlib.util
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from salsa_peft.config.schema import Recipe
from salsa_peft.models.architectures.sizes import config_of_base
from salsa_peft.utils.errors import require
from salsa_peft.utils.messages import short

TABLES = {
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "masked": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "translating": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "multimodal": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
}
HEADS = {
    "dory": "a learned scale for each token",
    "inkling_text": "a vocabulary that is cut after the head",
    "minicpm3": "a scale that its config.json does not name",
    "modernbert-decoder": "a layer between trunk and head",
    "xlstm": "a soft cap in evaluation mode alone",
}
"""Architectures whose logits do not follow from their output embeddings, and what there is besides (check_head in models/logprobs.py)."""
UNMASKED = {
    "cpmant": "it takes no attention mask",
    "deepseek_v4": "it compresses its keys in blocks that are counted from the first token",
    "recurrent_gemma": "its recurrence takes no attention mask",
    "rwkv": "its recurrence takes no attention mask",
    "trocr": "it counts positions from the first token",
    "xlstm": "its recurrence takes no attention mask",
}
"""Architectures that read padding in front of a prompt as if it were text, and why (in Transformers 5.24: a test tries those that it can)."""
MAMBA = {
    **dict.fromkeys(("mamba", "falcon_mamba", "mamba2"), "in_proj"),
    **dict.fromkeys(
        ("bamba", "falcon_h1", "granitemoehybrid", "nemotron_h", "zamba2"), "in_proj,q_proj,k_proj,v_proj,o_proj"
    ),
}
"""Architectures whose fused kernel is given `out_proj`'s weight, past a LoRA on it (PEFT refuses some of them) → what LoRA can be on."""
PAST_LORA = ("out_proj", "conv1d", "dt_proj", "x_proj")
"""Modules of Mamba's layers whose weights are read without calling the module."""
POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len")
"""What configurations call the length that a model reads."""
OUTPUT = ("lm_head", "embed_out", "output_layer", "output_projection")
"""What architectures call their output embeddings."""
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
"""What configurations call the number of experts."""
ATTENTION = "adapter.target_modules=[q_proj,k_proj,v_proj,o_proj]"


def check(recipe: Recipe) -> None:
    """By the base's config.json, where it is at hand. Raises SalsaError."""
    if recipe.model.base is None:
        return
    config = config_of_base(recipe.model.base, recipe.model.revision)
    if config is not None and isinstance(config.get("model_type"), str):
        check_config(recipe, config)


def check_config(recipe: Recipe, config: Mapping[str, Any]) -> None:
    """By a config.json's content. Raises SalsaError for a base that would be refused, or would fail, after a stage has run."""
    _check_architecture(recipe, config)
    _check_quantisation(recipe, config)
    text = text_part(config)
    if needs_logprobs(recipe):
        _check_head(recipe, text)
        _check_noise(recipe, text)
    _check_padding(recipe, text)
    _check_mamba(recipe, text)
    _check_length(recipe, text)
    _check_experts(recipe, text)


def needs_logprobs(recipe: Recipe) -> bool:
    """Whether log-probs are computed from the output embeddings: by PPO, and by a soup whose weights are measured."""
    return recipe.soup.uses_measure or any(policy.algorithm == "ppo" for policy in recipe.policies.values())


def text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Of a multimodal model the language model's configuration."""
    found = next((config[key] for key in ("text_config", "llm_config") if isinstance(config.get(key), dict)), config)
    return {"model_type": config.get("model_type"), **found}


def is_multimodal(config: Mapping[str, Any]) -> bool:
    """Whether there are more parts than a language model."""
    return isinstance(config.get("text_config"), dict) and isinstance(config.get("vision_config"), dict)


@functools.cache
def architectures() -> dict[str, frozenset[str]]:
    """Each of TABLES → the model types in it, as the Transformers that is installed has them; empty where its source is laid out
    otherwise."""
    found = importlib.util.find_spec("transformers")
    origin = None if found is None else found.origin
    file = Path(str(origin)).parent / "models" / "auto" / "modeling_auto.py"
    source = file.read_text(encoding="utf-8") if file.is_file() else ""
    parts = {
        name: re.search(rf"^{table} = OrderedDict\((.*?)^\)", source, re.M | re.S) for name, table in TABLES.items()
    }
    return {
        name: frozenset(re.findall(r'\(\s*"([^"]+)",\s*[("]', part[1])) if part else frozenset()
        for name, part in parts.items()
    }


def _name(recipe: Recipe) -> str:
    return short(Path(str(recipe.model.base)).name)


def _check_architecture(recipe: Recipe, config: Mapping[str, Any]) -> None:
    kind, known, name = config.get("model_type"), architectures(), _name(recipe)
    wanted = "Use a decoder-only language model such as Llama, Mistral, Gemma or Qwen"
    require(
        not config.get("is_encoder_decoder") and kind not in known["translating"] - known["multimodal"],
        f"model.base: {name} is a {kind} model, which turns one sequence into another. {wanted}",
    )
    require(
        kind not in known["causal"] & known["masked"],
        f"model.base: {name} is a {kind} model, which fills in masked tokens and does not write from left to right. {wanted}",
    )
    there = known["causal"] | known["multimodal"]
    theirs = ", and the code in its repository is not run" if "auto_map" in config else ""
    require(
        not there or kind in there,
        f"model.base: {name} is a {kind} model, which the installed Transformers does not have as a language model{theirs}. {wanted}, or"
        " upgrade Transformers if it is a new one",
    )


def _check_quantisation(recipe: Recipe, config: Mapping[str, Any]) -> None:
    """Quantised weights are frozen under adapters, or nothing; PPO needs the same logits in training and in evaluation mode, which
    bitsandbytes' 4 bits give and its 8 bits do not."""
    said = config.get("quantization_config")
    if not isinstance(said, dict):
        return
    bits = next((bits for bits in (4, 8) if said.get(f"load_in_{bits}bit") or said.get(f"_load_in_{bits}bit")), None)
    method = str(said.get("quant_method", "bitsandbytes" if bits else "an unnamed method"))
    packed = method == "bitsandbytes" and bits == 4
    start = f"model.base: {_name(recipe)} is quantised already ({method}{'' if bits is None else f', {bits} bits'})"
    remedy = "Use the model in float weights"
    require(
        recipe.mode != "full",
        f"{start}, and quantised weights can't be trained. {remedy}{', or add --lora' if packed else ''}",
    )
    require(packed, f"{start}, and adapters are trained on float weights or on bitsandbytes' 4 bits. {remedy}; --lora qlora puts them"
            " in 4 bits by itself")  # fmt: skip
    require(
        recipe.model.quantization is None,
        f"{start}, and model.quantization asks for {recipe.model.quantization} of float weights. Use --lora lora, or the model in float"
        " weights",
    )
    require(
        "merged" not in recipe.export,
        f"{start}, and `export: [merged]` needs float weights to merge a policy into. {remedy}, or leave export out",
    )
    require(
        importlib.util.find_spec("bitsandbytes") is not None,
        f"{start}, which needs the package bitsandbytes. {remedy}, or pip install 'salsa-peft[qlora]'",
    )


def _check_head(recipe: Recipe, text: Mapping[str, Any]) -> None:
    kind = str(text.get("model_type"))
    require(
        kind not in HEADS,
        f"model.base: {_name(recipe)} is a {kind} model. Its logits are not those of its output embeddings ({HEADS.get(kind)}), which PPO"
        " and measured soups compute log-probs from. Use another base, or policies by dpo, kto, rloo or grpo",
    )
    if recipe.adapter is None:
        return
    modules = recipe.adapter.target_modules
    named = [modules] if isinstance(modules, str) else modules
    adapted = [name for name in OUTPUT if any(_targets(pattern, name, isinstance(modules, str)) for pattern in named)]
    require(
        not adapted,
        f"adapter.target_modules: found {', '.join(adapted[:1])}, the output embeddings, which policy and references share in PPO. Leave it"
        " out, or take policies by dpo, kto, rloo or grpo",
    )


def _check_padding(recipe: Recipe, text: Mapping[str, Any]) -> None:
    """Prompts of several lengths are padded on the left to be answered together, by every stage that generates."""
    kind = str(text.get("model_type"))
    require(
        kind not in UNMASKED,
        f"model.base: {_name(recipe)} is a {kind} model, whose implementation in Transformers reads the padding in front of a shorter prompt as"
        f" text ({UNMASKED.get(kind)}), so that its responses and log-probs would be others than those of the prompt alone. Use another base",
    )


def _check_mamba(recipe: Recipe, text: Mapping[str, Any]) -> None:
    """LoRA on modules of Mamba's layers that are not called."""
    kind, adapter = str(text.get("model_type")), recipe.adapter
    layers = [text[key] for key in ("layer_types", "layers_block_type") if isinstance(text.get(key), list)]
    without = (
        kind == "granitemoehybrid" and bool(layers) and all(one in ("attention", "full_attention") for one in layers[0])
    )
    if adapter is None or kind not in MAMBA or without:
        return
    modules = adapter.target_modules
    named = [modules] if isinstance(modules, str) else modules
    hit = [
        name
        for name in PAST_LORA
        if any(one == "all-linear" or _targets(one, name, isinstance(modules, str)) for one in named)
    ]
    require(
        not hit,
        f"adapter.target_modules: found {modules if isinstance(modules, str) else ', '.join(modules)}, and {_name(recipe)} is a {kind} model,"
        f" whose Mamba layers use the weights of {' and '.join(hit[:1])} past a LoRA on it. Set adapter.target_modules=[{MAMBA.get(kind)}], or"
        " train full weights (without --lora)",
    )


def _targets(pattern: str, name: str, regex: bool) -> bool:
    """As PEFT matches a module's name."""
    if not regex or pattern == "all-linear":
        return pattern.rpartition(".")[2] == name
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error:
        return False


def require_targets(modules: str | list[str], there: Iterable[str]) -> None:
    """Raise SalsaError for a name in `adapter.target_modules` that no module has; PEFT passes over it where another name fits.

    there: the modules' whole names. A regular expression is not looked at: the names in files may lack a prefix.
    """
    names = list(there)
    missing = [
        one
        for one in ([] if isinstance(modules, str) else modules)
        if not any(name == one or name.endswith(f".{one}") or one.endswith(f".{name}") for name in names)
    ]
    known = {name.rpartition(".")[2] for name in names if not name.endswith((".bias", "norm")) and "." in name}
    require(
        not missing,
        f"adapter.target_modules: the base has no module {', '.join(missing)}. It has {', '.join(sorted(known))[:400]}; all-linear takes every"
        " linear layer",
    )


def _check_noise(recipe: Recipe, text: Mapping[str, Any]) -> None:
    noisy = [key for key, value in text.items() if key.endswith("jitter_noise") and isinstance(value, float) and value]
    noisy += ["hidden_dropout"] if text.get("model_type") == "falcon" and text.get("hidden_dropout") else []
    require(
        not noisy,
        f"model.base: {_name(recipe)} has {noisy[0] if noisy else ''} in its config.json, noise in training mode. PPO compares a network with"
        " itself and needs it off: set it to 0 in a copy of the folder",
    )


def _check_length(recipe: Recipe, text: Mapping[str, Any]) -> None:
    """Positions that were never trained, or are not there; a scaled RoPE reads as much more as its factor says."""
    length = next((text[key] for key in POSITIONS if isinstance(text.get(key), int) and text[key] > 0), None)
    if length is None:
        return
    scaled = [text[key] for key in ("rope_scaling", "rope_parameters") if isinstance(text.get(key), dict)]
    factors = [one["factor"] for one in scaled if isinstance(one.get("factor"), int | float)]
    most = int(length * max([1.0, *factors]))
    require(
        recipe.model.max_length <= most,
        f"model.max_length: found {recipe.model.max_length}, and {_name(recipe)} reads {most} tokens at most. Set model.max_length={most} or"
        " less",
    )


def _check_experts(recipe: Recipe, text: Mapping[str, Any]) -> None:
    """What PEFT's LoRA on the parameters of experts can't do."""
    adapter = recipe.adapter
    if adapter is None or not any(text.get(key) for key in EXPERTS) or adapter.target_modules != "all-linear":
        return
    require(
        adapter.lora_dropout == 0,
        f"adapter.lora_dropout: found {adapter.lora_dropout:g}, and all-linear adapts the experts of {_name(recipe)}, where PEFT has no"
        f" dropout. Set adapter.lora_dropout=0, or {ATTENTION}",
    )
    require(
        recipe.ppo.rollout_backend != "vllm",
        f"ppo.rollout_backend: found vllm, which takes merged experts by other names than Transformers'. Set ppo.rollout_backend=hf, or"
        f" {ATTENTION}",
    )
