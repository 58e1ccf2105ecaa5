"""Where an attached soup's factors are in a live PeftModel: of layers, of experts whose parameters PEFT wraps, of an attention."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from salsa_peft.soup.lora.factors import Stacks
from salsa_peft.utils.errors import SalsaError, require

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn


def live_factors(model: PeftModel, stacks: Stacks, module: str, adapter_name: str) -> tuple[Any, Any, Any]:
    """The live parameters A, B and, with lora_bias, B's bias (else None), checked as `layer_of` does."""
    layer = layer_of(model, stacks, module, adapter_name)
    if adapter_name in layer.lora_embedding_B:
        return layer.lora_embedding_A[adapter_name], layer.lora_embedding_B[adapter_name], None
    B = layer.lora_B[adapter_name]
    return layer.lora_A[adapter_name].weight, B.weight, B.bias


def layer_of(model: PeftModel, stacks: Stacks, module: str, adapter_name: str) -> Any:
    """The live layer that holds this soup's adapter; refused where it is another adapter, or merged into the base."""
    layer: Any = find_layer(model, stacks, module)
    if adapter_name not in model.peft_config or adapter_name not in layer.r:
        raise SalsaError(f"{module} has no adapter {adapter_name!r}: attach this soup under that name first")
    if adapter_name in layer.lora_embedding_B:
        shapes = [tuple(half[adapter_name].shape) for half in (layer.lora_embedding_A, layer.lora_embedding_B)]
    else:
        shapes = [tuple(half[adapter_name].weight.shape) for half in (layer.lora_A, layer.lora_B)]
    shape = stacks.shapes[module]
    expected = list(shape.saved(shape.rank))
    require(
        shapes == expected,
        f"{module}: adapter {adapter_name!r} has factors {shapes}, expected {expected}: of another soup or base",
    )
    require(
        adapter_name not in layer.merged_adapters,
        f"{module}: adapter {adapter_name!r} is merged into the base: unmerge it, its weights would have no effect",
    )
    return layer


def find_layer(model: PeftModel, stacks: Stacks, module: str) -> Any:
    """PEFT's wrapper around a module, or, of a parameter, the one of those around its module that is on it."""
    from peft.tuners.lora.layer import ParamWrapper

    shape = stacks.shapes[module]
    layer: Any = walk(model.get_base_model(), shape.holder)
    for _ in range(stacks.depth(module) if shape.parameter == "" else 0):
        layer = layer.base_layer
    while shape.parameter and isinstance(layer, ParamWrapper) and layer.parameter_name != shape.parameter:
        layer = layer.base_layer
    return layer


def walk(model: nn.Module, path: str) -> nn.Module:
    """A submodule, also of a layer that PEFT has wrapped, whose children are those of the layer inside."""
    found: Any = model
    for part in path.split("."):
        while part not in found._modules and "base_layer" in found._modules:
            found = found.base_layer
        if part not in found._modules:
            raise SalsaError(f"the model has no module {path}: the soup is of another base")
        found = found._modules[part]
    return found  # type: ignore[no-any-return]


def is_there(model: PeftModel, stacks: Stacks, module: str) -> bool:
    """Whether the model has the module or parameter that the soup has factors for."""
    shape = stacks.shapes[module]
    try:
        found: Any = walk(model.get_base_model(), shape.holder)
    except SalsaError:
        return False
    while "base_layer" in found._modules:
        found = found.base_layer
    return not shape.parameter or shape.parameter in found._parameters


def same_parameters(model: PeftModel, stacks: Stacks, wanted: list[str] | None) -> list[str] | None:
    """target_parameters for another adapter on a model: PEFT asks that they are those of the adapters that it has already.

    Raises SalsaError where these lack one that the soup has factors for.
    """
    from peft import LoraConfig

    configs = [config for config in model.peft_config.values() if isinstance(config, LoraConfig)]
    given = next((config.target_parameters for config in configs if config.target_parameters), None)
    if not wanted or not given:
        return wanted
    for name, shape in stacks.shapes.items():
        known = any(name == target or name.endswith(f".{target}") for target in given)
        require(
            not shape.parameter or known,
            f"{name} is a parameter that the soup changes, and the model's adapters have target_parameters {sorted(given)}: PEFT has the same "
            "for all adapters of a model; load the policy with those of the soup",
        )
    return sorted(given)
