"""Estimate of the GPU memory that each stage of a recipe needs, computed from config.json.

memory = weights + optimizer + max over phases (gradients + activations + KV cache + logits + temporaries)

The phases of the stage ppo are generate, score, train and step. The base is taken to be bf16 (`dtype: auto` on CUDA),
adapters and heads float32. Other programs on the GPU and what `uncounted` lists are not counted.
tests/models/architectures/test_memory_measured.py compares the estimate with PPO on a CPU. Imports no torch.
"""

import math
from typing import Literal, NamedTuple

from salsa_peft.config.job import recipe_of_policy
from salsa_peft.config.options.training import Training
from salsa_peft.config.schema import Recipe
from salsa_peft.models.architectures.sizes import Architecture, architecture_of_base, architecture_of_recipe

GIB = 2**30
CONTEXT = int(0.6 * GIB)
"""Bytes of the CUDA context, with cuBLAS's workspace."""
MARGIN = 1.04
"""Factor on the sum of all tensors, for the fragmentation of CUDA's allocator."""
CHUNK = 256
"""Number of tokens whose logits exist at the same time in PPO (models/logprobs.py)."""
TILE = (4096, 32_768)
"""Most tokens, and number of vocabulary entries, of the bf16 logits that TRL's SFT loss holds at the same time."""
NF4 = {"nf4": 0.5 + 4 / 64, "nf4-double": 0.5 + 1 / 64 + 4 / (64 * 256)}
"""Bytes per quantised weight, including its share of the quantisation scales (QLoRA, section 3)."""
TRAINED = {"master": (4, 4, 8), "stochastic": (2, 2, 2 + 8 / 256)}
"""Bytes of a trained weight, of its gradient and of its AdamW states (torchao: 8 bits, a scale per block of 256)."""
STATES = {"paged_adamw_8bit": 2 + 8 / 256}
"""Bytes per weight of optimizer states that are not two float32 numbers (here 8 bits, and a scale per block of 256)."""
FOREACH = 4
"""Bytes per weight of the square roots that adamw_torch, unless fused, computes for all weights at once on CUDA."""
SAMPLED = 8
"""Memory for drawing a token, in tensors of float32 logits: 1 each for the model's logits, generate's copy of them,
log-probs and probabilities; 2 each for the probabilities and their cumulative sums in float64."""
SCORED, FORBIDDEN = 3, 1
"""Memory for log-probs and entropies of a chunk, in tensors of float32 logits. SCORED: 1 each for log-probs,
probabilities and the product of both. FORBIDDEN: 1 more for log-probs with a mask, where end tokens are forbidden in a
response's first tokens (min_new_tokens)."""
LEARNED, LEARNED_BY_HEAD = 2, 3
"""Memory for log-probs with their gradient, in tensors of float32 logits. LEARNED, with a frozen head: logits and
log-probs. LEARNED_BY_HEAD, with a trained head, in its backward: log-probs and the gradients of two operations."""
ANEW = 1.25
"""Memory for the backward of a checkpointed layer, as a multiple of one layer's activations."""
STAGES = ("synthetic", "sft", "reward", "reward_quality", "ppo", "landscape", "evaluate")
Precision = Literal["master", "stochastic"]


class Estimate(NamedTuple):
    """Estimated bytes on one GPU in a phase of a stage."""

    stage: str
    phase: str
    weights: float
    gradients: float
    optimizer: float
    activations: float
    kv_cache: float
    logits: float
    parameters: int
    """Number of parameters of the base."""

    @property
    def total(self) -> float:
        """The sum of the parts, with the CUDA context and fragmentation, in bytes."""
        parts = (self.weights, self.gradients, self.optimizer, self.activations, self.kv_cache, self.logits)
        return CONTEXT + MARGIN * sum(parts)


def estimate(recipe: Recipe, stage: str, size: Architecture, card: float | None = None) -> Estimate:
    """Estimate the phase of a stage that needs most memory. card: the GPU's bytes, for `precision: auto`.

    For ppo it is that of the policy that needs most.
    """
    recipes = [recipe]
    if stage == "ppo":
        own = [name for name, policy in recipe.policies.items() if policy.algorithm == stage and policy.overrides]
        recipes += [recipe_of_policy(recipe, name) for name in own]
    phases = [
        phase
        for one in recipes
        for phase in _Stage(one, stage, size, choose_precision(one, stage, card, size)).phases()
    ]
    return max(phases, key=lambda found: found.total)


def stages_of(recipe: Recipe) -> list[str]:
    """The stages of a recipe that load the base on a GPU."""
    by_ppo = any(policy.algorithm == "ppo" for policy in recipe.policies.values())
    optional = {
        "reward": recipe.reward.trained,
        "reward_quality": recipe.measures_reward,
        "ppo": by_ppo,
        "landscape": recipe.landscape is not None,
    }
    optional["synthetic"] = recipe.synthetic is not None
    return [stage for stage in STAGES if optional.get(stage, True)]


