"""PEFT's rules for an adapter's modules: targets, ranks, scaling, shapes of factors, modules_to_save.

The factors of a targeted parameter (target_parameters; mostly a stack of experts) lie in a wrapper around the module
that has the parameter. For several targeted parameters of one module PEFT nests the wrappers, in the order in which the
module registers the parameters:

    mlp.experts.base_layer.lora_A.weight     inner wrapper: gate_up_proj, which is registered first
    mlp.experts.lora_A.weight                outer wrapper: down_proj, which is registered last
"""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from salsa_peft.soup.lora.read import CONFIG, TARGETS
from salsa_peft.utils.errors import SalsaError, require

WRAPPED = ".base_layer"
EMBEDDINGS = ("embed_tokens", "lm_head")
"""PEFT's EMBEDDING_LAYER_NAMES: the layers that ensure_weight_tying ties."""
ORDER = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
"""The order in which the experts of Transformers register their parameters."""


class Shape(NamedTuple):
    """The shape of LoRA factors, and the module or parameter that they belong to.

    A stack of experts (target_parameters) has one delta per expert, a grouped convolution one per group. `blocks`
    is the number of these deltas.
    """

    rank: int
    inner: tuple[int, ...]
    """Input dimensions: (in,) of a linear layer, (tokens,) of an embedding, (in, *kernel) of convolutions."""
    out: int
    embedding: bool
    experts: int
    groups: int
    module: str
    """The module whose PEFT wrapper holds the factors."""
    parameter: str | None
    """Name of the targeted parameter in `module`; "" if tensor names do not tell it; None for a layer."""
    target: str
    """The module that target_modules name: `module`, or for an attention's out_proj the attention."""

    @property
    def blocks(self) -> int:
        return self.experts * self.groups

    @property
    def limit(self) -> int:
        """The highest rank that a delta of this shape can have."""
        return min(math.prod(self.inner), self.out // self.groups) * self.groups

    def saved(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes in which PEFT saves A and B of the given rank."""
        rows = rank * self.experts
        return (rows, *self.inner), (self.out, rows // self.groups, *(1 for _ in self.inner[1:]))

    def blocks_A(self, A: Any) -> Any:
        """Reshape A from PEFT's file to (r, in), or with several blocks to (blocks, r / groups, in)."""
        return A.reshape(len(A), -1) if self.blocks == 1 else A.reshape(self.blocks, len(A) // self.blocks, -1)

    def blocks_B(self, B: Any) -> Any:
        """Reshape B from PEFT's file to (out, r), or if several blocks to (blocks, out / groups, r / groups)."""
        if self.blocks == 1:
            return B.reshape(len(B), -1)
        if self.groups > 1:
            return B.reshape(self.groups, self.out // self.groups, -1)
        return B.reshape(self.out, -1, self.experts).swapaxes(0, 1).swapaxes(0, 2)

    def whole_B(self, B: Any) -> Any:
        """Undo blocks_B: B of all blocks as one matrix (out, columns)."""
        if self.experts > 1:
            B = B.swapaxes(0, 2).swapaxes(0, 1)
        return B.reshape(self.out, -1)


def target_rule(folder: Path, config: dict[str, Any]) -> Callable[[str], bool]:
    """A function that tells whether PEFT puts LoRA on a module; always True for 'all-linear' or None."""
    path = folder / CONFIG
    targets = config["target_modules"]
    if any(
        config[field] not in (None, [], "") for field in ("exclude_modules", "layers_to_transform", "layers_pattern")
    ):  # these need PEFT's own rules; importing PEFT takes time
        from peft import LoraConfig
        from peft.tuners.tuners_utils import check_target_module_exists

        fields = [field for field in (*TARGETS, "modules_to_save") if field != "target_parameters"]
        try:
            given = LoraConfig(**{field: config[field] for field in fields})
        except (TypeError, ValueError) as error:
            raise SalsaError(f"{path} is not a valid LoRA configuration ({error}); save the adapter again") from None
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
            f"{path}: target_modules is not a regular expression ({error}); save the adapter again"
        ) from None
    return lambda module: pattern.fullmatch(module) is not None


def strip_wrappers(path: str) -> tuple[str, int]:
    """A module's name without PEFT's wrappers (.base_layer) at the end, and the number of these wrappers."""
    module = path
    while module.endswith(WRAPPED):
        module = module.removesuffix(WRAPPED)
    return module, (len(path) - len(module)) // len(WRAPPED)


def is_saved(name: str, config: dict[str, Any]) -> bool:
    """Whether a tensor lies in a module whose name ends with one of modules_to_save, as in PEFT."""
    parts = name.split(".")[:-1]
    paths = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return any(path.endswith(module) for path in paths for module in config["modules_to_save"] or ())


def rank_and_scaling(folder: Path, config: dict[str, Any], module: str) -> tuple[int, float]:
    """r and scaling of a module as in PEFT's LoraModel: the first matching pattern is used."""
    path = folder / CONFIG
    r = by_pattern(config["rank_pattern"], module, config["r"], path)
    alpha = by_pattern(config["alpha_pattern"], module, config["lora_alpha"], path)
    require(
        isinstance(r, int) and r >= 1 and isinstance(alpha, int | float) and math.isfinite(alpha),
        f"{path}: {module} has rank {r!r} and alpha {alpha!r}; the rank must be a whole number of at least 1, alpha a"
        " finite number; correct the configuration",
    )
    return r, alpha / math.sqrt(r) if config["use_rslora"] else alpha / r


def by_pattern(patterns: dict[str, Any], module: str, default: Any, path: Path) -> Any:
    """Value of the first pattern that matches a module's name, as in PEFT's get_pattern_key, or `default`."""
    try:
        return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)
    except re.error as error:
        raise SalsaError(
            f"{path}: rank_pattern or alpha_pattern holds an invalid regular expression ({error}); save the adapter"
            " again"
        ) from None


def parameters_of(module: str, config: dict[str, Any], named: bool = False) -> list[str]:
    """The parameters of a module that target_parameters may mean, in the order of registration.

    named: use only targets with the module's name (`gate.weight`), not those that fit any module (`gate_up_proj`).
    """
    leaves = set()
    for target in config["target_parameters"] or ():
        parent, _, leaf = target.rpartition(".")
        if (not parent and not named) or (parent and (module == parent or module.endswith(f".{parent}"))):
            leaves.add(leaf)
    return sorted(leaves, key=registration_order)


def registration_order(parameter: str) -> tuple[int, str]:
    """Sort key that puts a module's parameters in the order in which the module registers them."""
    return (ORDER.index(parameter) if parameter in ORDER else len(ORDER), parameter)


def parameter_at(module: str, depth: int, levels: int, config: dict[str, Any]) -> str | None:
    """The parameter that one of a module's nested wrappers is for; None if that is unclear.

    depth: 0 for the outermost of the `levels` wrappers, which is for the parameter that the module registers last.
    """
    for named in (True, False):
        leaves = parameters_of(module, config, named)
        if len(leaves) == levels and (levels == 1 or set(leaves) <= set(ORDER)):
            return leaves[levels - 1 - depth]
    return None


def read_shape(
    path: Path,
    module: str,
    shapes: tuple[tuple[int, ...], tuple[int, ...]],
    config: dict[str, Any],
    place: tuple[str, str | None, str],
    embedding: bool,
) -> Shape:
    """The Shape of A and B, checked against the configured rank. place: module, parameter and target."""
    A, B = shapes
    shown = f"lora_A {list(A)} and lora_B {list(B)}"
    require(
        0 not in (*A, *B) and len(A) > 1 < len(B),
        f"{path}: {module} has {shown}: the parts of a sharded model (DeepSpeed ZeRO-3, FSDP) were not gathered"
        " before saving; gather them and save again",
    )
    require(
        len(A) == len(B) and set(B[2:]) <= {1} and (not embedding or len(A) == 2),
        f"{path}: {module} has {shown}, which are neither two matrices nor the factors of a convolution (lora_B with"
        " kernel 1); save the adapter again",
    )
    wrapped, parameter, target = place
    r, _ = rank_and_scaling(path.parent, config, target if parameter is None else module)
    experts = A[0] // r if parameter is not None and A[0] % r == 0 else 1
    groups = A[0] // B[1] if len(A) > 2 and 0 < B[1] < A[0] and A[0] % B[1] == 0 and B[0] % (A[0] // B[1]) == 0 else 1
    require(
        A[0] == B[1] * groups == r * experts,
        f"{path}: {module} has {shown}, but r and rank_pattern of {CONFIG} say rank {r}, so PEFT would not load the"
        " file; correct r or rank_pattern there, or save the adapter again",
    )
    return Shape(r, A[1:], B[0], embedding, experts, groups, wrapped, parameter, target)
