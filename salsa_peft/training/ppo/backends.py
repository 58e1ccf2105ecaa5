"""Generation backends: Transformers' generate, its continuous batching, and vLLM."""

from __future__ import annotations

import abc
import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import transformers
from packaging.version import Version
from peft import PeftModel
from transformers import CompileConfig, GenerationConfig, StaticCache
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.requests import GenerationOutput
from transformers.generation.continuous_batching.utils import WorkloadHints

from salsa_peft.data.chat.turn_ends import model_stop_token_ids
from salsa_peft.models.base import causal_lm, device
from salsa_peft.models.generation import Recording, generate, row_seeds
from salsa_peft.models.responses import Responses, pad_responses
from salsa_peft.training.ppo.engines.adapter import AdapterEngine
from salsa_peft.training.ppo.engines.engine import Engine, require_same_ends
from salsa_peft.training.ppo.engines.merged import MergedEngine
from salsa_peft.utils.errors import SalsaError, require
from salsa_peft.utils.oom import is_out_of_memory

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedTokenizerBase

    from salsa_peft.training.ppo.config import SalsaPPOConfig


Check = Callable[[], None]
BUCKET = 256
"""The static cache's length is a multiple of this. Each growth compiles the decoding step again."""
PAGED_SINCE = Version("5.19")
"""First version of Transformers whose continuous batching keeps the model's attention implementation."""
MAX_TOKENS = 8192
"""Largest number of tokens in a forward pass of continuous batching (Transformers' default)."""


class Backend(abc.ABC):
    """Samples one response of the policy to each prompt, in the prompts' order.

    seeds: one for each prompt. recording: records log-probs while sampling, and with a value head (hf only) entropies
    and values. check: called during sampling; may raise an exception to stop it.
    """

    def __init__(self, model: Any, args: SalsaPPOConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.args, self.tokenizer = model, args, tokenizer
        self.ends = model_stop_token_ids(tokenizer, causal_lm(model))

    @abc.abstractmethod
    def __call__(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], *, recording: Recording | None = None,
                 check: Check | None = None) -> Responses:  # fmt: skip
        """Sample the responses."""

    def sync_weights(self) -> None:  # noqa: B027  (most backends have no weights of their own)
        """Copy the policy's weights to an engine with weights of its own, if any. Called before sampling."""

    def rest(self) -> None:  # noqa: B027
        """Free the memory of an engine that can do without it until the next sync_weights. Called after sampling."""


class HF(Backend):
    """Transformers' generate with the active adapter."""

    def __call__(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], *, recording: Recording | None = None,
                 check: Check | None = None) -> Responses:  # fmt: skip
        return generate(self.model, prompts, self.args, self.tokenizer, seeds, recording=recording, check=check)


