"""Generation backends of a rollout behind one interface: Transformers' generate, its continuous batching, and vLLM through TRL."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
import transformers
from packaging.version import Version
from peft import PeftModel
from torch import Tensor
from transformers import CompileConfig, GenerationConfig, StaticCache
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.utils import WorkloadHints

from salsa_peft.data.chat.turn_ends import model_stop_token_ids
from salsa_peft.models.adapters.merged import merged_parameters
from salsa_peft.models.base import causal_lm, device
from salsa_peft.models.generation import Recording, generate, row_seeds
from salsa_peft.models.responses import Responses, pad_responses
from salsa_peft.utils.errors import SalsaError, require
from salsa_peft.utils.oom import is_out_of_memory

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedTokenizerBase

    from salsa_peft.training.ppo.config import SalsaPPOConfig


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
        self.ends = model_stop_token_ids(tokenizer, causal_lm(model))
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


Check = Callable[[], None]
BUCKET = 256
"""Tokens by which the static cache grows: each growth compiles anew."""
PAGED_SINCE = Version("5.19")
"""Of Transformers: pages, and attention that stays as it is (vLLM 0.31 asks for an older one, below 5.18)."""
MAX_TOKENS = 8192
"""Tokens in one forward of continuous batching (Transformers' default)."""


class Backend(Protocol):
    """Prompts and one seed each → responses of the policy, in the prompts' order."""

    def __call__(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], *, recording: Recording | None = None,
                 check: Check | None = None) -> Responses: ...  # fmt: skip

    def updated(self) -> None:
        """The policy's weights may have changed."""


class HF:
    """Transformers' generate, from the adapter that is active."""

    def __init__(self, model: Any, args: SalsaPPOConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.args, self.tokenizer = model, args, tokenizer

    def __call__(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], *, recording: Recording | None = None,
                 check: Check | None = None) -> Responses:  # fmt: skip
        return generate(self.model, prompts, self.args, self.tokenizer, seeds, recording=recording, check=check)

    def updated(self) -> None:
        """Nothing: it samples from the weights that are trained."""


