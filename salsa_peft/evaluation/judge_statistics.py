"""Win rates, intervals and tests from judgments in both orders, and the reliability of the judge."""

from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np

from salsa_peft.evaluation.length_control import length_controlled
from salsa_peft.utils.statistics import (
    WinRates,
    bootstrap_interval,
    cluster_indices,
    clustered_win_rates,
    tango_interval,
    widen_to_tango,
)

NET = {"a": 1, "b": -1, "tie": 0}
NOTHING = WinRates(0, 0, 0, 0.0, 0.5, 0.0, 1.0, 1.0)
FEW_RUNS = 5
"""Number of training seeds below which a warning says that the spread between seeds is poorly known."""


class Judgment(NamedTuple):
    """A judge's two verdicts on one turn of one question, one for each order of the answers."""

    question: Hashable
    turn: int
    first: str
    """Winner when a's answer was shown first: "a" | "b" | "tie" | "missing"."""
    second: str
    """Winner when b's answer was shown first."""
    length_a: float
    length_b: float

    @property
    def winner(self) -> str:
        """The model that wins in both orders (FastChat), else "tie"; "missing" if a verdict is missing."""
        if "missing" in (self.first, self.second):
            return "missing"
        return self.first if self.first == self.second else "tie"

    @property
    def tie_kind(self) -> str | None:
        """Kind of a tie: agreed (both verdicts tie), half (one ties), flipped (winners differ); None: no tie."""
        if self.winner != "tie":
            return None
        return ("flipped", "half", "agreed")[(self.first, self.second).count("tie")]


@dataclass(frozen=True)
class PairResult:
    """A judge's result for model a against model b. Rates are fractions."""

    wins: int
    losses: int
    ties: int
    missing: int
    n: int
    """wins + losses + ties."""
    win_rate: float
    """wins / n; 0 if n is 0."""
    adjusted_win_rate: float
    """(wins + ties / 2) / n; ½, with the interval from 0 to 1, if n is 0."""
    low: float
    high: float
    interval: str
    """Method of the interval [low, high]: `tango` (Tango's score interval) if each question has one judgment or all
    questions have the same rate, else `bootstrap`, which resamples questions, each with all its turns, and is never
    narrower than Tango's interval for independent judgments."""
    p_value: float
    """P-value of the exact sign test, or of `statistics.sign_flip_test` if a question has several turns."""
    worst_low: float
    """Adjusted win rate if every missing judgment were a loss."""
    worst_high: float
    """Adjusted win rate if every missing judgment were a win."""
    flip_rate: float | None
    """Share of judgments whose two verdicts differ, of all with two verdicts. None if no judgment has two."""
    first_position_rate: float | None
    """Share of the verdicts with a winner that prefer the answer shown first: ½ without position bias. None if no
    verdict has a winner."""
    tie_kinds: dict[str, int]
    """`Judgment.tie_kind` → number of ties."""
    mean_length_a: float
    mean_length_b: float
    length_controlled: dict[str, float] | None
    turns: dict[str, dict[str, float]]
    """Number of the turn → {wins, losses, ties, missing, adjusted_win_rate} of that turn."""


def pair_result(rows: Sequence[Judgment], seed: int = 0) -> PairResult:
    """Counts, rates, interval and test of one pair of models.

    Raises ValueError if there are no judgments, a turn is judged twice, or a winner is unknown.
    """
    _check(rows)
    kept = [row for row in rows if row.winner != "missing"]
    missing = len(rows) - len(kept)
    nets = np.array([NET[row.winner] for row in kept], dtype=np.int64)
    rates, interval = clustered_win_rates(nets, [row.question for row in kept], seed) if kept else (NOTHING, "tango")
    orders = [(row.first, row.second) for row in rows]
    both = [order for order in orders if "missing" not in order]
    decided = [one for order in orders for one in zip(order, "ab", strict=True) if one[0] in ("a", "b")]
    kinds = [row.tie_kind for row in kept]
    points = rates.wins + rates.ties / 2
    return PairResult(
        **asdict(rates),
        missing=missing,
        n=len(kept),
        interval=interval,
        worst_low=points / len(rows),
        worst_high=(points + missing) / len(rows),
        flip_rate=sum(first != second for first, second in both) / len(both) if both else None,
        first_position_rate=sum(winner == shown for winner, shown in decided) / len(decided) if decided else None,
        tie_kinds={kind: kinds.count(kind) for kind in ("agreed", "half", "flipped")},
        mean_length_a=float(np.mean([row.length_a for row in rows])),
        mean_length_b=float(np.mean([row.length_b for row in rows])),
        length_controlled=_length_controlled(kept, nets, seed),
        turns={
            str(turn): _turn([row for row in rows if row.turn == turn]) for turn in sorted({row.turn for row in rows})
        },
    )


