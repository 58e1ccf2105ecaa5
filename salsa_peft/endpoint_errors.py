"""What an error of an OpenAI-compatible endpoint means: try again, leave this game out, or stop. Needs the package openai."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from email.utils import parsedate_to_datetime
from typing import Literal, NamedTuple

import openai

from salsa_peft.utils.messages import one_line

Kind = Literal["again", "refused", "failed", "limit", "key", "model", "account", "parameter"]
AGAIN = (408, 409, 425, 429)
"""And everything from 500 on."""
STOP: dict[int, Kind] = {401: "key", 402: "account", 403: "key", 404: "model", 405: "model"}
CODES: dict[str, Kind] = {
    "insufficient_quota": "account",
    "model_not_found": "model",
    "unsupported_parameter": "parameter",
    "unsupported_value": "parameter",
}
TOO_LONG = re.compile(
    r"context[ _]?(length|window|size)|maximum (context|sequence|input|model)|too (long|many tokens|large)|exceeds? .{0,40}(tokens|length)",
    re.IGNORECASE,
)
LIMIT = re.compile(r"max_completion_tokens")


class Trouble(NamedTuple):
    """Why there is no reply."""

    kind: Kind
    """again: a retry may mend it. refused: this request, whatever is done. failed: no retry helps, and why is not known. limit: the
    endpoint knows max_tokens by another name. Else what stops the judge: key, model, account, parameter."""
    said: str
    wait: float | None = None
    """Seconds that the endpoint asks to wait."""


def trouble_of(error: Exception, clean: Callable[[str], str]) -> Trouble:
    """An exception of the package (or a time-out, or a body that is no JSON) → what to do; `clean` takes the key out of text."""
    if isinstance(error, TimeoutError | openai.APITimeoutError):
        return Trouble("again", "a time-out")
    if isinstance(error, openai.APIConnectionError):
        cause = error.__cause__
        return Trouble("again", f"no connection ({_line(str(cause) or type(cause).__name__, clean)})")
    if not isinstance(error, openai.APIStatusError):
        return Trouble("again", f"a body that can't be read ({type(error).__name__})")
    status, code = error.status_code, str(error.code or "")
    said = f"HTTP {status}"
    if status != 401:  # OpenAI's names the key's ends
        said += f" ({_line(error.message.removeprefix(f'Error code: {status} - '), clean)})"
    if code in CODES and not (code == "unsupported_parameter" and LIMIT.search(error.message)):
        return Trouble(CODES[code], said)
    if status in AGAIN or status >= 500:
        return Trouble("again", said, _wait(error.response.headers))
    if status in STOP:
        return Trouble(STOP[status], said)
    if status in (400, 422) and LIMIT.search(error.message):
        return Trouble("limit", said)
    if status == 413 or TOO_LONG.search(error.message):
        return Trouble("refused", "its prompt is too long for the judge")
    if code == "content_filter":
        return Trouble("refused", "the endpoint's filter refused it")
    return Trouble("failed", said)


def _line(text: str, clean: Callable[[str], str]) -> str:
    said = one_line(clean(text))
    return said if len(said) <= 200 else f"{said[:199]}…"


def _wait(headers: Mapping[str, str]) -> float | None:
    """Retry-After: seconds or a date; retry-after-ms before it."""
    milliseconds, value = headers.get("retry-after-ms"), headers.get("retry-after")
    try:
        if milliseconds is not None:
            return max(0.0, float(milliseconds) / 1000)
        return None if value is None else max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(str(value)).timestamp() - time.time())
    except ValueError:
        return None
