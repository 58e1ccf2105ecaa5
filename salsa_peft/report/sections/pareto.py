"""Rewarded soups: the front of two rewards, from policies of one reward each, with policies of weighted rewards beside.

The panel has the mean of reward A against that of reward B: the two policies, their soups in order of weight, the start, and
the policies that are trained on a weighted sum of both (multi-objective RL, MORL) as controls (Ramé et al., 2023).
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes

from salsa_peft.report.findings import undecided
from salsa_peft.report.format import Row, file_name, signed
from salsa_peft.report.gather import PolicyReport, ReportInput
from salsa_peft.report.headline import listed, measure_name
from salsa_peft.report.sections.paired import Paired, bootstrap, interval
from salsa_peft.report.style import INK, KNOWN, PAPER, Panel, panel
from salsa_peft.utils.statistics import Estimate, mean_interval


class Models(NamedTuple):
    """The models of a front."""

    rewards: tuple[str, str]
    """Names of the two rewards, A and B."""
    ends: tuple[str, str]
    """The policies that are trained on A alone and on B alone."""
    soups: dict[str, float]
    """Soup of the two policies → weight of the second, ascending."""
    controls: dict[str, float]
    """Policy that is trained on both rewards → weight of B, ascending."""
    start: str


def models(run: ReportInput) -> Models | None:
    """The front's models: those of the section `rewarded_soups`, else the members of a soup of two policies of one reward."""
    if (section := run.rewarded) is not None:
        (a, b), (first, second) = section.rewards, section.ends
        if not {first, second} <= run.policies.keys():
            return None
        soups = {name: weight for name, weight in section.soups.items() if name in run.soups}
        controls = {name: weight for name, weight in section.controls.items() if name in run.policies}
        return Models((a, b), (first, second), _by_weight(soups), _by_weight(controls), section.start)
    alone = {name: of[0] for name, policy in run.policies.items() if len(of := list(_optimized(policy))) == 1}
    pairs = [
        [name for name in alone if name in soup.members]
        for soup in run.soups.values()
        if len(soup.members) == 2 and soup.scale == 1
    ]
    pair = next((one for one in pairs if len({alone[name] for name in one}) == 2), None)
    return None if pair is None else _of_soups(run, (alone[pair[0]], alone[pair[1]]), (pair[0], pair[1]))


def _of_soups(run: ReportInput, rewards: tuple[str, str], ends: tuple[str, str]) -> Models:
    """The front of two policies, with the controls that share their start and reference."""
    (a, b), settings = rewards, {(run.policies[name].start, run.policies[name].reference) for name in ends}
    soups = {
        name: soup.weights[soup.members.index(ends[1])]
        for name, soup in run.soups.items()
        if sorted(soup.members) == sorted(ends) and soup.scale == 1
    }
    both = {
        name: of[b] / (of[a] + of[b])
        for name, policy in run.policies.items()
        if (of := _optimized(policy)).keys() == {a, b} and {(policy.start, policy.reference)} == settings
    }
    return Models((a, b), ends, _by_weight(soups), _by_weight(both), run.policies[ends[0]].start)


def _optimized(policy: PolicyReport) -> dict[str, float]:
    """The policy's own rewards that it is trained to raise; {} if it has none, or also lowers one."""
    weights = {part: weight for part, weight in (policy.reward or {}).items() if weight}
    return weights if all(weight > 0 for weight in weights.values()) else {}


def _by_weight(weights: Mapping[str, float]) -> dict[str, float]:
    return dict(sorted(weights.items(), key=lambda one: one[1]))


def front(paired: Paired, run: ReportInput) -> dict[str, Any] | None:
    """The front on each set of questions; None without soups of two policies of one reward each.

    {"rewards", "over", "sets": set → {"points", "matched", "hypervolume"}}. A point is {"model", "kind", "weight", "a", "b", "change"}
    with estimates of both rewards, and of their paired differences from the start. matched: for each weight that a soup and a control share, the difference soup − control
    of the weighted sum of both rewards. hypervolume: that of the soups' front minus that of the controls', both with the two
    policies, for soups and controls of the same weights; None if they share none.
    """
    found = models(run)
    if found is None:
        return None
    sets = {dataset: one for dataset in paired.scores if (one := _on(paired, dataset, found)) is not None}
    return {"rewards": list(found.rewards), "over": paired.over, "sets": sets} if sets else None


