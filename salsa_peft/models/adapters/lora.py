"""Reading, attaching, switching and saving LoRA adapters on one shared base.

PEFT's own `set_adapter` sets requires_grad on the adapter that it activates, so frozen references would become
trainable. `Toggle` switches adapters without changing requires_grad.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.error import NoMatchingPeftModuleError
from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers
from safetensors.torch import save_file
from torch import nn

from salsa_peft.config.schema import Adapter
from salsa_peft.models.adapters import forward, names
from salsa_peft.models.adapters.names import MERGE, SCORE, VALUE_HEAD
from salsa_peft.models.base import causal_lm
from salsa_peft.models.sharding import sharded_like
from salsa_peft.models.weights import check_finite, read_tensors
from salsa_peft.utils import files
from salsa_peft.utils.errors import SalsaError, require
from salsa_peft.utils.files import replacing, write_atomic
from salsa_peft.utils.fingerprints import FINGERPRINT
from salsa_peft.utils.hub import local_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
KEEPS_BASE = {"gaussian", "eva", "orthogonal"}
"""Values of init_lora_weights, besides true and false, that do not change the base's weights."""


def lora_config(adapter: Adapter, task_type: str = "CAUSAL_LM", **options: Any) -> LoraConfig:
    """Make PEFT's LoraConfig from a recipe's section `adapter`. options: further fields of LoraConfig."""
    return LoraConfig(**dataclasses.asdict(adapter), task_type=task_type, **options)


def unused_name(model: nn.Module, name: str) -> str:
    """A free adapter name: `name`, or `name` with a number if the model has an adapter of that name."""
    taken = model.peft_config if isinstance(model, PeftModel) else ()
    numbered = (f"{name}-{number}" for number in range(2, len(taken) + 3))
    return next(one for one in [name, *numbered] if one not in taken)


def adapter_folder(name: str, revision: str | None = None) -> Path:
    """The local folder of an adapter. If `name` is a Hub id, the adapter's files are downloaded."""
    return local_folder(name, patterns=(WEIGHTS, CONFIG, FINGERPRINT, VALUE_HEAD), revision=revision)


def read(folder: Path) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    """Read the configuration and the tensors (by PEFT's names) of the adapter in `folder`.

    Raises SalsaError if a file is missing or damaged, if the adapter is not LoRA, or if a value is not finite.
    """
    for name in (CONFIG, WEIGHTS):
        found = (folder / name).is_file()
        require(found, f"{folder}: the folder has no {name}; use a PEFT adapter saved with safetensors")
    config = PeftConfig.from_pretrained(str(folder))
    require(isinstance(config, LoraConfig), f"{folder}: this is a {config.peft_type} adapter; use a LoRA adapter")
    tensors = read_tensors(folder / WEIGHTS)
    check_finite(tensors, str(folder / WEIGHTS))
    saved_as = names.plain_names(tensors, {"auto_mapping": config.auto_mapping}, folder / WEIGHTS)
    return config, {name: tensors[key] for name, key in saved_as.items()}


def attach(model: PreTrainedModel | PeftModel, folder: Path, name: str, *, trainable: bool = False) -> PeftModel:
    """Add the adapter in `folder` to a model as `name`, in float32, not active, frozen unless `trainable`.

    Two things in a file are not loaded: a reward adapter's score head (see `score_head`), and unchanged copies of the
    base's weights, which PEFT saves with adapters on embeddings. On a model on the meta device, only names and shapes
    are compared. Raises SalsaError if the adapter's tensors do not match the base's modules one to one, or if the
    adapter changes weights of the base.
    """
    config, tensors = read(folder)
    require_base_unchanged(config, str(folder))
    require_factors_only(config, str(folder))
    tensors = _lora_factors(model, tensors, folder)
    config.modules_to_save, config.inference_mode, config.task_type = None, False, "CAUSAL_LM"
    config.base_model_name_or_path = str(model.name_or_path)  # prevents a warning of PEFT; bases.py compares the bases
    _require_same_parameters(model, config, folder)
    try:
        model = _add(model, name, config)
        tensors = convert_peft_adapter_state_dict_for_transformers(model, model.peft_config[name], tensors, name)
    except NoMatchingPeftModuleError as error:
        raise SalsaError(
            f"{folder}: the base has none of the adapter's target modules {config.target_modules}; use an adapter"
            " that was trained on this base"
        ) from error
    held = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    _require_same_shapes(held, tensors, folder, "the base's modules")
    if not next(model.parameters()).is_meta:
        set_peft_model_state_dict(model, {key: value.float() for key, value in tensors.items()}, adapter_name=name)
    set_trainable(model, name, trainable)
    forward.install(model)
    return model


