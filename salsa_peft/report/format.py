"""Filters of the report's templates, which format numbers and untrusted text for HTML and Markdown."""

import math
import re
from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

Row = Mapping[str, Any]
"""A JSON object."""
LONGEST = 4000
"""Maximum number of characters that are shown of a prompt or an answer."""


def fixed(value: Any) -> str:
    """A score with three decimals, so that a column of scores lines up; one decimal from 1,000 on."""
    text = f"{value:,.{3 if abs(value) < 1000 else 1}f}" if is_number(value) else "–"
    return text.replace("-", "−") if text.strip("-0.") else text.lstrip("-")


def number(value: Any) -> str:
    """A quantity rounded for reading, with a true minus sign; a dash if it is not a finite number."""
    if not is_number(value):
        return "–"
    size = abs(value)
    if isinstance(value, int):
        text = f"{value:,}"
    elif 1e-4 <= size < 0.1:
        text = f"{value:.3g}"
    elif size >= 0.1 or size == 0:
        text = f"{value:.{3 if size < 10 else 1 if size < 1000 else 0}f}"
    else:
        text = f"{value:.1e}"
    return text.replace("-", "−")


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def estimate(value: Row) -> str:
    return f"{fixed(value['mean'])} [{fixed(value['low'])}, {fixed(value['high'])}]"


def signed(value: Row) -> str:
    mean, low, high = (("+" if value[key] > 0 else "") + fixed(value[key]) for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def rate_of(pair: Row) -> dict[str, float]:
    """The adjusted win rate of a result and the bounds of its interval, without the other keys."""
    return {key: pair[key] for key in ("adjusted_win_rate", "low", "high")}


def duration(seconds: float) -> str:
    """Seconds as text, in minutes or hours where that is shorter."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def p_value(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def tidy(text: str, longest: int = LONGEST) -> str:
    """Text cut at `longest` characters, with control characters made visible and lone surrogates replaced."""
    text = text.replace("\r\n", "\n").encode("utf-8", "replace").decode("utf-8")
    text = re.sub(r"[\x00-\x08\x0b-\x1f]", lambda found: chr(0x2400 + ord(found[0])), text)
    return text if len(text) <= longest else f"{text[:longest]}… ({len(text) - longest:,} more characters)"


def fence(text: str, language: str = "text") -> str:
    """A Markdown code block whose fence is longer than any run of backticks in the text."""
    marks = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    return f"{marks}{language}\n{text}\n{marks}"


def markdown(text: Any) -> str:
    """Plain text escaped for Markdown and put on one line, so that it fits into a table's cell."""
    return re.sub(r"([\\`*_\[\]<>|~$&])", r"\\\1", re.sub(r"\s+", " ", str(text)))


def flatten(values: Row, path: str = "") -> list[tuple[str, str]]:
    """Rows (key, text) of a stage's metrics: nested keys are joined by dots, estimates have intervals."""

    def text(value: Any) -> str:
        return number(value) if isinstance(value, int | float) and not isinstance(value, bool) else str(value)

    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        here = f"{path}.{key}" if path else str(key)
        if isinstance(value, Mapping) and {"mean", "low", "high"} <= value.keys():
            rows.append((here, f"{estimate(value)}, n = {number(value.get('n'))}"))
        elif isinstance(value, Mapping):
            rows += flatten(value, here)
        else:
            rows.append((here, tidy(", ".join(map(text, value)) if isinstance(value, list | tuple) else text(value))))
    return rows


def finite(value: Any) -> Any:
    """JSON data with NaN and infinity replaced by null, and without lone surrogates."""
    if isinstance(value, Mapping):
        return {str(key): finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    return None if isinstance(value, float) and not math.isfinite(value) else value


def file_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text)


FILTERS = (number, fixed, estimate, signed, percent, duration, p_value, tidy, markdown, fence)


def render(template: str, **context: Any) -> str:
    """Render a template of templates/ with FILTERS, without trailing white space; HTML is escaped."""
    environment = Environment(
        loader=PackageLoader("salsa_peft.report"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=lambda name: bool(name and "html" in name),
    )
    environment.filters |= {one.__name__: one for one in FILTERS}
    return environment.get_template(template).render(context).rstrip()
