"""PPO options, with defaults, that the recipe's `ppo` section and SalsaPPOConfig share."""

import dataclasses
from typing import Annotated, Any, Literal

from pydantic import Field

from salsa_peft.config.fields import Count, NonNegative, Positive, require_multiple
from salsa_peft.config.options.guards import parse_guards
from salsa_peft.config.options.mixture import ReferenceMixture
from salsa_peft.config.options.rollout import check_rollout_options
from salsa_peft.utils.errors import require

CRITIC_OPTIONS = ("lam", "lam_value", "lam_length_alpha", "vf_coef", "cliprange_value", "value_head_learning_rate",
                  "value_warmup_updates")  # fmt: skip
"""Options that have no effect without a critic (value none or group), where λ is 1."""


@dataclasses.dataclass(kw_only=True)
class Sampling:
    """Sampling of responses, without top-p and top-k, which would change the sampled distribution."""

    max_new_tokens: Count = 128
    """Maximum number of tokens of a response, EOS included. Source: TRL's response_length."""
    min_new_tokens: Annotated[int, Field(ge=0)] = 0
    """Number of tokens before EOS is allowed, in policy and references, so that short responses cannot lower the KL."""
    temperature: Positive = 1.0
    """Sampling temperature. Log-probs are computed at this temperature too. Source: TRL's default is 0.7."""