def choose_precision(recipe: Recipe, stage: str, card: float | None, size: Architecture | None = None) -> Precision:
    """The precision of full weights. `auto` becomes master if that fits in `card` bytes, else stochastic.

    `auto` always becomes master without a GPU, for weights sharded over several GPUs, and if sizes are unknown.
    """
    if recipe.precision != "auto":
        return recipe.precision
    size = size or architecture_of_recipe(recipe)
    if card is None or size is None or recipe.mode != "full" or _sharded(recipe) > 1:
        return "master"
    phases = _Stage(recipe, stage, size, "master").phases()
    return "master" if max(phase.total for phase in phases) <= card else "stochastic"


def _sharded(recipe: Recipe) -> int:
    """Number of GPUs over which trained weights, gradients and optimizer states are sharded, or 1."""
    return recipe.num_processes if recipe.sharded else 1


def uncounted(recipe: Recipe) -> list[str]:
    """Descriptions of the models that a recipe holds on the GPU and that `estimate` does not count."""
    found = [
        f"{part.value}, whose config.json is not on this machine"
        for part in recipe.reward.parts
        if part.kind == "classifier" and architecture_of_base(part.value) is None
    ]
    moving = any(one.sync_every for policy in recipe.policies.values() for one in policy.references("reference"))
    if moving and recipe.mode == "full":
        found.append("the float32 copy of a reference that is synced with the policy")
    others = sorted({policy.algorithm for policy in recipe.policies.values()} - {"ppo"})
    if others:
        found.append(f"the policies that TRL trains ({', '.join(others)})")
    options = recipe.ppo.rollout_options
    colocated = recipe.ppo.rollout_backend == "vllm" and options.get("mode", "colocate") == "colocate"
    if "ppo" in stages_of(recipe) and colocated:
        share = options.get("gpu_memory_utilization", 0.3)
        when = "while it samples" if options.get("enable_sleep_mode", True) else "during ppo"
        found.append(f"vLLM {when}, which takes {share:.0%} of the GPU (rollout_options: gpu_memory_utilization)")
    judge = recipe.evaluate.judge
    if judge is not None and judge.kind == "local":
        size = architecture_of_base(str(judge.model))
        weights = "" if size is None else f", {2 * size.parameters / GIB:.1f} GiB of weights in bf16 and its KV cache"
        found.append(
            f"the judge {judge.model}, in a stage of its own{weights} (evaluate.judge.concurrency requests per batch)"
        )
    return found


