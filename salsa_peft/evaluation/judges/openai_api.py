"""A judge behind an OpenAI-compatible endpoint, asked through the package openai.

The client itself retries rate limits, server errors, timeouts and broken connections, and waits as long as a
Retry-After header says. This module adds a limit of simultaneous requests, a budget of requests, and the distinction
between errors that concern one comparison and errors that concern all of them.
"""

import asyncio
import json
import os
import re
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

import openai

from salsa_peft.config.judge import Judge
from salsa_peft.evaluation.judges.cache import Reply
from salsa_peft.evaluation.judges.chat import CALLS, Messages, Outcome
from salsa_peft.utils.errors import SalsaError, require
from salsa_peft.utils.messages import one_line

PATIENCE = 10
"""Number of requests in a row without an answer after which the endpoint is taken to be down."""
LONGEST_WAIT = 120
"""Longest Retry-After, in seconds, that the client waits for; a longer one stops the judge."""
NO_KEY = "none"
DEFAULT = "https://api.openai.com/v1"
"""Address that the client uses by default. The environment variable OPENAI_BASE_URL overrides it."""
NO_COMPLETION = 599
"""Status given to a successful response without a chat completion (an HTML page, an error), so that the client retries
the request."""
RETRIES = "x-stainless-retry-count"
"""Header in which the client counts the retries of a request."""
NEW_LIMIT = "max_completion_tokens"
"""Name of the parameter max_tokens in the API of OpenAI's newer models."""
TRY = "check that the endpoint is up, then run again: the replies received so far are kept"
TOO_LONG = re.compile(
    r"context[ _]?(length|window|size)|maximum (context|sequence|input|model)|too (long|many tokens|large)|exceeds? .{0,40}(tokens|length)",
    re.IGNORECASE,
)
STOPS: dict[int | str, str] = {401: "key", 403: "key", 402: "account", 404: "model", 405: "model", "insufficient_quota": "account",
                               "model_not_found": "model", "unsupported_parameter": "parameter", "unsupported_value": "parameter"}  # fmt: skip
"""HTTP status or error code → the cause that makes every request fail."""


class BudgetSpentError(openai.OpenAIError):
    """Raised if the run has sent as many requests as `evaluate.judge.budget` allows.

    It derives from OpenAIError because the client does not retry after an OpenAIError.
    """


