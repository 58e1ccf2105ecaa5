"""One group of replicates in a joined report: its first screen, its tables and its figures."""

from collections.abc import Mapping, Sequence
from typing import Any

from salsa_peft.report import findings, headline, plots, style
from salsa_peft.report.format import Row, file_name
from salsa_peft.report.gather import ReportInput
from salsa_peft.report.replicates import curves, landscape, measures, power, scored
from salsa_peft.report.replicates.table import over_replicates
from salsa_peft.report.sections import first_screen, frontier, merging
from salsa_peft.report.sections.forest import forests
from salsa_peft.report.style import MEASURES, Panel


def together(
    name: str, runs: Sequence[ReportInput], pairs: Mapping[str, Sequence[tuple[str, str]]], rows: Sequence[Row]
) -> dict[str, Any]:
    """What replicates found together, with their first screen, headline tables and frontier.

    pairs: set of questions → the pairs of models to compare. rows: win rates (`joined.table`).
    """
    numbers, explained = scored.scored(runs), runs[0].explained
    tables, judged = headline.table(numbers), _by_the_judge(name, runs, rows)
    policies = {} if numbers is None else dict(numbers.policies)
    models = [] if numbers is None else numbers.models
    compared, made_of_policies = findings.comparisons(numbers), merging.merging(runs)
    seen = power.table(compared)
    line = first_screen.run_line(policies, tables, len(runs[0].seeds), explained, judged["judge"] if judged else None)
    screen = first_screen.screen(
        line=f"{len(runs)} replicates of {name}: the whole recipe, each time with other random seeds. In each: {line}",
        tables=tables,
        compared=compared,
        policies=policies,
        models=models,
        explained=explained,
        described=runs[0].described,
        judged=judged,
        replicates=len(runs),
        more=merging.first_screen(made_of_policies),
    )
    return {
        "name": name,
        "screen": screen,
        "headline": tables,
        "names": {
            model: {
                "what": first_screen.describe(model, policies, runs[0].described),
                "note": first_screen.note(model, policies, runs[0].described),
            }
            for model in models
        },
        "frontier": frontier.frontier(runs),
        "merging": made_of_policies,
        "curves": curves.curves(runs),
        "training": curves.ends(runs),
        "landscape": landscape.landscape(runs),
        "scores": measures.scores(runs),
        "reward": measures.reward(runs),
        "ablations": measures.ablations(runs),
        "power": {"rows": seen, "sentences": power.sentences(seen)},
        **over_replicates(runs, pairs),
    }


def _by_the_judge(name: str, runs: Sequence[ReportInput], rows: Sequence[Row]) -> dict[str, Any] | None:
    """The win rates over replicates by their judge, as `judge_tables.judged` has those of a run; None without a judge."""
    if runs[0].verdicts is None:
        return None
    by = next(row["by"] for row in rows if row["model"] == name)
    return {
        "judge": by,
        "datasets": {
            row["dataset"]: {
                "questions": runs[0].evaluation["datasets"][row["dataset"]]["n"],
                "pairs": [{**cell, "n": cell["runs"]} for cell in row["cells"].values()],
            }
            for row in rows
            if (row["model"], row["by"]) == (name, by)
        },
    }


def draw(group: Row, first: ReportInput, number: int) -> dict[str, list[Panel]]:
    """Panels of one group of replicates; section → panels."""
    prefix, styles = f"replicates-{number}-" if number else "", plots.styles_of(first)
    styles |= style.looks([name for name in group["names"] if name not in styles])
    notes = {name: one["note"] for name, one in group["names"].items()}
    drawn = {
        "headline": forests(group["headline"], styles, notes, prefix=prefix),
        "frontier": [frontier.draw(group["frontier"], styles, prefix)] if group["frontier"] else [],
        "merging": merging.draw(group["merging"], styles, prefix),
        "scores": _scores(group, styles, prefix),
        "training": curves.draw(group["curves"], styles, prefix),
        "landscape": landscape.draw(group["landscape"], styles, prefix) if group["landscape"] else [],
        "ablations": _ablations(group, styles, prefix),
    }
    return {f"{section}{number}": panels for section, panels in drawn.items()}


def _scores(group: Row, styles: plots.Styles, prefix: str) -> list[Panel]:
    return [
        plots.scores(
            f"{prefix}scores-{file_name(f'{dataset}-{measure}')}",
            f"{MEASURES.get(measure, measure).capitalize().replace('_', ' ')}, “{dataset}”",
            models,
            measure.replace("_", " "),
            styles,
            "replicates",
        )
        for dataset, by_measure in group["scores"].items()
        for measure, models in by_measure.items()
    ]


def _ablations(group: Row, styles: plots.Styles, prefix: str) -> list[Panel]:
    return [
        plots.ablation(
            f"{prefix}ablation-{number}-{one['kind']}",
            f"Over {one['against']}, “{one['dataset']}”",
            one["points"],
            one["xlabel"],
            one["log"],
            styles,
        )
        for number, one in enumerate(group["ablations"])
    ]