class _Stage:
    """Computes the memory of a stage, in bytes."""

    def __init__(self, recipe: Recipe, stage: str, size: Architecture, precision: Precision) -> None:
        self.recipe, self.stage, self.size, self.precision = recipe, stage, size, precision
        self.full = recipe.mode == "full"
        self.width = 4 if recipe.model.dtype == "float32" else 2  # bytes per number of the base
        self.trains = stage in ("sft", "reward", "ppo")
        self.optim = getattr(recipe, stage).optim if self.trains and (precision == "master" or not self.full) else ""
        self.own_values = stage == "ppo" and recipe.ppo.value == "adapter"  # a second adapter, with its own forward
        # a classifier has a score head in place of the output embeddings
        self.count = size.parameters - (size.head if stage == "reward" else 0)
        self.looked_up = 0 if size.tied else size.vocabulary * size.hidden  # input embeddings, in no product

    # weights, gradients, optimizer states

    def base(self) -> float:
        """Bytes of the frozen base, with linear layers in nf4 if the recipe quantises them."""
        rest = self.count - self.size.in_linears
        quantised = NF4.get(self.recipe.model.quantization or "", self.width)
        return quantised * self.size.in_linears + self.width * rest

    def adapter(self, rank: int | None = None) -> int:
        """Number of parameters of an adapter on the recipe's target modules, by default of the recipe's rank."""
        lora = self.recipe.adapter
        assert lora is not None
        return self.size.adapter(rank or lora.r, lora.target_modules)

    def references(self) -> list[int]:
        """Number of members of each reference of the policy whose references need the most memory."""
        soup = len(self.recipe.soup.members)
        counted = [  # one more for a synced reference, which gets the policy's rank in addition
            [
                (soup if one.soup else len(one.members)) + (one.sync_every is not None)
                for one in policy.references("reference")
            ]
            for policy in self.recipe.policies.values()
            if policy.algorithm == "ppo"
        ]
        return max(counted, key=len if self.full else sum, default=[])  # full: whole models; else ranks of adapters

    def roles(self) -> tuple[list[float], float]:
        """Bytes of each frozen model or adapter (references, rewards, …), and of the frozen shared base."""
        ppo, kinds = (
            self.stage == "ppo",
            [] if self.stage in ("synthetic", "sft", "reward") else self.recipe.reward.parts,
        )
        rewards = sum(part.kind == "adapter" for part in kinds)
        classifiers = [self.classifier(part.value) for part in kinds if part.kind == "classifier"]
        members = self.references() if ppo else []
        if self.full:
            model, reward = (float(self.width * (self.size.parameters - head)) for head in (0, self.size.head))
            return [model] * len(members) + [reward] * rewards + classifiers, 0.0 if self.trains else model
        rank = self.recipe.adapter.r if self.recipe.adapter else 0
        answering = {"evaluate": len(self.recipe.policies) + len(self.recipe.soups) + 2, "reward_quality": 1}.get(
            self.stage, 0
        )
        landscape = self.recipe.landscape
        stacked = len(landscape.names) if landscape is not None and self.stage == "landscape" else 0
        ranks = [rank * count for count in (*members, stacked) if count] + [rank] * (rewards + answering)
        return [4.0 * self.adapter(one) for one in ranks] + classifiers, self.base()

    def classifier(self, path: str) -> float:
        """Bytes of a sequence classifier in the recipe's dtype; 0 if its sizes are unknown (see `uncounted`)."""
        found = architecture_of_base(path)
        return 0.0 if found is None else float(self.width * (found.parameters - found.head))

    def trained(self) -> int:
        """Number of trained parameters."""
        if not self.trains:
            return 0
        return self.count if self.full else self.adapter() * (1 + self.own_values)

    def held(self, phase: str) -> tuple[float, float, float]:
        """Bytes of weights, gradients and optimizer states in a phase."""
        roles, shared = self.roles()
        if self.full and self.recipe.offload == "frozen" and self.stage == "ppo":
            roles = [max(roles)] if phase == "score" and roles else []
        weight, gradient, states = TRAINED[self.precision if self.full else "master"]
        states = STATES.get(self.optim, states)
        count, pieces = self.trained(), _sharded(self.recipe)
        weights = shared + sum(roles) + weight * count / pieces
        if self.full and count and pieces > 1 and phase in ("generate", "score"):
            weights += 2 * count  # the policy gathered for a rollout
        else:
            weights += self.casts(phase)
        gradients = gradient * count / pieces if phase in ("train", "step") else 0.0
        if pieces == 1 and self.recipe.num_processes > 1:
            gradients *= 2  # DDP's buckets
        temporary = 0.0
        if phase == "step" and self.full and self.precision == "stochastic":
            temporary = 12.0 * self.size.largest
        elif phase == "step" and self.optim == "adamw_torch":
            temporary = FOREACH * count / pieces
        return weights, gradients, states * count / pieces + temporary

    def casts(self, phase: str) -> float:
        """Bytes of autocast's bf16 copies of trained full weights, which exist until a forward ends.

        In training they matter only beside gradients of an earlier micro-batch: without these, the gradients that the
        backward makes take more.
        """
        if not self.full or self.precision != "master" or not self.trains or self.width != 2 or phase == "step":
            return 0.0
        if phase == "train" and not self.accumulates():
            return 0.0
        return 2.0 * (self.count - self.looked_up)

    def accumulates(self) -> bool:
        """Whether an optimizer step has several micro-batches."""
        parts = self.recipe.num_processes * (self.recipe.ppo.num_mini_batches if self.stage == "ppo" else 1)
        return getattr(self.recipe, self.stage).batch_size > parts * micro_batch(self.recipe, self.stage)

    # activations, KV cache, logits

    def layer(self) -> float:
        """Number of values that one layer saves per token for its backward.

        Adapters save the same inputs of linear layers as full weights (models/adapters/forward.py).
        """
        size = self.size
        heads, narrow = size.heads * size.head_dim, size.kv_heads * size.head_dim
        return 6 * size.hidden + 3 * heads + 2 * narrow + 4 * size.inner

    def inputs(self, tokens: int) -> float:
        """Bytes of the layers' inputs, which checkpointing keeps."""
        return float(tokens * (1 + self.own_values) * self.size.layers * self.size.hidden * self.width)

    def end(self, tokens: int) -> float:
        """Bytes that the last norm saves, in float32."""
        return 6.0 * tokens * (1 + self.own_values) * self.size.hidden

    def activations(self, tokens: int, checkpointing: bool) -> float:
        """Bytes that a forward saves for its backward; with checkpointing, these are only the layers' inputs."""
        if checkpointing:
            return self.inputs(tokens) + self.end(tokens)
        saved = tokens * (1 + self.own_values) * self.size.layers * self.layer() * self.width
        return saved + self.end(tokens)

    def forward(self, tokens: int) -> float:
        """Bytes of a forward without backward: activations and dequantised weights of one layer."""
        size, largest = self.size, max(one.inputs * one.outputs for one in self.size.linears)
        per_token = self.width * (4 * size.hidden + 3 * size.inner)
        return tokens * per_token + (2 * largest if self.recipe.model.quantization else 0)

    def logits(self, tokens: int, copies: float = 3) -> float:
        """Bytes of `copies` tensors of the size of the float32 logits of `tokens` tokens."""
        return 4.0 * copies * tokens * self.size.vocabulary

    def phases(self) -> list[Estimate]:
        """Estimates of all phases of the stage."""
        recipe, sampling = self.recipe, self.recipe.generation
        if self.stage in ("sft", "reward"):
            rows = micro_batch(recipe, self.stage) * (2 if self.stage == "reward" else 1)
            return self._training(rows * recipe.model.max_length, with_logits=self.stage == "sft")
        length = recipe.model.max_length
        if self.stage == "ppo" and recipe.ppo.max_prompt_length:
            length = recipe.ppo.max_prompt_length + sampling.max_new_tokens
        rows = generation_batch(recipe, self.stage)
        per_token = self.width * self.size.kv_per_token * rows
        cache, later = per_token * length, per_token * sampling.max_new_tokens  # later: for responses, after prefill
        first = self.forward(rows * (length - sampling.max_new_tokens)) - later
        prefill = max(first, cache / self.size.layers)  # growing the cache of a layer copies it
        limit = recipe.ppo.micro_batch_tokens if self.stage == "ppo" else None
        copies = SCORED + FORBIDDEN * (sampling.min_new_tokens > 0)
        scored = self.logits(CHUNK, copies if self.stage == "ppo" else 0)
        found = [
            self._phase("generate", prefill, cache, self.logits(rows, SAMPLED)),
            # logits are computed after the layers
            self._phase("score", max(self.forward(within(rows * length, length, limit)), scored) - scored, 0.0, scored),
        ]
        if self.stage == "ppo":
            tokens = within(micro_batch(recipe, self.stage) * length, length, limit)
            found += self._training(tokens, with_logits=True)
        return found

    def _training(self, tokens: int, *, with_logits: bool) -> list[Estimate]:
        logits = self._trained_logits(tokens) if with_logits else 0.0
        made = self.forward(0)
        if getattr(self.recipe, self.stage).gradient_checkpointing:
            # a layer is recomputed after the logits, what the last norm saved, and autocast's copies are freed
            before = self.end(tokens) + logits + self.casts("train")
            again = ANEW * tokens * self.layer() * self.width
            if self.full and self.precision == "master":
                again += 2.0 * self.size.in_linears / self.size.layers  # autocast's copies of that layer's weights
            made += self.inputs(tokens) + self.end(tokens) + max(0.0, again - before)
        else:
            made += self.activations(tokens, False)
        return [self._phase("train", made, 0.0, logits), self._phase("step", 0.0, 0.0, 0.0)]

    def _trained_logits(self, tokens: int) -> float:
        """Bytes of logits in training; with full weights also of the output embeddings' gradient while it is computed.

        Autocast's copies are gone by then, so only what exceeds them counts.
        """
        gradient = 6.0 * self.size.vocabulary * self.size.hidden * self.full  # in float32 and bf16, or three in bf16
        gradient = max(0.0, gradient - self.casts("train"))
        if self.stage == "sft":  # a tile of logits, and gradients of the states in float32 and bf16
            return 2.0 * min(tokens, TILE[0]) * TILE[1] + 6.0 * tokens * self.size.hidden + gradient
        return self.logits(min(CHUNK, tokens), LEARNED_BY_HEAD if self.full else LEARNED) + gradient

    def _phase(self, phase: str, activations: float, cache: float, logits: float) -> Estimate:
        return Estimate(self.stage, phase, *self.held(phase), activations, cache, logits, self.size.parameters)


def micro_batch(recipe: Recipe, stage: str) -> int:
    """Number of rows in one training forward of one process."""
    section: Training = getattr(recipe, stage)
    parts = recipe.num_processes * (recipe.ppo.num_mini_batches if stage == "ppo" else 1)
    return section.micro_batch_size or max(1, section.batch_size // parts)


def generation_batch(recipe: Recipe, stage: str) -> int:
    """Number of responses that one process generates or scores in one call."""
    if stage != "ppo":
        return recipe.generation.batch_size
    return recipe.ppo.rollout_batch_size or math.ceil(recipe.ppo.batch_size / recipe.num_processes)


def within(tokens: int, longest: int, limit: int | None) -> int:
    """Number of tokens of a forward pass under `micro_batch_tokens`; a longer sequence has a pass of its own."""
    return tokens if limit is None else min(tokens, max(limit, longest))
