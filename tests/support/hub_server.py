"""A loopback server that speaks as much of the Hugging Face Hub's protocol as huggingface_hub asks of model repos."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import re
import threading
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

USER = "tester"
LFS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".model", ".onnx", ".gguf", ".npz", ".zip")
ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS).encode()


@dataclass
class Commit:
    """All files as they are after it; an LFS file is its content, not its pointer."""

    sha: str
    files: dict[str, bytes] = field(repr=False)
    message: str


@dataclass
class Repo:
    """A model repository of one branch, main. It starts with a commit of a .gitattributes, as on the Hub."""

    private: bool = False
    commits: list[Commit] = field(default_factory=list)
    lfs: dict[str, bytes] = field(default_factory=dict, repr=False)  # sha256 → an upload, committed or not

    def __post_init__(self) -> None:
        if not self.commits:
            self.commits.append(Commit(os.urandom(20).hex(), {".gitattributes": ATTRIBUTES}, "initial commit"))


@dataclass
class Request:
    """What came in; the headers' names are in lower case."""

    method: str
    path: str
    headers: dict[str, str] = field(repr=False)
    body: bytes = field(repr=False)


@dataclass
class Fault:
    """The next `times` requests of this method whose path holds `path_part` get this status; 0 cuts the connection."""

    method: str
    path_part: str
    status: int
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)
    body: Any = field(default_factory=lambda: {"error": "a fault"})  # bytes go out as they are, the rest as JSON


