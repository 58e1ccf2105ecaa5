"""Checks of a recipe against its base's config.json, before weights are loaded. Imports no torch.

They run when the recipe is read or, for a base on the Hub that is not in the cache, when the first stage has downloaded
its config.json. Which architectures Transformers has is read from its source, because importing its tables imports
torch.
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
"""Architectures whose logits are not the product of their output embeddings alone → what else they depend on (see
logprobs.check_head)."""
UNMASKED = {
    "cpmant": "it takes no attention mask",
    "deepseek_v4": "it compresses its keys in blocks that are counted from the first token",
    "recurrent_gemma": "its recurrence takes no attention mask",
    "rwkv": "its recurrence takes no attention mask",
    "trocr": "it counts positions from the first token",
    "xlstm": "its recurrence takes no attention mask",
}
"""Architectures that read padding before a prompt as text in Transformers 5.24 → why."""
MAMBA = {
    **dict.fromkeys(("mamba", "falcon_mamba", "mamba2"), "in_proj"),
    **dict.fromkeys(
        ("bamba", "falcon_h1", "granitemoehybrid", "nemotron_h", "zamba2"), "in_proj,q_proj,k_proj,v_proj,o_proj"
    ),
}
"""Architectures whose fused kernel reads `out_proj`'s weight without its LoRA (PEFT rejects some) → modules that LoRA
can adapt."""
NEVER_CALLED = ("out_proj", "conv1d", "dt_proj", "x_proj")
"""Modules of Mamba layers whose weights are read without calling the module."""
POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len")
"""Names of a model's maximum length in configurations."""
OUTPUT = ("lm_head", "embed_out", "output_layer", "output_projection")
"""Names of the output embeddings."""
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
"""Names of the number of experts in configurations."""
ATTENTION = "adapter.target_modules=[q_proj,k_proj,v_proj,o_proj]"


def check(recipe: Recipe) -> None:
    """Raise SalsaError if the base's config.json is on this machine and a later stage would fail with it."""
    base = recipe.model.base
    config = None if base is None else config_of_base(base, recipe.model.revision)
    if config is None or not isinstance(config.get("model_type"), str):
        return
    _check_architecture(recipe, config)
    _check_quantisation(recipe, config)
    text = text_part(config)
    kind = str(text["model_type"])
    if needs_logprobs(recipe):
        _check_head(recipe, kind)
        _check_noise(recipe, text)
    _check_padding(recipe, kind)
    _check_mamba(recipe, kind, text)
    _check_length(recipe, text)
    _check_experts(recipe, text)


def needs_logprobs(recipe: Recipe) -> bool:
    """Whether log-probs are computed from the output embeddings, as in PPO and in soups with a measure."""
    return recipe.soup.uses_measure or any(policy.algorithm == "ppo" for policy in recipe.policies.values())


