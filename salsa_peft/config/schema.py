"""The recipe's schema: all sections, with defaults. The text under a field says what it sets.

`config/load.py` builds a `Recipe` from YAML, an adapter preset and `--set`. Imports no torch, so that a bad recipe is
rejected within two seconds.
"""

import dataclasses
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from pydantic.dataclasses import dataclass
from pydantic_core import PydanticCustomError

from salsa_peft.config.fields import STRICT, Count, NonNegative, Positive, Seed, require_multiple
from salsa_peft.config.judge import Judge, as_judge
from salsa_peft.config.options.hub import Hub
from salsa_peft.config.options.ppo import PPOOptions, Sampling
from salsa_peft.config.options.soup import Member, SoupSection, named
from salsa_peft.config.options.synthetic import Synthetic
from salsa_peft.config.options.toy import Toy
from salsa_peft.config.options.training import Training
from salsa_peft.config.options.trl import DPO, GRPO, KTO, PREFERENCE_ALGORITHMS, RLOO
from salsa_peft.config.policies.policy import Policy
from salsa_peft.config.policies.rewarded_soups import RewardedSoups
from salsa_peft.config.policies.search import Search
from salsa_peft.config.policies.warp import Warp
from salsa_peft.config.rewards import RewardPart, parse_reward
from salsa_peft.utils.errors import require


def _source(value: Any) -> Any:
    if isinstance(value, list):
        raise PydanticCustomError(
            "own_message",
            "must be one source, not a list. Put the files into one folder and give its path, or join them into one file",
        )
    return {"path": value} if isinstance(value, str) else value


@dataclass(config=STRICT, kw_only=True)
class Source:
    """A dataset: a Hub id, a local folder or a local file. A bare string in a recipe is the path."""

    path: str
    """Hub id, hf://datasets/ path, folder, or file (.jsonl, .json, .parquet, .csv, .tsv, also compressed). Relative
    paths start at the recipe's folder; with `--set`, at the current folder. Example: my.jsonl."""
    name: str | None = None
    """Name of the Hub dataset's configuration. Example: default."""
    split: str = "train"
    """Split of a Hub dataset or folder, or a slice (train[:80%]). A single file has only train and its slices."""
    revision: str | None = None
    """Branch, tag or commit on the Hub. Example: main."""
    limit: Count | None = None
    """Number of rows to use: the first ones after a shuffle with a fixed seed. None: all rows. Example: 1000."""


DataSource = Annotated[Source, BeforeValidator(_source)]


OWN_TEMPLATE = "tokenizer"
"""Value of model.chat_template that selects the template of the base's tokenizer."""


@dataclass(config=STRICT, kw_only=True)
class Model:
    """The base model of policy, references, value and reward model."""

    base: str | None = None
    """Hub id or folder of a causal language model. None: the toy model (needs a `toy` section)."""
    revision: str | None = None
    """Branch, tag or commit on the Hub. Example: main."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the base's weights. auto: bfloat16 on CUDA, float32 on a CPU. Adapters and heads are always float32.

    It also sets the arithmetic of every stage: float32 computes in float32, bfloat16 under bf16 autocast where float32
    weights (adapters, master weights) take part. float16 is for runs that train nothing."""
    quantization: Literal["nf4", "nf4-double"] | None = None
    """4-bit quantisation of the base. nf4-double also quantises the scales. Adapters only. Source: QLoRA (Dettmers et
    al., 2023)."""
    attn_implementation: str | None = None
    """Attention implementation of Transformers: sdpa, eager, flash_attention_2 … None: Transformers' default. auto:
    flash_attention_2 on CUDA if the package flash-attn is installed, else sdpa. Source: the paper uses flash attention
    (A.1)."""
    max_length: Count = 1024
    """Maximum number of tokens of a training sequence, and of prompt plus response in PPO. Source: the
    paper has 2048 (A.1)."""
    chat_template: str | None = None
    """chatml, zephyr, plain, tokenizer (the base's own), or the path of a Jinja file. None: the toy model's (`toy`)."""


@dataclass(config=STRICT, kw_only=True)
class Adapter:
    """LoRA, under the field names of PEFT's LoraConfig."""

    r: Count = 16
    """Rank of the adapters."""
    lora_alpha: Positive = 32
    """Scaling: an adapter adds lora_alpha / r · B A to a weight (with use_rslora lora_alpha / √r · B A)."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout probability in SFT and reward training. PPO uses no dropout."""
    target_modules: str | list[str] = "all-linear"
    """Names of the modules to adapt, or all-linear."""
    use_rslora: bool = False
    """Rank-stabilized LoRA: scale by lora_alpha / √r."""


