"""What a run measured → report.html (one file), report.md with its figures, summary.json (every number of both).

The page is for a researcher who has a minute: the finding in words, then models × measures, wins and losses, the
landscape, PPO's curves, score distributions, answers side by side, and what was run. Both texts come from one context
through two templates, so they cannot disagree. A piece that the run does not have leaves its section out. The same
input gives the same bytes. Left out: scripts, anything fetched, and dates (the run's folder has them).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from salsa_peft import findings, panels, report_answers, report_judge, text
from salsa_peft.panels import Panel
from salsa_peft.report_figures import CURVES, draw, scores_of
from salsa_peft.report_input import PolicyReport, ReportInput
from salsa_peft.text import is_number


def write_report(folder: Path, run: ReportInput) -> dict[str, Any]:
    """Writes report.html, report.md, figures/*.png and summary.json into `folder`; returns what summary.json holds."""
    told, drawn = context(run), draw(run)
    return write_pages(folder, "report", told | {"run": run}, drawn, summarise(run, told))


def write_pages(
    folder: Path, template: str, told: Mapping[str, Any], drawn: Mapping[str, Sequence[Panel]], summary: dict[str, Any]
) -> dict[str, Any]:
    """One context through a template for HTML and one for Markdown, the figures as PNG beside them, every number as JSON."""
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
    looks = {"colors": panels.variables(), "dark": panels.darks(), "outcomes": report_answers.OUTCOMES}
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
    judged = report_judge.judged(run)
    by_judge, also = findings.of_judge(judged, run.policies) if judged else ([], [])
    return {
        "lead": [" ".join(part) for part in (by_judge, lead) if part],
        "more": [*also, *more],
        "judged": judged,
        "search": report_judge.searched(run),
        "compared": compared,
        "warnings": [
            *report_judge.warnings(run),
            *findings.warnings(run.evaluation, run.landscape, run.reward),
            *(
                f"{text.percent(share)}% of the answers to “{dataset}” are as long as generation.max_new_tokens ({run.limit}) lets them be: cut."
                for dataset, share in report_answers.cut(run).items()
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
        "measures": panels.MEASURES,
        "training": {name: training(policy) for name, policy in run.policies.items() if policy.metrics},
        "samples": report_answers.samples(run),
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
            "ablations": report_judge.ablations(run, findings.headline(run.evaluation)) if datasets else [],
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
