"""The recipe's schema: every section, every default once, its unit and source in the docstring under the field.

Nothing here imports torch: a recipe is parsed and refused within two seconds. `parsing.py` makes a `Recipe` out of YAML,
an adapter preset and `--set`; this file says what a Recipe may hold and what must fit together.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")
SEED = re.compile(r"seed-(\d+)\Z")
STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]


class SalsaError(ValueError):
    """Something the user can mend: one line that says what was found, what was expected and what to do."""


def require(condition: bool, message: str) -> None:
    """Raise SalsaError(message) unless condition."""
    if not condition:
        raise SalsaError(message)


def _source(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


@dataclass(config=STRICT, kw_only=True)
class Source:
    """A dataset: a Hub id, a local folder or a local jsonl file (a bare string is its path)."""

    path: str
    """Hub id, folder, or .jsonl / .json / .parquet file; relative to the recipe's folder (`--set`: to the current one)."""
    name: str | None = None
    """The Hub dataset's configuration."""
    split: str = "train"
    """Split on the Hub or in a folder; a single file is its own split."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    limit: Count | None = None
    """Use only that many rows, the first after shuffling with a fixed seed. None: all."""


DataSource = Annotated[Source, BeforeValidator(_source)]


@dataclass(config=STRICT, kw_only=True)
class Model:
    """The base that every role shares."""

    base: str | None = None
    """Hub id or folder of a causal language model. None: the embedded world's base (needs a `toy` section)."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the base's weights. auto: bfloat16 on CUDA, float32 on a CPU. Adapters and heads are float32 always."""
    attn_implementation: str | None = None
    """As in Transformers: sdpa, eager, flash_attention_2 … None: Transformers' choice."""
    max_length: Count = 1024
    """Tokens of a training sequence (SFT, reward) and of prompt + response in PPO. Paper A.1: 2048."""
    chat_template: str | None = None
    """A Jinja file with {% generation %} marks, of ours (chatml, zephyr) or yours. None: the embedded world's own."""


@dataclass(config=STRICT, kw_only=True)
class Adapter:
    """LoRA, in PEFT's own field names (LoraConfig)."""

    r: Count = 16
    """Rank."""
    lora_alpha: Positive = 32
    """The delta is scaled by lora_alpha / r (rsLoRA: / √r)."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """In SFT and reward training; off in PPO."""
    target_modules: str | list[str] = "all-linear"
    """Module names, or all-linear."""
    use_rslora: bool = False
    """Scale by lora_alpha / √r."""


@dataclass(config=STRICT, kw_only=True)
class Data:
    """What is trained on. None: the embedded world's own."""

    demonstrations: DataSource | None = None
    """SFT: rows with `messages` (chats that end with the assistant)."""
    preferences: DataSource | None = None
    """Reward model: rows with `chosen` and `rejected` (and `prompt`, unless the two hold it)."""
    prompts: DataSource | None = None
    """PPO: rows with `prompt` (or `messages`, whose last assistant turn is dropped)."""


@dataclass(config=STRICT, kw_only=True)
class Training:
    """What every training stage shares, in TrainingArguments' names."""

    learning_rate: Positive = 5e-5
    """Peak."""
    num_train_epochs: Positive = 1.0
    """Passes over the data."""
    max_steps: int = -1
    """Optimizer steps; −1: what the epochs give."""
    batch_size: Count = 8
    """Rows of one optimizer step, global (PPO: responses of one rollout batch)."""
    micro_batch_size: Count | None = None
    """Rows of one forward. None: the whole batch."""
    weight_decay: NonNegative = 0.0
    """AdamW's."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the steps in which the rate rises."""
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    """As in Transformers."""
    max_grad_norm: Positive = 1.0
    """Gradients are clipped to this norm."""
    gradient_checkpointing: bool = False
    """Trade time for memory."""

    def check(self, section: str) -> None:
        """Raise SalsaError where the batch does not divide into micro-batches."""
        micro = self.micro_batch_size or self.batch_size
        require(
            self.batch_size % micro == 0,
            f"{section}.batch_size: found {self.batch_size}, expected a multiple of micro_batch_size {micro};"
            f" set {section}.batch_size={math.ceil(self.batch_size / micro) * micro} or another micro_batch_size",
        )


