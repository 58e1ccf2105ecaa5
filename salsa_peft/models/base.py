"""Loading a base as language model or classifier, computing hidden states, and freezing parts of it."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import threading
import weakref
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    masking_utils,
)
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.utils import ModelOutput
from transformers.utils.generic import is_flash_attention_requested

from salsa_peft.config.schema import Model
from salsa_peft.data.chat import turn_ends
from salsa_peft.models.architectures.checks import POSITIONS
from salsa_peft.utils.errors import require
from salsa_peft.utils.hub import readable_hub_errors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def resolve_dtype(dtype: str) -> torch.dtype:
    """The torch dtype of a recipe's `dtype`; `auto` is bfloat16 on CUDA and float32 on a CPU."""
    if dtype == "auto":
        return torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]


def device() -> torch.device:
    """The device of this process: the GPU whose number is LOCAL_RANK, or the CPU if there is no GPU."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    return torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")


def attention_implementation(model: Model) -> str | None:
    """The recipe's attn_implementation; for `auto`, flash_attention_2 on CUDA with flash_attn, else sdpa."""
    if model.attn_implementation != "auto":
        return model.attn_implementation
    flash = torch.cuda.is_available() and importlib.util.find_spec("flash_attn") is not None
    return "flash_attention_2" if flash else "sdpa"


def _quantization_config(model: Model, dtype: torch.dtype) -> BitsAndBytesConfig:
    """Settings that quantise linear layers to nf4, except output embeddings and score heads."""
    require(
        importlib.util.find_spec("bitsandbytes") is not None,
        f"model.quantization: {model.quantization} needs bitsandbytes; pip install 'salsa-peft[qlora]'",
    )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=model.quantization == "nf4-double",
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=["lm_head", "score"],
    )


def _load(
    auto_class: Callable[[Any], Any], base: str, model: Model, trained: torch.dtype | None, **options: Any
) -> Any:
    """Load a frozen model in the recipe's dtype or 4 bits; with `trained`, a trainable one in that dtype."""
    dtype = trained or resolve_dtype(model.dtype)
    if model.quantization is not None:
        # not passed as None otherwise, which would override the quantization_config of a quantised base
        options["quantization_config"] = _quantization_config(model, dtype)
    with readable_hub_errors(base):
        loaded = auto_class(AutoConfig.from_pretrained(base, trust_remote_code=False)).from_pretrained(
            base,
            dtype=dtype,
            attn_implementation=attention_implementation(model),
            device_map={"": device()},
            trust_remote_code=False,
            use_safetensors=True,
            **options,
        )
    keep_4bit_layout(loaded)
    return loaded.requires_grad_(trained is not None)


def use_autocast_from_the_start(model: PreTrainedModel) -> None:
    """Under autocast, cast the input embeddings' output to its dtype, and with it the sum of the layers' outputs.

    Otherwise float32 weights under bf16 autocast add the layers' outputs up in float32, but references, and the policy
    itself once it is saved in bf16, in bf16. The KL to a reference of equal weights is then 0.002 per token (exact KL,
    SmolLM2-135M) instead of 0. Gemma, Qwen 3 and GPT-2 round at other places too, so there it is only close to 0.
    """

    def cast(_: nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor:
        kind = output.device.type
        return output.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else output

    model.get_input_embeddings().register_forward_hook(cast)


def keep_4bit_layout(model: nn.Module) -> None:
    """Prevent bitsandbytes from repacking 4-bit layers on a CPU into a layout without a backward.

    bitsandbytes 0.50 repacks a layer for AVX-512 at its first forward in eval mode. Adapters trained after a rollout
    would then get wrong gradients, without an error.
    """
    module: Any
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = False


def load_base(
    base: str, model: Model, tokenizer: PreTrainedTokenizerBase, trained: torch.dtype | None = None
) -> PreTrainedModel:
    """Load a causal language model from a folder, frozen or, with `trained`, trainable in that dtype.

    The model's own generation settings (top-p, penalties) are dropped, and its EOS tokens are set to all tokens that
    end a response. Raises SalsaError if the tokenizer has more tokens than the model has embeddings.
    """
    loaded = _load(causal_lm_class, base, model, trained)
    if trained is not None:
        train_language_model_only(loaded, loaded.get_output_embeddings())
        use_autocast_from_the_start(loaded)
    ends = turn_ends.model_stop_token_ids(tokenizer, loaded)
    loaded.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=ends[0] if len(ends) == 1 else list(ends),
        pad_token_id=tokenizer.pad_token_id,
    )
    loaded.config.pad_token_id = tokenizer.pad_token_id
    disable_router_logits(loaded)
    rows = loaded.get_input_embeddings().weight.shape[0]
    require(
        len(tokenizer) <= rows,
        f"{base}: the tokenizer has {len(tokenizer)} tokens, but the model has only {rows} embeddings; use the model's"
        " own tokenizer",
    )
    return loaded


def disable_router_logits(model: PreTrainedModel) -> None:
    """Unset output_router_logits. TRL's SFT sets it, and generate then fails on padded prompts."""
    text = model.config.get_text_config(decoder=True)
    if "output_router_logits" in text.to_dict():
        text.output_router_logits = False


