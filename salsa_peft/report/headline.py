"""The headline of a report: every model against the policies' start and against PPO, in a table and in words.

It reads one run, with 95% intervals over prompts, or replicates, with intervals over runs (`findings.Scored`). The
sentences follow the intervals: a difference whose interval includes 0 is "not distinguishable", never "slightly better".
"""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from salsa_peft.report.findings import START, Scored, is_control, plain_policy, undecided
from salsa_peft.report.format import Row, estimate, fixed, signed
from salsa_peft.report.style import MEASURES

NUMBER = {"mean": 0.5, "low": 0.25, "high": 0.75}
"""An estimate whose text is as long as those of other numbers between −1 and 1."""
WIDTH, NARROW = 120, 80
"""Maximum numbers of characters of a line: of a file, and of a narrow terminal."""


def table(run: Scored | None) -> list[dict[str, Any]]:
    """One table for each set of questions: {"dataset", "n", "measure", "start", "against", "rows"}.

    `start` is the score of the start. A row is {"model", "policy", "control", "score", "start", "ppo"}: a model's score, and
    its differences from the start and from the policy of the same algorithm whose reference is the start (a model that
    is no policy: the first algorithm); None for what does not exist. `against` has the names of these policies.
    """
    if run is None:
        return []
    names, algorithms = (
        [name for name in run.models if name != START],
        {n: p.algorithm for n, p in run.policies.items()},
    )
    first = next(iter(algorithms.values()), "")
    plain = {name: plain_policy(algorithms.get(name, first), run) for name in names}
    found: list[dict[str, Any]] = []
    for dataset, scores in run.scores.items():

        def minus(name: str, other: str, dataset: str = dataset) -> Any:
            return run.minus(dataset, name, other) if other not in ("", name) else None

        rows = [
            {"model": name, "policy": name in run.policies, "control": is_control(name, run.policies)}
            | {"score": scores[name], "start": minus(name, START), "ppo": minus(name, plain[name])}
            for name in names
            if scores.get(name)
        ]
        against = [other for other in dict.fromkeys(plain.values()) if other]
        part = {"dataset": dataset, "n": run.counts[dataset], "measure": run.measure, "start": scores.get(START)}
        found += [{**part, "against": against, "rows": rows}] if rows else []
    return found


def gains(tables: Sequence[Row]) -> str:
    """A clause: which policies score higher than the start and which do not, on each set of questions; "" without policies."""
    by_outcome: dict[str, list[str]] = {}
    for part in tables:
        higher, same, lower = outcomes(part)
        count = len(higher) + len(same) + len(lower)
        if count and len(higher) == count:
            text = f"all {count} policies scored higher than {START}" if count > 1 else f"{higher[0]} scored higher than {START}"  # fmt: skip
        elif count and len(same) == count:
            text = f"no policy is distinguishable from {START}" if count > 1 else f"{same[0]} is not distinguishable from {START}"  # fmt: skip
        else:
            text = f"{len(higher)} of {count} policies scored higher than {START}"
            text += f" (not distinguishable from it: {listed(same)})" if same else ""
            text += f" (lower: {listed(lower)})" if lower else ""
        if count:
            by_outcome.setdefault(text, []).append(part["dataset"])
    return "; ".join(f"{text} on {quoted(sets)}" for text, sets in by_outcome.items())


def versus(compared: Sequence[Row], a: str, b: str, verbs: tuple[str, str] = ("scored higher", "scored lower")) -> str:
    """How a came out against b on each set, such as "salsa scored higher than ppo on “in”"; "" if not compared."""
    said: dict[str, list[str]] = {}
    for one in compared:
        if (one["a"], one["b"]) == (a, b):
            verb = verbs[0] if one["mean"] > 0 else verbs[1]
            text = f"{a} is not distinguishable from {b}" if undecided(one) else f"{a} {verb} than {b}"
            said.setdefault(text, []).append(one["dataset"])
    return "; ".join(f"{text} on {quoted(sets)}" for text, sets in said.items())


def effect(compared: Sequence[Row], policies: Row, trained: bool) -> str:
    """What the differences of the policies from their start mean for RLHF, as a clause; "" without such differences.

    trained: whether the policies were trained to raise this measure, so that a gain does not mean better answers.
    """
    changes: dict[str, list[str]] = {}
    for dataset in dict.fromkeys(one["dataset"] for one in compared):
        given = [one for one in compared if one["dataset"] == dataset and one["a"] in policies and one["b"] == START]
        decided = {one["mean"] > 0 for one in given if not undecided(one)}
        if not given:
            continue
        if len(decided) == 2:
            change = "raised the score of some policies on {} and lowered that of others" if trained else "improved some policies’ answers to {} and made others worse"  # fmt: skip
        elif decided:
            up = decided == {True}
            raised = f"{'raised' if up else 'lowered'} the score that the policies are trained on, on {{}}"
            change = raised if trained else "improved the answers to {}" if up else "made the answers to {} worse"
        else:
            change = "shows no effect on the score that the policies are trained on, on {}" if trained else "shows no effect on the answers to {}"  # fmt: skip
        changes.setdefault(change, []).append(dataset)
    return f"RLHF {', and '.join(change.format(quoted(sets)) for change, sets in changes.items())}" if changes else ""


