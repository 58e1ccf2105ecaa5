"""vLLM with the base from its files and the policy's adapter."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import BitsAndBytesConfig

from salsa_peft.config.options.rollout import MAX_RANKS
from salsa_peft.models.adapters import lora
from salsa_peft.models.base import causal_lm, is_quantised
from salsa_peft.training.ppo.engines.engine import Answers, Engine, sampled_logprobs
from salsa_peft.utils.errors import require

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedTokenizerBase


READ_BY_VLLM = {
    "r", "lora_alpha", "use_rslora", "init_lora_weights", "target_modules", "exclude_modules", "layers_to_transform",
    "layers_pattern", "lora_dropout", "fan_in_fan_out", "eva_config", "runtime_config", "inference_mode", "peft_type",
    "task_type", "base_model_name_or_path", "revision", "auto_mapping", "peft_version", "ensure_weight_tying",
}  # fmt: skip
"""Options of PEFT's LoraConfig that may have any value: vLLM reads them, or they do not change what an adapter computes
in evaluation mode. vLLM ignores or refuses the others, such as rank_pattern, use_dora and modules_to_save."""


class AdapterEngine(Engine):
    """vLLM in this process with the base from its files, to which each sync adds the policy's adapter (LoRARequest).

    TRL has no such engine. The adapter is saved in a temporary folder. Each sync gives it a new id and name, by which
    vLLM keeps adapters and prefixes. The base in memory must be the one in its folder or on the Hub.
    """

    sleep_level = 1  # vLLM's copy of the base is never sent again

    def __init__(self, model: Any, policy: str | None, accelerator: Accelerator, tokenizer: PreTrainedTokenizerBase,
                 sampling: Mapping[str, Any], options: Mapping[str, Any]) -> None:  # fmt: skip
        require_loadable(model, policy)
        from trl.trainer.utils import ensure_master_addr_port
        from vllm import LLM, SamplingParams

        own = {"generation_kwargs", "max_completion_length"}
        self.sampling = SamplingParams(
            n=1, max_tokens=sampling["max_completion_length"], **sampling["generation_kwargs"],
            **{name: value for name, value in sampling.items() if name not in own},
        )  # fmt: skip
        self.model, self.policy, self.syncs = model, str(policy), 0
        self.folder = tempfile.TemporaryDirectory(prefix="salsa-adapter-")
        self.request: Any = None
        rank, base = model.peft_config[policy].r, causal_lm(model)
        # as TRL starts it: each process has an engine of its own
        os.environ["RANK"], os.environ["WORLD_SIZE"] = str(accelerator.process_index), str(accelerator.num_processes)
        os.environ["LOCAL_RANK"] = str(accelerator.local_process_index)
        ensure_master_addr_port()
        renamed = {"max_model_length": "max_model_len"}
        self.llm = LLM(
            model=base.name_or_path, enable_lora=True, max_lora_rank=next(most for most in MAX_RANKS if rank <= most),
            distributed_executor_backend="external_launcher", seed=accelerator.process_index,
            max_num_batched_tokens=4096, logprobs_mode="processed_logprobs",
            quantization=quantization(base),
            **{renamed.get(name, name): value for name, value in options.items() if name != "mode"},
        )  # fmt: skip
        if options["enable_sleep_mode"]:
            self.llm.sleep(level=self.sleep_level)
        accelerator.wait_for_everyone()

    def sync(self) -> None:
        """Save the adapter under a new id, which the next requests name."""
        from vllm.lora.request import LoRARequest

        lora.save(self.model, self.policy, Path(self.folder.name))
        self.syncs += 1
        self.request = LoRARequest(f"{self.policy}-{self.syncs}", self.syncs, self.folder.name)

    def generate(self, prompts: list[list[int]]) -> Answers:
        """Sample a response to each prompt."""
        from trl.generation.vllm_generation import extract_logprobs

        given = [{"prompt_token_ids": ids} for ids in prompts]
        outputs = self.llm.generate(given, sampling_params=self.sampling, lora_request=self.request, use_tqdm=False)
        answers = [list(output.token_ids) for result in outputs for output in result.outputs]
        return answers, sampled_logprobs(answers, *extract_logprobs(outputs))


def quantization(base: Any) -> str | None:
    """vLLM's name of the base's quantisation. Raises SalsaError unless it is 4-bit by bitsandbytes, or none."""
    if not is_quantised(base):
        return None
    config = vars(base.config).get("quantization_config")
    require(
        isinstance(config, BitsAndBytesConfig) and config.load_in_4bit,
        "rollout_options.sync: adapter works with an unquantised base or one in 4 bits by bitsandbytes, which vLLM"
        " quantises in the same way. Load the base so, or use rollout_backend hf",
    )
    return "bitsandbytes"


def require_loadable(model: Any, policy: str | None) -> None:
    """Raise SalsaError for a policy that vLLM cannot load as a LoRA adapter on the base from its files."""
    use = "Set rollout_options.sync to merged"
    require(
        isinstance(model, PeftModel) and policy is not None and isinstance(model.peft_config[policy], LoraConfig),
        f"rollout_options.sync: adapter needs a policy that is a LoRA adapter. {use}",
    )
    config, plain = model.peft_config[policy], LoraConfig()
    require(
        config.r <= MAX_RANKS[-1],
        f"rollout_options.sync: adapter works up to rank {MAX_RANKS[-1]}, not {config.r}, because of vLLM. {use}",
    )
    names = [field.name for field in dataclasses.fields(LoraConfig) if field.name not in READ_BY_VLLM]
    others = [name for name in names if vars(config)[name] != vars(plain)[name]]
    require(
        not others,
        f"rollout_options.sync: adapter does not work with the policy's {', '.join(others)}, because vLLM ignores or"
        f" refuses this. {use}",
    )
    ends = (causal_lm(model).get_input_embeddings(), causal_lm(model).get_output_embeddings())
    require(
        not any(isinstance(one, BaseTunerLayer) and policy in one._get_available_adapters() for one in ends),
        "rollout_options.sync: adapter does not work with an adapter on the input or output embeddings, which vLLM"
        f" supports in some versions only. {use}",
    )
    initial = config.init_lora_weights
    require(
        not isinstance(initial, str) or initial in lora.KEEPS_BASE,
        f"rollout_options.sync: adapter does not work with init_lora_weights {initial}, which changes the base, because"
        f" vLLM loads the base from its files. {use}",
    )
