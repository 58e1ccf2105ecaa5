"""Tests of batches of similar length (models/batches.py)."""

import itertools
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from salsa_peft.models.batches import MULTIPLICATIONS, overhead, split_by_length, split_by_tokens, tokens_per_pass


def cost(batches: Sequence[Sequence[int]], lengths: Sequence[int], pass_tokens: int) -> int:
    """Tokens with padding, and the overhead of each batch."""
    return sum(len(batch) * max(lengths[row] for row in batch) + overhead(lengths, pass_tokens) for batch in batches)


def every_split(lengths: Sequence[int]) -> list[list[list[int]]]:
    """All splits of the sorted rows into batches."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    found = []
    for cuts in itertools.product([False, True], repeat=len(order) - 1):
        bounds = [0, *(place for place, cut in enumerate(cuts, 1) if cut), len(order)]
        found.append([order[start:end] for start, end in itertools.pairwise(bounds)])
    return found


def allowed(batches: Sequence[Sequence[int]], lengths: Sequence[int], rows: int, tokens: int | None) -> bool:
    return all(
        len(batch) <= rows
        and (tokens is None or len(batch) == 1 or len(batch) * max(lengths[row] for row in batch) <= tokens)
        for batch in batches
    )


@pytest.mark.parametrize("seed", range(40))
def test_the_split_is_the_cheapest_of_all(seed: int) -> None:
    draw = random.Random(seed)
    lengths = [draw.choice([draw.randint(0, 40), draw.randint(30, 300)]) for _ in range(draw.randint(1, 9))]
    rows, tokens, pass_tokens = draw.randint(1, 9), draw.choice([None, 60, 200, 700]), draw.choice([0, 0, 130])
    found = split_by_length(lengths, rows, tokens, pass_tokens=pass_tokens)
    assert allowed(found, lengths, rows, tokens)
    assert sorted(row for batch in found for row in batch) == list(range(len(lengths)))
    splits = [batches for batches in every_split(lengths) if allowed(batches, lengths, rows, tokens)]
    assert cost(found, lengths, pass_tokens) == min(cost(batches, lengths, pass_tokens) for batches in splits)


def test_the_order_is_by_length_and_stable() -> None:
    assert split_by_length([5, 300, 5, 300, 4], 8) == [[4, 0, 2], [1, 3]]
    assert split_by_length([5, 300, 5, 300, 4], 2) == [[4], [0, 2], [1, 3]]


def test_edge_cases() -> None:
    assert split_by_length([], 8) == []
    assert split_by_length([0, 0], 8) == [[0, 1]]
    assert split_by_length([900, 10, 10], 8, tokens=20) == [[1, 2], [0]]
    assert split_by_length([20] * 64, 64) == [list(range(64))]


def lognormal(median: float, shortest: int, longest: int) -> Callable[[random.Random], int]:
    return lambda draw: int(min(max(draw.lognormvariate(math.log(median), 0.7), shortest), longest))


@pytest.mark.parametrize(
    ("length", "rows", "most"),
    [
        (lognormal(600, 74, 4576), 64, 1.02),
        (lognormal(600, 74, 4576), 8, 1.02),
        (lognormal(80, 10, 600), 64, 1.04),
        (lognormal(80, 10, 600), 8, 1.04),
    ],
    ids=["chats", "chats, micro-batches of 8", "short texts", "short texts, micro-batches of 8"],
)
def test_little_is_padding(length: Callable[[random.Random], int], rows: int, most: float) -> None:
    draw, needed, computed = random.Random(0), 0, 0
    for _ in range(50):
        lengths = sorted(length(draw) for _ in range(64))
        for start in range(0, 64, rows):
            part = lengths[start : start + rows]
            needed += sum(part)
            computed += sum(len(batch) * part[batch[-1]] for batch in split_by_length(part, rows))
    assert needed <= computed <= most * needed


def test_a_few_short_rows_are_one_batch() -> None:
    draw = random.Random(0)
    for _ in range(50):
        assert len(split_by_length([draw.randint(1, 32) for _ in range(8)], 8)) == 1
    assert len(split_by_length([1] * 7 + [32], 4)) == 2


@pytest.mark.parametrize(
    ("rows", "tokens", "expected"),
    [(8, None, [[0, 1, 2, 3]]), (3, None, [[0, 1, 2], [3]]), (8, 6, [[0, 1], [2], [3]]), (8, 9, [[0, 1], [2, 3]])],
)
def test_rows_without_padding_are_split_in_their_order(
    rows: int, tokens: int | None, expected: list[list[int]]
) -> None:
    assert split_by_tokens([2, 4, 7, 2], rows, tokens) == expected


def test_a_small_model_has_fewer_passes(make_base: Any, make_adapter: Any) -> None:
    """The largest matrix counts, without the embeddings and whatever the adapters."""
    model = make_base()
    shape = model.config
    largest = max(shape.hidden_size * shape.intermediate_size, shape.hidden_size**2)
    assert tokens_per_pass(model) == MULTIPLICATIONS // largest > 64
    assert tokens_per_pass(make_adapter(model, "policy", 1)) == tokens_per_pass(model)
    lengths = [8, 9, 10, 11, 12, 13, 14, 15] * 8
    assert len(split_by_length(lengths, 64)) > 2
    assert len(split_by_length(lengths, 64, pass_tokens=tokens_per_pass(model))) == 1
