"""Soups of adapters that are on a PEFT model already: `attach`, and PEFT's call `add_weighted_adapter`.

    reference = attach(model, ["seed-0", "seed-1"])           # adapter "soup", frozen; the active adapter stays active
    attach(model, ["seed-0", "policy"], [0.3, 0.7], name="mix", sync_every=5)    # a moving reference for a trainer

The soup is the exact mean of the deltas, as that of folders (soup/average.py), at the time of the call.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils.other import ModulesToSaveWrapper

from salsa_peft.models.adapters import lora
from salsa_peft.models.adapters.names import PREFIX
from salsa_peft.soup import arrays
from salsa_peft.soup.live_members import check_model, read_members
from salsa_peft.soup.lora import non_lora
from salsa_peft.soup.lora.config import config_fields
from salsa_peft.soup.lora.factors import Stacks
from salsa_peft.soup.lora.read import TARGETS
from salsa_peft.soup.lora.stacked_adapter import add_adapter, live_factors
from salsa_peft.soup.lora.svd import moments, squared_norm
from salsa_peft.soup.lora.write import output_ranks, reduced
from salsa_peft.soup.options import requested_weights
from salsa_peft.soup.summary import relative_norm
from salsa_peft.utils.errors import SalsaError, require

if TYPE_CHECKING:
    from peft import PeftModel

    from salsa_peft.soup.lora.tensors import Member


@dataclass(eq=False)
class AttachedSoup:
    """A soup of adapters of one model, attached to this model as the adapter `name`."""

    model: PeftModel = field(repr=False)
    adapters: list[str]
    """The members, as the model calls them; without those of weight 0."""
    weights: list[float]
    name: str
    rank: int | None = None
    """Rank to which modules of a higher stacked rank are reduced. None: the soup is exact."""
    sync_every: int | None = None
    """As a trainer's reference: number of updates (PPO) or optimizer steps (TRL) between refreshes. None: never."""
    error: float | None = None
    """With `rank`: the share of the delta's norm that the reduction cut off in the last refresh, from 0 to 1."""

    def refresh(self) -> None:
        """Compute the soup again from what its members are now, in place; only the values of its weights change."""
        check_model(self.model, self.adapters)
        members = read_members(self.model, self.adapters)
        self._write(members, Stacks(members))

    @torch.no_grad()
    def _write(self, members: list[Member], stacks: Stacks) -> None:
        lost = norm = 0.0
        with arrays.one_thread():
            for module, rank in output_ranks(stacks.shapes, self.rank, warn=False).items():
                stack, shape = stacks[module], stacks.shapes[module]
                A, B = stack.A, stack.weighted_B(self.weights)
                if self.rank is not None:
                    norm += sum(squared_norm(*block) for block in stack._replace(B=B).each_block())
                if rank < shape.rank:
                    blocks = [moments(*block) for block in stack.each_block()]
                    A, B, cut, _ = reduced(stack, blocks, shape, self.weights, rank)
                    lost += cut
                values = (A, shape.whole_B(B), stack.weighted_bias(self.weights))
                parameters = live_factors(self.model, stacks, module, self.name, rank)
                for parameter, value in zip(parameters, values, strict=True):
                    if parameter is not None and value is not None:
                        parameter.copy_(torch.from_numpy(value).reshape(parameter.shape))
        own = {PREFIX + name: torch.from_numpy(non_lora.mean(members, name, self.weights))
               for name in non_lora.parameter_names(members)}  # fmt: skip
        if own:
            set_peft_model_state_dict(self.model, own, adapter_name=self.name)
        self.error = relative_norm(lost, norm) if self.rank is not None else None


def attach(
    model: PeftModel,
    adapters: Sequence[str],
    weights: Sequence[float] | None = None,
    name: str = "soup",
    *,
    rank: int | None = None,
    dtype: str | torch.dtype | None = None,
    normalize: bool = False,
    trainable: bool = False,
    overwrite: bool = False,
    sync_every: int | None = None,
) -> AttachedSoup:
    """Average adapters of a PEFT model and add the result to the model as a new, inactive adapter.

    weights: one per member, by default uniform; a sum other than 1 scales the deltas. Members may differ in rank,
    alpha, rsLoRA, patterns and modules, and may be in training: the soup is a snapshot, which AttachedSoup.refresh
    renews. rank: reduce modules with a higher stacked rank (Σ r_i) by SVD. dtype: of the soup's weights; by default
    float32, or float64 if a member is. They are on the devices of the base's layers. normalize: divide the weights by
    their sum. trainable: the soup's weights require gradients. overwrite: replace the adapter `name`, in place if it
    has the soup's layout. sync_every: for a reference that follows its members during training.

    Neither the active adapter nor the requires_grad of other weights changes. Raises SalsaError, before the model is
    changed, for adapters that have no exact mean (DoRA, PiSSA …) or do not fit together, and for a name that is taken.
    """
    check_model(model, adapters)
    asked = requested_weights(weights, len(adapters), normalize)
    check_name(model, name, overwrite)
    require(
        sync_every is None or sync_every >= 1, f"sync_every: {sync_every} is below 1; use a positive number or None"
    )
    used = [i for i, weight in enumerate(asked) if weight]  # members of weight 0 would only add rank
    soup = AttachedSoup(model, [adapters[i] for i in used], [asked[i] for i in used], name, rank, sync_every)
    members = read_members(model, soup.adapters)
    non_lora.check_sum(members, soup.weights)
    stacks = Stacks(members)
    stacks.check_saveable()
    ranks = output_ranks(stacks.shapes, rank)
    wanted = as_dtype(dtype) or (torch.float64 if stacks.dtype == "F64" else torch.float32)
    place(model, name, members, stacks, ranks, wanted, trainable=trainable)
    soup._write(members, stacks)
    return soup


