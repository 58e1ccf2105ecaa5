"""From what a user passes to SalsaPPOTrainer to a policy, its tokenizer, its references and its reward.

The arguments have the names, the order and the meaning of those of TRL 1.16's GRPOTrainer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import IterableDataset
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.utils.peft_utils import find_adapter_config_file

from salsa_peft.models.adapters import bases, lora
from salsa_peft.models.base import causal_lm, causal_lm_class
from salsa_peft.models.rewards.base import Reward
from salsa_peft.models.rewards.reward import as_reward
from salsa_peft.models.value_head import PolicyWithValueHead
from salsa_peft.soup.attached import AttachedSoup
from salsa_peft.training.ppo.checks import check_model, check_tokenizer
from salsa_peft.training.ppo.config import SalsaPPOConfig
from salsa_peft.training.references import FrozenReference, as_references, freeze
from salsa_peft.utils.console import quiet_libraries
from salsa_peft.utils.errors import require
from salsa_peft.utils.hub import readable_hub_errors
from salsa_peft.utils.messages import short

AnyReference = str | Path | FrozenReference | AttachedSoup | PreTrainedModel
AnyReward = Reward | PreTrainedModel | Callable[..., Any] | str | Path | tuple[Any, ...]
START = "start"
"""Label of the reference that is the policy at the start, and name of its adapter."""
ZERO_DELTA = (True, "gaussian", "eva")
"""Values of init_lora_weights with which a new adapter's delta is 0, because all its factors B are 0."""


class Arguments(NamedTuple):
    """The arguments of SalsaPPOTrainer, checked and loaded."""

    model: PeftModel | PreTrainedModel
    args: SalsaPPOConfig
    tokenizer: PreTrainedTokenizerBase
    references: list[FrozenReference]
    reward: Reward


@quiet_libraries()  # PEFT tries the libraries of quantised layers, and reads a deprecated name of Transformers
def load_arguments(
    model: str | Path | PeftModel | PreTrainedModel,
    reward_funcs: AnyReward | list[AnyReward] | None,
    args: SalsaPPOConfig | None,
    processing_class: PreTrainedTokenizerBase | None,
    reward_processing_classes: Any,
    quantization_config: Any,
    peft_config: PeftConfig | None,
    references: Sequence[AnyReference] | None,
    ref_model: AnyReference | None,
) -> Arguments:
    """Load and check the arguments of SalsaPPOTrainer of these names. Raises SalsaError if they do not fit together."""
    require(
        not isinstance(reward_funcs, SalsaPPOConfig),
        "reward_funcs: this is a SalsaPPOConfig. The order of the arguments is that of TRL's GRPOTrainer: model,"
        " reward_funcs, args, train_dataset. Pass args= and train_dataset= by keyword",
    )
    # a copy, because the trainer sets max_steps in it, and the caller may use the config again
    args = default_config(model) if args is None else copy.copy(args)
    require(
        isinstance(args, SalsaPPOConfig),
        f"args: a {type(args).__name__} has no options of PPO; pass a SalsaPPOConfig, or nothing for the defaults",
    )
    fresh = isinstance(peft_config, LoraConfig) and peft_config.init_lora_weights in ZERO_DELTA
    policy = make_policy(model, args, quantization_config, peft_config)
    check_model(policy)
    tokenizer = load_processing_class(processing_class, policy, args)
    check_tokenizer(tokenizer, policy)
    frozen = make_references(policy, references, ref_model, fresh=fresh)
    require(reward_funcs is not None, "reward_funcs: pass a reward function, a reward model, or a list of them")
    reward = as_reward(
        reward_funcs, policy, tokenizer, weights=args.reward_weights, tokenizers=reward_processing_classes
    )
    return Arguments(policy, args, tokenizer, frozen, reward)


def default_config(model: Any) -> SalsaPPOConfig:
    """The config of a trainer without `args`, with the output folder NAME-PPO, as TRL's trainers have it."""
    name = str(model if isinstance(model, str | Path) else _name_of(model))
    return SalsaPPOConfig(output_dir=f"{name.rstrip('/').rsplit('/', 1)[-1] or 'policy'}-PPO")


def _name_of(model: Any) -> str:
    """The folder or Hub id that a model was loaded from; empty for a model that was built in memory."""
    return str(causal_lm(model).name_or_path or "") if isinstance(model, PreTrainedModel | PeftModel) else ""


