"""Checks of a recipe against its base's config.json, before weights are loaded. Imports no torch.

The checks run when the recipe is read or, for a base on the Hub that is not in the cache, after the first stage has
downloaded its config.json. The architectures that Transformers supports are read from its source code, because
importing its tables would import torch.
"""

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
    "inkling_text": "a cut of the vocabulary after the output embeddings",
    "minicpm3": "a scale that its config.json does not name",
    "modernbert-decoder": "a layer between decoder and output embeddings",
    "xlstm": "a soft cap that is applied in evaluation mode only",
}
"""Architectures whose logits do not depend on hidden states and output embeddings alone → what else changes the logits
(see logprobs.check_head)."""
UNMASKED = {
    "cpmant": "it takes no attention mask",
    "deepseek_v4": "it compresses its keys in blocks that are counted from the first token",
    "recurrent_gemma": "its recurrence takes no attention mask",
    "rwkv": "its recurrence takes no attention mask",
    "trocr": "it counts positions from the first token",
    "xlstm": "its recurrence takes no attention mask",
}
"""Architectures that read padding before a prompt as text in Transformers 5.24 → the reason."""
MAMBA = {
    **dict.fromkeys(("mamba", "falcon_mamba", "mamba2"), "in_proj"),
    **dict.fromkeys(
        ("bamba", "falcon_h1", "granitemoehybrid", "nemotron_h", "zamba2"), "in_proj,q_proj,k_proj,v_proj,o_proj"
    ),
}
"""Architectures whose fused kernel reads the weight of `out_proj` without its LoRA → modules that LoRA can adapt. PEFT
rejects LoRA on `out_proj` for some of these architectures, but not for all."""
NEVER_CALLED = ("out_proj", "conv1d", "dt_proj", "x_proj")
"""Modules of Mamba layers that are never called, because the layer reads their weights directly."""
POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len")
"""Keys of the maximum sequence length in model configurations."""
OUTPUT = ("lm_head", "embed_out", "output_layer", "output_projection")
"""Module names of output embeddings."""
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
"""Keys of the number of experts in model configurations."""
ATTENTION = "adapter.target_modules=[q_proj,k_proj,v_proj,o_proj]"


def check(recipe: Recipe) -> None:
    """Raise SalsaError if the base's config.json, if it is on this machine, shows that a stage would fail."""
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
    """Whether the recipe computes log-probs from output embeddings, for PPO or for a soup with a measure."""
    measured = any(soup.uses_measure for soup in (recipe.soup, *recipe.soups.values()))
    return measured or any(policy.algorithm == "ppo" for policy in recipe.policies.values())


def text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's part of a multimodal model's configuration; otherwise the whole configuration."""
    found = next((config[key] for key in ("text_config", "llm_config") if isinstance(config.get(key), dict)), config)
    return {"model_type": config.get("model_type"), **found}


@functools.cache
def architectures() -> dict[str, frozenset[str]]:
    """Key of TABLES → model types in that table of the installed Transformers; empty if there is no table."""
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
        f"model.base: {name} is a {kind} model, which is an encoder-decoder model. {remedy}",
    )
    require(
        kind not in known["causal"] & known["masked"],
        f"model.base: {name} is a {kind} model, which fills in masked tokens and does not write from left to right."
        f" {remedy}",
    )
    supported = known["causal"] | known["multimodal"]
    theirs = " (code in the model's repository is never run)" if "auto_map" in config else ""
    require(
        not supported or kind in supported,
        f"model.base: {name} is a {kind} model, which the installed Transformers does not support as a language"
        f" model{theirs}. {remedy}, or upgrade Transformers if the architecture is new",
    )


def _check_quantisation(recipe: Recipe, config: Mapping[str, Any]) -> None:
    """Raise SalsaError for a quantised base, except if adapters are trained on bitsandbytes' 4 bits.

    With bitsandbytes' 8 bits, the logits in PPO would differ between training and evaluation mode.
    """
    own = config.get("quantization_config")
    if not isinstance(own, dict):
        return
    bits = next((bits for bits in (4, 8) if own.get(f"load_in_{bits}bit") or own.get(f"_load_in_{bits}bit")), None)
    method = str(own.get("quant_method", "bitsandbytes" if bits else "an unnamed method"))
    packed = method == "bitsandbytes" and bits == 4
    start = f"model.base: {_name(recipe)} is already quantised ({method}{'' if bits is None else f', {bits} bits'})"
    remedy = "Use the model in float weights"
    require(
        recipe.mode != "full",
        f"{start}, and quantised weights cannot be trained. {remedy}{', or add --lora' if packed else ''}",
    )
    require(
        packed,
        f"{start}, but adapters can only be trained on float weights or bitsandbytes' 4 bits. {remedy}; --lora qlora"
        " quantises that model to 4 bits",
    )
    require(
        recipe.model.quantization is None,
        f"{start}, but model.quantization {recipe.model.quantization} needs float weights. Use --lora lora, or the"
        " model in float weights",
    )
    require(
        "merged" not in recipe.export,
        f"{start}, but `export: [merged]` needs float weights to merge a policy into. {remedy}, or remove `merged` from"
        " export",
    )
    require(
        importlib.util.find_spec("bitsandbytes") is not None,
        f"{start}, and bitsandbytes is not installed. {remedy}, or pip install 'salsa-peft[qlora]'",
    )


def _check_head(recipe: Recipe, kind: str) -> None:
    require(
        kind not in HEADS,
        f"model.base: {_name(recipe)} is a {kind} model, whose logits also depend on {HEADS.get(kind)}. PPO and soups"
        " with a measure compute log-probs from hidden states and output embeddings alone. Use a base of another"
        " architecture, or only policies with algorithm dpo, kto, rloo or grpo and a soup without a measure",
    )
    adapted = _adapted(recipe.adapter.target_modules, OUTPUT) if recipe.adapter is not None else []
    require(
        not adapted,
        f"adapter.target_modules: {', '.join(adapted[:1])} is the output embeddings, which policy and references share"
        " in PPO. Remove this module, or use only policies with algorithm dpo, kto, rloo or grpo",
    )


def _check_padding(recipe: Recipe, kind: str) -> None:
    """Raise SalsaError for a base that reads left padding as text; generation pads prompts on the left."""
    require(
        kind not in UNMASKED,
        f"model.base: {_name(recipe)} is a {kind} model, whose implementation in Transformers reads the padding before"
        f" a shorter prompt as text ({UNMASKED.get(kind)}). This would change responses and log-probs. Use a base of"
        " another architecture",
    )


def _check_mamba(recipe: Recipe, kind: str, text: Mapping[str, Any]) -> None:
    """Raise SalsaError for LoRA on modules of Mamba layers that are never called, where it has no effect."""
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
    """The names among `names` that PEFT's `target_modules` matches; [] for all-linear."""
    if isinstance(target_modules, list):
        return [name for name in names if name in {module.rpartition(".")[2] for module in target_modules}]
    try:
        return [name for name in names if re.fullmatch(target_modules, name)]
    except re.error:
        return []


