"""Sampling of responses, with a seed for each response.

A response depends only on its prompt, its seed and the weights, not on its batch, the number of processes or the
device (up to rounding). Transformers' generate runs the forwards and keeps the cache, but it would sample a whole
batch from one generator. Tokens are therefore drawn here, with one generator for each response.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from salsa_peft.config.options.ppo import Sampling
from salsa_peft.data.chat.turn_ends import model_stop_token_ids
from salsa_peft.models.base import apply_scalar_head, causal_lm, max_positions
from salsa_peft.models.logprobs import entropy_of
from salsa_peft.models.responses import Responses, pad_tokens
from salsa_peft.utils.errors import require

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


CACHE_ARGUMENT = "cache" if Version(transformers.__version__) >= Version("5.24") else "past_key_values"
"""Name of the argument of Transformers' generate that takes a KV cache."""
WITHOUT_FLOAT64 = ("mps",)
"""Device types without float64, which drawing tokens needs; for these, tokens are drawn on the CPU."""


def row_seeds(rows: Sequence[int], *parts: int) -> list[int]:
    """One seed per row: 63 bits of a hash of the row's number and of `parts`, such as the run's seed."""
    texts = (" ".join(map(str, (*parts, row))) for row in rows)
    return [int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1 for text in texts]


def uniform_numbers(seeds: Sequence[int], length: int) -> Tensor:
    """Uniform random numbers in [0, 1), (B, length), float64; row i is drawn on the CPU with seeds[i]."""
    rows = (torch.rand(length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in seeds)
    return torch.stack(list(rows))


@dataclass
class Recording:
    """Log-probs, and on request entropies and values, recorded during generation: float32 (B,) per step."""

    value_head: nn.Linear | None = None
    """PPO's value head, (B, H) → (B, 1), with which entropies are recorded too. None: no values are recorded."""
    with_entropy: bool = False
    """Whether entropies are recorded without a value head."""
    logprobs: list[Tensor] = field(default_factory=list)
    entropy: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)

    def add_logprobs(self, rows: Sequence[Sequence[float]], device: torch.device) -> None:
        """Record the log-probs of whole responses, for a sampler that returns them at the end."""
        padded = pad_sequence([torch.tensor(row, dtype=torch.float32) for row in rows], batch_first=True)
        self.logprobs += padded.to(device).unbind(1)

    def stacked(self, mask: Tensor) -> tuple[Tensor, ...]:
        """Log-probs, and entropies and values if they were recorded, (B, T) each, with 0 where the mask is False."""
        columns = [steps for steps in (self.logprobs, self.entropy, self.values) if steps]
        return tuple(torch.stack(steps, dim=1).masked_fill(~mask, 0.0) for steps in columns)

    def recording_values(self, lm: Any) -> AbstractContextManager[Any]:
        """Context in which each call of the output embeddings records the value at the last position."""
        if (head := self.value_head) is None:
            return contextlib.nullcontext()

        def record(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self.values.append(apply_scalar_head(head, inputs[0][:, -1]).float())

        return lm.get_output_embeddings().register_forward_pre_hook(record)


class Sampler(LogitsProcessor):
    """Logits processor that draws the next tokens; greedy decoding then picks the drawn tokens."""

    def __init__(self, uniforms: Tensor, sampling: Sampling, eos: Tensor, recording: Recording | None,
                 check: Callable[[], None] | None) -> None:  # fmt: skip
        self.uniforms, self.sampling, self.eos, self.recording, self.check = uniforms, sampling, eos, recording, check
        self.step = 0
        self.broken = torch.zeros(len(uniforms), dtype=torch.bool, device=uniforms.device)
        """Mask of the rows that had a NaN or +∞ logit, which makes all log-probs of the row NaN."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return logits (B, V) that are 0 at the drawn token of each row and −∞ elsewhere."""
        if self.check is not None:
            self.check()
        early = self.step < self.sampling.min_new_tokens
        greedy = self.sampling.temperature == 0  # temperature 0 occurs only in evaluation
        scaled = scores.float() / (1.0 if greedy else self.sampling.temperature)
        if early:
            scaled.index_fill_(-1, self.eos, -torch.inf)
        logp = scaled.log_softmax(-1)
        self.broken |= logp[:, 0].isnan().to(self.broken.device)
        probabilities = logp.exp()
        token = logp.argmax(-1, keepdim=True) if greedy else sample_token(probabilities, self.uniforms[:, self.step])
        if self.recording is not None:
            self.recording.logprobs.append(logp.gather(-1, token).squeeze(-1))
            if self.recording.value_head is not None or self.recording.with_entropy:
                self.recording.entropy.append(entropy_of(logp, probabilities, masked=early))
        self.step += 1
        return torch.full_like(scores, -torch.inf).scatter_(-1, token, 0.0)


class RowLimits(StoppingCriteria):
    """Stopping criterion that ends each row at its own length: `ends` (B,), the tokens of prompt and response."""

    def __init__(self, ends: Tensor) -> None:
        self.ends = ends

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Any:
        """Return a mask (B,) of the rows that have reached their length."""
        return self.ends <= input_ids.shape[1]


def sample_token(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """Draw token ids (B, 1) by the inverse CDF from probabilities (B, V) at uniform numbers (B,).

    The drawn token is the first whose cumulative probability exceeds the row's number. With cumulative sums in
    float64, tokens of probability 1e-12 are drawn as often as they should be, and tokens of probability 0 never. The
    sums are computed on the device of `uniforms`.
    """
    here, probabilities = probabilities.device, probabilities.to(uniforms.device)
    cumulative = probabilities.double().cumsum(-1)
    total = cumulative[:, -1:]
    wanted = torch.minimum(uniforms[:, None] * total, total * (1 - 2**-52))  # stays below the total after rounding
    found = torch.searchsorted(cumulative, wanted, right=True)
    return found.clamp(max=cumulative.shape[-1] - 1).to(here)  # a row of NaN gives an index past the end


@torch.no_grad()
def generate(model: nn.Module, prompts: Sequence[Sequence[int]], sampling: Sampling, tokenizer: PreTrainedTokenizerBase,
             seeds: Sequence[int], *, limits: Sequence[int] | None = None, recording: Recording | None = None,
             check: Callable[[], None] | None = None, cache: Any = None, **options: Any) -> Responses:  # fmt: skip
    """Sample a response to each prompt with the active adapter, without top-k or top-p.

    seeds: one seed for each prompt. limits: the maximum length of each response, by default sampling.max_new_tokens;
    a response with a lower limit is the beginning of the response with a higher one. recording: receives log-probs, and
    entropies and values if it asks for them. check: called before each token, and may raise an error to stop generation.
    cache: an empty KV cache of Transformers, by default a DynamicCache. options: further fields of GenerationConfig.
    Global random states are not used. With SDPA, and without layers of linear attention, the host waits for the device
    once a token, where Transformers reads whether all responses have ended. Raises SalsaError if logits are NaN or +∞.
    """
    lm, pad = causal_lm(model), int(tokenizer.pad_token_id)
    ends = model_stop_token_ids(tokenizer, lm)
    end_ids = torch.tensor(ends, device=lm.device)
    ids, mask = pad_tokens(prompts, pad, lm.device, "left")
    limits = [sampling.max_new_tokens] * len(prompts) if limits is None else limits
    row_limits = torch.tensor(limits, device=lm.device)
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=max(limits), bos_token_id=tokenizer.bos_token_id, eos_token_id=list(ends),
        pad_token_id=pad, **options,
    )  # fmt: skip
    uniforms = uniform_numbers(seeds, max(limits))
    uniforms = uniforms if lm.device.type in WITHOUT_FLOAT64 else uniforms.to(lm.device)
    sampler = Sampler(uniforms, sampling, end_ids, recording, check)
    values = recording.recording_values(lm) if recording else contextlib.nullcontext()
    with _generation_mode(lm, settings), values, masks_without_sync(padded=len(set(map(len, prompts))) > 1):
        tokens = lm.generate(
            input_ids=ids,
            attention_mask=mask.long(),
            generation_config=settings,
            logits_processor=LogitsProcessorList([sampler]),
            stopping_criteria=StoppingCriteriaList([RowLimits(row_limits + ids.shape[1])]),
            synced_gpus=False,  # sharded weights are gathered, so a forward needs no other process
            **({} if cache is None else {CACHE_ARGUMENT: cache}),
        )
    broken = int(sampler.broken.sum())
    require(
        not broken,
        f"model: the logits are NaN or infinite for {broken} of {len(prompts)} prompts. Check the model's weights for"
        " NaN, and use a dtype that does not overflow",
    )
    response_ids = tokens[:, ids.shape[1] :]
    ended = torch.isin(response_ids, end_ids).long()
    within = torch.arange(response_ids.shape[1], device=lm.device) < row_limits[:, None]
    response_mask = (ended.cumsum(-1) - ended == 0) & within
    finished = (ended.bool() & response_mask).any(-1)
    return Responses(ids, mask, response_ids.masked_fill(~response_mask, pad), response_mask, finished)


@contextlib.contextmanager
def _generation_mode(lm: Any, settings: GenerationConfig) -> Iterator[None]:
    """Context in which the model is in eval mode and uses `settings` instead of its own GenerationConfig."""
    training, inherited = lm.training, lm.generation_config
    lm.eval()
    lm.generation_config = settings
    try:
        yield
    finally:
        lm.train(training)
        lm.generation_config = inherited


@contextlib.contextmanager
def masks_without_sync(padded: bool) -> Iterator[None]:
    """Context in which the mask of SDPA is built without waiting for the device. padded: whether the batch has padding.

    In each forward pass, Transformers reads from the device whether there is padding, to leave the mask out where
    there is none. It does not read anything if it is given no mask, or if generate has left out the mask of a batch
    without padding. Not avoided here: flash attention reads the lengths of padded rows from the device in each layer,
    and layers of linear attention (Qwen3-Next) read the mask.
    """
    build = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]

    def always_build(**arguments: Any) -> Tensor:
        return build(**{**arguments, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})

    if padded:
        ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] = always_build
    try:
        yield
    finally:
        ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] = build


