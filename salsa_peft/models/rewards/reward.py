"""Reward adapters, weighted sums of rewards, and making the rewards of a recipe or of a library user."""

from __future__ import annotations

import inspect
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from salsa_peft.config.rewards import ADAPTER, FUNCTION, HELD_OUT_SCORE
from salsa_peft.config.schema import Recipe
from salsa_peft.data.chat.turn_ends import assistant_turn
from salsa_peft.models import precision
from salsa_peft.models.adapters import bases, lora
from salsa_peft.models.base import causal_lm
from salsa_peft.models.responses import Responses, append_turn_end
from salsa_peft.models.rewards.base import CallableReward, Reward, Rows
from salsa_peft.models.rewards.classifier import ClassifierReward, load_classifier_reward
from salsa_peft.models.rewards.function import FunctionReward, load_function
from salsa_peft.models.rewards.last_tokens import last_token_scores
from salsa_peft.models.tokenizers import compare_tokenizer
from salsa_peft.utils.errors import SalsaError, require
from salsa_peft.utils.hub import readable_hub_errors
from salsa_peft.utils.messages import short
from salsa_peft.utils.oom import MicroBatchLimit

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

REWARD_ADAPTER = "reward"
EXPECTED = "pass a folder or Hub id, a sequence classifier, a function, module:name, or a list of rewards"


