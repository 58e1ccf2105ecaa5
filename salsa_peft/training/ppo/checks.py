"""What a policy may be: refused before the first rollout, in one line, where it would train or be scored wrongly in silence.

All roles share the policy's base, and a switch of adapters is all that tells them apart: so whatever of a policy lies outside its
LoRA factors (unfrozen base weights, modules_to_save, biases, tokens) would leak into references, reward and values. Left out: their support.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DistributedType
from peft import PeftModel, PeftType
from peft.utils.other import AuxiliaryTrainingWrapper
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import PreTrainedModel

from salsa_peft.data.chat.turn_ends import model_stop_token_ids, tokenizer_notes
from salsa_peft.models.adapters import lora
from salsa_peft.models.base import causal_lm, keep_4bit_layout
from salsa_peft.models.logprobs import check_head, head_of
from salsa_peft.models.precision import OPTIMIZER, ROUNDING, rounds_stochastically
from salsa_peft.models.tokenizers import PREPARED_TOKENIZERS
from salsa_peft.utils.errors import SalsaError, require

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedTokenizerBase, TrainingArguments

    from salsa_peft.training.ppo.config import SalsaPPOConfig


NOISE = ("drop", "jitter", "noise")
"""Parts of the names that configurations give to what is random in training mode."""


def check_model(model: Any) -> None:
    """Raise SalsaError unless the model, as the user passes it, can be a policy: its kind, and for adapters PEFT's state.

    What is attached to it later is for `check_trained`.
    """
    require(
        isinstance(model, PeftModel | PreTrainedModel),
        f"model: found {type(model).__name__}, expected a PeftModel with the policy active, or a PreTrainedModel",
    )
    keep_4bit_layout(model)  # before anything runs
    check_layout(model)
    if isinstance(model, PeftModel):
        check_adapters(model)
    check_head(model)


def check_layout(model: PeftModel | PreTrainedModel) -> None:
    """Raise SalsaError for quantised weights without an adapter; and for 4-bit layers that have run on a CPU in eval mode, where
    bitsandbytes packs them for a product without a backward."""
    quantised = [name for name, weight in model.named_parameters() if not weight.is_floating_point()]
    require(
        isinstance(model, PeftModel) or not quantised,
        f"model: found {', '.join(quantised[:1])} quantised, which does not train, expected float weights, or an adapter over them",
    )
    layers = [(name, module) for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"]
    packed = [name for name, layer in layers if vars(layer.weight.quant_state).get("packing_format_for_cpu")]
    require(
        not packed,
        f"model: found {', '.join(packed[:1])} packed for inference by bitsandbytes, which has no backward for that; load the model again,"
        " and make the trainer before it generates",
    )


def check_adapters(model: PeftModel) -> None:
    """Raise SalsaError unless every adapter is LoRA on a base that stays as it is, and the policy alone is active, not merged."""
    for name, config in model.peft_config.items():
        kind = config.peft_type
        if kind != PeftType.LORA:
            raise SalsaError(f"model: found adapter {name!r} of kind {PeftType(kind).value}, expected LoRA")
        lora.require_base_unchanged(config, f"model, adapter {name!r}")  # type: ignore[arg-type]
        bias = config.bias  # type: ignore[attr-defined]
        require(
            bias == "none",
            f"model: found adapter {name!r} with bias {bias!r}, expected 'none': the base's biases would be trained under all roles",
        )
    wrapped = [name for name, module in model.named_modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    require(
        not wrapped,
        f"model: found {', '.join(wrapped[:1])} in modules_to_save or trainable_token_indices, expected LoRA factors only: references"
        " share the base, and would see it",
    )
    name, layers = str(model.active_adapter), lora.tuner_layers(model)
    require(
        not any(layer.disable_adapters for layer in layers),
        f"model: found adapter {name!r} disabled, expected it active; model.base_model.enable_adapter_layers()",
    )
    active = sorted({other for layer in layers for other in layer.active_adapters})
    require(active == [name], f"model: found the active adapters {active}, expected {name!r} alone; model.set_adapter")
    require(
        not any(layer.merged for layer in layers),
        "model: found an adapter that is merged into the base, expected it beside it; model.unmerge_adapter()",
    )


def check_trained(
    model: PeftModel | PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: TrainingArguments
) -> None:
    """Raise SalsaError unless what trains is right: LoRA factors alone or full weights, that move, one network in both modes.

    To be called when all adapters are attached and dropout is off.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    require(
        bool(trained), "model: found no weight that requires a gradient, expected a policy to train; requires_grad_()"
    )
    if isinstance(model, PeftModel):
        factors = {id(parameter) for name in model.peft_config for parameter in lora.parameters(model, name)}
        outside = [name for name, parameter in trained.items() if id(parameter) not in factors]
        require(
            not outside,
            f"model: found {', '.join(outside[:1])} trainable, expected a frozen base under the adapter: references share it;"
            " requires_grad_(False)",
        )
    check_precision(trained, args)
    head_of(causal_lm(model), 1.0, model_stop_token_ids(tokenizer, causal_lm(model)))
    check_noise(model)


