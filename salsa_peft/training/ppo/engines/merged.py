"""vLLM with the policy's merged weights, through TRL."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from salsa_peft.models.adapters.merged import merged_parameters
from salsa_peft.training.ppo.engines.engine import Answers, Engine, sampled_logprobs
from salsa_peft.utils.errors import require

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedTokenizerBase


class MergedEngine(Engine):
    """TRL's VLLMGeneration, in this process or as a client, with the policy's adapter merged into the weights sent.

    sampling: arguments of VLLMGeneration. options: the user's rollout_options.
    """

    sleep_level = 2  # sync sends all weights

    def __init__(self, model: Any, policy: str | None, accelerator: Accelerator, tokenizer: PreTrainedTokenizerBase,
                 sampling: Mapping[str, Any], options: Mapping[str, Any]) -> None:  # fmt: skip
        from trl.generation.vllm_generation import VLLMGeneration

        class Generation(VLLMGeneration):
            """VLLMGeneration that sends merged weights without changing the base.

            TRL's class merges the adapter into the base and unmerges it, which rounds the base's weights.
            """

            def _iter_named_params(self) -> Iterator[tuple[str, Tensor]]:
                if policy is None:
                    return super()._iter_named_params()
                sharded = self._dist.is_fsdp or self._dist.is_zero3
                require(not sharded, "rollout_backend: vllm with adapters does not work with sharded weights; use DDP")
                return merged_parameters(self.model, policy)  # type: ignore[arg-type]

        self.generation = Generation(model, accelerator, tokenizer, **sampling, **options)
        if options["mode"] == "server":
            self._check_server(sampling["logprobs"])
        else:
            self.llm = self.generation.llm
        self.generation.enable_sleep_mode = False  # it would discard the weights after each batch of prompts

    def _check_server(self, logprobs: int | None) -> None:
        """Raise SalsaError if the server's log-probs are not those of the distribution that it samples from."""
        if logprobs is None:
            return
        found = self.generation.vllm_client.get_server_info()["model_config"]["logprobs_mode"]
        require(
            found == "processed_logprobs",
            f"importance_sampling_correction: the vLLM server reports {found}, which leave out the temperature. Start"
            " it with --logprobs-mode processed_logprobs, or set importance_sampling_correction to false",
        )

    def sync(self) -> None:
        """Send the weights, with the adapter merged."""
        self.generation.sync_weights()

    def generate(self, prompts: list[list[int]]) -> Answers:
        """Sample a response to each prompt."""
        _, answers, logprobs, ids = self.generation.generate(prompts, images=None, num_generations=1)
        return answers, sampled_logprobs(answers, logprobs, ids)