def text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The configuration of the language model in a multimodal one, else the configuration itself."""
    found = next((config[key] for key in ("text_config", "llm_config") if isinstance(config.get(key), dict)), config)
    return {"model_type": config.get("model_type"), **found}


@functools.cache
def architectures() -> dict[str, frozenset[str]]:
    """The model types in each of TABLES of the installed Transformers; empty if it has no such table."""
    found = importlib.util.find_spec("transformers")
    origin = None if found is None else found.origin
    file = Path(str(origin)).parent / "models" / "auto" / "modeling_auto.py"
    source = file.read_text(encoding="utf-8") if file.is_file() else ""
    tables = {
        name: re.findall(rf"^{table} = OrderedDict\(.*?^\)", source, re.M | re.S) for name, table in TABLES.items()
    }
    return {name: frozenset(re.findall(r'\(\s*"([^"]+)",\s*[("]', "".join(found))) for name, found in tables.items()}


def _name(recipe: Recipe) -> str:
    return short(Path(str(recipe.model.base)).name)


def _check_architecture(recipe: Recipe, config: Mapping[str, Any]) -> None:
    kind, known, name = config.get("model_type"), architectures(), _name(recipe)
    remedy = "Use a decoder-only language model such as Llama, Mistral, Gemma or Qwen"
    require(
        not config.get("is_encoder_decoder") and kind not in known["translating"] - known["multimodal"],
        f"model.base: {name} is a {kind} model, which turns one sequence into another. {remedy}",
    )
    require(
        kind not in known["causal"] & known["masked"],
        f"model.base: {name} is a {kind} model, which fills in masked tokens and does not write from left to right."
        f" {remedy}",
    )
    supported = known["causal"] | known["multimodal"]
    theirs = ", and the code in its repository is not run" if "auto_map" in config else ""
    require(
        not supported or kind in supported,
        f"model.base: {name} is a {kind} model, which the installed Transformers does not have as a language"
        f" model{theirs}. {remedy}, or upgrade Transformers if it is a new one",
    )


def _check_quantisation(recipe: Recipe, config: Mapping[str, Any]) -> None:
    """Only bitsandbytes' 4 bits give PPO the same logits in training and evaluation mode; its 8 bits do not."""
    own = config.get("quantization_config")
    if not isinstance(own, dict):
        return
    bits = next((bits for bits in (4, 8) if own.get(f"load_in_{bits}bit") or own.get(f"_load_in_{bits}bit")), None)
    method = str(own.get("quant_method", "bitsandbytes" if bits else "an unnamed method"))
    packed = method == "bitsandbytes" and bits == 4
    start = f"model.base: {_name(recipe)} is quantised already ({method}{'' if bits is None else f', {bits} bits'})"
    remedy = "Use the model in float weights"
    require(
        recipe.mode != "full",
        f"{start}, and quantised weights cannot be trained. {remedy}{', or add --lora' if packed else ''}",
    )
    require(packed, f"{start}, and adapters are trained on float weights or on bitsandbytes' 4 bits. {remedy}; --lora qlora quantises"
            " them to 4 bits")  # fmt: skip
    require(
        recipe.model.quantization is None,
        f"{start}, and model.quantization {recipe.model.quantization} needs float weights. Use --lora lora, or the"
        " model in float weights",
    )
    require(
        "merged" not in recipe.export,
        f"{start}, and `export: [merged]` needs float weights to merge a policy into. {remedy}, or leave export out",
    )
    require(
        importlib.util.find_spec("bitsandbytes") is not None,
        f"{start}, which needs the package bitsandbytes. {remedy}, or pip install 'salsa-peft[qlora]'",
    )


def _check_head(recipe: Recipe, kind: str) -> None:
    require(
        kind not in HEADS,
        f"model.base: {_name(recipe)} is a {kind} model. Its logits are not those of its output embeddings"
        f" ({HEADS.get(kind)}), from which PPO and soups with a measure compute log-probs. Use another base, or"
        " policies with algorithm dpo, kto, rloo or grpo",
    )
    adapted = _adapted(recipe.adapter.target_modules, OUTPUT) if recipe.adapter is not None else []
    require(
        not adapted,
        f"adapter.target_modules: {', '.join(adapted[:1])} is the output embeddings, which policy and references share"
        " in PPO. Leave it out, or use policies with algorithm dpo, kto, rloo or grpo",
    )


def _check_padding(recipe: Recipe, kind: str) -> None:
    """Every stage that generates pads prompts on the left to batch them."""
    require(
        kind not in UNMASKED,
        f"model.base: {_name(recipe)} is a {kind} model, whose implementation in Transformers reads the padding before"
        f" a shorter prompt as text ({UNMASKED.get(kind)}), which changes its responses and log-probs. Use another"
        " base",
    )