@dataclass
class Hub:
    """What the server holds and has seen; a test may change all of it but the url."""

    token: str
    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    lock: Any = field(default_factory=threading.Lock, repr=False)

    def environment(self, home: Path | str) -> dict[str, str]:
        """For a process that knows this server alone; no answer keeps an upload from Xet, but the variable does."""
        there = {"HF_ENDPOINT": self.url, "HF_TOKEN": self.token, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
        without = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TRANSFORMERS_OFFLINE": "0"}
        return {**os.environ, **there, **without, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}


class _Answer(Exception):
    """A response, returned or raised."""

    def __init__(self, body: Any = b"", status: int = 200, **headers: str) -> None:
        self.body, self.status = body, status
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


def _refusal(status: int, message: str, code: str = "", **headers: str) -> _Answer:
    headers |= {"X_Error_Code": code} if code else {}
    return _Answer({"error": message}, status, X_Error_Message=message, **headers)


def _git(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _is_lfs(path: str, size: int, start: bytes) -> bool:
    return size > 0 and (path.endswith(LFS) or size >= 10_000_000 or b"\0" in start[:512])


def _entry(path: str, data: bytes) -> dict[str, Any]:
    """A file in a listing."""
    found: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": _git(data)}
    if _is_lfs(path, len(data), data):
        oid = hashlib.sha256(data).hexdigest()
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {len(data)}\n".encode()
        found |= {"oid": _git(pointer), "lfs": {"oid": oid, "size": len(data), "pointerSize": len(pointer)}}
    return found


def _listing(files: dict[str, bytes], folder: str = "", recursive: bool = True) -> list[dict[str, Any]]:
    """What a folder holds, folders too."""
    found: dict[str, dict[str, Any]] = {}
    for path, data in sorted(files.items()):
        cuts = [place for place in range(len(folder), len(path)) if path[place] == "/"]
        for inner in [path[:cut] for cut in cuts if path.startswith(folder) and (recursive or cut == cuts[0])]:
            found[inner] = {"type": "directory", "path": inner, "size": 0, "oid": _git(inner.encode())}
        if path.startswith(folder) and (recursive or not cuts):
            found[path] = _entry(path, data)
    return list(found.values())


def _some(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _metadata(readme: str) -> tuple[dict[str, Any], list[str]]:
    """A card's front matter, and what the Hub says against it."""
    block = re.match(r"\s*---[ \t]*\r?\n(.*?)\r?\n---", readme, re.DOTALL)
    try:
        data = yaml.safe_load(block[1]) if block else {}
    except yaml.YAMLError as error:
        return {}, [str(error)]
    said = '"base_model" with value "{}" is not valid. Use a model id from https://hf.co/models.'
    bases = [base for base in _some(data.get("base_model")) if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(base))]
    return data, [said.format(base) for base in bases]


class _Handler(BaseHTTPRequestHandler):
    """One connection. `ROUTES` says which method answers what; repo and commit are those of the request's path."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    hub: Hub

    def do_GET(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.body = self.rfile.read(int(headers.get("content-length", 0)))
        with self.hub.lock:
            self.hub.requests.append(Request(self.command, self.path, headers, self.body))
            try:
                answer = self.answer()
            except _Answer as refusal:
                answer = refusal
            except Exception:  # the server's own mistake; the client would ask again after a 500
                answer = _Answer({"error": traceback.format_exc()}, 501)
        self.close_connection |= answer.status == 0
        raw = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body, default=str).encode()
        kind = "application/octet-stream" if raw is answer.body else "application/json; charset=utf-8"
        with contextlib.suppress(OSError):  # a client that has given up
            if answer.status:
                self.send_response(answer.status)
                for name, value in {"Content-Type": kind, "Content-Length": str(len(raw)), **answer.headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(b"" if self.command == "HEAD" else raw)

    do_HEAD = do_POST = do_PUT = do_GET

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self) -> _Answer:
        """A fault, or what the route says once the token, the repository and the revision have been looked at."""
        for fault in self.hub.faults:
            if fault.times > 0 and fault.method == self.command and fault.path_part in self.path:
                fault.times -= 1
                return _Answer(fault.body, fault.status, **fault.headers)
        path, self.query = urlsplit(self.path).path, parse_qs(urlsplit(self.path).query)
        asked = f"{self.command.replace('HEAD', 'GET')} {path}"
        matches = ((re.fullmatch(pattern, asked), access, name) for access, pattern, name in ROUTES)
        match, access, method = next((found for found in matches if found[0]), (None, "", ""))
        if match is None:
            raise _refusal(404, "Sorry, we can't find the page you are looking for.")
        if (authorization := self.headers["Authorization"]) not in (None, f"Bearer {self.hub.token}"):
            raise _refusal(401, "Invalid credentials in Authorization header")
        # The Hub sends no code here; on such a path the 401 alone says it to the client, but only over https.
        missing = "RepoNotFound" if re.match("/api/models/|.*/resolve/", path) else ""
        if authorization is None and access in ("user", "write"):
            raise _refusal(401, "Invalid username or password.", missing)
        self.parts = {name: unquote(value) for name, value in match.groupdict().items() if value}
        if name := self.parts.get("name"):
            mine, repo = authorization is not None and name.startswith(f"{USER}/"), self.hub.repos.get(name)
            if repo is None or (repo.private and not mine and access != "signed"):
                stranger = _refusal(401, "Invalid username or password.", missing)
                raise stranger if authorization is None else _refusal(404, "Repository not found", "RepoNotFound")
            if access == "write" and not mine:
                raise _refusal(403, f"You don't have the rights to write to {name}")
            revision = self.parts.get("revision", "main")
            known = [one for one in repo.commits if len(revision) > 6 and one.sha.startswith(revision)]
            if revision != "main" and not known:
                raise _refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
            self.repo, self.commit = repo, (known or repo.commits)[-1]
        return getattr(self, method)()

    def whoami(self) -> _Answer:
        token = {"type": "access_token", "accessToken": {"displayName": "test", "role": "write"}}
        return _Answer({"type": "user", "id": "1", "name": USER, "fullname": "Tester", "orgs": [], "auth": token})

    def create(self) -> _Answer:
        wanted = json.loads(self.body)
        owner = wanted.get("organization") or USER
        made = {"name": f"{owner}/{wanted['name']}", "url": f"{self.hub.url}/{owner}/{wanted['name']}"}
        if owner != USER:
            raise _refusal(403, f'You don\'t have the rights to create a model under the namespace "{owner}"')
        if wanted.get("type", "model") != "model":
            raise _refusal(400, "this server has only models")
        if made["name"] in self.hub.repos:
            raise _Answer({"error": "You already created this model repo", **made}, 409)
        self.hub.repos[made["name"]] = Repo(private=wanted.get("visibility") == "private")
        return _Answer(made)

    def validate(self) -> _Answer:
        data, errors = _metadata(json.loads(self.body)["content"])
        said = [] if data or errors else [{"message": "empty or missing yaml metadata in repo card"}]
        return _Answer({"errors": [{"message": error} for error in errors], "warnings": said}, 400 if errors else 200)

    def allow(self) -> _Answer:
        return _Answer({})

    def info(self) -> _Answer:
        """Of the tags that the Hub makes by itself, those for safetensors, base models, licence and datasets."""
        name, files = self.parts["name"], self.commit.files
        card = _metadata(files.get("README.md", b"").decode())[0]
        tags = [*_some(card.get("library_name")), *_some(card.get("tags"))]
        tags += ["safetensors"] if any(path.endswith(".safetensors") for path in files) else []
        for key, prefix in (("base_model", "base_model"), ("license", "license"), ("datasets", "dataset")):
            tags += [f"{prefix}:{value}" for value in _some(card.get(key))]
        known = {key: card[key] for key in ("library_name", "pipeline_tag") if key in card}
        known |= {"_id": name, "id": name, "modelId": name, "author": name.split("/")[0], "sha": self.commit.sha}
        known |= {"private": self.repo.private, "gated": False, "disabled": False, "downloads": 0, "likes": 0}
        siblings = [{"rfilename": path} for path in sorted(files)]
        return _Answer({**known, "tags": tags, "cardData": card, "siblings": siblings})

    def tree(self) -> _Answer:
        folder = f"{self.parts['path']}/" if "path" in self.parts else ""
        found = _listing(self.commit.files, folder, self.query.get("recursive") == ["true"])
        if folder and not found:
            raise _refusal(404, "Entry not found", "EntryNotFound")
        return _Answer(found)

    def paths_info(self) -> _Answer:
        wanted = parse_qs(self.body.decode()).get("paths", [])
        return _Answer([one for one in _listing(self.commit.files) if one["path"] in wanted])

    def preupload(self) -> _Answer:
        made, now = [], {one["path"]: one.get("lfs", one)["oid"] for one in _listing(self.commit.files)}
        for file in json.loads(self.body)["files"]:
            mode = "lfs" if _is_lfs(file["path"], file["size"], base64.b64decode(file["sample"])) else "regular"
            made.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": now.get(file["path"])})
        return _Answer({"files": made, "commitOid": self.commit.sha})

    def batch(self) -> _Answer:
        objects = json.loads(self.body)["objects"]
        for one in [one for one in objects if one["oid"] not in self.repo.lfs]:
            href = f"{self.hub.url}/{self.parts['name']}.git/lfs/{one['oid']}"
            one["actions"] = {"upload": {"href": f"{href}?signed=1"}, "verify": {"href": f"{href}/verify"}}
        return _Answer({"transfer": "basic", "objects": objects})

    def put(self) -> _Answer:
        if self.query.get("signed") != ["1"]:  # as a storage's presigned URL, it lets in without a token
            raise _refusal(403, "Access Denied")
        if hashlib.sha256(self.body).hexdigest() != self.parts["oid"]:
            raise _refusal(400, "The SHA256 you specified did not match what we received.")
        self.repo.lfs[self.parts["oid"]] = self.body
        return _Answer()

    def verify(self) -> _Answer:
        if len(self.repo.lfs.get(self.parts["oid"], b"")) != json.loads(self.body)["size"]:
            raise _refusal(404, "Object does not exist")
        return _Answer({})

    def add_commit(self) -> _Answer:
        """All of the operations or none."""
        header, *operations = [json.loads(line) for line in self.body.splitlines()]
        if header["key"] != "header" or self.parts["revision"] != "main" or "create_pr" in self.query:
            raise _refusal(400, "this server takes commits to main")
        if not self.commit.sha.startswith(header["value"].get("parentCommit", "")):
            raise _refusal(412, "A commit has happened since. Please refresh and try again.")
        files = dict(self.commit.files)
        for kind, value in [(one["key"], one["value"]) for one in operations]:
            path = value["path"]
            if kind == "file":
                files[path] = base64.b64decode(value["content"], validate=True)
            elif kind == "lfsFile" and len(self.repo.lfs.get(value["oid"], b"")) == value["size"]:
                files[path] = self.repo.lfs[value["oid"]]
            elif kind == "lfsFile":
                raise _refusal(400, f"an LFS pointer pointed to a file that does not exist. Offending file: - {path}")
            elif kind != "deletedFile":
                raise _refusal(400, f"this server does not know {kind}")
            elif files.pop(path, None) is None:
                raise _refusal(404, "A file with this name doesn't exist", "EntryNotFound")
        message = "\n\n".join(filter(None, (header["value"]["summary"], header["value"].get("description"))))
        self.repo.commits.append(Commit(sha := os.urandom(20).hex(), files, message))
        url = f"{self.hub.url}/{self.parts['name']}/commit/{sha}"
        return _Answer({"success": True, "commitOid": sha, "commitUrl": url})

    def resolve(self) -> _Answer:
        """A file or a range of it, at once: no redirect to a CDN, none of Xet's headers."""
        if (data := self.commit.files.get(self.parts["path"])) is None:
            raise _refusal(404, "Entry not found", "EntryNotFound", X_Repo_Commit=self.commit.sha)
        found = _entry(self.parts["path"], data)
        headers = {"X_Repo_Commit": self.commit.sha, "Accept_Ranges": "bytes", "ETag": f'"{found["oid"]}"'}
        if "lfs" in found:
            headers |= {"X_Linked_Etag": f'"{found["lfs"]["oid"]}"', "X_Linked_Size": str(len(data))}
        asked = re.fullmatch(r"bytes=(?:(\d+)-(\d*)|-(\d+))", self.headers.get("Range", ""))
        if asked is None:
            return _Answer(data, **headers)
        start = int(asked[1]) if asked[1] else max(0, len(data) - int(asked[3]))
        stop = min(len(data), int(asked[2]) + 1) if asked[2] else len(data)
        if start >= stop:
            raise _refusal(416, "Range Not Satisfiable", Content_Range=f"bytes */{len(data)}")
        return _Answer(data[start:stop], 206, **headers, Content_Range=f"bytes {start}-{stop - 1}/{len(data)}")


_NAME, _AT, _PATH, _OID = "(?P<name>[^/]+/[^/]+)", "(?P<revision>[^/]+)", "(?P<path>.+)", "(?P<oid>[0-9a-f]+)"
_MODEL = f"/api/models/{_NAME}"
# first, who may ask: "" whoever may read, "user" a token, "write" the repository's owner, "signed" a URL given out
ROUTES = [
    ("user", "GET /api/whoami-v2", "whoami"),
    ("user", "POST /api/repos/create", "create"),
    ("", "POST /api/validate-yaml", "validate"),
    ("", f"GET {_MODEL}/auth-check", "allow"),
    ("write", f"GET {_MODEL}/auth-check/write", "allow"),
    ("", f"GET {_MODEL}(?:/revision/{_AT})?", "info"),
    ("", f"GET {_MODEL}/tree/{_AT}(?:/{_PATH})?", "tree"),
    ("", f"POST {_MODEL}/paths-info/{_AT}", "paths_info"),
    ("write", f"POST {_MODEL}/preupload/{_AT}", "preupload"),
    ("write", f"POST /{_NAME}[.]git/info/lfs/objects/batch", "batch"),
    ("signed", f"PUT /{_NAME}[.]git/lfs/{_OID}", "put"),
    ("write", f"POST /{_NAME}[.]git/lfs/{_OID}/verify", "verify"),
    ("write", f"POST {_MODEL}/commit/{_AT}", "add_commit"),
    ("", f"GET /{_NAME}/resolve/{_AT}/{_PATH}", "resolve"),
]


@contextlib.contextmanager
def hub(token: str = "hf_test") -> Iterator[Hub]:
    """A Hub that knows one user and one token, in threads of this process."""
    made = Hub(token)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("_HubHandler", (_Handler,), {"hub": made}))
    made.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield made
    finally:
        server.shutdown()
        server.server_close()
