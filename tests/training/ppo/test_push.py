"""A policy on a loopback Hub: TRL's own GRPO script with its class names replaced, push_to_hub and the card."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from finished_run import CANARY, assert_canary_in_the_header_alone, files
from hub_server import Fault, Hub, Repo, hub
from paths import ROOT
from plain_ppo import PROMPTS

from salsa_peft import SalsaPPOConfig
from salsa_peft.utils.errors import SalsaError

BASE = "tester/tiny-base"
REWARDS = """
def length(completions, **kwargs):
    return [float(len(message["content"])) for (message,) in completions]

def progress(prompts, completions, completion_ids, trainer_state, log_metric, **kwargs):
    log_metric("progress", trainer_state.global_step)
    assert all(message["role"] == "user" for (message,) in prompts) and len(completion_ids) == len(completions)
    return [None for _ in completions]
"""
TRAIN = """
import sys
from plain_ppo import PROMPTS
from salsa_peft import SalsaPPOConfig, SalsaPPOTrainer
args = SalsaPPOConfig("full", batch_size=8, max_new_tokens=7, num_ppo_epochs=1, max_steps=2, save_steps=1, push_to_hub=True, use_cpu=True)
trainer = SalsaPPOTrainer(sys.argv[1], lambda completions, **_: [1.0] * len(completions), args, PROMPTS)
trainer.train()
trainer.push_to_hub(dataset_name="a/b")
"""
REPLACED = (
    ("from trl import GRPOTrainer, get_dataset", "from salsa_peft import SalsaPPOTrainer\n    from trl import get_dataset"),
    ("from trl import DatasetMixtureConfig, GRPOConfig", "from salsa_peft import SalsaPPOConfig\n    from trl import DatasetMixtureConfig"),
    ("GRPOTrainer(", "SalsaPPOTrainer("),
    ("GRPOConfig", "SalsaPPOConfig"),
)  # fmt: skip
"""What is replaced in TRL's script: two imports and two class names."""


@pytest.fixture
def server(make_base: Any, tokenizer: Any, tmp_path: Path) -> Iterator[Hub]:
    """A Hub with a tiny base."""
    base = make_base()
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    with hub(CANARY) as there:
        there.repos[BASE] = Repo()
        own = {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()}
        there.repos[BASE].commits[-1].files.update(own | {"README.md": b"---\nlicense: mit\n---\n"})
        yield there


def run(server: Hub, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Python in a folder, for a user whose Hub is the server."""
    environment = {
        **server.environment(folder / "home"),
        "PYTHONPATH": f"{ROOT}:{ROOT}/tests/support:{folder}",
        "HF_TOKEN": CANARY,
    }
    return subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False
    )


def trl_script(folder: Path) -> Path:
    """TRL's examples/scripts/grpo.py, which the package has as trl/scripts/grpo.py, with our class names."""
    spec = importlib.util.find_spec("trl")
    assert spec is not None and spec.submodule_search_locations is not None
    text = (Path(spec.submodule_search_locations[0]) / "scripts" / "grpo.py").read_text()
    for old, new in REPLACED:
        assert old in text, old
        text = text.replace(old, new)
    assert "SalsaPPOTrainer(" in text and "SalsaPPOConfig" in text and "GRPOTrainer" not in text
    path = folder / "ppo.py"
    path.write_text(text)
    return path


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_trls_grpo_script_runs_with_the_class_names_replaced(server: Hub, tmp_path: Path) -> None:
    """String model, peft_config, two reward functions, save_model and push_to_hub as they stand there."""
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    options = {
        "model_name_or_path": BASE, "dataset_name": str(tmp_path / "prompts"), "output_dir": "tiny-ppo", "lora_r": 4, "lora_alpha": 8,
        "lora_target_modules": "all-linear", "batch_size": 8, "max_new_tokens": 7, "num_ppo_epochs": 1, "num_train_epochs": 1,
        "learning_rate": 1e-3, "hub_private_repo": True, "save_steps": 1, "report_to": "none", "reward_weights": "1.0 0.5",
    }  # fmt: skip
    words = [word for key, value in options.items() for word in (f"--{key}", *str(value).split())]
    words += ["--reward_funcs", "my_rewards.length", "my_rewards.progress", "--use_peft", "--push_to_hub", "--use_cpu"]
    done = run(server, tmp_path, str(trl_script(tmp_path)), *words)
    assert done.returncode == 0, done.stderr[-3000:]
    repo = server.repos["tester/tiny-ppo"]
    assert repo.private
    messages = [commit.message for commit in repo.commits]
    assert messages[1] == "Training in progress, step 1" and messages[-1] in ("Model save", "End of training")
    pushed = files(server, "tester/tiny-ppo")
    names = {"README.md", "adapter_config.json", "adapter_model.safetensors", "value_head.safetensors", "tokenizer.json", "tokenizer_config.json"}  # fmt: skip
    assert names <= set(pushed) and not [
        name for name in pushed if "jsonl" in name or "/" in name or name.endswith(".bin")
    ]
    assert json.loads(pushed["adapter_config.json"])["base_model_name_or_path"] == BASE
    assert all(str(tmp_path).encode() not in content for content in pushed.values())
    (row,) = (tmp_path / "tiny-ppo" / "metrics.jsonl").read_text().splitlines()[-1:]
    assert {"rewards/length/mean", "progress"} <= set(json.loads(row))
    load = "from peft import AutoPeftModelForCausalLM as A; A.from_pretrained('tester/tiny-ppo')"
    again = run(server, tmp_path, "-c", load)
    assert again.returncode == 0, again.stderr[-2000:]
    front, body = pushed["README.md"].decode().removeprefix("---\n").split("\n---\n", 1)
    data = yaml.safe_load(front)
    assert (data["base_model"], data["base_model_relation"], data["license"]) == (BASE, "adapter", "mit")
    assert {"salsa", "ppo", "rlhf", "peft", "lora"} <= set(data["tags"]) and data["library_name"] == "peft"
    for line in (
        "| reference | base |",
        "| reward | 1·length + 0.5·progress |",
        "| data: prompts | prompts |",
        "| objective/scores | ",
    ):
        assert line in body, line
    assert_canary_in_the_header_alone(server, tmp_path, said=done.stdout + done.stderr)


@pytest.mark.timeout(900)
def test_a_failed_push_in_training_is_told_and_training_goes_on(server: Hub, tmp_path: Path) -> None:
    """The end is pushed again, and its failure is an error. No prompts go to the Hub, so checkpoints do not either."""
    (tmp_path / "train.py").write_text(TRAIN)
    server.faults.append(Fault("POST", "/commit/", 403))
    done = run(server, tmp_path, "train.py", str(tmp_path / "base"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "push_to_hub: Training in progress, step 1: not pushed (" in done.stderr
    assert [commit.message for commit in server.repos["tester/full"].commits[1:]] == [
        "Training in progress, step 2", "End of training"
    ]  # fmt: skip
    pushed = files(server, "tester/full")
    assert {"README.md", "config.json", "model.safetensors"} <= set(pushed) and "metrics.jsonl" not in pushed
    card = pushed["README.md"].decode()
    assert "| reference | start |" in card and "A full checkpoint that began as the local base base" in card
    assert "base_model" not in card.split("\n---\n")[0] and "- a/b" in card and str(tmp_path) not in card
    with pytest.raises(
        SalsaError, match=r"hub_strategy: all_checkpoints is not supported, because checkpoints hold prompts"
    ):
        SalsaPPOConfig(output_dir=str(tmp_path / "x"), use_cpu=True, hub_strategy="all_checkpoints")
