"""Cache of judges' replies in one SQLite file, so that no request is sent twice.

A reply is committed to the disk before it is used. The file uses SQLite's rollback journal, because the write-ahead log
needs shared memory, which network disks lack; the journal's fsyncs are fast compared to a judge. Prompts are
not stored, because the files for FastChat contain them, nor are requests without a reply (errors, refusals).
"""

import hashlib
import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from salsa_peft.utils.console import say
from salsa_peft.utils.errors import SalsaError, require
from salsa_peft.utils.messages import one_line, short_path

VERSION = 2
TABLE = (
    "CREATE TABLE replies (key TEXT PRIMARY KEY, text TEXT NOT NULL, finish TEXT NOT NULL, prompt_tokens INTEGER NOT"
    " NULL, completion_tokens INTEGER NOT NULL, digest TEXT)"
)
FIELDS = "text, finish, prompt_tokens, completion_tokens"
WAIT = 60.0
"""Number of seconds to wait while another process writes to the file."""


class Reply(NamedTuple):
    """A judge's reply to one request."""

    text: str
    finish: str
    """Reason why the reply ended, as the endpoint reports it: stop, length …"""
    prompt_tokens: int
    completion_tokens: int


def key_of(endpoint: str, model: str, messages: Sequence[Mapping[str, Any]], parameters: Mapping[str, Any], attempt: int) -> str:  # fmt: skip
    """SHA-256 of everything that a reply depends on. Raises ValueError if a parameter is NaN."""
    asked = [endpoint, model, list(messages), dict(parameters), attempt]
    return hashlib.sha256(json.dumps(asked, sort_keys=True, allow_nan=False).encode()).hexdigest()


def digest(row: Sequence[Any]) -> str:
    """Checksum of a key and its reply; SQLite itself stores no checksums."""
    return hashlib.sha256(json.dumps(list(row)).encode()).hexdigest()


class Cache:
    """Persistent mapping of keys to replies, safe against kill -9 and concurrent processes."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        with self._readable_errors():
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
            self.file = sqlite3.connect(":memory:" if path is None else path, timeout=WAIT, isolation_level=None)
            self.file.execute("PRAGMA synchronous = FULL")
            with self.file:
                self.file.execute("BEGIN IMMEDIATE")
                version = self.file.execute("PRAGMA user_version").fetchone()[0]
                if version == 0:
                    self.file.execute(TABLE)
                elif version == 1:
                    self._add_digests()
                if version in (0, 1):
                    self.file.execute(f"PRAGMA user_version = {VERSION}")
        require(
            version in (0, 1, VERSION),
            f"{self._name}: this judge cache has version {version}, but this salsa_peft reads version {VERSION}; move"
            " the file away to ask the judge again",
        )

    def _add_digests(self) -> None:
        """Upgrade a cache of version 1, which has no checksums: compute them from the stored replies."""
        self.file.execute("ALTER TABLE replies ADD COLUMN digest TEXT")
        rows = self.file.execute(f"SELECT key, {FIELDS} FROM replies").fetchall()
        self.file.executemany("UPDATE replies SET digest = ? WHERE key = ?", [(digest(row), row[0]) for row in rows])

    def get(self, key: str) -> Reply | None:
        """The stored reply, or None. A reply that does not match its checksum is reported and deleted."""
        with self._readable_errors():
            row = self.file.execute(f"SELECT {FIELDS}, digest FROM replies WHERE key = ?", [key]).fetchone()
            if row is not None and row[-1] != digest((key, *row[:-1])):
                say(f"{self._name}: the reply {key[:12]} is damaged; the judge is asked again")
                self.file.execute("DELETE FROM replies WHERE key = ?", [key])
                row = None
        return None if row is None else Reply(*row[:-1])

    def put(self, replies: Mapping[str, Reply]) -> dict[str, Reply]:
        """Store replies in one transaction. Where another process stored a reply first, its reply is returned."""
        with self._readable_errors(), self.file:
            self.file.execute("BEGIN IMMEDIATE")
            self.file.executemany(
                "INSERT INTO replies VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (key) DO NOTHING",
                [(key, *reply, digest((key, *reply))) for key, reply in replies.items()],
            )
        kept = {key: self.get(key) for key in replies}
        return {key: reply for key, reply in kept.items() if reply is not None}

    @property
    def _name(self) -> str:
        return short_path(str(self.path or "the judge's cache"))

    @contextmanager
    def _readable_errors(self) -> Iterator[None]:
        """Context that turns errors of SQLite and the file system into SalsaError of one line."""
        try:
            yield
        except (sqlite3.Error, OSError, ValueError, OverflowError) as error:
            raise SalsaError(
                f"{self._name}: cannot use this file as the judge's cache: {one_line(error)}; free space on the disk,"
                " or move the file away to ask the judge again"
            ) from error
