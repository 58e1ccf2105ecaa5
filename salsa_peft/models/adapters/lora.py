"""Adapters on one shared base: attach, copy, toggle, save.

PEFT's own `set_adapter` walks all modules and changes requires_grad on the way, so that frozen references become trainable. Here the tuner layers are listed once and a switch sets one
attribute in each, touching nothing else.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
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
from salsa_peft.models.adapters.names import (
    MERGE,
    PREFIX,
    SCORE,
    VALUE_BIAS,
    VALUE_HEAD,
    VALUE_WEIGHT,
    plain_names,
    trained_module,
)
from salsa_peft.models.sharding import sharded_like
from salsa_peft.models.weights import check_finite, read_tensors
from salsa_peft.utils import files
from salsa_peft.utils.errors import SalsaError, require
from salsa_peft.utils.files import write_atomic
from salsa_peft.utils.fingerprints import FINGERPRINT
from salsa_peft.utils.hub import HUB_ID

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
KEEPS_BASE = {"gaussian", "eva", "orthogonal"}


def lora_config(adapter: Adapter, task_type: str = "CAUSAL_LM", **options: Any) -> LoraConfig:
    """PEFT's LoraConfig of a recipe's `adapter` section."""
    return LoraConfig(
        r=adapter.r,
        lora_alpha=adapter.lora_alpha,  # type: ignore[arg-type]
        lora_dropout=adapter.lora_dropout,
        target_modules=adapter.target_modules,
        use_rslora=adapter.use_rslora,
        task_type=task_type,
        **options,
    )


def unused_name(model: nn.Module, wish: str) -> str:
    """`wish`, or with a number where an adapter on the model has that name."""
    taken = model.peft_config if isinstance(model, PeftModel) else ()
    numbered = (f"{wish}-{number}" for number in range(2, len(taken) + 3))
    return next(name for name in [wish, *numbered] if name not in taken)


def local_folder(path: str, revision: str | None = None) -> Path:
    """A folder as it is; a Hub id → its adapter files in the Hub's cache."""
    if Path(path).is_dir():
        return Path(path)
    require(bool(HUB_ID.match(path)), f"{path}: found no such folder, expected an adapter's folder or a Hub id")
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(path, revision=revision, allow_patterns=[WEIGHTS, CONFIG, FINGERPRINT, VALUE_HEAD]))


def read(folder: Path) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    """An adapter folder → (config, tensors by PEFT's saved names, without those of wrappers). Raises SalsaError where a file is missing, damaged or no LoRA, and
    for values that are not finite."""
    for name in (CONFIG, WEIGHTS):
        require((folder / name).is_file(), f"{folder}: found no {name}, expected a PEFT adapter saved with safetensors")
    config = PeftConfig.from_pretrained(str(folder))
    require(isinstance(config, LoraConfig), f"{folder}: found a {config.peft_type} adapter, expected LoRA")
    tensors = read_tensors(folder / WEIGHTS)
    check_finite(tensors, str(folder / WEIGHTS))
    names = plain_names(tensors, {"auto_mapping": config.auto_mapping}, folder / WEIGHTS)
    return config, {name: tensors[key] for name, key in names.items()}


def attach(model: PreTrainedModel | PeftModel, folder: Path, name: str, *, trainable: bool = False) -> PeftModel:
    """Add the adapter in `folder` to the shared base under `name`, float32, frozen unless `trainable`; none is activated.

    A score head that the folder holds (a reward adapter's) is left to `score_head`; copies of the base's own weights, which PEFT saves
    with adapters of embeddings, are left out. On a base without values (meta device) only names and shapes are compared. Raises SalsaError where the saved tensors and the base's modules don't match one to one.
    """
    config, tensors = read(folder)
    require_base_unchanged(config, str(folder))
    require_factors_only(config, str(folder))
    tensors = lora_factors(model, tensors, folder)
    config.modules_to_save, config.inference_mode, config.task_type = None, False, "CAUSAL_LM"
    config.base_model_name_or_path = str(
        model.name_or_path
    )  # PEFT warns of another name, which same_base has dealt with
    _check_parameters(model, config, folder)
    try:
        model = _add(model, name, config)
        tensors = convert_peft_adapter_state_dict_for_transformers(model, model.peft_config[name], tensors, name)
    except NoMatchingPeftModuleError as error:
        raise SalsaError(
            f"{folder}: found target modules {config.target_modules}, none of them in the base; expected an adapter of this base"
        ) from error
    held = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    expected = {key: value.shape for key, value in held.items()}
    found = {key: value.shape for key, value in tensors.items()}
    odd = sorted({key for key, _ in expected.items() ^ found.items()})
    require(
        not odd,
        f"{folder}: found {len(odd)} tensors that don't pair with the base's modules ({', '.join(odd[:2])} …), expected an"
        " adapter of this base",
    )
    if not next(model.parameters()).is_meta:
        set_peft_model_state_dict(model, {key: value.float() for key, value in tensors.items()}, adapter_name=name)
    set_trainable(model, name, trainable)
    return model


