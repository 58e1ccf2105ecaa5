"""kill -9 at any moment of a run, by its command, its whole group or its stage: the same command ends as if nothing had been.

The whole recipe (every stage there is, pushes to a loopback Hub included) is slow; the run folder's own part is tried with stages that do
next to nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import fake_stages
import pytest
from hub_server import hub
from paths import ROOT

KILLS, TERMS, AT_ONCE = 50, 10, 2
SMALL = {
    "toy.pretrain_steps": 30, "toy.pretrain_examples": 300, "toy.demonstrations": 32, "toy.preferences": 64, "toy.prompts": 64,
    "toy.eval_prompts": 16, "toy.hidden_size": 32, "sft.num_train_epochs": 1, "sft.batch_size": 16, "sft.seeds": [0, 1],
    "reward.num_train_epochs": 1, "reward.batch_size": 16, "ppo.batch_size": 16, "ppo.save_steps": 1, "landscape.plane": None,
    "landscape.alphas": [0.0, 0.5, 1.0], "evaluate.models": ["seed-1", "base"], "dpo.batch_size": 16, "evaluate.judge": "reward",
    "evaluate.pairs": [["salsa", "seed-0"]], "hub": {"push": ["soup"], "namespace": "tester", "base_model": "tester/world"},
    "policies": {"ppo": None, "mkl": None, "ppo-shrunk": None, "ppo-base": None, "salsa": {"reference": "soup"},
                 "moving": {"reference": {"soup": {"sync_every": 1, "mixup_alpha": 0.5}}}, "dpo": {"reference": "soup", "algorithm": "dpo"}},
}  # fmt: skip
SAVES = (
    "**/.partial", "**/checkpoint-1", "**/checkpoint-3", "toy/*/base/*", "sft/seed-1/*/*.safetensors", "reward/*/*", "soup/*/*",
    "dpo/dpo/*/*", "ppo/salsa/*/rollout*", "ppo/moving/*/*", "landscape/*/*", "evaluate/*/*", "judge/*/*", "report/*/*", "hub/*/*",
    "ppo/salsa/*/manifest.json", "sft/seed-0/*/manifest.json", "../logs", "../report.html", "*/*/.manifest*",
    "../results.json", "../seed-0", "../salsa", "../figures/*",
)  # fmt: skip
"""What is looked for: the moment that it appears is in a save, or between two stages."""
TIMES = ("seconds", "peak_mb")
SAME = ("*.safetensors", "metrics.jsonl", "completions.jsonl", "answers.jsonl", "landscape.json", "verdicts.json")
"""Files that a run and one that was killed share to the byte."""


class Trial(NamedTuple):
    """A moment and whom to kill."""

    number: int
    whom: str
    after: float
    """Seconds: of the start, or of the sight of `save`."""
    save: str | None


def trials(number: int, seconds: float, whom: tuple[str, ...]) -> list[Trial]:
    """Three in five at a moment of the clock, the others when something was just begun to be written."""
    drawn = random.Random(number)
    found = []
    for index in range(number):
        save = (
            SAVES[index // 5 * 2 + index % 5 - 3]
            if index % 5 > 2 and index // 5 * 2 + index % 5 - 3 < len(SAVES)
            else None
        )
        moment = drawn.uniform(0, seconds) if save is None else drawn.uniform(0, 0.03)
        found.append(Trial(index, whom[index % len(whom)], moment, save))
    return found


def start(folder: Path, environment: dict[str, str]) -> subprocess.Popen[str]:
    """`salsa run quickstart --lora`, cut small, in a process group of its own."""
    sets = [word for key, value in SMALL.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    words = [sys.executable, "-m", "salsa_peft.recipe", "quickstart", "--lora", *sets, "--output-dir", str(folder)]
    return subprocess.Popen(
        words,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def children(pid: int) -> list[int]:
    """Of a process and theirs, the last one first: a stage is a child of the fork server."""
    found: list[int] = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(entry.read_text().rsplit(")", 1)[1].split()[1]) == pid:
                found = [*children(int(entry.parent.name)), int(entry.parent.name), *found]
    return found


def stop(process: subprocess.Popen[str], trial: Trial) -> None:
    """Send the signal."""
    with contextlib.suppress(ProcessLookupError):
        if trial.whom == "group":
            os.killpg(process.pid, signal.SIGKILL)
        elif trial.whom == "stage":
            below = children(process.pid)
            os.kill(below[0] if below else process.pid, signal.SIGKILL)
        else:
            process.send_signal(signal.SIGTERM if trial.whom == "terminate" else signal.SIGKILL)


def wait_for(trial: Trial, process: subprocess.Popen[str], folder: Path) -> bool:
    """Until the trial's moment → whether the run is still on its way."""
    while trial.save is not None and process.poll() is None and not any((folder / "stages").glob(trial.save)):
        time.sleep(0.002)
    end = time.monotonic() + trial.after
    while time.monotonic() < end and process.poll() is None:
        time.sleep(0.002)
    return process.poll() is None


