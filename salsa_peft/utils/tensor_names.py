"""The names that a checkpoint's tensors have in the Transformers model of its configuration.

Files on the Hub name the same parameter in several ways: with or without the base model's prefix, in a multimodal
model's older layout, with one tensor per expert or all experts in one, or under the prefixes of `torch.compile` or
FSDP. They may also hold buffers (rotary frequencies, causal masks). The names here are those of the model's
`state_dict`. They are found with Transformers' own conversion mapping, on a model on the meta device. Transformers is
imported only when a name is asked for.
"""

from __future__ import annotations

import bisect
import copy
import functools
import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from salsa_peft.utils.errors import SalsaError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
"""The names that torch.compile, FSDP, activation checkpointing and Lightning give to wrapped modules."""
WRAPPED = re.compile(rf"(^|\.)({'|'.join(WRAPPERS)})(?=\.)")
OUTERMOST = re.compile(r"^(base_model\.model\.)?(module\.)+")
"""The wrapper of DistributedDataParallel and DeepSpeed, which always wraps the whole model."""


def without_wrappers(name: str) -> str:
    """A tensor's name without wrappers' prefixes: `_orig_mod.model.norm.weight` → `model.norm.weight`."""
    plain = WRAPPED.sub("", name).removeprefix(".")
    return OUTERMOST.sub(lambda found: found[1] or "", plain)


class Block(NamedTuple):
    """Consecutive elements of a tensor in a file: `elements` elements, beginning with number `first`."""

    source: str
    """The tensor's name in the file."""
    first: int
    elements: int


@dataclass(frozen=True)
class ResolvedNames:
    """Which tensors of a checkpoint's files belong to which tensors of the model."""

    names: dict[str, str | None]
    """Name in the file → name in the model.

    None if Transformers ignores the tensor. For a tensor that is split on loading, the name of its first part.
    """
    blocks: dict[str, tuple[Block, ...]]
    """Name in the model → the blocks in the file that hold its elements, in order.

    Tied output embeddings that are not in the file are left out.
    """
    unknown: list[str]
    """Names in the file that the model does not have."""


class ModelNames:
    """The names and shapes of a model's parameters and persistent buffers, and which of them are tied."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        self.parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        self.tied: dict[str, str] = dict(model.all_tied_weights_keys)
        """Output embeddings → the input embeddings to which the configuration ties them."""

    def __str__(self) -> str:
        return type(self.model).__name__

    def resolve(self, shapes: Mapping[str, Sequence[int]], where: str) -> ResolvedNames:
        """Map tensors of these names and shapes to the model's tensors, as `from_pretrained` does.

        Wrappers' prefixes are removed first. where: the folder, for errors. Raises SalsaError if two tensors map to the
        same tensor of the model, or if a tensor has another shape in the model than in the file.
        """
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

        mapping = get_model_conversion_mapping(self.model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
        prefix, state = self.model.base_model_prefix, self.model.state_dict()
        names: dict[str, str | None] = {}
        direct: dict[str, str] = {}
        groups: dict[str, tuple[Any, list[tuple[str, str]]]] = {}
        unplaced: dict[str, str] = {}
        for name in sorted(shapes, key=dot_natural_key):
            plain = without_wrappers(name)
            found, pattern = rename_source_key(plain, renamings, converters, prefix, state)
            if found not in state and plain in state:
                found, pattern = rename_source_key(plain, [], [], prefix, state)
            names[name] = found
            if found not in state:
                unplaced[name] = found
            elif pattern is not None:
                groups.setdefault(found, (by_pattern[pattern], []))[1].append((pattern, name))
            else:
                _check_free(direct.get(found), found, name, where)
                direct[found] = name
        ignored = self._ignored(set(unplaced.values()))
        names |= {name: None for name, found in unplaced.items() if found in ignored}
        blocks: dict[str, tuple[Block, ...]] = {}
        for found, name in direct.items():
            if tuple(shapes[name]) != self.shapes[found]:
                raise SalsaError(_wrong_shape(where, name, shapes[name], found, self.shapes[found]))
            blocks[found] = (Block(name, 0, math.prod(shapes[name])),)
        for first, (converter, sources) in groups.items():
            for found, parts in self._converted(first, converter, sources, shapes, where).items():
                _check_free(direct.get(found), found, parts[0].source, where)
                blocks[found] = parts
        return ResolvedNames(names, blocks, [name for name, found in unplaced.items() if found not in ignored])

    def _ignored(self, names: set[str]) -> set[str]:
        """Those of `names` that Transformers ignores silently. `names` must not be tensors of the model."""
        from transformers.utils.loading_report import LoadStateDictInfo

        info = LoadStateDictInfo(set(), set(names), set(), [], {}, set())
        self.model._adjust_missing_and_unexpected_keys(info)
        return names - info.unexpected_keys

    def _converted(
        self,
        first: str,
        converter: Any,
        sources: list[tuple[str, str]],
        shapes: Mapping[str, Sequence[int]],
        where: str,
    ) -> dict[str, tuple[Block, ...]]:
        """The blocks of the tensors that a converter makes, such as fused experts.

        The converter is applied to row numbers instead of rows, so the cost does not depend on the length of the rows.
        """
        import torch

        work, starts, total = copy.deepcopy(converter), [], 0
        for pattern, name in sources:
            shape = tuple(shapes[name])
            rows = shape if len(shape) < 2 else (*shape[:-1], 1)
            starts.append((total, name, 1 if len(shape) < 2 else shape[-1]))
            work.add_tensor(first, name, pattern, torch.arange(total, total + math.prod(rows)).reshape(rows))
            total += math.prod(rows)
        blocks = {}
        for found, value in work.convert(first, model=self.model, config=self.model.config).items():
            numbers = value[0] if isinstance(value, list) else value
            shape = self.shapes[found]
            moved = tuple(numbers.shape) == (shape if len(shape) < 2 else (*shape[:-1], 1))
            widths = {1 if len(shape) < 2 else shape[-1]} | {width for _, _, width in starts}
            if not moved or len(widths) > 1:
                raise SalsaError(_wrong_shape(where, sources[0][1], shapes[sources[0][1]], found, shape))
            blocks[found] = _blocks(numbers.flatten(), starts)
        return blocks


def _check_free(taken: str | None, found: str, name: str, where: str) -> None:
    if taken is not None:
        raise SalsaError(f"{where}: {taken} and {name} are both loaded as {found}; remove one of them")


def _wrong_shape(where: str, name: str, given: Sequence[int], found: str, expected: Sequence[int]) -> str:
    return (
        f"{where}: {name} has shape {list(given)}, but {found} in the model has {list(expected)} according to"
        " config.json; correct the configuration, or save the model again with Transformers"
    )


def _blocks(numbers: Any, starts: list[tuple[int, str, int]]) -> tuple[Block, ...]:
    """Group row numbers into runs of consecutive rows, each within one source tensor.

    starts: for each source tensor the number of its first row, its name, and the length of its rows.
    """
    import torch

    firsts = [start for start, _, _ in starts]
    jumps = torch.nonzero(numbers[1:] != numbers[:-1] + 1).flatten() + 1
    edges = [0, *jumps.tolist(), len(numbers)]
    blocks = []
    for begin, end in itertools.pairwise(edges):
        at, last = int(numbers[begin]), int(numbers[end - 1]) + 1
        while at < last:
            index = bisect.bisect_right(firsts, at) - 1
            start, name, width = starts[index]
            stop = min(last, firsts[index + 1] if index + 1 < len(firsts) else last)
            blocks.append(Block(name, (at - start) * width, (stop - at) * width))
            at = stop
    return tuple(blocks)


def of_config(config: Mapping[str, Any], where: str) -> ModelNames:
    """The ModelNames of a configuration's content; `where` is the file, for errors."""
    return _of_json(json.dumps(config, sort_keys=True), where)


