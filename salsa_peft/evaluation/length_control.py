"""Length-controlled win rate: an estimate of the win rate if both answers were equally long.

Judges prefer longer answers. As in AlpacaEval 2 (Dubois et al. 2024, arXiv 2404.04475), a logistic regression predicts
the outcome from tanh of the standardised length difference, and the rate is the prediction at difference 0. AlpacaEval's
term for a question's difficulty is left out, since it needs many models on the same questions.
"""

import numpy as np
from scipy.special import expit

from salsa_peft.utils.statistics import TAILS

FEW, DECIDED = 20, 10
"""Minimum number of questions, and of judgments that are not ties, for an estimate."""
RESAMPLES = 2_000
RIDGE = 0.1
"""Weight of the term ½ RIDGE φ² in the loss: a weak prior on the slope φ (standard deviation 3.2), which keeps φ finite
where length alone separates wins from losses. The intercept θ, which gives the rate, has no prior."""
STEPS = 30


def length_controlled(
    outcomes: np.ndarray, differences: np.ndarray, questions: np.ndarray, seed: int = 0
) -> dict[str, float] | None:
    """Win rate at equal length, σ(θ) of logit E[y] = θ + φ tanh(d / s), as {"rate", "low", "high"}.

    outcomes (N,): y, 1 for a win of a, ½ for a tie, 0 for a loss (fractional response: Papke and Wooldridge, 1996).
    differences (N,): d, length of a's answer − length of b's, in tokens; s is their standard deviation. questions (N,):
    0-based number of each judgment's question. The interval is a percentile bootstrap over questions with s fixed.
    Returns None if the rate cannot be estimated: fewer than 20 questions, fewer than 10 judgments that are not ties,
    equal outcomes throughout, or a model whose answers are never longer (equal length would be an extrapolation).
    """
    spread, count = float(differences.std()), int(np.unique(questions).size)
    one_sided = differences.min(initial=0.0) == 0 or differences.max(initial=0.0) == 0  # also if all are equal
    if count < FEW or np.count_nonzero(outcomes != 0.5) < DECIDED or one_sided or np.unique(outcomes).size == 1:
        return None
    x = np.tanh(differences / spread)
    best = fit(np.ones((1, outcomes.size)), x, outcomes, np.zeros(2))
    draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    # in chunks of about 30 MB
    pieces = np.array_split(draws, 1 + RESAMPLES * outcomes.size // 500_000)
    thetas = np.concatenate([fit(piece[:, questions].astype(float), x, outcomes, best[0])[:, 0] for piece in pieces])
    low, high = np.quantile(expit(thetas), TAILS)
    return {"rate": float(expit(best[0, 0])), "low": float(low), "high": float(high)}


def fit(weights: np.ndarray, x: np.ndarray, y: np.ndarray, start: np.ndarray) -> np.ndarray:
    """θ and φ (R, 2) of R weighted fits by Newton's method. weights: (R, N); x and y: (N,); start: (2,)."""
    found = np.tile(start, (weights.shape[0], 1))
    powers = np.stack([np.ones_like(x), x, x * x], axis=1)
    for _ in range(STEPS):
        chance = expit(found[:, :1] + found[:, 1:] * x)
        slope = (weights * (y - chance)) @ powers[:, :2] - np.array([0.0, RIDGE]) * found
        bend = (weights * chance * (1 - chance)) @ powers + np.array([0.0, 0.0, RIDGE])
        determinant = bend[:, 0] * bend[:, 2] - bend[:, 1] ** 2
        step = np.stack([bend[:, 2] * slope[:, 0] - bend[:, 1] * slope[:, 1],
                         bend[:, 0] * slope[:, 1] - bend[:, 1] * slope[:, 0]], axis=1)  # fmt: skip
        # A resample that contains only wins has no finite θ: with bounded steps its rate approaches 1.
        step = np.clip(step / np.maximum(determinant, 1e-300)[:, None], -2, 2)
        found += step
        if np.abs(step).max() < 1e-8:
            break
    return found
