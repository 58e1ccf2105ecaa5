"""Checks of the policy, the tokenizer and the sharding, made when SalsaPPOTrainer is created.

Policy, references, reward and value function may be adapters on one base. Weights that the policy trains outside its
LoRA factors (base weights, modules_to_save, biases, tokens) would change the other roles, so they are not supported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DistributedType
from peft import PeftModel, PeftType
from peft.utils.other import AuxiliaryTrainingWrapper
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import PreTrainedModel

from salsa_peft.config.schema import PPO
from salsa_peft.data.chat.turn_ends import model_stop_token_ids, tokenizer_notes
from salsa_peft.models.adapters import lora
from salsa_peft.models.base import autocast_for_flash_attention, causal_lm, keep_4bit_layout
from salsa_peft.models.logprobs import check_head, head_of
from salsa_peft.models.precision import require_float32, uses_autocast
from salsa_peft.models.tokenizers import PREPARED_TOKENIZERS
from salsa_peft.utils.console import say
from salsa_peft.utils.errors import require

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedTokenizerBase, TrainingArguments

    from salsa_peft.training.ppo.config import SalsaPPOConfig


NOISE = ("drop", "jitter", "noise")
"""Parts of the names of model options that add dropout or noise in training mode."""


def check_model(model: Any) -> None:
    """Raise SalsaError if the model that the user passes cannot be a policy. See also `check_trained`."""
    require(
        isinstance(model, PeftModel | PreTrainedModel),
        f"model: a {type(model).__name__} cannot be a policy. Pass a PeftModel whose active adapter is the policy,"
        " or a PreTrainedModel",
    )
    keep_4bit_layout(model)  # before the model runs
    check_layout(model)
    if isinstance(model, PeftModel):
        check_adapters(model)
    check_head(model)


def check_layout(model: PeftModel | PreTrainedModel) -> None:
    """Raise SalsaError for a quantised policy without adapter, and for 4-bit layers packed for inference."""
    quantised = [name for name, weight in model.named_parameters() if not weight.is_floating_point()]
    require(
        isinstance(model, PeftModel) or not quantised,
        f"model: {', '.join(quantised[:1])} is quantised and cannot be trained. Use float weights, or add an adapter",
    )
    layers = [(name, module) for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"]
    packed = [name for name, layer in layers if vars(layer.weight.quant_state).get("packing_format_for_cpu")]
    require(
        not packed,
        f"model: bitsandbytes has packed {', '.join(packed[:1])} for inference, so it has no backward pass. Load the"
        " model again, and create the trainer before the model generates",
    )


def check_adapters(model: PeftModel) -> None:
    """Raise SalsaError unless all adapters are LoRA on an unchanged base and only the policy's is active."""
    for name, config in model.peft_config.items():
        kind, bias = PeftType(config.peft_type), vars(config).get("bias", "none")
        require(kind == PeftType.LORA, f"model: adapter {name!r} has peft_type {kind.value}; only LoRA is supported")
        lora.require_base_unchanged(config, f"model, adapter {name!r}")  # type: ignore[arg-type]
        require(
            bias == "none",
            f"model: adapter {name!r} has bias {bias!r}, which would train biases that all roles share; use 'none'",
        )
    wrapped = [name for name, module in model.named_modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    require(
        not wrapped,
        f"model: {', '.join(wrapped[:1])} is in modules_to_save or trainable_token_indices, which references would"
        " share. Train LoRA factors only",
    )
    name, layers = str(model.active_adapter), lora.tuner_layers(model)
    disabled = any(layer.disable_adapters for layer in layers)
    require(not disabled, f"model: adapter {name!r} is disabled. Call model.base_model.enable_adapter_layers()")
    active = sorted({other for layer in layers for other in layer.active_adapters})
    require(active == [name], f"model: the active adapters are {active}. Call model.set_adapter({name!r})")
    merged = any(layer.merged for layer in layers)
    require(not merged, "model: an adapter is merged into the base. Call model.unmerge_adapter()")


def check_trained(
    model: PeftModel | PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: TrainingArguments
) -> None:
    """Raise SalsaError unless the trained weights are LoRA factors or full weights, in a supported dtype.

    Also raised if noise is left. Call this after all adapters are attached and dropout is removed.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    require(bool(trained), "model: no weight requires a gradient, so nothing would train. Call model.requires_grad_()")
    if isinstance(model, PeftModel):
        factors = {id(parameter) for name in model.peft_config for parameter in lora.parameters(model, name)}
        outside = [name for name, parameter in trained.items() if id(parameter) not in factors]
        require(
            not outside,
            f"model: {', '.join(outside[:1])} of the base is trainable, but references share it. Call"
            " requires_grad_(False) on it",
        )
    require_float32(model, args)
    check_autocast(model, args)
    check_learning_rate(model, args)
    head_of(causal_lm(model), 1.0, model_stop_token_ids(tokenizer, causal_lm(model)))
    check_noise(model)


def check_autocast(model: PeftModel | PreTrainedModel, args: TrainingArguments) -> None:
    """Raise SalsaError for bf16 autocast over a base in fp16. Print a line about a base in bf16 without autocast.

    On a CPU such a base is slow; elsewhere the line is about float32 adapters on it.
    """
    base = causal_lm(model).dtype
    require(
        not (args.bf16 and base == torch.float16),
        "bf16: True does not fit a base in float16. Load the base with dtype=torch.bfloat16, or set bf16=False",
    )
    if args.bf16 or args.process_index > 0:
        return
    if base == torch.bfloat16 and args.device.type == "cpu":  # type: ignore[attr-defined]
        say(
            "model: its weights are in bfloat16, which is slow on a CPU without autocast. Load it with"
            " dtype=torch.float32, or set bf16=True"
        )
    elif uses_autocast(base, float32_weights=isinstance(model, PeftModel)):
        say(
            "bf16: False, so the products of the float32 adapters with the hidden states of the bfloat16 base are"
            " computed in float32. Set bf16=True to train, score and evaluate under bf16 autocast, as `salsa run` does"
        )


def check_learning_rate(model: PeftModel | PreTrainedModel, args: TrainingArguments) -> None:
    """Print a line if an adapter is trained at the default learning rate, which is one of full weights."""
    if isinstance(model, PeftModel) and args.learning_rate == PPO.learning_rate and args.process_index == 0:
        say(
            f"learning_rate: {args.learning_rate:g} is the default, which is for full weights (the paper's). LoRA adapters"
            " need about ten times as much: set learning_rate=2e-5, the rate of `salsa run --lora`"
        )


def check_noise(model: PeftModel | PreTrainedModel) -> None:
    """Raise SalsaError if the logits differ between training and evaluation mode.

    The model then has dropout or noise that is not a module and so was not removed (Falcon, Mixtral).
    """
    lm = causal_lm(model)
    probe, training, logits = torch.tensor([[1, 2, 3]], device=lm.device), lm.training, []
    devices = [lm.device] if lm.device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices), autocast_for_flash_attention(lm):
        for mode in (False, True):
            lm.train(mode)
            logits.append(lm(input_ids=probe, use_cache=False).logits.float())
    lm.train(training)
    error, scale = (logits[0] - logits[1]).abs().max().item(), max(1.0, logits[0].abs().max().item())
    options = lm.config.get_text_config(decoder=True).to_dict().items()
    rates = [f"{k} {v}" for k, v in options if isinstance(v, float) and v and any(part in k for part in NOISE)]
    require(
        error <= 1e-2 * scale,
        f"{lm.config.model_type}: the logits in training and evaluation mode differ by {error:.3g} (config:"
        f" {', '.join(rates) or 'no dropout or noise'}). PPO compares a network with itself, so dropout and noise must"
        " be off. Set these options of the config to 0 and load the model again",
    )


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, model: PeftModel | PreTrainedModel) -> None:
    """Raise SalsaError if the EOS or padding token has no embedding; print notes on the tokenizer."""
    lm = causal_lm(model)
    rows = lm.get_input_embeddings().weight.shape[0]
    for name, token, number, remedy in (
        ("eos_token", tokenizer.eos_token, tokenizer.eos_token_id, "Set it to the token that ends a response"),
        ("pad_token", tokenizer.pad_token, tokenizer.pad_token_id, "Set tokenizer.pad_token = tokenizer.eos_token"),
    ):
        require(number is not None, f"processing_class: the tokenizer has no {name}. {remedy}")
        require(
            int(number) < rows,
            f"processing_class: {name} {token!r} has id {number}, but the model has only {rows} embeddings. Call"
            " model.resize_token_embeddings(len(tokenizer)), or set another token",
        )
    if tokenizer not in PREPARED_TOKENIZERS:
        for line in tokenizer_notes(tokenizer, model_stop_token_ids(tokenizer, lm)):
            say(f"processing_class: {line}")


USE_CONFIG = "use recipes/accelerate/ddp.yaml, or fsdp2.yaml or zero3.yaml for a model that is too large for one GPU"


def check_sharding(accelerator: Accelerator, args: SalsaPPOConfig) -> None:
    """Raise SalsaError for unsupported sharding options. Makes FSDP2 and ZeRO-3 sum gradients in float32."""
    kind = accelerator.distributed_type
    if kind not in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        return
    require(
        args.rollout_backend == "hf" and not args.rollout_compile,
        f"rollout_backend: {args.rollout_backend}{', compiled,' if args.rollout_compile else ''} does not work with"
        " sharded weights. Use hf without rollout_compile",
    )
    require(
        args.micro_batch_tokens is None,
        f"micro_batch_tokens: {args.micro_batch_tokens} does not work with sharded weights, because all processes must"
        " make the same number of forward passes. Set micro_batch_size instead",
    )
    require(
        not args.value_warmup_updates,
        f"value_warmup_updates: {args.value_warmup_updates} does not work with sharded weights, whose optimizer has no"
        " frozen part. Set it to 0",
    )
    if kind == DistributedType.FSDP:
        _check_fsdp(accelerator.state.fsdp_plugin)
    else:
        _check_deepspeed(accelerator.state.deepspeed_plugin)


def _check_fsdp(plugin: Any) -> None:
    require(plugin.fsdp_version == 2, f"fsdp_version: {plugin.fsdp_version} is not supported, only 2; {USE_CONFIG}")
    kind = plugin.state_dict_type.name
    require(kind == "FULL_STATE_DICT", f"fsdp_state_dict_type: {kind} is not supported; set FULL_STATE_DICT")
    for key in ("cpu_ram_efficient_loading", "activation_checkpointing"):
        instead = ", and gradient_checkpointing=True in SalsaPPOConfig" if key == "activation_checkpointing" else ""
        require(not vars(plugin)[key], f"fsdp_{key}: true is not supported; set it to false{instead}")
    if plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=plugin.mixed_precision_policy.param_dtype, reduce_dtype=torch.float32
        )


def _check_deepspeed(plugin: Any) -> None:
    require(plugin.zero_stage == 3, f"zero_stage: {plugin.zero_stage} is not supported, only 3; {USE_CONFIG}")
    require(plugin.zero3_save_16bit_model, "zero3_save_16bit_model: false is not supported; set it to true")
    for key in ("offload_optimizer_device", "offload_param_device"):
        require(vars(plugin)[key] == "none", f"{key}: {vars(plugin)[key]} is not supported; set it to none")
    config = plugin.deepspeed_config
    require(not config["fp16"]["enabled"], "fp16: true is not supported with DeepSpeed; use bf16, or neither")
    for key in ("optimizer", "scheduler"):
        require(key not in config, f"{key}: remove it from DeepSpeed's configuration; SalsaPPOConfig sets it")
    config["communication_data_type"] = "fp32"
    config["data_types"] = {"grad_accum_dtype": "fp32"}
