"""Reading, checking and saving the full weights of a model as an ordinary Transformers checkpoint."""

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
from salsa_peft.models.base import ScoreHead, disable_router_logits
from salsa_peft.utils import files
from salsa_peft.utils.errors import SalsaError, require

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read all tensors of a safetensors file. Raises SalsaError if the file is not valid."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise SalsaError(f"{path}: not a valid safetensors file ({error}); copy or save the file again") from error


def check_finite(tensors: Mapping[str, torch.Tensor], where: str) -> None:
    """Raise SalsaError if a tensor has NaN or infinite values. where: the beginning of the error message."""
    for name, tensor in tensors.items():
        testable = tensor.is_floating_point() and tensor.element_size() > 1  # torch has no isfinite for fp8
        require(
            not testable or bool(tensor.isfinite().all()),
            f"{where}: {name} contains NaN or infinite values; the training that produced these weights diverged",
        )


def cast_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast a model's parameters in place, except a score head.

    Buffers, such as rotary frequencies, keep their precision too.
    """
    kept = score_weights(model)
    for name, parameter in model.named_parameters():
        if name not in kept:
            parameter.data = parameter.data.to(dtype)


def score_weights(model: nn.Module) -> set[str]:
    """Names of the parameters of a classifier's score head, which is saved in float32 whatever the dtype of the rest."""
    heads = [(name, module) for name, module in model.named_modules() if isinstance(module, ScoreHead)]
    return {f"{name}.{own}" for name, head in heads for own, _ in head.named_parameters()}


def save_checkpoint(model: PreTrainedModel, folder: Path, tokenizer: PreTrainedTokenizerBase,
                    weights: dict[str, torch.Tensor] | None = None, dtype: torch.dtype | None = None) -> None:  # fmt: skip
    """Save a Transformers checkpoint with its tokenizer, in shards of 5 GB.

    weights: the gathered weights of a sharded model, which are saved in `dtype` if it is given. The files are written
    to a subfolder first and replace an earlier checkpoint once all are complete. Raises SalsaError before writing if a
    weight is not finite or the disk lacks space.
    """
    if weights is not None:
        given, tied = weights, model.all_tied_weights_keys or {}  # duplicates of other weights
        weights = {name: tensor.to(dtype or tensor.dtype) for name, tensor in weights.items() if name not in tied}
        weights |= {name: given[name].float() for name in score_weights(model)}
    held = model.state_dict() if weights is None else weights
    check_finite(held, f"{folder} is not saved")
    stored = {tensor.untyped_storage().data_ptr(): tensor.nbytes for tensor in held.values()}  # tied weights count once
    disable_router_logits(model)
    beside = folder / ".saving"
    shutil.rmtree(beside, ignore_errors=True)  # left by a process that was killed
    files.require_disk_space(folder, sum(stored.values()), str(folder))
    try:
        model.save_pretrained(beside, max_shard_size="5GB", state_dict=weights)
        if weights is not None and dtype is not None:
            # save_pretrained writes the model's own dtype into the configuration
            model.config.dtype = dtype
            model.config.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    _replace_checkpoint(folder, beside)


def _replace_checkpoint(folder: Path, beside: Path) -> None:
    """Move the files of `beside` into `folder`, and delete an earlier checkpoint's shards from `folder`."""
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
    """Load a checkpoint's weights into a model. Raises SalsaError if tensors are missing or unknown."""
    found: set[str] = set()
    for file in sorted(folder.glob("model*.safetensors")):
        tensors = read_tensors(file)
        missing = sharding.load(model, tensors, strict=False)
        unknown = missing.unexpected_keys[:1]
        require(
            not unknown,
            f"{file}: {', '.join(unknown)} is not a weight of this model; use a checkpoint of this model",
        )
        found |= set(tensors)
    shared = set(model.all_tied_weights_keys or {})
    lost = sorted(set(model.state_dict()) - found - shared)
    require(not lost, f"{folder}: the model's weights {', '.join(lost[:2])} are missing; use a complete checkpoint")
