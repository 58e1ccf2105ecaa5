"""Every measure of the models, of the reward and of swept settings, with 95% t-intervals over replicates."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from salsa_peft.report import findings, judge_tables
from salsa_peft.report.format import Row, is_number
from salsa_peft.report.gather import ReportInput
from salsa_peft.utils.statistics import mean_interval

Read = Callable[[ReportInput], Any]


def scores(runs: Sequence[ReportInput]) -> dict[str, dict[str, dict[str, Any]]]:
    """Set of questions → measure → model → estimate, of what all replicates have; the response length is a measure too."""
    first, found = runs[0].evaluation, {}
    for dataset, data in first.get("datasets", {}).items():
        names = findings.order(first, runs[0].policies)
        rows: dict[str, dict[str, Any]] = {}
        for measure in (*first["measures"], "response_length"):
            values = {
                name: [_score(run, dataset, name, measure) for run in runs] for name in names if name in data["models"]
            }
            known = {name: [one for one in of if one is not None] for name, of in values.items()}
            kept = {name: asdict(mean_interval(of)) for name, of in known.items() if len(of) == len(runs)}
            rows |= {measure: kept} if kept else {}
        found[dataset] = rows
    return found


def _score(run: ReportInput, dataset: str, model: str, measure: str) -> float | None:
    one = run.evaluation["datasets"].get(dataset, {"models": {}})["models"].get(model)
    if one is None:
        return None
    value = one["response_length"] if measure == "response_length" else one["scores"].get(measure)
    return None if value is None else float(value["mean"])


REWARD: dict[str, Read] = {
    "accuracy on held-out pairs": lambda run: run.reward["accuracy"]["held_out"]["mean"],
    "calibration error (ECE) on held-out pairs": lambda run: run.reward["calibration"]["held_out"]["ece"],
    "share of the score’s variance between prompts, held-out pairs": lambda run: run.reward["spread"]["held_out"]["between_prompt_share"]["mean"],
    "share of the score’s variance between prompts, responses of seed-0": lambda run: _quality(run)["between_prompt_share"]["mean"],
    "SD of the score within a prompt, responses of seed-0": lambda run: _quality(run)["score_sd_within"],
    "gold of one response of seed-0": lambda run: _quality(run)["best_of_n"]["one_response"]["mean"],
    "gold of the best response by the reward": lambda run: _quality(run)["best_of_n"]["best_by_reward"]["mean"],
    "gold of the best response by gold": lambda run: _quality(run)["best_of_n"]["best_by_gold"]["mean"],
    "gain by choosing by the reward": lambda run: _quality(run)["best_of_n"]["gain"]["mean"],
    "possible gain": lambda run: _quality(run)["best_of_n"]["possible_gain"]["mean"],
    "the judge’s win rate of the best response over one response": lambda run: (run.verdicts or {})["best_of_n"]["adjusted_win_rate"],
}  # fmt: skip
"""Measure of a reward → how it is read from a run, which raises KeyError or TypeError where it was not measured."""


def _quality(run: ReportInput) -> Row:
    return run.reward_quality or {}


def reward(runs: Sequence[ReportInput]) -> list[dict[str, Any]]:
    """Rows {"what", "mean", "low", "high", "n"} of the reward's measures that all replicates have."""
    rows = []
    for what, read in REWARD.items():
        values = [_read(run, read) for run in runs]
        if all(map(is_number, values)):
            rows.append({"what": what, **asdict(mean_interval([float(value) for value in values]))})
    return rows


def _read(run: ReportInput, read: Read) -> Any:
    try:
        return read(run)
    except (KeyError, TypeError):  # this run has not measured it
        return None


def ablations(runs: Sequence[ReportInput]) -> list[dict[str, Any]]:
    """`judge_tables.ablations` over replicates: the points that all have, with intervals of their win rates."""
    measure = findings.headline(runs[0].evaluation)
    each = [judge_tables.ablations(run, measure) for run in runs]

    def key(one: Row) -> tuple[str, str, str]:
        return one["kind"], one["dataset"], one["against"]

    found = []
    for one in each[0]:
        same: list[Row] = [next((other for other in of if key(other) == key(one)), {"points": []}) for of in each]
        by_place = [{(point["name"], point["x"]): point["adjusted_win_rate"] for point in of["points"]} for of in same]
        points = []
        for name, x in by_place[0]:
            if all((name, x) in of for of in by_place):
                rate = mean_interval([of[name, x] for of in by_place])
                points.append({"x": x, "name": name, "adjusted_win_rate": rate.mean, "low": rate.low, "high": rate.high})  # fmt: skip
        found += [{**one, "points": points}] if points else []
    return found
