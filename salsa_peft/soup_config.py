"""The adapter_config.json of a soup: alpha = r in every module, so that PEFT's scaling is exactly 1.

What all members agree on is kept as they wrote it; where their modules differ, the modules are listed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from salsa_peft import direct_parts
from salsa_peft.adapter_folders import DEFAULTS, TARGETS
from salsa_peft.adapter_targets import EMBEDDINGS, is_saved, parameters_of, target_rule
from salsa_peft.adapter_tensors import Member
from salsa_peft.stacks import Shape, Stacks

UNCLEAR = "[^.]*"
"""In a pattern, any parameter of a module."""


def config_fields(members: Sequence[Member], stacks: Stacks, ranks: dict[str, int]) -> dict[str, Any]:
    """LoraConfig's fields, JSON-able, for inference. ranks: module or parameter → rank in the soup."""
    configs = [member.config for member in members]
    head = configs[0]
    targeted = {targeted_name(stacks.shapes[name], name): r for name, r in ranks.items()}
    r = Counter(targeted.values()).most_common(1)[0][0]
    pattern = rank_pattern(targeted, r)
    tied = agree(configs, "ensure_weight_tying") and head["ensure_weight_tying"]
    fields: dict[str, Any] = DEFAULTS | {"ensure_weight_tying": tied} | listed_targets(stacks, targeted)
    everywhere = all(member.ranks.keys() == ranks.keys() for member in members)
    if everywhere and agree(configs, *TARGETS, "ensure_weight_tying") and meant(members[0], stacks):
        fields |= {name: ordered(head[name]) for name in TARGETS}
    fields |= {name: head[name] for name in ("fan_in_fan_out", "auto_mapping") if agree(configs, name)}
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
        "modules_to_save": saved_modules(members, tied),
        "bias": bias_of(members),
        "lora_bias": any(config["lora_bias"] for config in configs),
        "trainable_token_indices": head["trainable_token_indices"],
        "alora_invocation_tokens": head["alora_invocation_tokens"],
    }


def targeted_name(shape: Shape, name: str) -> str:
    """What PEFT finds a rank by: the parameter, or the module that is targeted."""
    if shape.parameter == "":
        return f"{shape.holder}.{UNCLEAR}"
    return shape.owner if shape.parameter is None else name


def meant(member: Member, stacks: Stacks) -> bool:
    """Whether a member's own targets mean the soup's modules, under the names that these have in the soup."""
    targeted = target_rule(member.folder, member.config)
    tied = EMBEDDINGS if member.config["ensure_weight_tying"] else ()
    return all(
        bool(parameters_of(shape.holder, member.config))
        if shape.parameter is not None
        else targeted(shape.owner) or name.rpartition(".")[2] in tied
        for name, shape in stacks.shapes.items()
    )


def listed_targets(stacks: Stacks, targeted: dict[str, int]) -> dict[str, Any]:
    """Every module and every parameter by its whole name; parameters as members have them, where their names are not known."""
    parameters = [name for name, shape in stacks.shapes.items() if shape.parameter is not None]
    modules = [name for name in targeted if name not in parameters and not name.endswith(UNCLEAR)]
    unclear = next((m for m in stacks.members for f in m.factors.values() if f.parameter == ""), None)
    listed = parameters if unclear is None else unclear.config["target_parameters"]
    return {"target_modules": sorted(modules), "target_parameters": sorted(listed) or None}


def saved_modules(members: Sequence[Member], tied: bool) -> list[str] | None:
    """modules_to_save: as all members have it, else what any has; with what one saved because it was tied, where not all are."""
    configs = [member.config for member in members]
    if agree(configs, "modules_to_save", "ensure_weight_tying"):
        return configs[0]["modules_to_save"] or None
    found = {module for config in configs for module in config["modules_to_save"] or ()}
    if not tied and found:
        for member in members:
            if member.config["ensure_weight_tying"]:
                found |= {
                    n.rpartition(".")[0] for n in member.direct if n.endswith((".weight",)) and n not in member.frozen
                }
    return sorted(found) or None


def bias_of(members: Sequence[Member]) -> str:
    """Which of the base's biases PEFT takes for trained."""
    configs = [member.config for member in members]
    if agree(configs, "bias"):
        return str(configs[0]["bias"])
    given = direct_parts.names(members)
    biases = [name for name in given if name.endswith(".bias") and not is_saved(name, configs[0])]
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
        if r != usual and module.endswith(UNCLEAR):
            pattern[f"^{re.escape(module.removesuffix(UNCLEAR))}{UNCLEAR}"] = r
        elif r != usual:  # PEFT matches (.*\.)?(KEY)$ and takes the first key that fits: these keys exclude one another
            pattern[re.escape(leaf) if len(by_leaf[leaf]) == 1 else f"^{re.escape(module)}"] = r
    return pattern