def left(folder: Path) -> dict[str, Any]:
    """What a finished run has: its summary without times, and the hashes of everything that no time is in."""
    (report,) = folder.glob("stages/report/*/summary.json")

    def timeless(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: timeless(entry) for key, entry in value.items() if key not in TIMES}
        return [timeless(entry) for entry in value] if isinstance(value, list) else value

    hashes = {}
    for manifest in sorted(folder.glob("stages/**/manifest.json")):
        found = json.loads(manifest.read_text())
        assert not list(manifest.parent.glob("checkpoint-*")) and not (manifest.parent / "begun.json").exists()
        for name, entry in found["files"].items():
            if any(Path(name).match(pattern) for pattern in SAME):
                hashes[f"{found['unit']}/{name}"] = entry["sha256"]
    assert len(hashes) > 15
    return {"summary": timeless(json.loads(report.read_text())), "hashes": hashes}


def attempt(trial: Trial, place: Path, whole: dict[str, Any]) -> str | None:
    """Kill, run again → what went wrong, or None."""
    folder = place / f"{trial.whom}-{trial.number}" / "run"
    with hub("hf_test") as server:
        environment = {**server.environment(folder.parent / "home"), "OMP_NUM_THREADS": "1"}
        process = start(folder, environment)
        cut = wait_for(trial, process, folder)
        stop(process, trial)
        said = process.communicate(timeout=240)[1]
        if trial.whom == "terminate" and cut and (folder / "recipe.yaml").exists() and process.returncode != 143:
            return f"{trial}: code {process.returncode}, expected 143: {said[-1500:]}"
        if trial.whom == "stage" and cut and process.returncode not in (0, 1, -9):
            return f"{trial}: code {process.returncode}: {said[-1500:]}"
        again = start(folder, environment)
        said = again.communicate(timeout=240)[1]
        if again.returncode != 0:
            return f"{trial}: the same command ended with {again.returncode}: {said[-1500:]}"
        if "tester/run-soup" not in server.repos:
            return f"{trial}: nothing was pushed"
    try:
        found = left(folder)
    except (AssertionError, ValueError) as error:
        return f"{trial}: {error!r}"
    different = [
        key for key in whole["hashes"] | found["hashes"] if whole["hashes"].get(key) != found["hashes"].get(key)
    ]
    if found["summary"] != whole["summary"] or different:
        return f"{trial}: another end: {different or 'summary.json'}"
    return None


class TestWholeRecipe:
    @pytest.fixture(scope="class")
    def whole(self, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], float]:
        """What an unbroken run leaves, and its seconds."""
        folder = tmp_path_factory.mktemp("whole") / "run"
        with hub("hf_test") as server:
            begun = time.monotonic()
            process = start(folder, {**server.environment(folder.parent / "home"), "OMP_NUM_THREADS": "1"})
            said = process.communicate(timeout=240)[1]
        assert process.returncode == 0, said[-3000:]
        return left(folder), time.monotonic() - begun

    @pytest.mark.slow
    @pytest.mark.timeout(5400)
    @pytest.mark.parametrize(("number", "whom"), [(KILLS, ("command", "group", "command", "stage", "command")), (TERMS, ("terminate",))],
                             ids=["kill-9", "SIGTERM"])  # fmt: skip
    def test_at_random_moments(
        self, whole: Any, tmp_path: Path, tally: Any, number: int, whom: tuple[str, ...]
    ) -> None:
        """The rerun's summary.json, weights, metrics and answers are those of a run that nobody disturbed."""
        expected, seconds = whole
        assert seconds < 60 or os.cpu_count() == 1 or os.getloadavg()[0] > 2, "a whole recipe of at most a minute"
        with ThreadPoolExecutor(AT_ONCE) as pool:
            results = list(pool.map(lambda trial: attempt(trial, tmp_path, expected), trials(number, seconds, whom)))
        wrong = [line for line in results if line is not None]
        tally(tries=number, survived=number - len(wrong), unbroken=f"{seconds:.0f} s")
        assert not wrong, "\n".join(wrong)


