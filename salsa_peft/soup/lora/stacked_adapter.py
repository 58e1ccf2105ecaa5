"""Several LoRA adapters of one base as one adapter of rank Σ r_i that can be re-weighted in place.

    delta = Σ_i w_i · scaling_i · B_i · A_i        scaling_i = alpha_i / r_i, with rsLoRA alpha_i / √r_i

The mean of products is not the product of means, so the factors are stacked, not averaged: A = [A_0; A_1; …] and B =
[w_0·scaling_0·B_0, w_1·scaling_1·B_1, …] multiply to the weighted delta up to float32 rounding. Members may differ in
rank, alpha, rsLoRA, patterns and modules. Parameters without LoRA factors are averaged directly
(soup/lora/non_lora.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from salsa_peft.soup import arrays
from salsa_peft.soup.arrays import Array
from salsa_peft.soup.checkpoints.read import check_weights, default_names
from salsa_peft.soup.lora import non_lora
from salsa_peft.soup.lora.config import config_fields
from salsa_peft.soup.lora.factors import Stacks
from salsa_peft.soup.lora.members import check_one_base, unify_layouts
from salsa_peft.soup.lora.svd import moments
from salsa_peft.soup.lora.tensors import Member, read_member
from salsa_peft.soup.lora.write import save
from salsa_peft.soup.strategies.elementwise import Elementwise
from salsa_peft.utils.errors import SalsaError, require

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from torch import nn

SCORE_HEAD = "score.weight"


class StackedAdapter:
    """Several LoRA adapters stacked into one; a member's weight scales the member's columns of B."""

    def __init__(self, members: Sequence[Member], stacks: Stacks) -> None:
        self.members = tuple(members)
        self.stacks = stacks
        """Module → stacked factors, read from the files on access until the soup is attached to a model."""

    @classmethod
    def load(
        cls, members: Sequence[Path | str], names: Sequence[str] | None = None, *, same_base: bool = False
    ) -> StackedAdapter:
        """Read the headers of local PEFT folders. Raises SalsaError for adapters that cannot be averaged.

        names: the members' names in summaries (default: the folders' names). same_base: the caller asserts that the
        members share a base, although fingerprints or names of the base may differ.
        """
        require(bool(members), "members: none given; a soup needs at least one adapter folder")
        folders = [Path(member) for member in members]
        names = default_names(folders, names)
        read = unify_layouts([read_member(folder, name) for folder, name in zip(folders, names, strict=True)])
        check_one_base(read, same_base)
        non_lora.check_same(read)
        return cls(read, Stacks(read))

    def check(self, weights: Sequence[float]) -> list[float]:
        """Return the weights as floats. Raises SalsaError if their number, values or sum are not allowed."""
        checked = check_weights(weights, len(self.members))
        non_lora.check_sum(self.members, checked)
        return checked

    def save(self, folder: Path, weights: Sequence[float], *, layers: Mapping[str, Sequence[float]] | None = None,
             merge: Elementwise | None = None, strategy: str = "linear", rank: int | None = None, dtype: str | torch.dtype | None = None,
             progress: Callable[[int, int], None] | None = None, more: Mapping[str, Any] | None = None) -> dict[str, Any]:  # fmt: skip
        """Write the soup as a PEFT adapter folder. Returns its summary, which is also written to soup.json.

        layers: module → weights of its own; None if all modules have `weights`. merge: an element-wise
        strategy, whose dense result is reduced to `rank`, by default Σ r_i. rank: reduce modules with a higher rank to this rank by SVD; the summary's `error` is the resulting error.
        dtype: dtype of the factors (default: one that represents all members' factors). progress: called with the
        number of finished modules and of all modules. more: further entries of the summary.
        """
        if layers is not None:
            non_lora.check_frozen(self.members, "per: layer")
        if merge is not None:
            non_lora.check_frozen(self.members, f"strategy {strategy}")
            self.stacks.check_no_bias(f"strategy {strategy}")
        given = check_weights(weights, len(self.members)) if layers or merge else self.check(weights)
        return save(
            self.members, self.stacks, Path(folder), given, layers or dict.fromkeys(self.stacks, given), merge=merge, strategy=strategy,
            rank=rank, dtype=None if dtype is None else str(dtype), progress=progress, more=more or {},
        )  # fmt: skip

    def gram(self) -> torch.Tensor:
        """⟨delta_i, delta_j⟩ summed over the modules with LoRA: (members, members), float64."""
        import torch

        return torch.from_numpy(sum(self.grams().values()))

    def grams(self) -> dict[str, Array]:
        """⟨delta_i, delta_j⟩ of each module with LoRA: (members, members), float64."""
        n = len(self.members)
        with arrays.one_thread():
            return {
                module: stack.gram([moments(A, B) for A, B in stack.each_block()], n)
                for module, stack in self.stacks.items()
            }

    def norm(self, weights: Sequence[float]) -> float:
        """Norm of the weighted delta, with all modules with LoRA as one vector."""
        import torch

        w = torch.tensor(self.check(weights), dtype=torch.float64)
        return math.sqrt(max(float(w @ self.gram() @ w), 0.0))

    def attach(self, model: PeftModel, adapter_name: str, weights: Sequence[float]) -> None:
        """Add the soup to a PEFT model in memory, as a frozen, inactive float32 adapter.

        The factors stay in memory. The active adapter and all requires_grad flags stay as they are. A score head is not
        attached (see models/adapters/lora.py). Raises SalsaError if the members trained parameters of the base itself,
        because all adapters of a model share one base.
        """
        import torch

        self.check(weights)
        self.stacks.check_saveable()
        self.stacks.check_not_alora()
        self._check_shared(model)
        if adapter_name in model.peft_config:
            raise SalsaError(f"the model already has an adapter {adapter_name!r}; delete it, or use another name")
        missing = next((module for module in self.stacks if not has_module(model, self.stacks, module)), None)
        require(
            missing is None,
            f"{self.members[0].folder} has LoRA on {missing}, which the model does not have; load the base that the"
            " soup was trained on",
        )
        self.stacks.load_in_memory()
        ranks = {module: shape.rank for module, shape in self.stacks.shapes.items()}
        fields = config_fields(self.members, self.stacks, ranks) | {"modules_to_save": None, "bias": "none"}
        add_adapter(model, adapter_name, self.stacks, fields)
        with torch.no_grad():
            for module, stack in self.stacks.items():
                A = live_factors(model, self.stacks, module, adapter_name)[0]
                A.copy_(torch.from_numpy(stack.A).reshape(A.shape))
        self.set_weights(model, adapter_name, weights)

    def _check_shared(self, model: PeftModel) -> None:
        """Raise SalsaError if members trained parameters of the base itself, other than a score head."""
        import torch

        own = dict(model.get_base_model().named_parameters())
        for name in non_lora.parameter_names(self.members):
            if name == SCORE_HEAD:
                continue
            module, _, leaf = name.rpartition(".")
            parameter = own.get(name, own.get(f"{module}.base_layer.{leaf}"))
            same = False
            if parameter is not None and non_lora.frozen(self.members, name):
                n = len(self.members)
                values = torch.from_numpy(non_lora.mean(self.members, name, [1 / n] * n))
                same = values.shape == parameter.shape and torch.equal(values.to(parameter), parameter)
            require(
                same,
                f"{non_lora.members_with(self.members, name)[0].folder} holds trained values of {name}, a parameter of"
                " the base. Several adapters share this base, so its own values cannot change; save the soup and open"
                " it with PEFT on a base of its own",
            )

    def set_weights(self, model: PeftModel, adapter_name: str, weights: Sequence[float]) -> None:
        """Give an attached soup new weights, by rescaling the columns of its lora_B in place."""
        import torch

        weights = self.check(weights)
        with torch.no_grad():
            for module, stack in self.stacks.items():
                _, B, bias = live_factors(model, self.stacks, module, adapter_name)
                scaled = self.stacks.shapes[module].whole_B(stack.weighted_B(weights))
                B.copy_(torch.from_numpy(scaled).reshape(B.shape))
                if bias is not None and (total := stack.weighted_bias(weights)) is not None:
                    bias.copy_(torch.from_numpy(total))


def add_adapter(model: PeftModel, adapter_name: str, stacks: Stacks, fields: Mapping[str, Any]) -> None:
    """Add an adapter with the configuration `fields` to a model, frozen. What is active and trainable stays so."""
    from peft import LoraConfig, PeftModel
    from peft.tuners.lora import LoraLayer

    targets = shared_target_parameters(model, stacks, fields["target_parameters"])
    given = {name: fields[name] for name in fields if name != "peft_type"} | {"target_parameters": targets}
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    # not the method of PeftModelForSequenceClassification, which adds its heads to modules_to_save a second time
    PeftModel.add_adapter(model, adapter_name, LoraConfig(**given))
    for layer in model.modules():
        if isinstance(layer, LoraLayer) and adapter_name in layer.r:
            # PEFT activates "default" in a layer that it has just wrapped, even if the new adapter has that name
            layer.set_adapter(model.active_adapters, inference_mode=True)
    for parameter, requires_grad in trainable:
        parameter.requires_grad_(requires_grad)


def live_factors(
    model: PeftModel, stacks: Stacks, module: str, adapter_name: str, rank: int | None = None
) -> tuple[Any, Any, Any]:
    """The parameters A, B and, with lora_bias, the bias of B (else None) of an attached soup's module.

    rank: the rank to which the soup was reduced. Raises SalsaError if the layer has no such adapter, if the adapter's shapes are not those of the soup, or if the
    adapter is merged into the base.
    """
    layer = find_layer(model, stacks, module)
    if adapter_name not in model.peft_config or adapter_name not in layer.r:
        raise SalsaError(f"{module} has no adapter {adapter_name!r}; attach this soup under that name first")
    bias = None
    if adapter_name in layer.lora_embedding_B:
        A, B = layer.lora_embedding_A[adapter_name], layer.lora_embedding_B[adapter_name]
    else:
        A, linear = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name]
        B, bias = linear.weight, linear.bias
    shape = stacks.shapes[module]
    shapes, expected = (tuple(A.shape), tuple(B.shape)), shape.saved(rank or shape.rank)
    require(
        shapes == expected,
        f"{module}: the factors of adapter {adapter_name!r} have the shapes {shapes}, but this soup's have"
        f" {expected}. Use the name under which this soup was attached, and a model with the soup's base",
    )
    require(
        adapter_name not in layer.merged_adapters,
        f"{module}: adapter {adapter_name!r} is merged into the base, so new weights have no effect; unmerge it first",
    )
    return A, B, bias


def find_layer(model: PeftModel, stacks: Stacks, module: str) -> Any:
    """PEFT's LoRA layer with the factors of a module or of a targeted parameter."""
    from peft.tuners.lora.layer import ParamWrapper

    shape = stacks.shapes[module]
    layer: Any = submodule(model.get_base_model(), shape.module)
    for _ in range(stacks.depth(module) if shape.parameter == "" else 0):
        layer = layer.base_layer
    while shape.parameter and isinstance(layer, ParamWrapper) and layer.parameter_name != shape.parameter:
        layer = layer.base_layer
    return layer


def submodule(model: nn.Module, path: str) -> nn.Module:
    """A submodule by its name in the base, looked up inside PEFT's wrappers."""
    found: Any = model
    for part in path.split("."):
        while part not in found._modules and "base_layer" in found._modules:
            found = found.base_layer
        if part not in found._modules:
            raise SalsaError(f"the model has no module {path}; load the base that the soup was trained on")
        found = found._modules[part]
    return found  # type: ignore[no-any-return]


def has_module(model: PeftModel, stacks: Stacks, module: str) -> bool:
    """Whether the model has the module or parameter that the soup has factors for."""
    shape = stacks.shapes[module]
    try:
        found: Any = submodule(model.get_base_model(), shape.module)
    except SalsaError:
        return False
    while "base_layer" in found._modules:
        found = found.base_layer
    return not shape.parameter or shape.parameter in found._parameters


def shared_target_parameters(model: PeftModel, stacks: Stacks, wanted: list[str] | None) -> list[str] | None:
    """target_parameters with which the soup is attached: those of the model's adapters, else the soup's.

    PEFT requires all adapters of a model to have the same target_parameters. wanted: those of the soup. Raises
    SalsaError if the target_parameters of the model's adapters lack a parameter that the soup has factors for.
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
            f"{name} has LoRA in the soup, but the adapters of the model have target_parameters {sorted(given)}. PEFT"
            " requires the same target_parameters of all adapters of a model; load the policy with those of the soup",
        )
    return sorted(given)
