"""Means, confidence intervals and tests; values may come in clusters, such as the turns of a question.

All intervals are 95% confidence intervals. Random draws are seeded and do not depend on the order of the rows: the same
values give the same interval, and comparing b with a gives the mirror image of comparing a with b. Only NumPy and SciPy
are imported, SciPy by the functions that use it: importing scipy.stats takes 0.6 s.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 10_000
TAILS = ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2)


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95% confidence interval. The JSON files of results hold it as a dict."""

    mean: float
    low: float
    high: float
    n: int
    """The number of values, or of clusters where values come in clusters."""


def mean_interval(values: Sequence[float] | np.ndarray, clusters: Sequence[Hashable] | None = None) -> Estimate:
    """The mean of values with its t-interval, or with the cluster-robust interval if `clusters` is given.

        without clusters:  mean ± t(0.975, n − 1) · s / √n
        with clusters:     mean ± t(0.975, G − 1) · √(G/(G − 1) · Σ_g e_g²) / N

    s is the standard deviation (divisor n − 1), and e_g the sum of value − mean over cluster g of G (Liang and Zeger,
    1986). Values of one cluster may depend on each other. Clusters of one value each give the first formula. For a
    single value or cluster no spread can be estimated, and low = high = mean. Raises ValueError for no values, NaN or
    infinity.
    """
    from scipy.stats import t

    array = np.asarray(values, dtype=np.float64).ravel()
    if array.size == 0:
        raise ValueError("an interval needs at least one value")
    if not np.isfinite(array).all():
        raise ValueError(
            f"{int((~np.isfinite(array)).sum())} of {array.size} values are NaN or infinite; scores must be finite"
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
    """Mean of a − b over paired questions, with its interval. The questions' difficulty cancels."""
    return mean_interval(np.subtract(*as_paired_arrays(a, b)), clusters)


def as_paired_arrays(a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """a and b as two float64 arrays (N,). Raises ValueError if their lengths differ or N is 0."""
    first, second = np.asarray(a, dtype=np.float64).ravel(), np.asarray(b, dtype=np.float64).ravel()
    if first.size != second.size:
        raise ValueError(
            f"{first.size} and {second.size} scores cannot be paired; both need the same questions in the same order"
        )
    if first.size == 0:
        raise ValueError("a comparison needs at least one question")
    return first, second


def cluster_indices(clusters: Sequence[Hashable], n: int) -> np.ndarray:
    """Index of the cluster of each value (n,). Clusters are numbered in order of first appearance."""
    if len(clusters) != n:
        raise ValueError(f"{len(clusters)} clusters for {n} values; give one cluster for each value")
    number: dict[Hashable, int] = {}
    return np.array([number.setdefault(cluster, len(number)) for cluster in clusters], dtype=np.int64)


def tango_interval(wins: float, losses: float, n: float) -> tuple[float, float]:
    """Tango's (1998) score interval for (W − L)/n, with W wins and L losses.

    The bounds are the δ with |W − L − nδ| = z √(n (2 q̂ + δ − δ²)), where q̂ is the maximum likelihood estimate of the
    share of losses given the difference δ. For n = 0 the interval is (−1, 1).
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

    # If all verdicts agree, `gap` is also 0 at the observed rate itself; start beside it to find the other root.
    off = 1e-7
    low = -1.0 if losses == n else brentq(gap, -1.0, observed - off, args=(1.0,))
    high = 1.0 if wins == n else brentq(gap, observed + off, 1.0, args=(-1.0,))
    return float(low), float(high)


def bootstrap_interval(nets: np.ndarray, sizes: np.ndarray, seed: int = 0) -> tuple[float, float] | None:
    """Percentile bootstrap interval of Σ nets / Σ sizes over G questions and K runs.

    nets, sizes (K, G): wins − losses, and the number of judgments, of each question in each run. A resample keeps the
    judgments of a question together in all runs (Owen's pigeonhole bootstrap, 2007), since the runs share the
    questions' difficulty. K − 1 of K runs are drawn, which gives the mean of few runs the right variance (Rao and Wu,
    1988). Questions with equal nets and sizes are interchangeable, so a resample is one multinomial draw over distinct
    questions, fast for any G. Returns None if all questions have the same rate, for which a bootstrap interval would
    have width 0.
    """
    runs, questions = nets.shape
    if np.unique(nets[sizes > 0] / sizes[sizes > 0]).size == 1:
        return None
    rows, counts = np.unique(np.concatenate([nets, sizes]).T, axis=0, return_counts=True)
    kinds = np.column_stack([rows, counts])
    # Draw for one of the two mirror images only, so that comparing b with a gives exactly the mirrored interval.
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
    """Widen a bootstrap interval of (W − L)/n to contain Tango's interval for independent judgments.

    With few decided questions a percentile bootstrap is far too narrow: with one loss in 80 it never draws a win, so
    its upper bound is 0.
    """
    low, high = tango_interval(wins, losses, n)
    return min(bounds[0], low), max(bounds[1], high)


def sign_test(wins: int, losses: int) -> float:
    """P-value of the exact two-sided sign test without ties, for independent judgments; 1 if all are ties."""
    from scipy.stats import binomtest

    return float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def sign_flip_test(nets: np.ndarray) -> float:
    """P-value of the exact two-sided sign-flip test of nets (wins − losses of each question, integers).

    The p-value is P(|Σ ±net_g| ≥ |Σ net_g|) with random signs: under the null hypothesis, swapping the two models in
    all turns of a question is as likely as not. The turns of a question may depend on each other; questions are
    independent. The test is exact for any number of questions: nets are small integers, so the distribution of the sum
    is a convolution of binomials, one for each size of net. With one judgment per question it is the sign test.
    """
    from scipy.stats import binom

    sizes, counts = np.unique(np.abs(nets[nets != 0]).astype(np.int64), return_counts=True)
    chances = np.ones(1)
    for size, count in zip(sizes.tolist(), counts.tolist(), strict=True):
        ups = np.zeros(size * count + 1)
        ups[::size] = binom.pmf(np.arange(count + 1), count, 0.5)
        chances = np.convolve(chances, ups)
    total = chances.size - 1  # Σ |net|; entry k is the probability of the sum 2k − total
    far = np.abs(2 * np.arange(total + 1) - total) >= abs(int(nets.sum()))
    return min(1.0, float(chances[far].sum()))


def t_test(values: Sequence[float], mean: float) -> float:
    """P-value of the two-sided one-sample t-test of a mean; 1 for a single value, and for values that all equal it.

    For equal values other than `mean` it is 0.
    """
    from scipy.stats import ttest_1samp

    if len(values) < 2 or np.ptp(values) == 0:
        return float(len(values) < 2 or values[0] == mean)
    return float(ttest_1samp(values, mean).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values with Holm's (1979) step-down correction, in the order given.

    The k-th smallest of m is multiplied by m − k + 1; results never decrease with k and are at most 1. Raises
    ValueError for a number that is not a probability.
    """
    for p in p_values:
        if not 0 <= p <= 1:
            raise ValueError(f"the p-value {p} is not between 0 and 1")
    corrected, least = [0.0] * len(p_values), 0.0
    for rank, at in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[at]))
        corrected[at] = least
    return corrected


