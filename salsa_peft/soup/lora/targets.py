"""PEFT's rules from names alone: which modules and parameters an adapter is on, with which rank and scaling, what it saves in full.

A parameter that is targeted itself (target_parameters: a stack of experts, mostly) has its factors at the module that holds it. Where a
module holds several, PEFT nests one wrapper in the other, in the order in which the module registers its parameters:

    mlp.experts.base_layer.lora_A.weight     the first, gate_up_proj
    mlp.experts.lora_A.weight                the last, down_proj
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from salsa_peft.soup.lora.read import CONFIG, TARGETS
from salsa_peft.utils.errors import SalsaError, require

WRAPPED = ".base_layer"
EMBEDDINGS = ("embed_tokens", "lm_head")
"""PEFT's EMBEDDING_LAYER_NAMES: what ensure_weight_tying ties."""
ORDER = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
"""In which Transformers' experts register their parameters."""


def target_rule(folder: Path, config: dict[str, Any]) -> Callable[[str], bool]:
    """Whether PEFT puts LoRA on a module of that name. 'all-linear' and None are resolved on the base, which a soup does not read."""
    path = folder / CONFIG
    targets = config["target_modules"]
    if any(
        config[field] not in (None, [], "") for field in ("exclude_modules", "layers_to_transform", "layers_pattern")
    ):  # rules of PEFT's own, at the price of its import
        from peft import LoraConfig
        from peft.tuners.tuners_utils import check_target_module_exists

        try:
            given = LoraConfig(
                **{field: config[field] for field in (*TARGETS, "modules_to_save") if field != "target_parameters"}
            )
        except (TypeError, ValueError) as error:
            raise SalsaError(f"{path} is not a LoRA configuration ({error}): save the adapter again") from None
        if isinstance(targets, list) or (isinstance(targets, str) and targets.lower() != "all-linear"):
            return lambda module: bool(check_target_module_exists(given, module))
    if isinstance(targets, list):
        return lambda module: module in targets or any(module.endswith(f".{target}") for target in targets)
    if targets is None or targets.lower() == "all-linear":
        return lambda module: True
    try:
        pattern = re.compile(targets)
    except re.error as error:
        raise SalsaError(
            f"{path}: target_modules is not a regular expression ({error}): save the adapter again"
        ) from None
    return lambda module: pattern.fullmatch(module) is not None


def is_saved(name: str, config: dict[str, Any]) -> bool:
    """Whether a tensor belongs to modules_to_save, as PEFT wraps modules: any whose name ends so, with all that is in it."""
    parts = name.split(".")[:-1]
    paths = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return any(path.endswith(module) for path in paths for module in config["modules_to_save"] or ())


def rank_and_scaling(folder: Path, config: dict[str, Any], module: str) -> tuple[int, float]:
    """r and scaling of a module as PEFT's LoraModel resolves them: the first pattern in the file that matches wins."""
    path = folder / CONFIG
    r = by_pattern(config["rank_pattern"], module, config["r"], path)
    alpha = by_pattern(config["alpha_pattern"], module, config["lora_alpha"], path)
    right = isinstance(r, int) and r >= 1 and isinstance(alpha, int | float) and math.isfinite(alpha)
    require(right, f"{path}: {module} has rank {r!r} and alpha {alpha!r}, expected a whole number and a number")
    return r, alpha / math.sqrt(r) if config["use_rslora"] else alpha / r


def by_pattern(patterns: dict[str, Any], module: str, otherwise: Any, path: Path) -> Any:
    """peft.utils.other.get_pattern_key's rule."""
    try:
        return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), otherwise)
    except re.error as error:
        raise SalsaError(f"{path}: a pattern is not a regular expression ({error}): save the adapter again") from None


def parameters_of(module: str, config: dict[str, Any], named: bool = False) -> list[str]:
    """The names in a module that target_parameters may mean, in the order in which it is taken to register them.

    named: only those that name the module too (gate.weight, and not gate_up_proj, which may be in any).
    """
    leaves = set()
    for target in config["target_parameters"] or ():
        holder, _, leaf = target.rpartition(".")
        if (not holder and not named) or (holder and (module == holder or module.endswith(f".{holder}"))):
            leaves.add(leaf)
    return sorted(leaves, key=registered)


def registered(parameter: str) -> tuple[int, str]:
    """Sorts the parameters of one module in the order in which it registers them."""
    return (ORDER.index(parameter) if parameter in ORDER else len(ORDER), parameter)


def parameter_at(module: str, depth: int, levels: int, config: dict[str, Any]) -> str | None:
    """Which parameter of a module the wrapper `depth` levels inside is on; None: the names do not say.

    levels: how many wrappers the module has. The outermost (depth 0) is on the parameter that the module registers last.
    """
    for named in (True, False):
        leaves = parameters_of(module, config, named)
        if len(leaves) == levels and (levels == 1 or set(leaves) <= set(ORDER)):
            return leaves[levels - 1 - depth]
    return None
