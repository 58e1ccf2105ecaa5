"""Which difference replicates could have shown, and how many replicates a difference needs.

The test is the paired two-sided t-test at 5% over replicates, with the spread that the replicates had. Power is exact for
normal differences: with n replicates, true difference d and standard deviation s, the statistic of the test has the
noncentral t-distribution with n − 1 degrees of freedom and noncentrality √n · d / s.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from salsa_peft.report.format import Row, fixed
from salsa_peft.report.headline import listed

POWER = 0.8
"""Probability with which a difference is to be shown."""
MOST = 1000
"""Largest number of replicates that is named as such; a larger one is said to be more."""


def power(effect: float, n: int) -> float:
    """Probability that n replicates show a true difference of `effect` standard deviations, in either direction."""
    from scipy.stats import nct, t

    critical, shift = float(t.ppf(0.975, n - 1)), effect * math.sqrt(n)
    wrong_sign = float(nct.cdf(-critical, n - 1, shift))  # SciPy may give NaN where it is 0
    return float(nct.sf(critical, n - 1, shift)) + (0.0 if math.isnan(wrong_sign) else wrong_sign)


@functools.lru_cache
def detectable_effect(n: int) -> float:
    """The true difference, in standard deviations, that n replicates show with probability POWER."""
    from scipy.optimize import brentq

    high = 1.0
    while power(high, n) < POWER:
        high *= 2
    return float(brentq(lambda effect: power(effect, n) - POWER, 0.0, high))


def spread(found: Row) -> float:
    """The standard deviation of the differences of the replicates, from the interval of their mean."""
    from scipy.stats import t

    return float((found["high"] - found["mean"]) * math.sqrt(found["n"]) / t.ppf(0.975, found["n"] - 1))


def detectable(found: Row) -> float | None:
    """The true difference that such replicates show with probability POWER; None for fewer than two."""
    return None if found["n"] < 2 else spread(found) * detectable_effect(found["n"])


def needed(difference: float, deviation: float) -> int | None:
    """Least number of replicates that show a true difference with probability POWER; None if it is above MOST.

    deviation: standard deviation of the differences of the replicates.
    """
    from scipy.stats import norm

    if deviation == 0:
        return 2 if difference else None
    effect = abs(difference) / deviation
    fewest = float(norm.ppf(0.975) + norm.ppf(POWER)) / effect if effect else math.inf
    n = max(2, math.floor(min(fewest, MOST) ** 2))  # with a known deviation; with an estimated one it is never less
    while n <= MOST and power(effect, n) < POWER:
        n += 1
    return n if n <= MOST else None


def table(compared: Sequence[Row]) -> list[dict[str, Any]]:
    """For each difference of the headline {"a", "b", "dataset", "mean", "n", "spread", "detectable", "needed"}.

    compared: `findings.comparisons` of replicates. needed: replicates that would show a true difference as large as the
    one seen.
    """
    return [
        {key: one[key] for key in ("a", "b", "dataset", "mean", "n")}
        | {
            "spread": (deviation := spread(one)),
            "detectable": detectable(one),
            "needed": needed(one["mean"], deviation),
        }
        for one in compared
        if one["n"] > 1
    ]


def sentences(rows: Sequence[Row]) -> list[str]:
    """One sentence for each pair of models: what could have been shown, and what the difference seen needs."""
    return [_sentence(of) for of in _by_pair(rows).values()]


def _by_pair(rows: Sequence[Row]) -> Mapping[tuple[str, str], list[Row]]:
    pairs: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        pairs.setdefault((row["a"], row["b"]), []).append(row)
    return pairs


def _sentence(rows: Sequence[Row]) -> str:
    """What one pair's replicates could have shown on each set of questions."""
    first, several = rows[0], len(rows) > 1
    shown = listed([f"of {fixed(row['detectable'])} on “{row['dataset']}”" for row in rows])
    seen = ", ".join(("+" if row["mean"] > 0 else "") + fixed(row["mean"]) for row in rows)
    wanted = listed([count(row["needed"]) for row in rows])
    return (
        f"{first['a']} − {first['b']}: with {first['n']} replicates of this spread, a true difference {shown} is shown in"
        f" {100 * POWER:.0f}% of cases; one as large as the difference{'s' * several} seen ({seen}) needs {wanted} replicates."
    )


def count(replicates: int | None) -> str:
    """A number of replicates as text."""
    return f"more than {MOST:,}" if replicates is None else str(replicates)


def given_difference(rows: Sequence[Row], difference: float) -> list[str]:
    """For each pair, how many replicates a given true difference needs with the spread that was seen."""
    return [
        f"{a} − {b}: a true difference of {difference:g} takes "
        + listed([f"{count(needed(difference, row['spread']))} replicates on “{row['dataset']}”" for row in of])
        + f" to be shown in {100 * POWER:.0f}% of cases."
        for (a, b), of in _by_pair(rows).items()
    ]