def _check(rows: Sequence[Judgment]) -> None:
    if not rows:
        raise ValueError("no judgments; pass at least one")
    for word in {word for row in rows for word in (row.first, row.second)} - {*NET, "missing"}:
        raise ValueError(f"winner {word!r} is unknown; use a, b, tie or missing")
    if len({(row.question, row.turn) for row in rows}) < len(rows):
        raise ValueError(f"a turn of a question is judged twice in {len(rows)} judgments; pass one for each turn")


def counts(rows: Sequence[Judgment]) -> dict[str, int]:
    """Numbers of wins, losses and ties of model a, and of missing judgments."""
    winners = [row.winner for row in rows]
    words = {"wins": "a", "losses": "b", "ties": "tie", "missing": "missing"}
    return {name: winners.count(word) for name, word in words.items()}


def _turn(rows: Sequence[Judgment]) -> dict[str, float]:
    found = counts(rows)
    n = len(rows) - found["missing"]
    return {**found, "adjusted_win_rate": (found["wins"] + found["ties"] / 2) / n if n else 0.5}


def _length_controlled(kept: Sequence[Judgment], nets: np.ndarray, seed: int) -> dict[str, float] | None:
    if not kept:
        return None
    differences = np.array([row.length_a - row.length_b for row in kept], dtype=np.float64)
    return length_controlled(
        (1 + nets) / 2, differences, cluster_indices([row.question for row in kept], len(kept)), seed
    )


@dataclass(frozen=True)
class OverSeeds:
    """The result of one pair over several training seeds."""

    adjusted_win_rate: float
    """Adjusted win rate over all judgments of all runs."""
    low: float
    high: float
    """Bounds of the 95% interval over runs and questions; with one run, over questions only."""
    rates: list[float]
    """Adjusted win rate of each run."""
    spread: float | None
    """Standard deviation of `rates`; None with one run."""


def over_seeds(runs: Sequence[Sequence[Judgment]], seed: int = 0) -> OverSeeds:
    """Adjusted win rate over runs with different training seeds, and its interval over runs and questions.

    runs: the judgments of each run. Judgments with equal `question` are of the same question; a run may lack some
    questions. Raises ValueError if there are no runs, or if a run has no verdict.
    """
    kept = [[row for row in rows if row.winner != "missing"] for rows in runs]
    if not kept or not all(kept):
        empty = sum(not rows for rows in kept)
        raise ValueError(f"{empty} of {len(runs)} runs have no verdict; pass at least one run, each with a verdict")
    for rows in runs:
        _check(rows)
    places = {question: at for at, question in enumerate(dict.fromkeys(row.question for rows in kept for row in rows))}
    nets, sizes = np.zeros((2, len(runs), len(places)), dtype=np.int64)
    for run, rows in enumerate(kept):
        for row in rows:
            nets[run, places[row.question]] += NET[row.winner]
            sizes[run, places[row.question]] += 1
    mean = nets.sum() / sizes.sum()
    if len(runs) == 1:
        only = pair_result(runs[0], seed)
        low, high = only.low, only.high
    else:
        if (bounds := bootstrap_interval(nets, sizes, seed)) is None:
            share = len(places) * mean
            bounds = tango_interval(max(share, 0), max(-share, 0), len(places))
        else:
            wins = [row.winner for rows in kept for row in rows].count("a")
            bounds = widen_to_tango(bounds, wins, wins - int(nets.sum()), int(sizes.sum()))
        low, high = (0.5 + bound / 2 for bound in bounds)
    each = 0.5 + nets.sum(axis=1) / sizes.sum(axis=1) / 2
    return OverSeeds(
        adjusted_win_rate=float(0.5 + mean / 2),
        low=low,
        high=high,
        rates=each.tolist(),
        spread=float(each.std(ddof=1)) if len(runs) > 1 else None,
    )


def seeds_warning(runs: int) -> str | None:
    """Warning about an interval over `runs` training seeds; None if there are enough seeds."""
    if runs == 1:
        return "one training seed: the interval is over questions alone and cannot say what another seed would give"
    if runs < FEW_RUNS:
        return f"{runs} training seeds: too few to know the spread between seeds, so the interval is likely too narrow"
    return None