@dataclass(config=STRICT, kw_only=True)
class Data:
    """Training data. None: that of the sections `synthetic` or `toy`. data/row_formats.py lists the accepted columns."""

    demonstrations: DataSource | None = None
    """SFT: rows with `messages`, `prompt` and `completion`, or another accepted set of columns."""
    preferences: DataSource | None = None
    """Reward model, DPO, KTO: rows with `chosen` and `rejected`, and with `prompt` unless these two contain it."""
    prompts: DataSource | None = None
    """PPO, RLOO, GRPO: rows with `prompt`, `messages` (whose last answer is cut off), or another accepted column."""
    held_out: DataSource | None = None
    """Demonstrations that no seed was trained on, for the measure sft_loss of greedy and learned soups. Example:
    held_out.jsonl."""


@dataclass(config=STRICT, kw_only=True)
class SFT(Training):
    """SFT of one model per seed (TRL's SFTTrainer), with loss on the assistant's tokens only."""

    seeds: Annotated[list[Seed], Field(min_length=1)] = dataclasses.field(default_factory=lambda: [0, 1])
    """Random seeds of data order and adapter initialization. `seed-N` and soup.members give positions in this list."""
    learning_rate: Positive = 2.5e-5
    """Peak learning rate. Source: paper A.1."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.03
    """Fraction of the steps, at the start, in which the learning rate rises. Source: paper A.1."""
    subset: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Fraction of the rows that each seed trains on, drawn at random for each seed. Source: the paper has all rows."""
    from_: list[str | None] | None = None
    """`from` in a recipe. SFT models that already exist: for each of `seeds` the folder or Hub id of a LoRA adapter
    (with full weights, of a checkpoint), or null to train that model. A bare string is a list of one. None: train
    all. Example: [runs/first/seed-0, null]."""

    def existing_seed(self, position: int) -> str | None:
        """Folder or Hub id of the existing SFT model at a position in `seeds`; None if this run trains it."""
        return None if self.from_ is None else self.from_[position]


