"""What a recipe needs of a GPU, stage by stage, counted from config.json before anything is loaded.

    need = weights + optimizer + max over phases (gradients + activations + KV cache + logits + what the phase makes)

Phases of ppo: generate, score, train, step. On CUDA the base is bf16 (`dtype: auto`); adapters and heads are float32. It is an estimate:
formulas are named beside the lines, what the allocator wastes is MARGIN. Left out: other programs on the card. Imports no torch.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, NamedTuple

from .architectures import Architecture
from .config import PPO, SFT, Adapter, Recipe, Reward, Training

GIB = 2**30
CONTEXT = int(0.6 * GIB)
"""CUDA's own, with cuBLAS's workspace."""
MARGIN = 1.04
"""What the allocator can't use for holes between blocks."""
CHUNK = 256
"""Tokens whose logits exist at one time, in PPO (logprobs.py) and in TRL's SFT loss."""
NF4 = {"nf4": 0.5 + 4 / 64, "nf4-double": 0.5 + 1 / 64 + 4 / (64 * 256)}
"""Bytes of a weight with its share of the scales (QLoRA, section 3)."""
TRAINED = {"master": (4, 4, 8), "stochastic": (2, 2, 2 + 8 / 256)}
"""Bytes of a trained weight, its gradient, its AdamW states (torchao's 8-bit ones have a scale a block of 256)."""
OF_FULL_WEIGHTS = ("offload", "precision")
STAGES = ("sft", "reward", "ppo", "landscape", "evaluate")
Precision = Literal["master", "stochastic"]


class Need(NamedTuple):
    """Bytes on one GPU at a stage's peak."""

    stage: str
    phase: str
    """In which the peak is."""
    weights: float
    gradients: float
    optimizer: float
    activations: float
    kv_cache: float
    logits: float
    parameters: int
    """Of the base."""

    @property
    def total(self) -> float:
        """With CUDA's own and what the allocator wastes."""
        parts = (self.weights, self.gradients, self.optimizer, self.activations, self.kv_cache, self.logits)
        return CONTEXT + MARGIN * sum(parts)


def need(recipe: Recipe, stage: str, size: Architecture, card: float | None = None) -> Need:
    """A stage's need at its peak; `card`: bytes, for `precision: auto`."""
    precision = choose_precision(recipe, stage, card, size)
    phases = _Stage(recipe, stage, size, precision).phases()
    return max(phases, key=lambda found: found.total)


def stages_of(recipe: Recipe) -> list[str]:
    """Those of the recipe that hold the base on a GPU."""
    there = {"reward": recipe.reward.trained, "ppo": bool(recipe.policies), "landscape": recipe.landscape is not None}
    return [stage for stage in STAGES if there.get(stage, True)]


def choose_precision(recipe: Recipe, stage: str, card: float | None, size: Architecture | None = None) -> Precision:
    """Of full weights that a stage trains: the recipe's, or by `auto` master where the card (bytes) has room for it, else stochastic.

    Without a card, and where weights are sharded over several, master.
    """
    if recipe.precision != "auto":
        return recipe.precision
    if size is None:
        from .architectures import of_recipe

        size = of_recipe(recipe)
    if card is None or size is None or recipe.mode != "full" or _sharded(recipe) > 1:
        return "master"
    phases = _Stage(recipe, stage, size, "master").phases()
    return "master" if max(phase.total for phase in phases) <= card else "stochastic"


def _sharded(recipe: Recipe) -> int:
    """Pieces that trained weights, gradients and states are cut into."""
    return recipe.num_processes if recipe.sharded else 1


