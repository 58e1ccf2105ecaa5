"""The table of updates as text: its columns, those that fit a terminal's width, and numbers in few characters."""

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Row = Mapping[str, Any]
"""An update's metrics, and `step`, `steps` (of the run) and `left` (seconds until the end; None: not known)."""
MISSING = "–"


class Column(NamedTuple):
    """A column of the table."""

    key: str
    """The metric's name in metrics.jsonl; `step` and `left` are of the table itself."""
    title: str
    width: int
    decimals: int | None = 0
    name: str = ""
    """The name in a line of a log, if it differs from the title."""


COLUMNS = (
    Column("update", "update", 6),
    Column("step", "step", 7),
    Column("objective/scores", "reward ± std", 14, 3, "reward"),
    Column("objective/rlhf_reward", "rlhf reward", 11, 3),
    Column("objective/kl", "KL", 6, 3),
    Column("objective/kl_coef", "β", 6, 4),
    Column("objective/response_length", "length", 6, 1),
    Column("objective/entropy", "entropy", 7, 2),
    Column("policy/clipfrac_avg", "clip", 5, 3, "clip fraction"),
    Column("val/explained_variance", "exp.var", 7, 3, "explained variance"),
    Column("policy/approxkl_avg", "approx.KL", 9, 4),
    Column("loss/policy_avg", "pol.loss", 8, 4),
    Column("loss/value_avg", "val.loss", 8, 4),
    Column("objective/empty_share", "empty", 5, 3),
    Column("lr", "lr", 7, None),
    Column("seconds", "seconds", 7, 1),
    Column("tokens_per_second", "tok/s", 5, 0, "tokens/s"),
    Column("left", "left", 5),
)
"""All columns, in the order in which they are printed."""
IMPORTANCE = (
    "step", "objective/scores", "objective/kl", "left", "objective/response_length", "objective/kl_coef",
    "val/explained_variance", "policy/clipfrac_avg", "objective/entropy", "tokens_per_second",
    # only in wide terminals
    "lr", "loss/value_avg", "loss/policy_avg", "policy/approxkl_avg", "seconds", "update", "objective/rlhf_reward",
    "objective/empty_share",
)  # fmt: skip
"""Keys of the columns, the most important first: a narrow terminal shows the first ones only."""
CORE = IMPORTANCE[:10]
CRITIC = ("val/explained_variance", "loss/value_avg")
"""Keys of columns that exist only with a critic."""
COMPONENT = re.compile(r"rewards/(.+)/mean")
"""Pattern of the metric of one of several rewards."""


def columns_for(row: Row, width: int, *, critic: bool = True) -> tuple[list[Column], int]:
    """The most important columns that fit `width` characters, in printing order, and the number of spaces between them.

    The columns of CORE may be one space apart; the others are shown only if two spaces remain between all columns.
    """
    known = {column.key: column for column in _columns(row)}
    order = [key for key in _by_importance(known) if critic or key not in CRITIC]
    for keys, gap in ((order, 2), ([key for key in order if key in CORE], 1)):
        widths = itertools.accumulate(known[key].width + gap for key in keys)
        fitting = {key for key, end in zip(keys, widths, strict=True) if end - gap <= width} or {keys[0]}
        if gap == 1 or fitting.issuperset(key for key in order if key in CORE):
            return [column for column in known.values() if column.key in fitting], gap
    raise AssertionError("the second round always returns")


def _columns(row: Row) -> list[Column]:
    """COLUMNS with the width of the run's number of steps, and after the reward a column for each of several rewards."""
    steps = 2 * len(str(row["steps"])) + 1
    found = [key for key in row if COMPONENT.fullmatch(key)]
    parts = []
    for key in found if len(found) > 1 else []:
        title = key.split("/")[1]
        title = title if len(title) <= 12 else f"{title[:11]}…"
        parts.append(Column(key, title, max(6, len(title)), 3))
    made = [column._replace(width=max(4, steps)) if column.key == "step" else column for column in COLUMNS]
    place = [column.key for column in made].index("objective/scores") + 1
    return [*made[:place], *parts, *made[place:]]


def _by_importance(known: Mapping[str, Column]) -> list[str]:
    """The keys of all columns; the means of several rewards come right after CORE."""
    parts = [key for key in known if key not in IMPORTANCE]
    return [*CORE, *parts, *IMPORTANCE[len(CORE) :]]


def header(columns: Sequence[Column], gap: int) -> str:
    """The line of titles."""
    return (" " * gap).join(column.title.rjust(column.width) for column in columns)


def cells(row: Row, columns: Sequence[Column], gap: int) -> str:
    """The line of an update."""
    return (" " * gap).join(cell(row, column).rjust(column.width) for column in columns)


def log_line(row: Row, *, critic: bool = True) -> str:
    """The line of an update for a log: names and values of the columns of CORE, each at the same place in every line."""
    columns = [column for column in _columns(row) if column.key in CORE and (critic or column.key not in CRITIC)]
    return "  ".join(f"{column.name or column.title} {cell(row, column):>{column.width}}" for column in columns)


def cell(row: Row, column: Column) -> str:
    """The text of a value; MISSING if the row has none."""
    if column.key == "step":
        return f"{row['step']}/{row['steps']}"
    value = row.get(column.key)
    if value is None:
        return MISSING
    if column.key == "left":
        return time_text(value)
    if column.key == "objective/scores":
        spread = row.get("objective/scores_std")
        mean = number(value, 6, column.decimals)
        return mean if spread is None else f"{mean} ±{number(spread, 6, column.decimals):<6}"
    return number(value, column.width, column.decimals)


def number(value: float, width: int, decimals: int | None) -> str:
    """A number in at most `width` characters (5 or more; 6 if it may be negative), with `decimals` decimals if they fit.

    A number that would lose all its digits, one that is too long, and every number if decimals is None, is written as
    2.5e-4.
    """
    if not math.isfinite(value):
        return str(value)
    if abs(value) < 1e-99:
        value = 0.0
    fixed = ["0"] * (not value) if decimals is None else [f"{value:.{digits}f}" for digits in range(decimals, -1, -1)]
    fixed = [text for text in fixed if float(text) or not value]
    short = [f"{value:.{digits}e}" for digits in (2, 1, 0)]
    short = [re.sub(r"e([+-])0*(\d+)", lambda found: f"e{found[1].strip('+')}{found[2]}", text) for text in short]
    return next((text for text in [*fixed, *short] if len(text) <= width), short[-1])


def time_text(seconds: float) -> str:
    """A time in at most five characters: 7:05 (minutes and seconds), 2h05m, 17 h or 12 d."""
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02}"
    if whole < 36_000:
        return f"{whole // 3600}h{whole % 3600 // 60:02}m"
    if whole < 172_800:
        return f"{round(whole / 3600)} h"
    days = round(whole / 86_400)
    return f"{days} d" if days < 1000 else f"{min(days // 365, 999)} y"
