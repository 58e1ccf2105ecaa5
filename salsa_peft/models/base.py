"""Base models: loading them and their tokenizers, their trunk and head, saving full weights, and whether weights are of the same base."""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
from peft import PeftModel
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.utils import ModelOutput
from transformers.utils.hub import cached_file

from salsa_peft.config.schema import OWN_TEMPLATE, Model
from salsa_peft.data.chat import templates, turn_ends
from salsa_peft.models import sharding
from salsa_peft.models.adapters import lora
from salsa_peft.models.adapters.bases import require_same_family
from salsa_peft.models.architectures.sizes import config_of
from salsa_peft.utils import files
from salsa_peft.utils.errors import require
from salsa_peft.utils.fingerprints import FINGERPRINT, base_fingerprints, read_fingerprint
from salsa_peft.utils.hub import readable_hub_errors

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


logger = logging.getLogger(__name__)
LOADED: WeakSet[Any] = WeakSet()
"""Tokenizers of a recipe: what is odd in them is said when its run begins, not by every trainer."""
POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len")
"""What configurations call the length that a model reads."""


def resolve_dtype(dtype: str) -> torch.dtype:
    """`auto` → bfloat16 on CUDA, float32 on a CPU."""
    if dtype == "auto":
        return torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]


def device() -> torch.device:
    """Where a stage runs: with several processes each has the GPU of its number on this machine."""
    return (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")
    )


def attention(model: Model) -> str | None:
    """Transformers' name of the attention: `auto` → flash_attention_2 on CUDA where flash-attn is installed, else sdpa."""
    if model.attn_implementation != "auto":
        return model.attn_implementation
    there = torch.cuda.is_available() and importlib.util.find_spec("flash_attn") is not None
    return "flash_attention_2" if there else "sdpa"


def quantisation(model: Model, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """nf4 of the linear layers, computed in `dtype`; output embeddings and score heads stay as they are. Raises SalsaError without
    bitsandbytes."""
    if model.quantization is None:
        return None
    require(
        importlib.util.find_spec("bitsandbytes") is not None,
        f"model.quantization: found {model.quantization} and no bitsandbytes, which it runs on; pip install 'salsa-peft[qlora]'",
    )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=model.quantization == "nf4-double",
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=["lm_head", "score"],
    )


def load_tokenizer(
    base: str, revision: str | None = None, chat_template: str | None = None, say: str | None = None
) -> PreTrainedTokenizerBase:
    """The base's tokenizer with its own chat template, or that of the file `chat_template`, made ready for training (data/chat/templates.py),
    and with a padding token that no template writes and that ends no response.

    say: the base's name; what is odd in its tokenizer and template is printed under it. Raises SalsaError for a tokenizer without EOS.
    """
    with readable_hub_errors(base):
        tokenizer = AutoTokenizer.from_pretrained(base, revision=revision, trust_remote_code=False)
    require(
        tokenizer.eos_token is not None, f"{base}: its tokenizer has no eos_token, expected one to end a response with"
    )
    if chat_template not in (None, OWN_TEMPLATE):
        tokenizer.chat_template = Path(str(chat_template)).read_text(encoding="utf-8")
    changes = templates.prepare(tokenizer)
    ends = turn_ends.ends(tokenizer, _generation_config(base, revision))
    tokenizer.pad_token = turn_ends.padding_token(tokenizer, ends)
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    LOADED.add(tokenizer)
    for line in [*changes, *turn_ends.facts(tokenizer, ends)] if say is not None else []:
        print(f"{say}: {line}", file=sys.stderr, flush=True)
    return tokenizer


def _generation_config(base: str, revision: str | None) -> GenerationConfig | None:
    """What a folder's generation_config.json says, or without one its config.json; None where there is neither (an adapter's folder)."""
    for name in ("generation_config.json", "config.json"):
        with readable_hub_errors(base):
            file = cached_file(base, name, revision=revision, _raise_exceptions_for_missing_entries=False)
            if file is not None:
                return GenerationConfig.from_pretrained(Path(file).parent, name)
    return None