@dataclass(config=STRICT, kw_only=True)
class Reward(Training):
    """The reward that PPO, RLOO and GRPO maximize.

    `model: adapter` trains a reward model with TRL's RewardTrainer, from seed-0 and with a linear head. A string or
    list in place of the section is the value of `model`.
    """

    model: Any = "adapter"
    """adapter (trained by this run) | module:name, a Python function with the signature of TRL's reward functions, in
    the recipe's folder or on Python's path | folder or Hub id of a sequence classifier or reward adapter | for a
    weighted sum, a list of these or of {model, weight, name}."""
    learning_rate: Positive = 2.0e-5
    """Peak learning rate. Source: paper A.2."""
    weight_decay: NonNegative = 0.001
    """AdamW's weight decay. Source: paper A.2."""
    center_rewards_coefficient: NonNegative | None = 0.01
    """Weight of (R(chosen) + R(rejected))² in the loss, which keeps the scores of every prompt near 0. Without it, most
    of the score's variance may lie between prompts, and PPO's critic has to learn it first. null: no such term, as in
    the paper and in TRL's default. Source: TRL's field and recommended value (Eisenstein et al., 2023, eq. 2)."""
    zero_score_head: bool = False
    """Start with all weights of the score head 0, so that all scores start at 0. false: drawn from N(0, 1/(H+1)), which
    gives a base with large hidden states large scores that training has to unlearn. Source: Stiennon et al. (2020), for
    false."""
    seeds: Annotated[list[Seed], Field(min_length=1)] = dataclasses.field(default_factory=lambda: [0])
    """Seeds of the data order, one per reward model. Several models are averaged. Source: WARM (Ramé et al., 2024)."""
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Fraction of the pairs that is not trained on but used for the accuracy in the metrics."""
    quality_prompts: Annotated[int, Field(ge=0)] = 64
    """Number of PPO's prompts, drawn at random, on which the stage reward_quality measures the reward. 0: no such
    stage."""
    quality_responses: Annotated[int, Field(ge=2)] = 4
    """Number of responses that seed-0 gives to each of these prompts."""

    def held_out_rows(self, pairs: int) -> int:
        """Number of pairs that are held out of `pairs` pairs, at least one if `pairs` is not 0."""
        return min(pairs, max(1, round(self.held_out * pairs)))

    @property
    def parts(self) -> list[RewardPart]:
        """The parts of `model`: several if it is a weighted sum, else one."""
        return parse_reward("reward.model", self.model)

    @property
    def trained(self) -> bool:
        """Whether the reward stage trains a model."""
        return any(part.kind == "adapter" for part in self.parts)

    @property
    def reads_columns(self) -> bool:
        """Whether a part of `model` is a function, which may take any column of the data."""
        return any(part.kind == "function" for part in self.parts)


@dataclass(config=STRICT, kw_only=True)
class PPO(PPOOptions, Training):
    """Settings of PPO for all policies. Temperature and response length are in the section `generation`."""

    # Options shared with SalsaPPOConfig are in PPOOptions, options of all training stages in Training, and options of
    # the ppo stage alone here. An option is compared on resume if REQUIRED or CHANGEABLE in training/ppo/resume.py has it.

    learning_rate: Positive = 2.0e-6
    """Peak learning rate. Source: paper A.3 (1e-7 for Gemma)."""
    batch_size: Count = 8
    """Number of responses in a rollout batch, over all processes."""
    micro_batch_size: Count | None = None
    """Number of responses in a forward pass. None: a process's whole share of a minibatch."""
    num_train_epochs: Positive = 2.0
    """Number of passes over the prompts. Source: our reading of "2 epochs of training" in paper A.3."""
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    """Learning rate schedule, as in Transformers. Source: TRL's default for PPO."""
    seed: Seed = 0
    """Seed of sampling, prompt order and minibatches, the same for every policy."""
    save_steps: Count = 50
    """Number of optimizer steps between two checkpoints, from which a stopped run resumes. The newest two are kept."""
    eval_prompts: str | None = None
    """Name of a set in evaluate.prompts that is answered and scored during training. None: no such evaluation. Example:
    mine."""
    eval_steps: Count = 100
    """Number of optimizer steps between two evaluations on eval_prompts."""
    eval_limit: Count = 64
    """Number of prompts of eval_prompts that are used: the first ones."""

    @property
    def prompts_per_update(self) -> int:
        """Number of prompts in a rollout batch."""
        return self.batch_size // self.responses_per_prompt

    def check(self, section: str, processes: int = 1) -> None:
        """Raise SalsaError for indivisible batch sizes, contradictory options, or an update cut by max_steps."""
        self.check_shares(f"{section}.", self.batch_size, self.micro_batch_size, processes)
        self.check_options(f"{section}.")
        steps = self.steps_per_update
        if self.max_steps > 0:  # an update that is cut short would be in no log
            of = f"{steps}, the number of optimizer steps in one update (num_ppo_epochs × num_mini_batches)"
            require_multiple(f"{section}.max_steps", self.max_steps, steps, of)
            updates = self.max_steps // steps
            require(
                self.value_warmup_updates < updates,
                f"{section}.value_warmup_updates: {self.value_warmup_updates} must be less than {updates}, the number of"
                f" updates ({section}.max_steps = {self.max_steps}), or no policy would be trained",
            )


@dataclass(config=STRICT, kw_only=True)
class Generation(Sampling):
    """Sampling in PPO, landscape and evaluation."""

    batch_size: Count = 64
    """Number of prompts in one generation call in landscape and evaluation."""


@dataclass(config=STRICT, kw_only=True)
class Landscape:
    """Mean score along a line and on a plane through the seeds' weights (paper, Figure 2)."""

    line: list[Member] | None = dataclasses.field(default_factory=lambda: list[Member]([0, 1]))
    """Two models a and b of the line θ = (1 − α) θ_a + α θ_b: positions in sft.seeds, or names of models of the run. None:
    no line. Example: [ppo, salsa]."""
    alphas: list[float] = dataclasses.field(default_factory=lambda: [-0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5])
    """Values of α on the line."""
    scales: list[float] = dataclasses.field(default_factory=lambda: [0.0, 0.2, 0.4, 0.6, 0.8])
    """Values of λ of control models base + λ·δ, where δ is the delta of the line's first seed. An empty list: none."""
    norm_controls: bool = False
    """Measure two more control models: the first seed's delta scaled to the norm of the midpoint's, which joins the
    values of λ, and the midpoint's delta scaled to the norm of the first seed's."""
    plane: list[Member] | None = None
    """Three models whose weights span the plane, given as in `line`. None: no plane."""
    resolution: Count = 4
    """Number of grid steps along an edge of the seeds' triangle. The grid extends one step beyond the triangle."""
    prompts: str | None = None
    """Name of the set in evaluate.prompts that is answered. None: the first set."""
    limit: Count | None = None
    """Number of prompts at each point. None: all prompts."""
    seed: Seed = 0
    """Sampling seed, the same at each point."""

    @property
    def names(self) -> list[str]:
        """Names of the models on the line and the plane, each once."""
        return list(dict.fromkeys([*named(self.line), *named(self.plane)]))


