"""PEFT adapter folders on disk: their files, adapter_config.json and manifest.

An adapter that cannot be averaged is rejected with the file and the reason. The configuration is read as plain JSON:
importing peft takes more time and memory than averaging a 7B model's adapters. The tensors of a folder are read in
soup/lora/tensors.py.
"""

import logging
from pathlib import Path
from typing import Any

from salsa_peft.soup.checkpoints.read import read_mapping
from salsa_peft.utils.errors import require
from salsa_peft.utils.fingerprints import FINGERPRINT
from salsa_peft.utils.manifests import MANIFEST, changed_file, read_manifest
from salsa_peft.utils.safetensors_io import SafetensorsFile

logger = logging.getLogger(__name__)
CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
SUMMARY = "soup.json"
MORE_TEMPLATES = "additional_chat_templates"
"""Folder in which Transformers saves a tokenizer's named chat templates (for tools, for documents)."""
TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "vocab.json", "merges.txt", "chat_template.jinja",
)  # fmt: skip
TARGETS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "target_parameters")
EMPTY_IS_NONE = ("modules_to_save", "trainable_token_indices", "alora_invocation_tokens")
"""Fields in which an empty list means the same as null."""
DEFAULTS: dict[str, Any] = {
    **dict.fromkeys((*TARGETS, "task_type", "auto_mapping", "base_model_name_or_path", "revision", *EMPTY_IS_NONE)),
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
"""The fields of LoraConfig that a soup reads, with PEFT's defaults."""
IGNORED = (
    "peft_type", "peft_version", "inference_mode", "lora_dropout", "megatron_core", "qalora_group_size",
    "runtime_config", "eva_config", "corda_config", "lora_ga_config", "loftq_config", "velora_config",
    "monteclora_config", "merge_weights",
)  # fmt: skip
"""Fields that do not change what a trained adapter computes: initialization, training and run time.

Initializations that change the base's weights are recognized by init_lora_weights.
"""
MERGES = "use `salsa soup --merge`, which adds such adapters to their base exactly"
WHY = {
    "use_dora": f"a DoRA delta is not linear in its factors, so no single adapter is the mean; {MERGES}",
    "layer_replication": "it repeats layers of the base, and a soup does not read the base; merge each adapter with"
    " PEFT and average the checkpoints",
    "enable_lora": "this is fused-layer LoRA of PEFT 0.2, which later versions read differently; retrain the adapter",
    "use_qalora": "QA-LoRA pools the input of a layer, so its delta is not B·A; train the adapters without it",
    "use_bdlora": "the factors of BD-LoRA are block-diagonal and sharded; train the adapters without it",
    "arrow_config": "Arrow chooses between adapters for every token, so there is no single delta; average the task"
    " adapters instead",
    "kasa_config": "KaSA truncates the weights of the base; merge each adapter with PEFT and average the checkpoints",
    "megatron_config": "the layers of Megatron are sharded; save the adapter from an unsharded model",
}
"""Options that a soup of adapters does not support → the reason, and what to do instead."""
MERGE_ONLY = ("use_dora",)
"""Options that only a soup merged into the base supports, because they need the base's values."""
TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("target_modules", "exclude_modules"), (list, str)),
    **dict.fromkeys(("rank_pattern", "alpha_pattern"), (dict,)),
    **dict.fromkeys(("use_rslora", "fan_in_fan_out", "lora_bias", "ensure_weight_tying"), (bool,)),
    **dict.fromkeys(("task_type", "base_model_name_or_path", "revision"), (str,)),
    **dict.fromkeys(("modules_to_save", "target_parameters", "alora_invocation_tokens"), (list,)),
    "trainable_token_indices": (list, dict),
}
KEEPS_BASE = (True, False, "gaussian", "eva", "orthogonal", "mica")
"""Values of init_lora_weights that leave the base unchanged, unlike PiSSA, OLoRA, LoftQ and others."""
CONVERT_PICKLE = (
    'python -c "import torch; from safetensors.torch import save_file; save_file({k: v.contiguous() for k, v in '
    "torch.load('adapter_model.bin', weights_only=True).items()}, 'adapter_model.safetensors')\""
)