@dataclasses.dataclass(kw_only=True)
class PPOOptions(ReferenceMixture):
    """Options of PPO. Those that TRL's PPOConfig (1.12) has too are named as there.

    A plain dataclass, from which the recipe's `ppo` section and `SalsaPPOConfig` inherit.
    """

    num_ppo_epochs: Count = 4
    """Number of passes over a rollout batch. Source: TRL's default."""
    num_mini_batches: Count = 1
    """Number of optimizer steps in one pass over a rollout batch. Source: TRL's default."""
    rollout_batch_size: Count | None = None
    """Maximum number of responses generated or scored in one call. None: all in one call. Source: TRL's
    local_rollout_forward_batch_size."""
    micro_batch_tokens: Count | None = None
    """Maximum number of tokens, padding included, in one forward pass of training, or of policy, references and rewards
    when they score. A longer sequence has a forward pass of its own. None: no limit. Not for sharded weights. Example:
    4096."""
    rollout_backend: Literal["hf", "paged", "vllm"] = "hf"
    """hf: Transformers' generate. paged: Transformers' continuous batching. vllm: vLLM through TRL (the extra
    `vllm`)."""
    rollout_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Options of the backend. paged: fields of Transformers' ContinuousBatchingConfig. vllm: arguments of TRL's
    VLLMGeneration. config/options/rollout.py lists them. Example: {gpu_memory_utilization: 0.3}."""
    rollout_compile: bool = False
    """Generate with a static cache and a compiled decoding step (rollout_backend hf on CUDA)."""
    old_logprobs: Literal["recompute", "rollout"] = "recompute"
    """Source of log-probs and values before the update. recompute: a forward pass as in training. rollout: recorded
    during generation, which saves this forward pass but differs from it by rounding (noticeably in bf16)."""
    importance_sampling_correction: bool | None = None
    """Multiply the policy loss by truncated importance weights π/q, because the sampler q differs from the policy π as
    it is scored. None: true for paged and vllm, false for hf. Source: vllm_importance_sampling_correction of TRL's
    GRPO."""
    importance_sampling_mode: Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] = (
        "token_truncate"
    )
    """A weight for each token, or the product of a response's ratios for all its tokens; ratios outside the bounds are
    truncated to them, or set to 0. Source: verl's default; TRL's is sequence_mask."""
    importance_sampling_clip_max: Annotated[float, Field(ge=1)] | None = 3.0
    """Upper bound of the importance ratio. None: no bound. Source: TRL's default."""
    importance_sampling_clip_min: Annotated[float, Field(gt=0, le=1)] | None = None
    """Lower bound of the importance ratio. None: no bound. Source: TRL's default. Example: 0.1."""
    value: Literal["head", "adapter", "none", "group"] = "head"
    """Critic (docs/ppo.md compares the kinds). head: a linear head on the policy's trunk. adapter: a separate adapter
    with a head; it starts from the reward adapter or, without one, from the policy's. none: no critic; an advantage is
    the return minus the batch's mean return. group: no critic; num_generations responses to each prompt, and an
    advantage is the return minus the mean return of the prompt's other responses (RLOO's leave-one-out baseline)."""
    num_generations: Annotated[int, Field(ge=2)] = 4
    """Number of responses to one prompt with `value: group`. batch_size counts responses. Source: TRL's name."""
    logged_completions: Annotated[int, Field(ge=0)] = 4
    """Number of responses of each rollout batch that are written to completions.jsonl."""
    shown_every: Count | None = 10
    """Number of updates between two prints of responses to the terminal: the first two logged ones in short, or with
    log_completions TRL's table. None: no prints."""
    log_completions: bool = False
    """Print responses in TRL's table of completions, and send all of them to wandb and trackio if they are in report_to
    (TRL's name)."""
    num_completions_to_print: Count | None = None
    """Number of responses in TRL's table, drawn at random from the rollout batch (TRL's name). None: all.
    Example: 5."""
    kl_coef: NonNegative = 0.2
    """Initial KL coefficient β. A policy's kl_coef overrides it. Unit: reward per nat. Source: paper A.3, 0.2 for PPO
    and 0.01 for SALSA."""
    # The names are the keys of KL_ESTIMATORS in training/ppo/losses.py, and "full".
    kl_estimator: Literal["k1", "k2", "k3", "abs", "full"] = "k1"
    """Per-token estimate of KL(π ‖ reference): k1 = log π − log ref; k2, k3; abs = |k1|; full: exact KL.
    Source: Schulman, for k1 to k3."""
    kl_per: Literal["response", "token"] = "response"
    """KL penalty of a response: the sum over its tokens, or their mean. With the mean, short responses have no
    advantage over long ones. Logs, kl_target and the adaptive controller always use the sum."""
    kl_control: Literal["fixed", "adaptive"] = "adaptive"
    """adaptive: β is adapted to reach kl_target, as the paper's "initial" β implies. fixed: β stays. Source: Ziegler et
    al. (2019) and TRL 0.8."""
    kl_target: Positive = 6.0
    """Target KL of the adaptive controller. Unit: nats per response. Source: TRL 0.8's default."""
    kl_horizon: Positive = 10_000.0
    """Number of responses in which the adaptive β changes by a factor of at most about 1.2. Source: TRL 0.8's
    default."""
    kl_coef_min: NonNegative = 0.0
    """Lower bound of the adaptive β. Unit: reward per nat."""
    kl_coef_max: Positive | None = None
    """Upper bound of the adaptive β. None: no bound. Unit: reward per nat. Example: 1.0."""
    gamma: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Discount factor γ. Source: TRL's default."""
    lam: Annotated[float, Field(ge=0, le=1)] = 1.0
    """λ of generalized advantage estimation, for the policy's advantages. Source: docs/ppo.md compares it with TRL's
    0.95."""
    lam_value: Annotated[float, Field(ge=0, le=1)] | None = None
    """λ of the returns that the critic learns. None: the λ of the advantages. Source: VC-PPO (arXiv 2503.01491) has
    1. Example: 0.95."""
    lam_length_alpha: Positive | None = None
    """α of a length-dependent λ for the policy's advantages, λ = 1 − 1 / (α · response length), at least 0, in place of
    `lam`. None: `lam`. Source: VAPO (arXiv 2504.05118), with α 0.05 for answers of thousands of tokens. Example:
    0.05."""
    cliprange: Positive = 0.2
    """Clip range ε of the probability ratio in the policy loss. Source: TRL's default."""
    cliprange_value: Positive = 0.2
    """Clip range of the value's change in the value loss. Unit: reward. Source: TRL's default."""
    vf_coef: NonNegative = 0.001
    """Weight of the value loss. With `value: head` this loss also moves the policy's trunk, by a gradient that grows
    with the size of the rewards; with TRL's 0.1 the policy learned less (docs/ppo.md). Adam's steps of the head itself
    hardly depend on the weight. Source: docs/ppo.md."""
    value_head_learning_rate: Positive | None = None
    """Learning rate of the value head, whose weights start at zero, and its bias at the first rollout batch's mean
    return (not under DeepSpeed). None: learning_rate."""
    value_warmup_updates: Annotated[int, Field(ge=0)] = 0
    """Number of updates, the first ones, in which only the critic is trained, without the values' clip range, and the
    policy and β stay as they are. They are updates of the run like others: they count in num_train_epochs, max_steps
    and the learning rate's schedule. Not for sharded weights. Source: value pretraining of VC-PPO (arXiv
    2503.01491)."""
    whiten_rewards: bool = False
    """Scale per-token rewards to unit variance without shifting the mean. Source: TRL's default."""
    max_ratio: Positive = 10.0
    """Maximum mean probability ratio of a minibatch. Minibatches above it are skipped. Source: ratio_threshold of TRL
    0.8."""
    target_kl: Positive | None = None
    """Target of approxkl: above 1.5 · target_kl the update ends early. None: off. Unit: nats per token. Source: TRL
    0.8. Example: 0.1."""
    guards: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Name of a guard → off | warn | stop, or {action, limit}. training/ppo/guards/ describes them."""
    missing_eos_penalty: NonNegative | None = None
    """Penalty that is subtracted from the score of a response without EOS or end-of-turn token. None: off. Unit:
    reward. Source: TRL's field. Example: 1.0."""
    score_clip: Positive | None = None
    """Scores are clipped to [−score_clip, score_clip]. None: off. Unit: reward. Example: 5.0."""
    normalize_scores: bool = False
    """Divide scores by their running standard deviation. Source: use_score_scaling of TRL 0.8."""
    score_length_exponent: Annotated[float, Field(ge=-1, le=1)] = 0.0
    """Scores are multiplied by (length of the response / mean length in the rollout batch) ** this. -1: the score per
    token, which favors short responses. 1: a score that counts for each token, which favors long ones. Both are meant
    for scores above 0; scores below 0 are changed the other way round. Source: docs/ppo.md."""
    entropy_floor: Positive | None = None
    """Floor of the policy's entropy. In updates whose rollout batch has a lower mean entropy, each token's reward gets
    the bonus −entropy_coef · log π. None: off. Unit: nats per token. Source: adaptive entropy control of Skywork-OR1
    (arXiv 2505.22312), there in the loss. Example: 0.3."""
    entropy_coef: Positive = 0.05
    """Weight of the bonus with entropy_floor. Unit: reward per nat."""
    max_prompt_length: Count | None = None
    """Maximum number of tokens of a prompt; longer ones are dropped and logged. None: the model's maximum −
    max_new_tokens. Example: 512."""

    @property
    def steps_per_update(self) -> int:
        """Number of optimizer steps on one rollout batch."""
        return self.num_ppo_epochs * self.num_mini_batches

    @property
    def has_critic(self) -> bool:
        """Whether a value function is trained."""
        return self.value in ("head", "adapter")

    @property
    def responses_per_prompt(self) -> int:
        """Number of responses in a rollout batch to each of its prompts."""
        return self.num_generations if self.value == "group" else 1

    @property
    def corrects_sampling(self) -> bool:
        """Whether the policy loss is multiplied by importance weights."""
        if self.importance_sampling_correction is None:
            return self.rollout_backend != "hf"
        return self.importance_sampling_correction

    def check_shares(self, prefix: str, batch_size: int, micro_batch_size: int | None, processes: int = 1) -> int:
        """Number of responses of a minibatch that each process gets.

        Raises SalsaError unless all processes get the same number, and micro_batch_size divides this number. prefix: the
        section's key with a dot, for messages.
        """
        count, on = self.num_mini_batches, f"{processes} processes"
        of = f"num_mini_batches {count}" + (f" × {on}" if processes > 1 else "")
        require_multiple(f"{prefix}batch_size", batch_size, count * processes, of)
        group = self.responses_per_prompt
        require_multiple(f"{prefix}batch_size", batch_size, group, f"num_generations {group}")
        local, share = batch_size // processes, batch_size // (count * processes)
        micro = micro_batch_size or share
        require(
            share % micro == 0,
            f"{prefix}micro_batch_size: {micro} must divide {share}, the number of responses in a minibatch ({batch_size} /"
            f" {count}{f' / {on}' if processes > 1 else ''})",
        )
        rollout = self.rollout_batch_size or local
        require(
            processes == 1 or local % rollout == 0,
            f"{prefix}rollout_batch_size: {rollout} must divide {local}, the number of responses that each of {on}"
            " generates for a rollout batch",
        )
        return share

    def check_options(self, prefix: str) -> None:
        """Raise SalsaError for options that contradict one another. `prefix` starts the keys in messages."""
        parse_guards(self.guards, f"{prefix}guards")
        self._check_critic(prefix)
        self.check_mixture(prefix)
        require(
            self.entropy_floor is not None or self.entropy_coef == PPOOptions.entropy_coef,
            f"{prefix}entropy_coef: {self.entropy_coef:g} has no effect without entropy_floor; set entropy_floor, or remove"
            " it",
        )
        require(
            not self.log_completions or self.shown_every is not None,
            f"{prefix}log_completions: has no effect with shown_every null; set shown_every to a number of updates",
        )
        require(
            self.log_completions or self.num_completions_to_print is None,
            f"{prefix}num_completions_to_print: {self.num_completions_to_print} has no effect without log_completions; set"
            " log_completions=true",
        )
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
        for name in ("importance_sampling_mode", "importance_sampling_clip_max", "importance_sampling_clip_min"):
            require(
                self.corrects_sampling or getattr(self, name) == getattr(PPOOptions, name),
                f"{prefix}{name}: {getattr(self, name)} has no effect without importance_sampling_correction; remove it, or"
                " set importance_sampling_correction=true",
            )
        for conflict, why in (
            (self.rollout_compile, "rollout_compile: a compiled step records no log-probs"),
            (
                self.old_logprobs == "rollout",
                "old_logprobs rollout: the old log-probs are then the sampler's, so that every ratio is 1",
            ),
        ):
            require(
                not (self.corrects_sampling and conflict),
                f"{prefix}importance_sampling_correction: true does not work with {why}. Set it to false",
            )
        require(
            self.kl_coef_min <= self.kl_coef,
            f"{prefix}kl_coef: {self.kl_coef:g} is below kl_coef_min {self.kl_coef_min:g}; change one of the two",
        )
        require(
            self.kl_coef_max is None or self.kl_coef <= self.kl_coef_max,
            f"{prefix}kl_coef: {self.kl_coef:g} is above kl_coef_max {self.kl_coef_max or 0:g}; change one of the two",
        )

    def _check_critic(self, prefix: str) -> None:
        """Raise SalsaError for options of the critic or of groups that would have no effect."""
        for name in () if self.has_critic else CRITIC_OPTIONS:
            found, default = getattr(self, name), getattr(PPOOptions, name)
            require(
                found == default,
                f"{prefix}{name}: {found} has no effect with value {self.value}, which has no critic; set"
                f" {prefix}{name}={'null' if default is None else default}, or value=head",
            )
        require(
            self.vf_coef > 0 or not self.value_warmup_updates,
            f"{prefix}value_warmup_updates: {self.value_warmup_updates} has no effect with vf_coef 0, with which the critic"
            " is not trained; set value_warmup_updates=0",
        )
        require(
            self.value == "group" or self.num_generations == PPOOptions.num_generations,
            f"{prefix}num_generations: {self.num_generations} has no effect with value {self.value}; remove it, or set"
            " value=group",
        )
        require(
            self.lam_length_alpha is None or self.lam == PPOOptions.lam,
            f"{prefix}lam: {self.lam:g} has no effect with lam_length_alpha, from which the policy's λ is computed; remove"
            " one of the two (lam_value is the critic's λ)",
        )


_LATER = {
    "score_length_exponent",
    "entropy_floor",
    "entropy_coef",
    *(f.name for f in dataclasses.fields(ReferenceMixture)),
}
LATER_OPTIONS = {field.name: field.default for field in dataclasses.fields(PPOOptions) if field.name in _LATER}
"""Options of the result that earlier versions lack → default. At the default they are left out of cache keys and of what
must match on resume, so that runs of earlier versions stay valid."""
