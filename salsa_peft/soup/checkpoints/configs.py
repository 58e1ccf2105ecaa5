"""Checks that models with two configurations compute the same function of the same tensors.

Transformers may save a configuration in another form than the one that it read: Gemma's `hidden_act: gelu` as
`gelu_pytorch_tanh`, an unused `sliding_window` as null, `rope_theta` inside `rope_parameters`, defaults filled in. So
if the two files differ, Transformers reads both, and the results are compared field by field. Shapes of tensors and
tied output embeddings are compared by the tensors themselves (alignment.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from salsa_peft.utils.errors import SalsaError, require

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

WITHOUT_EFFECT = frozenset(
    ("_name_or_path", "architectures", "auto_map", "chunk_size_feed_forward", "dtype", "torch_dtype", "transformers_version", "use_cache",
     "return_dict", "output_attentions", "output_hidden_states", "output_router_logits", "router_aux_loss_coef", "router_jitter_noise",
     "problem_type", "id2label", "label2id", "num_labels", "initializer_range", "initializer_factor", "pretraining_tp", "tie_word_embeddings",
     "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id", "cache_implementation", "_attn_implementation",
     "attn_implementation", "use_bfloat16", "attention_dropout", "hidden_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob",
     "resid_pdrop", "embd_pdrop", "attn_pdrop", "residual_dropout", "dropout", "activation_dropout", "classifier_dropout", "layerdrop",
     "summary_first_dropout", "max_position_embeddings", "max_window_layers", "use_sliding_window", "sliding_window_pattern")
)  # fmt: skip
"""Fields that do not change a model's results in evaluation mode, or that are compared by other means:
positions by rotary embeddings or the shape of learned ones, windows by `layer_types`, tying by the tensors."""
ROPE = ("rope_parameters", "rope_scaling", "rope_theta", "rope_local_base_freq", "partial_rotary_factor")
DERIVED = ("head_dim", "layer_types", "num_key_value_heads")
"""Fields that Transformers derives from other fields if the file lacks them."""
LENGTHS = ("dynamic", "longrope")
"""Types of rotary embeddings that depend on max_position_embeddings."""


def check_alike(head: Mapping[str, Any], other: Mapping[str, Any], head_path: Path, other_path: Path) -> None:
    """Raise SalsaError if two config.json give different results; the error names the first such field."""
    if _plain(head) == _plain(other):
        return
    kinds = [config.get("model_type") for config in (head, other)]
    require(kinds[0] == kinds[1], _line("model_type", kinds[1], kinds[0], other_path, head_path))
    from salsa_peft.utils import tensor_names

    if not tensor_names.is_known(head):  # Transformers cannot read these configs, so compare their fields
        for field in sorted(_plain(head).keys() & _plain(other).keys()):
            require(head[field] == other[field], _line(field, other[field], head[field], other_path, head_path))
        return
    first = tensor_names.read_config(head, str(head_path))
    second = tensor_names.read_config(other, str(other_path))
    found = difference(first, second)
    if found is not None:
        raise SalsaError(_line(found[0], found[2], found[1], other_path, head_path))


def _line(field: str, second: Any, first: Any, other_path: Path, head_path: Path) -> str:
    why = (
        "with the same weights, the two models would compute different results; average models of one architecture, or"
        " correct the file that is wrong"
    )
    if field.endswith("vocab_size"):
        why = (
            "the models' embeddings have different numbers of rows; resize those of one model with"
            " model.resize_token_embeddings(…) and save it again"
        )
    return f"{other_path}: {field} is {second!r:.80}, but {first!r:.80} in {head_path}: {why}"


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without the fields that have no effect, also in its nested configurations."""
    return {
        key: _plain(value) if isinstance(value, dict) and key.endswith("_config") else value
        for key, value in config.items()
        if key not in WITHOUT_EFFECT or key == "max_position_embeddings"
    }