def averaging(compared: Sequence[Row], policies: Row) -> str:
    """What SALSA against PPO and against controls means for averaging, as a clause; "" without SALSA and PPO."""
    salsa = next((one["a"] for one in compared if _is_salsa(one["a"], policies) and _is_plain(one["b"], policies)), "")
    if not salsa:
        return ""
    ppo = next(one["b"] for one in compared if one["a"] == salsa and _is_plain(one["b"], policies))
    won = [one["dataset"] for one in compared if (one["a"], one["b"]) == (salsa, ppo) and _is_higher(one)]
    if not won:
        return f"it shows no advantage of the soup as KL reference, because {salsa} did not beat {ppo}"
    controls = [
        one for one in compared if one["a"] == salsa and one["b"] in policies and is_control(one["b"], policies)
    ]
    if not controls:
        return f"whether averaging is the reason why {salsa} beats {ppo} is not tested, because the run has no control"
    unbeaten = [one for one in controls if one["dataset"] in won and not _is_higher(one)]
    without = list(dict.fromkeys(one["dataset"] for one in unbeaten))
    names = list(dict.fromkeys(one["b"] for one in unbeaten))
    if not without:
        return f"averaging may be the reason why {salsa} beats {ppo}, because {salsa} also beats every control"
    nothing = f"{listed(names, 'or')}, which average{'s' * (len(names) == 1)} nothing"
    if len(without) == len(won):
        return f"that {salsa} beats {ppo} is no evidence for averaging, because {salsa} does not beat {nothing}"
    rest = [name for name in won if name not in without]
    return (
        f"averaging may be the reason why {salsa} beats {ppo} on {quoted(rest)}, where it also beats every control, but not"
        f" on {quoted(without)}, where it does not beat {nothing}"
    )


def _is_higher(one: Row) -> bool:
    return bool(one["mean"] > 0 and not undecided(one))


def _is_salsa(name: str, policies: Row) -> bool:
    return name in policies and policies[name].reference == "soup"


def _is_plain(name: str, policies: Row) -> bool:
    return name in policies and policies[name].reference == START


def outcomes(part: Row) -> tuple[list[str], list[str], list[str]]:
    """Names of the policies that are higher than the start, not distinguishable from it, and lower."""
    given = {row["model"]: row["start"] for row in part["rows"] if row["policy"] and row["start"]}
    decided = {name: one["mean"] > 0 for name, one in given.items() if not undecided(one)}
    higher, lower = ([name for name, up in decided.items() if up is wanted] for wanted in (True, False))
    return higher, [name for name in given if name not in decided], lower


def listed(names: Sequence[str], word: str = "and") -> str:
    """Names as text: a; a and b; a, b and c."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} {word} {names[-1]}"


def quoted(sets: Sequence[str]) -> str:
    """Names of sets of questions in quotation marks."""
    return listed([f"“{name}”" for name in sets])


def measure_name(measure: str) -> str:
    """A measure's name in the report."""
    return MEASURES.get(measure, measure)


def console(
    tables: Sequence[Row], names: Mapping[str, str], sentences: Mapping[str, str], width: int = WIDTH
) -> list[str]:
    """The headline as lines for a terminal: the names, the tables, and the sentences of the first screen.

    With a width of NARROW, an interval, which is symmetric, is written as ± half of its length.
    """
    of_score, of_difference = (_half, lambda row: _half(row, "+")) if width < WIDTH else (estimate, signed)
    score, cell = (len(write(NUMBER)) for write in (of_score, of_difference))
    lines = wrapped([f"{name}: {text}" for name, text in names.items()], width)
    for part in tables:
        title, measure = f"{part['dataset']}, {part['n']} prompts", str(part["measure"])
        wide = max(map(len, (title, START, *map(_label, part["rows"]))))
        heads = [measure_name(measure), f"minus {START}, the start", *_plain_head(part)]
        sizes = [max(size, len(head)) for size, head in zip((score, cell, cell), heads, strict=False)]
        rows: list[tuple[str, list[str]]] = [(title, heads)]
        rows.append((START, [of_score(part["start"])] if part["start"] else []))
        for row in part["rows"]:
            both = [of_difference(row[key]) if row[key] else "–" for key in ("start", "ppo")]
            rows.append((_label(row), [of_score(row["score"]), *both[: len(heads) - 1]]))
        lines += ["", *("  ".join([f"{name:<{wide}}", *map(str.rjust, cells, sizes)]) for name, cells in rows)]
    return lines + [line for title, text in sentences.items() for line in ("", *wrapped([f"{title}: {text}"], width))]


def _half(value: Row, sign: str = "") -> str:
    """A mean and half the length of its interval. sign: + to write it before a positive mean."""
    return f"{sign * (value['mean'] > 0)}{fixed(value['mean'])} ± {fixed((value['high'] - value['low']) / 2)}"


def _plain_head(part: Row) -> list[str]:
    """Heading of the column of differences from plain PPO; none without such a policy."""
    return [f"minus {' or '.join(part['against'])}"] if part["against"] else []


def wrapped(texts: Sequence[str], width: int) -> list[str]:
    """Texts as lines of at most `width` characters, without broken words."""
    return [
        line for text in texts for line in textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)
    ]


def _label(row: Row) -> str:
    return f"{row['model']} (control)" if row["control"] else str(row["model"])
