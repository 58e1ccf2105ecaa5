"""An adapter's modules under the names that they have in today's Transformers, by PEFT's own conversion.

    language_model.model.layers.0.…                     →  model.language_model.layers.0.…            multimodal models before 4.52
    block_sparse_moe.experts.3.w1.lora_A, .w3.lora_A    →  mlp.experts.base_layer.lora_A (stacked)    experts before 5.0

The model's names come from the base's files where it is at hand. Where these have every module of the adapter, nothing else is looked at;
else the model is built without weights, and what has no place in it after the conversion is refused: PEFT would drop it with a warning.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from salsa_peft.models.adapters.bases import base_folder
from salsa_peft.models.adapters.names import PREFIX
from salsa_peft.soup import arrays as float_arrays
from salsa_peft.soup.lora.read import DEFAULTS, WEIGHTS
from salsa_peft.utils.errors import SalsaError, require
from salsa_peft.utils.safetensors_io import Entry, SafetensorsFile

if TYPE_CHECKING:
    from torch import nn


EXPERT = re.compile(r"(?P<holder>.*\.experts)\.\d+\.")
WRAPPED = ".base_layer"
Names = dict[str, str]
"""PEFT's name of a tensor → the file's."""


class ConvertedFile(SafetensorsFile):
    """An adapter's tensors in memory, where PEFT joins several of the file's into one; else as the file on the disk."""

    def __init__(self, path: Path, arrays: Mapping[str, float_arrays.Array]) -> None:
        super().__init__(path)
        codes = {np.dtype(np.float64): "F64"}
        self.arrays = dict(arrays)
        self.entries = {
            name: Entry(codes.get(values.dtype, "F32"), values.shape, 0, values.nbytes)
            for name, values in arrays.items()
        }


def in_todays_layout(
    names: Names, config: dict[str, Any], file: SafetensorsFile, folder: Path
) -> tuple[Names, dict[str, Any], SafetensorsFile]:
    """The names, the configuration and the tensors that PEFT makes of an adapter when it loads it; mostly they are what was given."""
    modules = sorted(set(lora_modules(names)))
    old_experts = any(EXPERT.match(module) for module in modules)
    base = base_folder(config, folder)
    if base is not None and not old_experts and all(there(module, *known_modules(str(base))) for module in modules):
        return names, config, file
    first = None
    for model in candidates(base, config, modules):
        places = {name for name, _ in model.named_modules()}
        if set(modules) <= places:
            return names, config, file
        found = converted(model, names, config, file)
        odd = next((module for module in sorted(set(lora_modules(found[0]))) if module not in places), None)
        if odd is None:
            return found
        first = first or (odd, type(model).__name__)
    require(
        first is None or base is None,
        f"{folder / WEIGHTS}: {first[0] if first else ''} has no place in {first[1] if first else ''}, the model of {base}: PEFT would drop its "
        "tensors in silence; correct base_model_name_or_path, or save the adapter again from the model that it was trained on",
    )
    return names, config, file


def lora_modules(names: Iterable[str]) -> Iterator[str]:
    """The modules that LoRA is on, without wrappers."""
    for name in names:
        module, lora, _ = name.removeprefix(PREFIX).rpartition(".lora_")
        if lora:
            while module.endswith(WRAPPED):
                module = module.removesuffix(WRAPPED)
            yield module.replace(f"{WRAPPED}.", ".")


def there(module: str, places: frozenset[str], first: frozenset[str]) -> bool:
    """Whether a base's files name a module. Files of a bare model lack its first part; tied output embeddings are not in them."""
    head, _, rest = module.partition(".")
    return module in places or module == "lm_head" or (head not in first and rest in places)


@functools.lru_cache(maxsize=8)
def known_modules(base: str) -> tuple[frozenset[str], frozenset[str]]:
    """The modules that a base's safetensors files name, and the first parts of their names. Empty where there are none."""
    index = Path(base) / "model.safetensors.index.json"
    try:
        if index.is_file():
            keys = list(json.loads(index.read_bytes())["weight_map"])
        else:
            keys = list(SafetensorsFile(Path(base) / "model.safetensors").entries)
    except (
        SalsaError,
        ValueError,
        KeyError,
        TypeError,
        OSError,
    ):  # what a base lacks is said by those who read its weights
        return frozenset(), frozenset()
    parts = [key.split(".") for key in keys]
    places = {".".join(part[:i]) for part in parts for i in range(1, len(part))}
    return frozenset(places), frozenset(part[0] for part in parts)


