"""Full checkpoints on disk, by their headers: what their files hold, or refused with the reason.

Read are config.json, the index, the headers of the safetensors files and, where this project wrote one, the manifest. Never
pickles, never code. Left out: other formats.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from salsa_peft.utils.errors import SalsaError, require
from salsa_peft.utils.fingerprints import sha256
from salsa_peft.utils.safetensors_io import Entry, SafetensorsFile

if TYPE_CHECKING:
    import torch

CONFIG, INDEX, SINGLE, MANIFEST = "config.json", "model.safetensors.index.json", "model.safetensors", "manifest.json"
NUMBERED = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
FLOATS = ("BF16", "F16", "F32", "F64")


class Place(NamedTuple):
    """Where a tensor lies."""

    file: SafetensorsFile
    entry: Entry


@dataclass(frozen=True)
class Checkpoint:
    """A folder that Transformers opens, by its headers."""

    name: str
    folder: Path
    config: dict[str, Any]
    files: dict[str, SafetensorsFile]
    """By name, in the index's order."""
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
        """What quantised it, or None."""
        given = self.config.get("quantization_config", self.config.get("compression_config"))
        return None if given is None else str(given.get("quant_method", "?") if isinstance(given, dict) else given)

    def identity(self) -> list[list[str | int]]:
        """What tells that the folder is still the same: each weight file's name, size, time and header."""
        stats = [(name, file, file.path.stat()) for name, file in self.files.items()]
        return [
            [name, stat.st_size, stat.st_mtime_ns, hashlib.sha256(file.header).hexdigest()]
            for name, file, stat in stats
        ]


def text_part(config: dict[str, Any]) -> dict[str, Any]:
    """The language model's part of a configuration of several."""
    found = config.get("text_config")
    return found if isinstance(found, dict) else {}


def read_checkpoint(folder: Path, name: str | None = None) -> Checkpoint:
    """A checkpoint's configuration and headers. Raises SalsaError for files that are missing, cut, pickled or do not belong together."""
    require(folder.is_dir(), f"{folder}: found no such folder, expected a checkpoint's")
    if not (folder / CONFIG).is_file() and (folder / "adapter_config.json").is_file():
        raise SalsaError(
            f"{folder}: found a PEFT adapter, expected a full checkpoint; a soup's members are all of one kind"
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
                f"{file.path}: {tensor}: found a second time, first in another shard; save the model again",
            )
            places[tensor] = Place(file, entry)
    for tensor in sorted((listed or {}).keys() ^ places.keys() if listed is not None else ()):
        held = f"is in {places[tensor].file.path.name}, and the index leaves it out" if tensor in places else ""
        raise SalsaError(
            f"{folder / INDEX}: {tensor} {held or 'is in none of the shards that the index names'}; save the model again"
        )
    require(bool(places), f"{folder}: found no tensors, expected a model's weights; save it again")
    return Checkpoint(name or folder.resolve().name, folder, config, files, places)


def read_mapping(path: Path) -> dict[str, Any]:
    """A JSON file's mapping. Raises SalsaError for a file that is missing or anything else."""
    try:
        content = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise SalsaError(f"{path}: found no such file, expected it beside a checkpoint's weights") from None
    except (ValueError, RecursionError) as error:
        raise SalsaError(f"{path}: found no JSON ({error}), expected it; copy or save it again") from None
    require(
        isinstance(content, dict),
        f"{path}: found a {type(content).__name__}, expected a mapping; copy or save it again",
    )
    return dict(content)


def _weight_map(folder: Path) -> dict[str, str] | None:
    """Tensor → shard by the index, or None where there is none."""
    index, single = (folder / INDEX).is_file(), (folder / SINGLE).is_file()
    require(
        not (index and single),
        f"{folder}: found {SINGLE} and {INDEX}, expected one of them; remove the one that is old",
    )
    if not index:
        return None
    listed = read_mapping(folder / INDEX).get("weight_map")
    plain = isinstance(listed, dict) and all(
        isinstance(name, str) and name == Path(name).name and not name.startswith(".") for name in listed.values()
    )
    require(
        plain and bool(listed),
        f"{folder / INDEX}: found no weight_map of plain file names, expected a safetensors index; save it again",
    )
    assert isinstance(listed, dict)
    return listed