class CompiledHF(HF):
    """Transformers' generate with a static cache and a compiled decoding step (with CUDA graphs).

    A compiled step is valid for one number of rows, one cache length and one adapter. So batches are filled up with
    copies of the last row, and the cache is as long as the longest sequence so far. The cache is kept between calls,
    since CUDA graphs use its addresses. Its size is rows × length × the bytes of a token's keys and values.
    """

    def __init__(
        self, model: Any, args: SalsaPPOConfig, tokenizer: PreTrainedTokenizerBase, compiled: CompileConfig | None
    ) -> None:
        super().__init__(model, args, tokenizer)
        self.compiled, self.rows, self.length = compiled, 0, (args.max_prompt_length or 0) + args.max_new_tokens
        self.cache: StaticCache | None = None

    def __call__(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], *, recording: Recording | None = None,
                 check: Check | None = None) -> Responses:  # fmt: skip
        require(
            recording is None,  # a compiled step would silently skip the hook of `recording`
            "rollout_compile: log-probs cannot be recorded while sampling; use old_logprobs=recompute and no correction",
        )
        cache = self._cache_for(len(prompts), max(map(len, prompts)) + self.args.max_new_tokens)
        spare = self.rows - len(prompts)
        filled, drawn = [*prompts, *[prompts[-1]] * spare], [*seeds, *[seeds[-1]] * spare]
        try:
            found = generate(self.model, filled, self.args, self.tokenizer, drawn, check=check, cache=cache,
                             compile_config=self.compiled)  # fmt: skip
        except RuntimeError:  # out of memory: fewer rows need a smaller cache
            self.cache, self.rows = None, 0
            raise
        return Responses(*(field[: len(prompts)] for field in found))

    def _cache_for(self, rows: int, length: int) -> StaticCache:
        if self.cache is None or rows > self.rows or length > self.length:
            self.rows, self.length = max(rows, self.rows), -(-max(length, self.length) // BUCKET) * BUCKET
            config = causal_lm(self.model).config.get_text_config(decoder=True)
            self.cache = StaticCache(config=config, max_cache_len=self.length)
        self.cache.reset()
        return self.cache


def hf(model: Any, args: SalsaPPOConfig, tokenizer: PreTrainedTokenizerBase, accelerator: Accelerator) -> Backend:
    """Create the backend `hf`. Raises SalsaError for rollout_compile without CUDA."""
    if not args.rollout_compile:
        return HF(model, args, tokenizer)
    require(device().type == "cuda", "rollout_compile: this needs CUDA (it saves no time on a CPU); set it to false")
    return CompiledHF(model, args, tokenizer, CompileConfig())


class Paged(Backend):
    """Transformers' continuous batching: when a response is finished, the next prompt takes its place.

    There is no padding. The attention is the paged version of the model's attention implementation.
    """

    def __init__(
        self, model: Any, args: SalsaPPOConfig, tokenizer: PreTrainedTokenizerBase, accelerator: Accelerator
    ) -> None:
        require(args.min_new_tokens == 0, "min_new_tokens: paged ignores it; set it to 0, or use hf or vllm")
        require(
            Version(transformers.__version__) >= PAGED_SINCE,
            f"rollout_backend: paged needs transformers {PAGED_SINCE} or newer, not {transformers.__version__}",
        )
        super().__init__(model, args, tokenizer)
        self.options = {"auto_switch_to_flash": False, **args.rollout_options}  # type: ignore[dict-item]

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], *, recording: Recording | None = None,
                 check: Check | None = None) -> Responses:  # fmt: skip
        lm = causal_lm(self.model)
        with _restored(lm), _autocast_in_threads(lm):
            manager = self._manager(lm, prompts, seeds, return_logprobs=recording is not None)
            try:
                # add all requests before the start; samples would otherwise depend on the timing of threads
                names = manager.add_requests(
                    [list(prompt) for prompt in prompts], max_new_tokens=self.args.max_new_tokens
                )
                manager.start()
                answers = _collect(manager, len(prompts), check)
            finally:
                manager.stop(hard_stop=True)
                manager.destroy()
        found = [answers[name].generated_tokens for name in names]
        if recording is not None:
            recording.add_logprobs([answers[name].logprobs for name in names], lm.device)
        return pad_responses(prompts, found, int(self.tokenizer.pad_token_id), self.ends, lm.device)

    def _manager(
        self, lm: Any, prompts: Sequence[Sequence[int]], seeds: Sequence[int], *, return_logprobs: bool
    ) -> Any:
        hints = WorkloadHints(max(map(len, prompts)), self.args.max_new_tokens, len(prompts))
        sampling = GenerationConfig(
            do_sample=True, temperature=self.args.temperature, top_k=0, top_p=1.0, eos_token_id=list(self.ends),
            max_new_tokens=self.args.max_new_tokens, pad_token_id=int(self.tokenizer.pad_token_id),
        )  # fmt: skip
        try:
            return lm.init_continuous_batching(sampling, self._config(prompts, seeds, return_logprobs), hints)
        except ValueError as error:  # the attention implementation or a layer has no paged version
            raise SalsaError(f"rollout_backend: paged does not support this model: {error}. Use hf") from error

    def _config(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], return_logprobs: bool
    ) -> ContinuousBatchingConfig:
        """Configuration whose cache fits all responses at full length; the default takes most free memory."""
        page = self.options.get("page_size", ContinuousBatchingConfig.page_size)
        pages = sum(-(-(len(prompt) + self.args.max_new_tokens) // page) for prompt in prompts)
        tokens = sum(map(len, prompts))
        # a quarter more blocks, because no request starts while less than 15% of them are free
        defaults = {"num_blocks": pages + pages // 4 + 1, "max_batch_tokens": min(tokens, MAX_TOKENS)}
        return ContinuousBatchingConfig(
            seed=row_seeds([0], *seeds)[0],
            allow_block_sharing=False,
            return_logprobs=return_logprobs,
            **{**defaults, **self.options},
        )


def _collect(manager: Any, count: int, check: Check | None) -> dict[str, GenerationOutput]:
    """Wait for the responses: request id → tokens and log-probs. Raises SalsaError if a request failed."""
    answers: dict[str, GenerationOutput] = {}
    while len(answers) < count:
        if check is not None:
            check()
        result = manager.get_result(timeout=0.5)
        failed = result.error if result is not None else manager.background_thread_status.fatal_error
        if failed is not None and is_out_of_memory(RuntimeError(str(failed))):
            raise torch.OutOfMemoryError(str(failed))
        if failed is not None:
            raise SalsaError(f"rollout_backend: paged failed: {failed}. Lower rollout_batch_size or use hf")
        if result is not None:
            answers[result.request_id] = result
    return answers


@contextlib.contextmanager
def _restored(lm: Any) -> Iterator[None]:
    """Context that restores training mode, attention and random state, which paged generation changes."""
    training, attention = lm.training, lm.config._attn_implementation
    cuda = lm.device.type == "cuda"
    if cuda:  # paged generation runs on another CUDA stream, which would not wait for the optimizer's step
        torch.cuda.synchronize(lm.device)
    with torch.random.fork_rng(devices=[lm.device] if cuda else []):
        try:
            yield
        finally:
            lm.train(training)
            if lm.config._attn_implementation != attention:
                lm.set_attn_implementation(attention)


@contextlib.contextmanager
def _autocast_in_threads(lm: Any) -> Iterator[None]:
    """Context in which the model's forward uses this thread's autocast in other threads too.

    Raises SalsaError if autocast's dtype is not that of the base and of the paged cache.
    """
    kind = lm.device.type
    if not torch.is_autocast_enabled(kind):
        yield
        return
    dtype = torch.get_autocast_dtype(kind)
    require(
        dtype == lm.dtype,
        f"rollout_backend: paged needs a base in {dtype}, the dtype of mixed precision, but this base is in {lm.dtype}."
        f" Load it with dtype={dtype}, or use hf",
    )
    before = vars(lm).get("forward")
    lm.forward = torch.autocast(kind, dtype)(lm.forward)
    try:
        yield
    finally:
        del lm.forward
        if before is not None:
            lm.forward = before


class VLLM(Backend):
    """vLLM in this process (colocate), or as a server (`vllm serve BASE`) through TRL's VLLMGeneration."""

    def __init__(
        self, model: Any, args: SalsaPPOConfig, tokenizer: PreTrainedTokenizerBase, accelerator: Accelerator
    ) -> None:
        from trl.import_utils import is_vllm_available

        options = {"mode": "colocate", **args.rollout_options}  # type: ignore[dict-item]
        if options["mode"] == "colocate":
            options = {"gpu_memory_utilization": 0.3, "enable_sleep_mode": True, **options}
        if args.max_prompt_length is not None:
            options.setdefault("max_model_length", args.max_prompt_length + args.max_new_tokens)
        require(is_vllm_available(), "rollout_backend: vllm is not installed. Run pip install 'salsa-peft[vllm]'")
        require(device().type == "cuda", "rollout_backend: vllm needs a CUDA device; use hf")
        require(
            options["mode"] == "colocate" or accelerator.num_processes == 1,
            f"rollout_options.mode: server works with one process only, not with {accelerator.num_processes}: TRL"
            " gives each process the same number of responses, but here the numbers may differ. Use colocate",
        )
        require(
            0.01 <= args.temperature <= 2,
            f"temperature: vllm needs a temperature from 0.01 to 2, not {args.temperature:g}; change it, or use hf",
        )
        super().__init__(model, args, tokenizer)
        self.ready, self.sleeps = False, bool(options.get("enable_sleep_mode"))
        allocator = [os.environ.get(name, "") for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")]
        require(
            not (self.sleeps and "expandable_segments:True" in ",".join(allocator)),
            "rollout_options.enable_sleep_mode: vLLM cannot sleep with PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True;"
            " unset this variable, or set rollout_options.enable_sleep_mode to false",
        )
        engine = ENGINES[options.pop("sync", "merged")]
        policy = str(model.active_adapter) if isinstance(model, PeftModel) else None
        try:
            self.engine = engine(model, policy, accelerator, tokenizer, self._sampling(), options)
        except SalsaError:
            raise
        except (OSError, RuntimeError, ValueError) as error:
            raise SalsaError(f"rollout_backend: vllm does not start: {' '.join(str(error).split())}") from error

    def _sampling(self) -> dict[str, Any]:
        """Arguments of VLLMGeneration that make vLLM sample from the policy's distribution."""
        if self.args.min_new_tokens:
            require_same_ends(causal_lm(self.model), self.ends)
        # ignore_eos, because vLLM would also stop at other EOS tokens of the base's files
        plain = {
            "ignore_eos": True, "stop_token_ids": list(self.ends), "min_tokens": self.args.min_new_tokens,
            "presence_penalty": 0.0, "frequency_penalty": 0.0,
        }  # fmt: skip
        return {
            "temperature": self.args.temperature, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0,
            "max_completion_length": self.args.max_new_tokens, "generation_kwargs": plain,
            "logprobs": 0 if self.args.corrects_sampling else None,  # 0: of the sampled token alone
        }  # fmt: skip

    def sync_weights(self) -> None:
        """Wake vLLM up, if it sleeps between rollouts, and send the policy's weights."""
        wakes = self.sleeps and not self.ready
        if wakes:
            torch.cuda.empty_cache()
            self.engine.llm.wake_up(tags=["weights"])
        self.engine.sync()
        if wakes:  # not earlier: copies of merged weights and the KV cache need memory at different times
            self.engine.llm.wake_up(tags=["kv_cache"])
        self.ready = True

    def rest(self) -> None:
        """Free vLLM's GPU memory until the next sync."""
        if self.ready and self.sleeps:
            self.engine.llm.sleep(level=self.engine.sleep_level)
        self.ready = False

    def __call__(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], *, recording: Recording | None = None,
                 check: Check | None = None) -> Responses:  # fmt: skip
        if check is not None:
            check()
        if not self.ready:  # vLLM starts with the base's weights
            self.sync_weights()
        answers, logprobs = self.engine.generate([list(prompt) for prompt in prompts])
        pad, lm = int(self.tokenizer.pad_token_id), causal_lm(self.model)
        if recording is not None:
            assert logprobs is not None  # args.corrects_sampling
            recording.add_logprobs(logprobs, lm.device)
        return pad_responses(prompts, answers, pad, self.ends, lm.device)


ENGINES: dict[str, Callable[..., Engine]] = {"merged": MergedEngine, "adapter": AdapterEngine}
"""rollout_options.sync → the engine of the backend vllm."""
BACKENDS: dict[str, Callable[[Any, Any, Any, Any], Backend]] = {"hf": hf, "paged": Paged, "vllm": VLLM}
