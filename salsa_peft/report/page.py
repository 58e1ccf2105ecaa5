"""report.html, report.md and summary.json of a run, with answers side by side."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from salsa_peft.report import findings, judge_tables, style
from salsa_peft.report import format as text
from salsa_peft.report.format import is_number
from salsa_peft.report.gather import PolicyReport, ReportInput
from salsa_peft.report.plots import CURVES, draw, scores_of
from salsa_peft.report.style import Panel


def write_report(folder: Path, run: ReportInput) -> dict[str, Any]:
    """Writes report.html, report.md, figures/*.png and summary.json into `folder`; returns what summary.json holds."""
    told, drawn = context(run), draw(run)
    return write_pages(folder, "report", told | {"run": run}, drawn, summarise(run, told))


def write_pages(
    folder: Path, template: str, told: Mapping[str, Any], drawn: Mapping[str, Sequence[Panel]], summary: dict[str, Any]
) -> dict[str, Any]:
    """One context through a template for HTML and one for Markdown, the figures as PNG beside them, every number as JSON."""
    environment = Environment(
        loader=PackageLoader("salsa_peft.report"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=lambda name: bool(name and "html" in name),
    )
    environment.filters |= text.FILTERS
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    for panel in (one for section in drawn.values() for one in section):
        (folder / "figures" / f"{panel.name}.png").write_bytes(panel.png)
    looks = {"colors": style.variables(), "dark": style.darks(), "outcomes": OUTCOMES}
    more = {"panels": drawn, **looks}
    for kind in ("html", "md"):
        page = environment.get_template(f"{template}.{kind}.jinja").render({**told, **more})
        (folder / f"report.{kind}").write_text(page.rstrip() + "\n", encoding="utf-8")
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
    judged = judge_tables.judged(run)
    by_judge, also = findings.of_judge(judged, run.policies) if judged else ([], [])
    return {
        "lead": [" ".join(part) for part in (by_judge, lead) if part],
        "more": [*also, *more],
        "judged": judged,
        "search": judge_tables.searched(run),
        "compared": compared,
        "warnings": [
            *judge_tables.warnings(run),
            *findings.warnings(run.evaluation, run.landscape, run.reward),
            *(
                f"{text.percent(share)}% of the answers to “{dataset}” are as long as generation.max_new_tokens ({run.limit}) lets them be: cut."
                for dataset, share in cut(run).items()
            ),
        ],
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
        "measures": style.MEASURES,
        "training": {name: training(policy) for name, policy in run.policies.items() if policy.metrics},
        "samples": samples(run),
        "facts": {
            title: rows
            for title, rows in (
                *((name, text.flatten(metrics)) for name, metrics in run.seeds.items()),
                ("reward", text.flatten(run.reward)),
                ("soup", text.flatten(run.soup)),
                *((name, text.flatten(policy.facts)) for name, policy in run.policies.items()),
            )
            if rows
        },
        "total": {
            "seconds": sum(unit["seconds"] or 0.0 for unit in run.units),
            "peak_mb": max((unit["peak_mb"] or 0.0 for unit in run.units), default=0.0),
        },
        "brief": findings.brief,
    }


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
            "verdicts": run.verdicts,
            "paper": {
                dataset: [{"a": pair["a"], "b": pair["b"], **pair["paper"]} for pair in data["pairs"] if pair["paper"]]
                for dataset, data in (told["judged"] or {"datasets": {}})["datasets"].items()
            },
            "search": told["search"],
            "ablations": judge_tables.ablations(run, findings.headline(run.evaluation)) if datasets else [],
            "training_seeds": run.training_seeds,
            "fingerprint": run.fingerprint,
            "evaluation": run.evaluation,
            "landscape": run.landscape,
            "scores": {
                dataset: {measure: scores_of(run, dataset, measure) for measure in run.evaluation["measures"]}
                for dataset in datasets
            },
            "policies": {
                name: {
                    "algorithm": policy.algorithm,
                    "reference": policy.reference,
                    "facts": policy.facts,
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


def what(name: str, run: ReportInput) -> str:
    if name in run.policies:
        policy = run.policies[name]
        return f"{policy.algorithm.upper()} from seed-0, reference {policy.reference}, β {policy.kl_coef:g}"
    if name.startswith("seed-"):
        return "one SFT run"
    return {
        "base": "the untuned base",
        "soup": "weight average of the seeds",
        "shrunk": "one seed, shrunk towards the base",
    }.get(name, "")


def ends(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [rows[0], rows[-1]] if len(rows) > 1 else list(rows)


OUTCOMES = ("win", "loss", "tie", "missing")
"""Of the pair that the page is filtered by; a question whose turns end differently has several."""
SHORT = 140
"""Characters of a question in its heading."""


def samples(run: ReportInput) -> dict[str, Any]:
    """{"pair": (a, b) of the filter | None, "datasets": dataset → its first questions in order, so that nobody chose them}."""
    names = findings.order(run.evaluation, run.policies)
    pair = main_pair(run)
    rows: dict[str, dict[int, dict[int, dict[str, Any]]]] = {}
    for row in run.answers:
        rows.setdefault(row["dataset"], {}).setdefault(row["index"], {}).setdefault(row["turn"], {})[row["model"]] = row
    rulings: dict[tuple[str, int, int], list[Mapping[str, Any]]] = {}
    for row in run.judgments:
        rulings.setdefault((row["dataset"], row["index"], row["turn"]), []).append(row)
    return {
        "pair": pair,
        "datasets": {
            dataset: [
                _question(run, dataset, index, of[index], rulings, names, pair) for index in sorted(of)[: run.samples]
            ]
            for dataset, of in rows.items()
        },
    }


def main_pair(run: ReportInput) -> tuple[str, str] | None:
    """What the answers are filtered by: the judge's first pair, else the first of the evaluation."""
    for source in (run.verdicts, run.evaluation):
        for data in (source or {}).get("datasets", {}).values():
            for pair in data.get("pairs", []):
                return pair["a"], pair["b"]
    return None


def _question(
    run: ReportInput,
    dataset: str,
    index: int,
    turns: Mapping[int, Mapping[str, Mapping[str, Any]]],
    rulings: Mapping[tuple[str, int, int], Sequence[Mapping[str, Any]]],
    names: Sequence[str],
    pair: tuple[str, str] | None,
) -> dict[str, Any]:
    told = []
    for turn, answers in sorted(turns.items()):
        judged = rulings.get((dataset, index, turn), [])
        told.append(
            {
                "turn": turn,
                "prompt": next(iter(answers.values()))["prompt"],
                "answers": {name: answers[name] for name in names if name in answers},
                "rulings": judged,
                "outcome": None if pair is None else _outcome(run, pair, answers, judged),
            }
        )
    first = " ".join(str(told[0]["prompt"]).split())
    return {
        "index": index,
        "id": next(iter(turns[min(turns)].values())).get("question_id", index),
        "category": next(iter(turns[min(turns)].values())).get("category"),
        "heading": first if len(first) <= SHORT else f"{first[:SHORT]}…",
        "turns": told,
        "outcomes": [name for name in OUTCOMES if any(one["outcome"] == name for one in told)],
    }


def _outcome(
    run: ReportInput,
    pair: tuple[str, str],
    answers: Mapping[str, Mapping[str, Any]],
    rulings: Sequence[Mapping[str, Any]],
) -> str | None:
    """win: of the pair's first model."""
    words = {"a": "win", "b": "loss", "tie": "tie", "missing": "missing"}
    if run.verdicts is not None:
        return next((words[row["winner"]] for row in rulings if (row["a"], row["b"]) == pair), None)
    measure = findings.headline(run.evaluation)
    scores = [answers.get(name, {"scores": {}})["scores"].get(measure) for name in pair]
    if not all(is_number(score) for score in scores):
        return None
    return "win" if scores[0] > scores[1] else "loss" if scores[1] > scores[0] else "tie"


def cut(run: ReportInput) -> dict[str, float]:
    """Dataset → the share of its answers that are as long as they could be, where that is more than a tenth: they were cut."""
    found: dict[str, float] = {}
    if run.limit is None:
        return found
    for dataset in dict.fromkeys(row["dataset"] for row in run.answers):
        lengths = [row["length"] for row in run.answers if row["dataset"] == dataset]
        share = sum(length >= run.limit for length in lengths) / len(lengths)
        found |= {dataset: share} if share > 0.1 else {}
    return found
