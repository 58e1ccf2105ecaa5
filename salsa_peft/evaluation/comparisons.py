"""Win rates of pairs of models by the scores of their answers, and the search for β by reward.

The win rates are computed from answers.jsonl on demand, so that a new pair in the recipe needs no new answers. Imports
no torch.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from salsa_peft.config import sweeps
from salsa_peft.config.schema import Recipe
from salsa_peft.utils.statistics import compare_scores, paired_difference

Rows = Sequence[Mapping[str, Any]]
"""Rows of answers.jsonl; the rows of one model and one set of questions are ordered by index and turn."""


def clusters(rows: Rows) -> list[int] | None:
    """Index of each row's question, to cluster intervals by; None if every question has one turn."""
    return [row["index"] for row in rows] if any(row["turn"] > 1 for row in rows) else None


def by_set(answers: Rows) -> dict[str, dict[str, list[Mapping[str, Any]]]]:
    """Group rows of answers.jsonl as set of questions → model → rows of the model."""
    found: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for row in answers:
        found.setdefault(row["dataset"], {}).setdefault(row["model"], []).append(row)
    return found


def pairs(answers: Mapping[str, Rows], wanted: sweeps.Pairs, measures: Sequence[str]) -> list[dict[str, Any]]:
    """Win rates and mean difference of each pair of models by each measure, on one set of questions."""
    found = []
    for (a, b), measure in itertools.product(wanted, measures):
        both = [
            rows for rows in zip(answers[a], answers[b], strict=True) if all(measure in row["scores"] for row in rows)
        ]
        if not both:  # a held-out reward that applies to none of the answers
            continue
        x, y = ([row["scores"][measure] for row in rows] for rows in zip(*both, strict=True))
        of = clusters([row for row, _ in both])
        difference = asdict(paired_difference(x, y, of))
        found.append(
            {"a": a, "b": b, "measure": measure, **asdict(compare_scores(x, y, clusters=of)), "difference": difference}
        )
    return found


def searched(recipe: Recipe, answers: Mapping[str, Mapping[str, Rows]]) -> dict[str, Any] | None:
    """Result of the search for β by reward (`sweeps.pick_candidates`); None without such a search.

    A candidate's win rate is over all questions of the sets that `search.questions` names, by default of all sets.
    """
    section = recipe.search
    if section is None or section.by == "judge":
        return None
    sets, rates = section.questions or list(answers), {}
    for a, b in sweeps.candidate_pairs(recipe):
        x, y = ([row["scores"]["reward"] for name in sets for row in answers[name][model]] for model in (a, b))
        of = [(name, row["index"]) for name in sets for row in answers[name][a]]
        rates[a] = asdict(compare_scores(x, y, clusters=of if len(set(of)) < len(of) else None))
    return sweeps.pick_candidates(recipe, rates, list(answers))


def wanted(recipe: Recipe, found: Mapping[str, Any] | None) -> sweeps.Pairs:
    """Pairs to compare: each candidate of a search with `search.against`, then the recipe's pairs.

    In the recipe's pairs the picked candidate replaces the searched policy.
    """
    return list(
        dict.fromkeys(sweeps.candidate_pairs(recipe) + sweeps.with_picked(sweeps.compared_pairs(recipe), found))
    )
