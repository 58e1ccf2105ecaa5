"""PEFT adapter folders on disk: configuration, manifest and base, read or refused with the reason; written atomically.

What a soup has no rule for is refused with the file and the reason, never dropped in silence. The configuration is read as plain
data and peft is not imported: that takes longer, and more memory, than averaging a 7B model's adapters.
Left out: full checkpoints, Hub ids. What the tensors of a folder are is in soup/lora/tensors.py.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from salsa_peft.utils.errors import SalsaError, require
from salsa_peft.utils.fingerprints import FINGERPRINT, sha256
from salsa_peft.utils.manifests import MANIFEST, read_manifest

logger = logging.getLogger(__name__)
CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
SUMMARY = "soup.json"
MORE_TEMPLATES = "additional_chat_templates"
"""Transformers' folder of a tokenizer's chat templates beside the default one: for tools, for documents."""
TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model", "vocab.json",
    "merges.txt", "chat_template.jinja",
)  # fmt: skip
TARGETS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "target_parameters")
DEFAULTS: dict[str, Any] = {
    **dict.fromkeys(TARGETS),
    **dict.fromkeys(("task_type", "auto_mapping", "base_model_name_or_path", "revision")),
    **dict.fromkeys(("modules_to_save", "trainable_token_indices", "alora_invocation_tokens")),
    "r": 8,
    "lora_alpha": 8,
    "use_rslora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "fan_in_fan_out": False,
    "bias": "none",
    "lora_bias": False,
    "ensure_weight_tying": False,
    "init_lora_weights": True,
}
"""LoraConfig's fields that a soup reads, and what PEFT takes where a file has none."""
EMPTY_IS_NONE = ("modules_to_save", "trainable_token_indices", "alora_invocation_tokens")
"""Fields of which an empty list says what null says."""
IGNORED = (
    "peft_type",
    "peft_version",
    "inference_mode",
    "lora_dropout",
    "megatron_core",
    "qalora_group_size",
    "runtime_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "loftq_config",
    "velora_config",
    "monteclora_config",
    "merge_weights",
)
"""Fields that do not change what a trained adapter computes: how it was started (init_lora_weights says whether that changed the base),
how it was trained (VeLoRA's gradients, MonteCLoRA's samples), and run-time settings."""
MERGES = "--merge adds such adapters to their base exactly"
WHY = {
    "use_dora": f"DoRA's delta is not linear in its factors, so that no adapter is the mean; {MERGES}",
    "layer_replication": "it repeats layers of the base, which a soup does not read; merge each adapter with PEFT and average the checkpoints",
    "enable_lora": "this is the fused-layer LoRA of PEFT 0.2, which today's PEFT reads otherwise; train it again with a newer PEFT",
    "use_qalora": "QA-LoRA pools the layer's input, so that its delta is not B·A; train the adapters without it",
    "use_bdlora": "BD-LoRA's factors are block-diagonal and sharded; train the adapters without it",
    "arrow_config": "Arrow routes between adapters for every token, so that there is no one delta; average the task adapters instead",
    "kasa_config": "KaSA truncates the base's weights; merge each adapter with PEFT and average the checkpoints",
    "megatron_config": "Megatron's layers are sharded; save the adapter from an unsharded model",
}
MERGED = ("use_dora",)
"""Options that need the base's values: a soup that is merged into the base has them, an adapter has not."""
KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("target_modules", "exclude_modules"), (list, str)),
    **dict.fromkeys(("rank_pattern", "alpha_pattern"), (dict,)),
    **dict.fromkeys(("use_rslora", "fan_in_fan_out", "lora_bias", "ensure_weight_tying"), (bool,)),
    **dict.fromkeys(("task_type", "base_model_name_or_path", "revision"), (str,)),
    **dict.fromkeys(("modules_to_save", "target_parameters", "alora_invocation_tokens"), (list,)),
    "trainable_token_indices": (list, dict),
}
KEEPS_BASE = (True, False, "gaussian", "eva", "orthogonal", "mica")
"""Initialisations that leave the base as it is; PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA change its weights."""
CONVERT_PICKLE = (
    'python -c "import torch; from safetensors.torch import save_file; save_file({k: v.contiguous() for k, v in '
    "torch.load('adapter_model.bin', weights_only=True).items()}, 'adapter_model.safetensors')\""
)


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise SalsaError(f"{path} is missing: a member is a PEFT adapter folder with {CONFIG} and {WEIGHTS}") from None
    except (ValueError, RecursionError) as error:
        raise SalsaError(f"{path} is not JSON ({error}): save it again") from None
    require(isinstance(content, dict), f"{path} holds a {type(content).__name__}, expected a mapping: save it again")
    return content  # type: ignore[no-any-return]


def read_config(folder: Path, merging: bool = False) -> dict[str, Any]:
    """DEFAULTS' fields; refused: other tuners, and options that make the delta something else than scaling · B · A.

    merging: the members are merged into their base, so that options in MERGED are allowed.
    """
    path = folder / CONFIG
    raw = read_json(path)
    tuner = raw.get("peft_type")
    require(tuner == "LORA", f"{path}: peft_type is {tuner!r}, expected 'LORA': only LoRA adapters can be averaged")
    for field, value in raw.items():
        if field not in DEFAULTS and field not in IGNORED and not (merging and field in MERGED):
            check_unread(path, field, value)
        expected = KINDS.get(field)
        fits = expected is None or value is None or isinstance(value, expected)
        names = " or ".join(kind.__name__ for kind in expected or ())
        require(fits, f"{path}: {field} is {value!r}, expected {names}: save the adapter again")
    given = {
        field: value
        for field, value in raw.items()
        if value is not None and not (value in ([], {}) and field in EMPTY_IS_NONE)
    }
    config = DEFAULTS | {field: given[field] for field in DEFAULTS if field in given}
    biases = ("none", "all", "lora_only")
    require(config["bias"] in biases, f"{path}: bias is {config['bias']!r}, expected one of {', '.join(biases)}")
    initial = config["init_lora_weights"]
    require(
        initial in KEEPS_BASE,
        f"{path}: init_lora_weights is {initial!r}, which changes the base's own weights: save the adapter with "
        "path_initial_model_for_weight_conversion (PEFT's save_pretrained), which makes it an ordinary LoRA of the unchanged base",
    )
    return config


def check_unread(path: Path, field: str, value: Any) -> None:
    """Refuse an option that changes what the adapter computes; say that an unknown one is ignored.

    Of a field that is unknown here, an empty value is off, and a number or a string sets what another option would switch on: PEFT too
    drops fields that it does not know. True, a list or a mapping switches something on, which a soup must not lose in silence.
    """
    if value in (None, False, "", [], {}):
        return
    require(field not in WHY, f"{path}: {field} is {value!r}: {WHY.get(field)}")
    require(
        isinstance(value, int | float | str) and not isinstance(value, bool),
        f"{path}: {field} is {value!r:.80}, an option that this version does not know and that may change what the adapter computes: if it "
        f"does not, take it out of {CONFIG}",
    )
    logger.warning(
        "warning: %s: %s is %r, which this version does not know: it is ignored, as PEFT does", path, field, value
    )


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


def make_room(folder: Path) -> None:
    """Take an earlier soup's other files away, its configuration first: from here on the folder opens nowhere.

    Its summary goes last: where there is none, a tokenizer in the folder is not a soup's, and stays.
    """
    (folder / CONFIG).unlink(missing_ok=True)
    if (folder / SUMMARY).exists():
        shutil.rmtree(folder / MORE_TEMPLATES, ignore_errors=True)
        for name in (FINGERPRINT, *TOKENIZER, SUMMARY):
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
