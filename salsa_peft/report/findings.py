"""Sentences on what a run found, computed from its evaluation, its judge's results and its landscape.

The wording follows the intervals: a difference whose interval includes 0 is "not distinguishable", never "slightly
better". A sentence that compares the soup with a control (a `shrunk` reference, the untuned base) says what the result
means for averaging. No sentence claims anything about other training seeds, because one run is one replicate.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from salsa_peft.evaluation.comparisons import clusters
from salsa_peft.report.format import Row, estimate, p_value, percent, rate_of, signed
from salsa_peft.report.gather import answer_pairs
from salsa_peft.report.style import MEASURES
from salsa_peft.utils.statistics import compare_scores, paired_difference

FEW = 30
"""Number of prompts below which a warning is given, since the t-interval assumes a nearly normal mean."""
REPLICATE = (
    "What this does not mean: that the same recipe gives the same result with other seeds. One run is one replicate, and"
    " every interval is over prompts, not over training seeds."
)
"""The last sentence of the headline."""


def undecided(difference: Row) -> bool:
    """Whether a difference is of a single prompt, or has an interval that includes 0."""
    return bool(difference["n"] < 2 or difference["low"] <= 0 <= difference["high"])


def conclusion(difference: Row, a: str, b: str) -> str:
    """The conclusion from the interval of a − b, as text."""
    if difference["n"] < 2:
        return "a single prompt, nothing to conclude"
    if undecided(difference):
        return "not distinguishable from 0"
    return f"{a if difference['mean'] > 0 else b} is higher"


def short_conclusion(difference: Row, a: str, b: str) -> str:
    """A short conclusion from the interval of a − b, for a table's cell."""
    return "undecided" if undecided(difference) else f"{a if difference['mean'] > 0 else b} higher"


def order(evaluation: Row, policies: Row) -> list[str]:
    """Sort the models: seeds, base, soup, other references, PPO, SALSA, controls, other policies."""
    names = list(dict.fromkeys([*evaluation.get("models", []), *policies]))
    rank = {"base": 1, "soup": 2, "ppo": 4, "salsa": 5, "shrunk": 6}

    def key(name: str) -> int:
        if name in policies:
            return rank["shrunk"] if is_control(name, policies) else max(rank.get(name, 7), 4)
        return 0 if name.startswith("seed-") else rank.get(name, 3)

    return sorted(names, key=key)


def is_control(name: str, policies: Row) -> bool:
    """Whether a model is `base`, `shrunk`, or a policy with the base or one shrunk seed as reference."""
    return name in ("base", "shrunk") or (name in policies and policies[name].reference.startswith(("shrunk", "base")))


def is_untuned_control(one: Row, policies: Row) -> bool:
    """Whether b of a comparison is a control that is not a policy; `finding` lists it separately."""
    return one["b"] not in policies and is_control(one["b"], policies)


def difference(
    evaluation: Row, answers: Sequence[Row], dataset: str, measure: str, a: str, b: str
) -> dict[str, Any] | None:
    """Mean difference a − b of a measure, with the win rate; None if no turn was answered by both models.

    Taken from the evaluation if it compared the two models, else computed from their answers to the same turns.
    """
    names = {"dataset": dataset, "measure": measure, "a": a, "b": b}
    for pair in evaluation["datasets"][dataset].get("pairs", []):
        if pair["measure"] == measure and {pair["a"], pair["b"]} == {a, b}:
            d, mean, low, high = pair["difference"], *rate_of(pair).values()
            if pair["a"] != a:
                d = {"mean": -d["mean"], "low": -d["high"], "high": -d["low"], "n": d["n"]}
                mean, low, high = 1 - mean, 1 - high, 1 - low
            return {**names, **d, "rate": {"adjusted_win_rate": mean, "low": low, "high": high}}
    both = [
        rows
        for rows in answer_pairs(answers, dataset, a, b)
        if all(row["scores"].get(measure) is not None for row in rows)
    ]
    if not both:
        return None
    first, second = ([row["scores"][measure] for row in rows] for rows in zip(*both, strict=True))
    of = clusters([row for row, _ in both])
    rates = asdict(compare_scores(first, second, clusters=of))
    return {**names, **asdict(paired_difference(first, second, of)), "rate": rate_of(rates)}