def _check_mamba(recipe: Recipe, kind: str, text: Mapping[str, Any]) -> None:
    """LoRA on modules of Mamba layers that are never called would have no effect."""
    adapter = recipe.adapter
    layers = next((text[key] for key in ("layer_types", "layers_block_type") if isinstance(text.get(key), list)), None)
    attention_only = layers is not None and all(one in ("attention", "full_attention") for one in layers)
    if adapter is None or kind not in MAMBA or (kind == "granitemoehybrid" and attention_only):
        return
    modules = adapter.target_modules
    hit = NEVER_CALLED[:1] if "all-linear" in (modules, *modules) else _adapted(modules, NEVER_CALLED)
    require(
        not hit,
        f"adapter.target_modules: LoRA on {', '.join(hit[:1])} has no effect, because {_name(recipe)} is a {kind}"
        " model, whose Mamba layers read that module's weight directly. Set"
        f" adapter.target_modules=[{MAMBA.get(kind)}], or train full weights (without --lora)",
    )


def _adapted(target_modules: str | list[str], names: Iterable[str]) -> list[str]:
    """The module names that `target_modules` matches in PEFT; all-linear matches none here."""
    if isinstance(target_modules, list):
        return [name for name in names if name in {module.rpartition(".")[2] for module in target_modules}]
    try:
        return [name for name in names if re.fullmatch(target_modules, name)]
    except re.error:
        return []


def require_targets(modules: str | list[str], modules_of_base: Iterable[str]) -> None:
    """Raise SalsaError for a target module that the base does not have; PEFT may ignore such a name.

    modules_of_base: the full names of the base's modules. A regular expression is not checked, since names in files can
    lack a prefix.
    """
    names = list(modules_of_base)
    wanted = [] if isinstance(modules, str) else [f".{module}" for module in modules]
    missing = [
        one[1:] for one in wanted if not any(f".{name}".endswith(one) or one.endswith(f".{name}") for name in names)
    ]
    known = {name.rpartition(".")[2] for name in names if not name.endswith((".bias", "norm")) and "." in name}
    require(
        not missing,
        f"adapter.target_modules: the base has no module {', '.join(missing)}. It has"
        f" {', '.join(sorted(known))[:400]}; all-linear adapts every linear layer",
    )


def _check_noise(recipe: Recipe, text: Mapping[str, Any]) -> None:
    noisy = [key for key, value in text.items() if key.endswith("jitter_noise") and isinstance(value, float) and value]
    noisy += ["hidden_dropout"] if text.get("model_type") == "falcon" and text.get("hidden_dropout") else []
    require(
        not noisy,
        f"model.base: {_name(recipe)} has {noisy[0] if noisy else ''} in its config.json, which adds noise in training"
        " mode. PPO needs the same log-probs in every forward: set it to 0 in a copy of the folder",
    )


def _check_length(recipe: Recipe, text: Mapping[str, Any]) -> None:
    """model.max_length must not exceed the base's positions, which RoPE scaling multiplies by its factor."""
    length = next((text[key] for key in POSITIONS if isinstance(text.get(key), int) and text[key] > 0), None)
    if length is None:
        return
    scaled = [text[key] for key in ("rope_scaling", "rope_parameters") if isinstance(text.get(key), dict)]
    factors = [one["factor"] for one in scaled if isinstance(one.get("factor"), int | float)]
    most = int(length * max([1.0, *factors]))
    require(
        recipe.model.max_length <= most,
        f"model.max_length: {recipe.model.max_length} is too long, {_name(recipe)} reads {most} tokens at most. Set"
        f" model.max_length={most} or less",
    )


def _check_experts(recipe: Recipe, text: Mapping[str, Any]) -> None:
    """PEFT's LoRA on experts has no dropout, and vLLM does not accept the names of merged experts."""
    adapter = recipe.adapter
    if adapter is None or not any(text.get(key) for key in EXPERTS) or adapter.target_modules != "all-linear":
        return
    require(
        adapter.lora_dropout == 0,
        f"adapter.lora_dropout: must be 0, because all-linear adapts the experts of {_name(recipe)}, where PEFT has no"
        f" dropout. Set adapter.lora_dropout=0, or {ATTENTION}",
    )
    require(
        recipe.ppo.rollout_backend != "vllm",
        "ppo.rollout_backend: vllm expects other names of merged experts than Transformers. Set ppo.rollout_backend=hf,"
        f" or {ATTENTION}",
    )
