"""Replicates at the same time: `salsa run --jobs N`."""

from __future__ import annotations

import functools
import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import fake_stages
import parallel_tasks
import pytest
from fake_stages import TINY

from salsa_peft.config.load import load_recipe
from salsa_peft.recipe.__main__ import main as salsa_run
from salsa_peft.recipe.estimates.hardware import Gpu
from salsa_peft.recipe.parallel import room
from salsa_peft.recipe.parallel.pool import Task, run_together
from salsa_peft.utils.manifests import replicate_folders

WORDS = ("--output-dir", "run", "--stages", "toy,data,sft")


@pytest.fixture
def here(tmp_path: Path) -> Path:
    (tmp_path / "tiny.yaml").write_text(TINY)
    return tmp_path


def lines_of(said: str, name: str) -> list[str]:
    """The lines of one replicate, without its name."""
    return [line.removeprefix(f"[{name}] ") for line in said.splitlines() if line.startswith(f"[{name}] ")]


def test_lines_of_tasks_are_not_mixed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Two tasks that wait for one another, then two that fail; of a bar the last state is printed."""
    meet = functools.partial(parallel_tasks.meet, str(tmp_path))
    calls = {"a": functools.partial(meet, "a", "b"), "b": functools.partial(meet, "b", "a"),
             "c": parallel_tasks.refuse, "d": parallel_tasks.killed}  # fmt: skip
    finished: list[str] = []
    slots = [{"OMP_NUM_THREADS": "3"}] * 2
    failed = run_together(
        [Task(name, call, tmp_path) for name, call in calls.items()], slots, lambda task: finished.append(task.name)
    )
    out, said = capfd.readouterr()
    assert sorted(finished) == ["a", "b"] and not out
    for name in "ab":
        assert lines_of(said, name) == [f"half of {name} and the rest", "threads 3", "100%|###|", "no end of line"]
    assert lines_of(said, "c") == ["data.prompts: wrong"] == failed["c"].lines and failed["c"].code == 2
    assert failed["d"].code == 1 and "killed by SIGKILL" in failed["d"].lines[0]


def files(run: Path) -> dict[str, Any]:
    """Path in the run's folder → content, without times and memory."""
    found: dict[str, Any] = {}
    for path in sorted(path for path in run.rglob("*") if path.is_file()):
        content: Any = path.read_bytes()
        if path.name == "manifest.json":
            measured = ("seconds", "started", "finished", "peak_mb", "gpu_peak_mb", "facts")
            content = {key: value for key, value in json.loads(content).items() if key not in measured}
        found[str(path.relative_to(run))] = content
    return found


def test_the_results_are_those_of_one_after_the_other(here: Path) -> None:
    """The same files, although one replicate fails at first: the others are finished, and the next command goes on."""

    def run(*words: str) -> tuple[int, str]:
        process = fake_stages.start(here, "tiny.yaml", *WORDS[2:], "--replicates", "3", *words)
        return process.wait(100), process.stderr.read()  # type: ignore[union-attr]

    assert run("--output-dir", "one")[0] == 0
    broken = f"description='{json.dumps({'replicate-1/sft/seed-1': 'crash'})}'"
    together = ("--output-dir", "run", "--jobs", "2")
    code, said = run(*together, "--set", broken)
    assert code == 1
    last = said.splitlines()[-1]
    assert last.startswith("1 of 3 replicates failed: replicate-1 (sft/seed-1 failed: RuntimeError: boom and more")
    assert last.endswith("The others are finished and kept; run the same command again to continue")
    assert any("sft/seed-1 … done" in line for line in lines_of(said, "replicate-2"))
    assert re.search(r"^a replicate needed up to [\d,]+ MB of memory, so 2 at the same time up to ", said, re.MULTILINE)
    code, said = run(*together)
    assert code == 0 and said.count("… done") == 1 and "[replicate-1] sft/seed-1 … done" in said
    one, two = files(here / "one"), files(here / "run")
    assert one.keys() == two.keys() - {"replicate-1/logs/sft-seed-1.log"} and len(one) > 20
    assert all(one[name] == two[name] for name in one)


