"""SHA-256 fingerprints of files, folders and models, for cache keys and to identify an adapter's base.

torch is not imported.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from salsa_peft.utils.errors import SalsaError, require
from salsa_peft.utils.files import read_json
from salsa_peft.utils.safetensors_io import NO_SAFETENSORS, SafetensorsFile
from salsa_peft.utils.tensor_names import without_wrappers

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "value_head.safetensors", "fingerprint.json")
"""Files of an adapter's folder that its fingerprint covers; training checkpoints are not covered."""
CONFIGURATIONS = (".json", ".txt", ".model", ".jinja", ".tiktoken")
"""Suffixes of the files of a model's folder that are not weights."""
FINGERPRINT = "fingerprint.json"
"""The file beside an adapter or checkpoint that holds the fingerprint of its base."""
HEAD = "lm_head.weight"
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight", "tok_embeddings.weight")
"""Endings of the names of input embeddings."""
NO_PARAMETER = re.compile(r"rotary_emb\.inv_freq$|(^|\.)position_ids$|\.(attn|attention)\.masked_bias$")
"""Names of buffers that earlier versions of Transformers saved."""
MASK = re.compile(r"\.(attn|attention)\.bias$")
"""Names of causal masks, which are buffers as well, provided that the tensor has four dimensions."""
PREFIXES = {"gpt2": "transformer.", "bloom": "transformer.", "opt": "model."}
"""model_type → the base model's prefix, for architectures whose files on the Hub may lack it."""


def read_fingerprint(folder: Path) -> str | None:
    """Fingerprint of an adapter's or checkpoint's base; None if the folder has no fingerprint.json.

    Raises SalsaError if fingerprint.json is damaged.
    """
    path = folder / FINGERPRINT
    if not path.exists():
        return None
    content, form = read_json(path), '{"base": SHA-256 of the base}'
    base = content.get("base") if isinstance(content, dict) else None
    require(isinstance(base, str), f"{path}: must be {form}; save the adapter or checkpoint again")
    return str(base)


def canonical_json(data: Any) -> str:
    """JSON text that is the same for equal data.

    Raises ValueError for NaN and TypeError for types that JSON does not have.
    """
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)


def sha256(path: str | Path) -> str:
    """The SHA-256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(path: str | Path) -> str:
    """The fingerprint of a file (its content) or of a folder.

    For an adapter's folder it covers ADAPTER_FILES; for a model's folder the base_fingerprint, the configuration and
    the tokenizer; for any other folder all files except hidden files. Raises SalsaError if a file is missing or
    unreadable.
    """
    path = Path(path)
    try:
        return _fingerprint(path)
    except OSError as error:
        line = f"{error.filename or path}: cannot be read ({error.strerror}); check its permissions, or copy it again"
        raise SalsaError(line) from error


def _fingerprint(path: Path) -> str:
    if path.is_file():
        return sha256(path)
    require(path.is_dir(), f"{path}: no such file or folder; check the path")
    adapter = (path / "adapter_config.json").is_file()
    model = (path / "config.json").is_file() and not adapter
    digest = hashlib.sha256((base_fingerprint(path) if model else "").encode())
    files = (path / name for name in ADAPTER_FILES) if adapter else path.rglob("*")
    for file in sorted(file for file in files if file.is_file()):
        name = str(file.relative_to(path))
        hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
        weights = model and not name.endswith(CONFIGURATIONS)
        if not hidden and not weights:
            digest.update(f"{name}\n{sha256(file)}\n".encode())
    return digest.hexdigest()


def tokenizer_files(folder: str | Path) -> list[Path]:
    """The files of a model's folder from which a tokenizer is loaded: its configurations, vocabularies and templates."""
    names = (*(f"*{suffix}" for suffix in CONFIGURATIONS), "additional_chat_templates/*.jinja")
    found = {path for name in names for path in Path(folder).glob(name)}
    return sorted(path for path in found if path.is_file() and not path.name.endswith(".index.json"))


def base_fingerprint(folder: str | Path) -> str:
    """SHA-256 over each parameter's name, shape, dtype and first 64 KiB, read from the safetensors files.

    It is saved beside every adapter, and the members of a soup must have the same one. It does not depend on the
    distribution of tensors over files, on buffers in the files (rotary frequencies, GPT-2's causal masks), on tied
    output embeddings, on prefixes of wrappers such as `_orig_mod`, or on the base model's prefix where the Hub's files
    may lack it (PREFIXES). Tensors saved under other names, as in a multimodal model's older layout or with
    fused experts, have a different fingerprint.
    """
    return _digest(_parameters(Path(folder), _tensors(Path(folder))))


def base_fingerprints(folder: str | Path) -> list[str]:
    """The base_fingerprint and, if it differs, the one that earlier versions of this package computed."""
    found = _tensors(Path(folder))
    both = [_digest(_parameters(Path(folder), found)), _digest(found)]
    return list(dict.fromkeys(both))


class _Tensor(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    first: bytes
    """The SHA-256 of the tensor's first 64 KiB."""


def _tensors(folder: Path) -> dict[str, _Tensor]:
    found = {}
    for file in _weight_files(folder):
        entries = SafetensorsFile(file, any_dtype=True).entries
        with open(file, "rb") as raw:
            for name, entry in entries.items():
                raw.seek(entry.begin)
                first = hashlib.sha256(raw.read(min(entry.size, 65536))).digest()
                found[name] = _Tensor(entry.dtype, entry.shape, first)
    return found


def _digest(tensors: Mapping[str, _Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        dtype, shape, first = tensors[name]
        digest.update(canonical_json([name, dtype, shape]).encode() + first)
    return digest.hexdigest()


def _parameters(folder: Path, tensors: Mapping[str, _Tensor]) -> dict[str, _Tensor]:
    """The tensors except buffers and a tied lm_head, under the names that Transformers saves."""
    found = {
        without_wrappers(name): tensor
        for name, tensor in tensors.items()
        if not NO_PARAMETER.search(name) and not (MASK.search(name) and len(tensor.shape) == 4)
    }
    prefix = PREFIXES.get(_model_type(folder))
    if prefix is not None and not any(name.startswith(prefix) for name in found):
        found = {name if name == HEAD else prefix + name: tensor for name, tensor in found.items()}
    if HEAD in found and any(tensor == found[HEAD] for name, tensor in found.items() if name.endswith(EMBEDDINGS)):
        del found[HEAD]
    return found


def _model_type(folder: Path) -> str:
    """The model_type in the folder's config.json; empty if it is not known."""
    path = folder / "config.json"
    content = read_json(path) if path.is_file() else {}
    return str(content.get("model_type", "")) if isinstance(content, dict) else ""


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            return [folder / name for name in sorted(set(read_json(index)["weight_map"].values()))]
        except (KeyError, TypeError, AttributeError) as error:
            raise SalsaError(
                f"{index}: not a safetensors index, since it has no weight_map; save the model again"
            ) from error
    single = folder / "model.safetensors"
    files = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    require(bool(files), f"{folder}: {NO_SAFETENSORS}")
    return files
