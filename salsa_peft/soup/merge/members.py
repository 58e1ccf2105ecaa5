"""Reads the members of a merged soup, and lets PEFT load each into a model of the base's architecture.

The class of the model is the one that the base's configuration names, or else the first other class for that
configuration into which all members load: adapters may have been trained on the language model of a multimodal base. If
the embeddings were resized in training, those of the model are resized too.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from salsa_peft.models.adapters.names import own_module, plain_names, unwrap
from salsa_peft.soup.checkpoints.read import Checkpoint, default_names
from salsa_peft.soup.lora.read import CONFIG, open_weights, read_config
from salsa_peft.soup.lora.tensors import Member
from salsa_peft.soup.merge.adapter_models import AdapterModel, blank_model
from salsa_peft.utils.errors import SalsaError, require
from salsa_peft.utils.fingerprints import read_fingerprint
from salsa_peft.utils.tensor_names import ModelNames, model_class
from salsa_peft.utils.tensor_names import read_config as read_model_config

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedConfig, PreTrainedModel

HEADS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")


class LoadedMembers(NamedTuple):
    """The members, each loaded into its own model. All models have the same class."""

    adapters: list[AdapterModel]
    names: ModelNames
    """Parameter names and shapes of the base."""
    result: ModelNames
    """Parameter names and shapes of the merged model, whose embeddings may have more or fewer rows."""
    rows: int | None
    """Number of rows of the embeddings after training; None if it is the base's number."""


def read_members(folders: Sequence[Path], names: Sequence[str] | None) -> list[Member]:
    """Read configurations, fingerprints and headers of the members. PEFT checks the tensors on loading."""
    return [_read(folder, name) for folder, name in zip(folders, default_names(folders, names), strict=True)]


def _read(folder: Path, name: str) -> Member:
    config = read_config(folder, merging=True)
    task = config["task_type"]
    require(
        task not in HEADS,
        f"{folder} is an adapter of a classifier (task_type {task}), whose head a language model does not have; average"
        " the adapters without --merge, and open the result with PEFT",
    )
    return Member(name, folder, config, read_fingerprint(folder), open_weights(folder), {}, {})


def load_members(members: Sequence[Member], checkpoint: Checkpoint) -> LoadedMembers:
    """Load every member into its own blank model.

    Raises SalsaError naming file and tensor if no model class of the base fits all members."""
    where = str(checkpoint.folder / "config.json")
    config = read_model_config(checkpoint.config, where)
    given = [(member, _tensors(member), _lora_config(member)) for member in members]
    first: SalsaError | None = None
    for architecture, part in _classes(config, members):
        try:
            return _load(given, architecture, part)
        except SalsaError as error:
            first = first or error
    assert first is not None
    raise first


def _load(given: list[tuple[Member, dict[str, torch.Tensor], LoraConfig]], architecture: type[PreTrainedModel],
          config: PreTrainedConfig) -> LoadedMembers:  # fmt: skip
    base = blank_model(architecture, config)
    rows = [_rows(base, member) for member, _, _ in given]
    embeddings: Any = base.get_input_embeddings()
    before: int = embeddings.weight.shape[0]
    other = next((i for i, count in enumerate(rows) if (count or before) != (rows[0] or before)), None)
    require(
        other is None,
        f"{given[other or 0][0].folder} was trained with {rows[other or 0] or before} rows of embeddings, but"
        f" {given[0][0].folder} with {rows[0] or before}; members of a soup must have the same added tokens: resize the"
        " embeddings to the same number of rows and train again",
    )
    wanted = copy.deepcopy(config)
    wanted.get_text_config().vocab_size = rows[0] or before
    adapters = [
        AdapterModel(member.file.path, copy.deepcopy(lora), tensors, blank_model(architecture, wanted))
        for member, tensors, lora in given
    ]
    if rows[0] in (None, before):
        return LoadedMembers(adapters, ModelNames(base), ModelNames(base), None)
    return LoadedMembers(adapters, ModelNames(base), ModelNames(blank_model(architecture, wanted)), rows[0])


def _classes(
    config: PreTrainedConfig, members: Sequence[Member]
) -> list[tuple[type[PreTrainedModel], PreTrainedConfig]]:
    """Model classes on which the members may have been trained, likeliest first, with configurations."""
    from transformers.models.auto import modeling_auto as auto

    found: list[tuple[type[PreTrainedModel], PreTrainedConfig]] = [(model_class(config), config)]
    for mapping in (auto.MODEL_FOR_CAUSAL_LM_MAPPING, auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING):
        for part in (config, config.get_text_config()):
            if type(part) in mapping:
                architecture: Any = mapping[type(part)]
                part = part if isinstance(part, architecture.config_class) else part.get_text_config()
                if architecture not in [known for known, _ in found]:
                    found.append((architecture, part))
    return found


def _tensors(member: Member) -> dict[str, torch.Tensor]:
    """Read the member's tensors, in float32, by names without prefixes of wrappers. All must be finite."""
    found = {}
    names = plain_names(member.file.entries, member.config, member.file.path)
    known, own = set(names.values()), own_module(member.config)
    # if tokens were added, PEFT also reads the copies that plain_names leaves out
    names |= {unwrap(key, own): key for key in member.file.entries if key not in known}
    for name, key in names.items():
        values = member.file.read(key)
        require(
            bool(values.isfinite().all()),
            f"{member.file.path}: {key} has values that are not finite, so the training diverged; use an"
            " earlier checkpoint",
        )
        found[name] = values.float()
    return found


def _lora_config(member: Member) -> LoraConfig:
    from peft import LoraConfig

    path = member.folder / CONFIG
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about options of a newer PEFT, which read_config has checked
            config: LoraConfig = LoraConfig.from_pretrained(str(member.folder))
    except (TypeError, ValueError) as error:
        raise SalsaError(f"{path} is not a LoRA configuration ({error}); save the adapter again") from error
    config.inference_mode, config.init_lora_weights, config.lora_dropout = True, True, 0.0
    return config


def _rows(model: PreTrainedModel, member: Member) -> int | None:
    """Number of rows of the embeddings in training; None if the adapter's tensors do not show it."""
    head = model.get_output_embeddings()
    parts = (model.get_input_embeddings(), head)
    leaves = {name.rpartition(".")[2]: module is head for name, module in model.named_modules() if module in parts}
    for key, entry in member.file.entries.items():
        for leaf, is_head in leaves.items():
            _, found, rest = key.rpartition(f".{leaf}.")
            if not found:
                continue
            if rest.endswith("lora_embedding_A"):
                return entry.shape[1]
            if (rest.endswith("weight") and "lora_" not in rest) or (is_head and rest.startswith("lora_B")):
                return entry.shape[0]
    return None
