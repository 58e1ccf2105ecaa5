"""The base that adapters are merged into: as it is, out of bitsandbytes' 4 bits, or through 4 bits and back.

A merge is never written in 4 bits: the delta would be lost in requantisation. A checkpoint in bitsandbytes' 4 bits is dequantised to its
compute dtype. `nf4` (`nf4-double`: with quantised scales, as QLoRA has it) puts the linears of a plain base through 4 bits and back,
since the adapter was trained to correct those. Left out: 8 bits, GPTQ, AWQ and others.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
from collections.abc import Iterator
from typing import Any

import torch

from salsa_peft.soup.checkpoints.read import CONFIG, INDEX, Checkpoint
from salsa_peft.utils.errors import SalsaError, require
from salsa_peft.utils.safetensors_io import BITS, NAMES, make_header, read_exactly, safetensors_dtype

logger = logging.getLogger(__name__)

DOUBLE = {"nf4": False, "nf4-double": True}
"""quantized_base → whether the scales are quantised too (bnb_4bit_use_double_quant)."""
NO_LINEARS = ("embed", "wte.", "wpe.", "position", "lm_head", "score.")
"""Names of matrices that bitsandbytes leaves as they are."""


class PlainBase:
    """The base as it lies on the disk."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint

    def said(self) -> dict[str, Any]:
        """Of the summary: what was done to the base."""
        return {"quantized_base": None}

    def config(self) -> bytes | str:
        """config.json of the merge."""
        return (self.checkpoint.folder / CONFIG).read_bytes()

    def index(self) -> bytes | str:
        """The index of the merge, where the base has one."""
        return (self.checkpoint.folder / INDEX).read_bytes()

    def names(self, file: str) -> list[str]:
        """Tensors that are written to a shard, in order."""
        return list(self.checkpoint.files[file].entries)

    def header(self, file: str) -> bytes:
        """Of a shard that is written."""
        return self.checkpoint.files[file].header

    def size_of(self, file: str) -> int:
        """Bytes of a shard that is written."""
        return self.checkpoint.files[file].size

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor that is written."""
        return self.checkpoint.tensors[name].entry.shape

    def dtype(self, name: str) -> str:
        """Safetensors' name of the dtype in which a tensor is written."""
        return self.checkpoint.tensors[name].entry.dtype

    def whole(self, name: str) -> torch.Tensor:
        """All of a tensor that is written."""
        return torch.cat([piece for _, piece in self.pieces(name, sys.maxsize)]).reshape(self.shape(name))

    def pieces(self, name: str, elements: int) -> Iterator[tuple[int, torch.Tensor]]:
        """(first row, whole rows) of a tensor; a scalar is one row."""
        file, entry = self.checkpoint.tensors[name]
        shape = entry.shape or (1,)
        columns = math.prod(shape[1:])
        step, width = max(1, elements // max(1, columns)), columns * BITS[entry.dtype] // 8
        descriptor = os.open(file.path, os.O_RDONLY)
        try:
            for start in range(0, shape[0], step):
                rows = min(step, shape[0] - start)
                raw = torch.empty(rows * width, dtype=torch.uint8)
                read_exactly(descriptor, raw.numpy().data, entry.begin + start * width, file.path)
                yield start, raw.view(getattr(torch, NAMES[entry.dtype])).reshape(rows, *shape[1:])
        finally:
            os.close(descriptor)


class Requantised(PlainBase):
    """A plain base whose linears go through 4 bits and back."""

    def __init__(self, checkpoint: Checkpoint, kind: str) -> None:
        super().__init__(checkpoint)
        self.kind = kind
        self.linears = {name for name, place in checkpoint.tensors.items() if len(place.entry.shape) == 2 and name.endswith(".weight")
                        and not any(part in name for part in NO_LINEARS)}  # fmt: skip
        logger.warning("%s: %d linears go through %s and back, since the adapters were trained on that", checkpoint.folder,
                       len(self.linears), kind)  # fmt: skip

    def said(self) -> dict[str, Any]:
        """Of the summary."""
        return {"quantized_base": self.kind, "requantised": len(self.linears)}

    def pieces(self, name: str, elements: int) -> Iterator[tuple[int, torch.Tensor]]:
        """As PlainBase.pieces; a linear is held whole meanwhile."""
        if name not in self.linears:
            yield from super().pieces(name, elements)
            return
        library = _bitsandbytes(self.checkpoint)
        weight = self.checkpoint.read(name)
        packed, state = library.quantize_4bit(weight, quant_type="nf4", compress_statistics=DOUBLE[self.kind])
        yield from _rows(library.dequantize_4bit(packed, state).to(weight.dtype), elements)


class Dequantised(PlainBase):
    """A checkpoint in bitsandbytes' 4 bits, in its compute dtype."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        given = checkpoint.config["quantization_config"]
        self.code = safetensors_dtype(
            getattr(torch, str(given.get("bnb_4bit_compute_dtype", "float32")).removeprefix("torch."))
        )
        states = [name for name in checkpoint.tensors if ".quant_state.bitsandbytes__" in name]
        self.states = {name.partition(".quant_state.")[0]: name for name in states}
        self.shapes = {
            name: tuple(json.loads(bytes(checkpoint.read(state).tolist()))["shape"])
            for name, state in self.states.items()
        }
        _bitsandbytes(checkpoint)
        logger.warning(
            "%s: its %d weights in 4 bits are dequantised to %s", checkpoint.folder, len(states), NAMES[self.code]
        )

    def said(self) -> dict[str, Any]:
        """Of the summary."""
        return {
            "quantized_base": "bitsandbytes 4 bits, dequantised",
            "dequantised": len(self.states),
            "dtype": NAMES[self.code],
        }

    def config(self) -> str:
        """The base's, plain."""
        given = {key: value for key, value in self.checkpoint.config.items() if key != "quantization_config"}
        given |= {key: NAMES[self.code] for key in ("dtype", "torch_dtype") if key in given}
        return json.dumps(given, indent=2, ensure_ascii=False) + "\n"

    def index(self) -> str:
        """Made anew."""
        shards = {tensor: file for file in self.checkpoint.files for tensor in self.names(file)}
        total = sum(self.size_of(file) - len(self.header(file)) - 8 for file in self.checkpoint.files)
        return json.dumps({"metadata": {"total_size": total}, "weight_map": shards}, indent=2) + "\n"

    def names(self, file: str) -> list[str]:
        """Without what belongs to the 4 bits."""
        entries = self.checkpoint.files[file].entries
        return [name for name in entries if not any(name[:at] in self.states for at in _dots(name))]

    def header(self, file: str) -> bytes:
        """Made anew."""
        layout = [(name, self.dtype(name), self.shape(name)) for name in self.names(file)]
        return make_header(layout, self.checkpoint.files[file].metadata or None)

    def size_of(self, file: str) -> int:
        """As the header says."""
        return (
            8
            + len(self.header(file))
            + sum(math.prod(self.shape(n)) * BITS[self.dtype(n)] // 8 for n in self.names(file))
        )

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the weight, not of its packed bytes."""
        return self.shapes[name] if name in self.states else super().shape(name)

    def dtype(self, name: str) -> str:
        """The compute dtype where it was in 4 bits."""
        return self.code if name in self.states else super().dtype(name)

    def pieces(self, name: str, elements: int) -> Iterator[tuple[int, torch.Tensor]]:
        """As PlainBase.pieces; a weight that was in 4 bits is held whole meanwhile."""
        if name not in self.states:
            yield from super().pieces(name, elements)
            return
        library = _bitsandbytes(self.checkpoint)
        parts = {
            part.removeprefix(f"{name}."): self.checkpoint.read(part)
            for part in self.checkpoint.tensors
            if part.startswith(f"{name}.")
        }
        state = library.QuantState.from_dict(parts, device=torch.device("cpu"))
        yield from _rows(
            library.dequantize_4bit(self.checkpoint.read(name), state).to(getattr(torch, NAMES[self.code])), elements
        )


def open_base(checkpoint: Checkpoint, quantized_base: str | None) -> PlainBase:
    """Raises SalsaError for an unknown kind, one that does not fit the base, or bitsandbytes missing."""
    require(
        quantized_base is None or quantized_base in DOUBLE,
        f"quantized_base: {quantized_base!r:.40} is not one of {', '.join(DOUBLE)}",
    )
    if checkpoint.quantised is None:
        if quantized_base is None:
            return PlainBase(checkpoint)
        _bitsandbytes(checkpoint)
        return Requantised(checkpoint, quantized_base)
    given = checkpoint.config.get("quantization_config") or {}
    eight = bool(given.get("load_in_8bit") or given.get("_load_in_8bit"))
    require(
        checkpoint.quantised == "bitsandbytes" and not eight,
        f"{checkpoint.folder / CONFIG}: the weights are quantised ({'bitsandbytes, 8 bits' if eight else checkpoint.quantised}), and a"
        " delta is added to plain ones or to bitsandbytes' 4 bits alone: name the base as it was before with --base, or dequantise it",
    )
    require(
        quantized_base is None,
        f"quantized_base: {quantized_base} is for a plain base, and {checkpoint.folder} is in 4 bits already: leave it out",
    )
    return Dequantised(checkpoint)


def _dots(name: str) -> list[int]:
    return [at for at, letter in enumerate(name) if letter == "."]


def _rows(weight: torch.Tensor, elements: int) -> Iterator[tuple[int, torch.Tensor]]:
    step = max(1, elements // max(1, math.prod(weight.shape[1:])))
    yield from ((start, weight[start : start + step]) for start in range(0, len(weight), step))


def _bitsandbytes(checkpoint: Checkpoint) -> Any:
    try:
        import bitsandbytes.functional
    except ImportError as error:
        raise SalsaError(
            f"{checkpoint.folder}: found no bitsandbytes ({error}), expected it to go through 4 bits; pip install bitsandbytes"
        ) from None
    return bitsandbytes.functional
