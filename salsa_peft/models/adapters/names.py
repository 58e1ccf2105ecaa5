"""Tensor names in the adapter files of PEFT, TRL and LLaMA-Factory. Imports no torch."""

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
"""Part that DDP, DataParallel and DeepSpeed add to tensor names. A model's own module can have this name too."""
NAMED = re.compile(r"(.*\.)?lora_(?:[AB]\.(?P<linear>[^.]+)\.(?:weight|bias)|embedding_[AB]\.(?P<embedding>[^.]+))")
SAVED, ORIGINAL, TOKENS = ".modules_to_save.", ".original_module.", ".token_adapter."
DELTA = "trainable_tokens_delta"
TRAINING = (".lora_velora_", ".lora_monteclora_")
"""Parts of the names of tensors that VeLoRA and MonteCLoRA use only in training; at inference both are plain LoRA."""


def plain_names(keys: Iterable[str], config: dict[str, Any], path: Path) -> dict[str, str]:
    """Map PEFT's name of each tensor that PEFT reads to the tensor's name in the file.

    Logs one warning if names in the file have parts that PEFT's names do not have. Raises SalsaError if the file has
    the tensors of two adapters, or one tensor under two names.
    """
    own = own_module(config)
    unwrapped = {key: unwrap(key, own) for key in keys}
    names = {match["linear"] or match["embedding"] for key in unwrapped.values() if (match := NAMED.fullmatch(key))}
    require(
        len(names) <= 1,
        f"{path}: the file has the tensors of {len(names)} adapters ({', '.join(sorted(map(str, names)))}), expected"
        " one; save them with PEFT's save_pretrained, which writes one folder for each adapter",
    )
    name = next(iter(names), None)
    found: dict[str, str] = {}
    # of two names, PEFT reads the one without modules_to_save, which comes first here
    for key in sorted(unwrapped, key=lambda key: SAVED in key):
        plain = without_adapter(unwrapped[key], name)
        if plain is None or (SAVED in unwrapped[key] and plain in found):
            continue
        require(
            plain not in found,
            f"{path}: {key} and {found.get(plain)} are two names of the tensor {plain}; save the adapter again with"
            " only one of these tensors",
        )
        found[plain] = key
    parts = [f"{part}." for part in (*WRAPPERS, PARALLEL)
             if any(key.split(".").count(part) > short.split(".").count(part) for key, short in unwrapped.items())]  # fmt: skip
    removed = [f"the wrapper's {', '.join(parts)}"] if parts else []
    removed += [f"the adapter's name, {name!r}"] if name is not None else []
    if removed:
        text = "warning: %s: the tensors' names contain %s, which is ignored because PEFT's names have no such part"
        logger.warning(text, path, " and ".join(removed))
    return found


def own_module(config: dict[str, Any]) -> bool:
    """Whether the model may have its own module named `module`, because its class is not Transformers'."""
    library = str((config["auto_mapping"] or {}).get("parent_library") or "transformers")
    return not library.startswith(("transformers", "torch.nn.parallel", "deepspeed", "accelerate"))


def unwrap(key: str, own: bool = False) -> str:
    """A tensor's name without the parts of wrappers. own: whether to remove `module` only at the start."""
    parts = [part for part in key.split(".") if part not in WRAPPERS]
    if not own:
        return ".".join(part for part in parts if part != PARALLEL)
    while len(parts) > 1 and parts[0] == PARALLEL:
        parts.pop(0)
    return ".".join(parts)


def without_adapter(key: str, name: str | None) -> str | None:
    """PEFT's name of a tensor in a file; None for a tensor that the adapter does not use at inference."""
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
"""Pattern of a score head's names, including names of older PEFT versions and of state dicts saved without PEFT."""
VALUE_HEAD = "value_head.safetensors"
"""File in which LLaMA-Factory saves a reward model's head. PPO here gives the file of its value head the same name."""
VALUE_WEIGHT, VALUE_BIAS = "v_head.summary.weight", "v_head.summary.bias"
"""Names of the tensors in LLaMA-Factory's file. PPO's value head here is saved with different names."""
MERGE = (
    "merge the adapter into its base (with PEFT's merge_and_unload or `salsa soup OUT ADAPTER --merge --base BASE`) and"
    " use the merged checkpoint: with full weights in a recipe (without --lora), or as the model in a script"
)
"""Advice in error messages about an adapter that trains more than LoRA factors."""


def trained_module(what: str, name: str) -> str:
    """Make the error message for an adapter that has a trained copy of a module of the base."""
    return (
        f"{what}: the adapter holds {name}, a trained copy of a module of the base (from modules_to_save or resized"
        f" embeddings). Here policy, references and reward share one base, without such copies; {MERGE}"
    )
