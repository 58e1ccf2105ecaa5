"""Reads full checkpoints by their headers, and refuses those that cannot be averaged.

It reads config.json, the index, the headers of the safetensors files and, if this project wrote one, the manifest. It never reads
pickles and never runs code. Left out: formats other than safetensors.
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
    """The file and the bytes in which a tensor lies."""

    file: SafetensorsFile
    entry: Entry


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A model folder that Transformers opens, read by its headers."""

    name: str
    folder: Path
    config: dict[str, Any]
    files: dict[str, SafetensorsFile]
    """The weight files by name, in the index's order."""
    tensors: dict[str, Place]

    def read(self, name: str) -> torch.Tensor:
        """A copy of a tensor, on the CPU."""
        return self.tensors[name].file.read(name)

    @property
    def tied(self) -> bool | None:
        """Whether the output embeddings are the input's; None: config.json does not say."""
        found = self.config.get("tie_word_embeddings", text_part(self.config).get("tie_word_embeddings"))
        return found if isinstance(found, bool) else None

    @property
    def quantised(self) -> str | None:
        """The method that quantised the weights, or None."""
        given = self.config.get("quantization_config", self.config.get("compression_config"))
        return None if given is None else str(given.get("quant_method", "?") if isinstance(given, dict) else given)


def text_part(config: dict[str, Any]) -> dict[str, Any]:
    """The language model's part of a multimodal configuration; empty if there is none."""
    found = config.get("text_config")
    return found if isinstance(found, dict) else {}


