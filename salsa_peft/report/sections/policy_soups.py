"""Soups of policies against their members: the mean of them, the best of them, and a policy that is only shrunk.

A soup with a single member averages nothing: with a `scale` below 1 it is the shrunk policy, the control of a soup.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from salsa_peft.report.findings import undecided
from salsa_peft.report.format import Row, file_name, fixed, signed
from salsa_peft.report.gather import SOUP, PolicyReport, SoupReport
from salsa_peft.report.headline import listed, measure_name
from salsa_peft.report.sections.paired import Paired, interval
from salsa_peft.report.style import MUTED, PAPER, Look, Panel, panel

GAIN_OF_SFT, GAIN = "the soup of SFT models", ("is better than", "is worse than")
CLAIM = "RL’d models are said to merge worse than SFT’d ones (arXiv 2606.18521)"


def made_of_policies(name: str, soups: Mapping[str, SoupReport], policies: Mapping[str, PolicyReport]) -> bool:
    """Whether a model is a policy, or a soup whose members all are made of policies."""
    if name in policies:
        return True
    return name in soups and all(made_of_policies(member, soups, policies) for member in soups[name].members)


def sft_soup(soups: Mapping[str, SoupReport]) -> SoupReport | None:
    """The soup of SFT models, with whose gain over its members that of a soup of policies is compared; None without it."""
    soup = soups.get(SOUP)
    return soup if soup is not None and soup.of_seeds else None


def compare(
    paired: Paired, soups: Mapping[str, SoupReport], policies: Mapping[str, PolicyReport]
) -> list[dict[str, Any]]:
    """Rows {"soup", "members", "dataset", "kind", "against", "mean", "low", "high", "n"} of soups of policies.

    kind: "mean" (of the members), "best" (of the members: with replicates the one that is best in the others; the row's `best`
    is its name, None if it is not the same in all), "control" (the shrunk policy `against`), and "sft": the gain over the mean
    of the members minus that of the soup of SFT models.
    """
    rows: list[dict[str, Any]] = []
    for name, soup in soups.items():
        if len(soup.members) < 2 or not made_of_policies(name, soups, policies):
            continue
        controls = [other for other, one in soups.items() if one.is_shrunk and one.members[0] in soup.members]
        for dataset in paired.scores:
            rows += _of_soup(paired, dataset, name, soup.members, controls, sft_soup(soups))
    return rows


def _of_soup(
    paired: Paired, dataset: str, name: str, members: Sequence[str], controls: Sequence[str], sft: SoupReport | None
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []

    def add(kind: str, against: str, difference: np.ndarray, clusters: Any) -> None:
        common = {"soup": name, "members": list(members), "dataset": dataset, "measure": paired.measure}
        rows.append({**common, "kind": kind, "against": against, **asdict(interval(difference, clusters))})

    def scores(*models: str) -> Any:
        return paired.values(dataset, [(paired.measure, model) for model in models])

    if (found := scores(name, *members)) is None:
        return []
    (own, *others), clusters = found
    of_members = np.array(others)
    add("mean", "the mean of its members", own - of_members.mean(axis=0), clusters)
    best = paired.best(of_members)
    add("best", "the best of its members", own - of_members[best, np.arange(len(own))], clusters)
    rows[-1]["best"] = members[best[0]] if len(set(best)) == 1 else None
    for control in controls:
        if (found := scores(name, control)) is not None:
            add("control", control, found[0][0] - found[0][1], found[1])
    if sft is not None and (found := scores(name, *members, SOUP, *sft.members)) is not None:
        values, cut = found[0], 1 + len(members)
        gain, other = values[0] - values[1:cut].mean(axis=0), values[cut] - values[cut + 1 :].mean(axis=0)
        add("sft", "", gain - other, found[1])
    return rows


def sentences(rows: Sequence[Row], replicates: int, sft: bool = True) -> list[str]:
    """One sentence for each soup and comparison, then what could not be compared. sft: whether there is an `sft_soup`."""
    soups = {soup: [row for row in rows if row["soup"] == soup] for soup in dict.fromkeys(row["soup"] for row in rows)}
    of_sft = {soup: of for soup, own in soups.items() if (of := [row for row in own if row["kind"] == "sft"])}
    found = []
    if of_sft:
        said = [f"{soup} {_said(of, GAIN_OF_SFT, GAIN)}" for soup, of in of_sft.items()]
        found.append(f"{CLAIM}; here, by the gain over the mean of the members, {'; '.join(said)}.")
    for soup, own in soups.items():
        members = listed(own[0]["members"])
        for kind, against in dict.fromkeys((row["kind"], str(row["against"])) for row in own if row["kind"] != "sft"):
            of = [row for row in own if (row["kind"], row["against"]) == (kind, against)]
            what = {"control": f"the shrunk policy {against}", "best": f"{against} ({_choice(replicates)})"}
            found.append(f"{soup}, the soup of {members}, {_said(of, what.get(kind, against))}.")
    if alone := [soup for soup in soups if soup not in of_sft]:
        other = (
            "the soup of SFT models, because not all members of that soup were evaluated: add them to evaluate.models"
        )
        if not sft:
            other = "a soup of SFT models, because the recipe’s section `soup` is no average of several seeds"
        found.append(f"{CLAIM}; this run cannot compare {listed(alone)} with {other}.")
    if untested := [soup for soup, own in soups.items() if not any(row["kind"] == "control" for row in own)]:
        found.append(
            f"Whether averaging is the reason for what {listed(untested)} {'does' if len(untested) == 1 else 'do'} is not"
            " tested, because the run has no policy that is only shrunk: add to `soups` one with a single member, such as"
            f" {soups[untested[0]][0]['members'][0]}, and a scale below 1."
        )
    return found


def _choice(replicates: int) -> str:
    if replicates == 1:
        return "chosen by the same scores, which favours it"
    return "chosen on the other replicates"


def _said(
    rows: Sequence[Row], against: str, verbs: tuple[str, str] = ("scored higher than", "scored lower than")
) -> str:
    """How a soup came out against one model, on each set of questions."""
    by_verdict: dict[str, list[str]] = {}
    for row in rows:
        verdict = "is not distinguishable from" if undecided(row) else verbs[0 if row["mean"] > 0 else 1]
        best = f"{row['best']}: " if row.get("best") else ""
        by_verdict.setdefault(verdict, []).append(f"“{row['dataset']}” ({best}{signed(row)})")
    first, *others = [(verdict, listed(sets)) for verdict, sets in by_verdict.items()]
    return " and ".join(
        [f"{first[0]} {against} on {first[1]}", *(f"{verdict} it on {sets}" for verdict, sets in others)]
    )


def draw(rows: Sequence[Row], styles: Mapping[str, Look], prefix: str) -> list[Panel]:
    """For each set of questions a panel of the differences, one row for each soup and comparison."""
    panels = []
    for dataset in dict.fromkeys(row["dataset"] for row in rows):
        own = [row for row in rows if row["dataset"] == dataset and row["kind"] != "sft"]
        title = f"Soups of policies, “{dataset}”"
        panels.append(_draw(f"{prefix}soups-{file_name(dataset)}", title, own, styles))
    return panels


def _draw(name: str, title: str, rows: Sequence[Row], styles: Mapping[str, Look]) -> Panel:
    short = {"mean": "mean of members", "best": "best member"}

    def draw_on(axes: Axes) -> None:
        axes.axvline(0, color=MUTED, lw=1.1)
        for at, row in enumerate(rows):
            color = styles[row["soup"]].color
            axes.plot([row["low"], row["high"]], [at, at], color=color, lw=2.4, solid_capstyle="round")
            axes.plot(row["mean"], at, marker="o", ms=6.5, color=color, mfc=PAPER if undecided(row) else color, mew=1.6)
            text = ("+" if row["mean"] > 0 else "") + fixed(row["mean"])
            axes.annotate(text, (1.01, at), xycoords=("axes fraction", "data"), va="center", size=9)
        axes.set_yticks(range(len(rows)), [f"{row['soup']} − {short.get(row['kind'], row['against'])}" for row in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0, labelsize=8.5)
        axes.grid(False, axis="y")
        axes.spines["left"].set_visible(False)
        axes.set(title=title, xlabel=f"difference of the {measure_name(rows[0]['measure'])}")

    return panel(name, f"{title}: differences from their members and controls", draw_on, 0.27 * len(rows) + 0.95)
