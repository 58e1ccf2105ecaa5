"""Names of the tensors in adapter files of PEFT, TRL and LLaMA-Factory. Imports no torch."""

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
"""A part that DistributedDataParallel, DataParallel and DeepSpeed add to names. A module can have this name too."""
NAMED = re.compile(r"(.*\.)?lora_(?:[AB]\.(?P<linear>[^.]+)\.(?:weight|bias)|embedding_[AB]\.(?P<embedding>[^.]+))")
SAVED, ORIGINAL, TOKENS = ".modules_to_save.", ".original_module.", ".token_adapter."
DELTA = "trainable_tokens_delta"
TRAINING = (".lora_velora_", ".lora_monteclora_")
"""Tensors of VeLoRA and MonteCLoRA that are used in training only; at inference these adapters are plain LoRA."""


def plain_names(keys: Iterable[str], config: dict[str, Any], path: Path) -> dict[str, str]:
    """Map PEFT's name of each tensor to its name in the file, without tensors that PEFT does not read.

    Logs one warning if the file's names contain parts that PEFT's do not. Raises SalsaError for a file with the tensors
    of two adapters, or with one tensor under two names.
    """
    own = own_module(config)
    unwrapped = {key: unwrap(key, own) for key in keys}
    names = {match["linear"] or match["embedding"] for key in unwrapped.values() if (match := NAMED.fullmatch(key))}
    require(
        len(names) <= 1,
        f"{path}: the tensors of {len(names)} adapters ({', '.join(sorted(map(str, names)))}) are in one file: save"
        " each with PEFT's save_pretrained, which writes a folder for each",
    )
    name = next(iter(names), None)
    found: dict[str, str] = {}
    # PEFT reads the name without modules_to_save if it has both
    for key in sorted(unwrapped, key=lambda key: SAVED in key):
        plain = without_adapter(unwrapped[key], name)
        if plain is None or (SAVED in unwrapped[key] and plain in found):
            continue
        require(
            plain not in found,
            f"{path}: {key} and {found.get(plain)} are both {plain}: save the adapter again, with one of them",
        )
        found[plain] = key
    parts = [f"{part}." for part in (*WRAPPERS, PARALLEL)
             if any(key.split(".").count(part) > short.split(".").count(part) for key, short in unwrapped.items())]  # fmt: skip
    removed = [f"the wrapper's {', '.join(parts)}"] if parts else []
    removed += [f"the adapter's name, {name!r}"] if name is not None else []
    if removed:
        text = "warning: %s: its tensors' names contain %s, which PEFT's names do not; it is removed"
        logger.warning(text, path, " and ".join(removed))
    return found


def own_module(config: dict[str, Any]) -> bool:
    """Whether the model itself may have a module named `module`, since its class is not Transformers'."""
    library = str((config["auto_mapping"] or {}).get("parent_library") or "transformers")
    return not library.startswith(("transformers", "torch.nn.parallel", "deepspeed", "accelerate"))


def unwrap(key: str, own: bool = False) -> str:
    """A name without parts that wrappers add; with `own`, `module` is removed at the start only."""
    parts = [part for part in key.split(".") if part not in WRAPPERS]
    if not own:
        return ".".join(part for part in parts if part != PARALLEL)
    while len(parts) > 1 and parts[0] == PARALLEL:
        parts.pop(0)
    return ".".join(parts)


def without_adapter(key: str, name: str | None) -> str | None:
    """PEFT's name of a saved tensor; None if the adapter does not compute with it."""
    if any(part in key for part in (ORIGINAL, *TRAINING)) or (TOKENS in key and DELTA not in key):
        return None
    key = key.replace(f"{SAVED}{name or 'default'}.", SAVED)
    if name is not None:
        key = re.sub(rf"(\.lora_[AB])\.{re.escape(name)}\.", r"\1.", key)
        key = re.sub(rf"(\.lora_embedding_[AB]|\.{DELTA})\.{re.escape(name)}$", r"\1", key)
    return key.replace(SAVED, ".")


SCORE_HEAD = f"{PREFIX}score.weight"
"""The name under which PEFT saves a reward adapter's score head."""
SCORE = re.compile(re.escape(PREFIX) + r"(score|classifier)(\.modules_to_save(\.\w+)?)?\.weight")
"""All names of a score head: also those of older versions, and of state dicts saved without PEFT."""
VALUE_HEAD = "value_head.safetensors"
"""The file in which LLaMA-Factory saves the head of a reward model, TRL's value head; also that of the value head of
PPO here."""
VALUE_WEIGHT, VALUE_BIAS = "v_head.summary.weight", "v_head.summary.bias"
"""Tensors of LLaMA-Factory's file. The value head of PPO here has other names."""
MERGE = (
    "merge it into its base (PEFT's merge_and_unload, or `salsa soup OUT ADAPTER --merge --base BASE`) and use that"
    " checkpoint: in a recipe with full weights (without --lora), in a script as a model"
)
"""The remedy in messages about an adapter that trains more than LoRA factors."""


def trained_module(what: str, name: str) -> str:
    """The error message for an adapter that holds a trained copy of a module of the base."""
    return (
        f"{what} holds {name}, a trained copy of a module of the base (modules_to_save, or embeddings that were"
        f" resized). All roles share one base here, so that it cannot be switched on and off with the adapter; {MERGE}"
    )
