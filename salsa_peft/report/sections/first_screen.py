"""The first screen of a report: what was run, cards, sentences, and the names that they use.

HTML, Markdown and summary.json show the same structure, for one run and for replicates.
"""

from collections.abc import Mapping, Sequence
from textwrap import shorten
from typing import Any

from salsa_peft.report.findings import START, is_control, undecided
from salsa_peft.report.format import Row, fixed, p_value, percent
from salsa_peft.report.gather import PolicyReport
from salsa_peft.report.headline import averaging, effect, gains, listed, measure_name, versus

EXPLAINED = {
    "gold": "a program's score of an answer, on which no policy is trained",
    "reward": "the score that the policies are trained to raise",
}
"""Measure → what it is, unless the run says more about it."""
IN_BRIEF = {"gold": "a program’s score, on which no policy is trained", "reward": "the score that training raises"}
"""Measure → what it is, where it first stands."""
CAME_OUT, MEANS, MEANS_NOT = "What came out", "What it means", "What it does not mean"
NOTHING_ELSE: Mapping[str, str] = {}
NOTE = 44
"""Maximum number of characters of a model's description in a figure, beside a name of at most 9."""
MOST = 4
"""Maximum number of cards for the scores, and for the judge."""
JUDGE = "judge"
"""Measure of the differences that are a judge's adjusted win rates minus ½."""
PREFERRED = ("was preferred more often", "was preferred less often")
"""How a judge's decided result is said."""
NOTHING = "No two models were compared on the same prompts, so there is nothing to conclude about them."


def kl_to(policy: PolicyReport) -> str:
    """A policy's reference in words."""
    if policy.algorithm != "ppo":
        return f"reference {policy.reference}"
    if policy.references > 1:
        of = {"kl": "mean of the KLs to"}.get(policy.mean, f"KL to the {policy.mean} mean of")
        learned = ", learned weights" if policy.learns_weights else ""
        return f"{of} {listed(policy.reference.split(', '))}{learned}"
    known = {"soup": "the soup", "base": "the untuned base"}
    return f"KL to {known.get(policy.reference, policy.reference)}"


def describe(name: str, policies: Mapping[str, PolicyReport], described: Mapping[str, str] = NOTHING_ELSE) -> str:
    """A short description of a model. described: of models in evaluate.controls and soups, `ReportInput.described`."""
    if name in policies:
        policy = policies[name]
        own = "" if policy.reward is None else f", reward {_sum(policy.reward)}"
        return f"{policy.algorithm.upper()} from {policy.start}, {kl_to(policy)}, β {policy.kl_coef:g}{own}"
    if name in described:
        return described[name]
    known = {
        START: "the start: an SFT model",
        "base": "the untuned base, no RLHF",
        "soup": "average of SFT models, no RLHF",
        "shrunk": "one SFT model, shrunk towards the base",
    }
    return known.get(name, "another SFT model" if name.startswith("seed-") else "")


def _sum(weights: Mapping[str, float]) -> str:
    """A weighted sum of rewards as text."""
    return " + ".join(name if weight == 1 else f"{weight:g} {name}" for name, weight in weights.items() if weight)


def note(name: str, policies: Mapping[str, PolicyReport], described: Mapping[str, str] = NOTHING_ELSE) -> str:
    """The description of a model in the headline's figure."""
    room = NOTE - max(0, len(name) - 9)
    if name in policies:
        control = " (control)" if is_control(name, policies) else ""
        return shorten(kl_to(policies[name]), room - len(control), placeholder=" …") + control
    return shorten(describe(name, policies, described).partition(" (")[0], room, placeholder=" …")


def brief(explanation: str) -> str:
    """An explanation's part before its first colon; "" without a colon."""
    return explanation.partition(":")[0] if ":" in explanation else ""


