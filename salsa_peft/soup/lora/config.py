"""The adapter_config.json of a soup: targets, ranks and options with which PEFT loads the tensors."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from salsa_peft.soup.lora import non_lora
from salsa_peft.soup.lora.factors import Stacks
from salsa_peft.soup.lora.read import DEFAULTS, TARGETS
from salsa_peft.soup.lora.targets import EMBEDDINGS, Shape, is_saved, parameters_of, target_rule
from salsa_peft.soup.lora.tensors import Member

UNCLEAR = "[^.]*"
"""Regular expression that matches the name of any parameter within a module."""


def config_fields(members: Sequence[Member], stacks: Stacks, ranks: dict[str, int]) -> dict[str, Any]:
    """The fields of the soup's LoraConfig for inference. ranks: module or parameter → rank in the soup."""
    configs = [member.config for member in members]
    first = configs[0]
    targeted = {targeted_name(stacks.shapes[name], name): r for name, r in ranks.items()}
    r = Counter(targeted.values()).most_common(1)[0][0]
    pattern = rank_pattern(targeted, r)
    tied = agree(configs, "ensure_weight_tying") and first["ensure_weight_tying"]
    fields: dict[str, Any] = DEFAULTS | {"ensure_weight_tying": tied} | listed_targets(stacks, targeted)
    everywhere = all(member.factors.keys() == ranks.keys() for member in members)
    if everywhere and agree(configs, *TARGETS, "ensure_weight_tying") and targets_match(members[0], stacks):
        fields |= {name: as_sorted(first[name]) for name in TARGETS}
    fields |= {name: first[name] for name in ("fan_in_fan_out", "auto_mapping") if agree(configs, name)}
    return fields | {
        "peft_type": "LORA",
        "task_type": next((config["task_type"] for config in configs if config["task_type"] is not None), None),
        "base_model_name_or_path": first["base_model_name_or_path"],
        "revision": first["revision"],
        "inference_mode": True,
        "r": r,
        "lora_alpha": r,
        "lora_dropout": 0.0,
        "rank_pattern": pattern,
        "alpha_pattern": dict(pattern),
        "modules_to_save": saved_modules(members, tied),
        "bias": bias_of(members),
        "lora_bias": any(config["lora_bias"] for config in configs),
        "trainable_token_indices": first["trainable_token_indices"],
        "alora_invocation_tokens": first["alora_invocation_tokens"],
    }


def targeted_name(shape: Shape, name: str) -> str:
    """The targeted module or parameter whose rank PEFT looks up; a pattern if the parameter is unknown."""
    if shape.parameter == "":
        return f"{shape.module}.{UNCLEAR}"
    return shape.target if shape.parameter is None else name


def targets_match(member: Member, stacks: Stacks) -> bool:
    """Whether the targets in a member's configuration cover all modules and parameters of the soup."""
    targeted = target_rule(member.folder, member.config)
    tied = EMBEDDINGS if member.config["ensure_weight_tying"] else ()
    return all(
        bool(parameters_of(shape.module, member.config))
        if shape.parameter is not None
        else targeted(shape.target) or name.rpartition(".")[2] in tied
        for name, shape in stacks.shapes.items()
    )


def listed_targets(stacks: Stacks, targeted: dict[str, int]) -> dict[str, Any]:
    """target_modules and target_parameters with the full names of all modules and parameters.

    If tensor names do not tell which parameter they belong to, target_parameters is that of the members.
    """
    parameters = [name for name, shape in stacks.shapes.items() if shape.parameter is not None]
    modules = [name for name in targeted if name not in parameters and not name.endswith(UNCLEAR)]
    unclear = next((m for m in stacks.members for f in m.factors.values() if f.shape.parameter == ""), None)
    listed = parameters if unclear is None else unclear.config["target_parameters"]
    return {"target_modules": sorted(modules), "target_parameters": sorted(listed) or None}


def saved_modules(members: Sequence[Member], tied: bool) -> list[str] | None:
    """modules_to_save of the soup: the members' value if they agree, else the union with tied modules."""
    configs = [member.config for member in members]
    if agree(configs, "modules_to_save", "ensure_weight_tying"):
        return configs[0]["modules_to_save"] or None
    found = {module for config in configs for module in config["modules_to_save"] or ()}
    if not tied and found:
        for member in members:
            if member.config["ensure_weight_tying"]:
                names = (name for name in member.non_lora if name.endswith(".weight") and name not in member.frozen)
                found |= {name.rpartition(".")[0] for name in names}
    return sorted(found) or None


def bias_of(members: Sequence[Member]) -> str:
    """The `bias` option: the members' value if they agree; if not, `all` with biases, `none` without."""
    configs = [member.config for member in members]
    if agree(configs, "bias"):
        return str(configs[0]["bias"])
    names = non_lora.parameter_names(members)
    return "all" if any(name.endswith(".bias") and not is_saved(name, configs[0]) for name in names) else "none"


def agree(configs: Sequence[dict[str, Any]], *names: str) -> bool:
    """Whether all configurations have the same values of these fields."""
    return all(as_sorted(config[name]) == as_sorted(configs[0][name]) for config in configs for name in names)


def as_sorted(value: Any) -> Any:
    """A list in sorted order, because its order has no meaning in LoraConfig; other values unchanged."""
    return sorted(value) if isinstance(value, list) else value


def rank_pattern(ranks: dict[str, int], usual: int) -> dict[str, int]:
    """rank_pattern for the modules whose rank is not `usual`.

    A module's key is the last part of its name if all modules with this last part have one rank, else its full name.
    """
    by_leaf: dict[str, set[int]] = {}
    for module, r in ranks.items():
        by_leaf.setdefault(module.rpartition(".")[2], set()).add(r)
    pattern = {}
    for module, r in ranks.items():
        leaf = module.rpartition(".")[2]
        if r != usual and module.endswith(UNCLEAR):
            pattern[f"^{re.escape(module.removesuffix(UNCLEAR))}{UNCLEAR}"] = r
        elif r != usual:  # PEFT takes the first KEY for which (.*\.)?(KEY)$ matches; no name matches two keys
            pattern[re.escape(leaf) if len(by_leaf[leaf]) == 1 else f"^{re.escape(module)}"] = r
    return pattern
