"""Reads configurations and headers of full checkpoints; rejects checkpoints that cannot be averaged.

This module reads config.json, the index, the headers of the safetensors files and a manifest that this package wrote.
It never reads pickles and never runs code. Formats other than safetensors are not supported.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from salsa_peft.utils.errors import SalsaError, require
from salsa_peft.utils.files import read_json
from salsa_peft.utils.fingerprints import sha256
from salsa_peft.utils.manifests import MANIFEST, read_manifest
from salsa_peft.utils.safetensors_io import Entry, SafetensorsFile

if TYPE_CHECKING:
    import torch

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
NUMBERED = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
FLOATS = ("BF16", "F16", "F32", "F64")


class Place(NamedTuple):
    """The file that holds a tensor, and the tensor's entry in that file's header."""

    file: SafetensorsFile
    entry: Entry


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A full checkpoint in the format of Transformers: its configuration and the places of its tensors."""

    name: str
    folder: Path
    config: dict[str, Any]
    files: dict[str, SafetensorsFile]
    """Name → weight file, in the order of the names."""
    tensors: dict[str, Place]

    def read(self, name: str) -> torch.Tensor:
        """Read a tensor into a new tensor on the CPU."""
        return self.tensors[name].file.read(name)

    @property
    def tied(self) -> bool | None:
        """Whether config.json ties output and input embeddings; None if it does not say."""
        found = self.config.get("tie_word_embeddings", text_part(self.config).get("tie_word_embeddings"))
        return found if isinstance(found, bool) else None

    @property
    def quantised(self) -> str | None:
        """The quantisation method of the weights; None if they are not quantised."""
        given = self.config.get("quantization_config", self.config.get("compression_config"))
        return None if given is None else str(given.get("quant_method", "?") if isinstance(given, dict) else given)


