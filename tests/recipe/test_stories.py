"""The recipes on real language: their rewards on known texts, their plans, and one of them run small where a model is at hand."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from paths import ROOT
from small_recipe import ENVIRONMENT, read, unit

pytestmark = pytest.mark.skipif(importlib.util.find_spec("textblob") is None, reason="needs textblob")


@pytest.fixture
def rewards() -> Any:
    """The module examples/sentiment_reward.py."""
    from salsa_peft.models.rewards.function import load_function

    load_function(f"{ROOT}/examples/sentiment_reward:sentiment")
    return sys.modules["sentiment_reward"]


class TestRewards:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("", 0.0),
            ("the cat sat on the mat", 0.0),
            ("happy", 0.8),
            ("sad", -0.5),
            ("a happy cat and a sad dog", 0.3),
            ("happy happy happy", 2.4),  # each mention counts: what a policy can exploit
            ("not happy", -0.4),
        ],
    )
    def test_the_sum_of_polarities(self, rewards: Any, text: str, expected: float) -> None:
        assert rewards.sentiment(completions=[text]) == [pytest.approx(expected)]
        message = [{"role": "assistant", "content": text}]
        assert rewards.sentiment(completions=[message], prompts=["x"]) == [pytest.approx(expected)]

    @pytest.mark.parametrize(
        ("text", "share"),
        [
            ("", 0.0),
            ("one two", 0.0),
            ("one two three four", 0.0),
            ("he ran home He ran home", 1 / 4),  # four trigrams, the last of which is the first again
            ("la la la la la la", 3 / 4),
        ],
    )
    def test_repetition_by_hand(self, rewards: Any, text: str, share: float) -> None:
        assert rewards.repetition(text) == pytest.approx(share)
        assert rewards.gold(completions=[text]) == [pytest.approx(-rewards.PENALTY * share)]

    def test_gold_prefers_a_story_to_a_repeated_word(self, rewards: Any) -> None:
        story, hack = "She was happy and kind. They had a good day at the park.", "happy " * 12
        (better, worse), (plain, hacked) = rewards.gold([story, hack]), rewards.sentiment([story, hack])
        assert hacked > plain and worse < hacked - 4
        assert better == plain

    def test_gold_counts_a_word_once(self, rewards: Any) -> None:
        """Sentences that differ in their subjects only say the same happy word again."""
        hack = "Bob was happy. The bear got happy. Then all were happy."
        assert rewards.sentiment([hack]) == [pytest.approx(2.4)]
        assert rewards.gold([hack]) == [pytest.approx(0.8)]
        assert rewards.gold(["Bob was happy, the bear was kind and sad."]) == [pytest.approx(0.8 + 0.6 - 0.5)]


def command(*words: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "salsa_peft.recipe", *words]
    return subprocess.run(argv, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=900, check=False)


@pytest.mark.parametrize("name", ["stories", "sentiment"])
def test_the_plan(name: str, tmp_path: Path) -> None:
    """Offline, with the base not downloaded."""
    done = command(name, "--lora", "--dry-run", "--output-dir", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    stages = [line.split()[0] for line in done.stdout.splitlines() if "to do" in line]
    assert stages[:2] == ["synthetic", "data/demonstrations"]
    assert ("reward" in stages) is (name == "stories") and "ppo/ppo" in stages


def test_prompts_of_training_and_evaluation_are_disjoint() -> None:
    rows = {
        name: [json.loads(line)["prompt"] for line in (ROOT / "recipes" / "prompts" / f"{name}.jsonl").open()]
        for name in ("stories", "stories_held_out")
    }
    assert {name: len(set(found)) for name, found in rows.items()} == {"stories": 320, "stories_held_out": 128}
    assert not set(rows["stories"]) & set(rows["stories_held_out"])


TINY = {
    "synthetic.limit": 64, "synthetic.num_generations": 4, "sft.num_train_epochs": 1, "reward.num_train_epochs": 1, "reward.batch_size": 32,
    "generation.max_new_tokens": 24, "ppo.max_steps": 8, "ppo.batch_size": 32, "landscape": None,
    "evaluate.prompts.stories.limit": 32, "policies": {"ppo": {"reference": "seed-0"}, "salsa": {"reference": "soup"}},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_stories_small_on_a_real_model(shared: Path, tmp_path: Path) -> None:
    """From the model's own stories to the report, with the held-out reward in logs, evaluation and figures."""
    base = shared / "stories260k"
    if not base.is_dir():
        pytest.skip("needs stories260k")
    sets = [word for key, value in TINY.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    out = tmp_path / "run"
    done = command("stories", "--lora", "--set", f"model.base={base}", "--set", "model.revision=null", *sets, "--output-dir", str(out))  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    facts = read(unit(out, "synthetic") / "manifest.json")["facts"]
    assert facts["answers"] == 256 and facts["mean_best_score"] > facts["mean_score"] + 0.2
    rows = [json.loads(line) for line in (unit(out, "ppo/ppo") / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and {"rewards/adapter/mean", "rewards/sentiment/mean", "rewards/gold/mean"} <= set(rows[0])
    assert rows[0]["objective/scores"] == pytest.approx(rows[0]["rewards/adapter/mean"])
    evaluation = read(unit(out, "evaluate") / "evaluation.json")
    assert evaluation["measures"] == ["reward", "sentiment", "gold"]
    scores = evaluation["datasets"]["stories"]["models"]["ppo"]["scores"]
    assert scores["sentiment"]["mean"] >= scores["gold"]["mean"]
    figures = {path.name for path in (unit(out, "report") / "figures").iterdir()}
    assert {"training-gold.png", "frontier-gold.png"} <= figures