@functools.lru_cache(maxsize=8)
def _of_json(content: str, where: str) -> ModelNames:
    return ModelNames(meta_model(read_config(json.loads(content), where)))


def meta_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a configuration on the meta device, without memory for its parameters."""
    import torch
    from transformers.initialization import meta_device_safe_creation_ops, no_init_weights, no_tie_weights

    architecture = model_class(config)
    with torch.device("meta"), no_init_weights(), no_tie_weights(), meta_device_safe_creation_ops():
        return architecture(copy.deepcopy(config))


def read_config(config: Mapping[str, Any], where: str) -> PreTrainedConfig:
    """A configuration as Transformers reads it, with old fields renamed and defaults filled in.

    Quantisation is left out. Raises SalsaError if Transformers cannot read it.
    """
    import transformers
    from huggingface_hub.errors import StrictDataclassError
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise SalsaError(
            f"{where}: transformers {transformers.__version__} does not support model_type {kind!r:.60}; install a version"
            " that does"
        )
    plain = {key: value for key, value in config.items() if key not in ("quantization_config", "auto_map")}
    try:
        read: PreTrainedConfig = CONFIG_MAPPING[kind].from_dict(plain)
    except (TypeError, ValueError, KeyError, AttributeError, StrictDataclassError) as error:
        why = f"Transformers cannot read this configuration: {' '.join(str(error).split()):.300}"
        raise SalsaError(f"{where}: {why}; correct the file") from error
    return read


def is_known(config: Mapping[str, Any]) -> bool:
    """Whether Transformers supports the architecture of a config.json's content."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return config.get("model_type") in CONFIG_MAPPING


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class that `architectures` names, or else the first that Transformers has for the configuration."""
    from transformers.models.auto import modeling_auto as auto

    mappings = (
        auto.MODEL_FOR_CAUSAL_LM_MAPPING, auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
        auto.MODEL_FOR_MULTIMODAL_LM_MAPPING, auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING, auto.MODEL_MAPPING,
    )  # fmt: skip
    found: list[Any] = [mapping[type(config)] for mapping in mappings if type(config) in mapping]
    candidates = [one for entry in found for one in (entry if isinstance(entry, list | tuple) else [entry])]
    if not candidates:
        what = f"Transformers has no language model for the model_type {config.model_type}"
        raise SalsaError(f"{what}; use a checkpoint of another architecture")
    named = [one for one in candidates if one.__name__ in (config.architectures or ())]
    chosen: type[PreTrainedModel] = (named or candidates)[0]
    return chosen