def candidates(base: Path | None, config: dict[str, Any], modules: list[str]) -> Iterator[nn.Module]:
    """Models without weights that the adapter may be of, the likeliest first."""
    if base is not None:
        yield from models_of(str(base), config["task_type"])
    elif any("block_sparse_moe.experts." in module for module in modules):
        layers = 1 + max(int(number) for module in modules for number in re.findall(r"\.layers\.(\d+)\.", module))
        yield mixtral(layers)


HEADS = {
    "SEQ_CLS": ["ForSequenceClassification"],
    "TOKEN_CLS": ["ForTokenClassification"],
    "SEQ_2_SEQ_LM": ["ForSeq2SeqLM", "ForSpeechSeq2Seq"],
    "QUESTION_ANS": ["ForQuestionAnswering"],
    "FEATURE_EXTRACTION": [],
    "CAUSAL_LM": ["ForImageTextToText", "ForCausalLM"],
}
"""PEFT's task_type → Transformers' auto classes that an adapter's base may be opened with, beside AutoModel."""
ANY = [
    "ForImageTextToText",
    "ForCausalLM",
    "ForSeq2SeqLM",
    "ForSpeechSeq2Seq",
    "ForMaskedLM",
    "ForSequenceClassification",
]


def models_of(base: str, task: str | None) -> Iterator[nn.Module]:
    """A base's model under each class that may be meant; of a multimodal one its language model too. None where that takes foreign code."""
    for text in (False, True):
        for head in (*HEADS.get(task or "", ANY), ""):
            model = without_weights(base, f"AutoModel{head}", text)
            if model is not None:
                yield model


@functools.lru_cache(maxsize=4)
def without_weights(base: str, name: str, text: bool) -> nn.Module | None:
    """A base's model, or its language model, on no device; None where the class has none for this configuration."""
    import torch
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(base, trust_remote_code=False)
        with torch.device("meta"):
            auto = getattr(transformers, name)
            return auto.from_config(config.get_text_config() if text else config)  # type: ignore[no-any-return]
    except (OSError, ValueError, KeyError, ImportError, AttributeError):
        return None


@functools.lru_cache(maxsize=2)
def mixtral(layers: int) -> nn.Module:
    """A Mixtral's modules: the model of adapters whose names say block_sparse_moe, where the base is not at hand."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=layers,
        num_attention_heads=1,
        num_key_value_heads=1,
        num_local_experts=1,
        vocab_size=8,
    )
    with torch.device("meta"):
        return MixtralForCausalLM(config)


def converted(
    model: nn.Module, names: Names, config: dict[str, Any], file: SafetensorsFile
) -> tuple[Names, dict[str, Any], SafetensorsFile]:
    """What PEFT makes of names, configuration and tensors when it loads them into the model; values are read only where it joins some."""
    import torch
    from peft import LoraConfig
    from peft.utils import transformers_weight_conversion as peft_conversion

    known = {field: value for field, value in config.items() if field != "auto_mapping"}
    given = LoraConfig(**known)
    keys = list(names)
    joined = any(EXPERT.match(module) for module in lora_modules(keys))
    if joined:
        tensors = {name: torch.from_numpy(float_arrays.read(file, key)) for name, key in names.items()}
    else:
        tensors = {name: torch.tensor([float(i)], dtype=torch.float64) for i, name in enumerate(keys)}
    try:
        peft_conversion.convert_peft_config_for_transformers(given, model, None)
        found = peft_conversion.convert_peft_adapter_state_dict_for_transformers(model, given, tensors)
    except ValueError as error:
        raise SalsaError(f"{file.path}: PEFT cannot convert it to today's {type(model).__name__}: {error}") from None
    if not joined:
        return {name: names[keys[int(value)]] for name, value in found.items()}, config, file
    changed = {field: as_list(vars(given)[field]) for field in DEFAULTS if field in vars(given)}
    arrays = {name: np.ascontiguousarray(value.numpy()) for name, value in found.items()}
    return {name: name for name in arrays}, config | changed, ConvertedFile(file.path, arrays)


def as_list(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else value