def load(model: PeftModel, name: str, folder: Path) -> None:
    """Load the adapter in `folder` into the adapter `name`. Raises SalsaError if names or shapes differ."""
    _, tensors = read(folder)
    held = get_peft_model_state_dict(model, adapter_name=name)
    _require_same_shapes(held, tensors, folder, f"adapter {name!r}")
    pieces = {key: sharded_like(tensor, held[key]) for key, tensor in tensors.items()}
    set_peft_model_state_dict(model, pieces, adapter_name=name)


def _require_same_shapes(
    held: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor], folder: Path, target: str
) -> None:
    shapes = [{(key, tuple(value.shape)) for key, value in part.items()} for part in (held, tensors)]
    different = sorted({key for key, _ in shapes[0] ^ shapes[1]})
    require(
        not different,
        f"{folder}: {len(different)} tensors do not match {target} in name and shape ({', '.join(different[:2])} …);"
        " use an adapter with the same base and target modules as this run",
    )


def _lora_factors(
    model: PreTrainedModel | PeftModel, tensors: Mapping[str, torch.Tensor], folder: Path
) -> dict[str, torch.Tensor]:
    """Select LoRA factors among `tensors`. Raises SalsaError if `tensors` has trained weights of the base."""
    parameters = causal_lm(model).named_parameters(remove_duplicate=False)
    base = {name.replace(".base_layer.", "."): value for name, value in parameters}
    for key, value in tensors.items():
        if ".lora_" in key or SCORE.fullmatch(key):
            continue
        own = base.get(key.removeprefix(names.PREFIX).replace(".base_layer.", "."))
        same = own is not None and (own.is_meta or torch.equal(own.to("cpu", value.dtype), value))
        require(same, names.trained_module(str(folder), key))
    return {key: value for key, value in tensors.items() if ".lora_" in key}


def _require_same_parameters(model: PreTrainedModel | PeftModel, config: LoraConfig, folder: Path) -> None:
    """Raise SalsaError if an adapter of the model has different target_parameters; PEFT cannot hold both."""
    for name, other in model.peft_config.items() if isinstance(model, PeftModel) else ():
        both = [set(one.target_parameters or ()) for one in (config, other)]  # type: ignore[attr-defined]
        require(
            not all(both) or both[0] == both[1],
            f"{folder}: this adapter has the target_parameters {', '.join(sorted(both[0]))}, but adapter {name!r} on"
            f" the same base has {', '.join(sorted(both[1]))}. PEFT can hold both adapters only if these agree; train"
            " both adapters with the same target_modules and target_parameters",
        )


def require_base_unchanged(config: LoraConfig, where: str) -> None:
    """Raise SalsaError for an initialisation, such as PiSSA, that changes the base's weights."""
    initial = config.init_lora_weights
    require(
        not isinstance(initial, str) or initial in KEEPS_BASE,
        f"{where}: init_lora_weights {initial!r} changes the weights of the base, which policy, references and reward"
        f" share; use {', '.join(sorted(KEEPS_BASE))} or true",
    )


def require_factors_only(config: LoraConfig, where: str) -> None:
    """Raise SalsaError for an adapter that trains biases or tokens of the base."""
    for field, value in (("bias", config.bias), ("trainable_token_indices", config.trainable_token_indices)):
        require(
            not value or value == "none",
            f"{where}: {field} is {value!r}, so the adapter holds trained weights of the base, but policy, references"
            f" and reward share one base here; {MERGE}",
        )


def _add(model: PreTrainedModel | PeftModel, name: str, config: LoraConfig) -> PeftModel:
    if not isinstance(model, PeftModel):
        return get_peft_model(model, config, adapter_name=name)
    with active(model, None):
        model.add_adapter(name, config)
    return model


def duplicate(model: PeftModel, source: str, name: str) -> None:
    """Add a trainable copy of the adapter `source` to its model, as `name` and not active."""
    weights = get_peft_model_state_dict(model, adapter_name=source, save_embedding_layers=False)
    _add(model, name, copy.deepcopy(model.peft_config[source]))  # type: ignore[arg-type]
    set_peft_model_state_dict(model, weights, adapter_name=name)
    set_trainable(model, name, True)
    forward.install(model)


@contextlib.contextmanager
def removed(model: PeftModel, name: str) -> Iterator[None]:
    """Context without a frozen adapter, which is added again if the code in the context raises an error."""
    config, weights = model.peft_config[name], get_peft_model_state_dict(model, adapter_name=name)
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.delete_adapter(name)
    for parameter, required in trainable:  # delete_adapter activates a remaining adapter and sets its requires_grad
        parameter.requires_grad_(required)
    try:
        yield
    except BaseException:
        _add(model, name, config)  # type: ignore[arg-type]
        set_peft_model_state_dict(model, weights, adapter_name=name)
        set_trainable(model, name, False)
        raise


