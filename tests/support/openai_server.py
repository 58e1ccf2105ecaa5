"""A loopback server that speaks OpenAI's /v1/chat/completions, as well or as badly as a test's script wants."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from salsa_peft.evaluation.judges.prompts import Comparison


@dataclass
class Fault:
    """Something else than an answer: a status with a body, after `hang` seconds, its connection cut after `cut` bytes of the body."""

    status: int = 200
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)
    hang: float = 0.0
    cut: int | None = None
    kind: str = "application/json"


@dataclass
class Seen:
    """A request."""

    body: dict[str, Any]
    key: str
    authorization: str
    path: str
    at: float
    answered: bool = False


def refusal(status: int, message: str = "no", code: str | None = None, **headers: str) -> Fault:
    """An error in OpenAI's form."""
    body = {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": code}}
    return Fault(status, body, {name.replace("_", "-"): value for name, value in headers.items()})


def completion(text: str | None, finish: str = "stop") -> dict[str, Any]:
    """A chat completion as OpenAI writes it, of 10 + 5 tokens."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
    usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
    return {"id": "c", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": usage}


class Server:
    """`script(request, times)` says what a request gets: text (an answer) or a Fault; times: how often the same was asked before."""

    def __init__(self, script: Callable[[Seen, int], str | Fault]) -> None:
        self.script, self.seen, self.lock = script, list[Seen](), threading.Lock()
        self.under_way = self.most_under_way = 0
        server, outer = ThreadingHTTPServer, self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                outer.answer(self)

            def log_message(self, *_: Any) -> None:
                pass

        self.http = server(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        """One request."""
        body = json.loads(handler.rfile.read(int(handler.headers["content-length"])))
        key = json.dumps(body, sort_keys=True)
        request = Seen(body, key, handler.headers.get("authorization", ""), handler.path, time.monotonic())
        with self.lock:
            times = sum(one.key == key for one in self.seen)
            self.seen.append(request)
            self.under_way += 1
            self.most_under_way = max(self.most_under_way, self.under_way)
        said = self.script(request, times)
        fault = said if isinstance(said, Fault) else Fault(body=completion(said))
        time.sleep(fault.hang)
        with self.lock:
            self.under_way -= 1
        raw = fault.body if isinstance(fault.body, bytes) else json.dumps(fault.body).encode()
        with contextlib.suppress(OSError):  # a client that has given up
            handler.send_response(fault.status)
            for name, value in {"content-type": fault.kind, "content-length": str(len(raw)), **fault.headers}.items():
                handler.send_header(name, value)
            handler.end_headers()
            handler.wfile.write(raw[: fault.cut])
            handler.wfile.flush()
            request.answered = fault.cut is None and fault.status == 200 and isinstance(said, str)
            if fault.cut is not None:
                handler.close_connection = True

    @property
    def asked(self) -> Counter[str]:
        """Request → how often."""
        return Counter(one.key for one in self.seen)

    def asked_after_an_answer(self) -> list[str]:
        """Requests that came again though they had been answered."""
        answered: set[str] = set()
        again = []
        for one in self.seen:
            again += [one.key] if one.key in answered else []
            answered |= {one.key} if one.answered else set()
        return again


@contextlib.contextmanager
def serving(script: Callable[[Seen, int], str | Fault]) -> Iterator[Server]:
    """A Server, in threads of this process."""
    server = Server(script)
    thread = threading.Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.http.shutdown()
        server.http.server_close()
        thread.join()


def games(count: int) -> list[Comparison]:
    """Question i, the better answer first where i is even."""
    pairs = [("good", "bad") if number % 2 == 0 else ("bad", "good") for number in range(count)]
    return [Comparison((f"question {number}.",), (a,), (b,), 1) for number, (a, b) in enumerate(pairs)]
