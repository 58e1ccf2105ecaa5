"""PEFT adapter folders on disk: read into LoRA factors, or refused with the reason; written atomically.

The delta of a module is scaling · B · A, scaling = alpha / r (rsLoRA: alpha / √r). What makes it something else,
or would be dropped in silence, is refused with the folder, the tensor and the reason. Safetensors only, never pickle.
Left out: full checkpoints, Hub ids, averaged modules_to_save, biases, embeddings and conv layers.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from salsa_peft.config import SalsaError

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig

logger = logging.getLogger(__name__)

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
FINGERPRINT, SUMMARY = "fingerprint.json", "soup.json"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
FACTOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<half>[AB])\.weight")

TARGETS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
# LoraConfig's fields that a soup has a rule for. Any other that is set is refused: what PEFT invents next must not be
# dropped in silence.
UNDERSTOOD = frozenset(TARGETS) | frozenset(
    [
        "task_type",
        "peft_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "r",
        "lora_alpha",
        "lora_dropout",
        "fan_in_fan_out",
        "bias",
        "use_rslora",
        "init_lora_weights",
        "rank_pattern",
        "alpha_pattern",
        "megatron_core",
        "qalora_group_size",
        "eva_config",
    ]
)
WHY = {
    "use_dora": "DoRA's delta is not linear in its factors",
    "lora_bias": "biases are not averaged yet",
    "modules_to_save": "full weights beside an adapter are not averaged yet",
    "trainable_token_indices": "trained tokens are not averaged yet",
    "target_parameters": "LoRA on bare parameters is not averaged yet",
    "layer_replication": "it changes the base",
}
KEEPS_BASE = (
    True,
    False,
    "gaussian",
    "eva",
    "orthogonal",
)  # pissa, olora, corda, loftq … change the base's own weights


class Factors(NamedTuple):
    """One member's LoRA of one module: its delta is scaling · B · A. Shapes: A (r, in), B (out, r)."""

    A: torch.Tensor
    B: torch.Tensor
    scaling: float


@dataclass(frozen=True)
class Member:
    """What is remembered of a member besides its factors."""

    name: str
    folder: Path
    config: LoraConfig
    fingerprint: str | None
    """SHA-256 of the base it was trained on; None: its folder does not say."""
    ranks: dict[str, int]


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise SalsaError(f"{path} is missing: a member is a PEFT adapter folder with {CONFIG} and {WEIGHTS}") from None
    except (ValueError, RecursionError) as error:
        raise SalsaError(f"{path} is not JSON ({error}): save it again") from None
    if not isinstance(content, dict):
        raise SalsaError(f"{path} holds a {type(content).__name__}, expected a mapping: save it again")
    return content


def read_config(folder: Path) -> LoraConfig:
    """LoraConfig; refused: other tuners, and options that make the delta something else than scaling · B · A."""
    from peft import LoraConfig

    path = folder / CONFIG
    raw = read_json(path)
    if raw.get("peft_type") != "LORA":
        raise SalsaError(
            f"{path}: peft_type is {raw.get('peft_type')!r}, expected 'LORA': only LoRA adapters can be averaged"
        )
    for field, value in raw.items():
        if field not in UNDERSTOOD and value not in (None, False, "", [], {}):
            raise SalsaError(f"{path}: {field} is {value!r}: {WHY.get(field, 'a soup has no rule for this option')}")
    if raw.get("bias", "none") != "none":
        raise SalsaError(f"{path}: bias is {raw['bias']!r}, expected 'none': biases are not averaged yet")
    if raw.get("init_lora_weights", True) not in KEEPS_BASE:
        raise SalsaError(
            f"{path}: init_lora_weights is {raw['init_lora_weights']!r}, which changes the base's own weights: "
            "save the adapter with path_initial_model_for_weight_conversion first"
        )
    try:
        return LoraConfig(**{field: value for field, value in raw.items() if field in UNDERSTOOD})
    except (TypeError, ValueError) as error:
        raise SalsaError(f"{path} is not a LoRA configuration ({error}): save the adapter again") from None


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / WEIGHTS
    if not path.is_file():
        if (folder / PICKLED).exists():
            raise SalsaError(
                f"{folder} holds {PICKLED}, which is pickled and never read: save the adapter as {WEIGHTS}"
            )
        raise SalsaError(f"{path} is missing: a member is a PEFT adapter folder with {CONFIG} and {WEIGHTS}")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise SalsaError(
            f"{path} cannot be read ({error}): it is truncated or not safetensors; copy or save it again"
        ) from None


def rank_and_scaling(folder: Path, config: LoraConfig, module: str) -> tuple[int, float]:
    """r and scaling of a module as PEFT's LoraModel resolves them: the first pattern in the file that matches wins."""
    from peft.utils.other import get_pattern_key

    rank_pattern, alpha_pattern = config.rank_pattern or {}, config.alpha_pattern or {}
    r = rank_pattern.get(get_pattern_key(list(rank_pattern), module), config.r)
    alpha = alpha_pattern.get(get_pattern_key(list(alpha_pattern), module), config.lora_alpha)
    if not isinstance(r, int) or r < 1 or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise SalsaError(
            f"{folder / CONFIG}: {module} has rank {r!r} and alpha {alpha!r}, expected a whole number and a number"
        )
    return r, alpha / math.sqrt(r) if config.use_rslora else alpha / r