def difference(head: PreTrainedConfig, other: PreTrainedConfig, prefix: str = "") -> tuple[str, Any, Any] | None:
    """The first field in which two configurations of one class differ in effect, and both values; or None.

    Only the fields that the class declares are compared, since models read no other fields.
    """
    first, second = head.to_dict(), other.to_dict()
    parts = [name for name in type(head).sub_configs if name in first]
    for name in parts:
        one, two = vars(head).get(name), vars(other).get(name)
        if one is None or two is None or type(one) is not type(two):
            if one is not two:
                return prefix + name, type(one).__name__, type(two).__name__
            continue
        found = difference(one, two, f"{prefix}{name}.")
        if found is not None:
            return found
    if parts and type(head).__name__ != type(other).__name__:
        return prefix + "model_type", head.model_type, other.model_type
    ignored = WITHOUT_EFFECT.union(parts, ROPE)
    if "sliding" not in str(first.get("layer_types", "sliding")) and first.get("layer_types") == second.get(
        "layer_types"
    ):
        ignored |= {"sliding_window"}
    fields = type(head)().to_dict().keys() - ignored
    for field in sorted(fields, key=lambda field: (field in DERIVED, field)):
        if not _same(field, first.get(field), second.get(field)):
            return prefix + field, first.get(field), second.get(field)
    if not _same_rope(head, other):
        return prefix + "rope_parameters", first.get("rope_parameters"), second.get("rope_parameters")
    return None


def _same(field: str, first: Any, second: Any) -> bool:
    """Whether two values of a field mean the same, such as null and false, or two names of an activation."""
    if isinstance(first, float | int) and isinstance(second, float | int):
        return math.isclose(first, second, rel_tol=1e-6)
    if isinstance(first, str) and isinstance(second, str) and ("act" in field):
        return first == second or _same_activation(first, second)
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(_same(field, first[key], second[key]) for key in first)
    return first == second or (not first and not second and {type(first), type(second)} <= {bool, type(None)})


def _same_activation(first: str, second: str) -> bool:
    """Whether two activations agree to the precision of float32, as gelu_new and gelu_pytorch_tanh do."""
    import torch
    from transformers.activations import ACT2FN

    if first not in ACT2FN or second not in ACT2FN:
        return False
    values = torch.linspace(-12, 12, 4097, dtype=torch.float64)
    given = (ACT2FN[first], ACT2FN[second])
    one, two = (function.double() if isinstance(function, torch.nn.Module) else function for function in given)
    return bool(torch.allclose(one(values), two(values), rtol=1e-6, atol=1e-6))


def _same_rope(head: PreTrainedConfig, other: PreTrainedConfig) -> bool:
    """Whether the rotary embeddings of two models have the same parameters or the same frequencies."""
    first, second = (_rope(config) for config in (head, other))
    if "longest" in first or "longest" in second or first == second:
        return first == second
    import torch

    one, two = _frequencies(head), _frequencies(other)
    same = bool(one) and one.keys() == two.keys()
    return same and all(
        one[key].shape == two[key].shape and torch.allclose(one[key], two[key], rtol=1e-6, atol=0) for key in one
    )


def _rope(config: PreTrainedConfig) -> dict[str, Any]:
    """rope_parameters without synonyms and nulls, with max_position_embeddings if the values use it."""
    content = config.to_dict()
    given = content.get("rope_parameters") or {}
    flat = {
        f"{kind}.{key}": value for kind, part in given.items() if isinstance(part, dict) for key, value in part.items()
    }
    flat |= {key: value for key, value in given.items() if not isinstance(value, dict)}
    found = {key: value for key, value in flat.items() if value is not None and key.rpartition(".")[2] != "type"}
    if any(value in LENGTHS for value in found.values() if isinstance(value, str)):
        found["longest"] = content.get("max_position_embeddings")
    return found


def _frequencies(config: PreTrainedConfig) -> dict[str, Any]:
    """Frequencies and attention scaling of a model's rotary embeddings, by the names of their modules."""
    import torch

    from salsa_peft.utils import tensor_names

    found: dict[str, Any] = {}
    for name, module in tensor_names.meta_model(config).named_modules():
        if "config" in vars(module) and any(
            buffer.endswith("inv_freq") for buffer, _ in module.named_buffers(recurse=False)
        ):
            rotary_class: Any = type(module)
            rotary = rotary_class(config=vars(module)["config"])  # the model's own module is on the meta device
            found |= {f"{name}.{buffer}": values for buffer, values in rotary.named_buffers()}
            scales = {key: value for key, value in vars(rotary).items() if key.endswith("attention_scaling")}
            found |= {f"{name}.{key}": torch.tensor(float(value)) for key, value in scales.items()}
    return found
