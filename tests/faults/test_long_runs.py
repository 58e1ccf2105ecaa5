"""Long runs: nothing grows with the number of updates but the logs, and those by a line each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from paths import ROOT
from plain_ppo import PROMPTS

from salsa_peft.training import checkpoints
from salsa_peft.training.ppo import trainer as ppo_trainer

UPDATES, EARLY = 2000, 200


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_two_thousand_updates(tally: Any) -> None:
    """Of the embedded world, by the benchmark: memory, open files and checkpoints at the end are those of update 200, logs grow by a
    line an update. Its time is told and not judged here (another process on the machine would): only growth that is plain to see."""
    words = [sys.executable, "tests/benchmarks/ppo_memory_slope.py", "--updates", str(UPDATES), "--early", str(EARLY)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    ratio = found["late_to_early"]
    tally(
        RSS=f"× {ratio['rss_kb']}", time=f"× {ratio['per_yard']}", slope=f"{found['slope_kb_per_update']} kB an update"
    )
    assert ratio["rss_kb"] < 1.02 and ratio["open_files"] == 1.0 and ratio["per_yard"] < 1.1
    assert found["log_history"] <= ppo_trainer.MAX_LOG_HISTORY and len(found["checkpoints"]) == 2
    assert found["log_bytes"]["metrics.jsonl"] < 1500 * UPDATES


def test_what_a_run_holds_does_not_grow(make_trainer: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """Trainer's history is in every checkpoint, whole: its newest rows stay, in memory and there, and those of evaluations, which are
    nowhere else; metrics.jsonl has every update."""
    monkeypatch.setattr(ppo_trainer, "MAX_LOG_HISTORY", 3)
    trainer = make_trainer(
        num_train_epochs=5, save_strategy="steps", save_steps=1, save_total_limit=2, eval_strategy="steps", eval_steps=4, eval_dataset=PROMPTS[:2]
    )  # fmt: skip
    files: list[int] = []
    end = trainer.end_update

    def counted() -> None:
        end()
        files.append(len(os.listdir("/proc/self/fd")))

    trainer.end_update = counted
    trainer.train()
    assert len(files) == 10 and files[-1] == files[0]
    folder = tmp_path / "out"
    newest, *_ = checkpoints.checkpoints(folder)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    history = json.loads((newest / "trainer_state.json").read_text())["log_history"]
    assert [row["update"] for row in rows] == list(range(1, 11))
    assert [row["step"] for row in history if "eval_score" in row] == [4, 8, 10]
    assert [row["update"] for row in history if "update" in row] == [9, 10]
    assert len(trainer.state.log_history) <= 3 + 3 and "train_runtime" in trainer.state.log_history[-1]
