"""The recipe's schema: every section, every default once, its unit and source in the docstring under the field.

Nothing here imports torch: a recipe is parsed and refused within two seconds. `config/load.py` makes a `Recipe` out of YAML,
an adapter preset and `--set`; this file says what a Recipe may hold and what must fit together.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from pydantic.dataclasses import dataclass
from pydantic_core import PydanticCustomError

from salsa_peft.config.fields import NAME, SEED, STRICT, Count, NonNegative, Positive, Seed, Share
from salsa_peft.config.judge import Judge, as_judge
from salsa_peft.config.options.hub import Hub
from salsa_peft.config.options.ppo import PPOOptions, Sampling
from salsa_peft.config.options.search import Search
from salsa_peft.config.options.toy import Toy
from salsa_peft.config.options.training import Training
from salsa_peft.config.options.trl import DPO, GRPO, KTO, RLOO
from salsa_peft.config.references import Reference, Soup, SoupSection, parse_reference
from salsa_peft.config.rewards import RewardPart, parse_reward
from salsa_peft.utils.errors import SalsaError, require

__all__ = [
    "DPO",
    "GRPO",
    "KTO",
    "NAME",
    "PPO",
    "RLOO",
    "SEED",
    "SFT",
    "Adapter",
    "Data",
    "Evaluate",
    "Generation",
    "Judge",
    "Landscape",
    "Model",
    "PPOOptions",
    "Policy",
    "Recipe",
    "Reference",
    "Reward",
    "SalsaError",
    "Sampling",
    "Share",
    "Soup",
    "SoupSection",
    "Source",
    "Toy",
    "Training",
    "parse_reference",
    "require",
]


def _source(value: Any) -> Any:
    if isinstance(value, list):
        raise PydanticCustomError(
            "said",
            "found a list, expected one source. Put the files into one folder and name it, or join them into one file",
        )
    return {"path": value} if isinstance(value, str) else value


@dataclass(config=STRICT, kw_only=True)
class Source:
    """A dataset: a Hub id, a local folder or a local jsonl file (a bare string is its path)."""

    path: str
    """Hub id, hf://datasets/ path, folder, or a file (FILES in data/files.py); relative to the recipe's folder (`--set`: to the current one)."""
    name: str | None = None
    """The Hub dataset's configuration."""
    split: str = "train"
    """Split on the Hub or in a folder, or a slice of it (train[:80%]); a single file is the split train, and is sliced."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    limit: Count | None = None
    """Use only that many rows, the first after shuffling with a fixed seed. None: all."""


DataSource = Annotated[Source, BeforeValidator(_source)]


OWN_TEMPLATE = "tokenizer"
"""What model.chat_template says for the template that the base's tokenizer has."""


@dataclass(config=STRICT, kw_only=True)
class Model:
    """The base that every role shares."""

    base: str | None = None
    """Hub id or folder of a causal language model. None: the embedded world's base (needs a `toy` section)."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the base's weights. auto: bfloat16 on CUDA, float32 on a CPU. Adapters and heads are float32 always."""
    quantization: Literal["nf4", "nf4-double"] | None = None
    """QLoRA (Dettmers et al., 2023): the frozen base's linear layers in 4 bits, `double` quantises their scales too. Adapters only."""
    attn_implementation: str | None = None
    """As in Transformers: sdpa, eager, flash_attention_2 … None: Transformers' choice. auto: flash_attention_2 on CUDA where the package
    flash-attn is installed, else sdpa. Paper A.1: flash attention."""
    max_length: Count = 1024
    """Tokens of a training sequence (SFT, reward) and of prompt + response in PPO. Paper A.1: 2048."""
    chat_template: str | None = None
    """chatml or zephyr (ours), tokenizer (the base's own), or a Jinja file of yours. None: the embedded world's own."""


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
    """SFT: rows with `messages`, or another of the shapes in data/row_formats.py."""
    preferences: DataSource | None = None
    """Reward model: rows with `chosen` and `rejected` (and `prompt` or another column of data/row_formats.py, unless the two hold it)."""
    prompts: DataSource | None = None
    """PPO: rows with `prompt` (or `messages`, whose last assistant turn is dropped, or another of the shapes in data/row_formats.py)."""
    held_out: DataSource | None = None
    """Demonstrations that no seed was trained on, for the measure sft_loss of greedy and learned soups."""


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
    from_: list[str | None] | None = None
    """`from` in a recipe: seeds that are there already, such as published soups: a folder or Hub id for each position (a bare string: of one
    seed); null: trained here. LoRA adapters of the base, with full weights checkpoints. None: all are trained."""

    def existing_seed(self, position: int) -> str | None:
        """Where a seed is taken from; None: it is trained."""
        return None if self.from_ is None else self.from_[position]