def _pretrained(
    auto_class: Callable[[Any], Any], base: str, model: Model, trained: torch.dtype | None, **options: Any
) -> Any:
    """Frozen in the recipe's dtype or 4 bits; `trained`: all weights require a gradient, in that dtype."""
    dtype = trained or resolve_dtype(model.dtype)
    if (
        quantised := quantisation(model, dtype)
    ) is not None:  # None would load a base in 8 bits as if its integers were weights
        options["quantization_config"] = quantised
    with readable_hub_errors(base):
        loaded = auto_class(AutoConfig.from_pretrained(base, trust_remote_code=False)).from_pretrained(
            base,
            dtype=dtype,
            attn_implementation=attention(model),
            device_map={"": device()},
            trust_remote_code=False,
            use_safetensors=True,
            **options,
        )
    if loaded.device.type == "cpu":
        keep_layout(loaded)
    return loaded.requires_grad_(trained is not None)


def keep_layout(model: nn.Module) -> None:
    """bitsandbytes (0.50) packs a layer's 4 bits anew for AVX-512 at its first forward in eval mode, and has no backward for that layout:
    adapters trained after a rollout would get wrong gradients in silence."""
    module: Any
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = False


def load_base(
    base: str, model: Model, tokenizer: PreTrainedTokenizerBase, trained: torch.dtype | None = None
) -> PreTrainedModel:
    """The causal language model of a folder, frozen (`trained`: in that dtype to be trained), without the generation settings (top-p,
    penalties) that it came with; all tokens that end a response are named as EOS."""
    loaded = _pretrained(language_model, base, model, trained)
    if trained is not None:
        train_language(loaded, loaded.get_output_embeddings())
    ends = turn_ends.ends_of(tokenizer, loaded)
    loaded.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=ends[0] if len(ends) == 1 else list(ends),
        pad_token_id=tokenizer.pad_token_id,
    )
    loaded.config.pad_token_id = tokenizer.pad_token_id
    without_router_logits(loaded)
    rows = loaded.get_input_embeddings().weight.shape[0]
    require(
        len(tokenizer) <= rows,
        f"{base}: found a tokenizer of {len(tokenizer)} tokens over {rows} embeddings, expected no more tokens than rows",
    )
    return loaded


def without_router_logits(model: PreTrainedModel) -> None:
    """TRL's SFT switches them on in a mixture's configuration; with them, Transformers' generate fails on padded prompts."""
    text = model.config.get_text_config(decoder=True)
    if "output_router_logits" in text.to_dict():
        text.output_router_logits = False


def load_classifier(
    base: str, model: Model, tokenizer: PreTrainedTokenizerBase, trained: torch.dtype | None = None
) -> PreTrainedModel:
    """A causal model's folder with a linear head on the last token, no bias, drawn from N(0, 1/(H+1)) as Stiennon et al. (2020)."""
    loaded = _pretrained(classifier, base, model, trained, num_labels=1)
    if trained is not None:
        train_language(loaded, loaded.score)
    loaded.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    nn.init.normal_(loaded.score.weight, std=(loaded.score.in_features + 1) ** -0.5)
    if lora.is_quantised(loaded):  # whose states have the quantisation's dtype, not the head's
        loaded.score.register_forward_pre_hook(lambda head, inputs: (inputs[0].to(head.weight.dtype),))
    return loaded


def causal_lm(model: nn.Module) -> Any:
    """The Transformers model inside a PeftModel, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def hidden_states(model: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """The trunk's last hidden states (B, L, H), under the adapter that is active.

    input_ids (B, L), attention_mask (B, L), True or 1 = a real token; padding may stand on either side, since positions
    are counted over real tokens.
    """
    positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    return trunk(causal_lm(model))(
        input_ids=input_ids, attention_mask=attention_mask.long(), position_ids=positions, use_cache=False
    )[0]


def positions(config: Any) -> int | None:
    """Tokens that a model reads at most, as its configuration says; None where it says nothing (ALiBi, state spaces)."""
    said = config.get_text_config(decoder=True).to_dict()
    return next((int(said[name]) for name in POSITIONS if said.get(name)), None)


def head_product(head: nn.Linear, states: torch.Tensor) -> torch.Tensor:
    """States (…, H) → (…,) by a head of one number, in the head's own precision also under autocast."""
    with torch.autocast(states.device.type, enabled=False):
        return head(states.to(head.weight.dtype)).squeeze(-1)


def round_weights(model: nn.Module, dtype: torch.dtype) -> None:
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
    lora.check_finite(held, f"{folder} is not saved")
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
        tensors = lora.read_tensors(file)
        missing = sharding.load(model, tensors, strict=False)
        require(
            not missing.unexpected_keys, f"{file}: found {missing.unexpected_keys[:1]}, expected weights of this model"
        )
        found |= set(tensors)
    shared = set(model.all_tied_weights_keys or {})
    lost = sorted(set(model.state_dict()) - found - shared)
    require(not lost, f"{folder}: found no {', '.join(lost[:2])}, expected all weights of the model")