def run_line(
    policies: Mapping[str, PolicyReport],
    tables: Sequence[Row],
    seeds: int,
    explained: Mapping[str, str],
    judge: str | None = None,
) -> str:
    """What was run, in one sentence. tables: `headline.table`; explained: what the run says about its sets of questions."""
    algorithms = listed(list(dict.fromkeys(policy.algorithm.upper() for policy in policies.values())) or [""])
    references, betas = ({getattr(one, key) for one in policies.values()} for key in ("reference", "kl_coef"))
    count = len(policies)
    if count > 1:
        text = f"{count} policies trained by {algorithms} from {_starts(policies)}"
        if len(references) == count:
            text += ", each with its own KL reference"
        else:
            differ = [f"{len(references)} different KL references"] if len(references) > 1 else []
            differ += [f"{len(betas)} different β"] if len(betas) > 1 else []
            text += f", with {listed(differ)}" if differ else ""
    elif count == 1:
        name, policy = next(iter(policies.items()))
        text = f"One policy, {name}, trained by {algorithms} from {_starts(policies)}, {kl_to(policy)}"
    else:
        text = f"{seeds} SFT model{'s' * (seeds != 1)}, without RLHF" if seeds else "No model is finished"
    if tables:
        sets = {part["dataset"]: brief(explained.get(part["dataset"], "")) for part in tables}
        asked = [f"{part['n']:,} prompts of “{part['dataset']}”" for part in tables]
        asked = [f"{text} ({short})" if short else text for text, short in zip(asked, sets.values(), strict=True)]
        measure = tables[0]["measure"]
        by = measure_name(measure) + (f" ({IN_BRIEF[measure]})" if measure in IN_BRIEF else "")
        text += f"; answers to {listed(asked)}, scored by {by}" + (f" and compared by {judge}" if judge else "")
    return f"{text}."


def _starts(policies: Mapping[str, PolicyReport]) -> str:
    """Where the policies start, in words."""
    starts = list(dict.fromkeys(policy.start for policy in policies.values()))
    if len(starts) > 1:
        return f"{len(starts)} different starts"
    return f"one SFT model ({START})" if starts == [START] else starts[0]


def names(
    models: Sequence[str],
    policies: Mapping[str, PolicyReport],
    tables: Sequence[Row],
    explained: Mapping[str, str],
    described: Mapping[str, str] = NOTHING_ELSE,
) -> dict[str, str]:
    """Name → explanation of the measure, the sets of questions and the terms of the first screen.

    explained: what the run itself says about its measures and sets. described: as in `describe`.
    """
    found: dict[str, str | None] = {}
    if tables:
        measure: str = tables[0]["measure"]
        found[measure_name(measure)] = {**EXPLAINED, **explained}.get(measure)
        found |= {part["dataset"]: explained.get(part["dataset"]) for part in tables}
    if tables or policies:
        every = bool(policies) and all(policy.start == START for policy in policies.values())
        found[START] = "the SFT model that every policy starts from" if every else "the first SFT model"
    if "soup" in models or any("soup" in policy.reference for policy in policies.values()):
        usual = "a model whose weights are the average of those of several SFT models (seeds)"
        found["soup"] = described.get("soup", usual)
    if policies:
        found["KL reference"] = (
            "the frozen model to which a policy is pulled back while it is trained, with the weight β; SALSA uses the soup,"
            f" ordinary PPO uses {START}"
        )
    for name, policy in policies.items():
        if policy.references > 1 and policy.algorithm == "ppo":
            found[name] = f"a policy trained with the {kl_to(policy)}"
    if any(is_control(name, policies) for name in models):
        found["control"] = (
            "a KL reference or model that averages nothing, such as a seed shrunk towards the base; SALSA must beat it"
            " before averaging can be the reason for a gain"
        )
    return {name: text for name, text in found.items() if text}


def by_judge(judged: Row | None) -> list[dict[str, Any]]:
    """A judge's results as differences: adjusted win rate minus ½, for pairs with a verdict."""
    datasets = judged["datasets"] if judged else {}
    return [
        {
            "dataset": dataset,
            "measure": JUDGE,
            "a": pair["a"],
            "b": pair["b"],
            "n": data["questions"],
            "p_holm": pair["p_holm"],
        }
        | {"mean": pair["adjusted_win_rate"] - 0.5, "low": pair["low"] - 0.5, "high": pair["high"] - 0.5}
        for dataset, data in datasets.items()
        for pair in data["pairs"]
        if pair["n"]
    ]