def score_head(folder: Path) -> nn.Linear:
    """Load the frozen score head, Linear(H, 1), that PEFT or LLaMA-Factory saved with a reward adapter."""
    _, tensors = read(folder)
    weight, bias = next((value for key, value in tensors.items() if SCORE.fullmatch(key)), None), None
    if weight is None and (folder / VALUE_HEAD).is_file():
        tensors = read_tensors(folder / VALUE_HEAD)
        weight, bias = tensors.get(names.VALUE_WEIGHT), tensors.get(names.VALUE_BIAS)
    if weight is None:
        raise SalsaError(
            f"{folder}: the adapter has no score head, so it cannot be a reward; use an adapter that was trained with"
            " task_type SEQ_CLS"
        )
    require(
        weight.shape[0] == 1,
        f"{folder}: the score head has {weight.shape[0]} labels, but a reward is one number; use an adapter that was"
        " trained with num_labels 1, or a Python function as reward",
    )
    head = nn.Linear(weight.shape[1], 1, bias=bias is not None)
    head.load_state_dict({"weight": weight} if bias is None else {"weight": weight, "bias": bias})
    return head.requires_grad_(False)


def parameters(model: nn.Module, name: str) -> Iterator[nn.Parameter]:
    """Yield the parameters of one adapter."""
    for layer in tuner_layers(model):
        for part in layer.adapter_layer_names:
            if name in (modules := getattr(layer, part)):
                entry = modules[name]
                yield from entry.parameters() if isinstance(entry, nn.Module) else [entry]


def set_trainable(model: nn.Module, name: str, trainable: bool) -> None:
    """Set requires_grad of the parameters of one adapter only."""
    for parameter in parameters(model, name):
        parameter.requires_grad_(trainable)


def tuner_layers(model: nn.Module) -> list[Any]:
    """List the layers of a model that hold adapters."""
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


class Toggle:
    """Switches between a model's adapters fast, by setting two attributes in each layer with adapters.

    The layers are listed once, and again after adapters were added or removed, which can wrap further layers.
    """

    def __init__(self, model: PeftModel) -> None:
        self.model, self.names, self.layers = model, list(model.peft_config), tuner_layers(model)

    @property
    def active(self) -> str | None:
        """Name of the active adapter; None if all adapters are disabled."""
        layer = self.layers[0]
        return None if layer._disable_adapters else layer.active_adapters[0]

    @contextlib.contextmanager
    def __call__(self, name: str | None) -> Iterator[None]:
        """Context in which the adapter `name` is active or, if it is None, all adapters are disabled."""
        if self.names != list(self.model.peft_config):
            self.names, self.layers = list(self.model.peft_config), tuner_layers(self.model)
        known = name is None or name in self.names
        require(known, f"adapter {name!r}: the model has no adapter of this name; attach it first")
        layers, before = self.layers, [(layer._active_adapter, layer._disable_adapters) for layer in self.layers]
        try:
            for layer in layers:  # vars, because nn.Module.__setattr__ is 50 times slower
                vars(layer).update(_active_adapter=[name] if name else [], _disable_adapters=name is None)
            yield
        finally:
            for layer, (adapter, disabled) in zip(layers, before, strict=True):
                vars(layer).update(_active_adapter=adapter, _disable_adapters=disabled)


def active(model: nn.Module, name: str | None) -> contextlib.AbstractContextManager[None]:
    """Context as in Toggle.__call__. A model without adapters is accepted too if `name` is None."""
    if isinstance(model, PeftModel):
        return Toggle(model)(name)
    require(name is None, f"adapter {name!r}: the model, a {type(model).__name__}, has no adapters")
    return contextlib.nullcontext()


def save(model: PeftModel, name: str, folder: Path, tokenizer: PreTrainedTokenizerBase | None = None,
         extra: dict[str, torch.Tensor] | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:  # fmt: skip
    """Save an adapter as an ordinary PEFT folder. The configuration is written last.

    extra: further tensors for the file. state_dict: the gathered weights of a sharded model. Raises SalsaError before
    writing if a weight is not finite or the disk lacks space.
    """
    weights = get_peft_model_state_dict(model, state_dict=state_dict, adapter_name=name)
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in weights.items()}
    check_finite(tensors, f"{folder} is not saved")
    for stale in folder.glob(f".{WEIGHTS}.*"):  # left by a process that was killed
        stale.unlink()
    files.require_disk_space(folder, sum(tensor.nbytes for tensor in tensors.values()), str(folder))
    with replacing(folder / WEIGHTS) as temporary:
        save_file({**tensors, **(extra or {})}, temporary, metadata={"format": "pt"})
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    config = copy.deepcopy(model.peft_config[name])
    config.inference_mode = True
    write_atomic(folder / CONFIG, json.dumps(config.to_dict(), indent=2, sort_keys=True, default=sorted))