def lora_factors(
    model: PreTrainedModel | PeftModel, tensors: Mapping[str, torch.Tensor], folder: Path
) -> dict[str, torch.Tensor]:
    """LoRA's own tensors of an adapter. Raises SalsaError for a trained copy of one of the base's modules; a copy of the base's own weights
    changes nothing and is left out. A base on the meta device has no values to compare."""
    base: nn.Module = model.get_base_model() if isinstance(model, PeftModel) else model
    own = {name.replace(".base_layer.", "."): value for name, value in base.named_parameters(remove_duplicate=False)}
    for key, value in tensors.items():
        if ".lora_" in key or SCORE.fullmatch(key):
            continue
        there = own.get(key.removeprefix(PREFIX).replace(".base_layer.", "."))
        same = there is not None and (there.is_meta or torch.equal(there.to("cpu", value.dtype), value))
        require(same, trained_module(str(folder), key))
    return {key: value for key, value in tensors.items() if ".lora_" in key}


def _check_parameters(model: PreTrainedModel | PeftModel, config: LoraConfig, folder: Path) -> None:
    """Raise SalsaError for LoRA on other parameters (of experts) than another adapter's on this base, which PEFT can't hold side by side."""
    for name, other in model.peft_config.items() if isinstance(model, PeftModel) else ():
        both = [set(one.target_parameters or ()) for one in (config, other)]  # type: ignore[attr-defined]
        require(
            not all(both) or both[0] == both[1],
            f"{folder}: it adapts the parameters {', '.join(sorted(both[0]))}, and adapter {name!r} on the same base adapts"
            f" {', '.join(sorted(both[1]))}. PEFT holds adapters side by side only if they adapt the same parameters; train both with the same"
            " target_modules and target_parameters",
        )


def require_base_unchanged(config: LoraConfig, where: str) -> None:
    """Raise SalsaError, beginning with `where`, for an initialisation that changes the base's own weights (PiSSA, OLoRA …)."""
    initial = config.init_lora_weights
    require(
        not isinstance(initial, str) or initial in KEEPS_BASE,
        f"{where}: found init_lora_weights {initial!r}, which changes the base that all roles share; expected one of"
        f" {', '.join(sorted(KEEPS_BASE))} or a plain one",
    )


def require_factors_only(config: LoraConfig, where: str) -> None:
    """Raise SalsaError, beginning with `where`, for trained biases and tokens: they lie in the base that all roles share."""
    require(
        config.bias == "none",
        f"{where}: found bias {config.bias!r}, expected 'none': the biases are the base's, which all roles share; {MERGE}",
    )
    require(
        not config.trainable_token_indices,
        f"{where}: found trainable_token_indices, expected LoRA factors only: the tokens are the base's, which all roles share; {MERGE}",
    )


def load(model: PeftModel, name: str, folder: Path) -> None:
    """Give adapter `name`, which is on the model, the weights in `folder`. Raises SalsaError where they don't pair with its own."""
    _, tensors = read(folder)
    held = get_peft_model_state_dict(model, adapter_name=name)
    expected = {key: tensor.shape for key, tensor in held.items()}
    odd = sorted(key for key, _ in expected.items() ^ {key: value.shape for key, value in tensors.items()}.items())
    require(
        not odd, f"{folder}: found {len(odd)} tensors that are not adapter {name!r}'s, expected the same ({odd[:1]} …)"
    )
    set_peft_model_state_dict(
        model, {key: sharded_like(tensor, held[key]) for key, tensor in tensors.items()}, adapter_name=name
    )


def _add(model: PreTrainedModel | PeftModel, name: str, config: LoraConfig) -> PeftModel:
    if not isinstance(model, PeftModel):
        return get_peft_model(model, config, adapter_name=name)
    with active(model, None):
        model.add_adapter(name, config)
    return model


@contextlib.contextmanager
def removed(model: PeftModel, name: str) -> Iterator[None]:
    """Remove a frozen adapter; where the context ends in an error it is there again. What else requires grad stays as it is."""
    config, weights = model.peft_config[name], get_peft_model_state_dict(model, adapter_name=name)
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.delete_adapter(name)
    for parameter, required in trainable:  # PEFT's delete_adapter activates, and so trains, another
        parameter.requires_grad_(required)
    try:
        yield
    except BaseException:
        _add(model, name, config)  # type: ignore[arg-type]
        set_peft_model_state_dict(model, weights, adapter_name=name)
        set_trainable(model, name, False)
        raise


