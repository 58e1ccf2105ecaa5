"""PPO options that the recipe's `ppo` section and SalsaPPOConfig share, each with one default."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

from pydantic import Field

from salsa_peft.config.fields import Count, NonNegative, Positive, require_multiple
from salsa_peft.config.options.guards import parse_guards
from salsa_peft.config.options.rollout import check_rollout_options
from salsa_peft.utils.errors import require


@dataclasses.dataclass(kw_only=True)
class Sampling:
    """Sampling of responses. No top-p or top-k: log-probs must be those of the sampled distribution."""

    max_new_tokens: Count = 128
    """Maximum length of a response, EOS included (TRL's response_length)."""
    min_new_tokens: Annotated[int, Field(ge=0)] = 0
    """Tokens before EOS can occur, in policy and references. Prevents lowering the KL by short responses."""
    temperature: Positive = 1.0
    """Sampling temperature. Log-probs are computed at this temperature too (TRL's default is 0.7)."""


@dataclasses.dataclass(kw_only=True)
class PPOOptions:
    """Options of PPO, under the names of TRL's PPOConfig (1.12) where it has the same option.

    A plain dataclass, from which the recipe's `ppo` section and `SalsaPPOConfig` inherit.
    """

    num_ppo_epochs: Count = 4
    """Passes over a rollout batch (default: TRL)."""
    num_mini_batches: Count = 1
    """Optimizer steps in one pass over a rollout batch (default: TRL)."""
    rollout_batch_size: Count | None = None
    """Responses generated or scored in one call (TRL: local_rollout_forward_batch_size). None: the rollout batch."""
    rollout_backend: Literal["hf", "paged", "vllm"] = "hf"
    """hf: Transformers' generate. paged: its continuous batching. vllm: vLLM through TRL (the extra `vllm`)."""
    rollout_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Options of the backend: paged, fields of Transformers' ContinuousBatchingConfig; vllm, arguments of TRL's
    VLLMGeneration. config/options/rollout.py lists them."""
    rollout_compile: bool = False
    """hf on CUDA: generate with a static cache and a compiled decoding step."""
    old_logprobs: Literal["recompute", "rollout"] = "recompute"
    """Log-probs and values before the update. recompute: from a forward pass as in training. rollout: recorded while
    generating, which saves the forward pass but differs from it by rounding (noticeably in bf16)."""
    value: Literal["head", "adapter"] = "head"
    """Value model. head: a linear head on the policy's trunk. adapter: an adapter of its own with a head, both
    initialized from the reward adapter."""
    logged_completions: Annotated[int, Field(ge=0)] = 4
    """Responses of each rollout batch that are written to completions.jsonl."""
    shown_every: Count | None = 10
    """Updates between two prints of the first two of these responses to the terminal. None: never."""
    kl_coef: NonNegative = 0.2
    """Initial KL coefficient β. Paper A.3: 0.2 for PPO, 0.01 for SALSA. A policy's kl_coef overrides it."""
    # The names are the keys of KL_ESTIMATORS in training/ppo/losses.py, and "full".
    kl_estimator: Literal["k1", "k2", "k3", "abs", "full"] = "k1"
    """Per-token estimate of KL(π ‖ reference): k1 = log π − log ref; k2, k3 (Schulman); abs = |k1|; full: exact."""
    kl_per: Literal["response", "token"] = "response"
    """KL penalty of a response: the sum over its tokens, or their mean. With the mean, short responses have no
    advantage over long ones. Logs, kl_target and the adaptive controller always use the sum."""
    kl_control: Literal["fixed", "adaptive"] = "adaptive"
    """adaptive: β follows kl_target (Ziegler et al., 2019; TRL 0.8; the paper's "initial KL coefficient")."""
    kl_target: Positive = 6.0
    """Target KL of the adaptive controller, nats per response (default: TRL 0.8)."""
    kl_horizon: Positive = 10_000.0
    """Number of responses in which the adaptive β changes by a factor of at most about 1.2 (default: TRL 0.8)."""
    kl_coef_min: NonNegative = 0.0
    """Lower bound of the adaptive β."""
    kl_coef_max: Positive | None = None
    """Upper bound of the adaptive β. None: no bound."""
    gamma: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Discount factor γ (default: TRL)."""
    lam: Annotated[float, Field(ge=0, le=1)] = 0.95
    """λ of generalized advantage estimation (default: TRL)."""
    cliprange: Positive = 0.2
    """Clip range ε of the probability ratio in the policy loss (default: TRL)."""
    cliprange_value: Positive = 0.2
    """Clip range of the value's change in the value loss (default: TRL)."""
    vf_coef: NonNegative = 0.1
    """Weight of the value loss (default: TRL)."""
    value_head_learning_rate: Positive | None = None
    """Learning rate of the value head, which starts at zero. None: learning_rate."""
    whiten_rewards: bool = False
    """Scale per-token rewards to unit variance without shifting the mean (default: TRL)."""
    max_ratio: Positive = 10.0
    """A minibatch whose mean probability ratio exceeds this is skipped (TRL 0.8: ratio_threshold)."""
    target_kl: Positive | None = None
    """Skip the rest of an update once approxkl exceeds 1.5 times this, nats per token (TRL 0.8). None: off."""
    guards: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Guard → off | warn | stop, or {action, limit}. training/ppo/guards.py describes the guards."""
    missing_eos_penalty: NonNegative | None = None
    """Subtracted from the score of a response without EOS or end-of-turn token (TRL). None: off."""
    score_clip: Positive | None = None
    """Scores are clipped to [−score_clip, score_clip]. None: off."""
    normalize_scores: bool = False
    """Divide scores by their running standard deviation (TRL 0.8: use_score_scaling)."""
    max_prompt_length: Count | None = None
    """Longer prompts are dropped, and their number is logged. None: the model's maximum length less max_new_tokens."""

    @property
    def steps_per_update(self) -> int:
        """Optimizer steps on one rollout batch."""
        return self.num_ppo_epochs * self.num_mini_batches

    def check_shares(self, prefix: str, batch_size: int, micro_batch_size: int | None, processes: int = 1) -> int:
        """Responses of a minibatch that each process gets.

        Raises SalsaError unless all processes get the same number, and each share divides into micro-batches. prefix:
        the section's key with a dot, for messages.
        """
        count, on = self.num_mini_batches, f"{processes} processes"
        of = f"num_mini_batches {count}" + (f" × {on}" if processes > 1 else "")
        require_multiple(f"{prefix}batch_size", batch_size, count * processes, of)
        local, share = batch_size // processes, batch_size // (count * processes)
        micro = micro_batch_size or share
        require(
            share % micro == 0,
            f"{prefix}micro_batch_size: {micro} does not divide the minibatch of {batch_size} / {count}"
            f"{f' / {on}' if processes > 1 else ''} = {share} responses",
        )
        rollout = self.rollout_batch_size or local
        require(
            processes == 1 or local % rollout == 0,
            f"{prefix}rollout_batch_size: {rollout} does not divide {local}, the responses of a rollout batch on each"
            f" of {on}",
        )
        return share

    def check_options(self, prefix: str) -> None:
        """Raise SalsaError for options that contradict one another. `prefix` starts the keys in messages."""
        parse_guards(self.guards, f"{prefix}guards")
        backend = self.rollout_backend
        check_rollout_options(prefix, backend, self.rollout_options)
        require(
            backend == "hf" or not self.rollout_compile,
            f"{prefix}rollout_compile: rollout_backend {backend} cannot be compiled; set rollout_compile=false or use"
            " hf",
        )
        for conflict, why in (  # the recording hook would be compiled away without an error
            (self.rollout_compile, "rollout_compile, because a compiled step records no log-probs"),
            (backend != "hf", f"rollout_backend {backend}, because only hf computes log-probs as the update does"),
            (self.kl_estimator == "full", "kl_estimator full, which needs the policy's hidden states"),
        ):
            require(
                self.old_logprobs == "recompute" or not conflict,
                f"{prefix}old_logprobs: rollout does not work with {why}; use recompute",
            )
        require(
            self.kl_coef_min <= self.kl_coef,
            f"{prefix}kl_coef: {self.kl_coef:g} is below kl_coef_min {self.kl_coef_min:g}",
        )
        require(
            self.kl_coef_max is None or self.kl_coef <= self.kl_coef_max,
            f"{prefix}kl_coef: {self.kl_coef:g} is above kl_coef_max {self.kl_coef_max or 0:g}",
        )
