"""A judge behind any endpoint that speaks OpenAI's chat protocol: so many requests at once, patience with one that stumbles, a budget.

The key is read from the environment, sent in the Authorization header and nowhere else; what the endpoint says is cleaned of it before it
reaches a message, a log or the cache. Left out: the package's own retries (they would not count), streaming, OpenAI's batch service.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

import openai

from salsa_peft.chat_judge import Messages, Outcome
from salsa_peft.config.judge import Judge
from salsa_peft.endpoint_errors import Trouble, trouble_of
from salsa_peft.judge_cache import Reply
from salsa_peft.utils.errors import SalsaError, require

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
