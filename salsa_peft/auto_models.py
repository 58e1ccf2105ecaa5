"""Which of Transformers' classes a base is opened with: as a language model, and under a score head.

Multimodal models are opened whole and read text alone. Most architectures that scale their logits, all multimodal ones and Mamba's have no
sequence classifier in Transformers: theirs is made of Transformers' generic one, so that a reward model can be trained on them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.utils import ModelOutput


def language_model(config: PreTrainedConfig) -> Any:
    """The Auto class that opens a base of this configuration with its output embeddings."""
    causal = type(config) in AutoModelForCausalLM._model_mapping
    return AutoModelForCausalLM if causal else AutoModelForImageTextToText


def classifier(config: PreTrainedConfig) -> Any:
    """The class that opens a base of this configuration under a score head."""
    auto = AutoModelForSequenceClassification
    if type(config) in auto._model_mapping:
        return auto
    causal = language_model(config)._model_mapping[type(config)]
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


def outside_language(lm: Any) -> list[str]:
    """The linear layers of a language model that its trunk and head do not hold: towers for images, projectors."""
    own = {id(module) for module in trunk(lm).modules()} | {id(lm.get_output_embeddings())}
    return [name for name, module in lm.named_modules() if isinstance(module, nn.Linear) and id(module) not in own]


def train_language(model: Any, head: nn.Module) -> None:
    """Freeze what lies outside the trunk and its head: text gives it no gradient."""
    own = {id(parameter) for part in (trunk(model), head) for parameter in part.parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in own)


def only_language(lm: Any) -> dict[str, str]:
    """LoraConfig's `exclude_modules` that keeps LoRA to the language model of a multimodal one; nothing for others."""
    if not outside_language(lm):
        return {}
    decoder = trunk(lm)
    path = next(name for name, module in lm.named_modules() if module is decoder)
    return {"exclude_modules": rf"(?!{path.replace('.', chr(92) + '.')}\.).*"}