def load_classifier(
    base: str, model: Model, tokenizer: PreTrainedTokenizerBase, trained: torch.dtype | None = None
) -> PreTrainedModel:
    """Load a causal language model from a folder, with a new linear score head on the last token.

    The head is float32 and has no bias. Its weights are drawn from N(0, 1/(H+1)), as in Stiennon et al. (2020); H is
    the hidden size.
    """
    loaded = _load(classifier_class, base, model, trained, num_labels=1)
    if trained is not None:
        train_language_model_only(loaded, loaded.score)
        use_autocast_from_the_start(loaded)
    loaded.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    use_float32_head(loaded)
    nn.init.normal_(loaded.score.weight, std=(loaded.score.in_features + 1) ** -0.5)
    return loaded


def causal_lm(model: nn.Module) -> Any:
    """The Transformers model inside a PeftModel, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def hidden_states(
    model: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **options: Any
) -> torch.Tensor:
    """The model's last hidden states (B, L, H), with the active adapter.

    input_ids: (B, L). attention_mask: (B, L), True or 1 for a token that is not padding. Padding may be on either side,
    since position ids count only tokens that are not padding. Without attention_mask, padding is on the right only,
    where no other token attends to it. options: further arguments of the model.
    """
    decoder = trunk(causal_lm(model))
    known: AbstractContextManager[None] = contextlib.nullcontext()
    if attention_mask is not None:
        options["position_ids"] = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        options["attention_mask"] = attention_mask.long()
    elif not options or uses_flash_attention(decoder):
        known = _no_search_for_packed_rows()
    with known:
        return decoder(input_ids=input_ids, use_cache=False, **options)[0]


_SEARCH_LOCK = threading.RLock()


@contextlib.contextmanager
def _no_search_for_packed_rows() -> Iterator[None]:
    """Context in which Transformers does not look for packed rows in position ids, for which it waits for the device.

    One thread at a time, so that the function is put back as it was.
    """
    with _SEARCH_LOCK:
        search = masking_utils.find_packed_sequence_indices
        masking_utils.find_packed_sequence_indices = lambda position_ids: None
        try:
            yield
        finally:
            masking_utils.find_packed_sequence_indices = search


def uses_flash_attention(model: Any) -> bool:
    """Whether a Transformers model computes attention with one of the flash-attn packages or kernels."""
    return is_flash_attention_requested(model.config.get_text_config(decoder=True))


def autocast_for_flash_attention(model: Any) -> AbstractContextManager[Any]:
    """Context of bf16 autocast for float32 weights with flash attention, which computes in 16 bits only.

    It is for forwards outside of training and scoring, which have a context of their own.
    """
    needed = uses_flash_attention(model) and model.dtype == torch.float32
    return torch.autocast(model.device.type, torch.bfloat16) if needed else contextlib.nullcontext()


def packed_options(position_ids: torch.Tensor, starts: torch.Tensor, longest: int) -> dict[str, Any]:
    """Arguments of `hidden_states` for rows one after another, as in Transformers' DataCollatorWithFlattening.

    position_ids: (N,), from 0 in each row. starts: where each row starts, and N. longest: length of the longest row.
    """
    bounds = starts.int()
    return {"position_ids": position_ids[None], "cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds,
            "max_length_q": longest, "max_length_k": longest}  # fmt: skip


_KEEPS_ROWS_APART: MutableMapping[nn.Module, bool] = weakref.WeakKeyDictionary()


def packs_rows(model: nn.Module) -> bool:
    """Whether `hidden_states` of several rows is computed with the rows one after another, without padding.

    This needs flash attention on CUDA, and layers without other states than attention's, which would run on into the
    next row. The first call for a model runs it, to see whether its layers keep the rows apart.
    """
    lm = causal_lm(model)
    if not (is_on_gpu(lm) and uses_flash_attention(lm) and has_only_attention(lm)):
        return False
    if lm not in _KEEPS_ROWS_APART:
        _KEEPS_ROWS_APART[lm] = keeps_rows_apart(lm)
    return _KEEPS_ROWS_APART[lm]


def is_on_gpu(lm: Any) -> bool:
    """Whether a model is on a CUDA device."""
    return bool(lm.device.type == "cuda")


@torch.no_grad()
def keeps_rows_apart(lm: Any) -> bool:
    """Whether two rows have the same hidden states one after another as each by itself.

    They differ by far more than rounding if a model does not pass the rows' bounds on to flash attention.
    """
    rows, training = [torch.arange(1, 6, device=lm.device), torch.arange(8, 1, -1, device=lm.device)], lm.training
    positions = torch.cat([torch.arange(len(row), device=lm.device) for row in rows])
    starts = torch.tensor([0, len(rows[0]), len(positions)], device=lm.device)
    lm.eval()
    with autocast_for_flash_attention(lm):
        alone = torch.cat([hidden_states(lm, row[None])[0] for row in rows])
        packed = hidden_states(lm, torch.cat(rows)[None], **packed_options(positions, starts, len(rows[1])))[0]
    lm.train(training)
    return bool((packed - alone).abs().max() <= 0.1 * alone.abs().max())


def has_only_attention(lm: Any) -> bool:
    """Whether a token gets information of earlier tokens through attention only, not recurrence or convolution."""
    types = vars(lm.config.get_text_config(decoder=True)).get("layer_types") or ()
    convolutions = any(isinstance(module, nn.Conv1d) for module in trunk(lm).modules())
    return not (lm._is_stateful or convolutions or set(types) - {"full_attention", "sliding_attention"})


def max_positions(config: Any) -> int | None:
    """Maximum sequence length in a model's configuration; None if the configuration sets no maximum."""
    values = config.get_text_config(decoder=True).to_dict()
    return next((int(values[name]) for name in POSITIONS if values.get(name)), None)


