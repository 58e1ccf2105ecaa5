"""What both engines have in common: their interface, log-probs of sampled tokens, and a check of end tokens."""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Sequence
from typing import Any

from transformers import GenerationConfig

from salsa_peft.utils.errors import require

Answers = tuple[list[list[int]], list[list[float]] | None]
"""Token ids of each response, and the sampler's log-prob of each token if these were asked for (NaN: unknown)."""


class Engine(abc.ABC):
    """An inference engine with weights of its own."""

    llm: Any = None
    """vllm.LLM in this process; None for a server."""
    sleep_level: int
    """vLLM's level of sleep between rollouts. 1: weights are kept in CPU memory. 2: weights are discarded."""

    @abc.abstractmethod
    def sync(self) -> None:
        """Send the policy's weights to the engine."""

    @abc.abstractmethod
    def generate(self, prompts: list[list[int]]) -> Answers:
        """Sample a response to each prompt."""


def sampled_logprobs(
    answers: Sequence[Sequence[int]], logprobs: list[list[list[float | None]]] | None, ids: list[list[list[int]]] | None
) -> list[list[float]] | None:
    """The log-prob of each sampled token, from TRL's lists of candidates and their ids; NaN where vLLM has none."""
    if logprobs is None or ids is None:
        return None
    found = []
    for answer, values, candidates in zip(answers, logprobs, ids, strict=True):
        pairs = [dict(zip(*both, strict=True)) for both in zip(candidates, values, strict=True)]
        drawn = [pair[token] for token, pair in zip(answer, pairs, strict=True)]
        found.append([float("nan") if value is None else value for value in drawn])
    return found


def require_same_ends(lm: Any, ends: tuple[int, ...]) -> None:
    """Raise SalsaError if the base has EOS tokens that are not in `ends`; vLLM's min_tokens forbids them."""
    named = [lm.config.eos_token_id]
    with contextlib.suppress(OSError):  # no generation_config.json
        named.append(GenerationConfig.from_pretrained(lm.name_or_path).eos_token_id)
    others = {token for entry in named for token in (entry if isinstance(entry, list) else [entry])} - {None, *ends}
    require(
        not others,
        f"min_new_tokens: the base's configuration has the EOS tokens {sorted(others)} besides {list(ends)}, the"
        " tokens that end a response, and vLLM would forbid all of them. Set min_new_tokens to 0, or use backend hf",
    )