@dataclass(config=STRICT, kw_only=True)
class SFT(Training):
    """Supervised fine-tuning of the seeds (TRL's SFTTrainer, loss on the assistant's tokens only)."""

    seeds: Annotated[list[Seed], Field(min_length=1)] = dataclasses.field(default_factory=lambda: [0, 1])
    """One run each; `seed-N` and soup members are positions in this list. A seed sets data order and adapter initialisation."""
    learning_rate: Positive = 2.5e-5
    """Paper A.1."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.03
    """Paper A.1."""
    subset: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Each seed trains on its own random share of the rows. 1: all (the paper)."""


@dataclass(config=STRICT, kw_only=True)
class Reward(Training):
    """The reward model (TRL's RewardTrainer): starts from seed-0, linear head on the last token."""

    learning_rate: Positive = 2.0e-5
    """Paper A.2."""
    weight_decay: NonNegative = 0.001
    """Paper A.2."""
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Share of the pairs kept from training, for the accuracy that the metrics give."""


@dataclass(config=STRICT, kw_only=True)
class Soup:
    """The weight average of seeds: θ = Σ w_i θ_i."""

    members: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] = dataclasses.field(
        default_factory=lambda: [0, 1]
    )
    """Positions in sft.seeds."""
    weights: list[float] | None = None
    """One per member, sum 1. None: uniform (α = ½ for two, the paper's best)."""

    @property
    def resolved(self) -> list[float]:
        """The weights, uniform where none are given."""
        return self.weights if self.weights is not None else [1 / len(self.members)] * len(self.members)

    def check(self, where: str, seeds: int) -> None:
        """Raise SalsaError for members that are not there and weights that don't fit."""
        for member in self.members:
            require(member < seeds, f"{where}.members: found seed {member}, expected positions 0 to {seeds - 1} of sft.seeds")
        require(len(set(self.members)) == len(self.members), f"{where}.members: found {self.members}, expected no member twice")
        require(
            len(self.resolved) == len(self.members),
            f"{where}.weights: found {len(self.resolved)} weights for {len(self.members)} members, expected one each",
        )
        total = sum(self.resolved)
        require(
            abs(total - 1) < 1e-6,
            f"{where}.weights: found {self.resolved}, which sum to {total:g}, expected a sum of 1; scale them",
        )


@dataclasses.dataclass(kw_only=True)
class Sampling:
    """How responses are sampled. Top-p and top-k do not exist here: log-probs must be those of what was sampled."""

    max_new_tokens: Count = 128
    """Longest response, EOS included (TRL's response_length)."""
    min_new_tokens: Annotated[int, Field(ge=0)] = 0
    """EOS is forbidden before this many tokens, in policy and reference log-probs alike. A remedy for the KL-hack."""
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
    logged_completions: Annotated[int, Field(ge=0)] = 4
    """Responses of each rollout batch that completions.jsonl keeps."""
    kl_coef: NonNegative = 0.2
    """β at the start. Paper A.3: 0.2 for PPO, 0.01 for SALSA; policies give their own."""
    kl_estimator: Literal["k1", "k2", "k3", "abs", "full"] = "k1"
    """Per-token estimate of KL(π ‖ reference): k1 = log π − log ref; k2, k3 (Schulman), abs, or exact over the vocabulary."""
    kl_control: Literal["fixed", "adaptive"] = "adaptive"
    """adaptive: β follows kl_target (Ziegler et al., 2019; the paper's "initial KL coefficient", TRL 0.8)."""
    kl_target: Positive = 6.0
    """Nats per response (TRL 0.8)."""
    kl_horizon: Positive = 10_000.0
    """Responses in which β can change by about ×1.2 (TRL 0.8)."""
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
    whiten_rewards: bool = False
    """Scale per-token rewards to unit variance (TRL); the mean is kept."""
    max_ratio: Positive = 10.0
    """A minibatch whose mean probability ratio passes this is skipped (TRL 0.8's ratio_threshold)."""
    missing_eos_penalty: NonNegative | None = None
    """Taken off the score of a response without EOS (TRL). None: off."""
    score_clip: Positive | None = None
    """Scores are clipped to ± this. None: off."""
    normalize_scores: bool = False
    """Divide scores by their running standard deviation (TRL 0.8's use_score_scaling)."""
    max_prompt_length: Count | None = None
    """Longer prompts are left out, and counted. None: what the model's length leaves beside max_new_tokens."""

    def check_batches(self, section: str, batch_size: int, micro_batch_size: int | None) -> None:
        """Raise SalsaError unless a rollout batch cuts into minibatches, these into micro-batches, and itself into calls."""
        minibatch, rest = divmod(batch_size, self.num_mini_batches)
        require(
            rest == 0,
            f"{section}.batch_size: found {batch_size}, expected a multiple of num_mini_batches {self.num_mini_batches};"
            f" set {section}.batch_size={math.ceil(batch_size / self.num_mini_batches) * self.num_mini_batches}",
        )
        micro = micro_batch_size or minibatch
        require(
            minibatch % micro == 0,
            f"{section}.micro_batch_size: found {micro}, expected a divisor of the minibatch, {batch_size} /"
            f" {self.num_mini_batches} = {minibatch} responses",
        )


@dataclass(config=STRICT, kw_only=True)
class PPO(PPOOptions, Training):
    """PPO, the same for every policy; `generation` gives temperature and lengths."""

    learning_rate: Positive = 2.0e-6
    """Paper A.3 (Gemma: 1e-7)."""
    num_train_epochs: Positive = 2.0
    """Passes over the prompts. Paper A.3, "2 epochs of training" as we read it."""
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    """As in Transformers (TRL's PPO: linear)."""
    seed: Seed = 0
    """Of sampling, prompt order and minibatches; the same for every policy."""

    def check(self, section: str) -> None:
        """Batches must divide."""
        self.check_batches(section, self.batch_size, self.micro_batch_size)


@dataclass(config=STRICT, kw_only=True)
class Reference:
    """What the KL term looks at: the base plus a weighted sum of seeds' deltas, or another adapter.

    seed-N is one member at 1, a soup its members at weights of sum 1, `shrunk` one member at a scale, `base` no member.
    """

    label: str
    members: list[int] = dataclasses.field(default_factory=list)
    weights: list[float] = dataclasses.field(default_factory=list)
    soup: bool = False
    """The recipe's own soup (the soup stage's output)."""
    path: str | None = None
    """A folder or Hub id of a LoRA adapter of the same base."""


def _shrunk(where: str, value: Any) -> Reference:
    given = value if isinstance(value, dict) else {}
    seed, scale = given.get("seed", 0), given.get("scale")
    found = f"{where}.shrunk: found {value!r}"
    require(set(given) <= {"seed", "scale"} and type(seed) is int and seed >= 0, f"{found}, expected {{seed: N, scale: λ}}")
    require(_is_number(scale), f"{found}, expected a number for scale, such as 0.6")
    return Reference(label=f"{scale:g}·seed-{seed}", members=[seed], weights=[float(given["scale"])])


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _inline_soup(where: str, value: Any) -> Reference:
    given = value if isinstance(value, dict) else {}
    members, weights = given.get("members", [0, 1]), given.get("weights")
    fits = set(given) <= {"members", "weights"} and isinstance(members, list) and isinstance(weights, list | None)
    fits = fits and bool(members) and all(type(m) is int and m >= 0 for m in members) and all(map(_is_number, weights or []))
    require(fits, f"{where}.soup: found {value!r}, expected {{members: [0, 1], weights: [0.5, 0.5]}}")
    soup = Soup(members=members, weights=None if weights is None else [float(w) for w in weights])
    soup.check(f"{where}.soup", max(members) + 1)  # whether these seeds are there is seen with the recipe
    return Reference(label="soup of " + ", ".join(f"{w:g}·seed-{m}" for w, m in zip(soup.resolved, members, strict=False)),
                     members=members, weights=soup.resolved)  # fmt: skip


REFERENCE_KINDS = {"soup": _inline_soup, "shrunk": _shrunk}


def parse_reference(where: str, value: Any) -> list[Reference]:
    """What a policy's `reference:` says → a list of references (their KLs are averaged).

    A string: seed-N, base, soup, or a folder or Hub id of an adapter; a mapping: one of REFERENCE_KINDS; a list of these.
    Raises SalsaError that names the key.
    """
    if isinstance(value, list):
        require(bool(value), f"{where}: found an empty list, expected at least one reference")
        return [reference for index, entry in enumerate(value) for reference in parse_reference(f"{where}[{index}]", entry)]
    if isinstance(value, dict) and len(value) == 1 and next(iter(value)) in REFERENCE_KINDS:
        kind, options = next(iter(value.items()))
        return [REFERENCE_KINDS[kind](where, options)]
    require(
        isinstance(value, str) and bool(value),
        f"{where}: found {value!r}, expected seed-N, base, soup, {{soup: …}}, {{shrunk: …}}, an adapter's path or a list of these",
    )
    if seed := SEED.match(value):
        return [Reference(label=value, members=[int(seed[1])], weights=[1.0])]
    if value == "base":
        return [Reference(label="base")]
    if value == "soup":
        return [Reference(label="soup", soup=True)]
    return [Reference(label=value.rstrip("/").rsplit("/", 1)[-1], path=value)]


@dataclass(config=STRICT, kw_only=True)
class Policy:
    """One PPO run."""

    reference: Any
    """seed-N | base | soup | {soup: {members, weights}} | {shrunk: {seed, scale}} | an adapter's path | a list of these."""
    kl_coef: NonNegative | None = None
    """β at the start. None: ppo.kl_coef."""

    def references(self, where: str) -> list[Reference]:
        """The parsed reference list."""
        return parse_reference(f"{where}.reference", self.reference)


@dataclass(config=STRICT, kw_only=True)
class Generation(Sampling):
    """Sampling of PPO, landscape and evaluation alike."""

    batch_size: Count = 64
    """Prompts of one generation call in landscape and evaluation."""


@dataclass(config=STRICT, kw_only=True)
class Landscape:
    """Mean score along a line and on a plane of seeds' weights (paper, Figure 2)."""

    line: list[int] | None = dataclasses.field(default_factory=lambda: [0, 1])
    """Two positions in sft.seeds: θ = (1 − α) θ_a + α θ_b. None: no line."""
    alphas: list[float] = dataclasses.field(default_factory=lambda: [-0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5])
    """Points of the line."""
    scales: list[float] = dataclasses.field(default_factory=lambda: [0.0, 0.2, 0.4, 0.6, 0.8])
    """λ of the control beside it: base + λ·δ of the line's first seed. An empty list: none."""
    plane: list[int] | None = None
    """Three positions in sft.seeds. None: no plane."""
    resolution: Count = 4
    """Steps along an edge of the triangle; the grid reaches one step beyond it."""
    prompts: str | None = None
    """Which of evaluate.prompts; None: the first."""
    limit: Count | None = None
    """Prompts at each point. None: all of them."""
    seed: Seed = 0
    """Sampling seed, the same at each point."""


@dataclass(config=STRICT, kw_only=True)
class Evaluate:
    """Responses of seed-0, soup and every policy on held-out prompts."""

    prompts: dict[str, DataSource] = dataclasses.field(default_factory=dict)
    """Name → prompts. Empty: the embedded world's two sets."""
    pairs: list[list[str]] = dataclasses.field(default_factory=list)
    """Pairs to compare. Empty: every policy and the soup against seed-0, and every two policies."""
    models: list[str] = dataclasses.field(default_factory=list)
    """Also these, as references are written: base, seed-1 … (strings only). seed-0, soup and policies are always in."""
    samples: Count = 5
    """Prompts whose responses the report shows side by side."""
    seed: Seed = 1
    """Sampling seed."""


@dataclass(config=STRICT, kw_only=True)
class Toy:
    """The embedded world (toy.py): its tiny Llama, and how much of which data is written. Numbers of rows unless said otherwise."""

    seed: Seed = 0
    """of everything random in the world: data, initialisation, pre-training, sampling."""
    hidden_size: Count = 64
    """width of the base; a multiple of 2·num_heads."""
    num_layers: Count = 2
    """decoder layers of the base."""
    num_heads: Count = 4
    """attention heads of the base."""
    pretrain_examples: Count = 20_000
    """conversations of the pre-training text, operations and lengths of both distributions, eval prompts left out."""
    pretrain_long: Share = 0.3
    """share of them whose answer has five or six words, which is out of distribution for everything that follows."""
    pretrain_noise: Share = 0.5
    """share of them whose answer holds one to as many errors as words: the base knows the language, not how to answer well."""
    pretrain_graded: Share = 0.5
    """share of them that a word from bad to perfect follows: text about answers, from which a reward model can learn to judge."""
    pretrain_steps: Count = 800
    """optimizer steps of pre-training."""
    pretrain_batch_size: Count = 64
    """conversations a step."""
    pretrain_learning_rate: Positive = 3e-3
    """peak of AdamW's, warmed up over 5% of the steps, then a cosine to zero."""
    demonstrations: Count = 512
    """the whole pool; what share of it each seed sees is `sft.subset`."""
    demonstration_noise: Share = 0.1
    """share of demonstrations whose answer holds one error: something for the seeds to overfit."""
    preferences: Count = 8_000
    """pairs of answers of different gold, no two alike."""
    preference_sampled: Share = 0.5
    """share of prompts whose two answers are both the base's samples; the others' are right answers with zero to two errors."""
    prompts: Count = 6_400
    """PPO's prompts: 50 rollout batches of 128."""
    eval_prompts: Count = 256
    """of each eval set, in and out of distribution, no two alike, in no other file and not in the pre-training text."""


@dataclass(config=STRICT, kw_only=True)
class Recipe:
    """The whole run. A YAML file states departures from these defaults only."""

    name: str
    """Results go to runs/<name>[-lora|-qlora]."""
    description: str = ""
    """For people."""
    threads: Count | None = None
    """CPU threads of a stage's process. None: PyTorch's choice."""
    export: list[Literal["merged"]] = dataclasses.field(default_factory=list)
    """merged: policies are saved as plain Transformers checkpoints too."""
    model: Model = dataclasses.field(default_factory=Model)
    adapter: Adapter | None = None
    """Set by --lora. None: full weights."""
    toy: Toy | None = None
    data: Data = dataclasses.field(default_factory=Data)
    sft: SFT = dataclasses.field(default_factory=SFT)
    reward: Reward = dataclasses.field(default_factory=Reward)
    soup: Soup = dataclasses.field(default_factory=Soup)
    ppo: PPO = dataclasses.field(default_factory=PPO)
    policies: dict[str, Policy] = dataclasses.field(default_factory=dict)
    landscape: Landscape | None = dataclasses.field(default_factory=Landscape)
    generation: Generation = dataclasses.field(default_factory=Generation)
    evaluate: Evaluate = dataclasses.field(default_factory=Evaluate)
