"""Write report.html, report.md and summary.json of a run, with sample answers side by side."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from salsa_peft.report import findings, headline, judge_tables, style
from salsa_peft.report.format import Row, finite, flatten, is_number, percent, render
from salsa_peft.report.gather import PolicyReport, ReportInput
from salsa_peft.report.plots import CURVES, draw, scores_of, styles_of
from salsa_peft.report.sections import first_screen, frontier, merging, reward
from salsa_peft.report.sections.forest import forests
from salsa_peft.report.style import Panel


def write_report(folder: Path, run: ReportInput) -> dict[str, Any]:
    """Write report.html, report.md, figures/*.png and summary.json; returns the summary."""
    found, styles = context(run), styles_of(run)
    passed_over = judge_tables.passed_over(run)
    notes = {name: one["note"] for name, one in found["names"].items()}
    drawn = {"headline": forests(found["headline"], styles, notes, hidden=passed_over), **draw(run)}
    drawn["merging"] = merging.draw(found["merging"], styles)
    drawn["frontier"] = [frontier.draw(found["frontier"], styles)] if found["frontier"] else []
    return write_pages(folder, "report", {**found, "run": run}, drawn, summarise(run, found))


def write_pages(
    folder: Path, template: str, context: Row, drawn: Mapping[str, Sequence[Panel]], summary: dict[str, Any]
) -> dict[str, Any]:
    """Write the report as HTML and Markdown, its figures as PNG, and the summary as JSON."""
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    for panel in (one for section in drawn.values() for one in section):
        (folder / "figures" / f"{panel.name}.png").write_bytes(panel.png)
    looks = {"colors": style.variables(), "dark": style.darks(), "outcomes": OUTCOMES, "measures": style.MEASURES}
    for kind in ("html", "md"):
        page = render(f"{template}.{kind}.jinja", **context, panels=drawn, **looks)
        (folder / f"report.{kind}").write_text(page + "\n", encoding="utf-8")
    text = json.dumps(summary, ensure_ascii=False, allow_nan=False, indent=1)
    (folder / "summary.json").write_text(text + "\n", encoding="utf-8")
    return summary


def context(run: ReportInput) -> dict[str, Any]:
    """Variables of both templates, except for the ReportInput itself."""
    scored, judged = findings.scored(run), judge_tables.judged(run)
    made_of_policies = merging.merging([run])
    tables, compared = headline.table(scored), findings.comparisons(scored)
    screen = first_screen.screen(
        line=first_screen.run_line(
            run.policies, tables, len(run.seeds), run.explained, judged["judge"] if judged else None
        ),
        tables=tables,
        compared=compared,
        policies=run.policies,
        models=findings.order(run.evaluation, run.policies),
        explained=run.explained,
        described=run.described,
        judged=judged,
        more=merging.first_screen(made_of_policies),
    )
    facts = {name: flatten(metrics) for name, metrics in run.seeds.items()}
    facts |= {"reward": flatten(reward.facts(run.reward)), "soup": flatten(run.soup)}
    facts |= {name: flatten(policy.facts) for name, policy in run.policies.items()}
    return {
        "screen": screen,
        "headline": tables,
        "console": headline.console(tables, screen["names"], screen["sentences"]),
        "narrow_console": headline.console(tables, screen["names"], screen["sentences"], headline.NARROW),
        "frontier": frontier.frontier([run]) if run.policies else None,
        "merging": made_of_policies,
        "more": findings.along(run.landscape) if run.landscape else [],
        "judged": judged,
        "reward": reward.context(run.reward, run.reward_quality, run.verdicts),
        "search": judge_tables.searched(run),
        "compared": [{**one, "conclusion": findings.means_for_averaging(one, run.policies)} for one in compared],
        "warnings": [
            *judge_tables.warnings(run),
            *findings.warnings(run.evaluation, run.landscape, run.reward),
            *(
                f"{percent(share)}% of the answers to “{dataset}” were truncated at generation.max_new_tokens"
                f" ({run.limit})."
                for dataset, share in truncated(run).items()
            ),
        ],
        "names": {
            name: {
                "what": first_screen.describe(name, run.policies, run.described),
                "note": first_screen.note(name, run.policies, run.described),
                "control": findings.is_control(name, run.policies),
            }
            for name in findings.order(run.evaluation, run.policies)
        },
        "training": {name: training(policy) for name, policy in run.policies.items() if policy.metrics},
        "samples": sample_answers(run),
        "facts": {title: rows for title, rows in facts.items() if rows},
        "total": {
            "seconds": sum(unit["seconds"] or 0.0 for unit in run.units),
            "peak_mb": max((unit["peak_mb"] or 0.0 for unit in run.units), default=0.0),
        },
        "short_conclusion": findings.short_conclusion,
        "undecided": findings.undecided,
    }


def summarise(run: ReportInput, found: Row) -> dict[str, Any]:
    """Content of summary.json: every number of the report, null if not finite. found: result of `context`."""
    datasets = run.evaluation.get("datasets", {})
    judged = found["judged"] or {"datasets": {}}

    def fields(*names: str) -> dict[str, Any]:
        return {name: getattr(run, name) for name in names}

    return finite(
        {
            **fields("name", "mode", "base", "versions"),
            **{
                name: found[name] for name in ("screen", "headline", "console", "narrow_console", "frontier", "merging")
            },
            "finding": [*found["screen"]["sentences"].values(), *found["more"]],
            "warnings": found["warnings"],
            "comparisons": found["compared"],
            "verdicts": run.verdicts,
            "paper": {
                dataset: [{"a": pair["a"], "b": pair["b"], **pair["paper"]} for pair in data["pairs"] if pair["paper"]]
                for dataset, data in judged["datasets"].items()
            },
            "search": found["search"],
            "ablations": judge_tables.ablations(run, findings.headline(run.evaluation)) if datasets else [],
            **fields("training_seeds", "fingerprint", "evaluation", "landscape"),
            "scores": {
                dataset: {measure: scores_of(run, dataset, measure) for measure in run.evaluation["measures"]}
                for dataset in datasets
            },
            "policies": {
                name: _policy_summary(policy, found["training"].get(name)) for name, policy in run.policies.items()
            },
            **fields("seeds", "reward", "reward_quality", "soup", "units"),
            "total": found["total"],
        }
    )


def _policy_summary(policy: PolicyReport, table: dict[str, Any] | None) -> dict[str, Any]:
    rows, completions = policy.metrics, policy.completions
    ends = [completions[0], completions[-1]] if len(completions) > 1 else completions
    return {
        **{name: getattr(policy, name) for name in ("algorithm", "reference", "facts", "kl_coef")},
        "training": table,
        "curves": {"episode": [row["episode"] for row in rows]}
        | {short: [row.get(key) for row in rows] for key, (short, _) in CURVES.items()},
        "completions": [{key: row[key] for key in ("update", "score", "kl")} for row in ends],
    }


def training(policy: PolicyReport) -> dict[str, Any]:
    """Metrics at start and end of training: β, and means over the first and last tenth of the updates."""
    rows, tenth = policy.metrics, max(1, len(policy.metrics) // 10)
    table: dict[str, Any] = {"updates": len(rows), "episodes": rows[-1]["episode"]}
    for key, (short, _) in CURVES.items():
        parts = {"start": rows[:tenth], "end": rows[-tenth:]}
        kept = {end: [row[key] for row in part if is_number(row.get(key))] for end, part in parts.items()}
        table[short] = {end: sum(values) / len(values) if values else None for end, values in kept.items()}
    return table | {"kl_coef": {"start": policy.kl_coef, "end": rows[-1].get("objective/kl_coef")}}


OUTCOMES = ("win", "loss", "tie", "missing")
"""Outcomes of a turn for the main pair, by which questions are filtered; a question may have several."""
SHORT = 140
"""Maximum number of characters of a question in its heading."""


def sample_answers(run: ReportInput) -> dict[str, Any]:
    """Answers to show: {"pair": main pair or None, "datasets": dataset → its first questions in order}."""
    names, pair = findings.order(run.evaluation, run.policies), main_pair(run)
    rows: dict[str, dict[int, dict[int, dict[str, Any]]]] = {}
    for row in run.answers:
        rows.setdefault(row["dataset"], {}).setdefault(row["index"], {}).setdefault(row["turn"], {})[row["model"]] = row
    judgments: dict[tuple[str, int, int], list[Row]] = {}
    for row in run.judgments:
        judgments.setdefault((row["dataset"], row["index"], row["turn"]), []).append(row)

    def question(dataset: str, index: int) -> dict[str, Any]:
        turns = []
        for turn, answers in sorted(rows[dataset][index].items()):
            judged = judgments.get((dataset, index, turn), [])
            turns.append(
                {
                    "prompt": next(iter(answers.values()))["prompt"],
                    "answers": {name: answers[name] for name in names if name in answers},
                    "judgments": judged,
                    "outcome": None if pair is None else _outcome(run, pair, answers, judged),
                }
            )
        first = " ".join(str(turns[0]["prompt"]).split())
        return {
            "heading": first if len(first) <= SHORT else f"{first[:SHORT]}…",
            "turns": turns,
            "outcomes": [name for name in OUTCOMES if any(one["outcome"] == name for one in turns)],
        }

    return {
        "pair": pair,
        "datasets": {
            dataset: [question(dataset, index) for index in sorted(of)[: run.samples]] for dataset, of in rows.items()
        },
    }


def main_pair(run: ReportInput) -> tuple[str, str] | None:
    """The pair by which answers are filtered: the judge's first pair, or else the evaluation's first."""
    sets = [data for source in (run.verdicts, run.evaluation) for data in (source or {}).get("datasets", {}).values()]
    return next(((pair["a"], pair["b"]) for data in sets for pair in data.get("pairs", [])), None)


def _outcome(
    run: ReportInput, pair: tuple[str, str], answers: Mapping[str, Row], judgments: Sequence[Row]
) -> str | None:
    """Outcome of one turn for the first model of the pair; None if the two answers were not compared."""
    if run.verdicts is not None:
        words = {"a": "win", "b": "loss", "tie": "tie", "missing": "missing"}
        return next((words[row["winner"]] for row in judgments if (row["a"], row["b"]) == pair), None)
    measure = findings.headline(run.evaluation)
    scores = [answers.get(name, {"scores": {}})["scores"].get(measure) for name in pair]
    if not all(is_number(score) for score in scores):
        return None
    return "win" if scores[0] > scores[1] else "loss" if scores[1] > scores[0] else "tie"


def truncated(run: ReportInput) -> dict[str, float]:
    """Dataset → share of its answers that reached the length limit, if more than a tenth of them did."""
    if run.limit is None:
        return {}
    at_limit: dict[str, list[bool]] = {}
    for row in run.answers:
        at_limit.setdefault(row["dataset"], []).append(row["length"] >= run.limit)
    return {dataset: share for dataset, cut in at_limit.items() if (share := sum(cut) / len(cut)) > 0.1}
