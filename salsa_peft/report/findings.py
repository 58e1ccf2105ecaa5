"""Numbers → plain sentences: what the run found, computed from its evaluation and its landscape, however it came out.

The words follow the intervals: a difference whose interval holds 0 is called not distinguishable, never "slightly
better". The controls (a `shrunk` reference, the untuned base) are named in the same breath as the soup, since they
can do as well. Left out: any claim over training seeds, for one run is one replicate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from salsa_peft.report.format import estimate, p_value, percent, signed
from salsa_peft.report.style import MEASURES
from salsa_peft.utils.statistics import compare_scores, paired_difference

FEW = 30
"""Fewer prompts than this are warned of: the t-interval leans on the mean being near normal."""
REPLICATE = (
    "One run is one replicate: every interval is over prompts, not over training seeds, so none of them says what "
    "the same recipe would give with other seeds."
)


def verdict(difference: Mapping[str, Any], a: str, b: str) -> str:
    """What the interval of a − b allows one to say."""
    if difference["n"] < 2:
        return "a single prompt, nothing to conclude"
    if difference["low"] <= 0 <= difference["high"]:
        return "not distinguishable from 0 on these prompts"
    return f"{a if difference['mean'] > 0 else b} is higher on these prompts"


def brief(difference: Mapping[str, Any], a: str, b: str) -> str:
    """The same for a table's cell."""
    if difference["n"] < 2 or difference["low"] <= 0 <= difference["high"]:
        return "undecided"
    return f"{a if difference['mean'] > 0 else b} higher"


def order(evaluation: Mapping[str, Any], policies: Mapping[str, Any]) -> list[str]:
    """Every evaluated model: seeds, the untuned base, soup, PPO, SALSA and the controls beside it, the others."""
    names = list(dict.fromkeys([*evaluation.get("models", []), *policies]))
    rank = {"base": 1, "soup": 2, "ppo": 4, "salsa": 5, "shrunk": 6}

    def key(name: str) -> int:
        if name in policies:
            return rank["shrunk"] if is_control(name, policies) else max(rank.get(name, 7), 4)
        return 0 if name.startswith("seed-") else rank.get(name, 3)

    return sorted(names, key=key)


def is_control(name: str, policies: Mapping[str, Any]) -> bool:
    """Named so, or a policy whose reference is the untuned base or one seed shrunk towards it."""
    return name in ("base", "shrunk") or (name in policies and policies[name].reference.startswith(("shrunk", "base")))


def difference(
    evaluation: Mapping[str, Any], answers: Sequence[Mapping[str, Any]], dataset: str, measure: str, a: str, b: str
) -> dict[str, Any] | None:
    """a − b as evaluated (either way round), else paired from the answers; None where neither knows both."""
    for pair in evaluation["datasets"][dataset].get("pairs", []):
        if pair["measure"] == measure and (pair["a"], pair["b"]) == (a, b):
            return {
                "dataset": dataset,
                "measure": measure,
                "a": a,
                "b": b,
                **pair["difference"],
                "rate": {key: pair[key] for key in ("adjusted_win_rate", "low", "high")},
            }
        if pair["measure"] == measure and (pair["b"], pair["a"]) == (a, b):
            d = pair["difference"]
            return {
                "dataset": dataset,
                "measure": measure,
                "a": a,
                "b": b,
                "mean": -d["mean"],
                "low": -d["high"],
                "high": -d["low"],
                "n": d["n"],
                "rate": {
                    "adjusted_win_rate": 1 - pair["adjusted_win_rate"],
                    "low": 1 - pair["high"],
                    "high": 1 - pair["low"],
                },
            }
    found: dict[str, dict[tuple[int, int], float]] = {a: {}, b: {}}
    for row in answers:
        if row["dataset"] == dataset and row["model"] in found and row["scores"].get(measure) is not None:
            found[row["model"]][row["index"], row["turn"]] = row["scores"][measure]
    both = sorted(found[a].keys() & found[b].keys())
    if not both:
        return None
    first, second = [found[a][i] for i in both], [found[b][i] for i in both]
    of = [index for index, _ in both] if any(turn > 1 for _, turn in both) else None
    verdicts = compare_scores(first, second, clusters=of)
    return {
        "dataset": dataset,
        "measure": measure,
        "a": a,
        "b": b,
        **asdict(paired_difference(first, second, of)),
        "rate": {key: getattr(verdicts, key) for key in ("adjusted_win_rate", "low", "high")},
    }


