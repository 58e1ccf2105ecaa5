"""What the tensors of a PEFT adapter folder are, known from their names and headers: LoRA's factors, or values averaged directly.

    lora_A, lora_B               a delta scaling · B · A; of a linear layer, of a convolution (as a matrix: in · kernel columns)
    lora_embedding_A, _B         the delta's transpose, of an embedding
    lora_B.bias                  scaling · b, added to what the layer gives (lora_bias)
    anything else                full values of the base's own: modules_to_save, biases, saved embeddings, rows of trained tokens

scaling = alpha / r, with rsLoRA alpha / √r. Refused with file, tensor and reason: what is unknown, alone, of another rank or shape, or
not finite (looked at when a tensor is read). Left out: convolutions in groups.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from . import float_arrays
from .adapter_folders import CONFIG, PICKLED, TARGETS, WEIGHTS, WHY, check_manifest, read_config, read_fingerprint
from .errors import SalsaError, require
from .float_arrays import DTYPES, Array
from .safetensors_files import SafetensorsFile

PREFIX = "base_model.model."
PART = re.compile(
    re.escape(PREFIX) + r"(?P<module>.+)\.lora_(?P<part>A\.weight|B\.weight|B\.bias|embedding_A|embedding_B)"
)
TOKENS = ".token_adapter.trainable_tokens_delta"


class Factors(NamedTuple):
    """Where one member's LoRA of one module lies in its file.

    Shapes: A (r, in), of an embedding (r, tokens), of a convolution (r, in, *kernel); B (out, r), of a convolution (out, r, 1, …).
    """

    A: str
    B: str
    bias: str | None
    shape_A: tuple[int, ...]
    shape_B: tuple[int, ...]
    scaling: float

    @property
    def rank(self) -> int:
        return self.shape_A[0]

    @property
    def embedding(self) -> bool:
        return self.A.endswith("lora_embedding_A")


@dataclass(frozen=True)
class Member:
    """An adapter folder, its tensors still on the disk."""

    name: str
    folder: Path
    config: dict[str, Any]
    """LoraConfig's fields that a soup reads, adapter_folders.DEFAULTS."""
    fingerprint: str | None
    """SHA-256 of the base it was trained on; None: its folder does not say."""
    file: SafetensorsFile
    factors: dict[str, Factors]
    """By module, in the order of their names."""
    direct: dict[str, str]
    """What is averaged directly: the base's own name (of trained tokens with TOKENS behind the embedding's) → tensor."""

    @property
    def ranks(self) -> dict[str, int]:
        return {module: factors.rank for module, factors in self.factors.items()}

    def read(self, key: str) -> Array:
        """A tensor's values, float32 (float64 where the file has that). Raises SalsaError where one is not finite."""
        return float_arrays.read(self.file, key)

    def token_indices(self, name: str) -> list[int]:
        """The rows of the embedding that trained tokens' values replace."""
        given = self.config["trainable_token_indices"]
        module = name.removesuffix(TOKENS)
        if isinstance(given, dict):
            fits = (rows for key, rows in given.items() if module == key or module.endswith(f".{key}"))
            given = next(fits, None)
        return list(given or [])


def read_member(folder: Path, name: str) -> Member:
    """Everything but the values: configuration, fingerprint, names, shapes and dtypes, held against one another."""
    config = read_config(folder)
    path = folder / WEIGHTS
    require(
        path.is_file() or not (folder / PICKLED).exists(),
        f"{folder} holds {PICKLED}, which is pickled and never read: save the adapter as {WEIGHTS}",
    )
    require(path.is_file(), f"{path} is missing: a member is a PEFT adapter folder with {CONFIG} and {WEIGHTS}")
    file = SafetensorsFile(path)
    check_manifest(folder)
    parts, direct = sort_tensors(file, config)
    require(bool(parts), f"{path} holds no tensors: expected lora_A and lora_B of at least one module")
    targeted = target_rule(folder, config)
    factors = {module: read_factors(file, module, found, config) for module, found in sorted(parts.items())}
    for module in factors:
        require(
            targeted(module),
            f"{path}: {module} is not among the target_modules of {CONFIG}: PEFT would drop its tensors in silence",
        )
    member = Member(name, folder, config, read_fingerprint(folder), file, factors, dict(sorted(direct.items())))
    check_direct(member)
    return member


def sort_tensors(file: SafetensorsFile, config: dict[str, Any]) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """{module: {part: tensor}}, and what is averaged directly, as Member has it."""
    parts: dict[str, dict[str, str]] = {}
    direct: dict[str, str] = {}
    for key, entry in file.entries.items():
        match = PART.fullmatch(key)
        if match is None:
            reason = why_not(key, config)
            require(reason is None, f"{file.path}: {key}: {reason}")
            name = key.removeprefix(PREFIX).replace(".base_layer.", ".")
            require(
                name not in direct,
                f"{file.path}: {key} and {direct.get(name)} are one parameter: save the adapter again",
            )
            direct[name] = key
        else:
            parts.setdefault(match["module"], {})[match["part"]] = key
        require(
            entry.dtype in DTYPES,
            f"{file.path}: {key} is {entry.dtype} of shape {list(entry.shape)}, expected one of {', '.join(DTYPES)}",
        )
    return parts, direct