def score_head(folder: Path) -> nn.Linear:
    """The score head that a reward adapter's folder holds: Linear(H, 1), float32, frozen; PEFT's, or LLaMA-Factory's value head."""
    _, tensors = read(folder)
    weight, bias = next((value for key, value in tensors.items() if SCORE.fullmatch(key)), None), None
    if weight is None and (folder / VALUE_HEAD).is_file():
        tensors = read_tensors(folder / VALUE_HEAD)
        weight, bias = tensors.get(VALUE_WEIGHT), tensors.get(VALUE_BIAS)
    if weight is None:
        raise SalsaError(
            f"{folder} is an adapter without a score head, so it scores nothing; a reward adapter is trained with task_type SEQ_CLS, which"
            " saves one"
        )
    require(
        weight.shape[0] == 1,
        f"{folder} has a score head of {weight.shape[0]} labels, and a reward is one number; train it with num_labels 1, or pass a function",
    )
    head = nn.Linear(weight.shape[1], 1, bias=bias is not None)
    head.weight = nn.Parameter(weight.float(), requires_grad=False)
    if bias is not None:
        head.bias = nn.Parameter(bias.float(), requires_grad=False)
    return head


def parameters(model: nn.Module, name: str) -> Iterator[nn.Parameter]:
    """The weights of one adapter."""
    for layer in tuner_layers(model):
        for part in layer.adapter_layer_names:
            modules = getattr(layer, part)
            if name in modules:
                entry = modules[name]
                yield from entry.parameters() if isinstance(entry, nn.Module) else [entry]


def set_trainable(model: nn.Module, name: str, trainable: bool) -> None:
    """Set requires_grad of one adapter and of nothing else."""
    for parameter in parameters(model, name):
        parameter.requires_grad_(trainable)


def tuner_layers(model: nn.Module) -> list[Any]:
    """Every layer that holds adapters."""
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


class Toggle:
    """Switches which adapter is active, fast: a switch sets one attribute in each layer.

    The layers are listed once, and anew where adapters came or went: one may have wrapped layers that had none.
    """

    def __init__(self, model: PeftModel) -> None:
        self.model, self.names, self.layers = model, list(model.peft_config), tuner_layers(model)

    @property
    def active(self) -> str | None:
        """The adapter that is active now, None where the plain base is."""
        layer = self.layers[0]
        return None if layer._disable_adapters else layer.active_adapters[0]

    @contextlib.contextmanager
    def __call__(self, name: str | None) -> Iterator[None]:
        """Within the context, adapter `name` is active, or none (None: the plain base); the state found comes back after."""
        if self.names != list(self.model.peft_config):
            self.names, self.layers = list(self.model.peft_config), tuner_layers(self.model)
        layers, known = self.layers, name is None or name in self.names
        before = [(layer._active_adapter, layer._disable_adapters) for layer in layers]
        require(known, f"adapter {name!r}: found no such adapter on this base, expected one that was attached")
        try:
            for (
                layer
            ) in layers:  # past nn.Module.__setattr__, which is 50 times as slow and has nothing to do for these two
                vars(layer).update(_active_adapter=[name] if name else [], _disable_adapters=name is None)
            yield
        finally:
            for layer, (adapter, disabled) in zip(layers, before, strict=True):
                vars(layer).update(_active_adapter=adapter, _disable_adapters=disabled)


def active(model: nn.Module, name: str | None) -> contextlib.AbstractContextManager[None]:
    """`Toggle` for one use. A model of full weights is what it is: it has None alone."""
    if not isinstance(model, PeftModel):
        require(
            name is None, f"adapter {name!r}: found a {type(model).__name__} of full weights, expected adapters on it"
        )
        return contextlib.nullcontext()
    return Toggle(model)(name)


def cast_trainable_to_float32(model: nn.Module) -> None:
    """What is trained is float32: TRL (1.16) casts the adapters of a quantised base to bfloat16, which swallows small steps."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def remove_dropout(model: nn.Module) -> None:
    """Set every dropout's rate to 0, in place: PPO's ratio must compare one network with itself.

    nn.Dropout, and the rates that Transformers' modules hold as numbers (attention_dropout …).
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                vars(module)[name] = 0.0


def save(model: PeftModel, name: str, folder: Path, tokenizer: PreTrainedTokenizerBase | None = None,
         extra: dict[str, torch.Tensor] | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:  # fmt: skip
    """Write adapter `name` as an ordinary PEFT folder (`extra`: more tensors under PEFT's names), config last.

    state_dict: the model's weights, where it does not hold them whole itself. Raises SalsaError, before it writes, for weights that
    are not finite, or a disk without room.
    """
    weights = get_peft_model_state_dict(model, state_dict=state_dict, adapter_name=name)
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in weights.items()}
    check_finite(tensors, f"{folder} is not saved")
    temporary = folder / f".{WEIGHTS}.part"
    temporary.unlink(missing_ok=True)  # of a kill before
    files.require_disk_space(folder, sum(tensor.nbytes for tensor in tensors.values()), str(folder))
    folder.mkdir(parents=True, exist_ok=True)
    save_file({**tensors, **(extra or {})}, temporary, metadata={"format": "pt"})
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    temporary.replace(folder / WEIGHTS)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    config = copy.deepcopy(model.peft_config[name])
    config.inference_mode = True
    values = {k: sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}
    write_atomic(folder / CONFIG, json.dumps(values, indent=2, sort_keys=True))