@dataclass(config=STRICT, kw_only=True)
class Reward(Training):
    """What PPO maximises, and the training of the reward model where it is one (TRL's RewardTrainer): it starts from seed-0, with a
    linear head on the last token.

    Text or a list as the whole section is its `model`.
    """

    model: Any = "adapter"
    """adapter (trained here) | module:name, a Python function of TRL's reward-function signature, its module in the recipe's folder or
    on Python's path | a sequence classifier's folder or Hub id | a list of these, or of {model, weight, name}: their weighted sum."""
    learning_rate: Positive = 2.0e-5
    """Paper A.2."""
    weight_decay: NonNegative = 0.001
    """Paper A.2."""
    seeds: Annotated[list[Seed], Field(min_length=1)] = dataclasses.field(default_factory=lambda: [0])
    """Of the data's order. Several: as many reward models of one start, and the reward is their soup (WARM, Ramé et al., 2024)."""
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Share of the pairs kept from training, for the accuracy that the metrics give."""

    def held_out_rows(self, pairs: int) -> int:
        """Pairs that are held out of so many: one at least, where there is one."""
        return min(pairs, max(1, round(self.held_out * pairs)))

    @property
    def parts(self) -> list[RewardPart]:
        """The parsed model: one part, or those of a weighted sum."""
        return parse_reward("reward.model", self.model)

    @property
    def trained(self) -> bool:
        """Whether the reward stage has an adapter to train."""
        return any(part.kind == "adapter" for part in self.parts)

    @property
    def reads_columns(self) -> bool:
        """Whether a function is among the parts, which may take any column of the data."""
        return any(part.kind == "function" for part in self.parts)


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
    save_steps: Count = 50
    """Optimizer steps between two checkpoints, from which a run that was stopped goes on; the newest two are kept."""
    eval_prompts: str | None = None
    """Which of evaluate.prompts are answered and scored now and then. None: none."""
    eval_steps: Count = 100
    """Optimizer steps between two such evaluations."""
    eval_limit: Count = 64
    """Prompts of such an evaluation, the first."""

    def check(self, section: str, processes: int = 1) -> None:
        """Batches must divide, and max_steps end with an update: what a cut one learned would be in no log."""
        self.check_batches(f"{section}.", self.batch_size, self.micro_batch_size)
        self.check_shares(f"{section}.", self.batch_size, self.micro_batch_size, processes)
        self.check_options(f"{section}.")
        steps = self.steps_per_update
        require(
            self.max_steps < 1 or self.max_steps % steps == 0,
            f"{section}.max_steps: found {self.max_steps}, expected a multiple of {steps}, the optimizer steps of one update"
            f" (num_ppo_epochs × num_mini_batches); set {section}.max_steps={math.ceil(self.max_steps / steps) * steps}",
        )

    @property
    def steps_per_update(self) -> int:
        """Optimizer steps that one rollout batch gives."""
        return self.num_ppo_epochs * self.num_mini_batches


@dataclass(config=STRICT, kw_only=True)
class Policy:
    """A policy, trained from seed-0."""

    reference: Any
    """seed-N | base | soup | {soup: {members, weights}} | {shrunk: {seed, scale}} | an adapter's path | a list of these."""
    kl_coef: NonNegative | None = None
    """β at the start. None: kl_coef of its algorithm's section."""
    algorithm: Literal["ppo", "dpo", "kto", "rloo", "grpo"] = "ppo"
    """ppo: ours. The others: TRL's trainers with this reference; dpo and kto learn from `data.preferences`, rloo and grpo from `data.prompts` and
    `reward`, as ppo does. Its settings are the section of that name."""

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
    """Answers of seed-0, soup and every policy to held-out questions, scored and judged."""

    prompts: dict[str, DataSource] = dataclasses.field(default_factory=dict)
    """Name → prompts. Empty: the embedded world's two sets."""
    pairs: list[list[str]] = dataclasses.field(default_factory=list)
    """Pairs to compare; a searched policy is the candidate picked. Empty: every policy and the soup against seed-0, and every two policies."""
    models: list[str] = dataclasses.field(default_factory=list)
    """Also these, as references are written: base, seed-1 … (strings only). seed-0, soup and policies are always in."""
    temperature: Literal["category"] | NonNegative = "category"
    """Of the answers. category: FastChat's for the categories of MT-Bench (0 for math, 0.7 for writing …), generation.temperature for all
    other questions. A number: for all; 0 takes the likeliest token."""
    judge: Annotated[Judge | None, BeforeValidator(as_judge)] = None
    """Who compares the answers of `pairs`. None: nobody, scores alone are compared."""
    samples: Count = 20
    """Questions of each set whose answers the report shows side by side: its first ones."""
    seed: Seed = 0
    """Sampling seed; the landscape's own, so that a seed or the soup scores the same in both."""


