"""The headline of a report: every model against the policies' start and against PPO, in a table and in words.

A difference is of the headline measure on the same prompts, with its 95% interval over prompts. The sentences follow
the intervals: a difference whose interval includes 0 is "not distinguishable", never "slightly better".
"""

import textwrap
from collections.abc import Sequence
from typing import Any

from salsa_peft.report.findings import difference, headline, is_control, order, plain_policy, undecided
from salsa_peft.report.format import Row, estimate, fixed, signed
from salsa_peft.report.style import MEASURES

NUMBER = {"mean": 0.5, "low": 0.25, "high": 0.75}
"""An estimate whose text is as long as those of other numbers between −1 and 1."""
START = "seed-0"
"""The model that every policy starts from."""
WIDTH, NARROW = 120, 80
"""Maximum numbers of characters of a line: of a file, and of a narrow terminal."""
EXPLAINED = {
    "gold": "a program's score of an answer, on which no policy is trained",
    "reward": "the score that the policies are trained to raise",
}
"""Measure → what it is, unless the run says more about it."""


def table(evaluation: Row, answers: Sequence[Row], policies: Row) -> list[dict[str, Any]]:
    """One table for each set of questions: {"dataset", "n", "measure", "start", "against", "rows"}.

    `start` is the score of the start. A row is {"model", "policy", "control", "score", "start", "ppo"}: a model's score, and
    its differences from the start and from the policy of the same algorithm whose reference is the start (a model that
    is no policy: the first algorithm); None for what does not exist. `against` has the names of these policies. Empty
    without policies.
    """
    if not evaluation.get("datasets") or not policies:
        return []
    measure, found = headline(evaluation), []
    names = [name for name in order(evaluation, policies) if name != START]
    first = next(iter(policies))
    plain = {name: plain_policy(policies.get(name, policies[first]).algorithm, policies, evaluation) for name in names}
    for dataset, data in evaluation["datasets"].items():
        scores = {name: model["scores"].get(measure) for name, model in data["models"].items()}

        def minus(name: str, other: str, dataset: str = dataset) -> Any:
            return difference(evaluation, answers, dataset, measure, name, other) if other not in ("", name) else None

        rows = [
            {"model": name, "policy": name in policies, "control": is_control(name, policies), "score": scores[name]}
            | {"start": minus(name, START), "ppo": minus(name, plain[name])}
            for name in names
            if scores.get(name)
        ]
        against = [other for other in dict.fromkeys(plain.values()) if other]
        part = {"dataset": dataset, "n": data["n"], "measure": measure, "start": scores.get(START)}
        found += [{**part, "against": against, "rows": rows}] if rows else []
    return found


def gains(tables: Sequence[Row]) -> list[str]:
    """A sentence for each set of questions: which policies score higher than the start, and which do not."""
    found: list[str] = []
    for part in tables:
        higher, same, lower = _by_outcome(part)
        count = len(higher) + len(same) + len(lower)
        by = f"By {MEASURES.get(part['measure'], part['measure'])}, o" if not found else "O"
        text = f"{by}n {part['n']} prompts of “{part['dataset']}”, {len(higher)} of {count} policies scored higher than"
        text += f" {START}, where training started"
        text += f"; not distinguishable from it: {_listed(same)}" if same else ""
        found.append(text + (f"; lower: {_listed(lower)}" if lower else "") + ".")
    return found


def meaning(tables: Sequence[Row]) -> list[str]:
    """One sentence on what the gains mean; `findings.REPLICATE` says what they do not mean."""
    if not tables:
        return []
    if tables[0]["measure"] == "reward":
        text = "the policies were trained to raise this score, so a gain shows that training worked, but not that"
        return [f"What this means: {text} the answers are better."]
    changes: dict[str, list[str]] = {}
    for part in tables:
        higher, _, lower = _by_outcome(part)
        if higher and lower:
            change = "improved some policies' answers to {} and made others worse"
        elif higher or lower:
            change = "improved the answers to {}" if higher else "made the answers to {} worse"
        else:
            change = "shows no effect on the answers to {}"
        changes.setdefault(change, []).append(f"“{part['dataset']}”")
    text = ", and ".join(change.format(_listed(sets)) for change, sets in changes.items())
    return [f"What this means: in this run RLHF {text}, by a measure that the policies were not trained on."]


def _by_outcome(part: Row) -> tuple[list[str], list[str], list[str]]:
    """Names of the policies that are higher than the start, not distinguishable from it, and lower."""
    given = {row["model"]: row["start"] for row in part["rows"] if row["policy"] and row["start"]}
    decided = {name: one["mean"] > 0 for name, one in given.items() if not undecided(one)}
    higher, lower = ([name for name, up in decided.items() if up is wanted] for wanted in (True, False))
    return higher, [name for name in given if name not in decided], lower


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def words(tables: Sequence[Row], explained: Row) -> dict[str, str]:
    """Name → explanation of the measure, the sets of questions and the start, where there is an explanation.

    explained: what the run itself says about these names.
    """
    if not tables:
        return {}
    measure: str = tables[0]["measure"]
    names: dict[str, str | None] = {MEASURES.get(measure, measure): {**EXPLAINED, **explained}.get(measure)}
    names |= {part["dataset"]: explained.get(part["dataset"]) for part in tables}
    names[START] = "the SFT model that every policy starts from"
    return {name: text for name, text in names.items() if text}


def console(tables: Sequence[Row], explained: Row, paragraphs: Sequence[str], width: int = WIDTH) -> list[str]:
    """The headline as lines for a terminal: the words, the tables, and the report's first paragraphs.

    With a width of NARROW, an interval, which is symmetric, is written as ± half of its length.
    """
    of_score, of_difference = (_half, lambda row: _half(row, "+")) if width < WIDTH else (estimate, signed)
    score, cell = (len(write(NUMBER)) for write in (of_score, of_difference))
    lines = _wrapped([f"{name}: {text}" for name, text in words(tables, explained).items()], width)
    for part in tables:
        title, measure = f"{part['dataset']}, {part['n']} prompts", str(part["measure"])
        wide = max(map(len, (title, START, *map(_label, part["rows"]))))
        heads = [MEASURES.get(measure, measure), f"− {START}, the start", *_plain_head(part)]
        sizes = [max(size, len(head)) for size, head in zip((score, cell, cell), heads, strict=False)]
        rows: list[tuple[str, list[str]]] = [(title, heads)]
        rows.append((START, [of_score(part["start"])] if part["start"] else []))
        for row in part["rows"]:
            both = [of_difference(row[key]) if row[key] else "–" for key in ("start", "ppo")]
            rows.append((_label(row), [of_score(row["score"]), *both[: len(heads) - 1]]))
        lines += ["", *("  ".join([f"{name:<{wide}}", *map(str.rjust, cells, sizes)]) for name, cells in rows)]
    return lines + [line for text in paragraphs for line in ("", *_wrapped([text], width))]


def _half(value: Row, sign: str = "") -> str:
    """A mean and half the length of its interval. sign: + to write it before a positive mean."""
    return f"{sign * (value['mean'] > 0)}{fixed(value['mean'])} ± {fixed((value['high'] - value['low']) / 2)}"


def _plain_head(part: Row) -> list[str]:
    """Heading of the column of differences from plain PPO; none without such a policy."""
    return [f"− {' or '.join(part['against'])}"] if part["against"] else []


def _wrapped(texts: Sequence[str], width: int) -> list[str]:
    return [
        line for text in texts for line in textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)
    ]


def _label(row: Row) -> str:
    return f"{row['model']} (control)" if row["control"] else str(row["model"])
