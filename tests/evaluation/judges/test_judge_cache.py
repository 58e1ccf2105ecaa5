"""Replies on the disk: kept whole through kill -9, shared by two processes, refused in one line where the file is none."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from salsa_peft.evaluation.judges.cache import Cache, Reply, key_of
from salsa_peft.utils.errors import SalsaError

REPLY = Reply("Because. [[A]]", "stop", 10, 5)
ASKED = ("http://here/v1", "m", [{"role": "user", "content": "q"}], {"temperature": 0.0, "max_tokens": 9}, 0)


def test_what_is_put_is_there_in_another_opening(tmp_path: Path) -> None:
    """Every field of it, whatever characters."""
    odd = Reply("é\0\n[[B]] 🙂", "length", 0, 2**40)
    first = Cache(tmp_path / "deep" / "c.sqlite")
    assert first.get("k") is None
    assert first.put({"k": REPLY, "l": odd}) == {"k": REPLY, "l": odd}
    assert first.put({}) == {}
    first.file.close()
    again = Cache(tmp_path / "deep" / "c.sqlite")
    assert (again.get("k"), again.get("l"), again.get("m")) == (REPLY, odd, None)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["c.sqlite"]


def test_the_first_reply_stays() -> None:
    """Whoever comes second is given what is kept."""
    cache = Cache(None)
    cache.put({"k": REPLY})
    assert cache.put({"k": Reply("[[B]]", "stop", 1, 1), "l": REPLY}) == {"k": REPLY, "l": REPLY}


@pytest.mark.parametrize("place", range(5))
def test_a_key_is_of_everything_that_a_reply_depends_on(place: int) -> None:
    """Endpoint, model, messages, parameters, attempt; not of the order of parameters."""
    other = ("http://there/v1", "n", [{"role": "user", "content": "r"}], {"temperature": 0.1, "max_tokens": 9}, 1)
    changed = [*ASKED[:place], other[place], *ASKED[place + 1 :]]
    assert key_of(*ASKED) != key_of(*changed)  # type: ignore[arg-type]
    turned = dict(reversed(ASKED[3].items()))
    assert key_of(*ASKED[:3], turned, 0) == key_of(*ASKED) and len(key_of(*ASKED)) == 64


def test_a_file_that_is_none_is_said_in_a_line(tmp_path: Path) -> None:
    """Garbage, a folder, another version."""
    (tmp_path / "garbage").write_bytes(b"not a database at all, " * 100)
    (tmp_path / "folder").mkdir()
    with sqlite3.connect(tmp_path / "newer") as newer:
        newer.execute("PRAGMA user_version = 7")
    for name, expected in (
        ("garbage", "cannot use this file as the judge's cache"),
        ("folder", "cannot use this file as the judge's cache"),
        ("newer", "version 7"),
    ):
        with pytest.raises(SalsaError) as found:
            Cache(tmp_path / name)
        assert expected in str(found.value) and name in str(found.value) and "\n" not in str(found.value)
    good = Cache(tmp_path / "good")
    good.file.execute("DROP TABLE replies")
    for call in (lambda: good.get("k"), lambda: good.put({"k": REPLY})):
        with pytest.raises(SalsaError, match="cannot use this file as the judge's cache"):
            call()
    assert not good.file.in_transaction


def test_all_or_none(tmp_path: Path) -> None:
    """A batch whose last reply can't be kept leaves nothing of it."""
    cache = Cache(tmp_path / "c")
    with pytest.raises(SalsaError):
        cache.put({"k": REPLY, "l": REPLY._replace(text=None)})  # type: ignore[arg-type]
    assert cache.get("k") is None
    cache.put({"k": REPLY})
    assert Cache(tmp_path / "c").get("k") == REPLY


WRITER = """
import sys
from pathlib import Path
from salsa_peft.evaluation.judges.cache import Cache; from salsa_peft.evaluation.judges.cache import Reply
cache, name = Cache(Path(sys.argv[1])), sys.argv[2]
for number in range(int(sys.argv[3])):
    kept = cache.put({f"{number}": Reply(name * 5000, "stop", number, 0)})
    print(number, kept[f"{number}"].text[0], flush=True)
"""


def start(path: Path, name: str, count: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(path), name, str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=dict(os.environ))


def test_kill_9_leaves_what_was_said_to_be_kept(tmp_path: Path) -> None:
    """A process that is killed while it writes: everything that put() returned from is there and whole, and one more at most."""
    writer = start(tmp_path / "c", "a", 100_000)
    assert writer.stdout is not None
    lines = [writer.stdout.readline() for _ in range(5)]
    time.sleep(0.05)
    writer.send_signal(signal.SIGKILL)
    lines += writer.stdout.readlines()
    writer.wait()
    writer.stdout.close()
    last = int([line for line in lines if line.endswith("\n")][-1].split()[0])
    cache = Cache(tmp_path / "c")
    assert all(cache.get(str(number)) == Reply("a" * 5000, "stop", number, 0) for number in range(last + 1))
    (count,) = cache.file.execute("SELECT count(*) FROM replies").fetchone()
    assert last + 1 <= count <= last + 2
    assert cache.file.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_two_processes_agree(tmp_path: Path) -> None:
    """Both write the same keys at once: no error, and each is told the reply that the file has."""
    writers = [start(tmp_path / "c", name, 60) for name in "ab"]
    said = [writer.communicate(timeout=60)[0].splitlines() for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0]
    assert said[0] == said[1] and len(said[0]) == 60
    cache = Cache(tmp_path / "c")
    kept = [cache.get(str(number)) for number in range(60)]
    assert [f"{number} {reply.text[0]}" for number, reply in enumerate(kept) if reply] == said[0]


def test_a_cache_of_version_1_goes_on(tmp_path: Path) -> None:
    """It had no digests: what it has is taken as it is, and has them from then on."""
    path = tmp_path / "c.sqlite"
    with sqlite3.connect(path) as old:
        old.execute(
            "CREATE TABLE replies (key TEXT PRIMARY KEY, text TEXT NOT NULL, finish TEXT NOT NULL,"
            " prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL)"
        )
        old.execute("INSERT INTO replies VALUES ('k', 'said', 'stop', 3, 4)")
        old.execute("PRAGMA user_version = 1")
    old.close()
    for _ in range(2):
        cache = Cache(path)
        assert cache.get("k") == Reply("said", "stop", 3, 4)
        cache.file.close()
    with sqlite3.connect(path) as new:
        assert new.execute("PRAGMA user_version").fetchone() == (2,)
    new.close()
