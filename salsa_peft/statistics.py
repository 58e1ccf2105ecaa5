"""Scores and verdicts → means, rates, intervals and tests: the one place that stages and report import them from.

Numpy and scipy only. An interval is over QUESTIONS: it says how far the number would move with other questions, not with
other training seeds. One run is one replicate; only `over_seeds` sees the spread between replicates.
"""

from __future__ import annotations

from .intervals import Estimate, holm, mean_interval, paired_difference
from .judged import Judged, JudgedPair, OverSeeds, judged_pair, over_seeds
from .verdicts import Verdicts, compare, rates

__all__ = [
    "Estimate",
    "Judged",
    "JudgedPair",
    "OverSeeds",
    "Verdicts",
    "compare",
    "holm",
    "judged_pair",
    "mean_interval",
    "over_seeds",
    "paired_difference",
    "rates",
]