def test_ctrl_c_stops_all_and_each_resumes(here: Path) -> None:
    """Two replicates are in a stage; both processes end, nothing is lost, and the third has not begun."""
    slow = f"description='{json.dumps({'sft/seed-1': 'sleep'})}'"
    words = ("tiny.yaml", *WORDS, "--replicates", "3", "--jobs", "2")
    process = fake_stages.start(here, *words, "--set", slow, start_new_session=True)
    assert process.stderr is not None
    pids: list[int] = []
    while len(pids) < 2:
        line = process.stderr.readline()
        assert line, "the command ended early"
        pids += [int(found[1]) for found in [re.search(r"pid (\d+)", line)] if found]
    began = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    said = process.stderr.read()
    assert time.monotonic() - began < 60, "the stages were not stopped, but waited for"
    assert "[replicate-0] stopped" not in said, "the command ends the replicates, the signal does not"
    assert process.wait(30) == 130
    assert said.splitlines()[-1] == "stopped; run the same command again to continue" and "Traceback" not in said
    assert all(_gone(pid) for pid in pids)
    assert [folder.name for folder in replicate_folders(here / "run")] == ["replicate-0", "replicate-1"]
    again = fake_stages.start(here, *words)
    said = again.communicate(timeout=100)[1]
    assert again.returncode == 0
    for name in ("replicate-0", "replicate-1"):
        assert "sft/seed-0 … cached" in lines_of(said, name) and "toy … cached" in lines_of(said, name)


def test_the_processes_end_with_the_command(here: Path) -> None:
    """Even by kill -9."""
    slow = f"description='{json.dumps({'toy': 'sleep'})}'"
    process = fake_stages.start(here, "tiny.yaml", *WORDS, "--replicates", "2", "--jobs", "2", "--set", slow)
    assert process.stderr is not None
    pid = next(int(found[1]) for line in process.stderr if (found := re.search(r"pid (\d+)", line)))
    process.kill()
    process.wait()
    end = time.monotonic() + 20
    while not _gone(pid):
        assert time.monotonic() < end
        time.sleep(0.05)


def _gone(pid: int) -> bool:
    """Whether a process has ended; one that nobody has waited for yet counts as ended."""
    try:
        return ") Z " in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return True


def test_what_is_refused(here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(here)
    for words, said in (
        (["--jobs", "2"], "--jobs 2: runs replicates at the same time, and this recipe has none; add --replicates N"),
        (["--jobs", "0", "--replicates", "2"], "--jobs: must be at least 1, not 0"),
    ):
        assert salsa_run(["tiny.yaml", "--lora", *words]) == 2
        assert said in capsys.readouterr().err


def test_what_each_gets_of_the_machine(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cores are shared unless the user chose a number of threads; several GPUs are taken in turn."""

    def recipe(*sets: str) -> Any:
        return load_recipe(str(here / "tiny.yaml"), lora="lora", overrides=list(sets)).recipe

    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    for name in (room.THREADS, room.VISIBLE):
        monkeypatch.delenv(name, raising=False)
    two = [Gpu("x", 10**10), Gpu("y", 10**10)]
    assert room.slots(recipe(), 3, []) == [{"OMP_NUM_THREADS": "5"}] * 3
    assert room.slots(recipe("threads=2"), 3, two[:1]) == [{}] * 3
    assert room.slots(recipe("threads=2"), 3, two) == [{room.VISIBLE: name} for name in "010"]
    monkeypatch.setenv(room.VISIBLE, "GPU-a, GPU-b")
    monkeypatch.setenv(room.THREADS, "4")
    assert room.slots(recipe(), 2, two) == [{room.VISIBLE: "GPU-a"}, {room.VISIBLE: "GPU-b"}]


def test_the_memory_that_jobs_need() -> None:
    """Peak × jobs against the machine, per GPU where there are several; a warning above nine tenths."""
    line, short = room.memory_line(room.Peak(1000.0, None), 3, [], 4000.0)
    assert line == "a replicate needed up to 1,000 MB of memory, so 3 at the same time up to 3,000 of 4,000 MB"
    assert not short and room.memory_line(room.Peak(1000.0, None), 4, [], 4000.0)[1]
    gpus = [Gpu("x", 10 * 10**9), Gpu("y", 20 * 10**9)]
    line, short = room.memory_line(room.Peak(1000.0, 4000.0), 4, gpus, 10_000.0)
    assert "4,000 MB of a GPU’s memory, so 2 at the same time up to 8,000 of 10,000 MB" in line and not short
    line, short = room.memory_line(room.Peak(1000.0, 4000.0), 5, gpus, 10_000.0)
    assert short and line.endswith("; use a smaller --jobs if a stage is killed or slow")