def _on(paired: Paired, dataset: str, found: Models) -> dict[str, Any] | None:
    first, second = found.ends
    kinds: dict[str, tuple[str, float | None]] = {
        first: ("end", 0.0),
        **{name: ("soup", weight) for name, weight in found.soups.items()},
        second: ("end", 1.0),
    }
    kinds |= {name: ("control", weight) for name, weight in found.controls.items()}
    kinds[found.start] = ("start", None)
    names = [name for name in kinds if all(name in paired.scores[dataset].get(reward, {}) for reward in found.rewards)]
    values = paired.values(dataset, [(reward, name) for reward in found.rewards for name in names])
    if values is None or not {first, second} <= set(names):
        return None
    scores, clusters = values
    by_model = {name: (scores[place], scores[len(names) + place]) for place, name in enumerate(names)}
    points = [
        {"model": name, "kind": kinds[name][0], "weight": kinds[name][1]}
        | {axis: asdict(interval(of, clusters)) for axis, of in zip("ab", by_model[name], strict=True)}
        | {"change": _change(by_model[name], by_model.get(found.start), clusters)}
        for name in names
    ]
    pairs = [
        (weight, soup, control)
        for soup, weight in found.soups.items()
        for control, other in found.controls.items()
        if abs(weight - other) < 1e-6 and {soup, control} <= set(names)
    ]
    matched = [
        {"weight": weight, "soup": soup, "control": control, **asdict(interval(_summed(by_model[soup], weight) - _summed(by_model[control], weight), clusters))}
        for weight, soup, control in pairs
    ]  # fmt: skip
    volume = _hypervolumes(paired, by_model, found.ends, pairs, clusters) if pairs else None
    return {"points": points, "matched": matched, "hypervolume": None if volume is None else asdict(volume)}


def _change(
    scores: tuple[np.ndarray, np.ndarray], start: tuple[np.ndarray, np.ndarray] | None, clusters: Sequence[Any]
) -> dict[str, Any] | None:
    """The paired differences of both rewards from those of the start; None if the start was not evaluated."""
    if start is None:
        return None
    return {axis: asdict(interval(of - at, clusters)) for axis, of, at in zip("ab", scores, start, strict=True)}


def _summed(scores: tuple[np.ndarray, np.ndarray], weight: float) -> np.ndarray:
    return (1 - weight) * scores[0] + weight * scores[1]


def _hypervolumes(
    paired: Paired,
    by_model: Mapping[str, tuple[np.ndarray, np.ndarray]],
    ends: tuple[str, str],
    pairs: Sequence[tuple[float, str, str]],
    clusters: Sequence[Any],
) -> Estimate:
    """Hypervolume of the soups' front minus that of the controls', with its interval.

    The reference point is the lowest value of each reward: of each replicate, or of all prompts of one run.
    """
    names = [*ends, *(soup for _, soup, _ in pairs), *(control for _, _, control in pairs)]
    stacked = np.stack([by_model[name][axis] for name in names for axis in (0, 1)])

    def difference(means: np.ndarray, worst: np.ndarray | None = None) -> float:
        spots = means.reshape(-1, 2)
        lowest = spots.min(axis=0) if worst is None else worst
        cut = len(ends) + len(pairs)
        return hypervolume(spots[:cut], lowest) - hypervolume(np.concatenate([spots[:2], spots[cut:]]), lowest)

    if paired.replicates > 1:
        return mean_interval([difference(column) for column in stacked.T])
    worst = stacked.mean(axis=1).reshape(-1, 2).min(axis=0)
    return bootstrap(stacked, clusters, lambda means: difference(means, worst))


