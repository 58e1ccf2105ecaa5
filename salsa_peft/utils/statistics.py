"""Means, confidence intervals and tests of scores, independent or in clusters (the turns of a question).

The functions need numpy and scipy. They import scipy.stats themselves, because that import takes 0.6 s.
Every interval is a 95% one. What is drawn is seeded and does not depend on the order of the rows: the same numbers give
the same interval, and a with b the mirror image of b with a.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 10_000
TAILS = ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2)


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95% interval over n prompts; `dataclasses.asdict` gives the EST of the JSON files."""

    mean: float
    low: float
    high: float
    n: int
    """What the interval is over: values, or clusters where they come in clusters."""


def mean_interval(values: Sequence[float] | np.ndarray, clusters: Sequence[Hashable] | None = None) -> Estimate:
    """mean ± t(0.975, n − 1) · s / √n, s with n − 1; with clusters, mean ± t(0.975, G − 1) · √(G/(G−1) Σ_g e_g²) / N.

    e_g is the sum of value − mean over cluster g of G (Liang and Zeger 1986): each value counts alike in the mean, whole
    clusters in its spread, whatever ties the values of one together. Clusters of one value each give the first formula.
    One value (cluster) has no spread to estimate: low = high = mean, a point and not a certainty, which the report's
    warning about small n says in words. Raises ValueError on no values and on NaN or infinity: a hole in the scores is
    the caller's to name.
    """
    from scipy.stats import t

    array = np.asarray(values, dtype=np.float64).ravel()
    if array.size == 0:
        raise ValueError("no values: an interval needs at least one score")
    if not np.isfinite(array).all():
        raise ValueError(
            f"{int((~np.isfinite(array)).sum())} of {array.size} values are NaN or infinite: finite scores expected"
        )
    mean, n = float(array.mean()), int(array.size)
    if clusters is None:
        error = float(array.std(ddof=1) / np.sqrt(n)) if n > 1 else 0.0
    else:
        sums = np.bincount(cluster_indices(clusters, array.size), array - mean)
        n = sums.size
        error = float(np.sqrt(n / (n - 1) * np.square(sums).sum()) / array.size) if n > 1 else 0.0
    half = float(t.ppf(TAILS[1], n - 1)) * error if n > 1 else 0.0
    return Estimate(mean, mean - half, mean + half, n)


def paired_difference(
    a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray, clusters: Sequence[Hashable] | None = None
) -> Estimate:
    """The t-interval of a − b, question by question: what the questions share in difficulty cancels."""
    return mean_interval(np.subtract(*as_paired_arrays(a, b)), clusters)