def require_targets(modules: str | list[str], modules_of_base: Iterable[str]) -> None:
    """Raise SalsaError for a target module that the base does not have, since PEFT may ignore its name.

    modules: a list of names, or a regular expression, which is not checked. modules_of_base: the full names of the
    base's modules, in some files without a prefix.
    """
    names = list(modules_of_base)
    wanted = [] if isinstance(modules, str) else [f".{module}" for module in modules]
    missing = [
        one[1:] for one in wanted if not any(f".{name}".endswith(one) or one.endswith(f".{name}") for name in names)
    ]
    known = {name.rpartition(".")[2] for name in names if not name.endswith((".bias", "norm")) and "." in name}
    require(
        not missing,
        f"adapter.target_modules: the base has no module {', '.join(missing)}. Use all-linear, or some of the base's"
        f" modules: {', '.join(sorted(known))[:400]}",
    )


def _check_noise(recipe: Recipe, text: Mapping[str, Any]) -> None:
    noisy = [key for key, value in text.items() if key.endswith("jitter_noise") and isinstance(value, float) and value]
    noisy += ["hidden_dropout"] if text.get("model_type") == "falcon" and text.get("hidden_dropout") else []
    require(
        not noisy,
        f"model.base: {_name(recipe)} sets {noisy[0] if noisy else ''} in its config.json, which adds noise in training"
        " mode, but PPO needs the same log-probs in every forward. Copy the folder, set that key to 0 in the copy, and"
        " use the copy as base",
    )


def longest_sequence(text: Mapping[str, Any]) -> int | None:
    """Maximum number of tokens that a configuration allows, RoPE scaling included; None if it does not say."""
    length = next((text[key] for key in POSITIONS if isinstance(text.get(key), int) and text[key] > 0), None)
    if length is None:
        return None
    scaled = [text[key] for key in ("rope_scaling", "rope_parameters") if isinstance(text.get(key), dict)]
    factors = [one["factor"] for one in scaled if isinstance(one.get("factor"), int | float)]
    return int(length * max([1.0, *factors]))


def _check_length(recipe: Recipe, text: Mapping[str, Any]) -> None:
    """Raise SalsaError if model.max_length exceeds the base's maximum, RoPE scaling included."""
    most = longest_sequence(text)
    require(
        most is None or recipe.model.max_length <= most,
        f"model.max_length: {recipe.model.max_length} is too long, because {_name(recipe)} reads at most {most} tokens."
        f" Set model.max_length={most} or less",
    )


def _check_experts(recipe: Recipe, text: Mapping[str, Any]) -> None:
    """Raise SalsaError for LoRA on experts with LoRA dropout or vLLM rollouts, which do not support it."""
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
        "ppo.rollout_backend: vllm cannot load merged experts, because its names of their weights differ from"
        f" Transformers'. Set ppo.rollout_backend=hf, or {ATTENTION}",
    )