class _Stage:
    """A stage's bytes. B sequences of one forward, L tokens of a sequence."""

    def __init__(self, recipe: Recipe, stage: str, size: Architecture, precision: Precision) -> None:
        self.recipe, self.stage, self.size, self.precision = recipe, stage, size, precision
        self.full = recipe.mode == "full"
        self.width = 4 if recipe.model.dtype == "float32" else 2  # bytes of the base's numbers
        self.trains = stage in ("sft", "reward", "ppo")

    # what stays

    def base(self) -> float:
        """One frozen base: nf4 of the linear layers, the rest as it is."""
        rest = self.size.parameters - self.size.in_linears
        quantised = NF4.get(self.recipe.model.quantization or "", self.width)
        return quantised * self.size.in_linears + self.width * rest

    def adapter(self, rank: int | None = None) -> int:
        """Parameters of an adapter of the recipe's modules."""
        lora = self.recipe.adapter
        assert lora is not None
        return self.size.adapter(rank or lora.r, lora.target_modules)

    def references(self) -> list[int]:
        """Of the policy that has most: members of each reference."""
        lists = [policy.references("reference") for policy in self.recipe.policies.values()]
        soup = len(self.recipe.soup.members)
        counted = [[soup if one.soup else len(one.members) for one in each] for each in lists]
        return max(counted, key=len if self.full else sum, default=[])  # models of their own, or adapters' ranks

    def roles(self) -> tuple[list[float], float]:
        """Frozen weights of each model or adapter beside the one that is trained or answers, and of the base that all share."""
        ppo, rewards = self.stage == "ppo", int(self.recipe.reward.trained and self.stage not in ("sft", "reward"))
        members = self.references() if ppo else []
        if self.full:
            model = float(self.width * self.size.parameters)
            return [model] * ((len(members) if ppo else 0) + rewards), 0.0 if self.trains else model
        rank = self.recipe.adapter.r if self.recipe.adapter else 0
        answering = len(self.recipe.policies) + 2 if self.stage == "evaluate" else 0
        stacked = len(self.recipe.sft.seeds) if self.stage == "landscape" else 0
        ranks = (
            [rank * count for count in members if count]
            + [rank] * (rewards + answering)
            + [rank * stacked] * bool(stacked)
        )
        return [4.0 * self.adapter(one) for one in ranks], self.base()

    def trained(self) -> int:
        """Parameters that are trained."""
        if not self.trains:
            return 0
        return self.size.parameters if self.full else self.adapter()

    def held(self, phase: str) -> tuple[float, float, float]:
        """Weights, gradients and optimizer states on the card in a phase."""
        roles, shared = self.roles()
        if self.full and self.recipe.offload == "frozen" and self.stage == "ppo":
            roles = [max(roles)] if phase == "score" and roles else []
        weight, gradient, states = TRAINED[self.precision] if self.full else (4, 4, 8)
        count, pieces = self.trained(), _sharded(self.recipe)
        weights = shared + sum(roles) + weight * count / pieces
        if self.full and count and (self.precision == "master" or (pieces > 1 and phase in ("generate", "score"))):
            weights += 2 * count  # autocast's bf16 copies, or the whole policy gathered for a rollout
        there = gradient * count / pieces if phase in ("train", "step") else 0.0
        if there and pieces == 1 and self.recipe.num_processes > 1:
            there *= 2  # DDP's buckets
        temporary = (
            12.0 * self.size.largest if phase == "step" and self.full and self.precision == "stochastic" else 0.0
        )
        return weights, there, states * count / pieces + temporary

    # what a phase makes

    def layer(self) -> float:
        """Numbers of a token that one layer's backward wants: norms, queries, keys, values, attention, the MLP's four; a copy of every
        adapted module's input, in the adapter's precision."""
        size = self.size
        heads, narrow = size.heads * size.head_dim, size.kv_heads * size.head_dim
        numbers = 6 * size.hidden + 3 * heads + 2 * narrow + 4 * size.inner
        return numbers if self.full else numbers + 5 * size.hidden + heads + size.inner

    def activations(self, tokens: int, checkpointing: bool) -> float:
        """Of a forward and backward over `tokens` tokens; checkpointed: every layer's input, and one layer anew with its backward."""
        size, width = self.size, self.width
        end = 6 * size.hidden  # bytes of a token in the last norm, which is in float32
        if not checkpointing:
            return tokens * (size.layers * self.layer() * width + end)
        residual = 4 if self.full and self.precision == "master" else width
        return tokens * (size.layers * size.hidden * residual + 2 * self.layer() * width + end)

    def forward(self, tokens: int) -> float:
        """Of a forward alone: what one layer has at a time; a layer's weights out of 4 bits."""
        unpacked = (
            2 * max(one.inputs * one.outputs for one in self.size.linears) if self.recipe.model.quantization else 0
        )
        return self.width * tokens * (4 * self.size.hidden + 3 * self.size.inner) + unpacked

    def logits(self, tokens: int, copies: int = 3) -> float:
        """float32 logits of so many tokens, their exponentials and their gradient."""
        return 4.0 * copies * tokens * self.size.vocabulary

    def phases(self) -> list[Need]:
        """Every phase's need."""
        recipe, sampling = self.recipe, self.recipe.generation
        if self.stage in ("sft", "reward"):
            section: Training = getattr(recipe, self.stage)
            rows = _micro(section, recipe.num_processes) * (2 if self.stage == "reward" else 1)
            return self._training(rows * recipe.model.max_length, section.gradient_checkpointing, self.stage == "sft")
        length = recipe.model.max_length
        if self.stage == "ppo" and recipe.ppo.max_prompt_length:
            length = recipe.ppo.max_prompt_length + sampling.max_new_tokens
        rows = sampling.batch_size
        if self.stage == "ppo":
            rows = recipe.ppo.rollout_batch_size or math.ceil(recipe.ppo.batch_size / recipe.num_processes)
        cache = self.width * self.size.kv_per_token * rows * length
        prefill = self.forward(rows * (length - sampling.max_new_tokens))
        found = [self._phase("generate", prefill, cache, self.logits(rows, 4))]
        found.append(self._phase("score", self.forward(rows * length), 0.0, self.logits(CHUNK)))
        if self.stage == "ppo":
            micro = _micro(recipe.ppo, recipe.num_processes, recipe.ppo.num_mini_batches)
            found += self._training(micro * length, recipe.ppo.gradient_checkpointing, True)
        return found

    def _training(self, tokens: int, checkpointing: bool, with_logits: bool) -> list[Need]:
        logits = self.logits(min(CHUNK, tokens), 4 if self.full else 3) if with_logits else 0.0
        made = self.activations(tokens, checkpointing) + self.forward(0)
        return [self._phase("train", made, 0.0, logits), self._phase("step", 0.0, 0.0, 0.0)]

    def _phase(self, phase: str, activations: float, cache: float, logits: float) -> Need:
        weights, gradients, optimizer = self.held(phase)
        return Need(self.stage, phase, weights, gradients, optimizer, activations, cache, logits, self.size.parameters)


