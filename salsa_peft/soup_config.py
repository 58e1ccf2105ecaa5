"""The adapter_config.json of a soup: alpha = r in every module, so that PEFT's scaling is exactly 1.

What all members agree on is kept as they wrote it; where their modules differ, the modules are listed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from .adapter_folders import DEFAULTS, TARGETS
from .adapter_tensors import Member, is_saved


def config_fields(members: Sequence[Member], ranks: dict[str, int]) -> dict[str, Any]:
    """LoraConfig's fields, JSON-able, for inference. ranks: module → rank in the soup."""
    configs = [member.config for member in members]
    head = configs[0]
    r = Counter(ranks.values()).most_common(1)[0][0]
    pattern = rank_pattern(ranks, r)
    fields: dict[str, Any] = DEFAULTS | {"target_modules": sorted(ranks)}
    if all(member.ranks.keys() == ranks.keys() for member in members) and agree(configs, *TARGETS):
        fields |= {name: ordered(head[name]) for name in TARGETS}
    fields |= {name: head[name] for name in ("fan_in_fan_out", "auto_mapping") if agree(configs, name)}
    saved = {module for config in configs for module in config["modules_to_save"] or ()}
    return fields | {
        "peft_type": "LORA",
        "task_type": next((config["task_type"] for config in configs if config["task_type"] is not None), None),
        "base_model_name_or_path": head["base_model_name_or_path"],
        "revision": head["revision"],
        "inference_mode": True,
        "r": r,
        "lora_alpha": r,
        "lora_dropout": 0.0,
        "rank_pattern": pattern,
        "alpha_pattern": dict(pattern),
        "modules_to_save": (head["modules_to_save"] if agree(configs, "modules_to_save") else sorted(saved)) or None,
        "bias": bias_of(members),
        "lora_bias": any(config["lora_bias"] for config in configs),
        "trainable_token_indices": head["trainable_token_indices"],
    }


def bias_of(members: Sequence[Member]) -> str:
    """Which of the base's biases PEFT takes for trained."""
    configs = [member.config for member in members]
    if agree(configs, "bias"):
        return str(configs[0]["bias"])
    biases = [name for name in members[0].direct if name.endswith(".bias") and not is_saved(name, configs[0])]
    return "all" if biases else "none"


def agree(configs: Sequence[dict[str, Any]], *names: str) -> bool:
    return all(ordered(config[name]) == ordered(configs[0][name]) for config in configs for name in names)


def ordered(value: Any) -> Any:
    """A list's order says nothing in LoraConfig's fields."""
    return sorted(value) if isinstance(value, list) else value


def rank_pattern(ranks: dict[str, int], usual: int) -> dict[str, int]:
    """PEFT's pattern for the modules of unusual rank: by last name where that says it, by whole name otherwise."""
    by_leaf: dict[str, set[int]] = {}
    for module, r in ranks.items():
        by_leaf.setdefault(module.rpartition(".")[2], set()).add(r)
    pattern = {}
    for module, r in ranks.items():
        leaf = module.rpartition(".")[2]
        if r != usual:  # PEFT matches (.*\.)?(KEY)$ and takes the first key that fits: these keys exclude one another
            pattern[re.escape(leaf) if len(by_leaf[leaf]) == 1 else f"^{re.escape(module)}"] = r
    return pattern
