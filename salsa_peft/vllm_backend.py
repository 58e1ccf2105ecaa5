"""vLLM through TRL's VLLMGeneration, with adapters that share their base.

Not run on a GPU yet: written against the source of TRL 1.16 and vLLM, tested with a stand-in for vLLM's server.
Left out: seeds (one in a request would be each row's, so that equal prompts got equal responses), vLLM's own log-probs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from peft import PeftModel
from torch import Tensor
from transformers import GenerationConfig

from salsa_peft.data.chat.turn_ends import ends_of
from salsa_peft.models.adapters.merged import merged_parameters
from salsa_peft.models.base import causal_lm, device
from salsa_peft.models.generation import Recording
from salsa_peft.models.responses import Responses, pad_responses
from salsa_peft.utils.errors import SalsaError, require

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedTokenizerBase

    from salsa_peft.ppo_config import SalsaPPOConfig


class VLLM:
    """vLLM through TRL's VLLMGeneration: in this process (mode colocate) or a server (mode server, `vllm serve BASE`)."""

    def __init__(
        self, model: Any, args: SalsaPPOConfig, tokenizer: PreTrainedTokenizerBase, accelerator: Accelerator
    ) -> None:
        from trl.import_utils import is_vllm_available

        options = {"mode": "colocate", "gpu_memory_utilization": 0.3, **args.rollout_options}  # type: ignore[dict-item]
        if args.max_prompt_length is not None:
            options.setdefault("max_model_length", args.max_prompt_length + args.max_new_tokens)
        require(
            is_vllm_available(),
            "rollout_backend: found no vllm here, expected it for 'vllm'; pip install 'salsa-peft[vllm]'",
        )
        require(
            device().type == "cuda",
            "rollout_backend: found vllm without CUDA, expected a GPU, over which weights go to vLLM; take hf",
        )
        require(
            options["mode"] == "colocate" or accelerator.num_processes == 1,
            f"rollout_options.mode: found server with {accelerator.num_processes} processes, expected one: TRL cuts its answers by"
            " equal shares; take colocate",
        )
        require(
            0.01 <= args.temperature <= 2,
            f"temperature: found {args.temperature:g} with rollout_backend vllm, expected 0.01 to 2; vLLM samples at no other",
        )
        self.model, self.args, self.tokenizer, self.synced = model, args, tokenizer, False
        self.ends = ends_of(tokenizer, causal_lm(model))
        self.engine = self._engine(accelerator, options)

    def _engine(self, accelerator: Accelerator, options: Mapping[str, Any]) -> Any:
        from trl.generation.vllm_generation import VLLMGeneration

        policy = str(self.model.active_adapter) if isinstance(self.model, PeftModel) else None

        class Engine(VLLMGeneration):
            """TRL's own merges the adapter into the base in place and takes it out again, which leaves the base of all references
            changed by rounding."""

            def _iter_named_params(self) -> Iterator[tuple[str, Tensor]]:
                if policy is None:
                    return super()._iter_named_params()
                require(
                    not (self._dist.is_fsdp or self._dist.is_zero3),
                    "rollout_backend: found vllm with an adapter on a base that is sharded (FSDP, ZeRO-3), expected DDP or one process",
                )
                return merged_parameters(self.model, policy)  # type: ignore[arg-type]

        # vLLM would also stop at every EOS of the base's own files, and counts these among what min_tokens forbids
        plain = {"ignore_eos": True, "stop_token_ids": list(self.ends), "min_tokens": self.args.min_new_tokens, "presence_penalty": 0.0,
                 "frequency_penalty": 0.0}  # fmt: skip
        if self.args.min_new_tokens:
            require_same_ends(causal_lm(self.model), self.ends)
        try:
            return Engine(
                self.model, accelerator, self.tokenizer, temperature=self.args.temperature, top_p=1.0, top_k=0, min_p=0.0,
                repetition_penalty=1.0, max_completion_length=self.args.max_new_tokens, logprobs=None, generation_kwargs=plain,
                **options,
            )  # fmt: skip
        except (OSError, RuntimeError) as error:
            raise SalsaError(f"rollout_backend: vllm does not start: {' '.join(str(error).split())}") from error

    def updated(self) -> None:
        """Push the policy's weights."""
        self.engine.sync_weights()
        self.synced = True

    def __call__(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], *, recording: Recording | None = None,
                 check: Callable[[], None] | None = None) -> Responses:  # fmt: skip
        assert recording is None  # refused with the options
        if check is not None:
            check()
        if not self.synced:  # vLLM starts with the base's weights
            self.updated()
        _, answers, _, _ = self.engine.generate([list(prompt) for prompt in prompts], images=None, num_generations=1)
        pad = int(self.tokenizer.pad_token_id)
        return pad_responses(prompts, answers, pad, self.ends, causal_lm(self.model).device)


def require_same_ends(lm: Any, ends: tuple[int, ...]) -> None:
    """Raise SalsaError where the base names EOS tokens that end no response here: vLLM would forbid them too before min_new_tokens."""
    named = [lm.config.eos_token_id]
    with contextlib.suppress(OSError):  # a base without generation_config.json
        named.append(GenerationConfig.from_pretrained(lm.name_or_path).eos_token_id)
    others = {token for entry in named for token in (entry if isinstance(entry, list) else [entry])} - {None, *ends}
    require(
        not others,
        f"min_new_tokens: the base's configuration names EOS tokens {sorted(others)} beside those that end a response, {list(ends)}, and"
        " vLLM would forbid them too. Use rollout_backend hf.",
    )
