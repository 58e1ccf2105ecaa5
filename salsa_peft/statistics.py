"""Scores and verdicts → means, rates, intervals and tests. Numpy and scipy only.

Every interval is a 95% one over PROMPTS: it says how far the number would move with other questions, not with other
training seeds. One run is one replicate; nothing here can see the spread between replicates. Left out: corrections
for many comparisons (the report says how many there are) and clustered questions (MT-Bench's turns are judged apart,
as in the paper).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq
from scipy.stats import binomtest, norm, t

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95% interval over n prompts; `dataclasses.asdict` gives the EST of the JSON files."""

    mean: float
    low: float
    high: float
    n: int


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
    """Exact two-sided sign test: wins against losses, ties left out; 1 where every comparison is a tie."""

    @property
    def n(self) -> int:
        return self.wins + self.losses + self.ties


def mean_interval(values: Sequence[float] | np.ndarray) -> Estimate:
    """mean ± t(0.975, n − 1) · s / √n, s with n − 1.

    One value has no spread to estimate: low = high = mean, a point and not a certainty, which the report's warning
    about small n says in words. Raises ValueError on no values and on NaN or infinity: a hole in the scores is the
    caller's to name.
    """
    array = np.asarray(values, dtype=np.float64).ravel()
    if array.size == 0:
        raise ValueError("no values: an interval needs at least one score")
    if not np.isfinite(array).all():
        raise ValueError(
            f"{int((~np.isfinite(array)).sum())} of {array.size} values are NaN or infinite: finite scores expected"
        )
    mean, n = float(array.mean()), int(array.size)
    half = float(t.ppf((1 + CONFIDENCE) / 2, n - 1) * array.std(ddof=1) / np.sqrt(n)) if n > 1 else 0.0
    return Estimate(mean, mean - half, mean + half, n)


def paired_difference(a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray) -> Estimate:
    """The t-interval of a − b, question by question: what the questions share in difficulty cancels."""
    return mean_interval(np.subtract(*_paired(a, b)))


def compare(a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray, margin: float = 0.0) -> Verdicts:
    """Verdicts of a scorer: a wins where a − b > margin, loses where b − a > margin, anything between is a tie."""
    difference = np.subtract(*_paired(a, b))
    if not np.isfinite(difference).all():
        raise ValueError("scores to compare hold NaN or infinity: finite scores expected")
    wins, losses = int((difference > margin).sum()), int((difference < -margin).sum())
    return rates(wins, losses, difference.size - wins - losses)


def rates(wins: int, losses: int, ties: int) -> Verdicts:
    """Counts, from a scorer or a judge → `Verdicts`.

    The interval of the adjusted rate is Tango's (1998) score interval for (W − L)/N, mapped by ½ + d/2: the
    per-question values are 1, ½ and 0, and unlike a t-interval or a bootstrap of them it keeps its width where all
    verdicts agree (20 wins of 20 is not [1, 1]) and never leaves [0, 1]. shared/data/paper_tables.json uses the same.
    """
    n = wins + losses + ties
    if min(wins, losses, ties) < 0 or n == 0:
        raise ValueError(f"{wins} wins, {losses} losses, {ties} ties: counts that sum to at least 1 expected")
    low, high = (0.5 + bound / 2 for bound in _tango(wins, losses, n))
    p_value = float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0
    return Verdicts(wins, losses, ties, wins / n, (wins + ties / 2) / n, low, high, p_value)


def _paired(a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    first, second = np.asarray(a, dtype=np.float64).ravel(), np.asarray(b, dtype=np.float64).ravel()
    if first.size != second.size:
        raise ValueError(f"{first.size} and {second.size} scores: the same questions expected, in the same order")
    if first.size == 0:
        raise ValueError("no scores to compare: at least one question expected")
    return first, second


def _tango(wins: int, losses: int, n: int) -> tuple[float, float]:
    """The δ at which |W − L − nδ| = z √(n (2 q̂ + δ − δ²)); q̂ is the likeliest share of losses where the true
    difference is δ.
    """
    z = float(norm.ppf((1 + CONFIDENCE) / 2))
    observed = (wins - losses) / n

    def gap(delta: float, sign: float) -> float:
        b = -wins - losses + (2 * n - wins + losses) * delta
        c = -losses * delta * (1 - delta)
        share = (np.sqrt(max(b * b - 8 * n * c, 0.0)) - b) / (4 * n)
        return float(wins - losses - n * delta - sign * z * np.sqrt(n * max(2 * share + delta * (1 - delta), 0.0)))

    # Where all verdicts agree, the variance at the observed rate is 0 and so is the gap: not the root that is meant.
    off = 1e-7
    low = -1.0 if losses == n else brentq(gap, -1.0, observed - off, args=(1.0,))
    high = 1.0 if wins == n else brentq(gap, observed + off, 1.0, args=(-1.0,))
    return float(low), float(high)