def read_config(folder: Path, merging: bool = False) -> dict[str, Any]:
    """Read an adapter's configuration. Returns the fields of DEFAULTS.

    Raises SalsaError for PEFT methods other than LoRA, and for options with which the delta is not scaling · B · A.
    merging: the adapters are merged into their base, so the options of MERGE_ONLY are allowed.
    """
    path = folder / CONFIG
    require(path.is_file(), f"{path} is missing; give a PEFT adapter folder, which holds {CONFIG} and {WEIGHTS}")
    return check_config(path, read_mapping(path), merging)


def check_config(path: Path, raw: dict[str, Any], merging: bool = False) -> dict[str, Any]:
    """Check an adapter's configuration as read_config does. raw: LoraConfig as JSON. path: for messages."""
    method = raw.get("peft_type")
    require(method == "LORA", f"{path}: peft_type is {method!r}; only LoRA adapters (peft_type 'LORA') can be averaged")
    for field, value in raw.items():
        if field not in DEFAULTS and field not in IGNORED and not (merging and field in MERGE_ONLY):
            check_unsupported(path, field, value)
        types = TYPES.get(field)
        names = " or ".join(kind.__name__ for kind in types or ())
        require(
            types is None or value is None or isinstance(value, types),
            f"{path}: {field} is {value!r}, which is not a {names}; save the adapter again",
        )
    unset = {field for field, value in raw.items() if value is None or (value in ([], {}) and field in EMPTY_IS_NONE)}
    config = {field: raw[field] if field in raw and field not in unset else DEFAULTS[field] for field in DEFAULTS}
    biases = ("none", "all", "lora_only")
    require(config["bias"] in biases, f"{path}: bias is {config['bias']!r}; use one of {', '.join(biases)}")
    initial = config["init_lora_weights"]
    require(
        initial in KEEPS_BASE,
        f"{path}: init_lora_weights is {initial!r}, which changes the weights of the base. Save the adapter with PEFT's"
        " save_pretrained and path_initial_model_for_weight_conversion, which makes it an ordinary LoRA adapter of the"
        " unchanged base",
    )
    return config


def check_unsupported(path: Path, field: str, value: Any) -> None:
    """Raise SalsaError for an option that may change what the adapter computes; warn about a harmless one.

    An empty value means that the option is off. An unknown number or string is ignored with a warning, as in PEFT,
    because it only configures what another option switches on. An unknown True, list or mapping is rejected.
    """
    if value in (None, False, "", [], {}):
        return
    require(field not in WHY, f"{path}: {field} is {value!r}: {WHY.get(field)}")
    require(
        isinstance(value, int | float | str) and not isinstance(value, bool),
        f"{path}: {field} is {value!r:.80}. This version of salsa-peft does not know the option, which may change what"
        f" the adapter computes; if the option has no such effect, remove it from {CONFIG}",
    )
    logger.warning(
        "warning: %s: %s is %r; this version does not know the option and ignores it, as PEFT does", path, field, value
    )


def open_weights(folder: Path) -> SafetensorsFile:
    """Open an adapter's weights. Raises SalsaError for a pickled, missing, empty or changed file."""
    path = folder / WEIGHTS
    require(
        path.is_file() or not (folder / PICKLED).exists(),
        f"{folder} holds {PICKLED}, a pickle, which is never read because it can run code. If you trust it, convert it"
        " in that folder with " + CONVERT_PICKLE,
    )
    require(path.is_file(), f"{path} is missing; give a PEFT adapter folder, which holds {CONFIG} and {WEIGHTS}")
    file = SafetensorsFile(path)
    check_manifest(folder)
    require(bool(file.entries), f"{path} holds no tensors; save the adapter again")
    return file


def check_manifest(folder: Path) -> None:
    """Raise SalsaError if a file that a soup reads differs in size or SHA-256 from the folder's manifest."""
    manifest = read_manifest(folder)
    if manifest is None:
        if (folder / MANIFEST).exists():
            logger.warning("warning: %s cannot be read, so the files beside it are not checked", folder / MANIFEST)
        return
    read = (CONFIG, WEIGHTS, FINGERPRINT, *TOKENIZER)
    listed = {name: manifest["files"][name] for name in read if name in manifest["files"]}
    why = changed_file(folder, {"files": listed})
    require(
        why is None,
        f"{folder}: differs from its {MANIFEST} in size or SHA-256 ({why}); copy or create the folder again",
    )
