"""Reading, checking and saving the weights of a whole model as an ordinary Transformers checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from salsa_peft.models import sharding
from salsa_peft.models.base import without_router_logits
from salsa_peft.utils import files
from salsa_peft.utils.errors import SalsaError, require

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """A safetensors file's. Raises SalsaError for a file that is none: damaged, or pickled under that name."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise SalsaError(
            f"{path}: found no safetensors file ({error}), expected one: it is damaged, or of another format; copy or save it again"
        ) from error


def check_finite(tensors: Mapping[str, torch.Tensor], where: str) -> None:
    """Raise SalsaError, beginning with `where`, for a tensor with NaN or infinite values."""
    for name, tensor in tensors.items():
        plain = tensor.is_floating_point() and tensor.element_size() > 1  # torch has no isfinite for fp8
        require(
            not plain or bool(tensor.isfinite().all()),
            f"{where}: {name}: found a value that is not finite, expected finite weights; the training that made them went wrong",
        )


def cast_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """In place. Not .to(): buffers (rotary frequencies) stay exact."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def save_checkpoint(model: PreTrainedModel, folder: Path, tokenizer: PreTrainedTokenizerBase,
                    weights: dict[str, torch.Tensor] | None = None, dtype: torch.dtype | None = None) -> None:  # fmt: skip
    """An ordinary Transformers checkpoint with its tokenizer, in shards of 5 GB.

    weights: the model's, where it does not hold them whole itself; saved in `dtype`, where one is given. A checkpoint that was there gives
    way when this one is whole beside it. Raises SalsaError, before it writes, for weights that are not finite, or a disk without room.
    """
    if weights is not None:
        tied = model.all_tied_weights_keys or {}  # copies of what they are tied to
        weights = {name: tensor.to(dtype or tensor.dtype) for name, tensor in weights.items() if name not in tied}
    held = model.state_dict() if weights is None else weights
    check_finite(held, f"{folder} is not saved")
    stored = {tensor.untyped_storage().data_ptr(): tensor.nbytes for tensor in held.values()}  # tied ones once
    without_router_logits(model)
    beside = folder / ".saving"
    shutil.rmtree(beside, ignore_errors=True)  # of a kill before
    files.require_disk_space(folder, sum(stored.values()), str(folder))
    try:
        model.save_pretrained(beside, max_shard_size="5GB", state_dict=weights)
        if weights is not None and dtype is not None:  # save_pretrained writes the dtype that the model has
            model.config.dtype = dtype
            model.config.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    _take_place(beside, folder)


def _take_place(beside: Path, folder: Path) -> None:
    """The files of `beside` into `folder`, where shards of an earlier checkpoint go."""
    new = {path.name for path in beside.iterdir()}
    for path in sorted(beside.iterdir()):
        if (folder / path.name).is_dir():
            shutil.rmtree(folder / path.name)
        path.replace(folder / path.name)
    for path in folder.glob("model*.safetensors*"):
        if path.name not in new:
            path.unlink()
    beside.rmdir()


def load_weights(model: PreTrainedModel, folder: Path) -> None:
    """Give a model the weights of the checkpoint in `folder`, in place. Raises SalsaError where a tensor has no place in it."""
    found: set[str] = set()
    for file in sorted(folder.glob("model*.safetensors")):
        tensors = read_tensors(file)
        missing = sharding.load(model, tensors, strict=False)
        require(
            not missing.unexpected_keys, f"{file}: found {missing.unexpected_keys[:1]}, expected weights of this model"
        )
        found |= set(tensors)
    shared = set(model.all_tied_weights_keys or {})
    lost = sorted(set(model.state_dict()) - found - shared)
    require(not lost, f"{folder}: found no {', '.join(lost[:2])}, expected all weights of the model")