def make_policy(
    model: Any, args: SalsaPPOConfig, quantization_config: Any, peft_config: PeftConfig | None
) -> PeftModel | PreTrainedModel:
    """Load the model if it is a name, and add an adapter to it if there is a peft_config.

    Raises SalsaError for options of loading if the model is loaded already, and for a peft_config if the model has
    adapters already.
    """
    if isinstance(model, str | Path) or peft_config is not None:
        set_seed(args.seed)  # PEFT draws the factors A
    if isinstance(model, str | Path):
        model = load_model(str(model), args, quantization_config)
    else:
        for name, given in (
            ("quantization_config", quantization_config),
            ("model_init_kwargs", args.model_init_kwargs),
        ):
            require(
                not given, f"{name}: has no effect on a model that is loaded already; pass the model's name instead"
            )
    if peft_config is None:
        return model  # type: ignore[no-any-return]
    require(
        isinstance(peft_config, PeftConfig),
        f"peft_config: a {type(peft_config).__name__} is no configuration of PEFT; pass peft.LoraConfig(…)",
    )
    require(
        not isinstance(model, PeftModel),
        "peft_config: the model has an adapter already, which would be trained on top of it. Remove peft_config to train"
        " the model's own adapter, or pass the result of the model's merge_and_unload()",
    )
    return get_peft_model(model, peft_config)  # type: ignore[arg-type]


def load_model(name: str, args: SalsaPPOConfig, quantization_config: Any) -> PeftModel | PreTrainedModel:
    """Load a policy from a folder or Hub id: a causal language model, or an adapter on its base.

    args.model_init_kwargs are arguments of `from_pretrained`. The default of its dtype is float32, as in TRL; "auto"
    is float32 too on a CPU without bf16=True, where bfloat16 is slow.
    """
    options: dict[str, Any] = dict(args.model_init_kwargs or {})  # type: ignore[arg-type]
    require(
        not options.pop("trust_remote_code", False),
        "model_init_kwargs: trust_remote_code is not supported, because code of a repository is never run",
    )
    require(
        quantization_config is None or "quantization_config" not in options,
        "quantization_config: is also in model_init_kwargs; pass it once",
    )
    if quantization_config is not None:
        options["quantization_config"] = quantization_config
    dtype = options.pop("dtype", None) or "float32"
    if dtype == "auto" and args.device.type == "cpu" and not args.bf16:  # type: ignore[attr-defined]
        dtype = "float32"
    require(
        isinstance(dtype, torch.dtype) or dtype in ("auto", "float32", "bfloat16", "float16"),
        f"model_init_kwargs: dtype {short(dtype)} is unknown; use auto, float32, bfloat16 or float16",
    )
    options["dtype"] = dtype if isinstance(dtype, torch.dtype) or dtype == "auto" else getattr(torch, dtype)
    revision = options.pop("revision", None)
    with readable_hub_errors(name):
        adapter = find_adapter_config_file(name, revision=revision)
        base = (
            name if adapter is None else PeftConfig.from_pretrained(str(Path(adapter).parent)).base_model_name_or_path
        )
        require(bool(base), f"model: the adapter {name} does not name its base. Load the base, and pass a PeftModel")
        own = {} if adapter is not None or revision is None else {"revision": revision}
        config = AutoConfig.from_pretrained(base, trust_remote_code=False, **own)
        loaded = causal_lm_class(config).from_pretrained(
            base, trust_remote_code=False, use_safetensors=True, **own, **options
        )
        if adapter is None:
            return loaded  # type: ignore[no-any-return]
        folder = lora.adapter_folder(name, revision)
    bases.require_same_base(folder, bases.fingerprints_of(str(base)), str(base))
    model = lora.attach(loaded.requires_grad_(False), folder, "default", trainable=True)
    model.set_adapter("default")
    return model


