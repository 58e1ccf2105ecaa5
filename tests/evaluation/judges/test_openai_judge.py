"""A judge behind an endpoint that stumbles in every way: what is asked, how often, what is missing, and that the key stays where it belongs."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from openai_server import Fault, Seen, Server, completion, games, refusal, serving
from paths import SUPPORT

pytest.importorskip("openai", reason="the package that the judge openai sends requests with")

from salsa_peft.config.judge import Judge
from salsa_peft.evaluation.judges import openai_api as openai_judge
from salsa_peft.evaluation.judges.prompts import REMINDER, Comparison, Verdict
from salsa_peft.evaluation.judges.registry import judge_of
from salsa_peft.utils.errors import SalsaError

CANARY = "sk-canary-7f3e9a2b51d84c60"


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    """A key, no endpoint, short pauses; certificates, which a client spends its start on, are of no use on the loopback."""
    monkeypatch.setattr(ssl.SSLContext, "load_verify_locations", lambda *_, **__: None)
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setenv("OPENAI_API_KEY", CANARY)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


def user(request: Seen) -> str:
    return str(request.body["messages"][-1]["content"])


def honest(request: Seen, times: int) -> str | Fault:
    """The verdict for the good answer."""
    text = user(request)
    return "First is better: [[A]]" if text.index("good") < text.index("bad") else "It is [[B]]"


def right(verdicts: list[Verdict]) -> list[bool]:
    return [verdict.winner == ("A" if number % 2 == 0 else "B") for number, verdict in enumerate(verdicts)]


Judging = tuple[list[Verdict], dict[str, int], list[str]]


@pytest.fixture
def judging(tmp_path: Path) -> Callable[..., Judging]:
    """judging(server, games, **section) → verdicts, calls, what was said; always the same cache."""

    def run(server: Server | str, asked: list[Comparison], **options: Any) -> Judging:
        url = server if isinstance(server, str) else server.url
        said: list[str] = []
        section = Judge(
            **({"kind": "openai", "model": "m", "base_url": url, "timeout": 5.0, "concurrency": 4} | options)
        )
        judge = judge_of(section, cache=tmp_path / "cache.sqlite", say=said.append)
        done: list[int] = []
        verdicts = judge(asked, done.append)
        assert sum(done) == len(asked)
        return verdicts, judge.calls, said

    return run


@contextlib.contextmanager
def one_line(*expected: str) -> Iterator[None]:
    """A SalsaError of one line with all of this in it, and the key nowhere in it or in its trace."""
    with pytest.raises(SalsaError) as found:
        yield
    text = str(found.value)
    assert "\n" not in text and all(part in text for part in expected), text
    assert CANARY not in "".join(traceback.format_exception(found.value))


class TestAsking:
    """Nothing goes wrong."""

    def test_what_is_asked_and_what_comes_of_it(self, judging: Any) -> None:
        with serving(honest) as server:
            verdicts, calls, said = judging(server, games(6), temperature=0.5, max_tokens=77)
            assert right(verdicts) == [True] * 6 and not said
            assert calls == {"asked": 6, "cached": 0, "retried": 0, "prompt_tokens": 60, "completion_tokens": 30}
            body = server.seen[0].body
            assert (body["model"], body["temperature"], body["max_tokens"]) == ("m", 0.5, 77)
            assert [message["role"] for message in body["messages"]] == ["system", "user"]
            assert {one.path for one in server.seen} == {"/v1/chat/completions"}
            assert (
                verdicts[0].prompt in {user(one) for one in server.seen}
                and verdicts[0].text == "First is better: [[A]]"
            )
            again, calls, _ = judging(server, games(7), temperature=0.5, max_tokens=77)
            assert again[:6] == verdicts and (calls["asked"], calls["cached"]) == (1, 6)
            assert len(server.seen) == 7

    @pytest.mark.parametrize("other", [{"model": "n"}, {"temperature": 0.1}, {"max_tokens": 9}])
    def test_another_model_or_parameter_is_asked_anew(self, judging: Any, other: dict[str, Any]) -> None:
        with serving(honest) as server:
            judging(server, games(2))
            assert judging(server, games(2), **other)[1]["asked"] == 2

    def test_another_endpoint_is_asked_anew(self, judging: Any) -> None:
        with serving(honest) as server, serving(honest) as other:
            judging(server, games(2))
            assert judging(other, games(2))[1]["asked"] == 2
            assert judging(server.url + "/", games(2))[1]["cached"] == 2

    def test_so_many_at_once_and_no_more(self, judging: Any) -> None:
        def slow(request: Seen, times: int) -> Fault:
            return Fault(body=completion(str(honest(request, times))), hang=0.03)

        with serving(slow) as server:
            judging(server, games(12), concurrency=3)
            assert server.most_under_way == 3

    def test_equal_games_are_one_request(self, judging: Any) -> None:
        with serving(honest) as server:
            verdicts, calls, _ = judging(server, games(2) * 3)
            assert right(verdicts) == [True] * 6 and calls["asked"] == len(server.seen) == 2

    def test_a_budget_leaves_the_rest_to_the_next_run(self, judging: Any) -> None:
        def stumbling(request: Seen, times: int) -> str | Fault:
            return refusal(500) if "question 0." in user(request) and times == 0 else honest(request, times)

        with serving(stumbling) as server:
            verdicts, calls, said = judging(server, games(8), budget=5, concurrency=1)
            assert len(server.seen) == 5 and (calls["asked"], calls["retried"]) == (4, 1)  # a retry is a request too
            assert [verdict.winner is not None for verdict in verdicts] == [True] * 4 + [False] * 4
            assert (
                "the budget of 5 requests" in verdicts[7].why
                and "4 of 8 comparisons" in said[0]
                and verdicts[7].asked == 0
            )
            verdicts, calls, said = judging(server, games(8), budget=5)
            assert right(verdicts) == [True] * 8 and not said and (calls["asked"], calls["cached"]) == (4, 4)
            assert not server.asked_after_an_answer()


FAULTS = {
    "500": refusal(500),
    "503": refusal(503, retry_after="0.01"),
    "429": refusal(429),
    "408": refusal(408),
    "409": refusal(409),
    "time-out": Fault(body=completion("[[A]]"), hang=2.0),
    "cut in the body": Fault(body=completion("[[A]] " + "x" * 500), cut=200),
    "cut before the body": Fault(body=completion("[[A]]"), cut=0),
    "no JSON": Fault(body=b'{"choices": [{"mess'),
    "a page": Fault(body=b"<html>[[A]]</html>", kind="text/html"),
    "no choices": Fault(body={"id": "c", "choices": []}),
    "an error as success": Fault(body={"error": {"message": "upstream", "code": 502}}),
    "a choice of another form": Fault(body={"choices": [{"text": "[[A]]"}]}),
}


def fault_of(request: Seen) -> Fault | None:
    """The fault of the game's number; odd numbers have none."""
    number = int(user(request).split("\nquestion ")[1].split(".")[0])
    return None if number % 2 else list(FAULTS.values())[number // 2]


class TestFaults:
    """What a retry mends. Every second game has one of the faults."""

    def test_each_is_tried_again(self, judging: Any) -> None:
        """Once; the verdicts are those of the answers."""

        def script(request: Seen, times: int) -> str | Fault:
            return (fault_of(request) if times == 0 else None) or honest(request, times)

        with serving(script) as server:
            verdicts, calls, said = judging(server, games(2 * len(FAULTS)), timeout=1.5)
            assert dict(zip(FAULTS, right(verdicts)[::2], strict=True)) == dict.fromkeys(FAULTS, True)
            assert all(right(verdicts)) and not said
            assert (calls["asked"], calls["retried"]) == (2 * len(FAULTS), len(FAULTS))
            assert sorted(server.asked.values()) == [1] * len(FAULTS) + [2] * len(FAULTS)
            assert calls["completion_tokens"] == 5 * 2 * len(FAULTS)

    def test_that_stays_is_missing_and_asked_by_the_next_run(
        self, judging: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """So many retries, then the comparison has no verdict, and the reason is reported."""
        monkeypatch.setattr(openai_judge, "PATIENCE", 100)
        mended = False

        def script(request: Seen, times: int) -> str | Fault:
            return (None if mended else fault_of(request)) or honest(request, times)

        with serving(script) as server:
            verdicts, calls, said = judging(server, games(2 * len(FAULTS)), timeout=1.5, retries=2, concurrency=8)
            assert {verdict.winner for verdict in verdicts[::2]} == {None} and right(verdicts)[1::2] == [True] * len(
                FAULTS
            )
            assert all(verdict.why.startswith("no answer: ") and not verdict.asked for verdict in verdicts[::2])
            assert f"{len(FAULTS)} of {2 * len(FAULTS)} comparisons" in said[0] and calls["retried"] == 2 * len(FAULTS)
            mended = True
            verdicts, calls, said = judging(server, games(2 * len(FAULTS)))
            assert all(right(verdicts)) and (calls["asked"], calls["cached"]) == (len(FAULTS), len(FAULTS)) and not said
            assert not server.asked_after_an_answer()

    def test_retry_after_is_waited_for(self, judging: Any) -> None:
        """The refused request is not sent again before the time that the endpoint asked for."""

        def script(request: Seen, times: int) -> str | Fault:
            refused = "question 0." in user(request) and times == 0
            return refusal(429, retry_after="0.5") if refused else honest(request, times)

        with serving(script) as server:
            verdicts, calls, _ = judging(server, games(6), concurrency=2)
            assert right(verdicts) == [True] * 6 and calls["retried"] == 1
            first, second = [one.at for one in server.seen if "question 0." in user(one)]
            assert second - first >= 0.5


class TestVerdicts:
    """An answer without one."""

    def test_is_asked_again_with_a_reminder(self, judging: Any) -> None:
        """At temperature 0 the same prompt would give the same answer."""

        def script(request: Seen, times: int) -> str:
            return "I like both." if not user(request).endswith(REMINDER) else "Fine. [[C]]"

        with serving(script) as server:
            verdicts, calls, said = judging(server, games(3))
            assert [(verdict.winner, verdict.asked) for verdict in verdicts] == [("tie", 2)] * 3 and not said
            assert calls["asked"] == 6 and verdicts[0].prompt.endswith(REMINDER) and verdicts[0].text == "Fine. [[C]]"
            assert judging(server, games(3))[0] == verdicts and len(server.seen) == 6

    def test_at_a_temperature_the_same_is_asked(self, judging: Any) -> None:
        """Sampled anew, and its second answer has a place of its own in the cache."""
        with serving(lambda request, times: "Hm." if times == 0 else "[[A]]") as server:
            verdicts, calls, _ = judging(server, games(3), temperature=1.0)
            assert {verdict.winner for verdict in verdicts} == {"A"} and set(server.asked.values()) == {2}
            verdicts, calls, _ = judging(server, games(3), temperature=1.0)
            assert {verdict.winner for verdict in verdicts} == {"A"} and (calls["asked"], calls["cached"]) == (0, 6)

    @pytest.mark.parametrize(("ask_again", "asked"), [(0, 1), (2, 3)])
    def test_is_missing_in_the_end_and_said(self, judging: Any, ask_again: int, asked: int) -> None:
        """Never dropped, and not asked by the next run either: it was answered."""
        with serving(
            lambda request, times: "Neither" if "question 1." in user(request) else str(honest(request, times))
        ) as server:
            verdicts, _calls, said = judging(server, games(3), temperature=0.3, ask_again=ask_again)
            assert right(verdicts) == [True, False, True] and verdicts[1][:1] + verdicts[1][2:4] == (
                None,
                "Neither",
                asked,
            )
            assert said == [
                "1 of 3 comparisons have no verdict and count as missing (1: no verdict in the judge's reply)"
            ]
            before = len(server.seen)
            assert (
                judging(server, games(3), temperature=0.3, ask_again=ask_again)[0] == verdicts
                and len(server.seen) == before
            )

    @pytest.mark.parametrize("text", ["", None])
    def test_an_empty_answer_is_one_without_a_verdict(self, judging: Any, text: str | None) -> None:
        """Models that think until max_tokens are used up say nothing."""
        with serving(lambda request, times: Fault(body=completion(text, "length"))) as server:
            verdicts, _, _ = judging(server, games(1))
            assert (
                len(server.seen) == 2
                and verdicts[0].why == "no verdict in the judge's reply, which was cut off at max_tokens"
            )

    def test_lone_surrogates_are_no_trouble(self, judging: Any) -> None:
        """In what is asked or in what is said."""
        with serving(lambda request, times: "\ud83d [[B]]") as server:
            verdicts, _, _ = judging(server, [Comparison(("q\ud800",), ("a",), ("b",), 1)])
            assert verdicts[0].winner == "B" and json.dumps(verdicts[0].text, ensure_ascii=False).encode()
            assert len(server.seen) == 1


class TestRefusals:
    """What no retry mends."""

    @pytest.mark.parametrize(
        ("fault", "expected"),
        [
            (refusal(401, f"Incorrect API key provided: {CANARY}", "invalid_api_key"), ["HTTP 401", "OPENAI_API_KEY"]),
            (refusal(403, f"not for {CANARY}"), ["HTTP 403 (not for [key])", "OPENAI_API_KEY"]),
            (refusal(404, "The model `m` does not exist", "model_not_found"), ["HTTP 404", "does not exist", "evaluate.judge.model"]),
            (Fault(404, b"<html>nothing here</html>", kind="text/html"), ["HTTP 404", "/v1"]),
            (refusal(429, "You exceeded your current quota", "insufficient_quota"), ["HTTP 429", "quota", "account"]),
            (refusal(402, "Insufficient balance"), ["HTTP 402", "account"]),
            (refusal(400, "temperature does not support 0", "unsupported_value"), ["HTTP 400", "temperature"]),
            (refusal(429, "daily limit", retry_after="86400"), ["86400 s", "run again later"]),
        ],
    )  # fmt: skip
    def test_stops_in_one_line(self, judging: Any, fault: Fault, expected: list[str]) -> None:
        """With the endpoint's name, after no more requests than were under way."""
        with serving(lambda request, times: fault) as server:
            with one_line("evaluate.judge: http://127.0.0.1", "m", *expected):
                judging(server, games(40))
            assert len(server.seen) <= 4

    def test_what_was_answered_before_is_kept(self, judging: Any) -> None:
        """A key that is withdrawn in the middle."""
        good = True
        with serving(lambda request, times: honest(request, times) if good else refusal(401)) as server:
            judging(server, games(5))
            good = False
            with one_line("HTTP 401"):
                judging(server, games(9))
            good = True
            assert judging(server, games(9))[1]["cached"] == 5 and not server.asked_after_an_answer()

    @pytest.mark.parametrize(
        ("fault", "why"),
        [
            (refusal(400, "This model's maximum context length is 4096 tokens, you requested 5000", "context_length_exceeded"), "too long"),
            (refusal(400, "the request exceeds the available context size, try increasing it"), "too long"),
            (refusal(413, "body"), "too long"),
            (refusal(400, "filtered", "content_filter"), "filter"),
            (refusal(400, "something else"), "HTTP 400 (something else)"),
        ],
    )  # fmt: skip
    def test_of_one_game_leaves_that_one_out(self, judging: Any, fault: Fault, why: str) -> None:
        """Asked once, not again."""
        with serving(
            lambda request, times: fault if "question 2." in user(request) else honest(request, times)
        ) as server:
            verdicts, calls, said = judging(server, games(6))
            assert (
                right(verdicts) == [True, True, False, True, True, True] and why in verdicts[2].why and why in said[0]
            )
            assert calls["retried"] == 0 and len(server.seen) == 6

    def test_of_every_game_stops(self, judging: Any) -> None:
        """An unknown refusal of all is not a judgment of any."""
        with serving(lambda request, times: refusal(400, "system role not supported")) as server:
            with one_line("10 requests in a row", "system role not supported"):
                judging(server, games(40), concurrency=2)
            assert len(server.seen) <= 11
            with one_line("no answer to any of 3", "system role not supported"):
                judging(server, games(3))

    def test_too_long_for_all_is_missing_for_all(self, judging: Any) -> None:
        """That is an answer about each of them."""
        with serving(lambda request, times: refusal(400, "prompt is too long: 9 tokens > 8 maximum")) as server:
            verdicts, _, _ = judging(server, games(12))
            assert {verdict.winner for verdict in verdicts} == {None} and len(server.seen) == 12

    def test_nobody_there(self, judging: Any) -> None:
        """A port that nothing listens on."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        with one_line(f"http://127.0.0.1:{port}/v1", "no connection", "check that the endpoint is up"):
            judging(f"http://127.0.0.1:{port}/v1", games(3), retries=1)

    def test_max_tokens_by_its_newer_name(self, judging: Any) -> None:
        """OpenAI's reasoning models refuse the old one; the cache knows both as one."""

        def newer(request: Seen, times: int) -> str | Fault:
            if "max_tokens" in request.body:
                return refusal(
                    400,
                    "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.",
                    "unsupported_parameter",
                )
            return honest(request, times) if request.body["max_completion_tokens"] == 50 else refusal(400)

        with serving(newer) as server:
            verdicts, calls, _ = judging(server, games(9), max_tokens=50, retries=0, concurrency=2)
            assert right(verdicts) == [True] * 9 and calls["retried"] <= 2
            assert judging(server, games(9), max_tokens=50)[1]["cached"] == 9

    def test_the_package_is_an_extra(self, judging: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        found = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, *more: None if name == "openai" else found(name, *more)
        )
        with one_line("openai needs the package openai", "pip install 'salsa-peft[judge]'"):
            judging("http://127.0.0.1:9/v1", games(1))

    def test_the_default_endpoint_wants_a_key(self, judging: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """Before any request; an endpoint of one's own need not have one."""
        monkeypatch.delenv("OPENAI_API_KEY")
        with one_line("the environment variable OPENAI_API_KEY is not set", "base_url"):
            judging("", games(1), base_url=None)
        monkeypatch.setenv("MINE", "a b")
        with one_line("evaluate.judge.api_key_env", "MINE"):
            judging("http://127.0.0.1:9/v1", games(1), api_key_env="MINE")
        with serving(honest) as server:
            assert right(judging(server, games(1), api_key_env="NOT_SET")[0]) == [True]
            assert server.seen[0].authorization == "Bearer none"


class TestKey:
    """It is in the Authorization header and nowhere else."""

    def test_a_canary(
        self, judging: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Also where the endpoint sends it back, in errors and answers, and everything is logged."""

        def parrot(request: Seen, times: int) -> str | Fault:
            if times == 0:
                return refusal(500, f"you said {request.authorization}")
            if "question 1." in user(request):
                return Fault(body={"choices": None, "echo": request.authorization})
            return f"{request.authorization} [[A]]"

        logged = io.StringIO()
        handler = logging.StreamHandler(logged)
        root = logging.getLogger()
        level = root.level
        root.addHandler(handler)
        root.setLevel(logging.DEBUG)
        monkeypatch.setattr(logging.getLogger("openai"), "level", logging.DEBUG)
        try:
            with serving(parrot) as server:
                verdicts, _, said = judging(server, games(3), retries=1)
                assert {one.authorization for one in server.seen} == {f"Bearer {CANARY}"}
        finally:
            root.removeHandler(handler)
            root.setLevel(level)
        assert verdicts[0].winner == "A" and "[key]" in verdicts[0].text and verdicts[1].winner is None
        everything = repr((verdicts, said, capfd.readouterr())) + logged.getvalue()
        assert len(logged.getvalue()) > 100 and CANARY not in everything
        files = [path for path in tmp_path.rglob("*") if path.is_file()]
        assert files and all(CANARY.encode() not in path.read_bytes() for path in files)
        assert not any(CANARY in json.dumps(one.body) for one in server.seen)


KILLED = """
import sys
from pathlib import Path
from salsa_peft.config.judge import Judge
from salsa_peft.evaluation.judges.registry import judge_of
from openai_server import games
section = Judge(kind="openai", model="m", base_url=sys.argv[1], concurrency=3)
judge = judge_of(section, cache=Path(sys.argv[2]), say=print)
print([verdict.winner for verdict in judge(games(20), lambda n: None)], judge.calls["cached"], "torch" in sys.modules)
"""


def test_kill_9_in_the_middle(tmp_path: Path) -> None:
    """The first answers only so many and lets the rest hang; then it is killed. A worker keeps an answer before it asks its next, so all
    that were answered are kept, and the second run asks only the others."""
    held = True

    def script(request: Seen, times: int) -> str | Fault:
        if held and int(user(request).split("\nquestion ")[1].split(".")[0]) >= 8:
            return Fault(hang=60)
        return honest(request, times)

    with serving(script) as server:
        command = [sys.executable, "-c", KILLED, server.url, str(tmp_path / "cache.sqlite")]
        surroundings = {**os.environ, "PYTHONPATH": str(SUPPORT)}
        first = subprocess.Popen(command, env=surroundings, stdout=subprocess.PIPE)
        deadline = time.monotonic() + 60
        while len(server.seen) < 8 + 3 and time.monotonic() < deadline and first.poll() is None:
            time.sleep(0.01)
        first.send_signal(signal.SIGKILL)
        assert first.wait() == -signal.SIGKILL and first.stdout is not None and not first.stdout.read()
        first.stdout.close()
        assert len(server.seen) == 11 and sum(one.answered for one in server.seen) == 8
        held = False
        second = subprocess.run(command, env=surroundings, capture_output=True, text=True, check=True, timeout=60)
        assert second.stdout.strip() == f"{['A', 'B'] * 10} 8 False"
        assert len(server.seen) == 11 + 12 and not server.asked_after_an_answer()
