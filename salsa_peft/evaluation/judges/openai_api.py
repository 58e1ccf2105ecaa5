"""A judge at an OpenAI-compatible endpoint, and what its errors mean: try again, leave the game out, or stop. Needs the package openai."""

from __future__ import annotations

import asyncio
import os
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping
from email.utils import parsedate_to_datetime
from typing import Any, Literal, NamedTuple
from urllib.parse import urlsplit

import openai

from salsa_peft.config.judge import Judge
from salsa_peft.evaluation.judges.cache import Reply
from salsa_peft.evaluation.judges.chat import Messages, Outcome
from salsa_peft.utils.errors import SalsaError, require
from salsa_peft.utils.messages import one_line

WHERE = "evaluate.judge"
PAUSE, LONGEST_PAUSE, LONGEST_WAIT = 0.5, 60.0, 600.0
"""Seconds: before the first try again (then doubled), at most, and what an endpoint may ask to wait."""
PATIENCE = 10
"""Requests in a row that no retry mended, after which the endpoint counts as gone."""
NO_KEY = "none"
DEFAULT = "https://api.openai.com/v1"
"""The package's own; OPENAI_BASE_URL goes before it, as there."""


class Endpoint:
    """Asks requests; counts them in `calls`. Raises SalsaError where going on is of no use: the key, the model, an endpoint that is gone."""

    def __init__(self, section: Judge, calls: dict[str, int]) -> None:
        self.section, self.calls = section, calls
        self.key = os.environ.get(section.api_key_env, "").strip() or NO_KEY
        require(
            self.key.isascii() and self.key.isprintable() and " " not in self.key,
            f"{WHERE}.api_key_env: found a key in {section.api_key_env} that no header can carry, expected printable ASCII without spaces",
        )
        self.base_url = section.base_url or os.environ.get("OPENAI_BASE_URL") or DEFAULT
        base = urlsplit(self.base_url)
        self.endpoint = base._replace(netloc=base.netloc.rpartition("@")[2], query="", fragment="").geturl().rstrip("/")
        self.limit = "max_tokens"
        """What the endpoint calls it; OpenAI's newer models say max_completion_tokens."""
        self.sent, self.answered, self.failed = 0, 0, 0
        self.last, self.not_before = "", 0.0
        self.jitter = random.Random()

    @property
    def address(self) -> tuple[str, str]:
        return self.endpoint, str(self.section.model)

    def __call__(self, requests: Mapping[str, Messages], done: Callable[[dict[str, Outcome]], None]) -> None:
        asyncio.run(self._all(requests, done))

    async def _all(self, requests: Mapping[str, Messages], done: Callable[[dict[str, Outcome]], None]) -> None:
        """`concurrency` workers, each taking the next request."""
        waiting, errors, self.not_before = iter(requests.items()), [], 0.0
        options = {"api_key": self.key, "base_url": self.base_url, "max_retries": 0, "timeout": self.section.timeout}  # fmt: skip
        async with openai.AsyncOpenAI(**options) as client:  # type: ignore[arg-type]
            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(min(self.section.concurrency, len(requests))):
                        group.create_task(self._work(client, waiting, done))
            except* SalsaError as found:
                errors = [error for error in found.exceptions if isinstance(error, SalsaError)]
        if errors:
            raise errors[0] from None
        require(
            self.answered > 0 or self.failed == 0,
            f"{WHERE}: {self.endpoint}: found no answer to any of {self.failed} requests, the last time {self.last}; {TRY}",
        )

    async def _work(self, client: openai.AsyncOpenAI, waiting: Iterator[tuple[str, Messages]],
                    done: Callable[[dict[str, Outcome]], None]) -> None:  # fmt: skip
        for key, messages in waiting:
            done({key: await self._ask(client, messages)})

    async def _ask(self, client: openai.AsyncOpenAI, messages: Messages) -> Outcome:
        """One request, tried again while that can help."""
        tries = 0
        while True:
            await self._pause()
            if self.section.budget is not None and self.sent >= self.section.budget:
                return Outcome(None, f"not asked: the budget of {self.section.budget} requests is used up")
            self.sent += 1
            self.calls["retried" if tries else "asked"] += 1
            limit = self.limit
            found = await self._send(client, messages, limit)
            if isinstance(found, Reply):
                self.answered, self.failed = self.answered + 1, 0
                return Outcome(found)
            if found.kind == "limit" and limit == "max_tokens":
                self.limit, tries = "max_completion_tokens", tries + 1
                continue
            self._stop_if(found)
            if found.kind == "refused":
                return Outcome(None, found.said)
            if found.kind != "again" or tries >= self.section.retries:
                return self._given_up(found)
            await self._wait(tries, found.wait)
            tries += 1

    async def _send(self, client: openai.AsyncOpenAI, messages: Messages, limit: str) -> Reply | Trouble:
        section = self.section
        asked: dict[str, Any] = {"model": section.model, "messages": messages, "temperature": section.temperature, limit: section.max_tokens}  # fmt: skip
        try:
            async with asyncio.timeout(section.timeout):  # the package's own starts anew with every byte
                found = await client.chat.completions.create(**asked)
        except (openai.OpenAIError, TimeoutError, ValueError) as error:  # ValueError: a body that is no JSON
            return trouble_of(error, self._clean)
        reply = _reply(found)
        if reply is None:
            return Trouble("again", self._clean(f"no chat completion ({found!r:.100})"))
        return reply._replace(text=self._clean(reply.text))

    def _clean(self, text: str) -> str:
        """Without the key, which an endpoint may send back."""
        return text if self.key == NO_KEY else text.replace(self.key, "[key]")

    def _stop_if(self, found: Trouble) -> None:
        mend = {
            "key": f"set the environment variable {self.section.api_key_env} to a key that this endpoint takes",
            "model": f"check {WHERE}.model and {WHERE}.base_url (which mostly ends in /v1)",
            "account": "see to the account; what was answered is kept, and the next run asks the rest",
            "parameter": f"set {WHERE} to what this model takes (temperature, max_tokens)",
        }
        if found.kind in mend:
            raise SalsaError(
                f"{WHERE}: {self.endpoint}, model {self.section.model}: found {found.said}, expected an answer; {mend[found.kind]}"
            )
        require(
            (found.wait or 0) <= LONGEST_WAIT,
            f"{WHERE}: {self.endpoint}: found {found.said} and a wait of {found.wait or 0:.0f} s, expected at most {LONGEST_WAIT:.0f};"
            " run again later: what was answered is kept",
        )

    def _given_up(self, found: Trouble) -> Outcome:
        self.failed, self.last = self.failed + 1, found.said
        require(
            self.failed < PATIENCE,
            f"{WHERE}: {self.endpoint}: found no answer to {self.failed} requests in a row, the last time {found.said}; {TRY}",
        )
        return Outcome(None, f"no answer: {found.said}")

    async def _wait(self, tries: int, asked: float | None) -> None:
        """Before a try again. Where the endpoint said how long, all requests wait."""
        loop = asyncio.get_running_loop()
        if asked is not None:
            self.not_before = max(self.not_before, loop.time() + asked)
        await asyncio.sleep(min(LONGEST_PAUSE, PAUSE * 2**tries) * self.jitter.uniform(0.5, 1.0))

    async def _pause(self) -> None:
        loop = asyncio.get_running_loop()
        while loop.time() < self.not_before:
            await asyncio.sleep(self.not_before - loop.time() + self.jitter.uniform(0, 0.02))


TRY = "expected one that answers; check that it is up, then run again: what was answered is kept"


def _reply(found: Any) -> Reply | None:
    """A chat completion → what was said; None for what is none (a page in HTML, an error sent as a success)."""
    try:
        choice = found.choices[0]
        said = choice.message.content if choice.message.content is not None else ""
        used = found.usage
        tokens = (0, 0) if used is None else (int(used.prompt_tokens or 0), int(used.completion_tokens or 0))
    except (AttributeError, IndexError, TypeError, ValueError):
        return None
    return Reply(said, str(choice.finish_reason or ""), *tokens) if isinstance(said, str) else None


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
