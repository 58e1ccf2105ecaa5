"""Measures of a reward: accuracy and calibration on pairs, spread of the scores, best-of-n. Imports no torch.

A policy learns from differences between responses to one prompt. The pairwise loss leaves each prompt's level free, so
a reward model can rank pairs well and still have most of its variance between prompts; PPO's critic has to predict
that part before it helps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from salsa_peft.utils.files import read_json
from salsa_peft.utils.statistics import TAILS, mean_interval, paired_difference

METRICS = "metrics.json"
"""File of the reward_quality stage with the measures on seed-0's responses."""
LARGE_SHARE = 0.45
"""Share of the score's variance between prompts from which the report advises remedies: the limit of PPO's guard.

In the embedded world, PPO with a value head gained from centred reward models, with shares up to 0.37 at a coefficient
of 0.01, and lost gold with uncentred ones, with shares from 0.50.
"""
MOST_BINS, PAIRS_IN_BIN = 5, 20
"""Most bins of a calibration table, and the fewest pairs in each if there are several."""


def between_prompt_share(inputs: Mapping[str, Path]) -> float | None:
    """Share of the score's variance that lies between prompts, as the reward_quality stage measured it.

    inputs: a job's inputs. None if the recipe leaves out the stage, or if all scores were equal.
    """
    folder = inputs.get("reward_quality")
    share = None if folder is None else read_json(folder / METRICS)["between_prompt_share"]
    return None if share is None else float(share["mean"])


def accuracy(margins: Sequence[float] | np.ndarray) -> dict[str, float]:
    """Share of pairs whose chosen response has the higher score, with Wilson's 95% interval."""
    from scipy.stats import binomtest

    found = binomtest(int((np.asarray(margins) > 0).sum()), len(margins))
    interval = found.proportion_ci(method="wilson")
    return {"mean": found.statistic, "low": float(interval.low), "high": float(interval.high), "n": len(margins)}


def calibration(margins: Sequence[float] | np.ndarray) -> dict[str, Any]:
    """Predicted and observed accuracy of pairs, binned by quantiles of |Δ|, and their expected difference (ECE).

        ECE = Σ_b n_b / N · |accuracy_b − mean of σ(|Δ|) in b|

    margins: Δ = R(chosen) − R(rejected) of each pair. The model predicts that the response with the higher score is the
    chosen one with probability σ(|Δ|), where σ is the logistic function of the pairwise loss.
    """
    sizes = np.abs(np.asarray(margins, dtype=np.float64))
    order = np.argsort(sizes, kind="stable")
    bins: list[dict[str, Any]] = []
    for rows in np.array_split(order, max(1, min(MOST_BINS, len(order) // PAIRS_IN_BIN))):
        predicted = float((1 / (1 + np.exp(-sizes[rows]))).mean())
        observed = accuracy(np.asarray(margins)[rows])
        ends = {"from": float(sizes[rows[0]]), "to": float(sizes[rows[-1]])}
        bins.append({**ends, "predicted": predicted, "observed": observed})
    gaps = [one["observed"]["n"] * abs(one["observed"]["mean"] - one["predicted"]) for one in bins]
    return {"ece": sum(gaps) / len(order), "bins": bins}


def spread(scores: np.ndarray) -> dict[str, Any]:
    """Mean and SD of scores (P, n), n for each of P prompts; SD within a prompt; share of the variance between prompts.

        σ_w² = MS_w,  σ_b² = max(0, (MS_b − MS_w) / n),  share = σ_b² / (σ_b² + σ_w²)

    MS_b and MS_w are the mean squares between and within prompts. The share is the intraclass correlation ICC(1), its
    interval that of the F distribution (Shrout and Fleiss, 1979). It is None for one prompt, or if all scores are equal.
    """
    from scipy.stats import f

    prompts, n = scores.shape
    means = scores.mean(axis=1)
    within = float(np.square(scores - means[:, None]).sum() / (prompts * (n - 1)))
    between = n * float(means.var(ddof=1)) if prompts > 1 else within
    total = max(0.0, (between - within) / n) + within
    share = None
    if prompts > 1 and total > 0:
        degrees = (prompts - 1, prompts * (n - 1))
        ratio = between / within if within > 0 else np.inf
        low, high = (_intraclass(ratio / float(f.ppf(tail, *degrees)), n) for tail in TAILS[::-1])
        share = {"mean": 1 - within / total, "low": low, "high": high, "n": prompts}
    spreads = {"score_sd": total**0.5, "score_sd_within": within**0.5}
    return {"score_mean": float(scores.mean()), **spreads, "between_prompt_share": share}


def _intraclass(ratio: float, n: int) -> float:
    """The intraclass correlation of a ratio of mean squares, with n values in each group; at least 0."""
    return max(0.0, float(1 - n / (ratio + n - 1)))


def best_of_n(scores: np.ndarray, gold: np.ndarray) -> dict[str, Any]:
    """Mean gold reward of one response, of the best of n by score, and of the best of n by gold; (P, n) each.

    Intervals are over prompts. gain: best by score − one response. possible_gain: best by gold − one response. Taking
    the best of n moves a policy by a KL of at most log n − (n − 1) / n nats (0.64 for n = 4), so PPO may gain more (in the
    embedded world 0.113 against 0.089). With a gain of 0 the reward does not tell better responses from worse ones, and
    RL on it has nothing to learn.
    """
    one = gold.mean(axis=1)
    by_score = gold[np.arange(len(gold)), scores.argmax(axis=1)]
    by_gold = gold.max(axis=1)
    means = {"one_response": one, "best_by_reward": by_score, "best_by_gold": by_gold}
    return {
        "n": gold.shape[1],
        **{name: asdict(mean_interval(values)) for name, values in means.items()},
        "gain": asdict(paired_difference(by_score, one)),
        "possible_gain": asdict(paired_difference(by_gold, one)),
    }
