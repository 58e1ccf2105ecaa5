"""The toy language of the embedded world: instructions whose answers a program can grade. Pure Python.

Five operations over 36 words of 6 categories:
    list three birds               three different birds; also `list one birds and two tools`
    copy owl saw                   owl saw
    repeat two owl                 owl owl
    name owl saw                   birds tools
    kin owl saw                    another bird, another tool
Answers have 2–4 words in distribution and 5–6 out of distribution.

A sixth operation, `some`, is used only if a recipe's `toy.operations` names it. Its answers have a free length, so that
a policy can lower the KL by short answers:
    some owl saw                   other birds and tools, all different; four or more earn the full reward

Left out: conversations of several turns, system turns.
"""

import hashlib
import random
from collections.abc import Sequence
from typing import Any, NamedTuple

from salsa_peft.utils.errors import SalsaError, require

CATEGORIES = {
    "birds": ("owl", "wren", "crow", "finch", "robin", "heron"),
    "fruits": ("apple", "pear", "plum", "fig", "lemon", "mango"),
    "tools": ("saw", "axe", "drill", "rake", "hammer", "spade"),
    "metals": ("tin", "iron", "zinc", "lead", "copper", "nickel"),
    "trees": ("oak", "elm", "ash", "pine", "birch", "maple"),
    "fish": ("cod", "eel", "carp", "trout", "perch", "tuna"),
}
CATEGORY_OF = {word: category for category, words in CATEGORIES.items() for word in words}
WORDS = tuple(CATEGORY_OF)
NUMBERS = ("one", "two", "three", "four", "five", "six")
OPERATIONS = ("list", "copy", "repeat", "name", "kin")
FREE_LENGTH = "some"
"""The operation whose answers have a free length. It has no place in VOCABULARY, so that other worlds stay as they are."""
ENOUGH, MOST = 4, 9
"""Numbers of words of an answer to FREE_LENGTH: fewer than the first earn less, words after the second count as wrong."""
SPECIALS = ("<pad>", "<bos>", "<eos>", "<user>", "<assistant>", "<unk>")
GRADES = ("bad", "poor", "fair", "good", "perfect")
VOCABULARY = (*SPECIALS, *OPERATIONS, "and", *NUMBERS, *CATEGORIES, *WORDS, *GRADES)
LENGTHS_IN, LENGTHS_OUT = (2, 3, 4), (5, 6)
MAX_NEW_TOKENS = 10
ERROR_WEIGHTS = (4, 3, 1, 1, 2, 2)
"""Relative frequencies of the six kinds of errors in `add_errors`, about as in answers of SFT models."""
MOST_MISSES = 10_000
"""Number of instructions that are drawn in a row without a new evaluation prompt before the search is given up."""
UNFINISHED_PENALTY = 0.5
"""Penalty subtracted from the gold reward of a response without EOS."""


class Task(NamedTuple):
    """A parsed instruction."""

    allowed: tuple[tuple[str, ...], ...]
    """Words allowed at each position of the answer."""
    distinct: bool
    """Whether all words of the answer must differ."""
    enough: int | None = None
    """Number of right words that earn the full reward, if the length is free. None: one at each position."""


def parse(prompt: str) -> Task:
    """The task of an instruction. Raises SalsaError for text that is no instruction."""
    words = [word for word in _split(prompt) if word not in SPECIALS]
    operation, rest = (words[0], words[1:]) if words else ("", [])
    try:
        if operation == "list":
            parts = [rest[:2]] if len(rest) == 2 else [rest[:2], rest[3:]]
            if len(parts) == 2 and (len(rest) != 5 or rest[2] != "and"):
                raise ValueError
            return Task(tuple(CATEGORIES[c] for n, c in parts for _ in range(NUMBERS.index(n) + 1)), True)
        if operation == FREE_LENGTH and rest:
            categories = dict.fromkeys(CATEGORY_OF[word] for word in rest)
            words_left = tuple(word for name in categories for word in CATEGORIES[name] if word not in rest)
            return Task((words_left,) * MOST, True, min(ENOUGH, len(words_left)))
        if operation == "repeat":
            number, word = rest
            return Task((_allowed("copy", word),) * (NUMBERS.index(number) + 1), False)
        if operation in OPERATIONS and rest:
            return Task(tuple(_allowed(operation, word) for word in rest), False)
    except (ValueError, KeyError):
        pass
    raise SalsaError(
        f"prompt {prompt!r}: is not an instruction of the toy language, such as 'copy owl saw' (operations:"
        f" {', '.join(OPERATIONS)})"
    )


def _allowed(operation: str, word: str) -> tuple[str, ...]:
    category = CATEGORY_OF[word]
    kin = tuple(other for other in CATEGORIES[category] if other != word)
    return {"copy": (word,), "name": (category,), "kin": kin}[operation]


