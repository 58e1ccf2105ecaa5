"""The `synthetic` section: training data that the base model writes and a Python function judges."""

from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from salsa_peft.config.fields import STRICT, Count, Seed

SYNTHETIC_DATA = ("demonstrations", "preferences")
"""Kinds of training data that the synthetic stage writes, for those that the section `data` does not name."""


@dataclass(config=STRICT, kw_only=True)
class Synthetic:
    """Demonstrations and preferences made of the base's own answers to data.prompts (evaluation/synthetic.py).

    Length and temperature of the answers are set in the section `generation`.
    """

    function: str
    """module:name of the function that scores the answers: a Python function with the signature of TRL's reward
    functions, in the recipe's folder or on Python's path."""
    num_generations: Annotated[int, Field(ge=2)] = 8
    """Number of answers to each prompt. The best answer becomes a demonstration. Source: the name in TRL's GRPO."""
    answers_per_pair: Annotated[int, Field(ge=2)] = 4
    """Number of answers of which the best and the worst become a preference pair; each answer is considered once, so
    num_generations / answers_per_pair pairs come of a prompt. 2: all answers are compared two by two. With 4, answers
    of a pair differ more: in a trial with stories, a reward model then learned the function from a quarter of the
    steps."""
    limit: Count | None = None
    """Number of prompts to answer: the first ones. None: all of data.prompts."""
    seed: Seed = 0
    """Seed of sampling."""