def cards(compared: Sequence[Row], policies: Mapping[str, PolicyReport], judge: str = "") -> list[dict[str, Any]]:
    """One card for each pair of models, with a row for each set of questions.

    A card is {"a", "b", "by", "against", "control", "rows"}; a row is the difference with its texts and its place `at` on a
    scale from 0 to 100 that all cards share. The main pair comes first; of more than MOST pairs, the others are left to
    the tables.
    """
    first = [_main_pair(compared, policies)] if compared else []
    pairs = dict.fromkeys([*first, *((one["a"], one["b"]) for one in compared if one["a"] in policies or not policies)])
    found = []
    for a, b in list(pairs)[:MOST]:
        sets = [one for one in compared if (one["a"], one["b"]) == (a, b)]
        measure = sets[0]["measure"]
        reach = max(abs(one[key]) for one in compared for key in ("low", "high")) or 1.0
        found.append(
            {
                "a": a,
                "b": b,
                "by": judge if measure == JUDGE else measure_name(measure),
                "judge": measure == JUDGE,
                "against": _against(a, b, policies) if policies or measure != JUDGE else "",
                "control": is_control(b, policies) and (bool(policies) or measure != JUDGE),
                "rows": [_card_row(one, reach) for one in sets],
            }
        )
    return found


def _card_row(one: Row, reach: float) -> dict[str, Any]:
    judged, shown = one["measure"] == JUDGE, ("mean", "low", "high")
    if judged:
        mean, low, high = (percent(one[key] + 0.5) for key in shown)
        texts = {"value": f"{mean}%", "interval": f"[{low}, {high}]"}
    else:
        mean, low, high = (("+" if one[key] > 0 else "") + fixed(one[key]) for key in shown)
        texts = {"value": mean, "interval": f"[{low}, {high}]"}
    up, down = ("preferred", "not preferred") if judged else ("higher", "lower")
    if one["n"] < 2:
        outcome = "one prompt"
    elif undecided(one):
        outcome = "undecided"
    else:
        outcome = up if one["mean"] > 0 else down
        outcome += f" (p {p_value(one['p_holm'])}, Holm)" if judged and one["p_holm"] >= 0.05 else ""
    at = {key: 50 + 48 * one[key] / reach for key in shown}
    return {**one, **texts, "outcome": outcome, "open": undecided(one), "at": at}


def _against(a: str, b: str, policies: Mapping[str, PolicyReport]) -> str:
    """What distinguishes two models, in words."""
    if not all(describe(name, policies) for name in (a, b)):
        return ""
    if a in policies and b in policies:
        return f"{kl_to(policies[a])}, against {kl_to(policies[b])}"
    if a in policies:
        return "after RLHF, against before" if b == policies[a].start else f"a policy, against {describe(b, policies)}"
    return f"before RLHF: {describe(a, policies)}, against {describe(b, policies)}".replace(", no RLHF", "")


def sentences(
    tables: Sequence[Row],
    compared: Sequence[Row],
    judged: Sequence[Row],
    policies: Mapping[str, PolicyReport],
    judge: str = "",
    replicates: int = 1,
) -> dict[str, str]:
    """What came out, what it means and what it does not mean: one plain sentence or two for each.

    judged: `by_judge`. They come first, because scores by the training reward do not show that answers are better.
    """
    if not compared and not judged:
        return {CAME_OUT: f"T{judge[1:]} gave no verdict." if judge else NOTHING}
    came_out = [f"T{judge[1:]} gave no verdict."] if judge and not judged else []
    if judged:
        first = _main_pair(judged, policies)
        came_out.append(f"By {judge}, {versus(judged, *first, PREFERRED)}.")
    if compared:
        a, b = _main_pair(compared, policies)
        parts = [gains(tables), "" if a in policies and b == START else versus(compared, a, b)]
        came_out.append(f"By {measure_name(compared[0]['measure'])}, {'; '.join(filter(None, parts))}.")
    return {CAME_OUT: " ".join(came_out)} | _meaning(tables, compared, judged, policies, replicates)


def _from_start(tables: Sequence[Row]) -> list[Row]:
    """The differences of all policies from their start, which are not all among the main comparisons."""
    return [
        {**row["start"], "a": row["model"], "b": START, "dataset": part["dataset"]}
        for part in tables
        for row in part["rows"]
        if row["policy"] and row["start"]
    ]


