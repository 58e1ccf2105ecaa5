"""Reads the base of a merge: plain, dequantised from 4 bits, or quantised to 4 bits and dequantised.

A merge is never written in 4 bits, because quantising again would lose the delta. A checkpoint in bitsandbytes' 4 bits
is dequantised to its compute dtype. `nf4` (or `nf4-double`, with quantised scales, as in QLoRA) quantises and
dequantises the linear layers of a plain base, because a QLoRA adapter was trained on those values. 8 bits, GPTQ, AWQ
and other methods are not supported.
"""

import json
import logging
import math
import sys
from collections.abc import Iterator
from typing import Any

import torch

from salsa_peft.soup.checkpoints.read import CONFIG, Checkpoint
from salsa_peft.utils.errors import SalsaError, require
from salsa_peft.utils.safetensors_io import BITS, NAMES, safetensors_dtype

logger = logging.getLogger(__name__)

DOUBLE = {"nf4": False, "nf4-double": True}
"""Value of quantized_base → whether the scales are quantised too (bnb_4bit_use_double_quant)."""
NO_LINEARS = ("embed", "wte.", "wpe.", "position", "lm_head", "score.")
"""Substrings of the names of matrices that bitsandbytes does not quantise."""


class PlainBase:
    """A base whose tensors are read without conversion."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.summary: dict[str, Any] = {"quantized_base": None}
        """The entries of soup.json about the quantisation of the base."""

    def config(self) -> bytes | str:
        """The content of config.json of the merged checkpoint."""
        return (self.checkpoint.folder / CONFIG).read_bytes()

    def names(self, file: str) -> list[str]:
        """The names of the base's tensors in a shard, in order."""
        return list(self.checkpoint.files[file].entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor of the base."""
        return self.checkpoint.tensors[name].entry.shape

    def dtype(self, name: str) -> str:
        """The dtype (safetensors' name) of a tensor, in the base and in the merged checkpoint."""
        return self.checkpoint.tensors[name].entry.dtype

    def whole(self, name: str) -> torch.Tensor:
        """Read a whole tensor of the base."""
        return torch.cat([piece for _, piece in self.pieces(name, sys.maxsize)]).reshape(self.shape(name))

    def pieces(self, name: str, elements: int) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield a tensor in pieces of about `elements` elements, each as (index of the first row, rows)."""
        file, entry = self.checkpoint.tensors[name]
        shape = entry.shape or (1,)  # a scalar is one row
        columns = math.prod(shape[1:])
        step, width = max(1, elements // max(1, columns)), columns * BITS[entry.dtype] // 8
        for start in range(0, shape[0], step):
            rows = min(step, shape[0] - start)
            raw = torch.empty(rows * width, dtype=torch.uint8)
            file.read_into(raw.numpy().data, entry.begin + start * width)
            yield start, raw.view(getattr(torch, NAMES[entry.dtype])).reshape(rows, *shape[1:])


class Requantised(PlainBase):
    """A plain base whose linear layers are quantised to 4 bits and dequantised again, layer by layer."""

    def __init__(self, checkpoint: Checkpoint, kind: str) -> None:
        super().__init__(checkpoint)
        self.double = DOUBLE[kind]
        self.linears = {name for name, place in checkpoint.tensors.items() if len(place.entry.shape) == 2 and name.endswith(".weight")
                        and not any(part in name for part in NO_LINEARS)}  # fmt: skip
        logger.warning("%s: %d linear layers are quantised to %s and back, as when the adapters were trained", checkpoint.folder,
                       len(self.linears), kind)  # fmt: skip
        self.summary = {"quantized_base": kind, "requantised": len(self.linears)}

    def pieces(self, name: str, elements: int) -> Iterator[tuple[int, torch.Tensor]]:
        """As PlainBase.pieces; a linear layer is quantised and dequantised first."""
        if name not in self.linears:
            return super().pieces(name, elements)
        library = _bitsandbytes(self.checkpoint)
        weight = self.checkpoint.read(name)
        packed, state = library.quantize_4bit(weight, quant_type="nf4", compress_statistics=self.double)
        return _rows(library.dequantize_4bit(packed, state).to(weight.dtype), elements)


class Dequantised(PlainBase):
    """A checkpoint in bitsandbytes' 4 bits, dequantised to its compute dtype one weight at a time."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        given = checkpoint.config["quantization_config"]
        dtype = str(given.get("bnb_4bit_compute_dtype", "float32")).removeprefix("torch.")
        self.code = safetensors_dtype(getattr(torch, dtype))
        marker = ".quant_state.bitsandbytes__"
        states = {name.partition(marker)[0]: name for name in checkpoint.tensors if marker in name}
        self.shapes = {
            name: tuple(json.loads(bytes(checkpoint.read(state).tolist()))["shape"]) for name, state in states.items()
        }
        """Name of a weight in 4 bits → its shape when dequantised."""
        _bitsandbytes(checkpoint)
        logger.warning(
            "%s: its %d weights in 4 bits are dequantised to %s", checkpoint.folder, len(states), NAMES[self.code]
        )
        self.summary = {"quantized_base": "bitsandbytes 4 bits, dequantised"}
        self.summary |= {"dequantised": len(self.shapes), "dtype": NAMES[self.code]}

    def config(self) -> str:
        """The content of config.json without the quantisation, and with the compute dtype."""
        given = {key: value for key, value in self.checkpoint.config.items() if key != "quantization_config"}
        given |= {key: NAMES[self.code] for key in ("dtype", "torch_dtype") if key in given}
        return json.dumps(given, indent=2, ensure_ascii=False) + "\n"

    def names(self, file: str) -> list[str]:
        """As PlainBase.names, without the tensors that describe the quantisation."""
        return [name for name in super().names(file) if not any(name.startswith(f"{one}.") for one in self.shapes)]

    def shape(self, name: str) -> tuple[int, ...]:
        """As PlainBase.shape; for a weight in 4 bits, its shape when dequantised."""
        return self.shapes[name] if name in self.shapes else super().shape(name)

    def dtype(self, name: str) -> str:
        """As PlainBase.dtype; for a weight in 4 bits, the compute dtype."""
        return self.code if name in self.shapes else super().dtype(name)

    def pieces(self, name: str, elements: int) -> Iterator[tuple[int, torch.Tensor]]:
        """As PlainBase.pieces; a weight in 4 bits is dequantised first."""
        if name not in self.shapes:
            return super().pieces(name, elements)
        library = _bitsandbytes(self.checkpoint)
        parts = [part for part in self.checkpoint.tensors if part.startswith(f"{name}.")]
        given = {part.removeprefix(f"{name}."): self.checkpoint.read(part) for part in parts}
        state = library.QuantState.from_dict(given, device=torch.device("cpu"))
        weight = library.dequantize_4bit(self.checkpoint.read(name), state)
        return _rows(weight.to(getattr(torch, NAMES[self.code])), elements)


def open_base(checkpoint: Checkpoint, quantized_base: str | None) -> PlainBase:
    """Open a base. Raises SalsaError if it does not allow `quantized_base`, or bitsandbytes is missing."""
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
        f"{checkpoint.folder / CONFIG}: the weights are quantised"
        f" ({'bitsandbytes, 8 bits' if eight else checkpoint.quantised}), but a delta can only be added to plain"
        " weights or to bitsandbytes' 4 bits; name the unquantised base with --base, or dequantise this base",
    )
    require(
        quantized_base is None,
        f"quantized_base: {quantized_base} is for a plain base, but {checkpoint.folder} is already in 4 bits; leave"
        " quantized_base out",
    )
    return Dequantised(checkpoint)


def _rows(weight: torch.Tensor, elements: int) -> Iterator[tuple[int, torch.Tensor]]:
    step = max(1, elements // max(1, math.prod(weight.shape[1:])))
    yield from ((start, weight[start : start + step]) for start in range(0, len(weight), step))


def _bitsandbytes(checkpoint: Checkpoint) -> Any:
    try:
        import bitsandbytes.functional
    except ImportError as error:
        raise SalsaError(
            f"{checkpoint.folder}: weights in 4 bits need bitsandbytes, which cannot be imported ({error}); run"
            " pip install bitsandbytes"
        ) from None
    return bitsandbytes.functional