class CompiledHF(HF):
    """The same with a static cache, so that Transformers compiles the decoding step (on CUDA, with CUDA graphs).

    A compiled step holds for one number of rows, one length of cache and one adapter; of the first two there is one: rows are filled
    up by copies of the last, which no other row notices, and the cache is as long as the longest yet. It is kept between calls,
    since CUDA graphs are recorded for its addresses: rows × length × what a token needs stays allocated.
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
            recording is None,  # the hook that records is compiled in once, and then left out in silence
            "old_logprobs: found rollout with rollout_compile, expected recompute: a compiled step records nothing",
        )
        cache = self._cache_for(len(prompts), max(map(len, prompts)) + self.args.max_new_tokens)
        spare = self.rows - len(prompts)
        filled, drawn = [*prompts, *[prompts[-1]] * spare], [*seeds, *[seeds[-1]] * spare]
        try:
            found = generate(self.model, filled, self.args, self.tokenizer, drawn, check=check, cache=cache,
                             compile_config=self.compiled)  # fmt: skip
        except RuntimeError:  # out of memory: fewer rows want a smaller cache
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
    """Raises SalsaError for rollout_compile without CUDA."""
    if not args.rollout_compile:
        return HF(model, args, tokenizer)
    require(
        device().type == "cuda",
        "rollout_compile: found true without CUDA, expected false: on a CPU it compiles for minutes to gain little",
    )
    return CompiledHF(model, args, tokenizer, CompileConfig())


class Paged:
    """Transformers' continuous batching: a response that has ended makes room for the next, and nothing is padded.

    It samples with the attention that the model was loaded with, by the default of Transformers' paged version of it.
    """

    def __init__(
        self, model: Any, args: SalsaPPOConfig, tokenizer: PreTrainedTokenizerBase, accelerator: Accelerator
    ) -> None:
        require(
            args.min_new_tokens == 0,
            f"min_new_tokens: found {args.min_new_tokens} with rollout_backend paged, expected 0: Transformers' continuous batching"
            " leaves it out in silence; take hf or vllm",
        )
        require(
            Version(transformers.__version__) >= PAGED_SINCE,
            f"rollout_backend: found paged with transformers {transformers.__version__}, expected {PAGED_SINCE} or newer",
        )
        self.model, self.args, self.tokenizer = model, args, tokenizer
        self.ends = model_stop_token_ids(tokenizer, causal_lm(model))
        self.options = {"auto_switch_to_flash": False, **args.rollout_options}  # type: ignore[dict-item]

    def updated(self) -> None:
        """Nothing: it samples from the weights that are trained, and no cache outlives a call."""

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], *, recording: Recording | None = None,
                 check: Check | None = None) -> Responses:  # fmt: skip
        assert recording is None  # refused with the options
        lm = causal_lm(self.model)
        with _restored(lm), _autocast_in_threads(lm):
            manager = self._manager(lm, prompts, seeds)
            try:
                # all requests before the start: what is drawn would depend on the threads' timing otherwise
                names = manager.add_requests(
                    [list(prompt) for prompt in prompts], max_new_tokens=self.args.max_new_tokens
                )
                manager.start()
                answers = _collect(manager, len(prompts), check)
            finally:
                manager.stop(hard_stop=True)
                manager.destroy()
        found = [answers[name] for name in names]
        return pad_responses(prompts, found, int(self.tokenizer.pad_token_id), self.ends, lm.device)

    def _manager(self, lm: Any, prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> Any:
        hints = WorkloadHints(max(map(len, prompts)), self.args.max_new_tokens, len(prompts))
        try:
            return lm.init_continuous_batching(self._settings(), self._config(prompts, seeds), hints)
        except ValueError as error:  # an attention, or kinds of layers, that it has no paged version of
            raise SalsaError(f"rollout_backend: paged does not run this model: {error}; take hf") from error

    def _settings(self) -> GenerationConfig:
        return GenerationConfig(
            do_sample=True, temperature=self.args.temperature, top_k=0, top_p=1.0, max_new_tokens=self.args.max_new_tokens,
            eos_token_id=list(self.ends), pad_token_id=int(self.tokenizer.pad_token_id),
        )  # fmt: skip

    def _config(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> ContinuousBatchingConfig:
        """Room for every response at its longest, instead of most of the memory that is free, which is Transformers' default."""
        page = self.options.get("page_size", ContinuousBatchingConfig.page_size)
        pages = sum(-(-(len(prompt) + self.args.max_new_tokens) // page) for prompt in prompts)
        tokens = sum(map(len, prompts))
        # no request is begun while less than 15% of the blocks are free
        defaults = {"num_blocks": pages + pages // 4 + 1, "max_batch_tokens": min(tokens, MAX_TOKENS)}
        return ContinuousBatchingConfig(
            seed=row_seeds([0], *seeds)[0], allow_block_sharing=False, **{**defaults, **self.options}
        )


def _collect(manager: Any, count: int, check: Check | None) -> dict[str, list[int]]:
    """Name of a request → its answer's token ids. Raises SalsaError where one failed, and what `check` raises."""
    answers: dict[str, list[int]] = {}
    while len(answers) < count:
        if check is not None:
            check()
        result = manager.get_result(timeout=0.5)
        failed = result.error if result is not None else manager.background_thread_status.fatal_error
        if failed is not None and is_out_of_memory(RuntimeError(str(failed))):
            raise torch.OutOfMemoryError(str(failed))
        if failed is not None:
            raise SalsaError(f"rollout_backend: paged failed: {failed}; lower rollout_batch_size or take hf")
        if result is not None:
            answers[result.request_id] = result.generated_tokens
    return answers


@contextlib.contextmanager
def _restored(lm: Any) -> Iterator[None]:
    """After the context the mode, the attention and the random state are those found; continuous batching sets all three."""
    training, attention = lm.training, lm.config._attn_implementation
    cuda = lm.device.type == "cuda"
    if cuda:  # it computes on a stream of its own, which does not wait for the optimizer's step on ours
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
    """Within the context the model's forward runs under the autocast of this thread, also in another. Raises SalsaError for an
    autocast to another precision than the base's, which the paged cache has."""
    kind = lm.device.type
    if not torch.is_autocast_enabled(kind):
        yield
        return
    dtype = torch.get_autocast_dtype(kind)
    require(
        dtype == lm.dtype,
        f"rollout_backend: found paged with mixed precision {dtype} over a base in {lm.dtype}, expected one precision; load the"
        " base in it or take hf",
    )
    before = vars(lm).get("forward")
    lm.forward = torch.autocast(kind, dtype)(lm.forward)
    try:
        yield
    finally:
        del lm.forward
        if before is not None:
            lm.forward = before


BACKENDS: dict[str, Callable[[Any, Any, Any, Any], Backend]] = {"hf": hf, "paged": Paged, "vllm": VLLM}
