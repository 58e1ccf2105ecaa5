"""A chat model as judge: renders prompts, sends requests, caches replies and reads their verdicts.

The judge works in rounds: first it asks about every comparison, then again about those whose reply had no verdict. The
backend (an endpoint or a model in this process) gets distinct requests that are not in the cache, and returns each
reply as soon as it arrives.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from salsa_peft.config.judge import Judge
from salsa_peft.evaluation.judges.cache import Cache, Reply, key_of
from salsa_peft.evaluation.judges.parsing import read_verdict
from salsa_peft.evaluation.judges.prompts import REMINDER, Comparison, JudgePrompt, Verdict, renderer

Messages = list[dict[str, str]]
CALLS = ("asked", "cached", "retried", "prompt_tokens", "completion_tokens")
"""Keys of `calls`, in which a judge counts its requests and tokens."""
NO_VERDICT = "no verdict in the judge's reply"


class Outcome(NamedTuple):
    """A backend's reply to a request, or the reason why the request has no reply."""

    reply: Reply | None
    why: str = ""


class ChatBackend(Protocol):
    """Sends requests to a chat model and counts them."""

    calls: dict[str, int]

    @property
    def address(self) -> tuple[str, str]:
        """Endpoint and model, which are part of a request's key in the cache."""

    def __call__(self, requests: Mapping[str, Messages], done: Callable[[dict[str, Outcome]], None]) -> None:
        """Send all requests; `done` is called with one or several outcomes as soon as they are known."""


class _Pending:
    """A comparison's prompt and its verdict so far."""

    def __init__(self, prompt: JudgePrompt) -> None:
        self.prompt = prompt
        self.verdict = Verdict(None, prompt.user, "", 0)

    def messages(self, again: bool) -> Messages:
        prompt = self.prompt._replace(user=self.prompt.user + REMINDER * again)
        self.verdict = self.verdict._replace(prompt=prompt.user)
        return prompt.messages


class ChatJudge:
    """Judge that asks a chat model. `calls` counts all requests since the judge was created.

    asked: number of requests sent, without retries. retried: number of retries. cached: number of replies found in the
    cache. prompt_tokens, completion_tokens: numbers of tokens in the requests that were sent and in their replies.
    """

    def __init__(self, section: Judge, backend: ChatBackend, cache: Path | None, say: Callable[[str], None]) -> None:
        self.section, self.backend, self.calls, self.say = section, backend, backend.calls, say
        self.cache, self.render = Cache(cache), renderer(section)

    def __call__(self, comparisons: Sequence[Comparison], progress: Callable[[int], None]) -> list[Verdict]:
        everything = pending = [_Pending(self.render(comparison)) for comparison in comparisons]
        for attempt in range(1 + self.section.ask_again):
            pending = self._round(pending, attempt, progress)
        missing = Counter(one.verdict.why for one in everything if one.verdict.winner is None)
        if missing:
            reasons = ", ".join(f"{count}: {why}" for why, count in missing.most_common())
            self.say(
                f"{missing.total()} of {len(everything)} comparisons have no verdict and count as missing ({reasons})"
            )
        return [one.verdict for one in everything]

    def _round(self, comparisons: list[_Pending], attempt: int, progress: Callable[[int], None]) -> list[_Pending]:
        """Ask about each comparison once; returns the comparisons whose reply had no verdict."""
        section, (endpoint, model) = self.section, self.backend.address
        parameters = {"temperature": float(section.temperature), "max_tokens": section.max_tokens}
        waiting: dict[str, list[_Pending]] = {}  # comparisons with the same prompt share a request
        requests: dict[str, Messages] = {}
        unclear: list[_Pending] = []
        for one in comparisons:
            messages = one.messages(again=attempt > 0 and section.temperature == 0)
            key = key_of(endpoint, model, messages, parameters, attempt)
            waiting.setdefault(key, []).append(one)
            requests[key] = messages

        def settle(key: str, outcome: Outcome) -> None:
            settled = waiting.pop(key)
            for one in settled:
                one.verdict = _updated(one.verdict, outcome)
            again = outcome.reply is not None and settled[0].verdict.winner is None
            unclear.extend(settled if again else [])
            progress(0 if again and attempt < section.ask_again else len(settled))

        def done(outcomes: dict[str, Outcome]) -> None:
            replies = {key: _clean(outcome.reply) for key, outcome in outcomes.items() if outcome.reply is not None}
            kept = self.cache.put(replies) if replies else {}
            for reply in replies.values():
                self.calls["prompt_tokens"] += reply.prompt_tokens
                self.calls["completion_tokens"] += reply.completion_tokens
            for key, outcome in outcomes.items():
                settle(key, Outcome(kept[key]) if key in kept else outcome)

        for key in list(requests):
            found = self.cache.get(key)
            if found is not None:
                del requests[key]
                self.calls["cached"] += 1
                settle(key, Outcome(found))
        if requests:
            self.backend(requests, done)
        return unclear


def _updated(before: Verdict, outcome: Outcome) -> Verdict:
    if outcome.reply is None:
        return before._replace(why=outcome.why)
    winner = read_verdict(outcome.reply.text)
    why = NO_VERDICT + (", which was cut off at max_tokens" if outcome.reply.finish == "length" else "")
    return before._replace(
        winner=winner, text=outcome.reply.text, asked=before.asked + 1, why="" if winner is not None else why
    )


def _clean(reply: Reply) -> Reply:
    """The reply without lone surrogates, which JSON can contain but UTF-8 cannot encode."""
    return reply._replace(text=reply.text.encode("utf-8", "replace").decode("utf-8"))
