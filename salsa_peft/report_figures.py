"""Which figures a run's report has: for each section its panels, drawn by figures.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from salsa_peft import figures, findings, panels, report_judge, text
from salsa_peft.panels import Look, Panel
from salsa_peft.report_input import ReportInput
from salsa_peft.text import is_number

CURVES = {  # key of metrics.jsonl → name in summary.json, title
    "objective/scores": ("score", "Score of the responses"),
    "objective/kl": ("kl", "KL to the reference, summed over a response"),
    "objective/response_length": ("response_length", "Response length, tokens"),
    "objective/kl_coef": ("kl_coef", "β, the KL coefficient"),
}


def draw(run: ReportInput) -> dict[str, list[Panel]]:
    """Section → its panels; none where the run has nothing to draw."""
    names = findings.order(run.evaluation, run.policies)
    others = [end for line in (run.landscape or {}).get("lines", []) for end in line["ends"]]
    controls = [name for name in names if findings.is_control(name, run.policies)]
    styles = panels.looks([*names, *others, "soup"], controls)
    drawn: dict[str, list[Panel]] = {
        name: [] for name in ("judged", "ablations", "scores", "pairs", "landscape", "training", "distributions")
    }
    for dataset, data in (run.verdicts or {"datasets": {}})["datasets"].items():
        tag, title = text.file_name(dataset), f"Win rates by the judge, “{dataset}”"
        told = [pair for pair in data["pairs"] if pair["n"]]
        drawn["judged"] += [figures.win_rates(f"judged-{tag}", title, told, styles)] if told else []
    if run.evaluation.get("datasets"):
        drawn["ablations"] = _ablations(run, styles)
    for dataset, data in run.evaluation.get("datasets", {}).items():
        for measure in run.evaluation["measures"]:
            tag = text.file_name(f"{dataset}-{measure}")
            title = f"{panels.MEASURES.get(measure, measure).capitalize()}, “{dataset}”"
            models = {
                name: data["models"][name]["scores"][measure]
                for name in names
                if measure in data["models"].get(name, {}).get("scores", {})
            }
            if models:
                drawn["scores"].append(figures.scores(f"scores-{tag}", title, models, measure, styles))
            if pairs := [pair for pair in data.get("pairs", []) if pair["measure"] == measure]:
                drawn["pairs"].append(figures.win_rates(f"pairs-{tag}", title, pairs, styles))
            if values := {name: kept for name, kept in scores_of(run, dataset, measure).items() if kept}:
                drawn["distributions"].append(
                    figures.distributions(f"distribution-{tag}", title, values, measure, styles)
                )
    if run.landscape:
        drawn["landscape"] = draw_landscape(run.landscape, styles)
    curves = {name: policy.metrics for name, policy in run.policies.items() if policy.metrics}
    for key, (short, title) in CURVES.items():
        reached = [row[key] for rows in curves.values() for row in rows if is_number(row.get(key))]
        if reached:
            log = short == "kl_coef" and min(reached) > 0 and max(reached) > 8 * min(reached)
            drawn["training"].append(figures.curve(f"training-{short}", title, curves, key, styles, log))
    return drawn


def _ablations(run: ReportInput, styles: Mapping[str, Look]) -> list[Panel]:
    measure, drawn = findings.headline(run.evaluation), []
    by = "the judge" if run.verdicts else panels.MEASURES.get(measure, measure)
    for number, one in enumerate(report_judge.ablations(run, measure)):
        title = f"Over {one['against']}, “{one['dataset']}”, by {by}"
        drawn.append(figures.ablation(f"ablation-{number}-{one['kind']}", title, one["points"], one["xlabel"], one["log"], styles))  # fmt: skip
    return drawn


def draw_landscape(landscape: Mapping[str, Any], styles: Mapping[str, Look]) -> list[Panel]:
    """For each measure: lines between seeds and the control lines beside them, on one scale; then the planes."""
    drawn, planes = [], []
    for measure in landscape["measures"]:
        title = panels.MEASURES.get(measure, measure).capitalize()
        edges = [
            point["scores"][measure][key]
            for line in landscape["lines"]
            for point in line["points"]
            for key in ("low", "high")
        ]
        margin = 0.09 * (max(edges, default=0) - min(edges, default=0)) or 0.1
        limits = (min(edges, default=0) - margin, max(edges, default=0) + margin)
        lines, shrunk = (
            [line for line in landscape["lines"] if (line["kind"] == "shrunk") == control] for control in (False, True)
        )
        middle = next(
            (p["scores"][measure]["mean"] for line in lines[:1] for p in line["points"] if abs(p["at"] - 0.5) < 1e-9),
            None,
        )
        if lines:
            drawn.append(
                figures.line(f"line-{measure}", f"{title} between seeds", lines, measure, styles, limits, middle)
            )
        if shrunk:
            drawn.append(
                figures.line(f"shrunk-{measure}", f"{title}, the control", shrunk, measure, styles, limits, middle)
            )
        if landscape["plane"] and landscape["plane"]["points"]:
            planes.append(figures.plane(f"plane-{measure}", f"{title}, three seeds", landscape["plane"], measure))
    return drawn + planes


def scores_of(run: ReportInput, dataset: str, measure: str) -> dict[str, list[float]]:
    """model → the scores of its answers to one dataset."""
    return {
        name: [
            row["scores"][measure]
            for row in run.answers
            if (row["dataset"], row["model"]) == (dataset, name) and is_number(row["scores"].get(measure))
        ]
        for name in findings.order(run.evaluation, run.policies)
    }