def read_checkpoint(folder: Path, name: str | None = None) -> Checkpoint:
    """Read a checkpoint's configuration and headers.

    Raises SalsaError for files that are missing, cut, pickled or do not belong together."""
    require(folder.is_dir(), f"{folder}: no such folder; give the folder of a checkpoint")
    if not (folder / CONFIG).is_file() and (folder / "adapter_config.json").is_file():
        raise SalsaError(
            f"{folder}: this is a PEFT adapter, not a full checkpoint; members of a soup are all of one kind"
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
                f"{file.path}: {tensor} is also in another shard; save the model again",
            )
            places[tensor] = Place(file, entry)
    for tensor in sorted(places.keys() ^ listed.keys() if listed is not None else ()):
        wrong = "is in none of the shards that the index names"
        if tensor in places:
            wrong = f"is in {places[tensor].file.path.name}, but not in the index"
        raise SalsaError(f"{folder / INDEX}: {tensor} {wrong}; save the model again")
    require(bool(places), f"{folder}: its weight files hold no tensors; save the model again")
    return Checkpoint(name or folder.resolve().name, folder, config, files, places)


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file. Raises SalsaError for a file that is missing or holds anything else."""
    content = read_json(path)
    require(
        isinstance(content, dict), f"{path}: this is a {type(content).__name__}, not a mapping; copy or save it again"
    )
    return dict(content)


def _weight_map(folder: Path) -> dict[str, str] | None:
    """Tensor → shard as the index has it; None if there is no index."""
    index, single = (folder / INDEX).is_file(), (folder / SINGLE).is_file()
    require(
        not (index and single), f"{folder}: this folder holds both {SINGLE} and {INDEX}; remove the one that is old"
    )
    if not index:
        return None
    listed = read_mapping(folder / INDEX).get("weight_map")
    plain = isinstance(listed, dict) and all(
        isinstance(name, str) and name == Path(name).name and not name.startswith(".") for name in listed.values()
    )
    require(
        plain and bool(listed),
        f"{folder / INDEX}: there is no weight_map of plain file names; save the model again",
    )
    assert isinstance(listed, dict)
    return listed


def _unlisted(folder: Path) -> list[str]:
    """The weight files of a folder without an index: a single one, or a complete set of numbered ones."""
    if (folder / SINGLE).is_file():
        return [SINGLE]
    present = sorted(path.name for path in folder.glob("*.safetensors"))
    numbered = [found for name in present if (found := NUMBERED.fullmatch(name))]
    if numbered and len({found[2] for found in numbered}) == 1:
        total = numbered[0][2]
        wanted = [f"model-{number:05}-of-{total}.safetensors" for number in range(1, int(total) + 1)]
        missing = next((name for name in wanted if name not in present), None)
        require(missing is None, f"{folder}: {missing} of {int(total)} weight files is missing; copy it again")
        return wanted
    pickled = next((path.name for pattern in PICKLES for path in sorted(folder.glob(pattern))), None)
    held = ""
    if present:
        held = f"; it holds {', '.join(present)[:200]}, which Transformers does not read"
    elif pickled is not None:
        held = f"; it holds {pickled}, which is a pickle and never read"
    raise SalsaError(
        f"{folder}: this folder has neither {SINGLE} nor {INDEX}{held}; load the model with the tool that made it and save it with Transformers"
    )


def check_plain(checkpoint: Checkpoint) -> None:
    """Raise SalsaError for quantised or packed weights, which cannot be averaged."""
    remedy = (
        "quantised weights cannot be averaged; take the model before it was quantised, or load it with Transformers, call"
        " model.dequantize() and save it again"
    )
    require(
        checkpoint.quantised is None,
        f"{checkpoint.folder / CONFIG} has a quantization_config ({checkpoint.quantised}): {remedy}",
    )
    for name, (file, entry) in checkpoint.tensors.items():
        packed = entry.dtype in ("U8", "I8") and len(entry.shape) > 1 and not name.endswith(".bias")  # GPT-2's masks
        packed = packed or entry.dtype.startswith("F8") or name.endswith((".SCB", ".weight_format"))
        require(not packed, f"{file.path}: {name} is {entry.dtype}, of a quantised model: {remedy}")


def check_manifest(checkpoint: Checkpoint) -> None:
    """Compare weights and configuration with the manifest of a run, if there is one.

    This reads every byte. Raises SalsaError naming the file that changed. A manifest.json of another tool is ignored.
    """
    folder = checkpoint.folder
    manifest = read_manifest(folder)
    if manifest is None:
        if (folder / MANIFEST).is_file():
            read_mapping(folder / MANIFEST)  # refuses a damaged one
        return
    names = [name for name in (CONFIG, INDEX, *checkpoint.files) if (folder / name).is_file()]
    with ThreadPoolExecutor(2) as pool:  # hashing releases the GIL
        for name, digest in zip(names, pool.map(sha256, [folder / name for name in names]), strict=True):
            entry, size = manifest["files"].get(name), (folder / name).stat().st_size
            require(
                entry is not None, f"{folder / name}: the file is not listed in {MANIFEST}; make the checkpoint again"
            )
            require(
                entry == {"size": size, "sha256": digest},
                f"{folder / name}: the file changed: it has {size} bytes and SHA-256 {digest[:12]}…, but in {MANIFEST} it has"
                f" {entry['size']} and {entry['sha256'][:12]}…; copy or make it again",
            )


def default_names(folders: Sequence[Path], names: Sequence[str] | None) -> list[str]:
    """The members' names: as given, else the folders' names, or their paths if those are not distinct."""
    if names is None:
        short = [folder.resolve().name for folder in folders]
        return short if len(set(short)) == len(short) else [str(folder) for folder in folders]
    require(len(names) == len(folders), f"names: {len(names)} for {len(folders)} members; give one for each member")
    return list(names)


def check_weights(weights: Sequence[float], members: int) -> list[float]:
    """The weights as floats. Raises SalsaError unless there is one finite number for each member."""
    shown = ", ".join(map(str, weights))
    require(
        len(weights) == members,
        f"weights: {len(weights)} ({shown}) for {members} members; give one for each member",
    )
    finite = all(isinstance(weight, int | float) and math.isfinite(weight) for weight in weights)
    require(finite, f"weights: {shown} are not all finite numbers")
    return [float(weight) for weight in weights]