@dataclass(config=STRICT, kw_only=True)
class Recipe:
    """The whole run. A YAML file states departures from these defaults only."""

    name: str
    """Results go to runs/<name>[-lora|-qlora]."""
    description: str = ""
    """For people."""
    report_to: list[str] = dataclasses.field(default_factory=list)
    """Where PPO's figures go besides metrics.jsonl, as in TrainingArguments: tensorboard, trackio, wandb …"""
    threads: Count | None = None
    """CPU threads of a stage's process. None: PyTorch's choice."""
    precision: Literal["auto", "master", "stochastic"] = "auto"
    """Of trained full weights (adapters are float32 always). master: float32 weights and AdamW under bf16 autocast. stochastic: bf16
    weights, rounded stochastically, and 8-bit AdamW (torchao, the extra `full`). auto: master where models/architectures/memory.py finds room, else stochastic."""
    offload: Literal["none", "frozen"] = "none"
    """frozen: references and reward models of full weights wait in the CPU's memory while the policy generates and trains."""
    num_processes: Count = 1
    """Processes of the training stages (sft, reward, ppo), one for each GPU: more than one are started by `accelerate launch`."""
    accelerate: Literal["ddp", "fsdp2", "zero3"] = "ddp"
    """How several processes share the work: a file of recipes/accelerate. One process shares with none, whatever stands here."""
    export: list[Literal["merged"]] = dataclasses.field(default_factory=list)
    """merged: policies are saved as plain Transformers checkpoints too."""
    model: Model = dataclasses.field(default_factory=Model)
    adapter: Adapter | None = None
    """Set by --lora. None: full weights."""
    sweep: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Policies that differ in one number: config/sweeps.py. They are written into `policies` when the recipe is read, so that a recipe as it
    ran has none."""
    search: Search | None = None
    """Each policy at several KL coefficients, and which is picked: config/sweeps.py. The candidates are written into `policies` too."""
    toy: Toy | None = None
    data: Data = dataclasses.field(default_factory=Data)
    sft: SFT = dataclasses.field(default_factory=SFT)
    reward: Reward = dataclasses.field(default_factory=Reward)
    soup: SoupSection = dataclasses.field(default_factory=SoupSection)
    ppo: PPO = dataclasses.field(default_factory=PPO)
    dpo: DPO = dataclasses.field(default_factory=DPO)
    kto: KTO = dataclasses.field(default_factory=KTO)
    rloo: RLOO = dataclasses.field(default_factory=RLOO)
    grpo: GRPO = dataclasses.field(default_factory=GRPO)
    policies: dict[str, Policy] = dataclasses.field(default_factory=dict)
    landscape: Landscape | None = dataclasses.field(default_factory=Landscape)
    generation: Generation = dataclasses.field(default_factory=Generation)
    evaluate: Evaluate = dataclasses.field(default_factory=Evaluate)
    hub: Hub = dataclasses.field(default_factory=Hub)

    def as_data(self) -> dict[str, Any]:
        """What a recipe's file says: every value, under the keys that it has there."""
        data = dataclasses.asdict(self)
        data["sft"]["from"] = data["sft"].pop("from_")  # which Python keeps for itself
        return data

    @property
    def mode(self) -> Literal["full", "lora", "qlora"]:
        """What is trained: all weights, adapters, or adapters on a base in 4 bits."""
        if self.adapter is None:
            return "full"
        return "lora" if self.model.quantization is None else "qlora"

    @property
    def sharded(self) -> bool:
        """Whether each process holds a piece of what is trained."""
        return self.num_processes > 1 and self.accelerate != "ddp"