def check_precision(trained: dict[str, torch.nn.Parameter], args: TrainingArguments) -> None:
    """Raise SalsaError for trained weights in fp16, and in bf16 unless the optimizer rounds at random: PPO's steps are smaller than these
    can hold (models/precision.py)."""
    held = {torch.float32, torch.bfloat16} if rounds_stochastically(args) else {torch.float32}
    rounded = [(name, parameter.dtype) for name, parameter in trained.items() if parameter.dtype not in held]
    if rounded:
        name, dtype = rounded[0]
        remedy = f"bf16 weights, optim='{OPTIMIZER}', optim_args='{ROUNDING}=True' (torchao)"
        raise SalsaError(
            f"model: found {name} in {str(dtype).removeprefix('torch.')}, expected trained weights in float32: small steps would be"
            " rounded away; load with dtype=torch.float32 and set bf16=True, or train float32 adapters over a bf16 base, or take an"
            f" optimizer that rounds at random: {remedy}"
        )


def check_noise(model: PeftModel | PreTrainedModel) -> None:
    """Raise SalsaError where training mode gives other logits than eval mode: dropout or noise that is no module (Falcon, Mixtral)."""
    lm = causal_lm(model)
    probe, training, logits = torch.tensor([[1, 2, 3]], device=lm.device), lm.training, []
    with torch.no_grad(), torch.random.fork_rng([lm.device] if lm.device.type == "cuda" else []):
        for mode in (False, True):
            lm.train(mode)
            logits.append(lm(input_ids=probe, use_cache=False).logits.float())
    lm.train(training)
    error, scale = (logits[0] - logits[1]).abs().max().item(), max(1.0, logits[0].abs().max().item())
    said = lm.config.get_text_config(decoder=True).to_dict().items()
    rates = [
        f"{name} {value}"
        for name, value in said
        if isinstance(value, float) and value and any(part in name for part in NOISE)
    ]
    require(
        error <= 1e-2 * scale,
        f"{lm.config.model_type}: found logits that are others in training mode (by {error:.3g}; config: {', '.join(rates) or 'no rate'}),"
        " expected no dropout and no noise, since PPO compares a network with itself; set these to 0 and load the model again",
    )


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, model: PeftModel | PreTrainedModel) -> None:
    """Raise SalsaError for a tokenizer without EOS or padding token, or with one that has no embedding; say what is odd in it."""
    lm = causal_lm(model)
    rows = lm.get_input_embeddings().weight.shape[0]
    for name, token, number, remedy in (
        ("eos_token", tokenizer.eos_token, tokenizer.eos_token_id, "set the one that ends a response"),
        ("pad_token", tokenizer.pad_token, tokenizer.pad_token_id, "set tokenizer.pad_token = tokenizer.eos_token, which does no harm here"),
    ):  # fmt: skip
        require(number is not None, f"processing_class: found no {name}, expected one; {remedy}")
        require(
            int(number) < rows,
            f"processing_class: found {name} {token!r} ({number}) over {rows} embeddings, expected one of them;"
            " model.resize_token_embeddings(len(tokenizer)), or take another",
        )
    for line in (
        tokenizer_notes(tokenizer, model_stop_token_ids(tokenizer, lm)) if tokenizer not in PREPARED_TOKENIZERS else []
    ):
        print(f"processing_class: {line}", file=sys.stderr, flush=True)


USE_CONFIG = "use recipes/accelerate/ddp.yaml, or fsdp2.yaml or zero3.yaml where the model is too large for one GPU"


def check_sharding(accelerator: Accelerator, args: SalsaPPOConfig) -> None:
    """Raise SalsaError for a way of sharding that the engine does not run under. FSDP2 and ZeRO-3 then add up gradients in float32,
    also with bf16, where accelerate has them in bf16."""
    kind = accelerator.distributed_type
    if kind not in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        return
    require(
        args.rollout_backend == "hf" and not args.rollout_compile,
        f"rollout_backend: found {args.rollout_backend}{', compiled,' if args.rollout_compile else ''} with sharded weights,"
        " expected hf, not compiled",
    )
    if kind == DistributedType.FSDP:
        _check_fsdp(accelerator.state.fsdp_plugin)
    else:
        _check_deepspeed(accelerator.state.deepspeed_plugin)


def _check_fsdp(plugin: Any) -> None:
    require(plugin.fsdp_version == 2, f"fsdp_version: found {plugin.fsdp_version}, expected 2; {USE_CONFIG}")
    whole = plugin.state_dict_type.name
    require(
        whole == "FULL_STATE_DICT",
        f"fsdp_state_dict_type: found {whole}, expected FULL_STATE_DICT, which a checkpoint is saved from",
    )
    for key in ("cpu_ram_efficient_loading", "activation_checkpointing"):
        instead = " (set gradient_checkpointing in SalsaPPOConfig)" if key == "activation_checkpointing" else ""
        require(not vars(plugin)[key], f"fsdp_{key}: found true, expected false{instead}")
    if plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=plugin.mixed_precision_policy.param_dtype, reduce_dtype=torch.float32
        )


def _check_deepspeed(plugin: Any) -> None:
    require(plugin.zero_stage == 3, f"zero_stage: found {plugin.zero_stage}, expected 3; {USE_CONFIG}")
    require(
        plugin.zero3_save_16bit_model,
        "zero3_save_16bit_model: found false, expected true, which a checkpoint is saved with",
    )
    for key in ("offload_optimizer_device", "offload_param_device"):
        found = vars(plugin)[key]
        require(found == "none", f"{key}: found {found}, expected none")
    config = plugin.deepspeed_config
    require(not config["fp16"]["enabled"], "fp16: found true with DeepSpeed, expected bf16 or neither")
    for key in ("optimizer", "scheduler"):
        require(key not in config, f"{key}: found one in DeepSpeed's configuration, expected SalsaPPOConfig's alone")
    config["communication_data_type"] = "fp32"
    config["data_types"] = {"grad_accum_dtype": "fp32"}