def comparisons(evaluation: Row, answers: Sequence[Row], policies: Row) -> list[dict[str, Any]]:
    """The main comparisons: soup with seed-0, SALSA with PPO, and SALSA and the soup with their controls."""
    if not evaluation.get("datasets"):
        return []
    names = order(evaluation, policies)
    pairs = [("soup", "seed-0")]
    for algorithm in dict.fromkeys(policy.algorithm for policy in policies.values()):
        same = {name: policy for name, policy in policies.items() if policy.algorithm == algorithm}
        salsa = _policy_with("soup", "salsa", same, evaluation)
        pairs.append((salsa, plain_policy(algorithm, policies, evaluation)))
        pairs += [(salsa, control) for control in same if is_control(control, same) and control != salsa]
    pairs += [("soup", control) for control in ("base", "shrunk") if control in names and control not in policies]
    measure = headline(evaluation)
    wanted = [(a, b) for a, b in pairs if a in names and b in names and a != b]
    both = [(dataset, *pair) for pair in wanted for dataset in evaluation["datasets"]]
    return [one for dataset, a, b in both if (one := difference(evaluation, answers, dataset, measure, a, b))]


def plain_policy(algorithm: str, policies: Row, evaluation: Row) -> str:
    """The policy of an algorithm whose reference is the start, seed-0: for ppo, plain PPO; "" if there is none."""
    same = {name: policy for name, policy in policies.items() if policy.algorithm == algorithm}
    return _policy_with("seed-0", "ppo", same, evaluation)


def _policy_with(reference: str, name: str, policies: Row, evaluation: Row) -> str:
    """The policy called `name`, else the first with this reference, one that a search picked before others; else ""."""
    if name in policies:
        return name
    methods = (evaluation.get("search") or {"methods": {}})["methods"].values()
    picked = [found["best"] for found in methods if found["best"] in policies]
    return next((other for other in [*picked, *policies] if policies[other].reference == reference), "")


def headline(evaluation: Row) -> str:
    """The main measure: the gold reward, on which no policy is trained, or else the first measure."""
    return "gold" if "gold" in evaluation["measures"] else evaluation["measures"][0]


def finding(
    evaluation: Row, landscape: Row | None, compared: Sequence[Row], policies: Row
) -> tuple[list[str], list[str]]:
    """Sentences on the compared pairs: for the report's first paragraphs, and for the list below them.

    The list has the pairs with controls that are not policies, and the landscape.
    """
    along = _along(landscape) if landscape else []
    if not compared:
        return [
            "This run compared no two models on the same prompts, so there is nothing to conclude about them."
        ], along
    lead: list[str] = []
    more: list[str] = []
    for pair in dict.fromkeys((one["a"], one["b"]) for one in compared):
        sets = [one for one in compared if (one["a"], one["b"]) == pair]
        (more if is_untuned_control(sets[0], policies) else lead).append(_on_all_sets(sets, policies))
    measure = headline(evaluation)
    by = [f"Mean differences of the {MEASURES.get(measure, measure)} on the same prompts:"] if lead else []
    return [*by, *lead], more + along


def _on_all_sets(sets: Sequence[Row], policies: Row) -> str:
    """A sentence on one pair on every set of questions and, if b is a control, on what this means for averaging."""
    a, b = sets[0]["a"], sets[0]["b"]
    points = "; ".join(f"{signed(one)} on “{one['dataset']}”, {conclusion(one, a, b)}" for one in sets)
    if not is_control(b, policies):
        return f"{a} − {b}: {points}."
    without = [one["dataset"] for one in sets if undecided(one) or one["mean"] < 0]
    where = "" if len(without) == len(sets) else " on " + " and ".join(f"“{name}”" for name in without)
    evidence = f"; this is no evidence{where} that averaging helps" if without else ""
    return f"{a} − {b}, a control without averaging: {points}{evidence}."