def as_paired_arrays(a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two (N,) of the same N ≥ 1; ValueError where they are not."""
    first, second = np.asarray(a, dtype=np.float64).ravel(), np.asarray(b, dtype=np.float64).ravel()
    if first.size != second.size:
        raise ValueError(f"{first.size} and {second.size} scores: the same questions expected, in the same order")
    if first.size == 0:
        raise ValueError("no scores to compare: at least one question expected")
    return first, second


def cluster_indices(clusters: Sequence[Hashable], n: int) -> np.ndarray:
    """(n,) number of each value's cluster, by first appearance; ValueError where there are not n."""
    if len(clusters) != n:
        raise ValueError(f"{len(clusters)} clusters for {n} values: one for each value expected")
    number: dict[Hashable, int] = {}
    return np.array([number.setdefault(cluster, len(number)) for cluster in clusters], dtype=np.int64)


def tango_interval(wins: float, losses: float, n: float) -> tuple[float, float]:
    """Tango's (1998) score interval for (W − L)/n: the δ at which |W − L − nδ| = z √(n (2 q̂ + δ − δ²)).

    q̂ is the likeliest share of losses where the true difference is δ. n = 0 gives its limit, (−1, 1).
    """
    from scipy.optimize import brentq
    from scipy.stats import norm

    if n == 0:
        return -1.0, 1.0
    z = float(norm.ppf(TAILS[1]))
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


def bootstrap_interval(nets: np.ndarray, sizes: np.ndarray, seed: int = 0) -> tuple[float, float] | None:
    """Percentile bootstrap of Σ nets / Σ sizes over G questions, and over K runs where there are several.

    nets, sizes (K, G): wins − losses and judgments of each question in each run. A question's judgments stay together, in
    all runs (Owen's pigeonhole bootstrap, 2007): its difficulty is the runs' in common. K − 1 of K runs are drawn, which
    gives the mean of few runs the right variance (Rao and Wu 1988). Questions alike in all of it are interchangeable, so a
    resample is one multinomial draw over the kinds of questions: 10,000 of them in milliseconds, whatever G. None where
    all have the same rate: a bootstrap would call that a certainty.
    """
    runs, questions = nets.shape
    if np.unique(nets[sizes > 0] / sizes[sizes > 0]).size == 1:
        return None
    rows, counts = np.unique(np.concatenate([nets, sizes]).T, axis=0, return_counts=True)
    kinds = np.column_stack([rows, counts])
    # One of the two mirror images is drawn for both.
    mirror = np.array(sorted((kinds * ([-1] * runs + [1] * (runs + 1))).tolist()))
    sign = -1 if mirror.tolist() < kinds.tolist() else 1
    kinds = kinds if sign == 1 else mirror
    random = np.random.default_rng(seed)
    draws = random.multinomial(questions, kinds[:, -1] / questions, size=RESAMPLES)
    drawn = random.multinomial(max(runs - 1, 1), np.full(runs, 1 / runs), size=RESAMPLES)
    top, bottom = (((draws @ kinds[:, at : at + runs]) * drawn).sum(axis=1) for at in (0, runs))
    low, high = sign * np.quantile(top / np.maximum(bottom, 1), TAILS[::sign])
    return float(low), float(high)


def widen_to_tango(bounds: tuple[float, float], wins: float, losses: float, n: float) -> tuple[float, float]:
    """The bootstrap's bounds of (W − L)/n, out to Tango's of judgments that are independent where those are wider.

    Where few questions are decided a percentile bootstrap is far too narrow (one loss of 80: it never draws a win, so its upper bound is the
    even rate itself).
    """
    low, high = tango_interval(wins, losses, n)
    return min(bounds[0], low), max(bounds[1], high)


def sign_test(wins: int, losses: int) -> float:
    """Exact two-sided sign test, ties left out; 1 where there are only ties. Judgments are taken as independent."""
    from scipy.stats import binomtest

    return float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def sign_flip_test(nets: np.ndarray) -> float:
    """Two-sided test of questions' nets (wins − losses, integers): P(|Σ ±net_g| ≥ |Σ net_g|), each sign with ½.

    Assumed under the null: swapping the two models in all of a question's turns at once is as likely as not. How the
    turns of a question hang together does not matter, questions are independent. Exact for any number of them: nets are
    small integers, so the sum's distribution is a product of binomials, one for each size of net (Fisher's permutation
    test by generating functions). One judgment a question makes it the sign test.
    """
    from scipy.stats import binom

    sizes, counts = np.unique(np.abs(nets[nets != 0]).astype(np.int64), return_counts=True)
    chances = np.ones(1)
    for size, count in zip(sizes.tolist(), counts.tolist(), strict=True):
        ups = np.zeros(size * count + 1)
        ups[::size] = binom.pmf(np.arange(count + 1), count, 0.5)
        chances = np.convolve(chances, ups)
    total = chances.size - 1  # Σ |net|; place k holds the sum 2k − total
    far = np.abs(2 * np.arange(total + 1) - total) >= abs(int(nets.sum()))
    return min(1.0, float(chances[far].sum()))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's (1979) step-down correction, in the order given: the k-th smallest of m times m − k + 1, never falling, at most 1.

    Raises ValueError on what is not a probability.
    """
    wrong = [p for p in p_values if not 0 <= p <= 1]
    if wrong:
        raise ValueError(f"p-value {wrong[0]}: numbers from 0 to 1 expected")
    corrected, least = [0.0] * len(p_values), 0.0
    for rank, at in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[at]))
        corrected[at] = least
    return corrected


@dataclass(frozen=True)
class WinRates:
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


def compare_scores(
    a: Sequence[float] | np.ndarray,
    b: Sequence[float] | np.ndarray,
    margin: float = 0.0,
    clusters: Sequence[Hashable] | None = None,
) -> WinRates:
    """Verdicts of a scorer: a wins where a − b > margin, loses where b − a > margin, anything between is a tie.

    Counts are over values; clusters (questions, their turns the values) are what interval and test go by.
    """
    difference = np.subtract(*as_paired_arrays(a, b))
    if not np.isfinite(difference).all():
        raise ValueError("scores to compare hold NaN or infinity: finite scores expected")
    nets = (difference > margin).astype(np.int64) - (difference < -margin)
    return clustered_win_rates(nets, range(nets.size) if clusters is None else clusters)[0]


def win_rates(wins: int, losses: int, ties: int) -> WinRates:
    """Counts, from a scorer or a judge → `WinRates`, each judgment a question of its own.

    The interval of the adjusted rate is Tango's (1998) score interval for (W − L)/N, mapped by ½ + d/2: the
    per-question values are 1, ½ and 0, and unlike a t-interval or a bootstrap of them it keeps its width where all
    verdicts agree (20 wins of 20 is not [1, 1]) and never leaves [0, 1]. shared/data/paper_tables.json uses the same.
    """
    n = wins + losses + ties
    if min(wins, losses, ties) < 0 or n == 0:
        raise ValueError(f"{wins} wins, {losses} losses, {ties} ties: counts that sum to at least 1 expected")
    low, high = (0.5 + bound / 2 for bound in tango_interval(wins, losses, n))
    return WinRates(wins, losses, ties, wins / n, (wins + ties / 2) / n, low, high, sign_test(wins, losses))


def clustered_win_rates(nets: np.ndarray, clusters: Sequence[Hashable], seed: int = 0) -> tuple[WinRates, str]:
    """Verdicts 1, −1 or 0 (N,), N ≥ 1, with the question of each → `WinRates` and its interval's kind, "tango" or "bootstrap".

    One judgment a question: as `win_rates`. Else the bootstrap over questions (`bootstrap_interval`), out to Tango's interval of independent judgments (`widen_to_tango`), and the sign-flip test; where all
    questions agree, Tango's interval as if each were one judgment, the most that turns can hang together.
    """
    number = cluster_indices(clusters, nets.size)
    wins, losses = int((nets > 0).sum()), int((nets < 0).sum())
    plain = win_rates(wins, losses, nets.size - wins - losses)
    sizes = np.bincount(number)
    if sizes.max() == 1:
        return plain, "tango"
    sums = np.bincount(number, nets).astype(np.int64)
    questions, bounds = sizes.size, bootstrap_interval(sums[None], sizes[None], seed)
    alike = tango_interval(wins * questions / nets.size, losses * questions / nets.size, questions)
    low, high = (
        0.5 + bound / 2 for bound in (alike if bounds is None else widen_to_tango(bounds, wins, losses, nets.size))
    )
    counts = (plain.wins, plain.losses, plain.ties, plain.win_rate, plain.adjusted_win_rate)
    return WinRates(*counts, low, high, sign_flip_test(sums)), "bootstrap" if bounds else "tango"