def load_processing_class(
    given: Any, model: PeftModel | PreTrainedModel, args: SalsaPPOConfig
) -> PreTrainedTokenizerBase:
    """The tokenizer that was given, or that of the model's name. A missing pad_token becomes the EOS, as in TRL."""
    if given is None:
        name = _name_of(model)
        require(bool(name), "processing_class: the model was not loaded from a name; pass its tokenizer")
        revision = dict(args.model_init_kwargs or {}).get("revision")  # type: ignore[arg-type]
        with readable_hub_errors(name):
            given = AutoTokenizer.from_pretrained(
                name, trust_remote_code=False, padding_side="left", truncation_side="left",
                **({} if revision is None else {"revision": revision}),
            )  # fmt: skip
    require(
        isinstance(given, PreTrainedTokenizerBase),
        f"processing_class: a {type(given).__name__} is no tokenizer; pass the model's tokenizer (of a processor, its"
        " attribute `tokenizer`)",
    )
    if given.pad_token is None and given.eos_token is not None:
        given.pad_token = given.eos_token
    return given  # type: ignore[no-any-return]


def make_references(
    model: PeftModel | PreTrainedModel,
    references: Sequence[AnyReference] | None,
    ref_model: AnyReference | None,
    *,
    fresh: bool,
) -> list[FrozenReference]:
    """The references that were given, else the policy at its start.

    fresh: whether the policy is a new adapter whose delta is 0, so that its start is the base.
    """
    require(
        references is None or ref_model is None,
        "ref_model: references are given too; pass one reference as ref_model, or a list as references",
    )
    if ref_model is not None:
        references = [ref_model]
    if references is None:
        return [start_of(model, fresh=fresh)]
    frozen = as_references(model, references)
    policy = str(model.active_adapter) if isinstance(model, PeftModel) else None
    require(
        policy is None or policy not in [reference.adapter for reference in frozen],
        f"references: {policy!r} is the adapter that is trained, so the KL would always be 0. Pass a frozen adapter",
    )
    return frozen


def start_of(model: PeftModel | PreTrainedModel, *, fresh: bool) -> FrozenReference:
    """The policy at its start, frozen: the base under a new adapter, a copy of the adapter, or a copy of the model."""
    if not isinstance(model, PeftModel):
        return freeze(model, copy.deepcopy(model), START)
    if fresh:
        return FrozenReference("base", None)
    name = lora.unused_name(model, START)
    lora.duplicate(model, str(model.active_adapter), name)
    lora.set_trainable(model, name, False)
    return FrozenReference(START, name)


def rows_to_read(dataset: Any, args: SalsaPPOConfig) -> Iterable[Any]:
    """The rows of a training set; of a stream, which may have no end, as many as max_steps needs.

    Raises SalsaError for a stream without max_steps, as TRL does.
    """
    if not isinstance(dataset, IterableDataset):
        return dataset  # type: ignore[no-any-return]
    require(
        args.max_steps > 0,
        "train_dataset: an IterableDataset has no length; set max_steps, or pass list(dataset) to train on all its rows",
    )
    return list(islice(dataset, args.max_steps // args.steps_per_update * args.prompts_per_update))


def one_reward(reward_funcs: Any, reward: Any) -> Any:
    """The reward that was given as `reward_funcs` or as `reward`. Raises SalsaError if both are given."""
    require(
        reward_funcs is None or reward is None or isinstance(reward_funcs, SalsaPPOConfig),  # load_arguments tells it
        "reward: reward_funcs is given too; pass all rewards in one list, as reward_funcs",
    )
    return reward if reward_funcs is None else reward_funcs


def train_value_function(optimizer: torch.optim.Optimizer, policy: PolicyWithValueHead, args: SalsaPPOConfig) -> None:
    """Add the value function's weights, made by the trainer, to the first group of an optimizer that the user passed.

    A new group would lack a learning rate in a scheduler that was passed too. Raises SalsaError if the optimizer has no
    weight that the policy trains.
    """
    require(
        args.value_head_learning_rate is None,
        "value_head_learning_rate: has no effect with an optimizer of your own; set it to None",
    )
    own = {id(weight) for weight in policy.policy_parameters()}
    require(
        any(id(weight) in own for group in optimizer.param_groups for weight in group["params"]),
        "optimizers: the optimizer has none of the weights that the policy trains. Load the model, add its adapter with"
        " get_peft_model, build the optimizer on model.parameters(), and pass this model without peft_config",
    )
    added = [weight for weight in policy.parameters() if weight.requires_grad and id(weight) not in own]
    optimizer.param_groups[0]["params"].extend(added)
