"""Base models: loading them and their tokenizers, their trunk and head, saving full weights, and whether weights are of the same base."""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.utils import ModelOutput

from salsa_peft.config.schema import Model
from salsa_peft.data.chat import turn_ends
from salsa_peft.utils.errors import require
from salsa_peft.utils.hub import readable_hub_errors

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


logger = logging.getLogger(__name__)
POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len")
"""What configurations call the length that a model reads."""


def resolve_dtype(dtype: str) -> torch.dtype:
    """`auto` → bfloat16 on CUDA, float32 on a CPU."""
    if dtype == "auto":
        return torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]


def device() -> torch.device:
    """Where a stage runs: with several processes each has the GPU of its number on this machine."""
    return (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")
    )


def attention(model: Model) -> str | None:
    """Transformers' name of the attention: `auto` → flash_attention_2 on CUDA where flash-attn is installed, else sdpa."""
    if model.attn_implementation != "auto":
        return model.attn_implementation
    there = torch.cuda.is_available() and importlib.util.find_spec("flash_attn") is not None
    return "flash_attention_2" if there else "sdpa"


def quantisation(model: Model, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """nf4 of the linear layers, computed in `dtype`; output embeddings and score heads stay as they are. Raises SalsaError without
    bitsandbytes."""
    if model.quantization is None:
        return None
    require(
        importlib.util.find_spec("bitsandbytes") is not None,
        f"model.quantization: found {model.quantization} and no bitsandbytes, which it runs on; pip install 'salsa-peft[qlora]'",
    )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=model.quantization == "nf4-double",
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=["lm_head", "score"],
    )


def _pretrained(
    auto_class: Callable[[Any], Any], base: str, model: Model, trained: torch.dtype | None, **options: Any
) -> Any:
    """Frozen in the recipe's dtype or 4 bits; `trained`: all weights require a gradient, in that dtype."""
    dtype = trained or resolve_dtype(model.dtype)
    if (
        quantised := quantisation(model, dtype)
    ) is not None:  # None would load a base in 8 bits as if its integers were weights
        options["quantization_config"] = quantised
    with readable_hub_errors(base):
        loaded = auto_class(AutoConfig.from_pretrained(base, trust_remote_code=False)).from_pretrained(
            base,
            dtype=dtype,
            attn_implementation=attention(model),
            device_map={"": device()},
            trust_remote_code=False,
            use_safetensors=True,
            **options,
        )
    if loaded.device.type == "cpu":
        keep_4bit_layout(loaded)
    return loaded.requires_grad_(trained is not None)


def keep_4bit_layout(model: nn.Module) -> None:
    """bitsandbytes (0.50) packs a layer's 4 bits anew for AVX-512 at its first forward in eval mode, and has no backward for that layout:
    adapters trained after a rollout would get wrong gradients in silence."""
    module: Any
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = False


def load_base(
    base: str, model: Model, tokenizer: PreTrainedTokenizerBase, trained: torch.dtype | None = None
) -> PreTrainedModel:
    """The causal language model of a folder, frozen (`trained`: in that dtype to be trained), without the generation settings (top-p,
    penalties) that it came with; all tokens that end a response are named as EOS."""
    loaded = _pretrained(causal_lm_class, base, model, trained)
    if trained is not None:
        train_language_model_only(loaded, loaded.get_output_embeddings())
    ends = turn_ends.model_stop_token_ids(tokenizer, loaded)
    loaded.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=ends[0] if len(ends) == 1 else list(ends),
        pad_token_id=tokenizer.pad_token_id,
    )
    loaded.config.pad_token_id = tokenizer.pad_token_id
    without_router_logits(loaded)
    rows = loaded.get_input_embeddings().weight.shape[0]
    require(
        len(tokenizer) <= rows,
        f"{base}: found a tokenizer of {len(tokenizer)} tokens over {rows} embeddings, expected no more tokens than rows",
    )
    return loaded


def without_router_logits(model: PreTrainedModel) -> None:
    """TRL's SFT switches them on in a mixture's configuration; with them, Transformers' generate fails on padded prompts."""
    text = model.config.get_text_config(decoder=True)
    if "output_router_logits" in text.to_dict():
        text.output_router_logits = False


