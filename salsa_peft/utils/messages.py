"""Text for messages: values on one line, the nearest known name, pydantic's errors, durations.

torch is not imported.
"""

import difflib
import re
from collections.abc import Sequence
from typing import Any

TYPES = {
    "float_type": "a number", "float_parsing": "a number", "finite_number": "a finite number", "int_type": "a whole number",
    "int_parsing": "a whole number", "int_from_float": "a whole number", "int_parsing_size": "a smaller whole number",
    "bool_type": "true or false", "bool_parsing": "true or false", "string_type": "text", "list_type": "a list",
    "dict_type": "a mapping {NAME: value, …}", "dataclass_type": "a mapping {key: value, …}",
    "dataclass_exact_type": "a mapping {key: value, …}", "none_required": "null",
}  # fmt: skip
"""pydantic's error type → text that says what the value must be."""
BOUNDS = {"greater_than": ("gt", "more than"), "greater_than_equal": ("ge", "at least"), "less_than": ("lt", "less than"),
          "less_than_equal": ("le", "at most")}  # fmt: skip
"""pydantic's error type → the name of the bound in the error's context, and the comparison as text."""

IS_REQUIRED = "is required; add it"
"""Message about a key without a default that is missing."""


def short(value: Any) -> str:
    """The repr of a value; a repr of more than 60 characters is cut to 58."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


def difference(old: str, new: str, width: int = 60) -> str:
    """Two texts as `old → new`; if one is longer than `width`, the part of each around their first difference."""
    pairs = enumerate(zip(old, new, strict=False))
    first = next((place for place, (one, other) in pairs if one != other), min(len(old), len(new)))
    start = max(0, first - width // 3) if max(len(old), len(new)) > width else 0
    parts = [text[start : start + width] + "…" * (len(text) > start + width) for text in (old, new)]
    return " → ".join("…" * (start > 0) + part for part in parts)


def listed(words: Sequence[str], most: int = 3) -> str:
    """The first `most` words, joined by commas, and the number of the others."""
    return ", ".join(words[:most]) + (f" and {len(words) - most} more" if len(words) > most else "")


def describe(value: Any) -> str:
    """A JSON value as text: null, the number 4, an object with the keys a, b."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int | float):
        return f"the number {value!r:.40}"
    if isinstance(value, dict):
        return f"an object with the keys {one_line(', '.join(map(str, value)))[:60]}" if value else "an empty object"
    if isinstance(value, list):
        return f"the list {one_line(short(value))}" if value else "an empty list"
    return one_line(short(value))


def short_path(path: str) -> str:
    """The repr of a path; a long one is shortened at its beginning."""
    text = repr(path)
    return text if len(text) <= 160 else f"'…{text[-158:]}"


def one_line(message: object) -> str:
    """The message without line breaks and control characters."""
    return "".join(char if char.isprintable() else " " for char in " ".join(str(message).split()))


def did_you_mean(found: str, known: list[str], what: str = "known keys") -> str:
    """Suggestion of the known name nearest to `found`, or else a list of all known names or of the 30 nearest."""
    spelled = {name.lower(): name for name in known} | {name: name for name in known}
    close = [spelled[name] for name in difflib.get_close_matches(found, spelled, n=1, cutoff=0.6)]
    close = close or [spelled[name] for name in difflib.get_close_matches(found.lower(), spelled, n=1, cutoff=0.6)]
    names = known if len(known) <= 30 else difflib.get_close_matches(found, known, n=len(known), cutoff=0.0)
    return f"did you mean {close[0]}?" if close else f"{what}: {listed(names, 30) or 'none'}"


def explain_validation_error(error: dict[str, Any]) -> tuple[str, str]:
    """The key of one pydantic error, and what is wrong with its value."""
    key = ""
    for part in error["loc"]:
        if isinstance(part, int):
            key += f"[{part}]"
        elif not re.match(r"(list|dict|literal)\[|function-|constrained-|(str|int|float)\Z", part):
            part = part if part.isprintable() and len(part) <= 80 else short(part)
            key += f".{part}" if key else part
    kind, context, value = error["type"], error.get("ctx", {}), error["input"]
    if kind in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return key, IS_REQUIRED
    if kind == "own_message":
        return key, error["msg"]
    found = describe(value) if value is None or isinstance(value, bool) else short(value)
    if kind == "list_type" and isinstance(value, str | int | float):
        return key, f"must be a list, not {found}; write [{value!s:.60}]"
    if kind in TYPES:
        return key, f"must be {TYPES[kind]}, not {found}"
    if kind in BOUNDS:
        name, words = BOUNDS[kind]
        return key, f"must be {words} {context[name]:g}, not {found}"
    if kind == "too_short":
        return key, f"must have at least {context['min_length']} entry, not {found}"
    if kind == "literal_error":
        known = re.findall(r"'([^']*)'", context["expected"])
        close = difflib.get_close_matches(str(value).lower(), known, n=1)
        words = " or ".join(filter(None, (", ".join(known[:-1]), known[-1])))
        return key, f"must be {words}, not {found}" + (f"; did you mean {close[0]}?" if close else "")
    return key or "recipe", f"{found} is not valid: {one_line(error['msg'])}"


def duration(seconds: float) -> str:
    """A duration as text: 0.0042 s, 9.5 s, 12 s, 3:05 or 1:02:03."""
    whole = round(seconds)
    if 0 < seconds < 0.095:  # would be 0.0 s, or 0.1 s with one digit
        return f"{seconds:.2g} s" if seconds >= 0.0001 else "less than 0.0001 s"
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"


def number_in_name(value: float) -> str:
    """A number as text for a policy's name: in the format %g if exact, else in full; without a plus sign."""
    text = f"{value:g}"
    return (text if float(text) == value else repr(value)).replace("+", "")