def hypervolume(spots: np.ndarray, worst: np.ndarray) -> float:
    """Area that points (N, 2) dominate above the reference point `worst` (2,)."""
    area, height = 0.0, float(worst[1])
    for x, y in sorted(spots.tolist(), reverse=True):
        if x > worst[0] and y > height:
            area += (x - float(worst[0])) * (y - height)
            height = y
    return area


def sentences(found: Row) -> list[str]:
    """Whether the soups' front lies inside, on or beyond that of the controls, on each set of questions."""
    a, b = (measure_name(name) for name in found["rewards"])
    said = []
    for dataset, one in found["sets"].items():
        if one["hypervolume"] is None:
            said.append(
                f"On “{dataset}”, the front of the soups of {a} and {b} has no control: no policy is trained on a weighted sum of"
                " both rewards at the weight of one of the soups."
            )
            continue
        volume = one["hypervolume"]
        where = "on" if undecided(volume) else "beyond" if volume["mean"] > 0 else "inside"
        weights = listed([f"{row['weight']:g} ({signed(row)})" for row in one["matched"]])
        said.append(
            f"On “{dataset}”, the front of the soups of {a} and {b} lies {where} that of the policies trained on both rewards"
            f" (MORL): hypervolume {signed(volume)}{', not distinguishable from 0' if where == 'on' else ''}; weighted sum of the"
            f" rewards, soup − MORL, at weight {weights}."
        )
    return said


LABELS = {"end": "policies of one reward", "soup": "soups", "control": "MORL (control)", "start": "start"}
LOOKS = {"end": KNOWN["ppo"], "soup": KNOWN["soup"], "control": KNOWN["shrunk"], "start": KNOWN["seed-0"]}


def draw(found: Row, prefix: str) -> list[Panel]:
    """For each set of questions reward A against reward B with intervals, as differences from the start if it is known.

    The level of a reward may differ much between replicates, each of which has its own reward model.
    """
    return [
        _draw(
            f"{prefix}front-{file_name(dataset)}", f"Front of two rewards, “{dataset}”", found["rewards"], one["points"]
        )
        for dataset, one in found["sets"].items()
    ]


def _draw(name: str, title: str, rewards: Sequence[str], points: Sequence[Row]) -> Panel:
    changes = all(one["change"] is not None for one in points)
    points = [{**one, **one["change"]} for one in points] if changes else points
    start = next((one["model"] for one in points if one["kind"] == "start"), "")

    def draw_on(axes: Axes) -> None:
        for kind, dash in (("control", "--"), ("soup", "-")):
            line = sorted((one for one in points if one["kind"] in ("end", kind)), key=lambda one: one["weight"])
            axes.plot([one["a"]["mean"] for one in line], [one["b"]["mean"] for one in line], color=LOOKS[kind].color, ls=dash, lw=1.6)  # fmt: skip
        for kind, label in LABELS.items():
            look = LOOKS[kind]
            for place, one in enumerate(one for one in points if one["kind"] == kind):
                x, y = one["a"], one["b"]
                axes.plot([x["low"], x["high"]], [y["mean"]] * 2, color=look.color, lw=1.6)
                axes.plot([x["mean"]] * 2, [y["low"], y["high"]], color=look.color, lw=1.6)
                fill, edge = (PAPER, look.color) if kind == "control" else (look.color, INK)
                axes.plot(x["mean"], y["mean"], marker=look.marker, ms=9 if look.marker == "*" else 7, color=look.color,
                          mfc=fill, mec=edge, mew=1.0, ls="", label=None if place else label)  # fmt: skip
                if one["weight"] is not None and kind != "end":
                    axes.annotate(f"{one['weight']:g}", (x["mean"], y["mean"]), xytext=(6, 5), textcoords="offset points", size=8)  # fmt: skip
        labels = [measure_name(reward) + (f", minus {start}" if changes else "") for reward in rewards]
        axes.set(title=title, xlabel=labels[0], ylabel=labels[1])
        axes.legend(loc="best")

    return panel(name, f"{title}: policies, their soups in order of weight, and MORL", draw_on, 3.6)
