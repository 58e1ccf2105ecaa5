"""Numbers and foreign text → what a page or a Markdown file can hold: the report's filters."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

LONGEST = 4000
"""Characters of a prompt or an answer that are shown."""


def fixed(value: Any) -> str:
    """A score: three decimals, so that a column of them lines up; one from 1,000 on."""
    text = f"{value:,.{3 if abs(value) < 1000 else 1}f}" if is_number(value) else "–"
    return text.replace("-", "−") if text.strip("-0.") else text.lstrip("-")


def number(value: Any) -> str:
    """Any quantity, its size unknown: three figures or so, with a true minus sign; a dash where there is no number."""
    if not is_number(value):
        return "–"
    if isinstance(value, int):
        return f"{value:,}".replace("-", "−")
    size = abs(value)
    if 1e-4 <= size < 0.1:
        return f"{value:.3g}".replace("-", "−")
    text = f"{value:.{3 if size < 10 else 1 if size < 1000 else 0}f}" if size >= 1e-3 or size == 0 else f"{value:.1e}"
    return text.replace("-", "−")


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def estimate(value: Mapping[str, Any]) -> str:
    return f"{fixed(value['mean'])} [{fixed(value['low'])}, {fixed(value['high'])}]"


def signed(value: Mapping[str, Any]) -> str:
    mean, low, high = (("+" if value[key] > 0 else "") + fixed(value[key]) for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def p_value(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def tidy(text: str, longest: int = LONGEST) -> str:
    """Text safe to write anywhere: control characters as their pictures, lone surrogates as ?, cut at `longest`, the
    rest counted.
    """
    text = text.replace("\r\n", "\n").encode("utf-8", "replace").decode("utf-8")
    text = re.sub(r"[\x00-\x08\x0b-\x1f]", lambda found: chr(0x2400 + ord(found[0])), text)
    return text if len(text) <= longest else f"{text[:longest]}… ({len(text) - longest:,} more characters)"


def fence(text: str, language: str = "text") -> str:
    """A Markdown code block that its content cannot close: its fence is longer than any run of backticks inside."""
    marks = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    return f"{marks}{language}\n{text}\n{marks}"


def markdown(text: Any) -> str:
    """One line of plain text as Markdown that renders as itself, also in a table's cell."""
    return re.sub(r"([\\`*_\[\]<>|~$&])", r"\\\1", re.sub(r"\s+", " ", str(text)))


def flatten(values: Mapping[str, Any], path: str = "") -> list[tuple[str, str]]:
    """A stage's metrics as rows: nested keys joined by dots, estimates with their intervals."""
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        here = f"{path}.{key}" if path else str(key)
        if isinstance(value, Mapping) and {"mean", "low", "high"} <= value.keys():
            rows.append((here, f"{estimate(value)}, n = {number(value.get('n'))}"))
        elif isinstance(value, Mapping):
            rows += flatten(value, here)
        elif isinstance(value, list | tuple):
            rows.append(
                (here, tidy(", ".join(number(one) if isinstance(one, int | float) else str(one) for one in value)))
            )
        else:
            rows.append(
                (
                    here,
                    number(value)
                    if isinstance(value, int | float) and not isinstance(value, bool)
                    else tidy(str(value)),
                )
            )
    return rows


def finite(value: Any) -> Any:
    """The same JSON without NaN or infinity (null in their place) and without lone surrogates."""
    if isinstance(value, Mapping):
        return {str(key): finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    return None if isinstance(value, float) and not math.isfinite(value) else value


def file_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text)


FILTERS = {
    "number": number,
    "fixed": fixed,
    "est": estimate,
    "signed": signed,
    "percent": percent,
    "p": p_value,
    "tidy": tidy,
    "md": markdown,
    "fence": fence,
}
