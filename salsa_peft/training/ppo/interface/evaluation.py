"""The evaluation set, and the metric by which Trainer chooses the best checkpoint."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sized
from itertools import islice
from typing import Any

from salsa_peft.models.rewards.base import CallableReward, Reward
from salsa_peft.models.rewards.classifier import ClassifierReward
from salsa_peft.models.rewards.function import FunctionReward
from salsa_peft.models.rewards.reward import AdapterReward
from salsa_peft.utils.errors import require

EVALUATED = ("score", "response_length", "empty_share")
"""The metrics of every evaluation, without the prefix eval_."""
MAX_EVAL_ROWS = 10_000
"""Largest number of rows of an evaluation set without a length; more are taken for a stream without end."""


def eval_rows(dataset: Any) -> Any:
    """The rows of an evaluation set; of a stream, which may have no end, a list.

    Raises SalsaError for a stream of more than MAX_EVAL_ROWS rows, because each evaluation samples a response to each.
    """
    if isinstance(dataset, Sized) or not isinstance(dataset, Iterable):
        return dataset
    rows = list(islice(dataset, MAX_EVAL_ROWS + 1))
    require(
        len(rows) <= MAX_EVAL_ROWS,
        f"eval_dataset: this {type(dataset).__name__} has no length, and more than {MAX_EVAL_ROWS} rows. Each evaluation"
        " samples a response to every row; pass a part of it, such as eval_dataset.take(200)",
    )
    return rows


def check_best_metric(metric: str | None, reward: Reward) -> None:
    """Raise SalsaError if no evaluation can have the metric `metric_for_best_model`.

    The metrics of a function with the argument `log_metric` are known only at the first evaluation.
    """
    known = [*EVALUATED, *reward.metric_names()]
    if metric is not None and not any(logs_more(part) for part in reward.components()):
        require_metric(metric, known)


def require_metric(metric: str, known: Collection[str], prefix: str = "eval_") -> None:
    """Raise SalsaError unless `metric`, with or without the prefix eval_, is in `known`."""
    require(
        metric.removeprefix(prefix) in known,
        f"metric_for_best_model: evaluation has no metric {metric!r}, but {', '.join(prefix + name for name in known)}"
        " and what a reward function with the argument log_metric logs; use one of them",
    )


def logs_more(part: Reward) -> bool:
    """Whether a reward may log metrics of its own: a function with `log_metric`, or a user's class."""
    if isinstance(part, FunctionReward):
        return "log_metric" in part.takes
    return not isinstance(part, AdapterReward | ClassifierReward | CallableReward)
