"""LoRA adapters on one shared base: read, attach, switch, save.

PEFT's own `set_adapter` sets requires_grad on the adapter that it activates, so frozen references would become
trainable. `Toggle` lists the tuner layers once and sets one attribute in each.
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
from salsa_peft.models.adapters import names
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
"""Values of init_lora_weights that leave the base's weights as they are, besides true and false."""


def lora_config(adapter: Adapter, task_type: str = "CAUSAL_LM", **options: Any) -> LoraConfig:
    """PEFT's LoraConfig of a recipe's `adapter` section."""
    return LoraConfig(**dataclasses.asdict(adapter), task_type=task_type, **options)


def unused_name(model: nn.Module, name: str) -> str:
    """`name`, with a number after it if the model already has an adapter of that name."""
    taken = model.peft_config if isinstance(model, PeftModel) else ()
    numbered = (f"{name}-{number}" for number in range(2, len(taken) + 3))
    return next(one for one in [name, *numbered] if one not in taken)


def adapter_folder(name: str) -> Path:
    """The local folder of an adapter, whose files are downloaded if `name` is a Hub id."""
    return local_folder(name, patterns=(WEIGHTS, CONFIG, FINGERPRINT, VALUE_HEAD))


def read(folder: Path) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    """Read an adapter's folder → its configuration, and its tensors by PEFT's names.

    Raises SalsaError if a file is missing or damaged, if the adapter is not LoRA, and for values that are not finite.
    """
    for name in (CONFIG, WEIGHTS):
        found = (folder / name).is_file()
        require(found, f"{folder}: no {name} in this folder; use a PEFT adapter saved with safetensors")
    config = PeftConfig.from_pretrained(str(folder))
    require(isinstance(config, LoraConfig), f"{folder}: this is a {config.peft_type} adapter; use a LoRA adapter")
    tensors = read_tensors(folder / WEIGHTS)
    check_finite(tensors, str(folder / WEIGHTS))
    saved_as = names.plain_names(tensors, {"auto_mapping": config.auto_mapping}, folder / WEIGHTS)
    return config, {name: tensors[key] for name, key in saved_as.items()}


def attach(model: PreTrainedModel | PeftModel, folder: Path, name: str, *, trainable: bool = False) -> PeftModel:
    """Add the adapter in `folder` to the base as `name`: float32, frozen unless `trainable`, not active.

    A reward adapter's score head is not loaded (see `score_head`), nor are copies of the base's own weights, which PEFT
    saves with adapters of embeddings. On the meta device only names and shapes are compared. Raises SalsaError if the
    adapter's tensors and the base's modules do not match one to one, or if the adapter changes weights of the base.
    """
    config, tensors = read(folder)
    require_base_unchanged(config, str(folder))
    require_factors_only(config, str(folder))
    tensors = _lora_factors(model, tensors, folder)
    config.modules_to_save, config.inference_mode, config.task_type = None, False, "CAUSAL_LM"
    config.base_model_name_or_path = str(model.name_or_path)  # or PEFT would warn; bases.py has compared the bases
    _require_same_parameters(model, config, folder)
    try:
        model = _add(model, name, config)
        tensors = convert_peft_adapter_state_dict_for_transformers(model, model.peft_config[name], tensors, name)
    except NoMatchingPeftModuleError as error:
        raise SalsaError(
            f"{folder}: the base has none of the adapter's target modules {config.target_modules}; use an adapter of"
            " this base"
        ) from error
    held = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    _require_same_shapes(held, tensors, folder, "the base's modules")
    if not next(model.parameters()).is_meta:
        set_peft_model_state_dict(model, {key: value.float() for key, value in tensors.items()}, adapter_name=name)
    set_trainable(model, name, trainable)
    return model


def load(model: PeftModel, name: str, folder: Path) -> None:
    """Load weights into the adapter `name`. Raises SalsaError if their names or shapes differ."""
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
        " use an adapter of this base and these target modules",
    )


def _lora_factors(
    model: PreTrainedModel | PeftModel, tensors: Mapping[str, torch.Tensor], folder: Path
) -> dict[str, torch.Tensor]:
    """The adapter's LoRA factors. Raises SalsaError if it holds trained copies of the base's weights too."""
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
    """Raise SalsaError if another adapter on this base adapts other parameters; PEFT cannot hold both."""
    for name, other in model.peft_config.items() if isinstance(model, PeftModel) else ():
        both = [set(one.target_parameters or ()) for one in (config, other)]  # type: ignore[attr-defined]
        require(
            not all(both) or both[0] == both[1],
            f"{folder}: it adapts the parameters {', '.join(sorted(both[0]))}, and adapter {name!r} on the same base"
            f" adapts {', '.join(sorted(both[1]))}. PEFT holds adapters side by side only if they adapt the same"
            " parameters; train both with the same target_modules and target_parameters",
        )


def require_base_unchanged(config: LoraConfig, where: str) -> None:
    """Raise SalsaError, beginning with `where`, for an initialisation such as PiSSA that changes the base."""
    initial = config.init_lora_weights
    require(
        not isinstance(initial, str) or initial in KEEPS_BASE,
        f"{where}: init_lora_weights {initial!r} changes the weights of the base, which all roles share; use"
        f" {', '.join(sorted(KEEPS_BASE))} or true",
    )


