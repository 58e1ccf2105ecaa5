"""Convert an adapter's module names to those of Transformers 5, with PEFT's own conversion.

    language_model.model.layers.0.…            →  model.language_model.layers.0.…    multimodal models before 4.52
    block_sparse_moe.experts.3.w1, .w3.lora_A  →  mlp.experts.base_layer.lora_A      experts before 5.0, now stacked

If the base's files name every module of the adapter, nothing is converted. Otherwise the base's model is built without
weights, and an adapter with a module that the model lacks after the conversion is rejected; PEFT would ignore such a
module with a warning. If the base is not on this machine, only adapters of Mixtral are converted.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from salsa_peft.models.adapters.bases import base_folder
from salsa_peft.models.adapters.names import PREFIX
from salsa_peft.soup import arrays as float_arrays
from salsa_peft.soup.lora.read import DEFAULTS, WEIGHTS
from salsa_peft.soup.lora.targets import WRAPPED, strip_wrappers
from salsa_peft.utils.errors import SalsaError
from salsa_peft.utils.files import read_json
from salsa_peft.utils.safetensors_io import Entry, SafetensorsFile

if TYPE_CHECKING:
    from torch import nn


EXPERT = re.compile(r".*\.experts\.\d+\.")
Names = dict[str, str]
"""PEFT's name of a tensor → its name in the file."""


class TensorsInMemory(SafetensorsFile):
    """An adapter's tensors in memory: of single experts that PEFT has joined, or of an adapter on a model."""

    def __init__(self, path: Path, arrays: Mapping[str, float_arrays.Array]) -> None:
        self.path, self.arrays = path, dict(arrays)
        self.entries = {
            name: Entry("F64" if values.dtype == np.float64 else "F32", values.shape, 0, values.nbytes)
            for name, values in arrays.items()
        }


def to_current_layout(
    names: Names, config: dict[str, Any], file: SafetensorsFile, folder: Path
) -> tuple[Names, dict[str, Any], SafetensorsFile]:
    """Convert names, configuration and tensors as PEFT does on loading. Most adapters stay unchanged."""
    modules = sorted(set(lora_modules(names)))
    old_experts = any(EXPERT.match(module) for module in modules)
    base = base_folder(config, folder)
    if base is not None and not old_experts and all(in_base(module, *base_modules(str(base))) for module in modules):
        return names, config, file
    first = None
    if base is not None:
        models = models_of(str(base), config["task_type"])
    else:
        models = iter([mixtral(modules)] if any("block_sparse_moe.experts." in module for module in modules) else [])
    for model in models:
        places = {name for name, _ in model.named_modules()}
        if set(modules) <= places:
            return names, config, file
        found = convert(model, names, config, file)
        odd = next((module for module in sorted(set(lora_modules(found[0]))) if module not in places), None)
        if odd is None:
            return found
        first = first or (odd, type(model).__name__)
    if first is not None and base is not None:
        raise SalsaError(
            f"{folder / WEIGHTS}: {first[1]}, the model of {base}, has no module {first[0]}, so PEFT would ignore this"
            " module; correct base_model_name_or_path, or save the adapter again from the model that it was trained on"
        )
    return names, config, file


def lora_modules(names: Iterable[str]) -> Iterator[str]:
    """Yield the name of each LoRA tensor's module without PEFT's wrappers; names occur repeatedly."""
    for name in names:
        module, lora, _ = name.removeprefix(PREFIX).rpartition(".lora_")
        if lora:
            yield strip_wrappers(module)[0].replace(f"{WRAPPED}.", ".")


def in_base(module: str, places: frozenset[str], starts: frozenset[str]) -> bool:
    """Whether a base's files have a module, by its name or by its name without the first part (`model.`)."""
    start, _, rest = module.partition(".")
    return module in places or module == "lm_head" or (start not in starts and rest in places)


@functools.lru_cache(maxsize=8)
def base_modules(base: str) -> tuple[frozenset[str], frozenset[str]]:
    """Modules in a base's safetensors files, and the first parts of their names; empty if unreadable."""
    index = Path(base) / "model.safetensors.index.json"
    try:
        if index.is_file():
            keys = list(read_json(index)["weight_map"])
        else:
            keys = list(SafetensorsFile(Path(base) / "model.safetensors").entries)
    except (SalsaError, KeyError, TypeError, OSError):  # reported by the code that reads the base's weights
        return frozenset(), frozenset()
    parts = [key.split(".") for key in keys]
    places = {".".join(part[:i]) for part in parts for i in range(1, len(part))}
    return frozenset(places), frozenset(part[0] for part in parts)


