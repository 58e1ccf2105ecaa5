"""A judge's verdicts on two models, each turn in both orders → what they come to, and how far the judge is to be trusted."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from salsa_peft.evaluation.length_control import length_controlled
from salsa_peft.utils.statistics import WinRates, clustered, numbered, resampled, tango, widened

NET = {"a": 1, "b": -1, "tie": 0}
NOTHING = WinRates(0, 0, 0, 0.0, 0.5, 0.0, 1.0, 1.0)
FEW_RUNS = 5
"""Fewer training seeds than this tell little of the spread between seeds."""


class Judgment(NamedTuple):
    """One turn of one question, judged twice: a's answer shown first, then b's."""

    question: Hashable
    turn: int
    first: str
    """Who won the game a–b: "a" | "b" | "tie" | "missing"."""
    second: str
    """Who won the game b–a, mapped back."""
    length_a: float
    length_b: float

    @property
    def winner(self) -> str:
        """A win needs both games (FastChat's rule); missing where a game is."""
        if "missing" in (self.first, self.second):
            return "missing"
        return self.first if self.first == self.second else "tie"


@dataclass(frozen=True)
class PairResult:
    """What a judge said of a against b; rates are fractions, those without anything to divide by None."""

    wins: int
    losses: int
    ties: int
    missing: int
    n: int
    """wins + losses + ties."""
    win_rate: float
    """W / n; 0 where n is."""
    adjusted_win_rate: float
    """(W + T/2) / n; ½ where n is 0, in an interval from 0 to 1: nothing is known."""
    low: float
    high: float
    interval: str
    """`tango`: a judgment a question (or all of a question's the same in all), `bootstrap`: over questions, turns together, never narrower than
    Tango's of independent judgments."""
    p_value: float
    """Exact sign test; where questions have several turns its clustered form, `statistics.sign_flip`."""
    worst_low: float
    """The adjusted rate if every missing judgment were a loss …"""
    worst_high: float
    """… and a win."""
    flip_rate: float | None
    """Pairs of games that disagree, of those with both."""
    first_position_rate: float | None
    """Games won by the answer shown first, of the games that someone won: ½ from a judge without position bias."""
    tie_kinds: dict[str, int]
    """agreed: both games tie; half: one; flipped: each game another winner."""
    mean_length_a: float
    mean_length_b: float
    length_controlled: dict[str, float] | None
    turns: dict[str, dict[str, float]]
    """Turn → its wins, losses, ties, missing, adjusted_win_rate."""


def pair_result(rows: Sequence[Judgment], seed: int = 0) -> PairResult:
    """Counts, rates, interval and test of one pair's judgments. Raises ValueError on none, on a turn twice, on other words."""
    _check(rows)
    kept = [row for row in rows if row.winner != "missing"]
    n, missing = len(kept), len(rows) - len(kept)
    nets = np.array([NET[row.winner] for row in kept], dtype=np.int64)
    verdicts, interval = clustered(nets, [row.question for row in kept], seed) if kept else (NOTHING, "tango")
    games = [(row.first, row.second) for row in rows]
    both = [game for game in games if "missing" not in game]
    decided = [place for game in games for place in zip(game, "ab", strict=True) if place[0] in ("a", "b")]
    kinds = [2 - game.count("tie") for game in both if game[0] != game[1] or "tie" in game]
    return PairResult(
        wins=verdicts.wins,
        losses=verdicts.losses,
        ties=verdicts.ties,
        missing=missing,
        n=n,
        win_rate=verdicts.win_rate,
        adjusted_win_rate=verdicts.adjusted_win_rate,
        low=verdicts.low,
        high=verdicts.high,
        interval=interval,
        p_value=verdicts.p_value,
        worst_low=(verdicts.wins + verdicts.ties / 2) / len(rows),
        worst_high=(verdicts.wins + verdicts.ties / 2 + missing) / len(rows),
        flip_rate=sum(first != second for first, second in both) / len(both) if both else None,
        first_position_rate=sum(won == shown for won, shown in decided) / len(decided) if decided else None,
        tie_kinds={kind: kinds.count(place) for place, kind in enumerate(("agreed", "half", "flipped"))},
        mean_length_a=float(np.mean([row.length_a for row in rows])),
        mean_length_b=float(np.mean([row.length_b for row in rows])),
        length_controlled=_length_controlled(kept, nets, seed),
        turns={
            str(turn): _counts([row for row in rows if row.turn == turn]) for turn in sorted({row.turn for row in rows})
        },
    )


def _check(rows: Sequence[Judgment]) -> None:
    if not rows:
        raise ValueError("no judgments: at least one expected")
    for word in {word for row in rows for word in (row.first, row.second)} - {*NET, "missing"}:
        raise ValueError(f"a game won by {word!r}: a, b, tie or missing expected")
    if len({(row.question, row.turn) for row in rows}) < len(rows):
        raise ValueError(f"{len(rows)} judgments hold a question's turn twice: one row for each expected")


def _counts(rows: Sequence[Judgment]) -> dict[str, float]:
    winners = [row.winner for row in rows]
    wins, losses, ties, missing = (winners.count(who) for who in ("a", "b", "tie", "missing"))
    n = wins + losses + ties
    adjusted = (wins + ties / 2) / n if n else 0.5
    return {"wins": wins, "losses": losses, "ties": ties, "missing": missing, "adjusted_win_rate": adjusted}


def _length_controlled(kept: Sequence[Judgment], nets: np.ndarray, seed: int) -> dict[str, float] | None:
    if not kept:
        return None
    differences = np.array([row.length_a - row.length_b for row in kept], dtype=np.float64)
    return length_controlled((1 + nets) / 2, differences, numbered([row.question for row in kept], len(kept)), seed)


@dataclass(frozen=True)
class OverSeeds:
    """The same pair trained with several seeds: the adjusted rate over all of them."""

    runs: int
    questions: int
    adjusted_win_rate: float
    """Over all judgments of all runs."""
    low: float
    high: float
    """95% interval over runs and questions; with one run over questions alone."""
    rates: list[float]
    """Each run's."""
    spread: float | None
    """Standard deviation of the runs' rates; None with one."""
    warning: str | None
    """What the interval does not see, in words."""


def over_seeds(runs: Sequence[Sequence[Judgment]], seed: int = 0) -> OverSeeds:
    """Judgments of each training seed's run → the rate, resampling runs and questions (`statistics.resampled`).

    Runs answer the same questions (told by `Judgment.question`); what one run lacks, another may have. Raises ValueError on
    no runs and on a run without a verdict.
    """
    kept = [[row for row in rows if row.winner != "missing"] for rows in runs]
    if not kept or not all(kept):
        raise ValueError(f"{len(runs)} runs, {sum(not rows for rows in kept)} without a verdict: at least one run, each with some, expected")  # fmt: skip
    for rows in runs:
        _check(rows)
    names = {question: at for at, question in enumerate(dict.fromkeys(row.question for rows in kept for row in rows))}
    nets, sizes = np.zeros((2, len(runs), len(names)), dtype=np.int64)
    for run, rows in enumerate(kept):
        for row in rows:
            nets[run, names[row.question]] += NET[row.winner]
            sizes[run, names[row.question]] += 1
    mean = nets.sum() / sizes.sum()
    if len(runs) == 1:
        only = pair_result(runs[0], seed)
        low, high = only.low, only.high
    else:
        share = len(names) * mean
        found, wins = resampled(nets, sizes, seed), [row.winner for rows in kept for row in rows].count("a")
        bounds = tango(max(share, 0), max(-share, 0), len(names))
        if found is not None:
            bounds = widened(found, wins, wins - int(nets.sum()), int(sizes.sum()))
        low, high = (0.5 + bound / 2 for bound in bounds)
    each = 0.5 + nets.sum(axis=1) / sizes.sum(axis=1) / 2
    return OverSeeds(
        runs=len(runs),
        questions=len(names),
        adjusted_win_rate=float(0.5 + mean / 2),
        low=low,
        high=high,
        rates=each.tolist(),
        spread=float(each.std(ddof=1)) if len(runs) > 1 else None,
        warning=seeds_warning(len(runs)),
    )


def seeds_warning(runs: int) -> str | None:
    """What an interval over so many training seeds does not see; None for enough of them."""
    if runs == 1:
        return "one training seed: the interval is over questions alone and cannot say what another seed would give"
    if runs < FEW_RUNS:
        return f"{runs} training seeds: too few to know the spread between seeds, so the interval is likely too narrow"
    return None
