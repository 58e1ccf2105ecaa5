"""Keys of `rollout_options` for each `rollout_backend`."""

from collections.abc import Mapping
from typing import Any

from salsa_peft.utils.errors import require

BACKEND_OPTIONS: dict[str, tuple[str, ...]] = {
    "hf": (),
    "paged": (
        "page_size", "num_blocks", "max_batch_tokens", "max_requests_per_batch", "auto_switch_to_flash", "use_cuda_graph",
        "use_async_batching", "default_compile_level",
    ),
    "vllm": (
        "mode", "server_base_url", "server_timeout", "group_port", "gpu_memory_utilization", "max_model_length", "max_num_seqs",
        "enable_sleep_mode", "model_impl",
    ),
}  # fmt: skip
"""Rollout backend → its options: fields of Transformers' ContinuousBatchingConfig (paged) and arguments of TRL's
VLLMGeneration (vllm). tensor_parallel_size is left out: TRL would split the responses into equal shares, which may be
impossible for their number."""


def check_rollout_options(prefix: str, backend: str, options: Mapping[str, Any]) -> None:
    """Raise SalsaError for an option that the backend lacks."""
    unknown = ", ".join(sorted(set(options) - set(BACKEND_OPTIONS[backend])))
    known = ", ".join(BACKEND_OPTIONS[backend])
    require(
        not unknown,
        f"{prefix}rollout_options: rollout_backend {backend} has no option {unknown}"
        + (f"; its options are {known}" if known else "; it takes no options"),
    )