def why_not_factor(key: str) -> str:
    if "lora_magnitude" in key:
        return WHY["use_dora"]
    if "lora_embedding" in key:
        return "LoRA on embeddings is not averaged yet"
    if key.endswith(".bias"):
        return WHY["lora_bias"]
    if "lora_" not in key and key.endswith(".weight"):
        return WHY["modules_to_save"]
    return "unknown tensor, expected base_model.model.<module>.lora_A.weight or .lora_B.weight"


def read_factors(folder: Path, config: LoraConfig) -> dict[str, Factors]:
    """{module: Factors} in float32: every tensor known, finite, with its other half and the configured rank."""
    from peft.tuners.tuners_utils import check_target_module_exists

    path = folder / WEIGHTS
    halves: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in read_tensors(folder).items():
        match = FACTOR.fullmatch(key)
        if match is None:
            raise SalsaError(f"{path}: {key}: {why_not_factor(key)}")
        if tensor.dim() != 2 or not tensor.is_floating_point():
            raise SalsaError(
                f"{path}: {key} is {tensor.dtype} of shape {list(tensor.shape)}, expected a matrix of floats: "
                "conv layers are not averaged yet"
            )
        tensor = tensor.float()
        if not tensor.isfinite().all():
            raise SalsaError(f"{path}: {key} holds values that are not finite: train or save this adapter again")
        halves.setdefault(match["module"], {})[match["half"]] = tensor
    if not halves:
        raise SalsaError(f"{path} holds no tensors: expected lora_A and lora_B of at least one module")
    factors = {}
    for module, pair in sorted(halves.items()):
        if len(pair) == 1:
            raise SalsaError(
                f"{path}: {module} has lora_{min(pair)} alone, expected lora_A and lora_B: save the adapter again"
            )
        # 'all-linear' and None are resolved on the base, which a soup does not read
        if config.target_modules not in (None, "all-linear") and not check_target_module_exists(config, module):
            raise SalsaError(
                f"{path}: {module} is not among the target_modules of {CONFIG}: PEFT would drop its tensors in silence"
            )
        r, scaling = rank_and_scaling(folder, config, module)
        if (pair["A"].shape[0], pair["B"].shape[1]) != (r, r):
            shapes = f"lora_A {list(pair['A'].shape)} and lora_B {list(pair['B'].shape)}"
            raise SalsaError(
                f"{path}: {module} has {shapes}, expected rank {r} from {CONFIG}: the two files do not belong together"
            )
        factors[module] = Factors(pair["A"], pair["B"], scaling)
    return factors


def read_member(folder: Path, name: str) -> tuple[Member, dict[str, Factors]]:
    config = read_config(folder)
    factors = read_factors(folder, config)
    fingerprint = None
    if (folder / FINGERPRINT).exists():
        fingerprint = read_json(folder / FINGERPRINT).get("base")
        if not isinstance(fingerprint, str):
            raise SalsaError(
                f"{folder / FINGERPRINT}: base is {fingerprint!r}, expected the SHA-256 of the base: write it again"
            )
    return Member(name, folder, config, fingerprint, {module: len(f.A) for module, f in factors.items()}), factors


def check_one_base(members: Sequence[Member]) -> None:
    """Fingerprints decide where every member has one; names and revisions decide otherwise."""
    unknown = [member for member in members if member.fingerprint is None]
    first = next((member for member in members if member.fingerprint is not None), None)
    for member in members:
        if first and member.fingerprint not in (None, first.fingerprint):
            raise SalsaError(
                f"{member.folder} was trained on base {str(member.fingerprint)[:12]}…, "
                f"{first.folder} on {str(first.fingerprint)[:12]}…: a soup needs members of one base"
            )
    for member in unknown:
        logger.warning(
            "warning: %s has no %s: that its base is the others' is believed, not checked", member.folder, FINGERPRINT
        )
    head = members[0]
    for member in members:
        base, other = ((m.config.base_model_name_or_path or "", m.config.revision or "main") for m in (head, member))
        if unknown and base != other:
            raise SalsaError(
                f"{member.folder} names the base {'@'.join(other)!r}, {head.folder} {'@'.join(base)!r}, "
                f"and no {FINGERPRINT} says that they are the same: a soup needs members of one base"
            )
        if member.config.task_type != head.config.task_type and member.ranks.keys() != head.ranks.keys():
            raise SalsaError(
                f"{member.folder} has task_type {member.config.task_type!r}, {head.folder} {head.config.task_type!r}, "
                "and other modules: a soup needs members of one task"
            )


def clear_for_soup(folder: Path, members: Sequence[Member]) -> None:
    """Make the folder, or take an earlier soup's configuration away; any other adapter is never written over."""
    if any(folder.resolve() == member.folder.resolve() for member in members):
        raise SalsaError(f"{folder} is a member: a soup is never written over one; name another folder")
    if folder.exists() and not folder.is_dir():
        raise SalsaError(f"{folder} is a file, expected a folder: name another one")
    if (folder / CONFIG).exists():
        if not (folder / SUMMARY).exists():
            raise SalsaError(
                f"{folder} holds an adapter that is not a soup: name another folder (OUT comes first, then the members)"
            )
        for name in (CONFIG, SUMMARY, FINGERPRINT, *TOKENIZER):
            (folder / name).unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """`write` fills a temporary name in the same folder; the file appears whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
