"""What a run's scores say: models in order, differences between them, conclusions from intervals, and warnings.

The wording follows the intervals: a difference whose interval includes 0 is "not distinguishable", never "slightly
better". A comparison of the soup with a control (a `shrunk` reference, the untuned base) says what the result means for
averaging. The same code reads one run, with intervals over prompts, and replicates, with intervals over runs.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from salsa_peft.evaluation.comparisons import clusters
from salsa_peft.report.format import Row, estimate, percent, rate_of
from salsa_peft.report.gather import PolicyReport, ReportInput, answer_pairs
from salsa_peft.report.style import MEASURES
from salsa_peft.utils.statistics import compare_scores, paired_difference

START = "seed-0"
"""The model that every policy starts from."""
FEW = 30
"""Number of prompts below which a warning is given, since the t-interval assumes a nearly normal mean."""


@dataclass(frozen=True)
class Scored:
    """Scores by the main measure: of one run with intervals over prompts, or of replicates with intervals over runs."""

    measure: str
    models: list[str]
    """All models in the order in which the report lists them (`order`)."""
    policies: Mapping[str, PolicyReport]
    picked: list[str]
    """Policies that a search for β picked."""
    counts: dict[str, int]
    """Set of questions → number of prompts."""
    scores: dict[str, dict[str, Row]]
    """Set of questions → model → {mean, low, high, n}."""
    minus: Callable[[str, str, str], dict[str, Any] | None]
    """minus(dataset, a, b): {dataset, measure, a, b, mean, low, high, n} of a − b; None without common prompts."""


def scored(run: ReportInput) -> Scored | None:
    """The scores of one run; None without an evaluation."""
    evaluation, answers = run.evaluation, run.answers
    if not evaluation.get("datasets"):
        return None
    measure = headline(evaluation)
    methods = (evaluation.get("search") or {"methods": {}})["methods"].values()
    return Scored(
        measure=measure,
        models=order(evaluation, run.policies),
        policies=run.policies,
        picked=[found["best"] for found in methods],
        counts={name: data["n"] for name, data in evaluation["datasets"].items()},
        scores={
            name: {model: one["scores"][measure] for model, one in data["models"].items() if measure in one["scores"]}
            for name, data in evaluation["datasets"].items()
        },
        minus=lambda dataset, a, b: difference(evaluation, answers, dataset, measure, a, b),
    )


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


def comparisons(run: Scored | None) -> list[dict[str, Any]]:
    """The main comparisons: SALSA with PPO, with its start and with its controls; the soup with seed-0 and its controls."""
    if run is None:
        return []
    pairs = []
    for algorithm in dict.fromkeys(policy.algorithm for policy in run.policies.values()):
        same = {name: policy for name, policy in run.policies.items() if policy.algorithm == algorithm}
        salsa, plain = _policy_with("soup", "salsa", same, run.picked), plain_policy(algorithm, run)
        pairs += [(salsa, plain), (salsa or plain or next(iter(same)), START)]
        pairs += [(salsa, control) for control in same if is_control(control, same) and control != salsa]
    pairs.append(("soup", START))
    pairs += [("soup", control) for control in ("base", "shrunk") if control not in run.policies]
    wanted = [(a, b) for a, b in dict.fromkeys(pairs) if a in run.models and b in run.models and a != b]
    return [one for pair in wanted for dataset in run.scores if (one := run.minus(dataset, *pair))]


def plain_policy(algorithm: str, run: Scored) -> str:
    """The policy of an algorithm whose reference is the start, seed-0: for ppo, plain PPO; "" if there is none."""
    same = {name: policy for name, policy in run.policies.items() if policy.algorithm == algorithm}
    return _policy_with(START, "ppo", same, run.picked)


def _policy_with(reference: str, name: str, policies: Row, picked: Sequence[str]) -> str:
    """The policy called `name`, else the first with this reference, one that a search picked before others; else ""."""
    if name in policies:
        return name
    first = [*(other for other in picked if other in policies), *policies]
    usual = [other for other in first if policies[other].start == START and policies[other].reward is None]
    return next((other for other in usual if policies[other].reference == reference), "")


def headline(evaluation: Row) -> str:
    """The main measure: the gold reward, on which no policy is trained, or else the first measure."""
    return "gold" if "gold" in evaluation["measures"] else evaluation["measures"][0]


def means_for_averaging(one: Row, policies: Row) -> str:
    """The conclusion from a difference, and if b is a control, what it means for averaging."""
    said = conclusion(one, one["a"], one["b"])
    if is_control(one["b"], policies) and (undecided(one) or one["mean"] < 0):
        return f"{said}; no evidence that averaging helps"
    return said


def of_seeds(names: Sequence[str]) -> bool:
    """Whether all models are SFT seeds, not policies or soups."""
    return all(name.startswith("seed-") for name in names)


def along(landscape: Row) -> list[str]:
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
                f"Along the line {ends[0]} to {ends[1]}{', before PPO' if of_seeds(ends) else ''}, by {MEASURES.get(measure, measure)}: midpoint"
                f" {estimate(at[0.5])}, ends {estimate(at[0.0])} and {estimate(at[1.0])}."
            )
    return text


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