def text_part(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration of the language model in a multimodal configuration; empty if there is none."""
    found = config.get("text_config")
    return found if isinstance(found, dict) else {}


def read_checkpoint(folder: Path, name: str | None = None) -> Checkpoint:
    """Read a checkpoint's configuration and headers.

    Raises SalsaError for files that are missing, truncated or pickled, or that do not belong together.
    """
    require(folder.is_dir(), f"{folder}: no such folder; give the folder of a checkpoint")
    if not (folder / CONFIG).is_file() and (folder / "adapter_config.json").is_file():
        raise SalsaError(
            f"{folder}: this is a PEFT adapter, not a full checkpoint; merge the adapter into its base first (--merge)"
        )
    config = read_mapping(folder / CONFIG)
    listed = _weight_map(folder)
    names = _unlisted(folder) if listed is None else sorted(set(listed.values()))
    files = {file: SafetensorsFile(folder / file) for file in names}
    places: dict[str, Place] = {}
    for file in files.values():
        for tensor, entry in file.entries.items():
            require(
                tensor not in places,
                f"{file.path}: {tensor} is also in another shard of this checkpoint; save the model again",
            )
            places[tensor] = Place(file, entry)
    for tensor in sorted(places.keys() ^ listed.keys() if listed is not None else ()):
        wrong = "is in none of the shards that the index names"
        if tensor in places:
            wrong = f"is in {places[tensor].file.path.name}, but not in the index"
        raise SalsaError(f"{folder / INDEX}: {tensor} {wrong}; save the model again")
    require(bool(places), f"{folder}: the weight files hold no tensors; save the model again")
    return Checkpoint(name or folder.resolve().name, folder, config, files, places)


def read_mapping(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds a mapping. Raises SalsaError if it is missing or holds anything else."""
    content = read_json(path)
    require(
        isinstance(content, dict),
        f"{path}: the JSON is a {type(content).__name__}, but must be a mapping; copy or save the file again",
    )
    return dict(content)


def _weight_map(folder: Path) -> dict[str, str] | None:
    """Tensor → shard, as listed in the index; None if there is no index."""
    index, single = (folder / INDEX).is_file(), (folder / SINGLE).is_file()
    require(
        not (index and single),
        f"{folder}: this folder holds both {SINGLE} and {INDEX}; remove the one that is out of date",
    )
    if not index:
        return None
    listed = read_mapping(folder / INDEX).get("weight_map")
    plain = isinstance(listed, dict) and all(
        isinstance(name, str) and name == Path(name).name and not name.startswith(".") for name in listed.values()
    )
    require(
        plain and bool(listed),
        f"{folder / INDEX}: weight_map is missing, empty or has values other than file names; save the model again",
    )
    assert isinstance(listed, dict)
    return listed


def _unlisted(folder: Path) -> list[str]:
    """The weight files of a folder without an index: a single file, or a complete set of numbered files."""
    if (folder / SINGLE).is_file():
        return [SINGLE]
    present = sorted(path.name for path in folder.glob("*.safetensors"))
    numbered = [found for name in present if (found := NUMBERED.fullmatch(name))]
    if numbered and len({found[2] for found in numbered}) == 1:
        total = numbered[0][2]
        wanted = [f"model-{number:05}-of-{total}.safetensors" for number in range(1, int(total) + 1)]
        missing = next((name for name in wanted if name not in present), None)
        require(missing is None, f"{folder}: {missing}, one of {int(total)} weight files, is missing; copy it again")
        return wanted
    pickled = next((path.name for pattern in PICKLES for path in sorted(folder.glob(pattern))), None)
    held = ""
    if present:
        held = f"; it holds {', '.join(present)[:200]}, which Transformers does not read"
    elif pickled is not None:
        held = f"; it holds {pickled}, which is a pickle, and pickles are never read"
    raise SalsaError(
        f"{folder}: this folder has neither {SINGLE} nor {INDEX}{held}; load the model with the tool that made it and"
        " save it with Transformers"
    )


def check_plain(checkpoint: Checkpoint) -> None:
    """Raise SalsaError for quantised or packed weights, which cannot be averaged."""
    remedy = (
        "quantised weights cannot be averaged; take the model before it was quantised, or load it with Transformers,"
        " call model.dequantize() and save it again"
    )
    require(
        checkpoint.quantised is None,
        f"{checkpoint.folder / CONFIG} has a quantization_config ({checkpoint.quantised}): {remedy}",
    )
    for name, (file, entry) in checkpoint.tensors.items():
        packed = entry.dtype in ("U8", "I8") and len(entry.shape) > 1 and not name.endswith(".bias")  # GPT-2's masks
        packed = packed or entry.dtype.startswith("F8") or name.endswith((".SCB", ".weight_format"))
        require(not packed, f"{file.path}: {name} is {entry.dtype}, as in quantised models: {remedy}")


def check_manifest(checkpoint: Checkpoint) -> None:
    """Compare weights and configuration with the manifest of a run, if there is one.

    This reads every byte of the weights. Raises SalsaError naming a file that changed. Ignores other tools' manifests.
    """
    folder = checkpoint.folder
    manifest = read_manifest(folder)
    if manifest is None:
        if (folder / MANIFEST).is_file():
            read_mapping(folder / MANIFEST)  # raises SalsaError if the file is damaged
        return
    names = [name for name in (CONFIG, INDEX, *checkpoint.files) if (folder / name).is_file()]
    with ThreadPoolExecutor(2) as pool:  # hashing releases the GIL
        for name, digest in zip(names, pool.map(sha256, [folder / name for name in names]), strict=True):
            entry, size = manifest["files"].get(name), (folder / name).stat().st_size
            require(
                entry is not None, f"{folder / name}: {MANIFEST} does not list this file; make the checkpoint again"
            )
            require(
                entry == {"size": size, "sha256": digest},
                f"{folder / name}: the file changed: it has {size} bytes and SHA-256 {digest[:12]}…, but {MANIFEST}"
                f" lists {entry['size']} bytes and {entry['sha256'][:12]}…; copy or make the checkpoint again",
            )


def default_names(folders: Sequence[Path], names: Sequence[str] | None) -> list[str]:
    """The members' names: `names`, else the folders' names, or their paths if two names are equal."""
    if names is None:
        short = [folder.resolve().name for folder in folders]
        return short if len(set(short)) == len(short) else [str(folder) for folder in folders]
    require(len(names) == len(folders), f"names: {len(names)} names for {len(folders)} members; give one per member")
    return list(names)


def check_weights(weights: Sequence[float], members: int) -> list[float]:
    """The weights as floats. Raises SalsaError unless there is one finite number for each member."""
    shown = ", ".join(map(str, weights))
    require(
        len(weights) == members,
        f"weights: {len(weights)} weights ({shown}) for {members} members; give one for each member",
    )
    finite = all(isinstance(weight, int | float) and math.isfinite(weight) for weight in weights)
    require(finite, f"weights: {shown} are not all finite numbers; give one finite number for each member")
    return [float(weight) for weight in weights]
