"""Strategies, which choose the weights of a soup from the requested weights and the members.

To add one, write a function (of the angles: spherical.py; of a measure: measured.py) and add an entry to STRATEGIES.
"""

from collections.abc import Callable

from salsa_peft.soup.strategies.given import Choice, Measure, NoDirection, StrategyInput
from salsa_peft.soup.strategies.measured import greedy, learned
from salsa_peft.soup.strategies.spherical import karcher, model_stock, slerp

__all__ = ["STRATEGIES", "Choice", "Measure", "NoDirection", "StrategyInput"]


def linear(given: StrategyInput) -> Choice:
    """Use the requested weights: the soup is the weighted mean."""
    return Choice(given.weights, [])


STRATEGIES: dict[str, Callable[[StrategyInput], Choice]] = {
    "linear": linear,
    "slerp": slerp,
    "karcher": karcher,
    "model_stock": model_stock,
    "greedy": greedy,
    "learned": learned,
}