def comparisons(
    evaluation: Mapping[str, Any], answers: Sequence[Mapping[str, Any]], policies: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The questions this project is about, each asked on every dataset: soup or seed, SALSA or PPO, and each control
    in the soup's place.
    """
    if not evaluation.get("datasets"):
        return []
    names = order(evaluation, policies)
    pairs = [("soup", "seed-0")]
    for algorithm in dict.fromkeys(policy.algorithm for policy in policies.values()):
        of = {name: policy for name, policy in policies.items() if policy.algorithm == algorithm}
        salsa = _role("salsa", "soup", of)
        pairs.append((salsa, _role("ppo", "seed-0", of)))
        pairs += [(salsa, control) for control in of if is_control(control, of) and control != salsa]
    pairs += [("soup", control) for control in ("base", "shrunk") if control in names and control not in policies]
    measure = headline(evaluation)
    wanted = [(a, b) for a, b in pairs if a in names and b in names and a != b]
    found = [
        difference(evaluation, answers, dataset, measure, a, b) for a, b in wanted for dataset in evaluation["datasets"]
    ]
    return [one for one in found if one]


def headline(evaluation: Mapping[str, Any]) -> str:
    """The gold reward where there is one: a policy is trained on the reward model, so that score flatters it."""
    return "gold" if "gold" in evaluation["measures"] else evaluation["measures"][0]


def finding(
    evaluation: Mapping[str, Any],
    landscape: Mapping[str, Any] | None,
    compared: Sequence[Mapping[str, Any]],
    policies: Mapping[str, Any],
) -> tuple[list[str], list[str]]:
    """Sentences: the first paragraph (the first dataset, trained models), and what else there is, a point each."""
    lead: list[str] = []
    others: dict[str, list[str]] = {}
    for one in compared:
        if one["dataset"] != compared[0]["dataset"] or untuned(one, policies):
            short = f"{one['a']} − {one['b']} {signed(one)}, {verdict(one, one['a'], one['b'])}"
            others.setdefault(one["dataset"], []).append(short)
            continue
        models = evaluation["datasets"][one["dataset"]]["models"]
        a, b = (models.get(one[side], {}).get("scores", {}).get(one["measure"]) for side in "ab")
        means = (
            f"{one['a']} scored {estimate(a)} against {one['b']}’s {estimate(b)}"
            if a and b
            else f"{one['a']} against {one['b']}"
        )
        where = (
            ""
            if lead
            else f"On {one['n']} prompts of “{one['dataset']}”, by {MEASURES.get(one['measure'], one['measure'])}, "
        )
        lead.append(f"{where}{means}: {signed(one)}, {verdict(one, one['a'], one['b'])}{_aside(one, policies)}.")
    if not compared:
        lead.append("This run compared no two models on the same prompts, so there is nothing to conclude about them.")
    more = [
        f"On “{dataset}”{' also' if dataset == compared[0]['dataset'] and lead else ''}: {'; '.join(told)}."
        for dataset, told in others.items()
    ]
    return [*lead, REPLICATE], more + (_along(landscape) if landscape else [])


def of_judge(told: Mapping[str, Any], policies: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """The judge's verdicts as sentences: the first set of questions, and a point for each other one. told: judge_tables.judged."""
    sentences = []
    for dataset, data in told["datasets"].items():
        turns = f", {data['turns']} turns each" if data["turns"] > 1 else ""
        pairs = "; ".join(f"{pair['a']} over {pair['b']} {_rate(pair, policies)}" for pair in data["pairs"])
        sentences.append(f"On {data['questions']} questions of “{dataset}”{turns}, by adjusted win rate: {pairs}.")
    lead = [f"Judged by {told['judge']} in both orders. {sentences[0]}"] if sentences else []
    return lead, sentences[1:]


def _rate(pair: Mapping[str, Any], policies: Mapping[str, Any]) -> str:
    control = is_control(pair["b"], policies)
    if pair["n"] == 0:
        return "without any verdict"
    text = f"{percent(pair['adjusted_win_rate'])}% [{percent(pair['low'])}, {percent(pair['high'])}]"
    if pair["low"] <= 0.5 <= pair["high"]:
        return f"{text}, not distinguishable from 50%" + (": no evidence here that averaging helps" if control else "")
    better = pair["a"] if pair["adjusted_win_rate"] > 0.5 else pair["b"]
    text += f", {better} preferred" + (
        "" if pair["p_holm"] < 0.05 else f" (p {p_value(pair['p_holm'])} over the pairs of this set, Holm: not shown)"
    )
    return text + (", the control without averaging" if control and better == pair["b"] else "")


def untuned(one: Mapping[str, Any], policies: Mapping[str, Any]) -> bool:
    """Whether b is a control that PPO never touched (the base, one seed shrunk): far off, so told apart."""
    return one["b"] not in policies and is_control(one["b"], policies)


def warnings(
    evaluation: Mapping[str, Any], landscape: Mapping[str, Any] | None, reward: Mapping[str, Any] | None = None
) -> list[str]:
    """A reward model no better than chance, few prompts, intervals that hold 0, many comparisons: what to know before quoting."""
    accuracy = (reward or {}).get("accuracy", {}).get("held_out")
    found = []
    if accuracy and accuracy["low"] <= 0.5:
        found.append(
            f"The reward model ranks {percent(accuracy['mean'])}% [{percent(accuracy['low'])}, {percent(accuracy['high'])}] of"
            f" {accuracy['n']} held-out pairs as the data does: not told apart from chance, so its scores may be noise."
        )
    found += [
        f"Only {data['n']} prompts in “{name}”: intervals from fewer than {FEW} are rough."
        for name, data in evaluation.get("datasets", {}).items()
        if data["n"] < FEW
    ]
    if landscape and landscape["n"] < FEW:
        found.append(f"The landscape has {landscape['n']} prompts a point: intervals from fewer than {FEW} are rough.")
    pairs = [pair for data in evaluation.get("datasets", {}).values() for pair in data.get("pairs", [])]
    open_ones = sum(pair["difference"]["low"] <= 0 <= pair["difference"]["high"] for pair in pairs)
    if open_ones:
        found.append(
            f"By scores, in {open_ones} of the {len(pairs)} comparisons under “Wins and losses” the interval of the difference includes 0: "
            "no difference was shown there."
        )
    if len(pairs) > 1:
        found.append(f"By scores, p-values and intervals are not corrected for the {len(pairs)} comparisons made.")
    return found


def _aside(one: Mapping[str, Any], policies: Mapping[str, Any]) -> str:
    rate = one["rate"]
    text = (
        f" (adjusted win rate {percent(rate['adjusted_win_rate'])}% [{percent(rate['low'])}, {percent(rate['high'])}])"
    )
    if not is_control(one["b"], policies):
        return text
    if one["n"] < 2 or one["high"] < 0 or one["low"] <= 0 <= one["high"]:
        did = "scored higher" if one["n"] > 1 and one["high"] < 0 else "cannot be told apart from it here"
        text += f"; “{one['b']}” is the control without averaging and {did}"
        return f"{text}, so this run is no evidence that averaging helps"
    return f"{text}; “{one['b']}” is the control without averaging"


def _along(landscape: Mapping[str, Any]) -> list[str]:
    """What the first line and the first control line say: midpoint, ends, and the best of the shrunk points."""
    measure = headline(landscape)
    text = []
    for kind in ("line", "shrunk"):
        one = next((line for line in landscape["lines"] if line["kind"] == kind), None)
        if one is None:
            continue
        at = {round(point["at"], 6): point["scores"][measure] for point in one["points"]}
        if kind == "line" and {0.0, 0.5, 1.0} <= at.keys():
            text.append(
                f"Along the line {one['ends'][0]} to {one['ends'][1]}, before PPO, "
                f"by {MEASURES.get(measure, measure)}: "
                f"midpoint {estimate(at[0.5])}, ends {estimate(at[0.0])} and {estimate(at[1.0])}."
            )
        if kind == "shrunk":
            best = max(at, key=lambda x: float(at[x]["mean"]))
            text.append(
                f"The control line, {one['ends'][0]} + λ · (what {one['ends'][1]} learned), no averaging in it: "
                + (f"its best of {len(at)} points is " if len(at) > 1 else "its one point is ")
                + f"λ = {best:g} with {estimate(at[best])}"
                + (" (the best of several, so its height is flattered)." if len(at) > 1 else ".")
            )
    return text


def _role(name: str, reference: str, policies: Mapping[str, Any]) -> str:
    """The policy called `name`, else the first whose reference is `reference`, else "" (which is no model)."""
    if name in policies:
        return name
    return next((policy for policy, told in policies.items() if told.reference == reference), "")
