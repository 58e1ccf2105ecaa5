"""Computing the base's weights with one adapter merged in, without changing the shared base."""

import copy
from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor

from salsa_peft.utils.errors import require

BASE = ".base_layer"


def merged_parameters(model: PeftModel, adapter: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the base's parameters, as (name, tensor), with `adapter` merged as by PEFT's merge_and_unload.

    Only one layer at a time is copied and merged. Raises SalsaError for an adapter that cannot be merged into the base.
    """
    base, fault = model.get_base_model(), merge_fault(model, adapter)
    require(
        fault is None,
        f"{fault}, as rollout_backend vllm needs; use rollout_backend hf, or with a quantised base"
        " rollout_options.sync=adapter",
    )
    layers = _tuner_layers(base)
    current, merged = None, {}
    for name, parameter in base.named_parameters():
        owner = next((path for path in accumulate(name.split("."), "{}.{}".format) if path in layers), None)
        if owner is None:
            yield name, parameter.data
        elif name.startswith(inside := f"{owner}{BASE * len(_wrappers(layers[owner]))}."):
            if owner != current:
                current, merged = owner, _merged(layers[owner], adapter)
            rest = name.removeprefix(inside)
            yield f"{owner}.{rest}", merged[rest]


def _wrappers(layer: Any) -> list[Any]:
    """A LoRA layer and the LoRA layers nested in it; PEFT nests one per adapted weight of stacked experts."""
    found = [layer]
    while isinstance(found[-1].base_layer, BaseTunerLayer):
        found.append(found[-1].base_layer)
    return found


@torch.no_grad()
def _merged(layer: Any, adapter: str) -> dict[str, Tensor]:
    wrappers = _wrappers(copy.deepcopy(layer))
    for wrapper in wrappers:
        wrapper.merge(adapter_names=[adapter])
    return {name: parameter.data for name, parameter in wrappers[-1].base_layer.named_parameters()}


def _tuner_layers(base: Any) -> dict[str, Any]:
    return {path: module for path, module in base.named_modules() if isinstance(module, BaseTunerLayer)}


def merge_fault(model: PeftModel, adapter: str) -> str | None:
    """Why the merged weights would not compute what the base with the adapter computes; None if they would."""
    base: Any = model.get_base_model()
    wrapped = [path for path, module in base.named_modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    bases = {path: layer.get_base_layer() for path, layer in _tuner_layers(base).items()}
    nested = [path for path, own in bases.items() if any(isinstance(m, BaseTunerLayer) for m in own.modules())]
    quantised = [path for path, own in bases.items() if not all(w.is_floating_point() for w in own.parameters())]
    if unmergeable := [*wrapped, *nested, *quantised]:
        return (
            f"{unmergeable[0]}: this layer has a trained copy, nested adapters or quantised weights, so the adapter"
            " cannot be merged into it"
        )
    embeddings = base.get_input_embeddings()
    tied = embeddings.weight is base.get_output_embeddings().weight
    if tied and isinstance(embeddings, BaseTunerLayer) and adapter in embeddings._get_available_adapters():
        return (
            "target_modules: the adapter is on input embeddings that are tied to the output embeddings, and cannot be"
            " merged into one of them alone"
        )
    return None