def generate_batches(model: nn.Module, prompts: Sequence[Sequence[int]], sampling: Sampling, tokenizer: PreTrainedTokenizerBase, seed: int,
                     batch_size: int, *, limits: Sequence[int] | None = None, places: Sequence[int] | None = None, turn: int = 1,
                     skip: Callable[[list[int]], bool] = lambda rows: False) -> Iterator[tuple[list[int], Responses]]:  # fmt: skip
    """Yield responses in batches of similar prompt length, as (indices into prompts, responses).

    The seed of a response is computed from `seed`, `turn` and the prompt's number, so that different models
    answer a prompt with the same random numbers. limits: as for `generate`. places: the prompts' numbers, by default
    their indices. skip: called with the indices of a batch, returns whether to skip that batch; no other batch's
    responses change.
    """
    limits = [sampling.max_new_tokens] * len(prompts) if limits is None else limits
    parts = (seed,) if turn == 1 else (seed, turn)
    for rows in batches_by_length(
        [len(prompt) for prompt in prompts], limits, batch_size, max_positions(causal_lm(model).config)
    ):
        if not skip(rows):
            seeds = row_seeds([row if places is None else places[row] for row in rows], *parts)
            given = [limits[row] for row in rows]
            yield rows, generate(model, [prompts[row] for row in rows], sampling, tokenizer, seeds, limits=given)


def batches_by_length(
    lengths: Sequence[int], limits: Sequence[int], size: int, positions: int | None, *, longest_first: bool = False
) -> list[list[int]]:
    """Split prompts into batches of at most `size` prompts of similar length: lists of indices, sorted by length.

    lengths, limits: number of tokens of each prompt, and most tokens of its response. positions: the model's maximum
    sequence length. All rows of a batch are extended until the last one ends; a batch in which this takes more than
    `positions` tokens, though no single row does, is split.
    """
    batches: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: lengths[row], reverse=longest_first):
        rows = [*batches[-1], row] if batches else [row]
        width = max(lengths[one] for one in rows) + max(limits[one] for one in rows)
        fits = positions is None or width <= max(positions, *(lengths[one] + limits[one] for one in rows))
        if batches and len(rows) <= size and fits:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches
