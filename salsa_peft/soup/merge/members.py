"""The members of a merged soup: read from their folders, then loaded by PEFT into a model of the base's architecture.

The class is the one that the base's configuration names, else another of that configuration that takes every member's tensors: an
adapter may have been trained on the language model of a multimodal base. Embeddings that were resized in training are resized here.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from salsa_peft.models.adapters.names import own_module, plain_names, unwrap
from salsa_peft.soup.checkpoints.read import Checkpoint, default_names
from salsa_peft.soup.lora.read import CONFIG, PICKLED, WEIGHTS, check_manifest, read_config
from salsa_peft.soup.lora.tensors import Member
from salsa_peft.soup.merge.adapter_models import AdapterModel, blank_model
from salsa_peft.utils.errors import SalsaError, require
from salsa_peft.utils.fingerprints import read_fingerprint
from salsa_peft.utils.safetensors_io import SafetensorsFile
from salsa_peft.utils.tensor_names import ModelNames, model_class
from salsa_peft.utils.tensor_names import read_config as read_model_config

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedConfig, PreTrainedModel

logger = logging.getLogger(__name__)


HEADS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")


class LoadedMembers(NamedTuple):
    """The members in models of one class."""

    adapters: list[AdapterModel]
    names: ModelNames
    """Of the base, as its files have it."""
    result: ModelNames
    """Of the merged model, which may have other rows of embeddings."""
    rows: int | None
    """Of the embeddings, where training gave them another number than the base has."""


def read_members(folders: Sequence[Path], names: Sequence[str] | None) -> list[Member]:
    """Configurations, fingerprints and headers. What the tensors are is PEFT's to say, when they are loaded."""
    return [_read(folder, name) for folder, name in zip(folders, default_names(folders, names), strict=True)]


def _read(folder: Path, name: str) -> Member:
    config, path = read_config(folder, merging=True), folder / WEIGHTS
    require(
        path.is_file() or not (folder / PICKLED).exists(),
        f"{folder} holds {PICKLED}, which is pickled and never read: save the adapter as {WEIGHTS}",
    )
    require(path.is_file(), f"{path} is missing: a member is a PEFT adapter folder with {CONFIG} and {WEIGHTS}")
    task = config["task_type"]
    require(
        task not in HEADS,
        f"{folder} is an adapter of a classifier (task_type {task}): its head has no tensor in a language model; average the adapters"
        " without --merge, and open the result with PEFT",
    )
    file = SafetensorsFile(path)
    require(bool(file.entries), f"{path} holds no tensors: save the adapter again")
    check_manifest(folder)
    return Member(name, folder, config, read_fingerprint(folder), file, {}, {})


def load_members(members: Sequence[Member], checkpoint: Checkpoint) -> LoadedMembers:
    """Every member in a blank model of its own. Raises SalsaError naming the file and tensor that no model of the base takes."""
    where = str(checkpoint.folder / "config.json")
    config = read_model_config(checkpoint.config, where)
    given = [(member, _tensors(member), _lora_config(member)) for member in members]
    first: SalsaError | None = None
    for made, part in _classes(config, members):
        try:
            return _load(given, made, part)
        except SalsaError as error:
            first = first or error
    assert first is not None
    raise first


def _load(given: list[tuple[Member, dict[str, torch.Tensor], LoraConfig]], made: type[PreTrainedModel],
          config: PreTrainedConfig) -> LoadedMembers:  # fmt: skip
    base = blank_model(made, config)
    rows = [_rows(base, member) for member, _, _ in given]
    embeddings: Any = base.get_input_embeddings()
    before: int = embeddings.weight.shape[0]
    other = next((i for i, count in enumerate(rows) if (count or before) != (rows[0] or before)), None)
    require(
        other is None,
        f"{given[other or 0][0].folder} was trained with {rows[other or 0] or before} rows of embeddings, {given[0][0].folder} with"
        f" {rows[0] or before}: members of a soup have the same added tokens; resize and train them alike",
    )
    wanted = copy.deepcopy(config)
    wanted.get_text_config().vocab_size = rows[0] or before
    adapters = [
        AdapterModel(member.file.path, copy.deepcopy(lora), tensors, blank_model(made, wanted))
        for member, tensors, lora in given
    ]
    resized = base if rows[0] in (None, before) else blank_model(made, wanted)
    return LoadedMembers(
        adapters, ModelNames(base), ModelNames(resized), None if rows[0] in (None, before) else rows[0]
    )


def _classes(
    config: PreTrainedConfig, members: Sequence[Member]
) -> list[tuple[type[PreTrainedModel], PreTrainedConfig]]:
    """Candidates, the likeliest first."""
    from transformers.models.auto import modeling_auto as auto

    found: list[tuple[type[PreTrainedModel], PreTrainedConfig]] = [(model_class(config), config)]
    for mapping in (auto.MODEL_FOR_CAUSAL_LM_MAPPING, auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING):
        for part in (config, config.get_text_config()):
            if type(part) in mapping:
                made: Any = mapping[type(part)]
                part = part if isinstance(part, made.config_class) else part.get_text_config()
                if made not in [known for known, _ in found]:
                    found.append((made, part))
    return found


def _tensors(member: Member) -> dict[str, torch.Tensor]:
    """The member's values in float32, under names without the prefixes of wrappers. Raises SalsaError where one is not finite."""
    found = {}
    names = plain_names(member.file.entries, member.config, member.file.path)
    known, own = (
        set(names.values()),
        own_module(member.config),
    )  # PEFT reads an original's rows, where tokens were added
    names |= {unwrap(key, own): key for key in member.file.entries if key not in known}
    for name, key in names.items():
        values = member.file.read(key)
        require(
            bool(values.isfinite().all()),
            f"{member.file.path}: {key} has values that are not finite: the training diverged; take an earlier checkpoint of it",
        )
        found[name] = values.float()
    return found


def _lora_config(member: Member) -> LoraConfig:
    from peft import LoraConfig

    path = member.folder / CONFIG
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of options of a newer PEFT, which read_config has looked at
            config: LoraConfig = LoraConfig.from_pretrained(str(member.folder))
    except (TypeError, ValueError) as error:
        raise SalsaError(f"{path} is not a LoRA configuration ({error}): save the adapter again") from error
    config.inference_mode, config.init_lora_weights, config.lora_dropout = True, True, 0.0
    return config


def _rows(model: PreTrainedModel, member: Member) -> int | None:
    """How many rows the embeddings had in training, where the adapter's tensors say it."""
    parts = {
        id(part): kind
        for kind, part in (("in", model.get_input_embeddings()), ("out", model.get_output_embeddings()))
        if part
    }
    leaves = {name.rpartition(".")[2]: parts[id(m)] for name, m in model.named_modules() if id(m) in parts}
    for key, entry in member.file.entries.items():
        for leaf, kind in leaves.items():
            _, found, rest = key.rpartition(f".{leaf}.")
            if not found:
                continue
            if rest.endswith("lora_embedding_A"):
                return entry.shape[1]
            if (rest.endswith("weight") and "lora_" not in rest) or (kind == "out" and rest.startswith("lora_B")):
                return entry.shape[0]
    return None
