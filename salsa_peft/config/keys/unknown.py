"""The unknown keys of a recipe, each with advice: the nearest known key, or the section that has it."""

import copy
import dataclasses
import difflib
import types
import typing
from typing import Annotated, Any

from salsa_peft.config.fields import UNSUPPORTED_LORA_FIELDS, field_types, join_keys
from salsa_peft.utils.messages import did_you_mean

OTHER_NAMES = {
    "lr": "learning_rate", "epochs": "num_train_epochs", "num_epochs": "num_train_epochs", "per_device_train_batch_size": "batch_size",
    "per_device_batch_size": "micro_batch_size", "gradient_accumulation_steps": "micro_batch_size", "beta": "kl_coef", "init_kl_coef": "kl_coef",
    "target": "kl_target", "horizon": "kl_horizon", "adap_kl_ctrl": "kl_control", "ppo_epochs": "num_ppo_epochs",
    "use_score_scaling": "normalize_scores", "local_rollout_forward_batch_size": "rollout_batch_size", "rank": "r", "alpha": "lora_alpha",
    "dropout": "lora_dropout", "ref_model": "reference", "references": "reference", "lora_r": "adapter.r", "lora_rank": "adapter.r",
    "response_length": "generation.max_new_tokens", "max_completion_length": "generation.max_new_tokens", "max_seq_length": "model.max_length",
    "model_name_or_path": "model.base", "dataset_name": "data", "total_episodes": "num_train_epochs", "load_in_4bit": "model.quantization",
}  # fmt: skip
"""Name in other libraries (TRL, Transformers, PEFT) → the key here, in the same section or with its section."""

MOST_ADVICE = 100
"""Number of unknown keys for which the nearest key is looked up, which takes a millisecond each."""


def split_unknown(data: dict[str, Any], root: type) -> tuple[dict[str, Any], dict[str, str]]:
    """A copy of the settings of the dataclass `root` without unknown keys, and {unknown key: advice}."""
    data, unknown = copy.deepcopy(data), dict[str, str]()

    def split(where: str, value: Any, hint: Any) -> None:
        while typing.get_origin(hint) is Annotated:
            hint = typing.get_args(hint)[0]
        if typing.get_origin(hint) in (types.UnionType, typing.Union):
            for option in typing.get_args(hint):
                split(where, value, option)
        elif isinstance(value, dict) and typing.get_origin(hint) is dict:
            for key, entry in value.items():
                split(join_keys(where, key), entry, typing.get_args(hint)[1])
        elif isinstance(value, dict) and dataclasses.is_dataclass(hint):
            known = field_types(typing.cast(Any, hint))
            for key in list(value):
                if key in known:
                    split(join_keys(where, key), value[key], known[key])
                else:
                    del value[key]
                    advised = len(unknown) < MOST_ADVICE
                    unknown[join_keys(where, key)] = _advice(where, key, list(known), root) if advised else "remove it"

    split("", data, root)
    return data, unknown


def _advice(where: str, key: str, known: list[str], root: type) -> str:
    """Advice for an unknown key: the nearest known key, the right section, or the supported LoRA fields."""
    if where == "adapter" and key in (*UNSUPPORTED_LORA_FIELDS, "lora"):
        inside = ", not under `lora`" if key == "lora" else ""
        return f"only {', '.join(known)} of PEFT's LoraConfig are supported; write them in `adapter`{inside}"
    names = [name.rstrip("_") for name in known]
    other = OTHER_NAMES.get(key.lower(), "")
    if other in names or "." in other:
        return f"did you mean {other}?"
    parts = [(name, part) for name, hint in field_types(root).items() for part in (hint, *typing.get_args(hint))]
    of = [name for name, part in parts if dataclasses.is_dataclass(part) and key in field_types(typing.cast(Any, part))]
    near = difflib.get_close_matches(key.lower(), names, n=1, cutoff=0.6)
    if key in UNSUPPORTED_LORA_FIELDS or not of or near or (where and len(of) > 3):
        return did_you_mean(key, names)
    return f"did you mean {' or '.join(f'{name}.{key}' for name in of)}?"