HEADS = {
    "SEQ_CLS": ["ForSequenceClassification"],
    "TOKEN_CLS": ["ForTokenClassification"],
    "SEQ_2_SEQ_LM": ["ForSeq2SeqLM", "ForSpeechSeq2Seq"],
    "QUESTION_ANS": ["ForQuestionAnswering"],
    "FEATURE_EXTRACTION": [],
    "CAUSAL_LM": ["ForImageTextToText", "ForCausalLM"],
}
"""PEFT's task_type → suffixes of Transformers' auto classes that may open the base, besides AutoModel."""
ANY_HEAD = [
    "ForImageTextToText", "ForCausalLM", "ForSeq2SeqLM", "ForSpeechSeq2Seq", "ForMaskedLM", "ForSequenceClassification",
]  # fmt: skip


def models_of(base: str, task: str | None) -> Iterator[nn.Module]:
    """Yield the base as built by each auto class that may fit `task`, then its language model likewise."""
    for text in (False, True):
        for head in (*HEADS.get(task or "", ANY_HEAD), ""):
            model = without_weights(base, f"AutoModel{head}", text)
            if model is not None:
                yield model


@functools.lru_cache(maxsize=4)
def without_weights(base: str, name: str, text: bool) -> nn.Module | None:
    """Build the base, or if `text` its language model, on the meta device; None if class `name` cannot."""
    import torch
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(base, trust_remote_code=False)
        with torch.device("meta"):
            auto = getattr(transformers, name)
            return auto.from_config(config.get_text_config() if text else config)  # type: ignore[no-any-return]
    except (OSError, ValueError, KeyError, ImportError, AttributeError):
        return None


def mixtral(modules: Iterable[str]) -> nn.Module:
    """A tiny Mixtral with the layers that `modules` name, for adapters whose base is not available."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    layers = 1 + max(int(number) for module in modules for number in re.findall(r"\.layers\.(\d+)\.", module))
    config = MixtralConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=layers, num_attention_heads=1, num_key_value_heads=1,
        num_local_experts=1, vocab_size=8,
    )  # fmt: skip
    with torch.device("meta"):
        return MixtralForCausalLM(config)


def convert(
    model: nn.Module, names: Names, config: dict[str, Any], file: SafetensorsFile
) -> tuple[Names, dict[str, Any], SafetensorsFile]:
    """Apply PEFT's conversion to an adapter. Read values only if tensors of single experts are joined."""
    import torch
    from peft import LoraConfig
    from peft.utils import transformers_weight_conversion as peft_conversion

    given = LoraConfig(**{field: value for field, value in config.items() if field != "auto_mapping"})
    keys = list(names)
    joined = any(EXPERT.match(module) for module in lora_modules(keys))
    if joined:
        tensors = {name: torch.from_numpy(float_arrays.read(file, key)) for name, key in names.items()}
    else:  # only names change: a tensor's position in `keys` stands in for its values
        tensors = {name: torch.tensor([float(i)], dtype=torch.float64) for i, name in enumerate(keys)}
    try:
        peft_conversion.convert_peft_config_for_transformers(given, model, None)
        found = peft_conversion.convert_peft_adapter_state_dict_for_transformers(model, given, tensors)
    except ValueError as error:
        raise SalsaError(
            f"{file.path}: PEFT cannot convert this adapter to the current layout of {type(model).__name__} ({error});"
            " save the adapter again from the model that it was trained on"
        ) from None
    if not joined:
        return {name: names[keys[int(value)]] for name, value in found.items()}, config, file
    fields = {field: vars(given)[field] for field in DEFAULTS if field in vars(given)}
    changed = {field: sorted(value) if isinstance(value, set) else value for field, value in fields.items()}
    arrays = {name: np.ascontiguousarray(value.numpy()) for name, value in found.items()}
    return {name: name for name in arrays}, config | changed, TensorsInMemory(file.path, arrays)
