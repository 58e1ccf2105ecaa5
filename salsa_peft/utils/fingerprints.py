"""What a file, a folder or a model is, in 64 digits: the keys of runs and the base that adapters belong to. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from salsa_peft.utils.errors import SalsaError, require
from salsa_peft.utils.safetensors_io import BITS
from salsa_peft.utils.tensor_names import without_wrappers

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "value_head.safetensors", "fingerprint.json")
"""What is read of an adapter's folder, which may hold checkpoints and optimizers too."""
FINGERPRINT = "fingerprint.json"
"""Beside an adapter or a checkpoint: the base that it was trained on."""
HEAD = "lm_head.weight"
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight", "tok_embeddings.weight")
"""Ends of the names of input embeddings."""
NO_PARAMETER = re.compile(r"rotary_emb\.inv_freq$|(^|\.)position_ids$|\.(attn|attention)\.masked_bias$")
MASK = re.compile(r"\.(attn|attention)\.bias$")
"""What files of earlier versions of Transformers hold beside the parameters; a causal mask has four dimensions."""
PREFIXES = {"gpt2": "transformer.", "bloom": "transformer.", "opt": "model."}
"""model_type → the base model's prefix, of architectures whose files on the Hub lack it."""


def read_fingerprint(folder: Path) -> str | None:
    """SHA-256 of the base that the weights in a folder were trained on; None where the folder does not say. Raises SalsaError for a
    file that says something else."""
    path = folder / FINGERPRINT
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise SalsaError(f"{path} is not JSON ({error}): save it again") from None
    require(isinstance(content, dict), f"{path} holds a {type(content).__name__}, expected a mapping: save it again")
    base = content.get("base")
    require(isinstance(base, str), f"{path}: base is {base!r}, expected the SHA-256 of the base: write it again")
    return str(base)


def canonical_json(data: Any) -> str:
    """JSON that is the same for the same data. Raises ValueError for NaN, TypeError for what JSON has not."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)


def sha256(path: str | Path) -> str:
    """Of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(path: str | Path) -> str:
    """Of a file (its content), an adapter's folder (ADAPTER_FILES), a model's (base_fingerprint, and its configuration and tokenizer) or
    any other.

    Raises SalsaError for what is missing or can't be read.
    """
    path = Path(path)
    try:
        return _fingerprint(path)
    except OSError as error:
        raise SalsaError(
            f"{error.filename or path}: found it can't be read ({error.strerror}), expected a file; check its rights, or copy it again"
        ) from error


def _fingerprint(path: Path) -> str:
    if path.is_file():
        return sha256(path)
    require(path.is_dir(), f"{path}: no such file or folder")
    adapter = (path / "adapter_config.json").is_file()
    model = (path / "config.json").is_file() and not adapter
    digest = hashlib.sha256((base_fingerprint(path) if model else "").encode())
    files = (path / name for name in ADAPTER_FILES) if adapter else path.rglob("*")
    for file in sorted(file for file in files if file.is_file()):
        name = str(file.relative_to(path))
        hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
        weights = model and not name.endswith((".json", ".txt", ".model", ".jinja", ".tiktoken"))
        if not hidden and not weights:
            digest.update(f"{name}\n{sha256(file)}\n".encode())
    return digest.hexdigest()


def base_fingerprint(folder: str | Path) -> str:
    """SHA-256 over each parameter's name, shape, dtype and first 64 KiB, read from the safetensors files without torch.

    The same however the tensors are spread over files, and whether or not the files hold, beside the parameters, rotary frequencies
    (`rotary_emb.inv_freq`), GPT-2's causal masks, or tied output embeddings; also under prefixes of wrappers, and with or without the base
    model's prefix where the Hub's files lack it (PREFIXES). Other names of the same tensors give another fingerprint: a multimodal
    model's older layout, experts apart or in one. Saved beside every adapter; members of a soup must agree in it.
    """
    return _digest(_parameters(Path(folder), _tensors(Path(folder))))


def base_fingerprints(folder: str | Path) -> list[str]:
    """The fingerprint, and the one that earlier versions of this package took where the files hold more than parameters."""
    found = _tensors(Path(folder))
    both = [_digest(_parameters(Path(folder), found)), _digest(found)]
    return list(dict.fromkeys(both))


class _Tensor(NamedTuple):
    dtype: str
    shape: list[int]
    first: bytes
    """SHA-256 of its first 64 KiB."""


def _tensors(folder: Path) -> dict[str, _Tensor]:
    found = {}
    for file in _weight_files(folder):
        for name, (dtype, shape, begin, size) in _header(file).items():
            with open(file, "rb") as raw:
                raw.seek(begin)
                found[name] = _Tensor(dtype, shape, hashlib.sha256(raw.read(min(size, 65536))).digest())
    return found


def _digest(tensors: Mapping[str, _Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        dtype, shape, first = tensors[name]
        digest.update(canonical_json([name, dtype, shape]).encode() + first)
    return digest.hexdigest()


def _parameters(folder: Path, tensors: Mapping[str, _Tensor]) -> dict[str, _Tensor]:
    """Without what is no parameter, under the names that Transformers saves."""
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
    """By config.json; empty where there is none that says it."""
    path = folder / "config.json"
    try:
        content = json.loads(path.read_bytes()) if path.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise SalsaError(f"{path} is not JSON ({error}): save it again") from None
    return str(content.get("model_type", "")) if isinstance(content, dict) else ""


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            return [folder / name for name in sorted(set(json.loads(index.read_bytes())["weight_map"].values()))]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise SalsaError(f"{index}: found no weight_map, expected a safetensors index") from error
    single = folder / "model.safetensors"
    files = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    require(
        bool(files),
        f"{folder}: found no safetensors file, expected the model's weights in one (other formats are not read)"
        "; load the model with Transformers, if you trust the file, and save it again (save_pretrained writes safetensors)",
    )
    return files


def _header(file: Path) -> dict[str, tuple[str, list[int], int, int]]:
    """Tensor → dtype, shape, where its bytes begin in the file and how many there are. Raises SalsaError unless the file holds them all."""
    try:
        with open(file, "rb") as raw:
            start, size = 8 + int.from_bytes(raw.read(8), "little"), file.stat().st_size
            entries: Any = json.loads(raw.read(start - 8)) if start <= size else None
        entries.pop("__metadata__", None)
        found = {name: (entry["dtype"], entry["shape"], start + entry["data_offsets"][0],
                        entry["data_offsets"][1] - entry["data_offsets"][0]) for name, entry in entries.items()}  # fmt: skip
        odd = [
            name
            for name, (dtype, shape, _, length) in found.items()
            if dtype in BITS and math.prod(shape) * BITS[dtype] != 8 * length
        ]
        end = max((begin + length for _, _, begin, length in found.values()), default=start)
    except FileNotFoundError as error:
        raise SalsaError(f"{file}: no such file, though the index names it") from error
    except IsADirectoryError as error:
        raise SalsaError(f"{file}: found a folder, expected a safetensors file; copy or save it again") from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise SalsaError(f"{file}: found a cut or damaged safetensors file; copy or save it again") from error
    require(
        not odd and end == size,
        f"{file}: found {f'other bytes for {odd[0]} than its dtype and shape have' if odd else f'{size} bytes, expected {end}'}:"
        " a cut or damaged safetensors file; copy or save it again",
    )
    return found
