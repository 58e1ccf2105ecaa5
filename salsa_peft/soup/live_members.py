"""Adapters on a PEFT model as members of a soup: their factors as the model holds them now."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.utils.other import TrainableTokensWrapper

from salsa_peft.models.adapters import lora
from salsa_peft.models.adapters.names import plain_names
from salsa_peft.soup import arrays
from salsa_peft.soup.lora import non_lora
from salsa_peft.soup.lora.factors import Stacks
from salsa_peft.soup.lora.layouts import TensorsInMemory
from salsa_peft.soup.lora.read import check_config
from salsa_peft.soup.lora.stacked_adapter import find_layer
from salsa_peft.soup.lora.tensors import Member, make_member
from salsa_peft.utils.errors import SalsaError, require

if TYPE_CHECKING:
    from torch import Tensor


def check_model(model: Any, adapters: Sequence[str]) -> None:
    """Raise SalsaError unless `model` is a PEFT model, not merged, that has each of the adapters once."""
    require(
        isinstance(model, PeftModel),
        f"model: this is a {type(model).__name__}, not a PeftModel; pass the model that PeftModel.from_pretrained or"
        " get_peft_model returned",
    )
    require(
        isinstance(adapters, list | tuple) and bool(adapters) and all(isinstance(name, str) for name in adapters),
        f"adapters: {adapters!r} is not a list of names; pass the names of adapters on the model, such as"
        f" {list(model.peft_config)[:2]}",
    )
    for name in adapters:
        near = difflib.get_close_matches(name, model.peft_config, 1)
        require(
            name in model.peft_config,
            f"adapters: the model has no adapter {name!r}, only {', '.join(map(repr, model.peft_config))}"
            + (
                f"; did you mean {near[0]!r}?" if near else f"; load it with model.load_adapter(FOLDER, {name!r}) first"
            ),
        )
        require(adapters.count(name) == 1, f"adapters: {name!r} is listed twice; give it a larger weight instead")
    offloaded = any(p.is_meta for layer in lora.tuner_layers(model) for p in layer.get_base_layer().parameters())
    require(
        not offloaded,
        "model: accelerate has offloaded layers of the base (they are on the meta device), and adapters added now would"
        " have no values there; load the model without offloading, and attach the soup before",
    )
    merged = {name for layer in lora.tuner_layers(model) for name in layer.merged_adapters}
    require(
        not merged,
        f"model: adapter {', '.join(map(repr, sorted(merged)))} is merged into the base, and another adapter would have"
        " no effect; call model.unmerge_adapter() first",
    )


def read_members(model: PeftModel, adapters: Sequence[str]) -> list[Member]:
    """The adapters as members. On the CPU their float32 and float64 arrays share the memory of the model's tensors.

    Raises SalsaError for an adapter that a soup cannot average, and for adapters that do not fit together.
    """
    members = [read_live_member(model, name) for name in adapters]
    non_lora.check_same(members)
    return members


def read_live_member(model: PeftModel, name: str) -> Member:
    """One adapter as a member. Scalings are those of the model's layers, which may differ from the configuration's."""
    config, where = model.peft_config[name], Path(f"adapter {name!r}")
    if not isinstance(config, LoraConfig):
        raise SalsaError(f"{where} is a {config.peft_type.value} adapter; only LoRA adapters can be averaged")  # type: ignore[union-attr]
    fields = check_config(where, json.loads(json.dumps(config.to_dict(), default=sorted)))
    require(
        fields["bias"] == "none",
        f"{where}: bias is {fields['bias']!r}, so it trained biases of the base, which all adapters of the model share;"
        " save the adapters and average their folders with `salsa soup`",
    )
    require(
        not fields["ensure_weight_tying"],
        f"{where}: ensure_weight_tying is True, with which PEFT does not tie the layers of every adapter of one"
        " model; save the adapters and average their folders with `salsa soup`",
    )
    check_trained_tokens(model, name)
    fields["modules_to_save"] = sorted(set(fields["modules_to_save"] or ())) or None  # PEFT repeats names
    tensors = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    file = TensorsInMemory(where, {key: as_array(tensor, f"{where}: {key}") for key, tensor in tensors.items()})
    member = make_member(name, where, fields, file, plain_names(tensors, fields, where))
    stacks = Stacks([member])
    for module, factors in member.factors.items():
        scaling = float(find_layer(model, stacks, module).scaling[name])
        member.factors[module] = factors._replace(scaling=scaling)
    return member


def check_trained_tokens(model: PeftModel, name: str) -> None:
    """Raise SalsaError if the adapter lacks an embedding's trained tokens that another adapter of the model has.

    PEFT 0.21 cannot read such an adapter: it raises a KeyError.
    """
    for path, module in model.get_base_model().named_modules():
        if not isinstance(module, TrainableTokensWrapper) or module.token_adapter.tied_adapter:
            continue
        have = list(module.token_adapter.trainable_tokens_delta)
        require(
            name in have,
            f"adapter {name!r}: it has no trainable_token_indices of {path}, but adapter {', '.join(map(repr, have))} of the"
            " model has, and PEFT cannot read the one without the other; train the same tokens in all adapters, or load"
            " the adapters to average on a model of their own",
        )


def as_array(tensor: Tensor, where: str) -> arrays.Array:
    """A tensor's values as float32, or as float64 if it is float64. Raises SalsaError for values that are missing."""
    require(
        not tensor.is_meta,
        f"{where} has no values, because it is on the meta device; load the adapter's weights first",
    )
    wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    values: arrays.Array = tensor.detach().to("cpu", wide).contiguous().numpy()
    require(arrays.all_finite(values), f"{where} has values that are not finite; load or train this adapter again")
    return values