TRAINING = {
    **SMALL, "policies": {"dpo": {"reference": "soup", "algorithm": "dpo"}}, "adapter.lora_dropout": 0.1, "toy.demonstrations": 100,
    "sft.batch_size": 8, "sft.micro_batch_size": 4, "sft.max_steps": 250, "sft.save_steps": 1, "reward.seeds": [0, 1], "reward.batch_size": 8,
    "reward.max_steps": 150, "reward.save_steps": 1, "dpo.batch_size": 8, "dpo.micro_batch_size": 4, "dpo.max_steps": 200, "dpo.save_steps": 1,
    "dpo.learning_rate": 1e-3, "evaluate.models": [], "evaluate.pairs": [["dpo", "seed-0"]], "hub": {},
}  # fmt: skip
"""The quickstart with training stages of many short steps and a checkpoint after each."""
INSIDE = 20
"""Kills in each of these stages."""


class TestTrainingStages:
    def start(self, folder: Path, *stages: str) -> subprocess.Popen[str]:
        """Some stages of the recipe, in a process group of their own."""
        sets = [word for key, value in TRAINING.items() for word in ("--set", f"{key}={json.dumps(value)}")]
        words = ["-m", "salsa_peft.recipe", "quickstart", "--lora", *sets, "--output-dir", str(folder)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        return subprocess.Popen([sys.executable, *words, "--stages", ",".join(stages)], cwd=ROOT, env=environment, text=True,
                                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)  # fmt: skip

    def left(self, folder: Path) -> dict[str, Any]:
        """Weights and metrics of a finished unit to the byte, and the rows of its log without times."""
        times = ("train_runtime", "train_samples_per_second", "train_steps_per_second", *TIMES)
        found: dict[str, Any] = {}
        for file in sorted(file for file in folder.rglob("*") if file.is_file() and file.name != "manifest.json"):
            rows = [file.read_bytes()]
            if file.name in ("log.jsonl", "soup.json"):
                texts = file.read_text().splitlines() if file.name == "log.jsonl" else [file.read_text()]
                rows = [{key: value for key, value in json.loads(text).items() if key not in times} for text in texts]
            found[file.relative_to(folder).as_posix()] = rows
        return found

    def saved(self, folder: Path, name: str) -> set[str]:
        """Names of a unit's checkpoints, those of a reward model's members with the member's."""
        found = [*folder.glob(f"stages/{name}/*/checkpoint-*"), *folder.glob(f"stages/{name}/*/seed-*/checkpoint-*")]
        return {f"{path.parent.name}/{path.name}" for path in found}

    def killed(self, folder: Path, name: str, whom: str, after: float) -> str | None:
        """Start a stage and kill it `after` seconds from the first new checkpoint → its last checkpoint, or None if it ended."""
        before = self.saved(folder, name)
        process = self.start(folder, name)
        while process.poll() is None and not self.saved(folder, name) - before:
            time.sleep(0.002)
        running = wait_for(Trial(0, whom, after, None), process, folder)
        stop(process, Trial(0, whom, after, None))
        said = process.communicate(timeout=240)[1]
        assert running or process.returncode == 0, said[-2000:]
        return ", ".join(self.saved(folder, name)) if running else None

    @pytest.mark.slow
    @pytest.mark.timeout(3600)
    def test_kill_9_inside_a_stage(self, tmp_path: Path, tally: Any) -> None:
        """Twenty kills of one unit, each of a run that went on from the one before: it ends as if there had been none."""
        folder, aside, drawn, survived = tmp_path / "run", tmp_path / "aside", random.Random(0), 0
        whole = self.start(folder, "toy", "data", "sft", "reward", "soup", "dpo")
        said = whole.communicate(timeout=1200)[1]
        assert whole.returncode == 0, said[-3000:]
        for name in ("sft/seed-0", "reward", "dpo/dpo"):
            (place,) = (path.parent for path in folder.glob(f"stages/{name}/*/manifest.json"))
            expected = self.left(place)
            place.rename(aside)
            whom = ("command", "group", "stage")
            seen = [self.killed(folder, name, whom[index % 3], drawn.uniform(0, 0.12)) for index in range(INSIDE)]
            assert None not in seen, f"{name} had ended before the last kill: {seen}"
            again = self.start(folder, name)
            said = again.communicate(timeout=600)[1]
            assert again.returncode == 0 and f"{name}  resuming from checkpoint-" in said, said[-3000:]
            found = self.left(place)
            assert found.keys() == expected.keys()
            assert [file for file in found if found[file] != expected[file]] == [], name
            survived += INSIDE
            shutil.rmtree(place)
            aside.rename(place)
        tally(tries=3 * INSIDE, survived=survived)


FAKE = "name: x\ntoy: {}\nsft: {seeds: [0, 1]}\npolicies: {ppo: {reference: seed-0}, salsa: {reference: soup}}\n"


def fake(folder: Path, *words: str) -> subprocess.Popen[str]:
    """The command with stages that do next to nothing."""
    (folder / "x.yaml").write_text(FAKE)
    return fake_stages.start(folder, "x.yaml", *words, stdout=subprocess.DEVNULL, start_new_session=True)


def results(folder: Path) -> dict[str, str]:
    """Unit → what it left."""
    files = (folder / "runs" / "x-lora" / "stages").glob("**/result.txt")
    return dict(line.split() for line in (file.read_text() for file in files))


def test_the_run_folder_at_random_moments(tmp_path: Path, tally: Any) -> None:
    """Ten kills in one folder, one after the other, then a run to the end; each begins where the one before was."""
    (tmp_path / "a").mkdir()
    begun = time.monotonic()
    process = fake(tmp_path / "a")
    assert process.wait(60) == 0
    seconds, drawn = time.monotonic() - begun, random.Random(0)
    for index in range(10):
        folder = tmp_path / f"b{index % 2}"
        folder.mkdir(exist_ok=True)
        process = fake(folder)
        wait_for(Trial(index, "command", drawn.uniform(0, seconds), None), process, folder)
        stop(process, Trial(index, ("command", "group", "stage")[index % 3], 0, None))
        process.communicate(timeout=60)
    for name in ("b0", "b1"):
        process = fake(tmp_path / name)
        said = process.communicate(timeout=60)[1]
        assert process.returncode == 0, said
        assert results(tmp_path / name) == results(tmp_path / "a") and len(results(tmp_path / "a")) == 13
        process = fake(tmp_path / name)
        assert process.communicate(timeout=60)[1].count("cached") == 13
    tally(tries=10)


def test_a_kill_between_the_manifest_and_tidying_up(tmp_path: Path) -> None:
    """The unit is finished; the checkpoints that it needed on the way, which can be as large as all else, go when the command is run again."""
    assert fake(tmp_path).wait(60) == 0
    (unit,) = (tmp_path / "runs" / "x-lora" / "stages" / "ppo" / "salsa").iterdir()
    (unit / "checkpoint-15").mkdir()
    (unit / "checkpoint-15" / "optimizer.pt").write_bytes(b"large")
    (unit / "begun.json").write_text("{}")
    process = fake(tmp_path)
    assert "ppo/salsa … cached" in process.communicate(timeout=60)[1] and process.returncode == 0
    assert sorted(path.name for path in unit.iterdir()) == ["deeper", "manifest.json", "result.txt"]


class TestTwoRunsOneFolder:
    def test_the_second_says_who_holds_the_lock_and_leaves(self, tmp_path: Path) -> None:
        """Host, pid and since when, in one line; it writes nothing, and the first goes on to its end."""
        first = fake(tmp_path, "--set", f"description={json.dumps(json.dumps({'reward': 'sleep'}))}")
        assert first.stderr is not None
        assert any(line.startswith("pid ") for line in first.stderr)
        before = sorted(path for path in tmp_path.rglob("*"))
        second = fake(tmp_path)
        said = second.communicate(timeout=60)[1]
        assert second.returncode == 2 and said.count("\n") == 1
        assert (
            f"in use by host {os.uname().nodename}, pid {first.pid}, since 20" in said
            and "wait for it, or use another" in said
        )
        assert sorted(path for path in tmp_path.rglob("*")) == before
        first.kill()
        first.communicate(timeout=60)

    def test_a_lock_whose_process_is_gone_is_taken_over(self, tmp_path: Path) -> None:
        """Though its text still stands in the file."""
        first = fake(tmp_path, "--set", f"description={json.dumps(json.dumps({'reward': 'sleep'}))}")
        assert first.stderr is not None
        assert any(line.startswith("pid ") for line in first.stderr)
        first.kill()
        first.communicate(timeout=60)
        lock = tmp_path / "runs" / "x-lora" / ".lock"
        assert f"pid {first.pid}" in lock.read_text()
        second = fake(tmp_path)
        said = second.communicate(timeout=60)[1]
        assert second.returncode == 0 and "sft/seed-0 … cached" in said and "reward … unfinished" in said
        assert lock.read_text() == ""

    def test_of_many_at_once_one_works(self, tmp_path: Path, tally: Any) -> None:
        """Six start together in an empty folder: one makes everything, the others leave or find it made."""
        together = [fake(tmp_path) for _ in range(6)]
        said = [process.communicate(timeout=120)[1] for process in together]
        codes = [process.returncode for process in together]
        made = [text.count("… done") for text in said]
        assert set(codes) <= {0, 2} and 0 in codes and sum(made) == 13
        assert all("in use by host" in text for text, code in zip(said, codes, strict=True) if code == 2)
        tally(tries=6)
