"""What the Hub refuses becomes one line with the link that helps, through whichever library asked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from salsa_peft.utils import hub as hub_errors

ASK = """
import json, sys
from huggingface_hub import hf_hub_download
from transformers import AutoConfig
from datasets import load_dataset
from salsa_peft.utils import hub as hub_errors
asks = {
    "download": lambda name, kind: hf_hub_download(name, "config.json", repo_type=kind),
    "transformers": lambda name, kind: AutoConfig.from_pretrained(name),
    "datasets": lambda name, kind: load_dataset(name),
}
for line in sys.stdin:
    how, name, kind = json.loads(line)
    try:
        asks[how](name, kind)
        print(json.dumps("no error"), flush=True)
    except Exception as error:
        print(json.dumps(hub_errors.explain_hub_error(error, name)), flush=True)
"""
ANSWERS = {"gated": (403, "GatedRepo"), "missing": (401, "RepoNotFound"), "revision": (404, "RevisionNotFound")}


class Hub(BaseHTTPRequestHandler):
    """Refuses everything, as the repository's name asks."""

    def do_GET(self) -> None:
        status, code = next(
            (answer for name, answer in ANSWERS.items() if f"org/{name}" in self.path), (404, "RepoNotFound")
        )
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", "refused")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_POST = do_GET

    def log_message(self, *_: object) -> None:
        """Quiet."""


def ask(tmp_path: Path, questions: list[tuple[str, str, str]], **environment: str) -> list[str | None]:
    """Ask in a process of its own, whose Hub is given by the environment."""
    settings = {
        **os.environ,
        "HF_HOME": str(tmp_path),
        "PYTHONPATH": str(Path(hub_errors.__file__).parents[2]),
        **environment,
    }
    settings.pop("HF_TOKEN", None)
    text = "".join(json.dumps(question) + "\n" for question in questions)
    done = subprocess.run(
        [sys.executable, "-c", ASK], input=text, capture_output=True, text=True, env=settings, check=True, timeout=300
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_refusals_of_a_hub(tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    questions = [(how, f"org/{name}", kind) for name in ANSWERS for how, kind in
                 (("download", "model"), ("download", "dataset"), ("transformers", "model"), ("datasets", "dataset"))]  # fmt: skip
    endpoint = f"http://127.0.0.1:{server.server_port}"
    said = ask(
        tmp_path, questions, HF_ENDPOINT=endpoint, HF_HUB_OFFLINE="0", no_proxy="127.0.0.1", NO_PROXY="127.0.0.1"
    )
    server.shutdown()
    assert len(said) == len(questions)
    for (how, name, kind), line in zip(questions, said, strict=True):
        page = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{name}"
        assert line is not None, (how, name, kind)
        assert line.startswith(page), (how, name, kind, line)
        assert "\n" not in line
        if name == "org/gated":
            assert f"{page} is gated: accept its licence on that page, then run `hf auth login`" in line
        if name == "org/missing":
            assert "Check the name; if the repository is private, log in" in line


def test_offline(tmp_path):
    questions = [("download", "org/x", "model"), ("transformers", "org/x", "model"), ("datasets", "org/x", "dataset")]
    for line in ask(tmp_path, questions, HF_HUB_OFFLINE="1"):
        assert line is not None
        assert "cannot be reached" in line
        assert "org/x" in line


def test_other_errors_are_not_the_hubs():
    assert hub_errors.explain_hub_error(ValueError("x")) is None
