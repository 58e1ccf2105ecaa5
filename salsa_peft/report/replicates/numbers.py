"""Numbers of replicates that the claims compare: of models before PPO, of the landscape, and of policies at a β.

Each function returns {} if a replicate lacks what it asks for, so that a claim about it is left out.
"""

from collections.abc import Callable, Mapping, Sequence

from salsa_peft.config.references import parse_reference
from salsa_peft.report.format import Row
from salsa_peft.report.replicates.summary import Replicate, leave_one_out

FEWEST = 2
"""Least number of replicates for an interval, and for a choice by the other replicates."""

Numbers = Mapping[str, Sequence[float]]
"""Set of questions → a number of each replicate."""


def mean_of(*numbers: Numbers) -> Numbers:
    """The mean of several numbers, replicate by replicate; {} if one of them is missing."""
    if not all(numbers):
        return {}
    names = [name for name in numbers[0] if all(name in one for one in numbers)]
    return {name: [sum(of) / len(of) for of in zip(*(one[name] for one in numbers), strict=True)] for name in names}


# Numbers of the models before PPO


def of_model(replicates: Sequence[Replicate], label: str, number: str = "scores") -> Numbers:
    """Scores, or another number by set of questions, of a model before PPO: a seed, the soup, the base, or a control.

    label: the model's name; for a control the label of its reference.
    """

    def name(one: Replicate) -> str:
        return next((name for name, of in one.controls.items() if of == label), label)

    values = [(getattr(one, number), name(one)) for one in replicates]
    if not values or any(model not in of for by_set, model in values for of in by_set.values()):
        return {}
    return {dataset: [by_set[dataset][model] for by_set, model in values] for dataset in values[0][0]}


def line_points(replicates: Sequence[Replicate], kind: str) -> tuple[str, list[dict[float, float]]]:
    """The landscape's set of questions, and for each replicate position → score on its first line of a kind."""
    found = []
    for one in replicates:
        lines = [] if one.landscape is None else [line for line in one.landscape["lines"] if line["kind"] == kind]
        points: Sequence[Row] = lines[0]["points"] if lines else []
        found.append({round(point["at"], 6): point["scores"][one.measure]["mean"] for point in points})
    landscape = replicates[0].landscape if replicates else None
    return ("" if landscape is None else landscape["questions"]), found


def on_line(replicates: Sequence[Replicate], *positions: float) -> Numbers:
    """Mean score of points on the line of two seeds; {} if a replicate lacks one."""
    dataset, found = line_points(replicates, "line")
    if not found or any(position not in points for points in found for position in positions):
        return {}
    return {dataset: [sum(points[position] for position in positions) / len(positions) for points in found]}


def best_shrunk(replicates: Sequence[Replicate]) -> Numbers:
    """Score of base + λ·δ of one seed at the λ that is best in the other replicates, out of those that all have.

    A seed with the soup's norm has another λ in each replicate, so it is not among them.
    """
    dataset, found = line_points(replicates, "shrunk")
    scales = set(found[0]).intersection(*found) if found else set()
    if len(replicates) < FEWEST or not scales:
        return {}
    chosen = leave_one_out([{scale: points[scale] for scale in scales} for points in found])
    return {dataset: [points[scale] for points, scale in zip(found, chosen, strict=True)]}


def on_plane(replicates: Sequence[Replicate], fits: Callable[[Sequence[float]], bool]) -> Numbers:
    """Mean score of the plane's points whose barycentric weights fit."""
    means = []
    for one in replicates:
        plane = None if one.landscape is None else one.landscape["plane"]
        scores = [p["scores"][one.measure]["mean"] for p in (plane or {"points": []})["points"] if fits(p["weights"])]
        if not scores:
            return {}
        means.append(sum(scores) / len(scores))
    landscape = replicates[0].landscape if replicates else None
    return {} if landscape is None else {landscape["questions"]: means}


def corner(*weights: float) -> Callable[[Sequence[float]], bool]:
    """Whether a point has these barycentric weights, in any order."""
    return lambda found: all(abs(x - y) < 1e-6 for x, y in zip(sorted(found), sorted(weights), strict=True))


# Numbers of the policies


def policies_by_beta(replicates: Sequence[Replicate], label: str) -> dict[float, list[str]]:
    """β → the name in each replicate of the policy with this reference; for the β that all replicates have."""
    each = [{one.beta: name for name, one in of.policies.items() if one.reference == label} for of in replicates]
    return {beta: [of[beta] for of in each] for beta in sorted(set(each[0]).intersection(*each))} if each else {}


def at_beta(replicates: Sequence[Replicate], label: str, beta: float, number: str = "scores") -> Numbers:
    """Scores, or another of Replicate's numbers by set of questions, of the policies with a reference and β."""
    names = policies_by_beta(replicates, label).get(beta, [])
    if not names:
        return {}
    each = [(getattr(one, number), name) for one, name in zip(replicates, names, strict=True)]
    return {dataset: [values[dataset][name] for values, name in each] for dataset in each[0][0]}


def shared_betas(replicates: Sequence[Replicate], *labels: str) -> list[float]:
    """The β that the policies of all these references were trained with."""
    grids = [set(policies_by_beta(replicates, label)) for label in labels]
    return sorted(set.intersection(*grids)) if grids else []


def at_best_beta(
    replicates: Sequence[Replicate], label: str, betas: Sequence[float], number: str = "scores"
) -> Numbers:
    """Scores (or rewards) of the policies with a reference, at the one of `betas` with the best score elsewhere."""
    if len(replicates) < FEWEST or not betas:
        return {}
    found: dict[str, list[float]] = {}
    for dataset in replicates[0].scores:
        scores = {beta: at_beta(replicates, label, beta)[dataset] for beta in betas}
        values = {beta: at_beta(replicates, label, beta, number)[dataset] for beta in betas}
        rows = range(len(replicates))
        chosen = leave_one_out([{beta: scores[beta][row] for beta in betas} for row in rows])
        found[dataset] = [values[beta][row] for row, beta in zip(rows, chosen, strict=True)]
    return found


def label_of(reference: object) -> str:
    """The label of a reference as a recipe writes it."""
    return ", ".join(one.label for one in parse_reference("reference", reference))


def control_labels(replicates: Sequence[Replicate]) -> list[str]:
    """Labels of the references, of all replicates, that average nothing or undo the shrinking of an average."""
    each = [{one.reference for one in of.policies.values()} for of in replicates]
    kinds = ("shrunk", "base", "stretched")
    return sorted(label for label in set.intersection(*each) if label.startswith(kinds)) if each else []
