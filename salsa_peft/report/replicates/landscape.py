"""The landscape over replicates: lines and the plane with intervals, and differences that are paired by replicate."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from salsa_peft.report.findings import undecided
from salsa_peft.report.format import Row
from salsa_peft.report.gather import ReportInput
from salsa_peft.report.plots import Styles, draw_landscape
from salsa_peft.report.style import Panel
from salsa_peft.utils.statistics import mean_interval

Scores = Mapping[str, float]
"""Measure → mean score over questions."""
VERTICES = 3


def landscape(runs: Sequence[ReportInput]) -> dict[str, Any] | None:
    """landscape.json over replicates: each point's mean score with its interval, and its difference from a base point.

    The points of all replicates are kept; a seed with the soup's norm, whose place differs between replicates, is not. The
    difference of a point is paired by replicate: on a line of seeds from the mean of the line's two ends, on a control line
    from the soup (the midpoint of the first line), on the plane from the mean of the three seeds.
    """
    each = [run.landscape for run in runs]
    if any(one is None for one in each):
        return None
    found = [one for one in each if one is not None]
    first, measures = found[0], found[0]["measures"]
    soups = [_at(next((line for line in one["lines"] if line["kind"] == "line"), None), 0.5) for one in found]
    lines = []
    for line in first["lines"]:
        same = [next((other for other in one["lines"] if other["name"] == line["name"]), None) for one in found]
        if all(other is not None for other in same):
            bases = soups if line["kind"] != "line" else [_mean(_at(one, 0.0), _at(one, 1.0)) for one in same]
            points = _points([one for one in same if one is not None], bases, measures, lambda point: round(point["at"], 6))  # fmt: skip
            lines += [{key: line[key] for key in ("name", "ends", "kind")} | {"points": points}] if points else []
    return {
        **{key: first[key] for key in ("questions", "n", "measures")},
        "lines": lines,
        "plane": _plane([one["plane"] for one in found], measures),
    }


def _plane(planes: Sequence[Row | None], measures: Sequence[str]) -> dict[str, Any] | None:
    there = [plane for plane in planes if plane is not None]
    if len(there) < len(planes):
        return None
    corners = [[_corner(plane, place) for place in range(VERTICES)] for plane in there]
    points = _points(
        there,
        [_mean(*of) for of in corners],
        measures,
        lambda point: tuple(round(weight, 6) for weight in point["weights"]),
    )
    for point in points:
        point["open"] = {measure: undecided(one) for measure, one in point["differences"].items()}
    return {"members": there[0]["members"], "points": points}


def _points(
    each: Sequence[Row], bases: Sequence[Scores | None], measures: Sequence[str], key: Callable[[Row], Any]
) -> list[dict[str, Any]]:
    """The points that all replicates have, by `key`, with intervals of scores and of differences from the bases."""
    by_key = [{key(point): point for point in one["points"]} for one in each]
    known = [base for base in bases if base is not None]
    points = []
    for at, point in by_key[0].items():
        if not all(at in one for one in by_key):
            continue
        values = {measure: [one[at]["scores"][measure]["mean"] for one in by_key] for measure in measures}
        row = {name: point[name] for name in ("at", "weights") if name in point}
        row["scores"] = {measure: asdict(mean_interval(of)) for measure, of in values.items()}
        row["differences"] = {
            measure: asdict(mean_interval([x - base[measure] for x, base in zip(of, known, strict=True)]))
            for measure, of in values.items()
            if len(known) == len(bases)
        }
        points.append(row)
    return points


def _at(line: Row | None, place: float) -> Scores | None:
    """The scores of a line's point; None if there is no such point."""
    points = [] if line is None else line["points"]
    return next((_means(point) for point in points if abs(point["at"] - place) < 1e-9), None)


def _corner(plane: Row, place: int) -> Scores | None:
    """The scores of the plane's point at one seed."""
    wanted = [float(other == place) for other in range(VERTICES)]
    near = (
        point
        for point in plane["points"]
        if all(abs(weight - one) < 1e-6 for weight, one in zip(point["weights"], wanted, strict=True))
    )
    return next((_means(point) for point in near), None)


def _means(point: Row) -> Scores:
    return {measure: one["mean"] for measure, one in point["scores"].items()}


def _mean(*scores: Scores | None) -> Scores | None:
    """The mean of several points; None if one is missing."""
    there = [one for one in scores if one is not None]
    if len(there) < len(scores):
        return None
    return {measure: sum(one[measure] for one in there) / len(there) for measure in there[0]}


def draw(found: Row, styles: Styles, prefix: str) -> list[Panel]:
    """The panels of the landscape of a run, with bands over replicates, and those of the paired differences of lines."""
    paired = {**found, "lines": [_paired(line) for line in found["lines"] if line["points"][0]["differences"]], "plane": None}  # fmt: skip
    titles = {"line": ", minus the mean of the ends", "shrunk": " of the control, minus the soup"}
    return draw_landscape(found, styles, prefix) + draw_landscape(paired, styles, f"{prefix}paired-", titles, 0.0)


def _paired(line: Row) -> dict[str, Any]:
    """A line whose scores are the differences."""
    return {**line, "points": [{**point, "scores": point["differences"]} for point in line["points"]]}