@dataclass(config=STRICT, kw_only=True)
class Evaluate:
    """Answers of all models to held-out prompts, scored by the reward and compared by a judge."""

    prompts: dict[str, DataSource] = dataclasses.field(default_factory=dict)
    """Name of each set of prompts → its source. Empty: the two sets of the toy data (section `toy`)."""
    pairs: list[list[str]] = dataclasses.field(default_factory=list)
    """Pairs of models to compare. The name of a searched policy stands for its picked candidate. Empty: every
    policy and the soup against seed-0, and all pairs of policies."""
    models: list[str] = dataclasses.field(default_factory=list)
    """Models to evaluate besides seed-0, soup and policies, written as in `reference`: base, seed-1 …"""
    temperature: Literal["category"] | NonNegative = "category"
    """Temperature of the answers. category: FastChat's temperatures for MT-Bench categories (0 for math, 0.7 for
    writing …) and generation.temperature for all other questions. A number: for all questions; 0 is greedy decoding."""
    controls: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Name of each further model to evaluate → its reference, such as {shrunk: {seed: 0, scale: 0.6}}."""
    judge: Annotated[Judge | None, BeforeValidator(as_judge)] = None
    """Judge that compares the answers of `pairs`. None: only scores are compared."""
    samples: Count = 20
    """Number of questions per set whose answers the report shows side by side: the first ones."""
    seed: Seed = 0
    """Sampling seed. landscape.seed has the same default, so that a model gets the same score in both stages."""


@dataclass(config=STRICT, kw_only=True)
class Recipe:
    """Settings of a whole run. A recipe file has only the settings that differ from these defaults."""

    name: str
    """Name of the run, whose results go to runs/<name>[-lora|-qlora]."""
    description: str = ""
    """Free text, shown in the report."""
    report_to: list[str] = dataclasses.field(default_factory=list)
    """Where PPO logs its metrics besides metrics.jsonl, as in TrainingArguments: tensorboard, trackio, wandb … Example:
    [tensorboard]."""
    replicates: Count = 1
    """Number of times that the whole recipe is trained, each time with other seeds of everything: toy data and base,
    SFT, reward model and policies. The results are in the folders replicate-0, replicate-1 … of the run."""
    threads: Count | None = None
    """Number of CPU threads of each stage. None: PyTorch's default."""
    precision: Literal["auto", "master", "stochastic"] = "auto"
    """Precision of full-weight training (adapters are always float32). master: float32 weights and AdamW, under bf16
    autocast unless model.dtype is float32. stochastic: bf16 weights with stochastic rounding and 8-bit AdamW (torchao,
    the extra `full`). auto: master if models/architectures/memory.py estimates that it fits on the GPU, else
    stochastic."""
    offload: Literal["none", "frozen"] = "none"
    """frozen: full-weight references and reward models are kept in CPU memory while the policy generates and trains."""
    num_processes: Count = 1
    """Number of processes of sft, reward and ppo, one per GPU. `accelerate launch` starts more than one."""
    accelerate: Literal["ddp", "fsdp2", "zero3"] = "ddp"
    """Parallelism of several processes: the name of a file in recipes/accelerate. No effect with one process."""
    export: list[Literal["merged"]] = dataclasses.field(default_factory=list)
    """merged: also save each policy as a plain Transformers checkpoint. Example: [merged]."""
    model: Model = dataclasses.field(default_factory=Model)
    """Base model, chat template and sequence length."""
    adapter: Adapter | None = None
    """LoRA settings, set by --lora. None: full weights."""
    sweep: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Policies that differ in one number (config/sweeps.py), written into `policies` when the recipe is read."""
    search: Search | None = None
    """Trains policies at several KL coefficients and picks the best candidate of each (config/sweeps.py)."""
    toy: Toy | None = None
    """Sizes of the toy model and the toy data. None: the recipe names its own base and data."""
    data: Data = dataclasses.field(default_factory=Data)
    """Training data."""
    synthetic: Synthetic | None = None
    """Demonstrations and preferences that the base writes and a function judges. None: no such data."""
    sft: SFT = dataclasses.field(default_factory=SFT)
    """Supervised fine-tuning of one model per seed."""
    reward: Reward = dataclasses.field(default_factory=Reward)
    """Reward of PPO, RLOO and GRPO."""
    soup: SoupSection = dataclasses.field(default_factory=SoupSection)
    """Members and weights of the soup."""
    soups: dict[str, SoupSection] = dataclasses.field(default_factory=dict)
    """Name of each further soup → its settings, which are those of `soup`. They are evaluated, and can be references,
    starts and members of other soups. Example: {mixed: {members: [ppo, salsa]}}."""
    ppo: PPO = dataclasses.field(default_factory=PPO)
    """Settings of policies with algorithm ppo."""
    dpo: DPO = dataclasses.field(default_factory=DPO)
    """Settings of policies with algorithm dpo."""
    kto: KTO = dataclasses.field(default_factory=KTO)
    """Settings of policies with algorithm kto."""
    rloo: RLOO = dataclasses.field(default_factory=RLOO)
    """Settings of policies with algorithm rloo."""
    grpo: GRPO = dataclasses.field(default_factory=GRPO)
    """Settings of policies with algorithm grpo."""
    policies: dict[str, Policy] = dataclasses.field(default_factory=dict)
    """Name of each policy → the policy."""
    warp: Warp | None = None
    """WARP: policies and soups of them, written into `policies` and `soups` when the recipe is read. None: no such."""
    rewarded_soups: RewardedSoups | None = None
    """Rewarded soups: policies and soups of them, written into `policies` and `soups` when the recipe is read. None: no
    such."""
    landscape: Landscape | None = dataclasses.field(default_factory=Landscape)
    """Scores on a line and a plane through the SFT models. None: no landscape stage."""
    generation: Generation = dataclasses.field(default_factory=Generation)
    """Sampling of responses."""
    evaluate: Evaluate = dataclasses.field(default_factory=Evaluate)
    """Evaluation and judge."""
    hub: Hub = dataclasses.field(default_factory=Hub)
    """Publishing on the Hub."""
    revisions: dict[str, str] = dataclasses.field(default_factory=dict)
    """Hub id → branch, tag or commit of models that have no key `revision` of their own: in sft.from, references,
    reward and a local judge. A run adds the commits of those that are missing here, and saves them in its
    recipe.yaml. Example: {HuggingFaceTB/SmolLM2-135M-Instruct: main}."""

    def as_data(self) -> dict[str, Any]:
        """All settings, under the keys of a recipe file."""
        data = dataclasses.asdict(self)
        data["sft"]["from"] = data["sft"].pop("from_")  # `from` is a keyword in Python
        return data

    @property
    def mode(self) -> Literal["full", "lora", "qlora"]:
        """full: all weights are trained. lora: adapters. qlora: adapters on a 4-bit base."""
        if self.adapter is None:
            return "full"
        return "lora" if self.model.quantization is None else "qlora"

    @property
    def measures_reward(self) -> bool:
        """Whether the reward is measured on seed-0's responses, for the policies that learn from it."""
        algorithms = {policy.algorithm for policy in self.policies.values()}
        return self.reward.quality_prompts > 0 and not algorithms <= {*PREFERENCE_ALGORITHMS}

    @property
    def judges_best_of_n(self) -> bool:
        """Whether the judge compares seed-0's best of n responses by the reward with one response."""
        judge = self.evaluate.judge
        return judge is not None and judge.kind != "reward" and self.measures_reward

    @property
    def model_revisions(self) -> dict[str, str]:
        """Hub id → revision of all models of this recipe whose revision is known, the base included."""
        base, revision = self.model.base, self.model.revision
        return {**self.revisions, **({base: revision} if base is not None and revision is not None else {})}

    @property
    def measures_parts(self) -> bool:
        """Whether each part of reward.model is a measure of its own, because a policy has a reward of its own."""
        return any(policy.reward is not None for policy in self.policies.values())

    @property
    def sharded(self) -> bool:
        """Whether the trained weights are sharded over processes (FSDP2, ZeRO-3)."""
        return self.num_processes > 1 and self.accelerate != "ddp"
