"""Wins, losses and ties, of a scorer or of counts → rates, interval, test."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from .intervals import numbered, paired, resampled, sign_flip, sign_test, tango, widened


@dataclass(frozen=True)
class Verdicts:
    """What N comparisons of a with b said, as in the paper's Tables 2–4, and the interval the paper does not give."""

    wins: int
    losses: int
    ties: int
    win_rate: float
    """W / N: ties count against both, so the two models' rates do not sum to 1."""
    adjusted_win_rate: float
    """(W + T/2) / N: ½ means no difference; the two models' rates sum to 1."""
    low: float
    high: float
    """95% interval of the adjusted rate."""
    p_value: float
    """Exact two-sided test of wins against losses, ties left out; 1 where every comparison is a tie."""

    @property
    def n(self) -> int:
        return self.wins + self.losses + self.ties


def compare(
    a: Sequence[float] | np.ndarray,
    b: Sequence[float] | np.ndarray,
    margin: float = 0.0,
    clusters: Sequence[Hashable] | None = None,
) -> Verdicts:
    """Verdicts of a scorer: a wins where a − b > margin, loses where b − a > margin, anything between is a tie.

    Counts are over values; clusters (questions, their turns the values) are what interval and test go by.
    """
    difference = np.subtract(*paired(a, b))
    if not np.isfinite(difference).all():
        raise ValueError("scores to compare hold NaN or infinity: finite scores expected")
    nets = (difference > margin).astype(np.int64) - (difference < -margin)
    return clustered(nets, range(nets.size) if clusters is None else clusters)[0]


def rates(wins: int, losses: int, ties: int) -> Verdicts:
    """Counts, from a scorer or a judge → `Verdicts`, each judgment a question of its own.

    The interval of the adjusted rate is Tango's (1998) score interval for (W − L)/N, mapped by ½ + d/2: the
    per-question values are 1, ½ and 0, and unlike a t-interval or a bootstrap of them it keeps its width where all
    verdicts agree (20 wins of 20 is not [1, 1]) and never leaves [0, 1]. shared/data/paper_tables.json uses the same.
    """
    n = wins + losses + ties
    if min(wins, losses, ties) < 0 or n == 0:
        raise ValueError(f"{wins} wins, {losses} losses, {ties} ties: counts that sum to at least 1 expected")
    low, high = (0.5 + bound / 2 for bound in tango(wins, losses, n))
    return Verdicts(wins, losses, ties, wins / n, (wins + ties / 2) / n, low, high, sign_test(wins, losses))


def clustered(nets: np.ndarray, clusters: Sequence[Hashable], seed: int = 0) -> tuple[Verdicts, str]:
    """Verdicts 1, −1 or 0 (N,), N ≥ 1, with the question of each → `Verdicts` and its interval's kind, "tango" or "bootstrap".

    One judgment a question: as `rates`. Else the bootstrap over questions (`resampled`), out to Tango's interval of independent judgments (`widened`), and the sign-flip test; where all
    questions agree, Tango's interval as if each were one judgment, the most that turns can hang together.
    """
    number = numbered(clusters, nets.size)
    wins, losses = int((nets > 0).sum()), int((nets < 0).sum())
    plain = rates(wins, losses, nets.size - wins - losses)
    sizes = np.bincount(number)
    if sizes.max() == 1:
        return plain, "tango"
    sums = np.bincount(number, nets).astype(np.int64)
    questions, bounds = sizes.size, resampled(sums[None], sizes[None], seed)
    alike = tango(wins * questions / nets.size, losses * questions / nets.size, questions)
    low, high = (0.5 + bound / 2 for bound in (alike if bounds is None else widened(bounds, wins, losses, nets.size)))
    counts = (plain.wins, plain.losses, plain.ties, plain.win_rate, plain.adjusted_win_rate)
    return Verdicts(*counts, low, high, sign_flip(sums)), "bootstrap" if bounds else "tango"