def place(
    model: PeftModel, name: str, members: list[Member], stacks: Stacks, ranks: Mapping[str, int], dtype: torch.dtype, *,
    trainable: bool,
) -> None:  # fmt: skip
    """Make the adapter `name` one that can hold the soup: add it, or keep or replace the one of that name."""
    fields = config_fields(members, stacks, dict(ranks))
    if name in model.peft_config and not has_layout(model, stacks, ranks, name, fields):
        delete_adapter(model, name)
    if name not in model.peft_config:
        add_adapter(model, name, stacks, fields)
    for module in stacks:
        for parameter in live_factors(model, stacks, module, name, ranks[module]):
            if parameter is not None:
                parameter.data = parameter.data.to(dtype)
    model.peft_config[name].inference_mode = not trainable
    for parameter in parameters(model, name):
        parameter.requires_grad_(trainable)


def check_name(model: PeftModel, name: str, overwrite: bool) -> None:
    """Raise SalsaError unless `name` can be the name of a new adapter, or of one that may be overwritten."""
    require(
        isinstance(name, str) and bool(name) and "." not in name,
        f"name: {name!r} cannot be an adapter's name; use a name without dots",
    )
    require(
        overwrite or name not in model.peft_config,
        f"name: the model already has an adapter {name!r}; use another name, or pass overwrite=True to replace it",
    )


def as_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """The torch dtype with a name such as "bfloat16". Raises SalsaError for a dtype that factors cannot have."""
    names = ("float64", "float32", "bfloat16", "float16")
    short = None if dtype is None else str(dtype).removeprefix("torch.")
    require(short is None or short in names, f"dtype: {dtype} is not supported; use one of {', '.join(names)}")
    return None if short is None else getattr(torch, short)  # type: ignore[no-any-return]


def has_layout(
    model: PeftModel, stacks: Stacks, ranks: Mapping[str, int], name: str, fields: Mapping[str, Any]
) -> bool:
    """Whether the adapter `name` has the modules, ranks and options of the soup with the configuration `fields`."""
    config = model.peft_config[name]
    options = fields.keys() - {*TARGETS, "peft_type", "inference_mode"}
    layers = [layer for layer in lora.tuner_layers(model) if isinstance(layer, LoraLayer) and name in layer.r]
    if len(layers) != len(stacks) or any(vars(config)[option] != fields[option] for option in options):
        return False
    try:
        for module in stacks:
            live_factors(model, stacks, module, name, ranks[module])
    except SalsaError:
        return False
    return True


def delete_adapter(model: PeftModel, name: str) -> None:
    """Delete an inactive adapter. PEFT's own call may change which weights require gradients."""
    require(
        name not in model.active_adapters,
        f"name: adapter {name!r} is active, and the soup has other ranks or modules, so it cannot be replaced in place;"
        " activate another adapter with model.set_adapter first",
    )
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.delete_adapter(name)
    for parameter, required in trainable:
        parameter.requires_grad_(required)


def parameters(model: PeftModel, name: str) -> Iterator[torch.nn.Parameter]:
    """Yield the parameters of an adapter, with its copies of modules of the base (modules_to_save)."""
    yield from lora.parameters(model, name)
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper) and name in module.modules_to_save:
            yield from module.modules_to_save[name].parameters()


def add_weighted_adapter(
    model: PeftModel,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str = "svd",
    svd_rank: int | None = None,
    svd_clamp: float | None = None,
    svd_full_matrices: bool = True,
    svd_driver: str | None = None,
    density: float | None = None,
    majority_sign_method: str = "total",
    *,
    overwrite: bool = False,
) -> AttachedSoup:
    """`attach` with the arguments of PEFT's `model.add_weighted_adapter(adapters, weights, adapter_name, …)`.

    combination_type: "cat" is the exact sum Σ w_i · delta_i, of rank Σ r_i; "svd" (PEFT's default) is its best
    approximation of rank `svd_rank`, by default the highest rank of a member. svd_full_matrices and svd_driver choose
    how PEFT computes the SVD, and are accepted. Raises SalsaError for the types that are not the weighted sum of the
    deltas, and for a name that is taken, with which PEFT's call returns without doing anything.
    """
    if combination_type not in ("cat", "svd"):
        why = NOT_A_SUM.get(combination_type.removesuffix("_svd"), "is unknown")
        raise SalsaError(
            f"combination_type: {combination_type!r} {why}; use 'cat' for the exact sum of the deltas, 'svd' for its"
            " best approximation of a lower rank, or PEFT's own model.add_weighted_adapter"
        )
    for option, value, default in (
        ("svd_clamp", svd_clamp, None),
        ("density", density, None),
        ("majority_sign_method", majority_sign_method, "total"),
    ):
        require(value == default, f"{option}: {value!r} would change the sum of the deltas; leave it out")
    require(
        combination_type == "svd" or svd_rank is None,
        f"svd_rank: {svd_rank} has no effect with combination_type 'cat', which is exact; use 'svd', or leave it out",
    )
    check_model(model, adapters)
    rank = svd_rank
    if combination_type == "svd" and rank is None:
        configs = [config for name in adapters if isinstance(config := model.peft_config[name], LoraConfig)]
        rank = max((r for config in configs for r in (config.r, *(config.rank_pattern or {}).values())), default=None)
    return attach(model, adapters, weights, adapter_name, rank=rank, overwrite=overwrite)


NOT_A_SUM = {
    "linear": "averages A and B apart, which is not the mean of the deltas B·A",
    **dict.fromkeys(("ties", "dare_ties", "dare_linear", "magnitude_prune"), "drops a part of the deltas"),
}
"""PEFT's other combination types, without the suffix _svd → why they are no weighted sum."""
