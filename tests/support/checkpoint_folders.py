"""Tiny checkpoint folders, and the sums that their soups are compared with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from salsa_peft.soup.checkpoints.read import CONFIG, INDEX, SINGLE

Change = Callable[[Path], object]
"""Something that is done to a checkpoint's folder."""
Tensors = dict[str, torch.Tensor]
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 40}
PLAIN = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False, **SIZES}
SHAPES = {
    "model.embed_tokens.weight": (40, 16), "model.layers.0.mlp.up_proj.weight": (24, 16), "model.layers.1.mlp.up_proj.weight": (24, 16),
    "model.norm.weight": (16,), "lm_head.weight": (40, 16), "scale": (),
}  # fmt: skip


def values(seed: int, dtype: torch.dtype = torch.bfloat16) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}


def parameters(seed: int, dtype: torch.dtype = torch.bfloat16) -> Tensors:
    """Without the tensor that no architecture has."""
    return {name: tensor for name, tensor in values(seed, dtype).items() if name != "scale"}


def write(
    folder: Path, tensors: Tensors, shards: int = 1, config: dict[str, Any] = PLAIN, reverse: bool = False
) -> Path:
    """A checkpoint folder: one file, or an index and several; `reverse`: dealt out the other way round."""
    folder.mkdir(parents=True)
    (folder / CONFIG).write_text(json.dumps(config))
    names = sorted(tensors, reverse=reverse)
    if shards == 1:
        save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
        return folder
    index = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(names)}
    for file in sorted(set(index.values())):
        save_file(
            {name: tensors[name] for name in names if index[name] == file}, folder / file, metadata={"format": "pt"}
        )
    size = sum(tensor.nbytes for tensor in tensors.values())
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": index}))
    return folder


def read(folder: Path) -> Tensors:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def mean64(members: list[Tensors], weights: list[float], name: str) -> torch.Tensor:
    return sum(
        (tensors[name].double() * weight for tensors, weight in zip(members, weights, strict=True)),
        torch.zeros(()).double(),
    )


def assert_rounded(found: Tensors, members: list[Tensors], weights: list[float]) -> None:
    """Each value is the float64 sum rounded to the dtype, or at a tie (to what the wider arithmetic can tell) its neighbour.

    Ties are common: a weight of 0.3 makes one of every tenth whole number.
    """
    for name, tensor in found.items():
        exact = mean64(members, weights, name)
        terms = torch.stack([m[name].double().abs() * abs(w) for m, w in zip(members, weights, strict=True)]).sum(0)
        wide = 2.0**-22 if tensor.element_size() == 2 else 2.0**-50
        has = torch.finfo(tensor.dtype)
        half = 0.5 * has.eps * 2.0 ** exact.abs().clamp(min=has.smallest_normal).log2().floor()
        assert bool(((tensor.double() - exact).abs() <= half + wide * terms).all()), name


def files(folder: Path, but: tuple[str, ...] = ("soup.json",)) -> dict[str, str]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths if path.name not in but}


def again(change: Callable[[Tensors], object], shards: int = 1) -> Change:
    """The weights, changed in place."""

    def rewrite(folder: Path) -> None:
        tensors = read(folder)
        change(tensors)
        config = json.loads((folder / CONFIG).read_text())
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
        write(folder, tensors, shards, config)

    return rewrite
