"""The engine's own options: plain dataclasses that the recipe's sections and SalsaPPOConfig inherit, so a default stands once."""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated, Any, Literal

from pydantic import Field

from salsa_peft.config.fields import Count, NonNegative, Positive
from salsa_peft.config.options.guards import parse_guards
from salsa_peft.config.options.rollout import check_rollout_options
from salsa_peft.utils.errors import require


@dataclasses.dataclass(kw_only=True)
class Sampling:
    """How responses are sampled. Top-p and top-k do not exist here: log-probs must be those of what was sampled."""

    max_new_tokens: Count = 128
    """Longest response, EOS included (TRL's response_length)."""
    min_new_tokens: Annotated[int, Field(ge=0)] = 0
    """EOS and the ends of a turn are forbidden before this many tokens, in policy and reference log-probs alike. A remedy for the KL-hack."""
    temperature: Positive = 1.0
    """Of sampling; log-probs are those of this distribution (TRL's default is 0.7)."""


@dataclasses.dataclass(kw_only=True)
class PPOOptions:
    """The engine's own options, in the names of TRL's PPOConfig (1.12) where the thing is the same.

    A plain dataclass: the recipe's `ppo` section and `SalsaPPOConfig` both inherit these fields and defaults.
    """

    num_ppo_epochs: Count = 4
    """Passes over a rollout batch (TRL)."""
    num_mini_batches: Count = 1
    """Optimizer steps in one such pass (TRL)."""
    rollout_batch_size: Count | None = None
    """Responses generated, or scored, in one call (TRL: local_rollout_forward_batch_size). None: the rollout batch."""
    rollout_backend: Literal["hf", "paged", "vllm"] = "hf"
    """What generates: Transformers' generate, its continuous batching, or vLLM through TRL (the extra `vllm`)."""
    rollout_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    """More for paged (of Transformers' ContinuousBatchingConfig) or vllm (of TRL's VLLMGeneration); names in config/options/rollout.py."""
    rollout_compile: bool = False
    """hf on CUDA: a static cache, and the decoding step compiled."""
    old_logprobs: Literal["recompute", "rollout"] = "recompute"
    """Log-probs and values before the update: from a forward of their own, as training computes them, or as they fell out of
    generation, which saves that forward and differs from it by rounding (much in bf16)."""
    value: Literal["head", "adapter"] = "head"
    """head: a linear head on the policy's trunk. adapter: an adapter `value` too, both started from the reward adapter's."""
    logged_completions: Annotated[int, Field(ge=0)] = 4
    """Responses of each rollout batch that completions.jsonl keeps."""
    shown_every: Count | None = 10
    """Updates between two looks at the first two of these in the terminal. None: never."""
    kl_coef: NonNegative = 0.2
    """β at the start. Paper A.3: 0.2 for PPO, 0.01 for SALSA; policies give their own."""
    kl_estimator: Literal["k1", "k2", "k3", "abs", "full"] = "k1"
    """Per-token estimate of KL(π ‖ reference): k1 = log π − log ref; k2, k3 (Schulman), abs, or exact over the vocabulary."""
    kl_per: Literal["response", "token"] = "response"
    """What the score is weighed against: the KL summed over a response, or its mean over the response's tokens. The mean takes
    away the gain of short responses, a remedy for the KL-hack. Logs, target and controller go by the sum always."""
    kl_control: Literal["fixed", "adaptive"] = "adaptive"
    """adaptive: β follows kl_target (Ziegler et al., 2019; the paper's "initial KL coefficient", TRL 0.8)."""
    kl_target: Positive = 6.0
    """Nats per response (TRL 0.8)."""
    kl_horizon: Positive = 10_000.0
    """Responses in which β can change by about ×1.2 (TRL 0.8)."""
    kl_coef_min: NonNegative = 0.0
    """Adaptive β stays at or above this."""
    kl_coef_max: Positive | None = None
    """Adaptive β stays at or below this. None: no bound."""
    gamma: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Discount (TRL)."""
    lam: Annotated[float, Field(ge=0, le=1)] = 0.95
    """GAE's λ (TRL)."""
    cliprange: Positive = 0.2
    """ε of the policy loss (TRL)."""
    cliprange_value: Positive = 0.2
    """Clip of the value's change in its loss (TRL)."""
    vf_coef: NonNegative = 0.1
    """Weight of the value loss (TRL)."""
    value_head_learning_rate: Positive | None = None
    """Of the value head, which starts at zero and may need a higher one than the policy. None: learning_rate."""
    whiten_rewards: bool = False
    """Scale per-token rewards to unit variance (TRL); the mean is kept."""
    max_ratio: Positive = 10.0
    """A minibatch whose mean probability ratio passes this is skipped (TRL 0.8's ratio_threshold)."""
    target_kl: Positive | None = None
    """An update's later minibatches are left out once one moved the policy by more than 1.5 times this (approxkl, nats per
    token; TRL 0.8's early_stopping). None: off."""
    guards: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Name → off | warn | stop, or {action, limit}: what training/ppo/guards.py watches. Those not named warn, at their own limits."""
    missing_eos_penalty: NonNegative | None = None
    """Taken off the score of a response that no EOS or end of a turn closed (TRL). None: off."""
    score_clip: Positive | None = None
    """Scores are clipped to ± this. None: off."""
    normalize_scores: bool = False
    """Divide scores by their running standard deviation (TRL 0.8's use_score_scaling)."""
    max_prompt_length: Count | None = None
    """Longer prompts are left out, and counted. None: what the model's length leaves beside max_new_tokens."""

    def check_batches(self, prefix: str, batch_size: int, micro_batch_size: int | None) -> None:
        """Raise SalsaError unless a rollout batch cuts into minibatches, these into micro-batches; `prefix` stands before keys."""
        minibatch, rest = divmod(batch_size, self.num_mini_batches)
        require(
            rest == 0,
            f"{prefix}batch_size: found {batch_size}, expected a multiple of num_mini_batches {self.num_mini_batches};"
            f" set {prefix}batch_size={math.ceil(batch_size / self.num_mini_batches) * self.num_mini_batches}",
        )
        micro = micro_batch_size or minibatch
        require(
            minibatch % micro == 0,
            f"{prefix}micro_batch_size: found {micro}, expected a divisor of the minibatch, {batch_size} /"
            f" {self.num_mini_batches} = {minibatch} responses",
        )

    def check_shares(self, prefix: str, batch_size: int, micro_batch_size: int | None, processes: int) -> int:
        """Responses of a minibatch that each process has. Raises SalsaError unless they are as many in each, and cut into micro-batches."""
        share, rest = divmod(batch_size // self.num_mini_batches, processes)
        require(
            rest == 0,
            f"{prefix}batch_size / num_mini_batches: found minibatches of {batch_size // self.num_mini_batches} responses for"
            f" {processes} processes, expected a multiple of them; set"
            f" {prefix}batch_size={math.ceil(batch_size / (self.num_mini_batches * processes)) * self.num_mini_batches * processes}",
        )
        micro, local = micro_batch_size or share, batch_size // processes
        require(
            share % micro == 0,
            f"{prefix}micro_batch_size: found {micro}, expected a divisor of {share}, the responses of a minibatch that each of"
            f" {processes} processes has",
        )
        rollout = self.rollout_batch_size or local
        require(
            processes == 1 or local % rollout == 0,
            f"{prefix}rollout_batch_size: found {rollout}, expected a divisor of {local}, the responses that each of {processes}"
            " processes has",
        )
        return share

    def check_options(self, prefix: str) -> None:
        """Raise SalsaError for options that contradict one another; `prefix` stands before keys."""
        parse_guards(self.guards, f"{prefix}guards")
        rollout = self.old_logprobs == "rollout"
        check_rollout_options(
            prefix, self.rollout_backend, self.rollout_options, compiled=self.rollout_compile, recorded=rollout
        )
        require(
            not (rollout and self.rollout_backend != "hf"),
            f"{prefix}old_logprobs: found rollout with rollout_backend {self.rollout_backend}, expected recompute: only hf samples"
            " with the numbers that the update uses",
        )
        require(
            not (rollout and self.kl_estimator == "full"),
            f"{prefix}old_logprobs: found rollout with kl_estimator full, expected recompute: the exact KL needs the policy's states",
        )
        require(
            self.kl_coef_max is None or self.kl_coef_min <= self.kl_coef <= self.kl_coef_max,
            f"{prefix}kl_coef: found {self.kl_coef:g}, expected between kl_coef_min {self.kl_coef_min:g} and kl_coef_max"
            f" {self.kl_coef_max or 0:g}",
        )
        require(
            self.kl_coef_min <= self.kl_coef,
            f"{prefix}kl_coef: found {self.kl_coef:g}, expected at least kl_coef_min {self.kl_coef_min:g}",
        )
