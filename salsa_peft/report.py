"""What a run measured → report.html (one file), report.md with its figures, summary.json (every number of both).

The page is for a researcher who has a minute: the finding in words, then models × measures, wins and losses, the
landscape, PPO's curves, score distributions, answers side by side, and what was run. Both texts come from one context
through two templates, so they cannot disagree. A piece that the run does not have leaves its section out. The same
input gives the same bytes. Left out: scripts, anything fetched, and dates (the run's folder has them).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from salsa_peft import figures, findings, panels, text
from salsa_peft.panels import Look, Panel
from salsa_peft.text import is_number

SAMPLES = 4
"""Questions of each dataset whose answers are shown: its first ones, so that nobody chose them."""
CURVES = {  # key of metrics.jsonl → name in summary.json, title
    "objective/scores": ("score", "Score of the responses"),
    "objective/kl": ("kl", "KL to the reference, summed over a response"),
    "objective/response_length": ("response_length", "Response length, tokens"),
    "objective/kl_coef": ("kl_coef", "β, the KL coefficient"),
}


@dataclass(frozen=True)
class PolicyReport:
    """One policy's training."""

    reference: str
    """In words: "seed-0", "soup", "shrunk: base + 0.6 · seed-0", "seed-0, seed-1", "base"."""
    kl_coef: float
    """β at the start."""
    metrics: list[dict[str, Any]]
    """The rows of metrics.jsonl."""
    completions: list[dict[str, Any]]
    """Rows of completions.jsonl; the first and the last are shown."""


@dataclass(frozen=True)
class ReportInput:
    """All that the report knows; {} , [] or None where the run has no such stage."""

    name: str
    recipe_yaml: str
    mode: str
    base: str
    versions: dict[str, str]
    units: list[dict[str, Any]]
    """{"unit", "key", "seconds", "peak_mb", "gpu_peak_mb", "gpu_planned_mb", "skipped"}; seconds and megabytes may be None."""
    seeds: dict[str, dict[str, Any]]
    reward: dict[str, Any]
    soup: dict[str, Any]
    policies: dict[str, PolicyReport]
    landscape: dict[str, Any] | None
    evaluation: dict[str, Any]
    answers: list[dict[str, Any]]