def why_not(key: str, config: dict[str, Any]) -> str | None:
    """Why a tensor that is no factor of LoRA cannot be averaged directly; None: it can."""
    name = key.removeprefix(PREFIX)
    if "lora_magnitude" in key:
        return WHY["use_dora"]
    if name == key or "lora_" in key:
        return f"unknown tensor, expected {PREFIX}<module>.lora_A.weight or .lora_B.weight"
    if ".modules_to_save." in key or ".original_module." in key:
        return "a bias of modules_to_save saved twice (bias: all) has no place in the base; save the adapter with bias: none"
    if key.endswith(TOKENS):
        return (
            None
            if config["trainable_token_indices"]
            else f"{CONFIG} has no trainable_token_indices: save the adapter again"
        )
    saved = is_saved(name, config)
    if name.endswith(".bias") and config["bias"] == "none" and not saved:
        return f"{CONFIG} has bias 'none': the two files do not belong together; save the adapter again"
    if not saved and not name.endswith((".bias", ".weight")):
        return f"unknown tensor, expected a module of modules_to_save, which is {config['modules_to_save']!r}"
    return None  # also embeddings that PEFT saves because they were resized or are targeted


def is_saved(name: str, config: dict[str, Any]) -> bool:
    """Whether a module or tensor lies in modules_to_save, as PEFT finds them."""
    return any(re.match(rf"(^|.*\.){module}($|\..*)", name) for module in config["modules_to_save"] or ())


def read_factors(file: SafetensorsFile, module: str, found: dict[str, str], config: dict[str, Any]) -> Factors:
    """The parts of one module, of the rank and with the bias that the configuration says."""
    parts = {part.removesuffix(".weight"): key for part, key in found.items()}
    kind = "embedding_" if any(part.startswith("embedding") for part in parts) else ""
    halves = [f"{kind}A", f"{kind}B"]
    shown = " and ".join(f"lora_{half}" for half in halves)
    require(
        set(parts) - {"B.bias"} == set(halves),
        f"{file.path}: {module} has {' and '.join(f'lora_{part}' for part in sorted(parts))} alone, expected {shown}: "
        "save the adapter again",
    )
    A, B = (file.entries[parts[half]].shape for half in halves)
    bias = parts.get("B.bias")
    expected = (
        f"{CONFIG} has lora_bias {config['lora_bias']}: the two files do not belong together; save the adapter again"
    )
    require(
        (bias is not None) == (config["lora_bias"] and not kind),
        f"{file.path}: {bias or module + '.lora_B.bias'}: {expected}",
    )
    matrices = len(A) == len(B) >= 2 and set(B[2:]) <= {1} and (not kind or len(A) == 2)
    shapes = f"lora_A {list(A)} and lora_B {list(B)}"
    require(
        matrices,
        f"{file.path}: {module} has {shapes}, expected two matrices, or a convolution's with lora_B of kernel 1",
    )
    r, scaling = rank_and_scaling(file.path.parent, config, module)
    grouped = "; convolutions in groups are not averaged" if A[0] == r and len(A) > 2 else ""
    require(
        (A[0], B[1]) == (r, r),
        f"{file.path}: {module} has {shapes}, expected rank {r} from {CONFIG}: the two files do not belong together{grouped}",
    )
    require(
        bias is None or file.entries[bias].shape == B[:1],
        f"{file.path}: {bias} has another length than {parts[halves[1]]}: save the adapter again",
    )
    return Factors(parts[halves[0]], parts[halves[1]], bias, A, B, scaling)


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


def target_rule(folder: Path, config: dict[str, Any]) -> Callable[[str], bool]:
    """Whether PEFT puts LoRA on a module of that name. 'all-linear' and None are resolved on the base, which a soup does not read."""
    path = folder / CONFIG
    targets = config["target_modules"]
    if any(
        config[field] not in (None, [], "") for field in TARGETS[1:]
    ):  # rules of PEFT's own, at the price of its import
        from peft import LoraConfig
        from peft.tuners.tuners_utils import check_target_module_exists

        try:
            given = LoraConfig(**{field: config[field] for field in (*TARGETS, "modules_to_save")})
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


def check_direct(member: Member) -> None:
    """What the configuration promises beside LoRA is there, a row for each trained token."""
    path, config = member.file.path, member.config
    saved = config["modules_to_save"]
    require(
        not saved or any(is_saved(name, config) for name in member.direct),
        f"{path}: found no tensor of modules_to_save {saved!r}: the two files do not belong together; save the adapter again",
    )
    tokens = [name for name in member.direct if name.endswith(TOKENS)]
    require(
        bool(tokens) or not config["trainable_token_indices"],
        f"{path}: found no {TOKENS[1:]}, though {CONFIG} has trainable_token_indices: save the adapter again",
    )
    for name in tokens:
        rows, expected = member.file.entries[member.direct[name]].shape[0], len(member.token_indices(name))
        fits = f"expected {expected} from trainable_token_indices: save it again"
        require(rows == expected, f"{path}: {member.direct[name]} has {rows} rows, {fits}")


def check_same_direct(members: Sequence[Member]) -> None:
    """What is averaged directly must be in every member: what the others have there is the base's, which a soup does not read."""
    head = members[0]
    for member in members[1:]:
        odd = min(member.direct.keys() ^ head.direct.keys(), default=None)
        if odd is not None:
            has, lacks = (head, member) if odd in head.direct else (member, head)
            raise SalsaError(
                f"{lacks.file.path}: found no {odd}, which {has.folder} has: full values are averaged directly, so every "
                "member must have them; train or save both with the same modules_to_save, bias and trained tokens"
            )
        for name in head.direct:
            shapes = [list(m.file.entries[m.direct[name]].shape) for m in (member, head)]
            require(
                shapes[0] == shapes[1],
                f"{member.file.path}: {name} has shape {shapes[0]}, in {head.folder} {shapes[1]}: a soup needs members of one base",
            )
            require(
                not name.endswith(TOKENS) or member.token_indices(name) == head.token_indices(name),
                f"{member.folder / CONFIG}: trainable_token_indices of {name.removesuffix(TOKENS)} are not those of {head.folder}: "
                "only the same tokens in the same order can be averaged",
            )