def load_classifier(
    base: str, model: Model, tokenizer: PreTrainedTokenizerBase, trained: torch.dtype | None = None
) -> PreTrainedModel:
    """A causal model's folder with a linear head on the last token, no bias, drawn from N(0, 1/(H+1)) as Stiennon et al. (2020)."""
    loaded = _pretrained(classifier_class, base, model, trained, num_labels=1)
    if trained is not None:
        train_language_model_only(loaded, loaded.score)
    loaded.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    nn.init.normal_(loaded.score.weight, std=(loaded.score.in_features + 1) ** -0.5)
    if is_quantised(loaded):  # whose states have the quantisation's dtype, not the head's
        loaded.score.register_forward_pre_hook(lambda head, inputs: (inputs[0].to(head.weight.dtype),))
    return loaded


def causal_lm(model: nn.Module) -> Any:
    """The Transformers model inside a PeftModel, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def hidden_states(model: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """The trunk's last hidden states (B, L, H), under the adapter that is active.

    input_ids (B, L), attention_mask (B, L), True or 1 = a real token; padding may stand on either side, since positions
    are counted over real tokens.
    """
    positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    return trunk(causal_lm(model))(
        input_ids=input_ids, attention_mask=attention_mask.long(), position_ids=positions, use_cache=False
    )[0]


def max_positions(config: Any) -> int | None:
    """Tokens that a model reads at most, as its configuration says; None where it says nothing (ALiBi, state spaces)."""
    said = config.get_text_config(decoder=True).to_dict()
    return next((int(said[name]) for name in POSITIONS if said.get(name)), None)


def apply_scalar_head(head: nn.Linear, states: torch.Tensor) -> torch.Tensor:
    """States (…, H) → (…,) by a head of one number, in the head's own precision also under autocast."""
    with torch.autocast(states.device.type, enabled=False):
        return head(states.to(head.weight.dtype)).squeeze(-1)


def causal_lm_class(config: PreTrainedConfig) -> Any:
    """The Auto class that opens a base of this configuration with its output embeddings."""
    causal = type(config) in AutoModelForCausalLM._model_mapping
    return AutoModelForCausalLM if causal else AutoModelForImageTextToText


def classifier_class(config: PreTrainedConfig) -> Any:
    """The class that opens a base of this configuration under a score head."""
    auto = AutoModelForSequenceClassification
    if type(config) in auto._model_mapping:
        return auto
    causal = causal_lm_class(config)._model_mapping[type(config)]
    family = next(one for one in causal.__mro__ if PreTrainedModel in one.__bases__)
    name = causal.__name__.partition("For")[0] + "ForSequenceClassification"
    named = {
        "__module__": causal.__module__,
        "base_model_prefix": family.base_model_prefix,
    }  # its tensors' names are the base's
    return type(name, (_Classifier, family), named)


class _Classifier(GenericForSequenceClassification):
    """Transformers' generic one, which passes on its trunk's `attentions`: Mamba's output has none."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        getattr(self, self.base_model_prefix).register_forward_hook(_with_attentions)


def _with_attentions(trunk: nn.Module, inputs: Any, output: Any) -> None:
    if isinstance(output, ModelOutput) and "attentions" not in {field.name for field in dataclasses.fields(output)}:  # type: ignore[arg-type]
        output.attentions = None


def trunk(lm: Any) -> Any:
    """The decoder whose last states the output embeddings read. Llama 4 and Mllama name the language model itself as its decoder."""
    decoder = lm.get_decoder()
    return decoder if decoder.get_output_embeddings() is None else decoder.model


def layers_outside_language_model(lm: Any) -> list[str]:
    """The linear layers of a language model that its trunk and head do not hold: towers for images, projectors."""
    own = {id(module) for module in trunk(lm).modules()} | {id(lm.get_output_embeddings())}
    return [name for name, module in lm.named_modules() if isinstance(module, nn.Linear) and id(module) not in own]


def train_language_model_only(model: Any, head: nn.Module) -> None:
    """Freeze what lies outside the trunk and its head: text gives it no gradient."""
    own = {id(parameter) for part in (trunk(model), head) for parameter in part.parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in own)


def language_model_only(lm: Any) -> dict[str, str]:
    """LoraConfig's `exclude_modules` that keeps LoRA to the language model of a multimodal one; nothing for others."""
    if not layers_outside_language_model(lm):
        return {}
    decoder = trunk(lm)
    path = next(name for name, module in lm.named_modules() if module is decoder)
    return {"exclude_modules": rf"(?!{path.replace('.', chr(92) + '.')}\.).*"}


def is_quantised(model: nn.Module) -> bool:
    """Whether the base's weights are packed in 8 or 4 bits, by the recipe or as they came."""
    return any(not parameter.is_floating_point() for parameter in model.parameters())