def _micro(section: Training, processes: int, minibatches: int = 1) -> int:
    """Rows of one forward in one process."""
    return section.micro_batch_size or max(1, section.batch_size // minibatches // processes)


def advice(recipe: Recipe, stage: str, size: Architecture, card: float) -> str | None:
    """What would make a stage fit a card (bytes): the first single change that does, else several in that order; None where it fits,
    words without a change where nothing does."""
    if need(recipe, stage, size, card).total <= card:
        return None
    changes = _changes(recipe, stage)
    for words, changed in changes:
        if need(changed, stage, size, card).total <= card:
            return words
    mode: list[str] = []
    settings: dict[str, str] = {}
    together = recipe
    for words, _ in changes:
        changed = dict(_changes(together, stage)).get(words, together)
        if changed is together:
            continue
        together = changed
        if words.startswith("--lora"):
            mode, settings = [words], {key: value for key, value in settings.items() if key not in OF_FULL_WEIGHTS}
        else:
            key, value = words.removeprefix("--set ").split("=")
            settings[key] = value
        if need(together, stage, size, card).total <= card:
            return " ".join([*mode, *(f"--set {key}={value}" for key, value in settings.items())])
    return "a larger card, or a smaller model.max_length"


def _changes(recipe: Recipe, stage: str) -> list[tuple[str, Recipe]]:
    """(what to add to the command, the recipe with it), from what costs least to what costs most."""
    found: list[tuple[str, Recipe]] = []

    def offer(words: str, **changes: object) -> None:
        found.append((words, dataclasses.replace(recipe, **changes)))  # type: ignore[arg-type]

    section: SFT | Reward | PPO | None = getattr(recipe, stage) if stage in ("sft", "reward", "ppo") else None
    if section is not None and not section.gradient_checkpointing:
        changed = dataclasses.replace(section, gradient_checkpointing=True)
        offer(f"--set {stage}.gradient_checkpointing=true", **{stage: changed})
    if section is not None and section.micro_batch_size != 1:
        offer(f"--set {stage}.micro_batch_size=1", **{stage: dataclasses.replace(section, micro_batch_size=1)})
    for smaller in _halves(recipe.ppo.rollout_batch_size or recipe.ppo.batch_size) if stage == "ppo" else ():
        ppo = dataclasses.replace(recipe.ppo, rollout_batch_size=smaller)
        offer(f"--set ppo.rollout_batch_size={smaller}", ppo=ppo)
    for smaller in _halves(recipe.generation.batch_size) if section is None else ():
        generation = dataclasses.replace(recipe.generation, batch_size=smaller)
        offer(f"--set generation.batch_size={smaller}", generation=generation)
    if recipe.mode == "full":
        if stage == "ppo" and recipe.offload == "none":
            offer("--set offload=frozen", offload="frozen")
        if section is not None and recipe.precision == "master":
            offer("--set precision=stochastic", precision="stochastic")
        found.append(("--lora", as_lora(recipe, None)))
    if recipe.mode != "qlora":
        found.append(("--lora qlora", as_lora(recipe, "nf4-double")))
    return found


def _halves(number: int) -> list[int]:
    return [number // 2**power for power in range(1, number.bit_length())]


def as_lora(recipe: Recipe, quantization: Literal["nf4-double"] | None) -> Recipe:
    """The recipe with a preset's adapter, r 16 on all linears, and the base in 4 bits where asked for."""
    return dataclasses.replace(
        recipe, adapter=recipe.adapter or Adapter(), offload="none", precision="auto",
        model=dataclasses.replace(recipe.model, quantization=quantization),
    )  # fmt: skip