def gold(prompts: list[Any], completions: list[Any], finished: list[bool] | None = None, **kwargs: Any) -> list[float]:
    """The gold reward (TRL's signature): right positions / max(words asked for, words given).

    A position is right if its word is allowed there and, in `list`, has not occurred before. A response without EOS
    (`finished` is False) loses 0.5; without the argument `finished` all count as finished. Prompts and completions are
    texts or lists of messages. Of a list, only the last user (prompt) or assistant (completion) message counts. Special
    tokens in a completion are wrong words, except one final <eos>. An empty answer scores 0. Other columns and
    `completion_ids` are ignored.
    """
    ended = finished if finished is not None else [True] * len(completions)
    return [
        grade(_text(prompt, "user"), _text(completion, "assistant")) - (0.0 if end else UNFINISHED_PENALTY)
        for prompt, completion, end in zip(prompts, completions, ended, strict=True)
    ]


def grade(prompt: str, answer: str) -> float:
    """The gold reward of one finished answer, in [0, 1]."""
    task, words = parse(prompt), _split(answer)
    words = words[:-1] if words[-1:] == ["<eos>"] else words
    right = 0
    for i, (word, allowed) in enumerate(zip(words, task.allowed, strict=False)):
        right += word in allowed and not (task.distinct and word in words[:i])
    return right / max(task.enough or len(task.allowed), len(words))


def _split(text: str) -> list[str]:
    for special in SPECIALS:
        text = text.replace(special, f" {special} ")
    return text.split()


def _text(turns: Any, role: str) -> str:
    if isinstance(turns, str):
        return turns
    return next((message["content"] for message in reversed(turns) if message["role"] == role), "")


def draw_prompt(rng: random.Random, lengths: tuple[int, ...], operations: Sequence[str] = OPERATIONS) -> str:
    """A random instruction, uniform in the operation and in the answer's number of words (from `lengths`).

    An instruction of free length names two or three words in distribution and four out of it.
    """
    operation, n = rng.choice(operations), rng.choice(lengths)
    if operation == "list":
        first = rng.choice(range(1, n + 1))
        a, b = rng.sample(list(CATEGORIES), 2)
        return f"list {NUMBERS[first - 1]} {a}" + (f" and {NUMBERS[n - first - 1]} {b}" if first < n else "")
    if operation == "repeat":
        return f"repeat {NUMBERS[n - 1]} {rng.choice(WORDS)}"
    if operation == FREE_LENGTH:
        n = 4 if n in LENGTHS_OUT else min(n, 3)
    return f"{operation} {' '.join(rng.choice(WORDS) for _ in range(n))}"


def draw_answer(rng: random.Random, prompt: str) -> list[str]:
    """A right answer, drawn uniformly."""
    task, answer = parse(prompt), []
    length = None if task.enough is None else min(rng.randint(2, 6), len(task.allowed[0]))
    for allowed in task.allowed[:length]:
        answer.append(rng.choice([word for word in allowed if not (task.distinct and word in answer)]))
    return answer


def add_errors(rng: random.Random, answer: list[str], errors: int) -> list[str]:
    """Add errors to an answer: wrong word or category, missing, extra or repeated word, wrong order."""
    words = list(answer)
    for _ in range(errors):
        kind, i = rng.choices(range(6), ERROR_WEIGHTS)[0], rng.randrange(len(words) or 1)
        word = words[i] if words else rng.choice(WORDS)
        siblings = CATEGORIES.get(CATEGORY_OF.get(word, ""), tuple(CATEGORIES))
        if kind == 0 or not words:
            words[i : i + 1] = [rng.choice(siblings)]
        elif kind == 1:
            words[i] = rng.choice(WORDS + tuple(CATEGORIES))
        elif kind == 2:
            del words[i]
        elif kind == 3 and len(words) < MAX_NEW_TOKENS - 1:
            words.insert(i, rng.choice(siblings))
        elif kind == 4:
            words[i] = words[i - 1]
        else:
            words[i], words[i - 1] = words[i - 1], words[i]
    return words


def is_held_out(prompt: str, seed: int) -> bool:
    """Whether an instruction is reserved for evaluation: a quarter of all instructions, chosen by hash."""
    return hashlib.sha256(f"{seed}:{prompt}".encode()).digest()[0] < 64


def draw_prompts(
    rng: random.Random,
    n: int,
    lengths: tuple[int, ...],
    seed: int,
    evaluation: bool = False,
    operations: Sequence[str] = OPERATIONS,
) -> list[str]:
    """n instructions for training, which may repeat, or n different ones for evaluation.

    Raises SalsaError if the operations have fewer than n different evaluation prompts.
    """
    prompts: list[str] = []
    seen: set[str] = set()
    misses = 0
    while len(prompts) < n:
        prompt = draw_prompt(rng, lengths, operations)
        if is_held_out(prompt, seed) == evaluation and not (evaluation and prompt in seen):
            seen.add(prompt)
            prompts.append(prompt)
            misses = 0
        misses += 1
        require(
            misses < MOST_MISSES,
            f"toy.eval_prompts: the operations {', '.join(operations)} have only {len(prompts)} different evaluation"
            f" prompts, fewer than {n}; lower toy.eval_prompts, or add toy.operations",
        )
    return prompts
