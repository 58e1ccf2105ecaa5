"""The recipe's `evaluate.judge`: who says which of two answers is better. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from .fields import STRICT, Count, NonNegative, Positive, require
from .messages import short

KINDS = ("openai", "local", "reward", "function")
"""The rows of judges.JUDGES."""


@dataclass(config=STRICT, kw_only=True)
class Judge:
    """A judge and how it is asked. It sees each pair of answers twice, in both orders; a win needs both (FastChat's rule)."""

    kind: Literal["openai", "local", "reward", "function"]
    """openai: any endpoint that speaks OpenAI's chat protocol. local: a chat model in this process. reward: the recipe's reward, its scores
    compared. function: your own, module:name."""
    model: str | None = None
    """openai: the endpoint's name of the model. local: a chat model's folder or Hub id. function: module:name, as in reward.model."""
    base_url: str | None = None
    """openai: where the endpoint is, such as http://localhost:8000/v1. None: the package openai's own."""
    api_key_env: str = "OPENAI_API_KEY"
    """openai: the environment variable that holds the key. The key itself is in no recipe, log or file."""
    prompt: Literal["figure7", "fastchat"] = "figure7"
    """figure7: what the paper's judge is told (Figure 7), in our words. fastchat: FastChat's own file of prompts, by turn and category."""
    prompts: str | None = None
    """fastchat: the path of its judge_prompts.jsonl."""
    references: str | None = None
    """fastchat: the path of its reference answers (reference_answer/gpt-4.jsonl) for math, reasoning and coding. None: those that the
    questions bring, and without one the prompt that needs none."""
    temperature: NonNegative = 0.0
    """Of the judge (FastChat: 0)."""
    max_tokens: Count = 2048
    """Of one judgment (FastChat: 2048)."""
    concurrency: Count = 8
    """openai: requests under way at once. local: games judged in one batch."""
    timeout: Positive = 120.0
    """openai: seconds for one request."""
    retries: Annotated[int, Field(ge=0)] = 6
    """openai: tries after the first, with growing pauses, on 408, 409, 429, 5xx, time-outs and cut connections."""
    ask_again: Annotated[int, Field(ge=0)] = 1
    """Times an answer without a verdict is asked again before it counts as missing."""
    budget: Count | None = None
    """openai: requests that may be sent in all; what is left over counts as missing and is asked by the next run. None: no limit."""
    margin: NonNegative = 0.0
    """reward: a difference of scores up to this is a tie."""

    def check(self, where: str) -> None:
        """Raise SalsaError where the kind lacks what it needs."""
        needs = {"openai": "the endpoint's name of a model", "local": "a chat model's folder or Hub id", "function": "module:name"}  # fmt: skip
        if self.kind in needs:
            require(
                self.model is not None, f"{where}.model: found nothing for {self.kind}, expected {needs[self.kind]}"
            )
        else:
            require(
                self.model is None,
                f"{where}.model: found {short(self.model)}, expected none: the judge reward takes the recipe's",
            )
        require(
            self.prompt != "fastchat" or self.prompts is not None,
            f"{where}.prompts: found nothing, expected the path of FastChat's judge_prompts.jsonl; or set {where}.prompt=figure7",
        )


def as_judge(value: Any) -> Any:
    """Bare text is the kind."""
    return {"kind": value} if isinstance(value, str) else value