@dataclass(frozen=True)
class WinRates:
    """Wins, losses and ties of a against b, with the win rates of the paper's Tables 2 to 4."""

    wins: int
    losses: int
    ties: int
    win_rate: float
    """W / N. Ties count against both models, so the models' rates do not sum to 1 if there are ties."""
    adjusted_win_rate: float
    """(W + T/2) / N. ½ means no difference; the two models' rates sum to 1."""
    low: float
    high: float
    """Upper bound of the 95% confidence interval of the adjusted win rate; `low` is the lower bound."""
    p_value: float
    """Exact two-sided test of wins against losses without ties; 1 if all comparisons are ties."""

    @property
    def n(self) -> int:
        return self.wins + self.losses + self.ties


def compare_scores(
    a: Sequence[float] | np.ndarray,
    b: Sequence[float] | np.ndarray,
    margin: float = 0.0,
    clusters: Sequence[Hashable] | None = None,
) -> WinRates:
    """Win rates by scores: a wins if a − b > margin, loses if b − a > margin, and ties otherwise.

    Wins, losses and ties count values; the interval and the test are over clusters, if values (turns) belong to
    clusters (questions).
    """
    difference = np.subtract(*as_paired_arrays(a, b))
    if not np.isfinite(difference).all():
        raise ValueError("the scores to compare contain NaN or infinity; scores must be finite")
    nets = (difference > margin).astype(np.int64) - (difference < -margin)
    return clustered_win_rates(nets, range(nets.size) if clusters is None else clusters)[0]


def win_rates(wins: int, losses: int, ties: int) -> WinRates:
    """Win rates from counts, for independent judgments.

    The interval of the adjusted win rate is ½ + d/2, where d is Tango's (1998) score interval for (W − L)/N. Unlike a
    t-interval or a bootstrap it has a positive width if all verdicts agree (20 wins of 20 do not give [1, 1]), and it
    never leaves [0, 1].
    """
    n = wins + losses + ties
    if min(wins, losses, ties) < 0 or n == 0:
        raise ValueError(
            f"{wins} wins, {losses} losses and {ties} ties; counts must not be negative and must sum to at least 1"
        )
    low, high = (0.5 + bound / 2 for bound in tango_interval(wins, losses, n))
    return WinRates(wins, losses, ties, wins / n, (wins + ties / 2) / n, low, high, sign_test(wins, losses))


def clustered_win_rates(nets: np.ndarray, clusters: Sequence[Hashable], seed: int = 0) -> tuple[WinRates, str]:
    """Win rates of verdicts, and the method of their interval: "tango" or "bootstrap".

    nets (N,): 1 (win), −1 (loss) or 0 (tie). clusters: the question of each verdict. With one judgment per question the
    result is that of `win_rates`. Otherwise the interval is the bootstrap over questions, widened by `widen_to_tango`,
    and the test is the sign-flip test. If all questions have the same rate, the interval is Tango's with one judgment
    per question, which is right for turns that depend on each other completely.
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
    widened = alike if bounds is None else widen_to_tango(bounds, wins, losses, nets.size)
    low, high = (0.5 + bound / 2 for bound in widened)
    found = replace(plain, low=low, high=high, p_value=sign_flip_test(sums))
    return found, "bootstrap" if bounds else "tango"
