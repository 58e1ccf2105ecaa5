"""A whole recipe whose base, seeds, reward model and reference come from a loopback Hub, and whose policy goes there."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from finished_run import (
    BASE_ID,
    CANARY,
    assert_canary_in_the_header_alone,
    command,
    files,
    make_run,
    publish_base,
)
from hub_server import Fault, Hub, hub
from paths import ROOT

from salsa_peft.config.load import load_recipe, saved_recipe
from salsa_peft.config.yaml import dump_yaml
from salsa_peft.data import toy_language as toy
from salsa_peft.report.publish import hub as hub_push
from salsa_peft.utils.errors import SalsaError


def write_recipe(folder: Path, tokenizer: Any, **more: Any) -> Path:
    """One that trains two policies for two updates and asks for nothing but prompts."""
    (folder / "template.jinja").write_text(tokenizer.chat_template)
    prompts = toy.draw_prompts(random.Random(0), 16, toy.LENGTHS_IN, 0)
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    content = {
        "name": "theirs", "model": {"base": BASE_ID, "max_length": 32, "chat_template": "template.jinja"},
        "sft": {"from": ["tester/r-seed-0", "tester/r-seed-1"]}, "reward": "tester/r-reward", "data": {"prompts": "prompts.jsonl"},
        "ppo": {"batch_size": 8, "num_train_epochs": 1, "num_ppo_epochs": 1}, "generation": {"max_new_tokens": 6},
        "policies": {"salsa": {"reference": "soup"}, "theirs": {"reference": "tester/r-soup"}}, "landscape": None,
        "evaluate": {"prompts": {"in": "prompts.jsonl"}}, "hub": {"push": ["salsa"]}, **more,
    }  # fmt: skip
    (folder / "mine.yaml").write_text(yaml.safe_dump(content))
    return folder / "mine.yaml"


def run_recipe(server: Hub, home: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """`salsa run` of a user whose Hub is the server."""
    argv = [sys.executable, "-m", "salsa_peft.recipe", *words]
    environment = {**server.environment(home), "OMP_NUM_THREADS": "1"}
    return subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False)


@pytest.mark.slow
def test_what_is_published_is_somebody_s_seeds_reward_and_reference(tmp_path: Path, tokenizer: Any, make_base: Any, make_adapter: Any) -> None:  # fmt: skip
    """The published soup is the soup of the published seeds: both policies are the same to the bit. A push that fails loses nothing."""
    published = make_run(tmp_path, tokenizer, make_base, make_adapter)
    (tmp_path / "user").mkdir()
    recipe, run, home = write_recipe(tmp_path / "user", tokenizer), tmp_path / "user" / "run", tmp_path / "user-home"
    with hub(CANARY) as server:
        publish_base(server, published)
        names = ("soup", "reward", "seed-0", "seed-1")
        done = command(server, tmp_path / "home", "push", str(published), *names, "--to", "tester/r")
        assert done.returncode == 0, done.stderr
        server.faults.append(Fault("POST", "tester/run-salsa/commit/", 403, times=99))
        done = run_recipe(server, home, str(recipe), "--lora", "--output-dir", str(run))
        assert done.returncode == 1, done.stderr[-3000:]
        assert (
            "1 of 1 results were not pushed (salsa: tester/run-salsa: the Hub answers 403"
            in done.stderr.splitlines()[-1]
        )
        assert (run / "report.html").is_file() and (run / hub_push.PENDING).is_file()
        (seed,) = run.glob("stages/sft/seed-0/*/adapter_model.safetensors")
        assert seed.read_bytes() == files(server, "tester/r-seed-0")["adapter_model.safetensors"]
        told = json.loads((seed.parent / "metrics.json").read_text())
        assert told == {"from": "tester/r-seed-0", "commit": server.repos["tester/r-seed-0"].commits[-1].sha}
        weights = [
            next(run.glob(f"stages/ppo/{name}/*/adapter_model.safetensors")).read_bytes()
            for name in ("salsa", "theirs")
        ]
        assert weights[0] == weights[1] != seed.read_bytes()
        first = [
            json.loads(next(run.glob(f"stages/ppo/{name}/*/metrics.jsonl")).read_text().splitlines()[0])
            for name in ("salsa", "theirs")
        ]
        assert first[0]["objective/kl"] == first[1]["objective/kl"] != 0
        server.faults.clear()
        server.faults.append(Fault("POST", "tester/run-salsa/commit/", 503))
        again = run_recipe(server, home, str(recipe), "--lora", "--output-dir", str(run))
        assert again.returncode == 0, again.stderr[-3000:]
        assert (
            again.stderr.count("cached") == 7
            and "next try in 2 s" in (run / "logs" / "hub.log").read_text() + again.stderr
        )
        assert server.repos["tester/run-salsa"].private and not (run / hub_push.PENDING).exists()
        card = files(server, "tester/run-salsa")["README.md"].decode()
        assert "| seed-0 | taken from tester/r-seed-0 |" in card and str(tmp_path) not in card
        assert_canary_in_the_header_alone(server, run, home, published, said=done.stderr + again.stderr + done.stdout)
        saved = run_recipe(server, home, str(run / "recipe.yaml"), "--output-dir", str(run), "--dry-run")
        assert saved.stdout.count("cached") == 8, saved.stdout


def test_seeds_can_be_taken_some_trained(tmp_path: Path, tokenizer: Any) -> None:
    """One number for each; the saved recipe says `from` again."""
    recipe = load_recipe(str(write_recipe(tmp_path, tokenizer)), lora="lora", overrides=[]).recipe
    assert recipe.sft.seeds == [0, 1] and recipe.sft.existing_seed(1) == "tester/r-seed-1"
    (tmp_path / "saved.yaml").write_text(dump_yaml(recipe.as_data()))
    assert "from_" not in (tmp_path / "saved.yaml").read_text() and saved_recipe(tmp_path / "saved.yaml") == recipe
    assert load_recipe(str(tmp_path / "saved.yaml"), lora=None, overrides=[]).recipe == recipe
    (tmp_path / "s").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "s" / name).touch()
    made = load_recipe(
        str(tmp_path / "mine.yaml"),
        lora="lora",
        overrides=[f"sft.from=[null, {tmp_path / 's'}, a/b]", "data.demonstrations=some/chats"],
    )
    assert made.recipe.sft.seeds == [0, 1, 2] and made.recipe.sft.from_ == [None, str(tmp_path / "s"), "a/b"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["sft.from=[null, a/b]"],
            "data.demonstrations: is required; add it (or add a `toy` section, which builds a tiny model and toy data)",
        ),
        (
            ["sft.from=[a/b]", "sft.seeds=[0, 1]"],
            "sft.from: has 1 entries, but sft.seeds has 2 seeds; give one entry per seed, or null for a seed that this run is to train",
        ),
        (
            ["sft.from=[soup, a/b]"],
            "sft.from[0]: 'soup' is no folder or Hub id (namespace/name); give the folder or Hub id of a LoRA adapter",
        ),
        (
            ["sft.from=[./nowhere, a/b]"],
            f"sft.from[0]: there is no folder '{Path('nowhere').resolve()}'; give the folder or Hub id of a LoRA adapter",
        ),
        (["sft.from=[1, 2]"], "sft.from[1]: must be text, not 2"),
        (["sft.form=[a/b]"], "sft.form: unknown key; did you mean from"),
    ],
)
def test_seeds_that_can_not_be_are_refused(tmp_path: Path, tokenizer: Any, overrides: list[str], message: str) -> None:
    """With the recipe."""
    path = write_recipe(tmp_path, tokenizer)
    with pytest.raises(SalsaError) as error:
        load_recipe(str(path), lora="lora", overrides=overrides)
    assert message in str(error.value)