def write_report(folder: Path, run: ReportInput) -> dict[str, Any]:
    """Writes report.html, report.md, figures/*.png and summary.json into `folder`; returns what summary.json holds."""
    told, drawn = context(run), draw(run)
    environment = Environment(
        loader=PackageLoader("salsa_peft"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=lambda name: bool(name and "html" in name),
    )
    environment.filters |= text.FILTERS
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    for panel in (one for section in drawn.values() for one in section):
        (folder / "figures" / f"{panel.name}.png").write_bytes(panel.png)
    more = {"run": run, "panels": drawn, "colors": panels.variables(), "dark": panels.darks()}
    for name in ("report.html", "report.md"):
        page = environment.get_template(f"{name}.jinja").render(told | more)
        (folder / name).write_text(page.rstrip() + "\n", encoding="utf-8")
    summary = summarise(run, told)
    (folder / "summary.json").write_text(
        json.dumps(summary, ensure_ascii=False, allow_nan=False, indent=1) + "\n", encoding="utf-8"
    )
    return summary


def context(run: ReportInput) -> dict[str, Any]:
    """What both templates print, beside the input itself."""
    compared = findings.comparisons(run.evaluation, run.answers, run.policies)
    told = [one for one in compared if not findings.untuned(one, run.policies)]
    reach = max((abs(one[key]) for one in told for key in ("low", "high")), default=0.0) or 1.0
    lead, more = findings.finding(run.evaluation, run.landscape, compared, run.policies)
    return {
        "lead": lead,
        "more": more,
        "compared": compared,
        "warnings": findings.warnings(run.evaluation, run.landscape, run.reward),
        "tiles": [
            {
                **one,
                "verdict": findings.verdict(one, one["a"], one["b"]),
                "control": findings.is_control(one["b"], run.policies),
                "open": one["n"] < 2 or one["low"] <= 0 <= one["high"],
                "at": {key: 50 + 46 * one[key] / reach for key in ("mean", "low", "high")},
            }
            for one in told
        ],
        "names": {
            name: {"what": what(name, run), "control": findings.is_control(name, run.policies)}
            for name in findings.order(run.evaluation, run.policies)
        },
        "measures": panels.MEASURES,
        "training": {name: training(policy) for name, policy in run.policies.items() if policy.metrics},
        "samples": samples(run),
        "facts": {
            title: rows
            for title, rows in (
                *((name, text.flatten(metrics)) for name, metrics in run.seeds.items()),
                ("reward", text.flatten(run.reward)),
                ("soup", text.flatten(run.soup)),
            )
            if rows
        },
        "total": {
            "seconds": sum(unit["seconds"] or 0.0 for unit in run.units),
            "peak_mb": max((unit["peak_mb"] or 0.0 for unit in run.units), default=0.0),
        },
        "brief": findings.brief,
    }


def draw(run: ReportInput) -> dict[str, list[Panel]]:
    """Section → its panels; none where the run has nothing to draw."""
    names = findings.order(run.evaluation, run.policies)
    others = [end for line in (run.landscape or {}).get("lines", []) for end in line["ends"]]
    controls = [name for name in names if findings.is_control(name, run.policies)]
    styles = panels.looks([*names, *others, "soup"], controls)
    drawn: dict[str, list[Panel]] = {"scores": [], "pairs": [], "landscape": [], "training": [], "distributions": []}
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


def summarise(run: ReportInput, told: Mapping[str, Any]) -> dict[str, Any]:
    """Every number of the report, floats or null, never NaN."""
    datasets = run.evaluation.get("datasets", {})
    return text.finite(
        {
            "name": run.name,
            "mode": run.mode,
            "base": run.base,
            "versions": run.versions,
            "finding": [*told["lead"], *told["more"]],
            "warnings": told["warnings"],
            "comparisons": told["compared"],
            "evaluation": run.evaluation,
            "landscape": run.landscape,
            "scores": {
                dataset: {measure: scores_of(run, dataset, measure) for measure in run.evaluation["measures"]}
                for dataset in datasets
            },
            "policies": {
                name: {
                    "reference": policy.reference,
                    "kl_coef": policy.kl_coef,
                    "training": told["training"].get(name),
                    "curves": {"episode": [row["episode"] for row in policy.metrics]}
                    | {short: [row.get(key) for row in policy.metrics] for key, (short, _) in CURVES.items()},
                    "completions": [
                        {key: row[key] for key in ("update", "score", "kl")} for row in ends(policy.completions)
                    ],
                }
                for name, policy in run.policies.items()
            },
            "seeds": run.seeds,
            "reward": run.reward,
            "soup": run.soup,
            "units": run.units,
            "total": told["total"],
        }
    )


def training(policy: PolicyReport) -> dict[str, Any]:
    """β at the start and the end; score, KL and length as means over the first and the last tenth of the updates."""
    rows, tenth = policy.metrics, max(1, len(policy.metrics) // 10)
    table: dict[str, Any] = {"updates": len(rows), "episodes": rows[-1]["episode"]}
    for key, (short, _) in CURVES.items():
        first, last = ([row[key] for row in part if is_number(row.get(key))] for part in (rows[:tenth], rows[-tenth:]))
        table[short] = {
            "start": sum(first) / len(first) if first else None,
            "end": sum(last) / len(last) if last else None,
        }
    return table | {"kl_coef": {"start": policy.kl_coef, "end": rows[-1].get("objective/kl_coef")}}


def samples(run: ReportInput) -> dict[str, list[dict[str, Any]]]:
    """dataset → its first questions: {"prompt", "answers": model → row}, models in the report's order."""
    names, found = findings.order(run.evaluation, run.policies), {}
    for dataset in dict.fromkeys(row["dataset"] for row in run.answers):
        rows = [row for row in run.answers if row["dataset"] == dataset]
        first = sorted({row["index"] for row in rows})[:SAMPLES]
        found[dataset] = [
            {
                "prompt": next(row["prompt"] for row in rows if row["index"] == index),
                "answers": {
                    name: row for name in names for row in rows if (row["index"], row["model"]) == (index, name)
                },
            }
            for index in first
        ]
    return found


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


def what(name: str, run: ReportInput) -> str:
    if name in run.policies:
        return f"PPO from seed-0, reference {run.policies[name].reference}, β {run.policies[name].kl_coef:g}"
    if name.startswith("seed-"):
        return "one SFT run"
    return {
        "base": "the untuned base",
        "soup": "weight average of the seeds",
        "shrunk": "one seed, shrunk towards the base",
    }.get(name, "")


def ends(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [rows[0], rows[-1]] if len(rows) > 1 else list(rows)
