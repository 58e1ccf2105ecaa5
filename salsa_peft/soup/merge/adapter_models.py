"""Lets PEFT merge an adapter a few modules at a time, in a model whose base weights take no memory.

The base's values are put into the modules to merge, PEFT merges the modules, and the merged values are taken out again.
So tied weights, DoRA, fused attention projections and experts are merged exactly as PEFT merges them.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from salsa_peft.models.adapters.names import ORIGINAL, SAVED, TOKENS
from salsa_peft.utils.errors import SalsaError, require

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedConfig, PreTrainedModel

ReadParameter = Callable[[str], torch.Tensor]
"""A function from a parameter's name in the model to its value in the base."""
ANOTHER = "the adapter was trained on a different base; name that base with --base"
ADAPTER = "default"
INSIDE = "base_model.model."
"""The prefix that PEFT adds to the names of the base's modules."""


def blank_model(architecture: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """A model whose parameters take no memory: each is one float32 zero, expanded to its shape."""
    from transformers.initialization import meta_device_safe_creation_ops, no_init_weights

    with torch.device("meta"), no_init_weights(), meta_device_safe_creation_ops():
        model = architecture(config)
    model.tie_weights()
    blanks: dict[torch.nn.Parameter, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, given in module._parameters.items():
            if given is not None:
                if given not in blanks:
                    blanks[given] = torch.nn.Parameter(torch.zeros(()).expand(given.shape), requires_grad=False)
                module._parameters[name] = blanks[given]
    return model


class WrappedModule(NamedTuple):
    """A module of the base that PEFT wrapped."""

    module: torch.nn.Module
    parameters: list[str]
    """First names of the base's parameters in the module, as in AdapterModel.first."""
    rank: int
    """The rank of the module's LoRA; 0 if it has no LoRA."""
    saved: bool
    """Whether the module is in modules_to_save, so that the adapter's values replace the base's."""


class AdapterModel:
    """An adapter that PEFT loaded into a blank model. Raises SalsaError if PEFT cannot load all tensors."""

    def __init__(
        self, path: Path, config: LoraConfig, tensors: Mapping[str, torch.Tensor], model: PreTrainedModel
    ) -> None:
        self.path = path
        self.first: dict[str, str] = {}
        """Name of a parameter → the parameter's first name in the model (a tied parameter has several names)."""
        self.replaced: dict[str, torch.Tensor] = {}
        """First name of a parameter → the adapter's value, which replaces the base's."""
        firsts: dict[int, str] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self.first[name] = firsts.setdefault(_address(parameter), name)
        self._firsts, self._blanks = firsts, {first: model.get_parameter(first) for first in firsts.values()}
        self.wrapped = self._load(config, tensors, model)

    def _load(
        self, config: LoraConfig, tensors: Mapping[str, torch.Tensor], model: PreTrainedModel
    ) -> dict[str, WrappedModule]:
        from peft import get_peft_model, set_peft_model_state_dict
        from peft.tuners.lora import LoraLayer
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the base's name, and tied weights (Plan warns about these)
            try:
                loaded = get_peft_model(model, config, ADAPTER, autocast_adapter_dtype=False, low_cpu_mem_usage=True)
                places = {
                    name for name, p in loaded.named_parameters(remove_duplicate=False) if _address(p) in self._firsts
                }
                result: Any = set_peft_model_state_dict(loaded, dict(tensors), ADAPTER, low_cpu_mem_usage=True)
            except (ValueError, RuntimeError, KeyError, TypeError, NotImplementedError) as error:
                raise SalsaError(f"{self.path}: {_error_line(error, type(model).__name__)}") from error
        odd = next((key for key in sorted(result.unexpected_keys) if not _is_copy(key, tensors)), None)
        require(odd is None, f"{self.path}: {odd} is not in {type(model).__name__}, the model of the base: {ANOTHER}")
        now = dict(loaded.named_parameters(remove_duplicate=False))
        empty = next((name for name, parameter in now.items() if parameter.is_meta), None)
        require(
            empty is None,
            f"{self.path}: there are no values for {empty}, which adapter_config.json requires: the file is incomplete,"
            f" or {ANOTHER}",
        )
        inner: torch.nn.Module = loaded.get_base_model()
        self._take_replaced(inner, places, now)
        found: dict[str, WrappedModule] = {}
        kinds: tuple[type[torch.nn.Module], ...] = (BaseTunerLayer, AuxiliaryTrainingWrapper)  # type: ignore[assignment]
        for name, module in inner.named_modules():
            if isinstance(module, kinds) and not any(name.startswith(f"{outer}.") for outer in found):
                inside = {self._firsts[_address(p)] for p in module.parameters() if _address(p) in self._firsts}
                ranks = (layer.r[ADAPTER] for layer in module.modules() if isinstance(layer, LoraLayer))
                saved = isinstance(module, ModulesToSaveWrapper)
                found[name] = WrappedModule(module, sorted(inside), max(ranks, default=0), saved)
        return found

    def _take_replaced(self, inner: torch.nn.Module, places: Iterable[str], now: Mapping[str, torch.Tensor]) -> None:
        """Move the values that replace parameters of the base to `replaced`; restore the blank parameters."""
        for place in places:
            parameter = now[place]
            if _address(parameter) in self._firsts:
                continue
            holder, _, leaf = place.removeprefix(INSIDE).rpartition(".")
            first = self.first[_plain(place.removeprefix(INSIDE))]
            self.replaced[first] = parameter.detach()
            inner.get_submodule(holder)._parameters[leaf] = self._blanks[first]

    def touched(self) -> dict[str, list[str]]:
        """Each parameter that the adapter may change → parameters to merge with it, all by first name."""
        found = {first: [first] for first in self.replaced}
        for wrapped in self.wrapped.values():
            for first in wrapped.parameters:
                found.setdefault(first, []).extend(wrapped.parameters)
        return found

    def replaces(self, name: str) -> bool:
        """Whether the adapter replaces the base's value of a parameter, instead of changing it."""
        first = self.first[name]
        return first in self.replaced or any(one.saved and first in one.parameters for one in self.wrapped.values())

    def tied_deltas(self, names: Sequence[str]) -> bool:
        """Whether LoRA is on a module that shares a parameter, so that its merge changes other modules too."""
        shared = {self.first[name] for name in names if name != self.first[name]}
        return any(w.rank > 0 and shared & set(w.parameters) for w in self.wrapped.values())

    def touches(self, names: Sequence[str]) -> bool:
        """Whether the adapter may change any of these parameters."""
        firsts = {self.first[name] for name in names}
        return bool(firsts & self.replaced.keys()) or bool(self._inside(firsts))

    def low_rank(self, names: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Factors (rows, r), (r, columns) whose product is all that the merge adds; None if it changes more."""
        firsts = {self.first[name] for name in names}
        inside = list(self._inside(firsts).values())
        if len(names) != 1 or len(inside) != 1 or firsts & self.replaced.keys() or not _is_plain(inside[0].module):
            return None
        layer: Any = inside[0].module
        if ADAPTER in layer.lora_embedding_A:
            A, B, across = layer.lora_embedding_A[ADAPTER], layer.lora_embedding_B[ADAPTER], True
        else:
            A, B, across = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight, layer.fan_in_fan_out
        B = B.detach() * layer.scaling[ADAPTER]
        return (A.detach().T.contiguous(), B.T.contiguous()) if across else (B, A.detach())

    def _inside(self, firsts: Container[str]) -> dict[str, WrappedModule]:
        return {name: one for name, one in self.wrapped.items() if any(first in firsts for first in one.parameters)}

    def merged_values(self, names: Sequence[str], read: ReadParameter, untie: bool = False) -> dict[str, torch.Tensor]:
        """The merged values of parameters, in float32.

        names: all parameters that must be merged together. Tied parameters are merged as one tensor, as in PEFT, or as
        separate tensors with `untie`. read: gives a parameter's value in the base, with zeros for added tokens.
        """
        inside = self._inside({self.first[name] for name in names})
        filled: dict[str, torch.nn.Parameter] = {}
        for name in names:
            first = self.first[name]
            if (key := name if untie else first) not in filled:
                value = self.replaced.get(first)
                value = read(first).float() if value is None else value.float()
                filled[key] = torch.nn.Parameter(value.clone(), requires_grad=False)
        for name, wrapped in inside.items():
            for path, module in wrapped.module.named_modules():
                for leaf, given in module._parameters.items():
                    if given is not None and _address(given) in self._firsts:
                        own = ".".join(part for part in (name, _plain(path), leaf) if part)
                        module._parameters[leaf] = filled[own if untie else self.first[own]]
        values = {name: filled[name if untie else self.first[name]].detach() for name in names}
        for name, wrapped in inside.items():
            for leaf, parameter in self._unloaded(name, wrapped.module).named_parameters(remove_duplicate=False):
                if (own := f"{name}.{leaf}") in values:
                    values[own] = parameter.detach()
        return values

    def _unloaded(self, name: str, module: Any) -> torch.nn.Module:
        """The module without PEFT's wrapper, after PEFT merged the adapter into it."""
        from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper
        from peft.utils.other import AuxiliaryTrainingWrapper

        try:
            if isinstance(module, AuxiliaryTrainingWrapper | MultiheadAttention | ParamWrapper):
                found = module.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
            else:
                module.merge(safe_merge=False, adapter_names=None)
                found = module.get_base_layer()
        except (ValueError, RuntimeError, NotImplementedError) as error:
            line = " ".join(str(error).split())
            raise SalsaError(
                f"{self.path}: PEFT cannot merge {name} ({line:.300}); average the adapters without --merge"
            ) from error
        return found  # type: ignore[no-any-return]


def _address(parameter: torch.Tensor) -> int:
    """The address of a parameter's memory, which a new object for it keeps. 0 for a meta tensor."""
    return 0 if parameter.is_meta else parameter.untyped_storage().data_ptr()


def _error_line(error: Exception, model: str) -> str:
    """An error of PEFT or torch about an adapter that does not fit a model, as one line."""
    line = " ".join(str(error).split())
    if found := re.search(r"size mismatch for (\S+): .*?Size\(\[(.*?)\]\).*?Size\(\[(.*?)\]\)", line):
        return f"{found[1]} has shape [{found[2]}], but [{found[3]}] in {model}, the model of the base: {ANOTHER}"
    if line.startswith("Target modules"):
        return f"its target_modules match nothing in {model}, the model of the base: {ANOTHER}"
    return f"PEFT cannot load the adapter into {model}, the model of the base: {line:.300}"


def _is_copy(key: str, tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether a tensor is a second copy that PEFT saves but does not read (modules_to_save, tied tokens)."""
    if not any(part in key for part in (SAVED, ORIGINAL, TOKENS)):
        return False
    leaf = key.rpartition(".")[2]
    others = (tensor for other, tensor in tensors.items() if other != key and other.endswith(leaf))
    return any(torch.equal(tensors[key], tensor) for tensor in others)


def _plain(name: str) -> str:
    """A parameter's name without the parts that PEFT's wrappers add."""
    parts = name.split(".")
    return ".".join(part for part in parts if part not in ("base_layer", "original_module", "token_adapter"))


def _is_plain(module: torch.nn.Module) -> bool:
    """Whether merging a LoRA layer only adds scaling · B · A to the layer's weight, a matrix."""
    from peft.tuners.lora import Embedding, Linear

    return (
        type(module) in (Linear, Embedding)
        and ADAPTER not in module.lora_variant  # type: ignore[operator]
        and not module.lora_bias[ADAPTER]  # type: ignore[index]
    )