def apply_scalar_head(head: nn.Linear, states: torch.Tensor) -> torch.Tensor:
    """Apply a head with one output, (…, H) → (…,), in the head's own dtype even under autocast."""
    with torch.autocast(states.device.type, enabled=False):
        return head(states.to(head.weight.dtype)).squeeze(-1)


class ScoreHead(nn.Linear):
    """Linear score head of a classifier, which computes in its own dtype, also under autocast.

    It is float32, as in `AdapterReward`, so that training and scoring give the same scores. In bf16 a score of 3 would
    be rounded to a multiple of 1/64.
    """

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Scores (…, labels) from hidden states (…, H)."""
        with torch.autocast(states.device.type, enabled=False):
            return super().forward(states.to(self.weight.dtype))


def use_float32_head(classifier: nn.Module) -> None:
    """Make the module `score` of a classifier, if it is a linear layer, a ScoreHead in float32."""
    head = dict(classifier.named_children()).get("score")
    if type(head) is nn.Linear:
        head.__class__ = ScoreHead
        head.float()


def causal_lm_class(config: PreTrainedConfig) -> Any:
    """The auto class that loads the causal language model of a configuration."""
    causal = type(config) in AutoModelForCausalLM._model_mapping
    return AutoModelForCausalLM if causal else AutoModelForImageTextToText


def classifier_class(config: PreTrainedConfig) -> Any:
    """Class that loads a sequence classifier, with its score head in float32 as it was saved.

    It is a subclass of Transformers' class or, if Transformers has none for the architecture, of its generic one.
    """
    auto = AutoModelForSequenceClassification
    if type(config) in auto._model_mapping:
        own: Any = auto._model_mapping[type(config)]
        return type(own.__name__, (own,), {"__module__": own.__module__, "_keep_in_fp32_modules_strict": {"score"}})
    causal = causal_lm_class(config)._model_mapping[type(config)]
    family = next(one for one in causal.__mro__ if PreTrainedModel in one.__bases__)
    name = causal.__name__.partition("For")[0] + "ForSequenceClassification"
    # with the base's prefix, the classifier's tensors have the same names as in the base
    named = {"__module__": causal.__module__, "base_model_prefix": family.base_model_prefix}
    return type(name, (_Classifier, family), named | {"_keep_in_fp32_modules_strict": {"score"}})


class _Classifier(GenericForSequenceClassification):
    """Transformers' generic classifier, also for decoders whose output has no `attentions`, such as Mamba."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        getattr(self, self.base_model_prefix).register_forward_hook(_with_attentions)


def _with_attentions(_: nn.Module, inputs: Any, output: Any) -> None:
    if isinstance(output, ModelOutput) and "attentions" not in {field.name for field in dataclasses.fields(output)}:  # type: ignore[arg-type]
        output.attentions = None


def trunk(lm: Any) -> Any:
    """The decoder of a causal language model, without its output embeddings."""
    decoder = lm.get_decoder()  # in Llama 4 and Mllama this still includes the output embeddings
    return decoder if decoder.get_output_embeddings() is None else decoder.model


def train_language_model_only(model: Any, head: nn.Module) -> None:
    """Make only the decoder and `head` trainable, and freeze all other parts, such as a vision tower."""
    trained = {id(parameter) for part in (trunk(model), head) for parameter in part.parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trained)


def language_model_only(lm: Any) -> dict[str, str]:
    """LoraConfig options that exclude modules outside the decoder; {} if no linear layer is outside it."""
    decoder = trunk(lm)
    own = {id(module) for module in decoder.modules()} | {id(lm.get_output_embeddings())}
    if all(id(module) in own for module in lm.modules() if isinstance(module, nn.Linear)):
        return {}
    path = next(name for name, module in lm.named_modules() if module is decoder)
    return {"exclude_modules": rf"(?!{path.replace('.', chr(92) + '.')}\.).*"}


def is_quantised(model: nn.Module) -> bool:
    """Whether the model has weights quantised to 8 or 4 bits."""
    return any(not parameter.is_floating_point() for parameter in model.parameters())


def remove_dropout(model: nn.Module) -> None:
    """Set every dropout rate of a model to 0, because PPO's ratio compares two forwards of one network.

    Rates are `p` of nn.Dropout, and modules' float attributes with "drop" in their names, such as attention_dropout.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                vars(module)[name] = 0.0
