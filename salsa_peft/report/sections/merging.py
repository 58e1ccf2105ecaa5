"""The report's section on models that are made of policies: their soups, rewarded soups, and WARP."""

from collections.abc import Mapping, Sequence
from typing import Any

from salsa_peft.report.format import Row
from salsa_peft.report.gather import ReportInput
from salsa_peft.report.sections import paired, pareto, policy_soups, warp
from salsa_peft.report.style import Look, Panel

TITLE = "Soups of policies"
"""Title of the sentences on the first screen."""


def merging(runs: Sequence[ReportInput]) -> dict[str, Any] | None:
    """{"soups", "sentences", "front", "front_sentences", "warp"} of one run or of replicates; None if there is nothing."""
    if not all(run.evaluation.get("datasets") for run in runs):
        return None
    scores = paired.of_run(runs[0]) if len(runs) == 1 else paired.of_replicates(runs)
    rows = policy_soups.compare(scores, runs[0].soups, runs[0].policies)
    front, by_iteration = pareto.front(scores, runs[0]), warp.table(scores, runs)
    if not rows and front is None and by_iteration is None:
        return None
    return {
        "over": scores.over,
        "soups": rows,
        "sentences": policy_soups.sentences(rows, len(runs), policy_soups.sft_soup(runs[0].soups) is not None),
        "front": front,
        "front_sentences": pareto.sentences(front) if front is not None else [],
        "warp": by_iteration,
    }


def first_screen(found: Row | None) -> dict[str, str]:
    """Sentences of the first screen: on one soup of policies, or the first sentence on several, and on the fronts."""
    if found is None:
        return {}
    fronts = {"Rewarded soups": " ".join(found["front_sentences"])} if found["front_sentences"] else {}
    of_soups = found["sentences"]
    if len({row["soup"] for row in found["soups"]}) > 1:
        of_soups = [of_soups[0], "The section on models made of policies has the other comparisons."]
    soups = {TITLE: " ".join(of_soups)} if of_soups else {}
    return soups | fronts


def draw(found: Row | None, styles: Mapping[str, Look], prefix: str = "") -> list[Panel]:
    """Panels of the section."""
    if found is None:
        return []
    fronts = pareto.draw(found["front"], prefix) if found["front"] is not None else []
    etas = warp.draw(found["warp"], prefix) if found["warp"] is not None else []
    return [*policy_soups.draw(found["soups"], styles, prefix), *fronts, *etas]
