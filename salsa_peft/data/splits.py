"""Splitting preference pairs into training and held-out pairs, so that no prompt is in both."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

from salsa_peft.utils.errors import require
from salsa_peft.utils.fingerprints import canonical_json

SPLIT_SEED = 0
"""Seed of the order in which prompts are held out, the same in reward, dpo and kto."""


class Split(NamedTuple):
    """The positions of the training rows and of the held-out rows, each in shuffled order."""

    train: list[int]
    held_out: list[int]


def prompt_digest(row: Mapping[str, Any]) -> str:
    """SHA-256 of a pair's prompt: the turns that chosen and rejected have in common.

    Roles and texts count; blanks at the ends of a text, tools and options of the chat template do not.
    """
    chats = [[(turn["role"], _text(turn["content"])) for turn in row[side]] for side in ("chosen", "rejected")]
    pairs = enumerate(zip(row["chosen"], row["rejected"], strict=False))
    shared = next((place for place, (one, other) in pairs if one != other), min(map(len, chats)))
    return hashlib.sha256(canonical_json(chats[0][:shared]).encode()).hexdigest()


def _text(content: Any) -> str:
    """The text of a message's content, which is text or a list of parts."""
    return (content if isinstance(content, str) else "".join(part["text"] for part in content)).strip()


def split_by_prompt(prompts: Sequence[Hashable], held_out: int) -> Split:
    """Split pairs so that all pairs of one prompt are on one side. prompts: the prompt of each pair.

    The number of held-out pairs is the nearest to `held_out` that whole prompts give, at least one and never all (of two
    equally near numbers the smaller one). Prompts are held out in the order of a fixed shuffle; if no two pairs share
    their prompt, the result is that of datasets' train_test_split. Raises SalsaError if all pairs have the same prompt.
    """
    import numpy as np

    order = np.random.default_rng(SPLIT_SEED).permutation(len(prompts)).tolist()
    sizes = Counter(prompts[place] for place in order)  # in the order of the shuffle
    require(
        len(sizes) > 1,
        f"data.preferences: all {len(prompts)} pairs have the same prompt, so no pairs can be held out without training"
        " on their prompt; add pairs of other prompts",
    )
    chosen = _nearest(sizes, held_out, len(prompts))
    parts: tuple[list[int], list[int]] = ([], [])
    for place in order:
        parts[prompts[place] in chosen].append(place)
    return Split(*parts)


def _nearest(sizes: Mapping[Hashable, int], wanted: int, pairs: int) -> set[Hashable]:
    """The prompts whose pairs are nearest to `wanted` in number, from 1 to pairs − 1: a subset sum, exactly.

    sizes: prompt → number of its pairs. Bit n of `reached` says that the prompts so far have a subset of n pairs. Numbers
    above `wanted` plus the largest prompt's are left out: without one of their prompts they would be nearer.
    """
    limit = min(pairs - 1, wanted + max(sizes.values()))
    reached, last = 1, {}
    for prompt, size in sizes.items():
        new = (reached << size) & ~reached & ((2 << limit) - 1)
        reached |= new
        while new:
            number = new.bit_length() - 1
            last[number] = prompt  # the last prompt of the first subset that was found for this number
            new ^= 1 << number
        if reached >> wanted & 1 and wanted > 0:
            break
    number, chosen = min(last, key=lambda number: (abs(number - wanted), number)), set()
    while number:
        chosen.add(last[number])
        number -= sizes[last[number]]
    return chosen
