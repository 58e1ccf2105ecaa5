"""Measures of a batch of responses that the guards read, computed on the CPU from lists. Imports no torch."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from statistics import fmean

FEWEST_PROMPTS = 8
"""Fewest prompts with several responses from which a share of variance is estimated."""


def repetition(responses: Sequence[Sequence[int]], n: int = 4) -> float:
    """Mean share of repeated n-grams, 1 − unique / all, of the token ids of responses. Shorter responses count as 0."""
    shares = []
    for response in responses:
        grams = list(zip(*(response[first:] for first in range(n)), strict=False))
        shares.append(1 - len(set(grams)) / len(grams) if grams else 0.0)
    return sum(shares) / len(shares)


def variety(responses: Sequence[Sequence[int]]) -> tuple[float, float]:
    """Share of distinct responses, distinct / all, and share of the commonest response, from their token ids."""
    counts = Counter(map(tuple, responses))
    return len(counts) / len(responses), max(counts.values()) / len(responses)


def between_prompt_share(prompts: Sequence[Sequence[int]], scores: Sequence[float]) -> float | None:
    """Share of the scores' variance that lies between prompts: ICC(1) of a one-way analysis of variance.

        σ²_b / (σ²_b + MSW),  σ²_b = max(0, (MSB − MSW) / n₀),  n₀ = (N − Σ n_i² / N) / (a − 1)

    prompts: the token ids of each score's prompt. Only the a prompts with several of the N responses count (n_i each).
    None if these are fewer than FEWEST_PROMPTS, or have fewer than half of the responses, or if all scores are equal.
    """
    by_prompt: dict[tuple[int, ...], list[float]] = defaultdict(list)
    for prompt, score in zip(prompts, scores, strict=True):
        by_prompt[tuple(prompt)].append(score)
    groups = [group for group in by_prompt.values() if len(group) > 1]
    count, number = sum(map(len, groups)), len(groups)
    if number < FEWEST_PROMPTS or 2 * count < len(scores):
        return None
    means = [fmean(group) for group in groups]
    mean = fmean(score for group in groups for score in group)
    between = sum(len(group) * (own - mean) ** 2 for group, own in zip(groups, means, strict=True)) / (number - 1)
    within = sum((score - own) ** 2 for group, own in zip(groups, means, strict=True) for score in group)
    within /= count - number
    size = (count - sum(len(group) ** 2 for group in groups) / count) / (number - 1)
    variance = max(0.0, (between - within) / size)
    return variance / (variance + within) if variance + within > 0 else None
