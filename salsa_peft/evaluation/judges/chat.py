"""A chat model as judge, wherever it runs: games → prompts → replies → rulings, by way of the cache.

In rounds: everything is asked once, then what came without a verdict is asked again. What asks (an endpoint, a model in this process) gets
requests that differ from one another and are not in the cache, and hands each reply over the moment it has it.
"""

from __future__ import annotations

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
NO_VERDICT = "no verdict in its answer"


class Outcome(NamedTuple):
    """What became of a request: a reply, or why there is none."""

    reply: Reply | None
    why: str = ""


class ChatBackend(Protocol):
    """Where requests go."""

    @property
    def address(self) -> tuple[str, str]:
        """Endpoint and model, for the cache's key."""

    def __call__(self, requests: Mapping[str, Messages], done: Callable[[dict[str, Outcome]], None]) -> None:
        """Ask them all; `done` is called with each outcome (or some at once) as they come."""


class _Case:
    """A game on its way to a ruling."""

    def __init__(self, game: Comparison, told: JudgePrompt) -> None:
        self.game, self.told = game, told
        self.ruling = Verdict(None, told.user, "", 0)

    def messages(self, again: bool) -> Messages:
        user = self.told.user + REMINDER * again
        self.ruling = self.ruling._replace(prompt=user)
        return [{"role": "system", "content": self.told.system}, {"role": "user", "content": user}]


class ChatJudge:
    """(games, progress) → rulings, in the games' order; `calls` counts over all calls.

    asked: requests sent, each with its retries as one. cached: replies that the cache had. Tokens: of what was asked here.
    """

    def __init__(self, section: Judge, ask: ChatBackend, calls: dict[str, int], cache: Path | None, say: Callable[[str], None]) -> None:  # fmt: skip
        self.section, self.ask, self.calls, self.say = section, ask, calls, say
        self.cache, self.render = Cache(cache), renderer(section)

    def __call__(self, games: Sequence[Comparison], progress: Callable[[int], None]) -> list[Verdict]:
        cases = [_Case(game, self.render(game)) for game in games]
        open_cases = cases
        for attempt in range(1 + self.section.ask_again):
            last = attempt == self.section.ask_again
            open_cases = self._round(open_cases, attempt, last, progress)
        missing = Counter(case.ruling.why for case in cases if case.ruling.winner is None)
        if missing:
            reasons = ", ".join(f"{count}: {why}" for why, count in missing.most_common())
            self.say(f"{missing.total()} of {len(cases)} games have no verdict and count as missing ({reasons})")
        return [case.ruling for case in cases]

    def _round(self, cases: list[_Case], attempt: int, last: bool, progress: Callable[[int], None]) -> list[_Case]:
        """Ask for each case once; returns those that answered without a verdict."""
        section, (endpoint, model) = self.section, self.ask.address
        parameters = {"temperature": float(section.temperature), "max_tokens": section.max_tokens}
        waiting: dict[str, list[_Case]] = {}  # equal games, such as those of two equal answers, are one request
        requests: dict[str, Messages] = {}
        silent: list[_Case] = []
        for case in cases:
            messages = case.messages(again=attempt > 0 and section.temperature == 0)
            key = key_of(endpoint, model, messages, parameters, attempt)
            waiting.setdefault(key, []).append(case)
            requests[key] = messages

        def settle(key: str, outcome: Outcome) -> None:
            of = waiting.pop(key)
            for case in of:
                case.ruling = _ruled(case.ruling, outcome)
            speechless = outcome.reply is not None and of[0].ruling.winner is None
            silent.extend(of if speechless else [])
            progress(0 if speechless and not last else len(of))

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
            self.ask(requests, done)
        return silent


def _ruled(before: Verdict, outcome: Outcome) -> Verdict:
    if outcome.reply is None:
        return before._replace(why=outcome.why)
    verdict = read_verdict(outcome.reply.text)
    cut = f"{NO_VERDICT}, which max_tokens cut" if outcome.reply.finish == "length" else NO_VERDICT
    return before._replace(
        winner=verdict, text=outcome.reply.text, asked=before.asked + 1, why="" if verdict is not None else cut
    )


def _clean(reply: Reply) -> Reply:
    """Without lone surrogates, which an endpoint's JSON can hold and no file."""
    return reply._replace(text=reply.text.encode("utf-8", "replace").decode("utf-8"))