def language_model(config: PreTrainedConfig) -> Any:
    """The Auto class that opens a base of this configuration with its output embeddings."""
    causal = type(config) in AutoModelForCausalLM._model_mapping
    return AutoModelForCausalLM if causal else AutoModelForImageTextToText


def classifier(config: PreTrainedConfig) -> Any:
    """The class that opens a base of this configuration under a score head."""
    auto = AutoModelForSequenceClassification
    if type(config) in auto._model_mapping:
        return auto
    causal = language_model(config)._model_mapping[type(config)]
    family = next(one for one in causal.__mro__ if PreTrainedModel in one.__bases__)
    name = causal.__name__.partition("For")[0] + "ForSequenceClassification"
    named = {
        "__module__": causal.__module__,
        "base_model_prefix": family.base_model_prefix,
    }  # its tensors' names are the base's
    return type(name, (_Classifier, family), named)


class _Classifier(GenericForSequenceClassification):
    """Transformers' generic one, which passes on its trunk's `attentions`: Mamba's output has none."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        getattr(self, self.base_model_prefix).register_forward_hook(_with_attentions)


def _with_attentions(trunk: nn.Module, inputs: Any, output: Any) -> None:
    if isinstance(output, ModelOutput) and "attentions" not in {field.name for field in dataclasses.fields(output)}:  # type: ignore[arg-type]
        output.attentions = None


def trunk(lm: Any) -> Any:
    """The decoder whose last states the output embeddings read. Llama 4 and Mllama name the language model itself as its decoder."""
    decoder = lm.get_decoder()
    return decoder if decoder.get_output_embeddings() is None else decoder.model


def outside_language(lm: Any) -> list[str]:
    """The linear layers of a language model that its trunk and head do not hold: towers for images, projectors."""
    own = {id(module) for module in trunk(lm).modules()} | {id(lm.get_output_embeddings())}
    return [name for name, module in lm.named_modules() if isinstance(module, nn.Linear) and id(module) not in own]


def train_language(model: Any, head: nn.Module) -> None:
    """Freeze what lies outside the trunk and its head: text gives it no gradient."""
    own = {id(parameter) for part in (trunk(model), head) for parameter in part.parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in own)


def only_language(lm: Any) -> dict[str, str]:
    """LoraConfig's `exclude_modules` that keeps LoRA to the language model of a multimodal one; nothing for others."""
    if not outside_language(lm):
        return {}
    decoder = trunk(lm)
    path = next(name for name, module in lm.named_modules() if module is decoder)
    return {"exclude_modules": rf"(?!{path.replace('.', chr(92) + '.')}\.).*"}


def of_model(model: Any) -> list[str] | None:
    """The fingerprints (of this version and earlier ones) of the base that a model in memory was made of, by the files that its
    name_or_path leads to; None where it leads to none. A folder that was trained from another says which in its own fingerprint.json."""
    name = str(causal_lm(model).name_or_path or "")
    folder = _folder(name)
    if folder is None:
        return None
    written = read_fingerprint(folder)
    if written is not None:
        return [written]
    return base_fingerprints(folder) if any(folder.glob("*.safetensors")) else None


def _folder(name: str) -> Path | None:
    """A folder as it is, or that of a Hub id's files in the Hub's cache."""
    if name and Path(name).is_dir():
        return Path(name)
    if not name or name.startswith((".", "/")):
        return None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None


def check(folder: Path, base: list[str] | None, name: str) -> None:
    """Raise SalsaError where the weights in `folder` are of another base than the one of these fingerprints, which people call `name`;
    what can't be checked is said."""
    found = read_fingerprint(folder)
    if found is None or base is None:
        what = f"{folder}: no {FINGERPRINT}" if found is None else f"{name}: no files at hand to take a fingerprint of"
        used = _folder(name)
        config = None if used is None else config_of(str(used.resolve()), None)
        named = None if config is None else require_same_family(folder, config, name)
        other = "" if named is None or named == name else f"; it names the base {named}, and is used on {name}"
        print(f"{what}, so that its base can't be checked{other}", file=sys.stderr, flush=True)
        return
    require(
        found in base,
        f"{folder}: found weights of another base (fingerprint {found[:12]} …), expected ones of {name} ({base[0][:12]} …)",
    )
