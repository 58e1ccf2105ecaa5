"""Scores: an adapter on the shared base with a score head, or a Python function.

A reward is a callable `Responses → (B,)` of float32 scores. `as_reward` makes one of whatever a user passes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from . import adapters
from .config import SalsaError, require
from .rollout import Responses, last_token_states

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

REWARD_ADAPTER = "reward"
CALLED_WITH = ("prompts", "completions", "completion_ids", "finished")


class Reward(Protocol):
    """What scores responses."""

    def __call__(self, responses: Responses) -> Tensor:
        """→ (B,), float32."""


class AdapterReward:
    """The reward adapter on the shared base, and its linear head on the last token that counts."""

    def __init__(self, model: PeftModel, folder: Path, micro_batch_size: int = 64) -> None:
        self.model, self.micro_batch_size = model, micro_batch_size
        self.adapter = adapters.free_name(model, REWARD_ADAPTER)
        adapters.attach(model, folder, self.adapter)
        self.head = adapters.score_head(folder).to(model.device)
        self.toggle = adapters.Toggle(model)

    @torch.no_grad()
    def __call__(self, responses: Responses) -> Tensor:
        scores = []
        with self.toggle(self.adapter):
            for index in torch.arange(len(responses.finished)).split(self.micro_batch_size):
                part = responses.rows(index)
                scores.append(
                    self.head(last_token_states(self.model, part.input_ids, part.attention_mask).float()).squeeze(-1)
                )
        return torch.cat(scores)


class FunctionReward:
    """A Python function with TRL's reward-function signature: `(prompts, completions, completion_ids, …) -> list[float]`.

    Called with those of CALLED_WITH that it takes. prompts and completions are text, also where the prompt was messages; `finished`
    says whether EOS ended the response; other columns of the data are not passed. Special tokens
    are left out, as by TRL, unless `special_tokens` keeps those of the completions.
    """

    def __init__(
        self,
        function: Callable[..., Sequence[float]],
        tokenizer: PreTrainedTokenizerBase,
        *,
        special_tokens: bool = False,
    ) -> None:
        self.function, self.tokenizer, self.special_tokens = function, tokenizer, special_tokens
        taken = inspect.signature(function).parameters
        keywords = any(p.kind is p.VAR_KEYWORD for p in taken.values())
        self.takes = {name for name in CALLED_WITH if keywords or name in taken}

    def __call__(self, responses: Responses) -> Tensor:
        prompts = decode(self.tokenizer, responses.prompt_ids, responses.prompt_mask)
        completions = decode(
            self.tokenizer, responses.response_ids, responses.response_mask, special_tokens=self.special_tokens
        )
        ids = [row[mask].tolist() for row, mask in zip(responses.response_ids, responses.response_mask, strict=True)]
        given = dict(zip(CALLED_WITH, (prompts, completions, ids, responses.finished.tolist()), strict=True))
        scores = self.function(**{name: value for name, value in given.items() if name in self.takes})
        found = f"reward function {getattr(self.function, '__name__', self.function)}: found"
        require(hasattr(scores, "__len__"), f"{found} {scores!r}, expected a list of one score for each response")
        require(len(scores) == len(ids), f"{found} {len(scores)} scores for {len(ids)} responses, expected one each")
        try:
            return torch.tensor([float(score) for score in scores], device=responses.response_ids.device)
        except (TypeError, ValueError) as error:
            raise SalsaError(f"{found} {scores!r:.80}, expected numbers") from error


def decode(tokenizer: PreTrainedTokenizerBase, ids: Tensor, mask: Tensor, *, special_tokens: bool = False) -> list[str]:
    """Token ids (B, L) where the mask is True → text, special tokens left out or kept."""
    rows = [row[keep].tolist() for row, keep in zip(ids, mask, strict=True)]
    return list(tokenizer.batch_decode(rows, skip_special_tokens=not special_tokens))


def as_reward(reward: Reward | Callable[..., Sequence[float]] | str | Path, model: PeftModel,
              tokenizer: PreTrainedTokenizerBase) -> Reward:  # fmt: skip
    """An AdapterReward's folder or Hub id, a function of TRL's signature, or a Reward → a Reward."""
    if isinstance(reward, str | Path):
        return AdapterReward(model, adapters.local_folder(str(reward)))
    if isinstance(reward, AdapterReward | FunctionReward):
        return reward
    if not callable(reward):
        raise SalsaError(f"reward: found {type(reward).__name__}, expected a reward adapter's folder or a function")
    return FunctionReward(reward, tokenizer)  # type: ignore[arg-type]


class RunningScale:
    """Divides scores by their standard deviation over all that came before and these (TRL 0.8's RunningMoments)."""

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, 0.0, 0.0

    def __call__(self, scores: Tensor) -> Tensor:
        """(B,) → (B,)"""
        for score in scores.double().tolist():
            self.count += 1
            change = score - self.mean
            self.mean += change / self.count
            self.squares += change * (score - self.mean)
        deviation = (self.squares / max(self.count - 1, 1)) ** 0.5
        return scores / max(deviation, 1e-8) if deviation > 0 else scores
