"""Responses whose lengths differ as in real data, and the number of tokens that a model computes for them."""

from __future__ import annotations

import contextlib
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from salsa_peft.models.responses import Responses, pad_responses

PAD, EOS = 0, 2
CPU = torch.device("cpu")
Lengths = list[tuple[int, int]]
"""Number of tokens of each prompt and of each response."""


def lognormal(count: int, seed: int = 0) -> Lengths:
    """Lengths as in mixed chats, some short and few long: medians 40 and 30, one number in six twice as much."""
    draw = random.Random(seed)

    def length(median: float) -> int:
        return int(min(max(draw.lognormvariate(math.log(median), 0.7), 4), 400))

    return [(length(40), length(30)) for _ in range(count)]


def ultrafeedback(shared: Path, count: int) -> Lengths:
    """Lengths of real pairs' prompts and chosen answers, at four characters a token."""
    lines = (shared / "data" / "preferences.jsonl").read_text().splitlines()[:count]
    texts = [[row["prompt"][0]["content"], row["chosen"][0]["content"]] for row in map(json.loads, lines)]
    return [(len(prompt) // 4 + 8, len(answer) // 4 + 2) for prompt, answer in texts]


def made(lengths: Lengths, vocabulary: int = 60) -> Responses:
    """Random responses of these lengths; every second one ends with EOS."""
    draw = random.Random(1)
    prompts, answers = (
        [[draw.randrange(6, vocabulary) for _ in range(pair[side])] for pair in lengths] for side in (0, 1)
    )
    answers = [[*answer[:-1], EOS] if row % 2 else answer for row, answer in enumerate(answers)]
    return pad_responses(prompts, answers, PAD, [EOS], CPU)


@contextlib.contextmanager
def computed(module: nn.Module) -> Iterator[list[tuple[int, int]]]:
    """Shapes of the token ids of each forward pass of a module."""
    shapes: list[tuple[int, int]] = []

    def note(_: nn.Module, args: Any, options: Any) -> None:
        ids = options["input_ids"] if "input_ids" in options else args[0]
        shapes.append(tuple(ids.shape))

    with module.register_forward_pre_hook(note, with_kwargs=True):
        yield shapes