def _main_pair(compared: Sequence[Row], policies: Row) -> tuple[str, str]:
    """SALSA and PPO if they were compared, else two policies, else the first pair."""
    pairs = list(dict.fromkeys((one["a"], one["b"]) for one in compared))
    for wanted in (("soup", START), ("soup", None), (None, START)):
        for a, b in pairs:
            ends = [policies[name].reference if name in policies else "" for name in (a, b)]
            if all(ends) and all(want in (None, end) for want, end in zip(wanted, ends, strict=True)):
                return a, b
    return pairs[0]


def _meaning(
    tables: Sequence[Row],
    compared: Sequence[Row],
    judged: Sequence[Row],
    policies: Mapping[str, PolicyReport],
    replicates: int,
) -> dict[str, str]:
    here = "In this run" if replicates == 1 else f"Over {replicates} replicates"
    trained = bool(compared) and compared[0]["measure"] == "reward"
    if policies:
        clauses = [
            effect(judged, policies, False) or effect([*compared, *_from_start(tables)], policies, trained),
            averaging(judged, policies) or averaging(compared, policies),
        ]
        text = "; ".join(filter(None, clauses))
    else:
        text = "only SFT models and averages of them were compared; no policy was trained by RLHF"
    means = {MEANS: f"{here}, {text}."} if text else {}
    not_meant = []
    if trained and not judged and any(one["a"] in policies and not undecided(one) for one in compared):
        not_meant.append("that the answers are better, since the policies were trained to raise this very score")
    shown = judged or compared
    if all(undecided(one) for one in shown if (one["a"], one["b"]) == _main_pair(shown, policies)):
        not_meant.append("that the models are equally good: a difference smaller than its interval cannot be seen")
    not_meant.append(
        "that other random seeds would give the same result: this is one run of the recipe, and its intervals are over"
        " prompts, not over training seeds"
        if replicates == 1
        else "that another base, other data or another reward would give the same result: the"
        f" {replicates} replicates differ only in their random seeds"
    )
    text = "; nor ".join(not_meant)
    return {**means, MEANS_NOT: f"{text[0].upper()}{text[1:]}."}


def screen(
    *,
    line: str,
    tables: Sequence[Row],
    compared: Sequence[Row],
    policies: Mapping[str, PolicyReport],
    models: Sequence[str],
    explained: Mapping[str, str],
    described: Mapping[str, str] = NOTHING_ELSE,
    judged: Row | None = None,
    replicates: int = 1,
    more: Mapping[str, str] = NOTHING_ELSE,
) -> dict[str, Any]:
    """The first screen: {"line", "cards", "sentences", "names", "sets", "over"}. more: further sentences, by title."""
    judge, verdicts = (f"the judge ({judged['judge']})" if judged else ""), by_judge(judged)
    return {
        "line": line,
        "cards": [*cards(verdicts, policies, judge), *cards(compared, policies)],
        "sentences": sentences(tables, compared, verdicts, policies, judge, replicates) | dict(more),
        "names": names(models, policies, tables, explained, described),
        "sets": {part["dataset"]: brief(explained.get(part["dataset"], "")) for part in tables},
        "over": "prompts" if replicates == 1 else f"{replicates} replicates",
    }


def of_judge(judged: Row, models: int) -> dict[str, Any]:
    """The first screen of a report that has a judge's verdicts on the answers of models, and no training."""
    verdicts, judge = by_judge(judged), f"the judge ({judged['judge']})"
    pairs = dict.fromkeys((one["a"], one["b"]) for one in verdicts)
    said = [versus(verdicts, *pair, PREFERRED) for pair in pairs]
    asked = listed([f"{data['questions']:,} questions of “{name}”" for name, data in judged["datasets"].items()])
    return {
        "line": f"Answers of {models} models to {asked}, compared in pairs by {judge}.",
        "cards": cards(verdicts, {}, judge),
        "sentences": {
            CAME_OUT: f"By {judge}, {'; '.join(said)}." if said else f"T{judge[1:]} gave no verdict.",
            MEANS_NOT: "That people or another judge would prefer the same answers, or that a model does what was asked: one"
            " judge compared two answers at a time, in both orders.",
        },
        "names": {},
        "sets": {},
        "over": "questions",
    }