def _unlisted(folder: Path) -> list[str]:
    """The weight files of a folder without an index: one, or a whole set of numbered ones. Raises SalsaError for any other."""
    if (folder / SINGLE).is_file():
        return [SINGLE]
    there = sorted(path.name for path in folder.glob("*.safetensors"))
    numbered = [found for name in there if (found := NUMBERED.fullmatch(name))]
    if numbered and len({found[2] for found in numbered}) == 1:
        total = numbered[0][2]
        wanted = [f"model-{number:05}-of-{total}.safetensors" for number in range(1, int(total) + 1)]
        missing = next((name for name in wanted if name not in there), None)
        require(missing is None, f"{folder}: {missing} is missing, one of {int(total)} weight files; copy it again")
        return wanted
    pickled = next((path.name for pattern in PICKLES for path in sorted(folder.glob(pattern))), None)
    what = "no weights"
    if there:
        what = f"{', '.join(there)[:200]}, which Transformers does not read,"
    elif pickled is not None:
        what = f"{pickled}, which is pickled and never read,"
    raise SalsaError(
        f"{folder}: found {what} but neither {SINGLE} nor {INDEX}; load the model with the tool that made it, and save it with Transformers"
    )


def check_plain(checkpoint: Checkpoint) -> None:
    """Raise SalsaError for weights that no arithmetic applies to: quantised or packed ones."""
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
    """Hold weights and configuration against the manifest that a run wrote beside them, if there is one (it reads every byte).

    Raises SalsaError naming the file that changed. Any other manifest.json is not looked at.
    """
    path = checkpoint.folder / MANIFEST
    if not path.is_file():
        return
    listed = read_mapping(path).get("files")
    if not isinstance(listed, dict) or not all(
        isinstance(entry, dict) and "sha256" in entry for entry in listed.values()
    ):
        return
    names = [name for name in (CONFIG, INDEX, *checkpoint.files) if (checkpoint.folder / name).is_file()]
    for name in names:
        require(
            name in listed,
            f"{checkpoint.folder / name}: found no entry in {MANIFEST}, expected one; make the checkpoint again",
        )
        size = (checkpoint.folder / name).stat().st_size
        expected = listed[name].get("size")
        require(
            size == expected,
            f"{checkpoint.folder / name}: found {size} bytes, expected {expected} by {MANIFEST}; {_AGAIN}",
        )
    with ThreadPoolExecutor(2) as pool:  # hashing lets go of Python's lock
        for name, found in zip(names, pool.map(sha256, [checkpoint.folder / name for name in names]), strict=True):
            require(
                found == listed[name]["sha256"],
                f"{checkpoint.folder / name}: found SHA-256 {found[:12]}…, expected {str(listed[name]['sha256'])[:12]}… by {MANIFEST}:"
                f" its bytes changed; {_AGAIN}",
            )


_AGAIN = "copy or make it again"


def default_names(folders: Sequence[Path], names: Sequence[str] | None) -> list[str]:
    """What a summary calls the members: as given, else the folders' names, or the paths where these are not distinct."""
    if names is None:
        short = [folder.resolve().name for folder in folders]
        return short if len(set(short)) == len(short) else [str(folder) for folder in folders]
    require(len(names) == len(folders), f"names: found {len(names)}, expected {len(folders)}: one for each member")
    return list(names)


def check_weights(weights: Sequence[float], members: int, *, sum_to_one: bool = False) -> list[float]:
    """Negative weights extrapolate. A sum of 1 is asked of a soup, not of a shrunk delta or a point of a landscape."""
    shown = ", ".join(str(weight) for weight in weights)
    if len(weights) != members:
        raise SalsaError(f"weights: found {len(weights)} ({shown}), expected {members}: one for each member")
    if not all(isinstance(weight, int | float) and math.isfinite(weight) for weight in weights):
        raise SalsaError(f"weights: found {shown}, expected finite numbers")
    if sum_to_one and abs(sum(weights) - 1) > 1e-6:
        raise SalsaError(f"weights: {shown} sum to {sum(weights):.9g}, expected 1: change one of them")
    return [float(weight) for weight in weights]
