"""Keys of `rollout_options` for each `rollout_backend`."""

from collections.abc import Mapping
from typing import Any

from salsa_peft.utils.errors import require
from salsa_peft.utils.messages import short

BACKEND_OPTIONS: dict[str, tuple[str, ...]] = {
    "hf": (),
    "paged": (
        "page_size", "num_blocks", "max_batch_tokens", "max_requests_per_batch", "auto_switch_to_flash", "use_cuda_graph",
        "use_async_batching", "default_compile_level",
    ),
    "vllm": (
        "sync", "mode", "server_base_url", "server_timeout", "group_port", "gpu_memory_utilization", "max_model_length",
        "max_num_seqs", "enable_sleep_mode", "model_impl",
    ),
}  # fmt: skip
"""Rollout backend → its options: fields of Transformers' ContinuousBatchingConfig (paged); arguments of TRL's
VLLMGeneration and `sync` (vllm). tensor_parallel_size is left out: TRL would split the responses into equal shares,
which may be impossible for their number.

sync: how vLLM gets the policy's weights. merged (default): all weights, with the adapter merged in copies. adapter: the
adapter alone, as a LoRA request; mode colocate only. enable_sleep_mode: free vLLM's GPU memory while the policy is
trained; true by default in mode colocate."""
VLLM_CHOICES = {"sync": ("merged", "adapter"), "mode": ("colocate", "server")}
"""Options of vllm → their values, the default first."""
MAX_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM can reserve memory for (its max_lora_rank)."""
COLOCATED = ("gpu_memory_utilization", "max_num_seqs", "enable_sleep_mode", "model_impl")
"""Options of vllm that a server would ignore."""


def check_rollout_options(prefix: str, backend: str, options: Mapping[str, Any]) -> None:
    """Raise SalsaError for an option that the backend lacks."""
    unknown = ", ".join(sorted(set(options) - set(BACKEND_OPTIONS[backend])))
    known = ", ".join(BACKEND_OPTIONS[backend])
    require(
        not unknown,
        f"{prefix}rollout_options: rollout_backend {backend} has no option {unknown}"
        + (f"; its options are {known}" if known else "; it takes no options"),
    )
    for key, choices in VLLM_CHOICES.items():
        found = options.get(key, choices[0])
        require(found in choices, f"{prefix}rollout_options.{key}: must be {' or '.join(choices)}, not {short(found)}")
    server = options.get("mode") == "server"
    ignored = ", ".join(sorted(set(options) & set(COLOCATED))) if server else ""
    require(
        not ignored,
        f"{prefix}rollout_options: a server does not read {ignored}; remove it here and set it when vLLM is started",
    )
    require(
        not server or options.get("sync") != "adapter",
        f"{prefix}rollout_options.sync: adapter works in mode colocate only; use merged, or mode colocate",
    )
    require(
        not server or bool(options.get("server_base_url")),
        f"{prefix}rollout_options.server_base_url: is required with mode server; give the address of `vllm serve`, such as"
        " http://localhost:8000",
    )


def check_sampling(
    backend: str, options: Mapping[str, Any], *, temperature: float, min_new_tokens: int, processes: int
) -> None:
    """Raise SalsaError for settings of a recipe that a backend does not support."""
    require(
        backend != "paged" or min_new_tokens == 0,
        f"generation.min_new_tokens: {min_new_tokens} does not work with ppo.rollout_backend paged, which ignores"
        " it; set it to 0, or use hf or vllm",
    )
    require(
        backend != "vllm" or 0.01 <= temperature <= 2,
        f"generation.temperature: {temperature:g} does not work with ppo.rollout_backend vllm, which needs 0.01 to"
        " 2; change it, or use hf",
    )
    require(
        options.get("mode") != "server" or processes == 1,
        f"ppo.rollout_options.mode: server works with one process only, not with {processes}; use colocate",
    )