class Endpoint:
    """Chat backend that sends requests to the endpoint and counts them in `calls`.

    Raises SalsaError if every further request would fail too: a wrong key or model, an exhausted account, an endpoint
    that is down.
    """

    def __init__(self, section: Judge, where: str = "evaluate.judge") -> None:
        self.section, self.where, self.calls = section, where, dict.fromkeys(CALLS, 0)
        self.key = os.environ.get(section.api_key_env, "").strip() or NO_KEY
        require(
            self.key.isascii() and self.key.isprintable() and " " not in self.key,
            f"{self.where}.api_key_env: the key in {section.api_key_env} must be printable ASCII without spaces, as HTTP"
            " headers require; correct this environment variable",
        )
        self.base_url = section.base_url or os.environ.get("OPENAI_BASE_URL") or DEFAULT
        base = urlsplit(self.base_url)
        self.endpoint = base._replace(netloc=base.netloc.rpartition("@")[2], query="", fragment="").geturl().rstrip("/")
        self.limit = "max_tokens"
        self.answered, self.failed, self.last = 0, 0, ""

    @property
    def address(self) -> tuple[str, str]:
        return self.endpoint, str(self.section.model)

    def __call__(self, requests: Mapping[str, Messages], done: Callable[[dict[str, Outcome]], None]) -> None:
        asyncio.run(self._ask_all(requests, done))

    async def _ask_all(self, requests: Mapping[str, Messages], done: Callable[[dict[str, Outcome]], None]) -> None:
        """Send all requests with `concurrency` workers, each of which takes the next request."""
        waiting, errors = iter(requests.items()), []

        async def work(client: openai.AsyncOpenAI) -> None:
            for key, messages in waiting:
                done({key: await self._ask(client, messages)})

        http = openai.DefaultAsyncHttpxClient(
            event_hooks={"request": [self._count], "response": [self._check_response]}
        )
        async with openai.AsyncOpenAI(
            api_key=self.key, base_url=self.base_url, max_retries=self.section.retries, timeout=self.section.timeout, http_client=http
        ) as client:  # fmt: skip
            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(min(self.section.concurrency, len(requests))):
                        group.create_task(work(client))
            except* SalsaError as found:
                errors = [error for error in found.exceptions if isinstance(error, SalsaError)]
        if errors:
            raise errors[0] from None
        require(
            self.answered > 0 or self.failed == 0,
            f"{self.where}: {self.endpoint} gave no answer to any of {self.failed} requests (last problem: {self.last});"
            f" {TRY}",
        )

    async def _ask(self, client: openai.AsyncOpenAI, messages: Messages, retries: int = 0) -> Outcome:
        """Send one request, with the client's retries."""
        section, limit = self.section, self.limit
        options: dict[str, Any] = {"model": section.model, "messages": messages, "temperature": section.temperature}
        options |= {limit: section.max_tokens} | ({"extra_headers": {RETRIES: str(retries)}} if retries else {})
        try:
            found = await client.chat.completions.with_raw_response.create(**options)
        except BudgetSpentError:
            return Outcome(None, f"not asked: the budget of {section.budget} requests is used up")
        except openai.APIStatusError as error:
            if error.status_code in (400, 422) and NEW_LIMIT in error.message and limit != NEW_LIMIT:
                self.limit = NEW_LIMIT
                return await self._ask(client, messages, retries=1)
            return self._refused(error)
        except (openai.APITimeoutError, TimeoutError):
            return self._unanswered(f"timeout after {section.timeout:g} s")
        except openai.APIConnectionError as error:
            cause = error.__cause__
            return self._unanswered(f"no connection ({self._line(str(cause) or type(cause).__name__)})")
        reply = reply_of(found.content)
        assert reply is not None  # ensured by _check_response
        self.answered, self.failed = self.answered + 1, 0
        return Outcome(reply._replace(text=self._clean(reply.text)))

    async def _count(self, request: Any) -> None:
        """Count a request or retry before it is sent. Raises BudgetSpentError if the budget is used up."""
        sent = self.calls["asked"] + self.calls["retried"]
        if self.section.budget is not None and sent >= self.section.budget:
            raise BudgetSpentError
        self.calls["asked" if request.headers[RETRIES] == "0" else "retried"] += 1

    async def _check_response(self, response: Any) -> None:
        """Make the client retry a response without a completion, but not one about an exhausted account."""
        async with asyncio.timeout(self.section.timeout):  # the client's own timeout starts anew with every byte
            await response.aread()
        if response.is_success and reply_of(response.content) is None:
            response.status_code = NO_COMPLETION
        if b"insufficient_quota" in response.content:  # sent as a rate limit, but waiting does not help
            response.headers["x-should-retry"] = "false"

    def _refused(self, error: openai.APIStatusError) -> Outcome:
        """Outcome of a comparison after an HTTP error. Raises SalsaError if every comparison would fail."""
        status, code = error.status_code, str(error.code or "")
        problem = "no chat completion in the response" if status == NO_COMPLETION else f"HTTP {status}"
        if status != 401:  # OpenAI's message about a wrong key quotes parts of the key
            problem += f" ({self._line(error.message.removeprefix(f'Error code: {status} - '))})"
        mend = {
            "key": f"set the environment variable {self.section.api_key_env} to a key that this endpoint accepts",
            "model": f"check {self.where}.model and {self.where}.base_url (which usually ends in /v1)",
            "account": "check the account; the replies received so far are kept, and the next run asks for the rest",
            "parameter": f"set temperature and max_tokens in {self.where} to values that this model accepts",
        }
        wrong = STOPS.get(code) or STOPS.get(status)
        if wrong is not None:
            raise SalsaError(f"{self.where}: {self.endpoint}, model {self.section.model}: {problem}; {mend[wrong]}")
        wait = error.response.headers.get("retry-after", "")
        require(
            not wait.isdigit() or int(wait) <= LONGEST_WAIT,
            f"{self.where}: {self.endpoint}: {problem}, and the endpoint asks to wait {wait} s; run again later: the replies"
            " received so far are kept",
        )
        if status == 413 or (status in (400, 422) and TOO_LONG.search(error.message)):
            return Outcome(None, "the prompt is too long for the judge")
        return (
            Outcome(None, "the endpoint's content filter refused the prompt")
            if code == "content_filter"
            else self._unanswered(problem)
        )

    def _unanswered(self, problem: str) -> Outcome:
        self.failed, self.last = self.failed + 1, problem
        require(
            self.failed < PATIENCE,
            f"{self.where}: {self.endpoint} gave no answer to {self.failed} requests in a row (last problem: {problem});"
            f" {TRY}",
        )
        return Outcome(None, f"no answer: {problem}")

    def _clean(self, text: str) -> str:
        """The text without the API key, which an endpoint may send back."""
        return text if self.key == NO_KEY else text.replace(self.key, "[key]")

    def _line(self, text: str) -> str:
        problem = one_line(self._clean(text))
        return problem if len(problem) <= 200 else f"{problem[:199]}…"


def reply_of(body: bytes) -> Reply | None:
    """The reply in the JSON of a chat completion; None for anything else."""
    try:
        found = json.loads(body)
        choice, used = found["choices"][0], found.get("usage") or {}
        text = choice["message"].get("content") or ""
        tokens = [int(used.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")]
        return Reply(text, str(choice.get("finish_reason") or ""), *tokens) if isinstance(text, str) else None
    except (AttributeError, LookupError, TypeError, ValueError):
        return None