def require_factors_only(config: LoraConfig, where: str) -> None:
    """Raise SalsaError, beginning with `where`, for trained biases or tokens, which belong to the base."""
    for field, value in (("bias", config.bias), ("trainable_token_indices", config.trainable_token_indices)):
        require(
            not value or value == "none",
            f"{where}: {field} is {value!r}, so the adapter holds trained weights of the base, which all roles share;"
            f" {MERGE}",
        )


def _add(model: PreTrainedModel | PeftModel, name: str, config: LoraConfig) -> PeftModel:
    if not isinstance(model, PeftModel):
        return get_peft_model(model, config, adapter_name=name)
    with active(model, None):
        model.add_adapter(name, config)
    return model


@contextlib.contextmanager
def removed(model: PeftModel, name: str) -> Iterator[None]:
    """Remove a frozen adapter, and add it again if the context ends with an error."""
    config, weights = model.peft_config[name], get_peft_model_state_dict(model, adapter_name=name)
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.delete_adapter(name)
    for parameter, required in trainable:  # delete_adapter activates another adapter, which sets its requires_grad
        parameter.requires_grad_(required)
    try:
        yield
    except BaseException:
        _add(model, name, config)  # type: ignore[arg-type]
        set_peft_model_state_dict(model, weights, adapter_name=name)
        set_trainable(model, name, False)
        raise


def score_head(folder: Path) -> nn.Linear:
    """Load the score head, Linear(H, 1), that PEFT or LLaMA-Factory saved with a reward adapter; frozen."""
    _, tensors = read(folder)
    weight, bias = next((value for key, value in tensors.items() if SCORE.fullmatch(key)), None), None
    if weight is None and (folder / VALUE_HEAD).is_file():
        tensors = read_tensors(folder / VALUE_HEAD)
        weight, bias = tensors.get(names.VALUE_WEIGHT), tensors.get(names.VALUE_BIAS)
    if weight is None:
        raise SalsaError(
            f"{folder} is an adapter without a score head, so it scores nothing; a reward adapter is trained with"
            " task_type SEQ_CLS, which saves one"
        )
    require(
        weight.shape[0] == 1,
        f"{folder} has a score head of {weight.shape[0]} labels, and a reward is one number; train it with num_labels"
        " 1, or pass a function",
    )
    head = nn.Linear(weight.shape[1], 1, bias=bias is not None)
    head.load_state_dict({"weight": weight} if bias is None else {"weight": weight, "bias": bias})
    return head.requires_grad_(False)


def parameters(model: nn.Module, name: str) -> Iterator[nn.Parameter]:
    """The weights of one adapter."""
    for layer in tuner_layers(model):
        for part in layer.adapter_layer_names:
            if name in (modules := getattr(layer, part)):
                entry = modules[name]
                yield from entry.parameters() if isinstance(entry, nn.Module) else [entry]


def set_trainable(model: nn.Module, name: str, trainable: bool) -> None:
    """Set requires_grad of one adapter's weights, and of no others."""
    for parameter in parameters(model, name):
        parameter.requires_grad_(trainable)


def tuner_layers(model: nn.Module) -> list[Any]:
    """Every layer that holds adapters."""
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


class Toggle:
    """A fast switch between adapters: it lists the tuner layers once and sets one attribute in each.

    The layers are listed again when adapters were added or removed, since that can wrap further layers.
    """

    def __init__(self, model: PeftModel) -> None:
        self.model, self.names, self.layers = model, list(model.peft_config), tuner_layers(model)

    @property
    def active(self) -> str | None:
        """The active adapter; None if all are disabled."""
        layer = self.layers[0]
        return None if layer._disable_adapters else layer.active_adapters[0]

    @contextlib.contextmanager
    def __call__(self, name: str | None) -> Iterator[None]:
        """Context in which the adapter `name` is active; None: the base alone. The previous state is restored."""
        if self.names != list(self.model.peft_config):
            self.names, self.layers = list(self.model.peft_config), tuner_layers(self.model)
        known = name is None or name in self.names
        require(known, f"adapter {name!r}: the model has no adapter of this name; attach it first")
        layers, before = self.layers, [(layer._active_adapter, layer._disable_adapters) for layer in self.layers]
        try:
            for layer in layers:  # vars: nn.Module.__setattr__ is 50 times as slow and does nothing more for these two
                vars(layer).update(_active_adapter=[name] if name else [], _disable_adapters=name is None)
            yield
        finally:
            for layer, (adapter, disabled) in zip(layers, before, strict=True):
                vars(layer).update(_active_adapter=adapter, _disable_adapters=disabled)


def active(model: nn.Module, name: str | None) -> contextlib.AbstractContextManager[None]:
    """Context in which the adapter `name` is active; None: no adapter, as in a model of full weights."""
    if isinstance(model, PeftModel):
        return Toggle(model)(name)
    require(name is None, f"adapter {name!r}: a {type(model).__name__} of full weights has no adapters")
    return contextlib.nullcontext()


def save(model: PeftModel, name: str, folder: Path, tokenizer: PreTrainedTokenizerBase | None = None,
         extra: dict[str, torch.Tensor] | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:  # fmt: skip
    """Save an adapter as an ordinary PEFT folder, its configuration last.

    state_dict: the gathered weights of a sharded model. Raises SalsaError before writing if a weight is not finite or
    the disk has no space.
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
