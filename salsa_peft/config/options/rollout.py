"""What `rollout_options` may hold for each `rollout_backend`, and which of the engine's options a backend does not have."""

from __future__ import annotations

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
"""Fields of Transformers' ContinuousBatchingConfig, and of TRL's VLLMGeneration. Not tensor_parallel_size: TRL cuts answers by equal
shares, which a rollout's need not be."""


def check_rollout_options(
    prefix: str, backend: str, options: Mapping[str, Any], *, compiled: bool, recorded: bool
) -> None:
    """Raise SalsaError for an option that the backend does not have. compiled: rollout_compile; recorded: old_logprobs rollout."""
    unknown = sorted(set(options) - set(BACKEND_OPTIONS[backend]))
    expected = f"some of {', '.join(BACKEND_OPTIONS[backend])}" if BACKEND_OPTIONS[backend] else "none"
    require(
        not unknown,
        f"{prefix}rollout_options: found {', '.join(unknown)} with rollout_backend {backend}, expected {expected}",
    )
    require(
        backend == "hf" or not compiled,
        f"{prefix}rollout_compile: found true with rollout_backend {backend}, expected false: it is hf's",
    )
    require(  # the hook that records would be compiled in once, and left out in silence ever after
        not (compiled and recorded),
        f"{prefix}old_logprobs: found rollout with rollout_compile, expected recompute: a compiled step records nothing",
    )
