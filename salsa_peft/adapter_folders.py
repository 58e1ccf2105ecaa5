"""PEFT adapter folders on disk: configuration, manifest and base, read or refused with the reason; written atomically.

What a soup has no rule for is refused with the file and the reason, never dropped in silence. The configuration is read as plain
data and peft is not imported: that takes longer, and more memory, than averaging a 7B model's adapters.
Left out: full checkpoints, Hub ids. What the tensors of a folder are is in adapter_tensors.py.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import SalsaError, require
from .fingerprints import FINGERPRINT as FINGERPRINT
from .fingerprints import read_fingerprint as read_fingerprint
from .runs import MANIFEST, read_manifest, sha256

if TYPE_CHECKING:
    from .adapter_tensors import Member

logger = logging.getLogger(__name__)

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
SUMMARY = "soup.json"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")

TARGETS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
DEFAULTS: dict[str, Any] = {
    **dict.fromkeys(TARGETS),
    **dict.fromkeys(("task_type", "auto_mapping", "base_model_name_or_path", "revision")),
    **dict.fromkeys(("modules_to_save", "trainable_token_indices")),
    "r": 8,
    "lora_alpha": 8,
    "use_rslora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "fan_in_fan_out": False,
    "bias": "none",
    "lora_bias": False,
    "init_lora_weights": True,
}
"""LoraConfig's fields that a soup reads, and what PEFT takes where a file has none."""
IGNORED = (
    "peft_type",
    "peft_version",
    "inference_mode",
    "lora_dropout",
    "megatron_core",
    "qalora_group_size",
    "eva_config",
)
# Any other field that is set is refused: what PEFT invents next must not be dropped in silence.
WHY = {
    "use_dora": "DoRA's delta is not linear in its factors",
    "target_parameters": "LoRA on bare parameters is not averaged",
    "layer_replication": "it changes the base",
}
KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("target_modules", "exclude_modules"), (list, str)),
    **dict.fromkeys(("rank_pattern", "alpha_pattern"), (dict,)),
    **dict.fromkeys(("use_rslora", "fan_in_fan_out", "lora_bias"), (bool,)),
    **dict.fromkeys(("task_type", "base_model_name_or_path", "revision"), (str,)),
    "modules_to_save": (list,),
    "trainable_token_indices": (list, dict),
}
KEEPS_BASE = (
    True,
    False,
    "gaussian",
    "eva",
    "orthogonal",
)  # pissa, olora, corda, loftq … change the base's own weights


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise SalsaError(f"{path} is missing: a member is a PEFT adapter folder with {CONFIG} and {WEIGHTS}") from None
    except (ValueError, RecursionError) as error:
        raise SalsaError(f"{path} is not JSON ({error}): save it again") from None
    require(isinstance(content, dict), f"{path} holds a {type(content).__name__}, expected a mapping: save it again")
    return content  # type: ignore[no-any-return]


def read_config(folder: Path) -> dict[str, Any]:
    """DEFAULTS' fields; refused: other tuners, and options that make the delta something else than scaling · B · A."""
    path = folder / CONFIG
    raw = read_json(path)
    tuner = raw.get("peft_type")
    require(tuner == "LORA", f"{path}: peft_type is {tuner!r}, expected 'LORA': only LoRA adapters can be averaged")
    for field, value in raw.items():
        known = field in DEFAULTS or field in IGNORED or value in (None, False, "", [], {})
        require(known, f"{path}: {field} is {value!r}: {WHY.get(field, 'a soup has no rule for this option')}")
        expected = KINDS.get(field)
        fits = expected is None or value is None or isinstance(value, expected)
        names = " or ".join(kind.__name__ for kind in expected or ())
        require(fits, f"{path}: {field} is {value!r}, expected {names}: save the adapter again")
    config = DEFAULTS | {field: raw[field] for field in DEFAULTS if raw.get(field) is not None}
    biases = ("none", "all", "lora_only")
    require(config["bias"] in biases, f"{path}: bias is {config['bias']!r}, expected one of {', '.join(biases)}")
    initial = config["init_lora_weights"]
    require(
        initial in KEEPS_BASE,
        f"{path}: init_lora_weights is {initial!r}, which changes the base's own weights: "
        "save the adapter with path_initial_model_for_weight_conversion first",
    )
    return config


