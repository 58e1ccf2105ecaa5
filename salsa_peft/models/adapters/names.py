"""The names of an adapter file's tensors as PEFT, TRL and LLaMA-Factory save them. Imports no torch."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from salsa_peft.utils.errors import require
from salsa_peft.utils.tensor_names import WRAPPERS

logger = logging.getLogger(__name__)
PREFIX = "base_model.model."
PARALLEL = "module"
"""What DistributedDataParallel, DataParallel and DeepSpeed put there; also a name that a module may really have."""
NAMED = re.compile(r"(.*\.)?lora_(?:[AB]\.(?P<linear>[^.]+)\.(?:weight|bias)|embedding_[AB]\.(?P<embedding>[^.]+))")
SAVED, ORIGINAL, TOKENS = ".modules_to_save.", ".original_module.", ".token_adapter."
DELTA = "trainable_tokens_delta"
TRAINING = (".lora_velora_", ".lora_monteclora_")
"""What VeLoRA and MonteCLoRA save for training alone: at inference they are plain LoRA."""


def plain_names(keys: Iterable[str], config: dict[str, Any], path: Path) -> dict[str, str]:
    """PEFT's name of each tensor → its name in the file. What PEFT never reads from a file (second copies) is left out.

    Raises SalsaError for a file that holds two adapters, or one tensor under two names. Says once what was taken off.
    """
    keys = list(keys)
    ours = own_module(config)
    unwrapped = {key: unwrap(key, ours) for key in keys}
    names = {match["linear"] or match["embedding"] for key in keys if (match := NAMED.fullmatch(unwrapped[key]))}
    require(
        len(names) <= 1,
        f"{path}: the tensors of {len(names)} adapters ({', '.join(sorted(map(str, names)))}) are in one file: save each with PEFT's "
        "save_pretrained, which writes a folder for each",
    )
    name = next(iter(names), None)
    found: dict[str, str] = {}
    for key in sorted(
        keys, key=lambda key: SAVED in key
    ):  # PEFT reads the name without modules_to_save where both are there
        plain = without_adapter(unwrapped[key], name)
        if plain is None or (SAVED in unwrapped[key] and plain in found):
            continue
        require(
            plain not in found,
            f"{path}: {key} and {found.get(plain)} are both {plain}: save the adapter again, with one of them",
        )
        found[plain] = key
    off = [f"{part}." for part in (*WRAPPERS, PARALLEL) if any(_dropped(key, unwrapped[key], part) for key in keys)]
    if off or name is not None:
        said = " and ".join(
            [
                *(["the wrapper's " + ", ".join(off)] if off else []),
                *([f"the adapter's name, {name!r}"] if name else []),
            ]
        )
        logger.warning(
            "warning: %s: the names of its tensors hold %s, which PEFT's do not: it is taken off", path, said
        )
    return {plain: found[plain] for plain in found}


def _dropped(key: str, unwrapped: str, part: str) -> bool:
    return key.split(".").count(part) > unwrapped.split(".").count(part)


def own_module(config: dict[str, Any]) -> bool:
    """Whether a part `module` of a name may be the model's own: auto_mapping names a class that is neither Transformers' nor a wrapper."""
    library = str((config["auto_mapping"] or {}).get("parent_library") or "transformers")
    return not library.startswith(("transformers", "torch.nn.parallel", "deepspeed", "accelerate"))


def unwrap(key: str, own: bool = False) -> str:
    """A name without the parts that wrappers put into it, at its start or anywhere. own: `module` is only taken off the start."""
    parts = [part for part in key.split(".") if part not in WRAPPERS]
    if not own:
        return ".".join(part for part in parts if part != PARALLEL)
    while len(parts) > 1 and parts[0] == PARALLEL:
        parts.pop(0)
    return ".".join(parts)


def without_adapter(key: str, name: str | None) -> str | None:
    """PEFT's name on the disk; None for what an adapter does not compute with: a module's original, a trained token's embedding."""
    if ORIGINAL in key or any(part in key for part in TRAINING):
        return None
    if TOKENS in key and DELTA not in key:
        return None
    key = key.replace(f"{SAVED}{name or 'default'}.", SAVED)
    if name is not None:
        key = re.sub(rf"(\.lora_[AB])\.{re.escape(name)}\.", r"\1.", key)
        key = re.sub(rf"(\.lora_embedding_[AB]|\.{DELTA})\.{re.escape(name)}$", r"\1", key)
    return key.replace(SAVED, ".")


SCORE_HEAD = f"{PREFIX}score.weight"
"""A reward adapter's score head as PEFT saves it."""
SCORE = re.compile(re.escape(PREFIX) + r"(score|classifier)(\.modules_to_save(\.\w+)?)?\.weight")
"""… and as older versions, and state dicts that were saved without PEFT, name it."""
VALUE_HEAD = "value_head.safetensors"
"""File of the head of a reward model by LLaMA-Factory, which is TRL's value head; PPO here saves its own under this name."""
VALUE_WEIGHT, VALUE_BIAS = "v_head.summary.weight", "v_head.summary.bias"
"""In that file; PPO's own has other names."""
MERGE = (
    "merge it into its base (PEFT's merge_and_unload, or `salsa soup OUT ADAPTER --merge --base BASE`) and use that checkpoint: in a recipe"
    " with full weights (without --lora), in a script as a model"
)
"""What to do with an adapter that changes more than LoRA's factors."""


def trained_module(what: str, name: str) -> str:
    """Why an adapter with such a tensor cannot be used on a base that roles share."""
    return (
        f"{what} holds {name}, a trained copy of a module of the base (modules_to_save, or embeddings that were resized). All roles share"
        f" one base here, so that it cannot be switched on and off with the adapter; {MERGE}"
    )