def _along(landscape: Row) -> list[str]:
    """Sentences on scores at the midpoint and ends of the first line of seeds, and on the best of the control line."""
    measure, text = headline(landscape), []
    lines = {line["kind"]: line for line in reversed(landscape["lines"])}
    for kind in [kind for kind in ("line", "shrunk") if kind in lines]:
        ends = lines[kind]["ends"]
        at = {round(point["at"], 6): point["scores"][measure] for point in lines[kind]["points"]}
        if kind == "shrunk":
            best = max(at, key=lambda x: float(at[x]["mean"]))
            which = f"the best of its {len(at)} points" if len(at) > 1 else "its only point"
            caution = " (chosen as the best of several, so this estimate is optimistic)" if len(at) > 1 else ""
            text.append(
                f"The control line without averaging, {ends[0]} + λ · (what {ends[1]} learned): {which} is λ = {best:g}"
                f" with {estimate(at[best])}{caution}."
            )
        elif {0.0, 0.5, 1.0} <= at.keys():
            text.append(
                f"Along the line {ends[0]} to {ends[1]}, before PPO, by {MEASURES.get(measure, measure)}: midpoint"
                f" {estimate(at[0.5])}, ends {estimate(at[0.0])} and {estimate(at[1.0])}."
            )
    return text


def of_judge(judged: Row, policies: Row) -> tuple[list[str], list[str]]:
    """Sentences on the judge's results (`judge_tables.judged`): on the first set, and on the other sets."""
    sentences = []
    for dataset, data in judged["datasets"].items():
        turns = f", {data['turns']} turns each" if data["turns"] > 1 else ""
        pairs = "; ".join(f"{pair['a']} over {pair['b']} {_rate(pair, policies)}" for pair in data["pairs"])
        sentences.append(f"On {data['questions']} questions of “{dataset}”{turns}, by adjusted win rate: {pairs}.")
    lead = [f"Judged by {judged['judge']} in both orders. {sentences[0]}"] if sentences else []
    return lead, sentences[1:]


def _rate(pair: Row, policies: Row) -> str:
    control = is_control(pair["b"], policies)
    if pair["n"] == 0:
        return "without any verdict"
    text = f"{percent(pair['adjusted_win_rate'])}% [{percent(pair['low'])}, {percent(pair['high'])}]"
    if pair["low"] <= 0.5 <= pair["high"]:
        return f"{text}, not distinguishable from 50%" + (": no evidence here that averaging helps" if control else "")
    better = pair["a"] if pair["adjusted_win_rate"] > 0.5 else pair["b"]
    text += f", {better} preferred"
    if pair["p_holm"] >= 0.05:
        text += f" (not significant after Holm’s correction over the pairs of this set: p {p_value(pair['p_holm'])})"
    return text + (", the control without averaging" if control and better == pair["b"] else "")


def warnings(evaluation: Row, landscape: Row | None, reward: Row | None = None) -> list[str]:
    """Warnings about a poor reward model, few prompts, intervals that include 0, and many comparisons."""
    accuracy = (reward or {}).get("accuracy", {}).get("held_out")
    found = []
    if accuracy and accuracy["low"] <= 0.5:
        found.append(
            f"The reward model ranks {percent(accuracy['mean'])}% [{percent(accuracy['low'])},"
            f" {percent(accuracy['high'])}] of {accuracy['n']} held-out pairs as the data does: not distinguishable"
            " from chance, so its scores may be noise."
        )
    datasets = evaluation.get("datasets", {})
    found += [
        f"Only {data['n']} prompts in “{name}”: intervals from fewer than {FEW} prompts are rough."
        for name, data in datasets.items()
        if data["n"] < FEW
    ]
    if landscape and landscape["n"] < FEW:
        found.append(
            f"The landscape has {landscape['n']} prompts per point: intervals from fewer than {FEW} prompts are rough."
        )
    pairs = [pair for data in datasets.values() for pair in data.get("pairs", [])]
    inconclusive = sum(pair["difference"]["low"] <= 0 <= pair["difference"]["high"] for pair in pairs)
    if inconclusive:
        found.append(
            f"By scores, in {inconclusive} of the {len(pairs)} comparisons under “Wins and losses” the interval of the"
            " difference includes 0: no difference was shown there."
        )
    if len(pairs) > 1:
        found.append(f"By scores, p-values and intervals are not corrected for the {len(pairs)} comparisons made.")
    return found