def check_manifest(folder: Path) -> None:
    """Sizes and SHA-256 of the files that a soup reads, where a run wrote a manifest. Raises SalsaError that names the file."""
    manifest = read_manifest(folder)
    if manifest is None:
        if (folder / MANIFEST).exists():
            logger.warning("warning: %s cannot be read: the files beside it are not checked", folder / MANIFEST)
        return
    for name in (CONFIG, WEIGHTS, FINGERPRINT, *TOKENIZER):
        if (entry := manifest["files"].get(name)) is None:
            continue
        path = folder / name
        require(path.is_file(), f"{path} is missing, {MANIFEST} lists it: copy the folder again")
        same = path.stat().st_size == entry.get("size") and sha256(path) == entry.get("sha256")
        require(
            same,
            f"{path} is not what {MANIFEST} says (size or SHA-256): it is damaged or changed; copy or make it again",
        )


def check_one_base(members: Sequence[Member]) -> None:
    """Fingerprints decide where every member has one; names and revisions decide otherwise."""
    unknown = [member for member in members if member.fingerprint is None]
    known = [member for member in members if member.fingerprint is not None]
    for member in known[1:]:
        require(
            member.fingerprint == known[0].fingerprint,
            f"{member.folder} was trained on base {str(member.fingerprint)[:12]}…, "
            f"{known[0].folder} on {str(known[0].fingerprint)[:12]}…: a soup needs members of one base",
        )
    for member in unknown:
        logger.warning(
            "warning: %s has no %s: that its base is the others' is believed, not checked", member.folder, FINGERPRINT
        )
    head = members[0]
    for member in members:
        base, other = (
            (m.config["base_model_name_or_path"] or "", m.config["revision"] or "main") for m in (head, member)
        )
        require(
            not unknown or base == other,
            f"{member.folder} names the base {'@'.join(other)!r}, {head.folder} {'@'.join(base)!r}, "
            f"and no {FINGERPRINT} says that they are the same: a soup needs members of one base",
        )
        tasks = [m.config["task_type"] for m in (member, head)]
        require(
            tasks[0] == tasks[1] or member.factors.keys() == head.factors.keys(),
            f"{member.folder} has task_type {tasks[0]!r}, {head.folder} {tasks[1]!r}, "
            "and other modules: a soup needs members of one task",
        )


def check_out(folder: Path, members: Sequence[Member]) -> None:
    """Refused as the soup's folder: a member, a file, an adapter or a checkpoint that is no soup of adapters."""
    require(
        all(folder.resolve() != member.folder.resolve() for member in members),
        f"{folder} is a member: a soup is never written over one; name another folder",
    )
    require(not folder.exists() or folder.is_dir(), f"{folder} is a file, expected a folder: name another one")
    require(
        not (folder / "config.json").exists(), f"{folder} holds a model: name another folder for the soup's adapter"
    )
    require(
        not (folder / CONFIG).exists() or (folder / SUMMARY).exists(),
        f"{folder} holds an adapter that is not a soup: name another folder (OUT comes first, then the members)",
    )


def make_room(folder: Path) -> None:
    """Take an earlier soup's other files away, its configuration first: from here on the folder opens nowhere.

    Its summary goes last: where there is none, a tokenizer in the folder is not a soup's, and stays.
    """
    ours = (CONFIG, FINGERPRINT, *TOKENIZER, SUMMARY) if (folder / SUMMARY).exists() else (CONFIG,)
    for name in ours:
        (folder / name).unlink(missing_ok=True)


def remove_remains(folder: Path) -> None:
    """The temporary files of a write that was killed."""
    for name in (CONFIG, SUMMARY, FINGERPRINT, WEIGHTS, *TOKENIZER):
        for path in folder.glob(f".{name}.*.tmp"):
            path.unlink(missing_ok=True)


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