class AdapterReward(Reward):
    """A reward adapter on the shared base, whose linear head scores the last token of the conversation.

    tokenizer: the tokenizer whose chat template the adapter was trained with. If given, the tokens that the template
    writes after a turn's end token are appended before scoring, as in TRL's RewardTrainer.
    """

    def __init__(
        self,
        model: PeftModel,
        folder: Path,
        micro_batch_size: int = 64,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        self.model, self.folder, self.tokenizer, self.name = model, folder, tokenizer, ADAPTER
        self.micro_batch = MicroBatchLimit(micro_batch_size, "reward, rows scored at once")
        self.adapter = lora.unused_name(model, REWARD_ADAPTER)
        lora.attach(model, folder, self.adapter)
        self.head = lora.score_head(folder).to(model.device)
        self.toggle = lora.Toggle(model)

    def __call__(self, responses: Responses, rows: Rows) -> Tensor:
        if self.tokenizer is not None:
            responses = append_turn_end(responses, rows, assistant_turn(self.tokenizer))
        return self.micro_batch.run(lambda: self._scores(responses), len(rows))

    def weights(self) -> Iterable[Tensor]:
        """The weights of the adapter and of its score head."""
        return [*lora.parameters(self.model, self.adapter), self.head.weight]

    def _scores(self, responses: Responses) -> Tensor:
        head = self.head.to(responses.response_ids.device)
        with self.toggle(self.adapter), precision.autocast(self.model):
            return last_token_scores(self.model, head, responses, self.micro_batch.rows, self.micro_batch_tokens)


class Part(NamedTuple):
    """A reward in a weighted sum, with its weight and its name in logs."""

    reward: Reward
    weight: float
    name: str


class WeightedReward(Reward):
    """The weighted sum, as in TRL, of the rewards that apply to a response.

    Weights are not rescaled where a reward does not apply. A reward of weight 0 is only logged; the first such reward is
    the held-out reward, whose mean is logged as `objective/held_out_score` too and read by PPO's guard over_optimization.
    Raises SalsaError if all weights are 0, or if no reward with a nonzero weight applies to a response.
    """

    def __init__(self, parts: Sequence[tuple[Reward, float, str]]) -> None:
        self.parts = [Part(*part) for part in parts]
        require(bool(self.parts), "reward: the weighted sum has no rewards; give at least one reward")
        require(
            any(part.weight for part in self.parts),
            "reward: all weights (reward_weights) are 0, so that nothing is optimized; give one reward another weight",
        )
        name, times = Counter(part.name for part in self.parts).most_common(1)[0]
        require(times == 1, f"reward: {times} rewards have the name {name}; give each reward a name of its own")

    def __call__(self, responses: Responses, rows: Rows) -> Tensor:
        total = torch.zeros(len(rows), device=responses.response_ids.device)
        without_score = torch.ones_like(total, dtype=torch.bool)
        sums: list[Tensor] = []
        for reward, weight, _ in self.parts:
            scores, applies = reward.scores_and_mask(responses, rows)
            sums += [scores.sum(), applies.sum()]  # a score is 0 where the reward does not apply
            if weight:
                total = total + weight * scores
                without_score &= ~applies
        *sums_and_counts, missing = torch.stack([one.float() for one in [*sums, without_score.sum()]]).tolist()
        held_out = next((part for part in self.parts if not part.weight), None)
        for part, found, count in zip(self.parts, sums_and_counts[::2], sums_and_counts[1::2], strict=True):
            self.add_metric(f"rewards/{part.name}/mean", found, int(count))
            if part is held_out:
                self.add_metric(HELD_OUT_SCORE, found, int(count))
        names = ", ".join(part.name for part in self.parts if part.weight)
        require(
            not missing,
            f"reward: {int(missing)} of {len(rows)} responses get no score, because none of the rewards {names} applies"
            " to them; return a score for each response from at least one reward",
        )
        return total

    def components(self) -> list[Reward]:
        """The rewards in the sum; a sum within the sum is replaced by its own rewards."""
        return [one for part in self.parts for one in part.reward.components()]

    def metric_names(self) -> list[str]:
        """The names of the rewards' means, and that of the held-out reward."""
        held_out = [] if all(part.weight for part in self.parts) else [HELD_OUT_SCORE]
        own = [(f"rewards/{part.name}/mean", *part.reward.metric_names()) for part in self.parts]
        return [*(name for names in own for name in names), *held_out]

    def take_metrics(self) -> dict[str, tuple[float, int]]:
        """Return each reward's `rewards/<name>/mean`, over responses with a score, and its own metrics."""
        metrics = super().take_metrics()
        for part in self.parts:
            metrics |= part.reward.take_metrics()
        return metrics


def adapter_in(reward: Reward) -> AdapterReward | None:
    """Return `reward` if it is an AdapterReward, else the first AdapterReward in a weighted sum, or None."""
    return next((one for one in reward.components() if isinstance(one, AdapterReward)), None)


def as_reward(
    reward: Any,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    micro_batch_size: int = 64,
    *,
    weights: Sequence[float] | None = None,
    tokenizers: Any = None,
) -> Reward:
    """Make a Reward of any of the following:

    - a folder or Hub id of a reward adapter (with an adapter_config.json; `model` must be a PeftModel) or of a sequence
      classifier;
    - a loaded sequence classifier, whose tokenizer is loaded from its name_or_path;
    - a function with the signature of TRL's reward functions, or its name as [FOLDER/]module:name;
    - a Reward, or any callable `(responses, rows) → (B,)`;
    - a list of these for their weighted sum; each entry is a reward, (reward, weight) or (reward, weight, name).
      Entries of the same name, such as two lambdas, get numbers: lambda, lambda-2.

    weights: the weight of each entry, in place of those in tuples (TRL: reward_weights). tokenizers: the tokenizer of
    each entry that is a loaded sequence classifier, None for others (TRL: reward_processing_classes). Raises SalsaError
    for anything else.
    """
    if isinstance(reward, list):
        require(bool(reward), f"reward: the list is empty; {EXPECTED}")
        return _weighted(reward, model, tokenizer, micro_batch_size, weights, tokenizers)
    if weights is not None:
        return as_reward([reward], model, tokenizer, micro_batch_size, weights=weights, tokenizers=tokenizers)
    if isinstance(reward, str | Path):
        return _load(str(reward), model, tokenizer, micro_batch_size)
    if isinstance(reward, PreTrainedModel | PeftModel):
        (own,) = tokenizers if isinstance(tokenizers, list) else [tokenizers]
        return _loaded_classifier(reward, own, tokenizer, micro_batch_size)
    if isinstance(reward, Reward):
        return reward
    if not callable(reward):
        raise SalsaError(f"reward: an object of type {type(reward).__name__} is not a reward; {EXPECTED}")
    takes_responses = list(inspect.signature(reward).parameters) == ["responses", "rows"]
    return CallableReward(reward) if takes_responses else FunctionReward(reward, tokenizer)


def _loaded_classifier(
    reward: PreTrainedModel | PeftModel,
    own: PreTrainedTokenizerBase | None,
    tokenizer: PreTrainedTokenizerBase,
    micro_batch_size: int,
) -> ClassifierReward:
    """The reward of a loaded sequence classifier. own: its tokenizer; None to load it from its name_or_path."""
    name = str(causal_lm(reward).name_or_path or "")
    if own is None:
        require(
            bool(name),
            f"reward: the {type(reward).__name__} has no name_or_path from which its tokenizer could be loaded; pass"
            " ClassifierReward(classifier, its_tokenizer, policy_tokenizer)",
        )
        with readable_hub_errors(name):
            own = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    last = name.rstrip("/").rsplit("/", 1)[-1] or "classifier"
    return ClassifierReward(reward, own, tokenizer, micro_batch_size, last)  # type: ignore[arg-type]


def _weighted(
    entries: list[Any],
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    micro_batch_size: int,
    weights: Sequence[float] | None,
    tokenizers: Any,
) -> WeightedReward:
    """The weighted sum of a list; see `as_reward`."""
    tokenizers = tokenizers if isinstance(tokenizers, list) else [tokenizers] * len(entries)
    for option, given in (("reward_weights", weights), ("reward_processing_classes", tokenizers)):
        require(
            given is None or len(given) == len(entries),
            f"{option}: there are {len(given or ())} for {len(entries)} rewards; give one for each",
        )
    require(
        weights is None or not any(isinstance(entry, tuple) for entry in entries),
        "reward_weights: the list of rewards has weights too, in tuples; give them in one place",
    )
    parts, taken = [], {entry[2] for entry in entries if isinstance(entry, tuple) and len(entry) == 3}
    for index, entry in enumerate(entries):
        part = _as_part(entry, model, tokenizer, micro_batch_size, tokenizers[index])
        part = part if weights is None else part._replace(weight=float(weights[index]))
        if not (isinstance(entry, tuple) and len(entry) == 3):
            numbered = (f"{part.name}-{number}" for number in range(2, len(entries) + 2))
            part = part._replace(name=next(name for name in (part.name, *numbered) if name not in taken))
            if not isinstance(entry, Reward):  # its own metrics and messages carry the name too
                part.reward.name = part.name
            taken.add(part.name)
        parts.append(part)
    return WeightedReward(parts)


def _as_part(
    entry: Any, model: nn.Module, tokenizer: PreTrainedTokenizerBase, micro_batch_size: int, own: Any = None
) -> Part:
    given = entry if isinstance(entry, tuple) else (entry,)
    require(1 <= len(given) <= 3, f"reward: a tuple in the list has {len(given)} entries; write (reward, weight, name)")
    reward = as_reward(given[0], model, tokenizer, micro_batch_size, tokenizers=own)
    weight, name = given[1] if len(given) > 1 else 1.0, given[2] if len(given) > 2 else None
    require(
        isinstance(weight, int | float) and not isinstance(weight, bool) and math.isfinite(weight),
        f"reward: the weight {short(weight)} is not a finite number",
    )
    return Part(reward, float(weight), reward.name if name is None else name)


def _load(
    path: str, model: nn.Module, tokenizer: PreTrainedTokenizerBase, micro_batch_size: int, **options: Any
) -> Reward:
    """Load the reward of a module:name, folder or Hub id. options: those of load_classifier_reward."""
    if not os.path.isdir(path) and FUNCTION.match(path):
        return FunctionReward(load_function(path), tokenizer)
    folder = lora.adapter_folder(path)
    if not (folder / lora.CONFIG).is_file():
        return load_classifier_reward(path, tokenizer, micro_batch_size, **options)
    if not isinstance(model, PeftModel):
        raise SalsaError(
            f"{path}: a reward adapter needs a policy that is an adapter on the same base, but the policy is a"
            f" {type(model).__name__} with full weights; use a sequence classifier as reward"
        )
    base = str(causal_lm(model).name_or_path)
    bases.require_same_base(folder, bases.fingerprints_of(base), base)
    compare_tokenizer(folder, tokenizer, base)
    return AdapterReward(model, folder, micro_batch_size, tokenizer)


def recipe_reward(recipe: Recipe, model: nn.Module, inputs: Mapping[str, Path], tokenizer: PreTrainedTokenizerBase,
              micro_batch_size: int) -> Reward:  # fmt: skip
    """Make a recipe's reward. inputs["reward"]: the reward stage's folder, if the recipe has that stage."""
    parts = []
    for part in recipe.reward.parts:
        path = str(inputs["reward"]) if part.kind == ADAPTER else part.value
        reward = _load(path, model, tokenizer, micro_batch_size, name=part.name, dtype=recipe.model.dtype)
        parts.append(Part(reward, part.weight, part.name))
    return parts[0].reward if len(parts) == 1 and parts[0].weight == 1 else WeightedReward(parts)


class RunningScale:
    """Divides scores by the standard deviation of all scores so far, as RunningMoments in TRL 0.8."""

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, 0.0, 0.0

    def __call__(self, scores: Tensor) -> Tensor:
        """Include the scores (B,) in the standard deviation, and return the scaled scores (B,)."""
        for score in scores.double().tolist():
            self.count += 1
            change = score - self.mean
            self.mean += change / self.count
            self.squares += change * (score - self.mean)
        deviation = (self.squares / max(self.count - 1, 1)) ** 0.5
        return scores / max(deviation, 1e-8) if deviation > 0 else scores
